"""The critic's loss as its formulas say it: the text that the fast backends are tested against.

`compose` is differentiable in every argument but the old value, any number of times. `forward` makes it the
``reference`` backend.
"""

import torch
from torch import Tensor

from .distances import DISTANCES
from .samples_reference import mean, reduced, with_slope
from .value_loss_problem import ValueConstants, dtypes, smallest_variance


def compose(value: Tensor, constants: ValueConstants) -> list[Tensor]:
    """The loss, and without gradient, as wanted, the share of clipped values and the explained variance."""
    dtype, precise = dtypes(value, constants)
    mask = torch.ones_like(value, dtype=torch.bool) if constants.mask is None else constants.mask

    def read(x: Tensor) -> Tensor:
        # Selected before anything is computed: the gradient of what padding holds would be 0 · NaN.
        return torch.where(mask, x, 0).to(precise)

    distance = DISTANCES[constants.loss_function]
    now, target = read(value), read(constants.value_target)
    loss = distance(now, target, reduction="none")
    logged = []
    if constants.old_value is not None:
        old = read(constants.old_value).detach()
        clip = torch.as_tensor(constants.clip, dtype=precise, device=value.device)
        step = now - old
        is_clipped = step.abs() > clip
        moved = old + torch.where(is_clipped, step.clamp(-clip, clip), step)  # a step to the bound has its gradient
        loss = torch.max(loss, distance(moved, target, reduction="none"))
        logged.append(mean(is_clipped.to(precise), mask))
    if constants.explained_variance:
        smallest = smallest_variance(constants.value_target, dtype)
        logged.append(1 - variance(target - now, mask) / variance(target, mask).clamp_min(smallest))
    if constants.coefficient is not None:
        loss = loss * torch.as_tensor(constants.coefficient, dtype=precise, device=value.device)
    weights = None if constants.weights is None else read(constants.weights)
    loss = reduced(loss, mask, weights, constants.reduction)
    return [loss.to(dtype), *(x.detach().to(dtype) for x in logged)]


def forward(value: Tensor, constants: ValueConstants, keep: bool) -> list[Tensor]:
    """The loss, what is logged, and the slope if it is to be kept."""
    return with_slope(compose, value, constants, keep, dtypes(value, constants)[1])


def variance(x: Tensor, mask: Tensor) -> Tensor:
    """Mean squared deviation from the mean, of the samples that count."""
    return mean((x - mean(x, mask)).square(), mask)
