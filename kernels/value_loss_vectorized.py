"""The critic's loss in few PyTorch calls, since they are what it costs: the ``torch`` backend."""

from typing import Any

import torch
from torch import Tensor

from .distances import distance
from .dtypes import as_scalar, cast
from .samples_reference import with_slope
from .samples_vectorized import factors, mean, padding_and_count, selected
from .value_loss_problem import ValueConstants, dtypes, smallest_variance


def compose(value: Tensor, constants: ValueConstants) -> list[Tensor]:
    """The loss, differentiable in ``value``, and what is logged."""
    target, old_value, mask, weights, clip, coefficient, kind, explained_variance, reduction = constants
    dtype, precise = dtypes(value, constants)
    padding, count = padding_and_count(mask, value.numel(), precise)
    now, target = cast(value, precise), cast(target, precise)
    if padding is not None:
        now, target = now.masked_fill(padding, 0), target.masked_fill(padding, 0)

    logged = []
    plain = old_value is None and padding is None and weights is None
    loss = distance(now, target, kind, reduction if plain else "none")
    if old_value is not None:
        bound: Any = as_scalar(clip, precise, value.device)
        with torch.no_grad():
            old = cast(old_value, precise)
            old = old if padding is None else old.masked_fill(padding, 0)
        step = now - old
        with torch.no_grad():
            outside, clipped = step.abs() > bound, step.clamp(-bound, bound)
            logged.append(mean(selected(outside, padding), padding, count, precise))
        loss = torch.maximum(loss, distance(torch.where(outside, clipped, step) + old, target, kind, "none"))
    if not plain:
        if weights is not None:
            loss = loss * factors(weights, padding, reduction, precise)
        elif reduction == "mean":
            loss = loss / count
        loss = loss if reduction == "none" else loss.sum()
    if coefficient is not None:
        loss = loss * as_scalar(coefficient, precise, value.device)
    if explained_variance:
        smallest = smallest_variance(constants.value_target, dtype)
        with torch.no_grad():
            variance = _variance(target, padding, count).clamp_min_(smallest)
            logged.append((variance - _variance(now - target, padding, count)).div_(variance))
    return [cast(loss, dtype), *(cast(x, dtype) for x in logged)]


def forward(value: Tensor, constants: ValueConstants, keep: bool) -> list[Tensor]:
    """The loss, what is logged, and the slope if it is to be kept."""
    return with_slope(compose, value, constants, keep, dtypes(value, constants)[1])


def _variance(x: Tensor, padding: Tensor | None, count: Any) -> Tensor:
    if padding is None:
        return torch.var_mean(x, correction=0)[0]  # faster than `var` itself
    deviation = (x - x.sum() / count).masked_fill_(padding, 0)
    return deviation.square_().sum().div_(count)
