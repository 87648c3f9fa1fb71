"""The compiled forms of the kernels that the static table measures, specialised as launches on aligned tensors are.

A file for each family of kernels, whose `variants` are rows of the table.
"""

from . import categorical, scan
from .compiling import Strided, Variant, compile_as_launched

__all__ = ["Strided", "Variant", "compile_as_launched", "variants"]


def variants() -> list[Variant]:
    """All rows of the table."""
    return [*scan.variants(), *categorical.variants()]
