"""The recurrences as plain loops over time: the text that the fast backends are tested against.

Every function walks time backwards, one step per iteration, with the operations of the equation in its
docstring and nothing else. Time is the dimension ``time_dim`` of every tensor; tensors have one common shape
``[*B, T, *F]``, except γ and λ, which are numbers or tensors broadcastable to that shape. Gradients come from
autograd. Terms that an ended trajectory excludes are *selected* away (`torch.where`), never multiplied by
zero, and before they meet γ or λ, so that a NaN in an excluded term stays out of results and gradients.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .checks import Scalar


def gae(
    gamma: Scalar,
    lmbda: Scalar,
    value: Tensor,
    next_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor,
    *,
    time_dim: int = -1,
) -> tuple[Tensor, Tensor]:
    """δ_t = r_t + γ(1 − term_t)v'_t − v_t;  A_t = δ_t + γλ(1 − done_t)A_{t+1};  target_t = A_t + v_t.

    Schulman et al. 2016 (arXiv:1506.02438), equation 16.
    """
    gamma, lmbda = _expand(gamma, reward), _expand(lmbda, reward)
    zero = reward.new_zeros(())
    advantage_next = torch.zeros_like(reward.select(time_dim, 0)) if reward.shape[time_dim] else reward
    advantages = []
    for gamma_t, lmbda_t, v_t, next_v_t, r_t, done_t, term_t in _backwards(
        time_dim, gamma, lmbda, value, next_value, reward, done, terminated
    ):
        delta_t = r_t + gamma_t * torch.where(term_t, zero, next_v_t) - v_t
        advantage_next = delta_t + gamma_t * lmbda_t * torch.where(done_t | term_t, zero, advantage_next)
        advantages.append(advantage_next)
    advantage = _stack(advantages, reward, time_dim)
    return advantage, advantage + value


def td_lambda_return(
    gamma: Scalar,
    lmbda: Scalar,
    next_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor,
    *,
    time_dim: int = -1,
) -> Tensor:
    """G_t = r_t + γ(1 − term_t)[(1 − λ)v'_t + λG_{t+1}], where G_{t+1} is v'_t if the trajectory ends at t.

    The last step of the tensor ends a trajectory whether or not done is set there. Sutton & Barto 2018,
    equation 12.18; λ = 1 is the TD(1) return.
    """
    gamma, lmbda = _expand(gamma, reward), _expand(lmbda, reward)
    zero = reward.new_zeros(())
    return_next = next_value.select(time_dim, -1) if reward.shape[time_dim] else next_value
    returns = []
    for gamma_t, lmbda_t, next_v_t, r_t, done_t, term_t in _backwards(
        time_dim, gamma, lmbda, next_value, reward, done, terminated
    ):
        next_v_t = torch.where(term_t, zero, next_v_t)
        return_next = torch.where(done_t | term_t, next_v_t, return_next)
        return_next = r_t + gamma_t * ((1 - lmbda_t) * next_v_t + lmbda_t * return_next)
        returns.append(return_next)
    return _stack(returns, reward, time_dim)


def fixed_discount_td_lambda_return(
    gamma: Tensor,
    lmbda: Tensor,
    next_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor,
    *,
    time_dim: int = -1,
) -> Tensor:
    """The TD(λ) return in which γ_t and λ_t hold for all of the trajectory that follows step t.

    G_t is the first element of the TD(λ) return of the steps t … T−1 computed with the constants γ_t and λ_t;
    `td_lambda_return` instead uses γ_k for the step k, wherever the trajectory started.
    """
    gamma, lmbda = _expand(gamma, reward), _expand(lmbda, reward)
    steps = reward.shape[time_dim]
    returns = []
    for t in range(steps):
        rest = [x.narrow(time_dim, t, steps - t) for x in (next_value, reward, done, terminated)]
        constants = [x.narrow(time_dim, t, 1) for x in (gamma, lmbda)]
        returns.append(td_lambda_return(*constants, *rest, time_dim=time_dim).select(time_dim, 0))
    return torch.stack(returns, time_dim) if returns else torch.zeros_like(reward)


def vtrace(
    gamma: Scalar,
    log_weight: Tensor,
    value: Tensor,
    next_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor,
    rho_thresh: Scalar = 1.0,
    c_thresh: Scalar = 1.0,
    *,
    time_dim: int = -1,
) -> tuple[Tensor, Tensor]:
    """Advantage A_t and value target G_t, with ρ_t = min(ρ̄, w_t) and c_t = min(c̄, w_t).

    δ_t = ρ_t(r_t + γ(1 − term_t)v'_t − v_t);  G_t = v_t + δ_t + γc_t(1 − done_t)(G_{t+1} − v_{t+1});
    A_t = ρ_t(r_t + γG_{t+1} − v_t), where G_{t+1} is (1 − term_t)v'_t if the trajectory ends at t.

    The last step of the tensor ends a trajectory whether or not done is set there. Espeholt et al. 2018
    (arXiv:1802.01561), equations 1 and 4.
    """
    gamma = _expand(gamma, reward)
    rho, c = (_clipped_weight(log_weight, threshold) for threshold in (rho_thresh, c_thresh))
    zero = reward.new_zeros(())
    next_value = torch.where(terminated, zero, next_value)
    target_next = next_value.select(time_dim, -1) if reward.shape[time_dim] else next_value
    value_next = target_next
    advantages, targets = [], []
    for gamma_t, rho_t, c_t, v_t, next_v_t, r_t, done_t, term_t in _backwards(
        time_dim, gamma, rho, c, value, next_value, reward, done, terminated
    ):
        ended = done_t | term_t
        delta_t = rho_t * (r_t + gamma_t * next_v_t - v_t)
        target_t = v_t + delta_t + gamma_t * c_t * torch.where(ended, zero, target_next - value_next)
        advantages.append(rho_t * (r_t + gamma_t * torch.where(ended, next_v_t, target_next) - v_t))
        targets.append(target_t)
        target_next, value_next = target_t, v_t
    return _stack(advantages, reward, time_dim), _stack(targets, reward, time_dim)


def _clipped_weight(log_weight: Tensor, threshold: Scalar) -> Tensor:
    """min(w, threshold), of the logarithms, since exp may overflow: its gradient would then be 0 · ∞.

    That of a weight which is the threshold is the weight's.
    """
    if isinstance(threshold, Tensor):
        threshold = threshold.to(log_weight.dtype)
        limit = threshold.detach().log()
        is_clipped = log_weight > limit
        return torch.where(is_clipped, threshold, torch.where(is_clipped, limit, log_weight).exp())
    log_threshold = math.log(threshold) if threshold > 0 else -math.inf
    return torch.where(log_weight > log_threshold, log_threshold, log_weight).exp()


def reward_to_go(gamma: Scalar, reward: Tensor, done: Tensor, *, time_dim: int = -1) -> Tensor:
    """G_t = r_t + γ(1 − done_t)G_{t+1}, with G_T = 0."""
    gamma = _expand(gamma, reward)
    zero = reward.new_zeros(())
    return_next = torch.zeros_like(reward.select(time_dim, 0)) if reward.shape[time_dim] else reward
    returns = []
    for gamma_t, r_t, done_t in _backwards(time_dim, gamma, reward, done):
        return_next = r_t + gamma_t * torch.where(done_t, zero, return_next)
        returns.append(return_next)
    return _stack(returns, reward, time_dim)


def _backwards(time_dim: int, *tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """The time slices of all tensors, last step first."""
    return reversed(list(zip(*(x.unbind(time_dim) for x in tensors), strict=True)))


def _stack(slices: list[Tensor], like: Tensor, time_dim: int) -> Tensor:
    """Time slices collected last step first, in time order; no steps give an empty tensor."""
    return torch.stack(slices[::-1], time_dim) if slices else torch.zeros_like(like)


def _expand(scalar: Scalar, like: Tensor) -> Tensor:
    return torch.as_tensor(scalar, dtype=like.dtype, device=like.device).expand_as(like)
