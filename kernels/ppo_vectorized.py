"""The clipped surrogate of PPO in few PyTorch calls, since they are what it costs: the ``torch`` backend.

The advantage is negated, normalised and divided by the number of samples in one go, so that the loss is the sum of
max(r Â', clip(p) (r/p) Â') = exp(x) Â'. Where clipping makes the loss greater, x is a constant; elsewhere it is log r.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .dtypes import as_scalar, cast
from .ppo_problem import SMALLEST_STD, PPOConstants, dtypes
from .samples_reference import with_slope
from .samples_vectorized import factors, mean, padding_and_count, selected


def compose(log_prob: Tensor, constants: PPOConstants) -> list[Tensor]:
    """The loss, differentiable in ``log_prob``, and what is logged."""
    old_log_prob, advantage, proximal_log_prob, mask, weights, low, high, max_ratio, normalize, reduction = constants
    dtype, precise = dtypes(log_prob, constants)
    device = log_prob.device
    padding, count = padding_and_count(mask, log_prob.numel(), precise)

    current = cast(log_prob, precise)
    log_weight = _unpadded(current - cast(old_log_prob, precise), padding)
    proximal_log_weight = log_weight
    with torch.no_grad():
        if proximal_log_prob is not None:
            proximal_log_weight = selected(current - cast(proximal_log_prob, precise), padding)
        excess = None
        if max_ratio is not None:
            excess = (log_weight - _log(as_scalar(max_ratio, precise, device))).clamp_min_(0)
    if excess is not None:
        log_weight = log_weight - excess
    with torch.no_grad():
        ratio = log_weight.exp()
        low, high = as_scalar(low, precise, device), as_scalar(high, precise, device)
        step = proximal_log_weight.expm1()  # p − 1
        clipped = _clamp(step, -low, high)
        outside = selected(clipped != step, padding)
        divisor = count if reduction == "mean" and weights is None else 1
        gain = _negative_advantage(cast(advantage, precise), padding, count, normalize, divisor)
        lost = clipped * gain > step * gain
        log_clipped = clipped.log1p_()
        # And log r/p. What padding leaves here isn't selected: nothing is lost where the gain is 0.
        if proximal_log_prob is not None:
            log_clipped.add_(cast(proximal_log_prob, precise) - cast(old_log_prob, precise))
        if excess is not None:
            log_clipped.sub_(excess)
    # Selected before the exponential, which may overflow: its gradient would be 0 · ∞.
    loss = torch.where(lost, log_clipped, log_weight).exp() * gain
    if weights is not None:
        loss = loss * factors(weights, padding, reduction, precise)
    loss = loss if reduction == "none" else loss.sum()

    with torch.no_grad():
        ratio = _unpadded(ratio, padding)
        logged = (
            mean(proximal_log_weight, padding, count, precise).neg_(),
            mean(outside, padding, count, precise),
            _effective_sample_size(log_weight, padding, count),
            ratio.max(),
            mean(ratio, padding, count, precise),
        )
    return [cast(loss, dtype), *(cast(x, dtype) for x in logged)]


def forward(log_prob: Tensor, constants: PPOConstants, keep: bool) -> list[Tensor]:
    """The loss, what is logged, and the slope if it is to be kept."""
    return with_slope(compose, log_prob, constants, keep, dtypes(log_prob, constants)[1])


def _unpadded(x: Tensor, padding: Tensor | None) -> Tensor:
    """``x`` with 0 where a sample doesn't count, and no gradient there."""
    return x if padding is None else x.masked_fill(padding, 0)


def _negative_advantage(advantage: Tensor, padding: Tensor | None, count: Any, normalize: bool, divisor: Any) -> Tensor:
    """−Â / divisor, 0 where a sample doesn't count."""
    if padding is None:
        if not normalize or count == 1:
            return advantage / -divisor
        std, mean = torch.std_mean(advantage)
        return (advantage - mean).div_(std.clamp_min_(SMALLEST_STD).mul_(-divisor))
    advantage = advantage.masked_fill(padding, 0)
    if normalize:
        deviation = (advantage - advantage.sum() / count).masked_fill_(padding, 0)
        std = torch.linalg.vector_norm(deviation).div_((count - 1).clamp_min_(1).sqrt_())
        advantage = torch.where(count > 1, deviation.div_(std.clamp_min_(SMALLEST_STD)), advantage)
    return advantage.div_(-divisor)


def _effective_sample_size(log_weight: Tensor, padding: Tensor | None, count: Any) -> Tensor:
    """1 / (N Σ p²) with the weights' shares p: relative to the largest weight nothing overflows."""
    if padding is not None:
        log_weight = log_weight.masked_fill(padding, -torch.inf)
    share = log_weight.flatten().softmax(0)
    found = share.dot(share).mul_(count).reciprocal_()
    return found if padding is None else found.masked_fill_(padding.all(), 0)


def _log(x: float | Tensor) -> float | Tensor:
    return x.log() if isinstance(x, Tensor) else math.log(x)


def _clamp(x: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    if isinstance(low, Tensor) != isinstance(high, Tensor):
        low, high = (b if isinstance(b, Tensor) else x.new_full((), b) for b in (low, high))
    return x.clamp(low, high)  # type: ignore[arg-type]  # both of one type
