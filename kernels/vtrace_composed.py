"""V-trace of any backend's recurrence, and elementwise operations of PyTorch around it."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .dispatch import as_input, wants_gradient
from .dtypes import as_scalar
from .returns import reward_to_go
from .vtrace_problem import VTrace


def composed(problem: VTrace, time_dim: int, backend: str) -> tuple[Tensor, Tensor]:
    """Advantage and value target, differentiable in all that is a tensor, γ and the thresholds included."""
    dtype, compute = problem.dtype, problem.compute_dtype
    _, _, value, next_value, reward, gamma, rho_thresh, c_thresh, done, terminated = problem
    terminated = done if terminated is None else terminated
    ends = done | terminated
    log_weight, value, next_value, reward = (x.to(compute) for x in (problem.log_weight(), value, next_value, reward))
    gamma = as_scalar(as_input(gamma, reward), compute, reward.device)

    rho = _clipped(log_weight, rho_thresh)
    c = rho if _is_same_number(rho_thresh, c_thresh) else _clipped(log_weight, c_thresh)
    # Selected before the products, so that a terminal NaN stays out of the gradients of γ and the weights as well.
    bootstrap = torch.where(terminated, 0, next_value)
    gain = reward - value
    delta = rho * _add_product(gain, gamma, bootstrap)
    value_target = value + reward_to_go(gamma * c, delta, ends, time_dim=time_dim, backend=backend)

    next_target = torch.where(ends | _last_step(ends, time_dim), bootstrap, value_target.roll(-1, time_dim))
    advantage = rho * _add_product(gain, gamma, next_target)
    return advantage.to(dtype), value_target.to(dtype)


def _clipped(log_weight: Tensor, threshold: Any) -> Tensor:
    """min(w, threshold). Clipped as a logarithm: the exponential of a large one is infinite, and its gradient NaN.

    A weight that is the threshold, like every one on-policy, has its gradient. With `torch.clamp` it would depend on
    the version of PyTorch whether it has.
    """
    threshold = as_input(threshold, log_weight)
    if isinstance(threshold, Tensor):
        threshold = threshold.to(log_weight.dtype)
        limit = threshold.detach().log()
        is_clipped = log_weight > limit
        return torch.where(is_clipped, threshold, torch.where(is_clipped, limit, log_weight).exp())
    log_threshold = math.log(threshold) if threshold > 0 else -math.inf
    if not wants_gradient(log_weight) and forward_ad._current_level < 0:
        return log_weight.clamp_max(log_threshold).exp()
    return log_weight.masked_fill(log_weight > log_threshold, log_threshold).exp()


def _add_product(x: Tensor, gamma: Any, y: Tensor) -> Tensor:
    """x + γy in one pass over them."""
    return torch.addcmul(x, y, gamma) if isinstance(gamma, Tensor) else torch.add(x, y, alpha=gamma)


def _is_same_number(x: Any, y: Any) -> bool:
    """Whether both are one number. Compiled code must serve others, too, and of tensors only the device knows."""
    return not torch.compiler.is_compiling() and type(x) is type(y) is float and x == y


def _last_step(like: Tensor, dim: int) -> Tensor:
    """A mask of the last step, which broadcasts to ``like``."""
    steps = like.shape[dim]
    shape = [1] * like.ndim
    shape[dim] = steps
    return (torch.arange(steps, device=like.device) == steps - 1).view(shape)
