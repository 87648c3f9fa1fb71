"""What the references of the losses over samples share: their means, and the slope as autograd finds it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .dtypes import laid_out_like
from .function import autograd_inside


def mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the samples that count, 0 where none does."""
    return torch.where(mask, x, 0).sum() / mask.sum().clamp_min(1)


def reduced(loss: Tensor, mask: Tensor, weights: Tensor | None, reduction: str) -> Tensor:
    """Σ m w l / Σ m w (0 where m w = 0 for all), Σ m w l, or m w l."""
    counted = mask.to(loss.dtype) if weights is None else torch.where(mask, weights, 0)
    # Selected first: what stands at a masked sample would come through a product as 0 · NaN.
    loss = torch.where(mask, loss, 0) * counted
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    total = counted.sum()
    return loss.sum() / torch.where(total == 0, 1, total)


def with_slope(
    compose: Callable[..., list[Tensor]], x: Tensor, constants: Any, keep: bool, precise: torch.dtype
) -> list[Tensor]:
    """What ``compose`` gives; and, if it is to be kept, ∂L/∂x of each sample in the dtype that is computed in."""
    found = compose(x, constants)
    if not keep:
        return found
    leaf = x.detach().to(precise).requires_grad_()
    with autograd_inside():
        loss, *_ = compose(leaf, constants)
        (slope,) = torch.autograd.grad(loss.sum(), leaf)
    return [*found, laid_out_like(slope, x, precise)]
