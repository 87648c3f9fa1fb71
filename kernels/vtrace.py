"""V-trace: returns of one policy from the steps of another, by importance weights that are clipped.

The recurrence runs on the backend in force; what makes its inputs, and the advantage of its result, is elementwise.
"""

import math

import torch
from torch import Tensor

from .operators import as_input
from .recurrence import GAE, Recurrence, broadcasts, checked
from .returns import reward_to_go

Scalar = float | Tensor


def vtrace(
    gamma: Scalar,
    log_weight: Tensor,
    value: Tensor,
    next_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    rho_thresh: Scalar = 1.0,
    c_thresh: Scalar = 1.0,
    *,
    time_dim: int = -1,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""V-trace value target, and the advantage for the policy gradient.

    .. math::
        \text{target}_t - v_t &= ρ_t (r_t + γ(1 - \text{term}_t) v'_t - v_t)
            + γ c_t (1 - \text{done}_t) (\text{target}_{t+1} - v_{t+1}) \\
        A_t &= ρ_t (r_t + γ\, \text{target}_{t+1} - v_t) \\
        ρ_t &= \min(\bar ρ, w_t), \qquad c_t = \min(\bar c, w_t), \qquad \log w_t = \log π(a_t|s_t) - \log μ(a_t|s_t)

    where in the advantage :math:`\text{target}_{t+1}` is :math:`(1 - \text{term}_t) v'_t` if the trajectory ends at t,
    as it does at the last step of the tensor.

    Args:
        gamma: discount γ.
        log_weight: log w_t, for the policy π that is learned and the policy μ that acted.
        value: v_t, the value of the step's observation.
        next_value: v'_t, the value of the observation that the step led to.
        reward: r_t; integers are computed in the default floating dtype.
        done: the trajectory ends after the step (terminated or truncated). Non-zero means done.
        terminated: the environment terminated: no bootstrap from v'_t, which is then never read into a result.
            Defaults to ``done``. A terminated step also ends its trajectory.
        rho_thresh: ρ̄, which sets whose value function is learned: π's if it is infinite, μ's if it is near 0.
        c_thresh: c̄, which sets how far back an error reaches, and with it the variance.
        time_dim: the dimension of time.
        backend: which implementation runs; None for the block's or the process's choice.

    Returns:
        The advantage and the value target, each of the common shape.

    Raises:
        RuntimeError: shapes or devices differ.
        ValueError: a threshold is negative; the backend doesn't exist.

    Examples:
        >>> value, next_value, reward = torch.zeros(3), torch.tensor([0.0, 0.0, 8.0]), torch.ones(3)
        >>> done, log_weight = torch.tensor([False, False, True]), torch.tensor([1.0, 0.5, 2.0]).log()
        >>> vtrace(0.5, log_weight, value, next_value, reward, done, torch.zeros_like(done))
        (tensor([1.8750, 1.7500, 5.0000]), tensor([1.8750, 1.7500, 5.0000]))

    See Espeholt et al. 2018, IMPALA (arXiv:1802.01561), equations 1 and 4.

    """
    problem, dim = checked(Recurrence(GAE, gamma, None, reward, value, next_value, done, terminated), time_dim)
    _check("log_weight", log_weight, reward, same=True)
    for name, threshold in (("rho_thresh", rho_thresh), ("c_thresh", c_thresh)):
        _check(name, threshold, reward)
    dtype, compute = problem.dtype, problem.compute_dtype
    terminated = problem.done if problem.terminated is None else problem.terminated
    ends = problem.done | terminated
    log_weight, value, next_value, reward = (x.to(compute) for x in (log_weight, value, next_value, reward))
    if isinstance(gamma, Tensor):
        gamma = gamma.to(compute)

    rho, c = _clipped(log_weight, rho_thresh), _clipped(log_weight, c_thresh)
    # Selected before the products, so that a terminal NaN stays out of the gradients of γ and the weights as well.
    bootstrap = torch.where(terminated, 0, next_value)
    delta = rho * (reward + gamma * bootstrap - value)
    value_target = value + reward_to_go(gamma * c, delta, ends, time_dim=dim, backend=backend)

    next_target = torch.where(ends | _last_step(ends, dim), bootstrap, value_target.roll(-1, dim))
    advantage = rho * (reward + gamma * next_target - value)
    return advantage.to(dtype), value_target.to(dtype)


def _clipped(log_weight: Tensor, threshold: Scalar) -> Tensor:
    """min(w, threshold). Clipped as a logarithm: the exponential of a large one is infinite, and its gradient NaN."""
    threshold = as_input(threshold, log_weight)
    if isinstance(threshold, Tensor):
        return torch.minimum(log_weight, threshold.to(log_weight.dtype).log()).exp()
    return log_weight.clamp_max(math.log(threshold) if threshold > 0 else -math.inf).exp()


def _last_step(like: Tensor, dim: int) -> Tensor:
    """A mask of the last step, which broadcasts to ``like``."""
    steps = like.shape[dim]
    shape = [1] * like.ndim
    shape[dim] = steps
    return (torch.arange(steps, device=like.device) == steps - 1).view(shape)


def _check(name: str, x: Scalar, reward: Tensor, *, same: bool = False) -> None:
    if not isinstance(x, Tensor):
        if not x >= 0:
            raise ValueError(f"{name} is {x}, but must not be negative")
    elif (x.shape != reward.shape) if same else not broadcasts(x.shape, reward.shape):
        wanted = "both must agree" if same else "it must broadcast to that"
        raise RuntimeError(f"{name} has shape {tuple(x.shape)}, but reward has shape {tuple(reward.shape)}: {wanted}")
    elif x.ndim and x.device != reward.device:
        raise RuntimeError(f"{name} is on {x.device}, but reward is on {reward.device}")
