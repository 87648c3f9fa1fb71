"""When the ``verify`` backends take a result for wrong."""

import torch
from torch import Tensor

# Allowed error relative to the scale of an element (see `_scale`): some hundred roundings of the compute dtype, which
# is float32 for the half types; their own rounding of the result comes on top.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


class VerificationError(RuntimeError):
    """A backend's result differs from the reference."""


def compare(what: str, backend: str, dtype: torch.dtype, found: Tensor, expected: Tensor, scale: Tensor) -> None:
    """Raise VerificationError if an element of ``found`` is further from ``expected`` than rounding explains.

    ``scale`` is the magnitude of what an element was computed from, ``dtype`` the one that says how it was rounded.
    """
    tolerance = TOLERANCE[dtype]
    # As the result's own dtype has it: infinite beyond its range, and in steps that don't shrink any more near 0.
    expected = expected.to(found.dtype).double()
    smallest_step = torch.finfo(found.dtype).smallest_normal * torch.finfo(found.dtype).eps
    error = (found.double() - expected).abs()
    agree = (error <= tolerance * scale + smallest_step) | (found == expected) | (found.isnan() & expected.isnan())
    if agree.all():
        return
    excess = torch.where(agree, -1.0, (error / scale).nan_to_num(nan=torch.inf))
    index = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
    raise VerificationError(
        f"{what}: backend {backend!r} gives {found[index].item()} at index {index}, "
        f"the reference {expected[index].item()}"
    )
