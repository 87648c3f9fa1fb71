"""The clipped surrogate of PPO that every backend computes: the constants beside log π_θ(a|s), and their checks.

With the samples that count (mask m), importance weights w and, where they are given, π_prox and a cap R on the ratio,

    log r = log π_θ − log π_old                  less its excess over log R, which holds no gradient
    log p = log π_θ − log π_prox                 π_prox is π_old by default; never capped
    Â     = (A − mean A) / max(std A, 10⁻⁶)      if normalised and more than one sample counts, else A
    L     = −min(r Â, clip(p, 1 − ε_low, 1 + ε_high) · (r/p) Â),     reduced: Σ m w L / Σ m w, Σ m w L, or m w L

where r/p holds no gradient, so that ∂L/∂log π_θ is L itself, or 0 where the clipped term is the smaller one and p lies
outside of the range. log r − log p would be −∞ + ∞ of an impossible action, and so it is computed as

    log r/p = log π_prox − log π_old             less the excess
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import REDUCTIONS, check_0d, check_choice, check_not_negative
from .dtypes import compute_dtype, result_dtype
from .samples import check_samples, new_outputs

SMALLEST_STD = 1e-6  # a spread below this is rounding noise and is not blown up to 1

# kl_approx, clip_fraction, ess, max_ratio, mean_ratio
LOGGED = 5


class PPOConstants(NamedTuple):
    """All but ``log_prob``: tensors of its shape, scalars that are numbers or 0-d tensors, and options."""

    old_log_prob: Any
    advantage: Any
    proximal_log_prob: Any  # a tensor, or None
    mask: Any  # a bool tensor, or None
    weights: Any  # a tensor, or None
    clip_low: Any
    clip_high: Any
    max_ratio: Any  # a scalar, or None
    normalize: bool
    reduction: str


def check(log_prob: Tensor, constants: PPOConstants) -> None:
    """Raise RuntimeError for a shape or device, TypeError for a dtype, ValueError for a reduction that doesn't fit."""
    old_log_prob, advantage, proximal_log_prob, mask, weights, clip_low, clip_high, max_ratio, _, reduction = constants
    others = {"old_log_prob": old_log_prob, "advantage": advantage}
    optional = {"proximal_log_prob": proximal_log_prob, "weights": weights}
    check_samples("log_prob", log_prob, others, optional, mask)
    for name, bound in (("clip_low", clip_low), ("clip_high", clip_high)):
        check_0d(name, bound)
        check_not_negative(name, bound)
    if max_ratio is not None:
        check_0d("max_ratio", max_ratio)
        if isinstance(max_ratio, (int, float)) and not max_ratio > 0:
            raise ValueError(f"max_ratio is {max_ratio}, but must be positive")
    check_choice("reduction", reduction, REDUCTIONS)


def dtypes(log_prob: Tensor, constants: PPOConstants) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of the loss and of what is logged, and the one that is computed in."""
    dtype = result_dtype(
        log_prob, constants.old_log_prob, constants.advantage, constants.proximal_log_prob, constants.weights
    )
    return dtype, compute_dtype(dtype)


def outputs(log_prob: Tensor, constants: PPOConstants, keep: bool) -> list[Tensor]:
    """Uninitialised: the loss, what is logged, and the slope if it is to be kept."""
    return new_outputs(log_prob, *dtypes(log_prob, constants), constants.reduction, LOGGED, keep)


def slope_of(log_prob: Tensor, slope: Tensor) -> Tensor:
    """The slope as a function of log π_θ. It is its own derivative: a constant times r, or 0.

    Nothing else needs to be kept for gradients that are differentiated: the batch is free once the loss is computed.
    """
    # An impossible action's ratio is 0 whatever the step, and what padding holds isn't read.
    step = torch.where(log_prob.isfinite(), log_prob - log_prob.detach(), 0)
    return slope * step.exp()
