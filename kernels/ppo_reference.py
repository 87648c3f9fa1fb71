"""The clipped surrogate of PPO as its formulas say it: the text that the fast backends are tested against.

`compose` is differentiable in every argument, any number of times. `forward` makes it the ``reference`` backend.
"""

import torch
from torch import Tensor

from .ppo_problem import SMALLEST_STD, PPOConstants, dtypes
from .samples_reference import mean, reduced, with_slope


def compose(log_prob: Tensor, constants: PPOConstants) -> list[Tensor]:
    """The loss, and what is logged: kl_approx, clip_fraction, ess, max_ratio, mean_ratio, without gradient."""
    dtype, precise = dtypes(log_prob, constants)
    mask = torch.ones_like(log_prob, dtype=torch.bool) if constants.mask is None else constants.mask

    def read(x: Tensor) -> Tensor:
        # Selected before anything is computed: the gradient of what padding holds would be 0 · NaN.
        return torch.where(mask, x, 0).to(precise)

    log_weight = read(log_prob) - read(constants.old_log_prob)
    proximal_log_weight = log_weight
    log_quotient = torch.zeros_like(log_weight)  # log r/p
    if constants.proximal_log_prob is not None:
        proximal_log_weight = read(log_prob) - read(constants.proximal_log_prob)
        log_quotient = read(constants.proximal_log_prob) - read(constants.old_log_prob)
    if constants.max_ratio is not None:
        largest = torch.as_tensor(constants.max_ratio, dtype=precise, device=log_prob.device).log()
        excess = (log_weight.detach() - largest).clamp_min(0)
        log_weight, log_quotient = log_weight - excess, log_quotient - excess
    low, high = (
        torch.as_tensor(x, dtype=torch.float64, device=log_prob.device)
        for x in (constants.clip_low, constants.clip_high)
    )
    low, high = (1 - low).to(precise), (1 + high).to(precise)

    advantage = read(constants.advantage)
    if constants.normalize:
        advantage = normalized(advantage, mask)
    weight, proximal_weight = log_weight.detach().exp(), proximal_log_weight.detach().exp()
    inside = (proximal_weight >= low) & (proximal_weight <= high)
    clipped_weight = proximal_weight.clamp(low, high) * log_quotient.detach().exp()
    # min(r Â, clip(p) (r/p) Â) is the second one where p is past the end that Â pushes it to. It is selected before the
    # exponential, which may overflow: its gradient would be 0 · ∞.
    is_clipped = torch.where(advantage > 0, proximal_weight > high, proximal_weight < low)
    loss = -torch.where(is_clipped, clipped_weight, torch.where(is_clipped, 0, log_weight).exp()) * advantage
    loss = reduced(loss, mask, None if constants.weights is None else read(constants.weights), constants.reduction)

    logged = (
        mean(-proximal_log_weight, mask),
        mean((~inside).to(precise), mask),
        effective_sample_size(log_weight.detach(), mask),
        torch.where(mask, weight, 0).max() if mask.numel() else weight.sum(),
        mean(weight, mask),
    )
    return [loss.to(dtype), *(x.detach().to(dtype) for x in logged)]


def forward(log_prob: Tensor, constants: PPOConstants, keep: bool) -> list[Tensor]:
    """The loss, what is logged, and the slope if it is to be kept."""
    return with_slope(compose, log_prob, constants, keep, dtypes(log_prob, constants)[1])


def normalized(advantage: Tensor, mask: Tensor) -> Tensor:
    """(A − mean) / max(std, 10⁻⁶) of the samples that count; a single one stays as it is."""
    count = mask.sum()
    deviation = torch.where(mask, advantage - mean(advantage, mask), 0)
    # The bound is put on the variance: the root's gradient at 0 is infinite.
    variance = (deviation.square().sum() / (count - 1).clamp_min(1)).clamp_min(SMALLEST_STD**2)
    return torch.where(count > 1, deviation / variance.sqrt(), advantage)


def effective_sample_size(log_weight: Tensor, mask: Tensor) -> Tensor:
    """(Σ r)² / Σ r² as a share of the samples that count; relative to the largest weight nothing overflows."""
    if not mask.numel():
        return log_weight.sum()
    largest = torch.where(mask, log_weight, -torch.inf).max()
    weight = torch.where(mask, (log_weight - largest).exp(), 0)
    return weight.sum().square() / weight.square().sum().clamp_min(1) / mask.sum().clamp_min(1)
