"""The dtype that backends compute in, and the dtype and the layout that their results have."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def result_dtype(x: Tensor, *others: Tensor | None) -> torch.dtype:
    """The dtype that all tensors together have in common."""
    dtype = x.dtype
    for y in others:
        if y is not None and y.dtype != dtype:
            dtype = torch.promote_types(dtype, y.dtype)
    return dtype


def floating(dtype: torch.dtype) -> torch.dtype:
    """``dtype``, or the default one where it is of integers."""
    return dtype if dtype.is_floating_point else torch.get_default_dtype()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that backends compute in: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in ``dtype``: a call of `to` costs as much as an addition even if there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


def laid_out_like(y: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``y`` in ``dtype``, with the strides of ``torch.empty_like(x)``, which is what the compiler is told."""
    if x.is_contiguous() and y.is_contiguous():
        return cast(y, dtype)
    like = torch.empty_like(x, dtype=dtype)
    return cast(y, dtype) if y.stride() == like.stride() else like.copy_(y)


def as_scalar(x: float | Tensor, dtype: torch.dtype, device: torch.device) -> float | Tensor:
    """A number as it is; a 0-d tensor in the dtype and on the device that is computed in."""
    if not isinstance(x, Tensor) or (x.dtype == dtype and x.device == device):
        return x
    return x.to(device, dtype, non_blocking=True)


def full_precision(like: Tensor) -> AbstractContextManager[Any]:
    """A block without autocast, which would round the factors of a matrix product to half precision."""
    return torch.autocast(like.device.type, enabled=False) if autocast_is_on(like) else nullcontext()


def autocast_is_on(like: Tensor) -> bool:
    """Whether autocast is on for the device of ``like``, if it is one that has it."""
    device = like.device.type
    if torch.compiler.is_compiling():  # which in PyTorch 2.11 can't ask what devices have it
        return device != "meta" and torch.is_autocast_enabled(device)
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
