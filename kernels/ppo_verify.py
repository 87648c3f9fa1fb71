"""The ``verify`` backend of the clipped surrogate: what ``auto`` picks, compared with the reference in float64."""

from typing import Any

import torch
from torch import Tensor

from . import ppo_reference
from .backend import fastest_backend
from .ppo_operators import backend_module
from .ppo_problem import SMALLEST_STD, PPOConstants, dtypes
from .samples_reference import mean
from .samples_verify import compare_all, factors, in_float64, share_scale, size_of, undecided

_NAMES = ("clipped PPO loss", "kl_approx", "clip_fraction", "ess", "max_ratio", "mean_ratio", "slope of log_prob")


def forward(log_prob: Tensor, constants: PPOConstants, keep: bool) -> list[Tensor]:
    """The results of the fastest backend, once they agree with the reference.

    The slope of a sample whose ratio differs from an end of the clip range by no more than rounding isn't compared.

    Raises:
        VerificationError: a result differs; the message has the worst element's index and both values.

    """
    name = fastest_backend(log_prob)
    found = backend_module(name).forward(log_prob, constants, keep)
    dtype, precise = dtypes(log_prob, constants)
    exact, wanted = log_prob.detach().double(), in_float64(constants)
    expected = ppo_reference.forward(exact, wanted, keep)
    mask = torch.ones_like(exact, dtype=torch.bool) if wanted.mask is None else wanted.mask
    read: list[Any] = [
        None if x is None else torch.where(mask, x, 0)
        for x in (exact, wanted.old_log_prob, wanted.proximal_log_prob, wanted.advantage, wanted.weights)
    ]
    exact, old, proximal, advantage, weights = read
    proximal_ratio = (exact - (old if proximal is None else proximal)).exp()
    # A ratio is off by the rounding of the log-probabilities that it is computed from.
    error = 1 + size_of(exact, old, proximal)
    ratio = error * torch.maximum((exact - old).exp(), proximal_ratio).clamp_min(1)
    size = advantage.abs()
    if wanted.normalize:
        deviation = torch.where(mask, advantage - mean(advantage, mask), 0)
        std = mean(deviation.square(), mask).sqrt().clamp_min(SMALLEST_STD)
        size = size + (deviation.abs() + size.max()) / std
    term = ratio * size * factors(mask, weights, constants.reduction)
    low, high = (
        torch.as_tensor(x, dtype=exact.dtype, device=exact.device) for x in (wanted.clip_low, wanted.clip_high)
    )
    ends = (proximal_ratio - (1 - low), proximal_ratio - (1 + high))
    near = undecided(ends[0], ratio, precise) | undecided(ends[1], ratio, precise)
    whole = error.max()
    _, _, _, _, greatest_ratio, mean_ratio, *_ = expected
    scales = [
        term if constants.reduction == "none" else term.sum(),
        whole,
        share_scale(near, mask, dtype),
        whole,
        whole * greatest_ratio,
        whole * mean_ratio,
        term,
    ]
    compared = list(found)
    if keep:
        compared[-1] = torch.where(near, expected[-1].to(found[-1].dtype), found[-1])
    compare_all(_NAMES[: len(found)], name, compared, expected, scales[: len(found)])
    return found
