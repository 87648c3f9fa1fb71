"""The compiled forms of the kernels that the static table measures, specialised as launches on aligned tensors are.

A file for each family of kernels. Its `variants` are rows of the table. Where launches specialise a family in more ways
than are worth a row, its `specialisations` are the others: tests hold them to the same limits.
"""

from collections.abc import Iterator

from triton.backends.compiler import GPUTarget

from . import action_value, categorical, samples, scan, squashed_normal
from .compiling import Strided, Variant, compile_as_launched

__all__ = ["TARGETS", "Strided", "Variant", "compile_as_launched", "specialisations", "table"]

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# A target of each vendor, whose compilers differ the most: a row takes a second.
_ONE_EACH = ("sm_90", "gfx942")


def table() -> Iterator[tuple[str, Variant]]:
    """Target and variant of all rows of the table."""
    for family, targets in (
        (scan, TARGETS),
        (categorical, TARGETS),
        (samples, _ONE_EACH),
        (action_value, _ONE_EACH),
        (squashed_normal, _ONE_EACH),
    ):
        for variant in family.variants():
            for target in targets:
                yield target, variant


def specialisations() -> Iterator[tuple[str, Variant]]:
    """Target and variant of what has no row in the table."""
    for family in (samples, action_value, squashed_normal):
        for variant in family.specialisations():
            yield "sm_90", variant
