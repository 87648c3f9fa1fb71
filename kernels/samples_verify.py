"""What the ``verify`` backends of the losses over samples share: the same problem in float64, and the comparison.

A debugging aid: it reads results on the host, which waits for the device.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .compare import TOLERANCE, compare

Constants = TypeVar("Constants", bound=tuple[Any, ...])


def in_float64(constants: Constants) -> Constants:
    """The constants, floating-point tensors among them in float64."""
    double = (x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in constants)
    return type(constants)(*double)


def compare_all(
    names: Sequence[str], backend: str, found: Sequence[Tensor], expected: Sequence[Tensor], scales: Sequence[Tensor]
) -> None:
    """Raise VerificationError at the first result that differs by more than rounding; ``scales`` see `compare`."""
    for name, x, wanted, scale in zip(names, found, expected, scales, strict=True):
        compare(name, backend, x.dtype, x, wanted, scale.expand_as(x))


def undecided(distance: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether rounding of numbers as large as ``scale`` may move a value by its ``distance`` from a kink."""
    return distance.abs() <= TOLERANCE[dtype] * scale


def share_scale(undecided: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale of the share of samples beyond a kink: the undecided ones may be on either side."""
    return 1 + (undecided & mask).sum() / mask.sum().clamp_min(1) / TOLERANCE[dtype]


def size_of(*tensors: Tensor | None) -> Tensor:
    """The sum of the tensors' magnitudes where they are finite: what a sample's result is computed from."""
    return torch.stack([x.nan_to_num(0, 0, 0).abs() for x in tensors if x is not None]).sum(0)


def factors(mask: Tensor, weights: Tensor | None, reduction: str) -> Tensor:
    """What each sample's loss is multiplied with, in magnitude."""
    counted = mask.double() if weights is None else weights * mask
    if reduction == "mean":
        total = counted.sum()
        counted = counted / torch.where(total == 0, 1, total)
    return counted.abs()
