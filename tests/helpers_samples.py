"""What the tests of the fused losses over samples share: tolerances, layouts, counting of calls."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

BACKENDS = ["torch", "triton", "reference"]

# Some ten roundings of the dtype that is computed in, relative to the numbers of these problems, which are of the order
# of one; the half types add the rounding of the result, twice since Triton's interpreter rounds it down.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

# The same numbers, laid out otherwise; the shape has two dimensions.
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "transposed": lambda x: x.t().contiguous().t(),
    "sliced": lambda x: x.repeat_interleave(2, -1)[:, ::2],
    "rows apart": lambda x: torch.cat([x, x], -1)[:, : x.shape[1]],
}


def in_float64(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same numbers, for the reference."""
    return {
        k: x.detach().double().requires_grad_(x.requires_grad) if isinstance(x, Tensor) and x.is_floating_point() else x
        for k, x in arguments.items()
    }


def close(found: Tensor, expected: Tensor, dtype: torch.dtype, factor: float = 1.0) -> bool:
    """Whether all elements agree but for rounding, relative to their size or to one."""
    expected = expected.double()
    error = (found.double() - expected).abs()
    same = (found == expected) | (found.isnan() & expected.isnan())
    return bool((same | (error <= factor * TOLERANCE[dtype] * (1 + expected.abs()))).all())


class Calls(TorchDispatchMode):
    """Counts what is dispatched, views included."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))
