"""Value estimates on tensors, with the names and argument order of ``torchrl.objectives.value.functional``.

The plain names run the reference loop; the ``vec_`` names, `vtrace_advantage_estimate` and `reward2go` run on the
backend in force (see `fusedrl.kernels.use_backend`) or the one that a call names. Throughout:

* reward, values, ``done`` and ``terminated`` have one shape ``[*B, T, *F]`` with time at ``time_dim`` (−2 unless
  said otherwise), and so has the result; γ and λ are numbers, or tensors that broadcast to that shape;
* ``done`` ends the trajectory after the step, ``terminated`` (by default ``done``) also forbids the bootstrap from
  the next value, which is then not read; a terminated step is done. Non-zero means true, whatever the dtype;
* results have the floating dtype of reward and values together; half precision is computed in float32;
* ``rolling_gamma=False`` makes a per-step γ or λ of step t hold for all of the trajectory that follows t. By
  default each step k has its own γ_k and λ_k. For numbers and 0-d tensors both are the same;
* RuntimeError is raised, naming the argument, when shapes or devices disagree (`reward2go`: ValueError for shapes).
"""

import torch
from torch import Tensor

from .. import kernels
from ..kernels.checks import Scalar, check_real
from ..kernels.dtypes import floating, result_dtype
from ..kernels.scan_operators import solve
from ..kernels.scan_problem import FIXED_DISCOUNT, GAE, TD_LAMBDA, Recurrence, checked
from ..kernels.vtrace_operators import solve as solve_vtrace
from ..kernels.vtrace_problem import VTrace

__all__ = [
    "generalized_advantage_estimate",
    "reward2go",
    "td0_advantage_estimate",
    "td0_return_estimate",
    "td1_advantage_estimate",
    "td1_return_estimate",
    "td_lambda_advantage_estimate",
    "td_lambda_return_estimate",
    "vec_generalized_advantage_estimate",
    "vec_td1_advantage_estimate",
    "vec_td1_return_estimate",
    "vec_td_lambda_advantage_estimate",
    "vec_td_lambda_return_estimate",
    "vtrace_advantage_estimate",
]

REFERENCE = "reference"

# What the kernels call otherwise.
_NAMES = {"value": "state_value", "next_value": "next_state_value"}


# -- generalised advantage -------------------------------------------------------------------------------------------


def vec_generalized_advantage_estimate(
    gamma: Scalar,
    lmbda: Scalar,
    state_value: Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    *,
    time_dim: int = -2,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A_t = δ_t + γλ(1−done_t)A_{t+1} with δ_t = r_t + γ(1−term_t)v'_t − v_t, and the value target A_t + v_t.

    Schulman et al. 2016 (arXiv:1506.02438), equation 16.

    Examples:
        >>> value, next_value, reward = torch.zeros(3), torch.tensor([0.0, 0.0, 8.0]), torch.ones(3)
        >>> done, terminated = torch.tensor([False, False, True]), torch.tensor([False, False, False])
        >>> advantage, value_target = vec_generalized_advantage_estimate(
        ...     0.5, 0.5, value, next_value, reward, done, terminated, time_dim=-1
        ... )
        >>> advantage
        tensor([1.5625, 2.2500, 5.0000])

    """
    advantage, value_target = solve(
        Recurrence(GAE, gamma, lmbda, reward, state_value, next_state_value, done, terminated),
        time_dim,
        backend,
        _NAMES,
    )
    return advantage, value_target


def generalized_advantage_estimate(
    gamma: Scalar,
    lmbda: Scalar,
    state_value: Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    *,
    time_dim: int = -2,
) -> tuple[Tensor, Tensor]:
    """`vec_generalized_advantage_estimate` by the reference loop."""
    return vec_generalized_advantage_estimate(
        gamma,
        lmbda,
        state_value,
        next_state_value,
        reward,
        done,
        terminated,
        time_dim=time_dim,
        backend=REFERENCE,
    )


# -- TD(0) -----------------------------------------------------------------------------------------------------------


def td0_return_estimate(
    gamma: Scalar,
    next_state_value: Tensor,
    reward: Tensor,
    terminated: Tensor | None = None,
    *,
    done: Tensor | None = None,
) -> Tensor:
    """G_t = r_t + γ(1−term_t)v'_t; ``done`` stands in for ``terminated`` where that is not given.

    Sutton 1988, Learning to predict by the methods of temporal differences.

    Raises:
        TypeError: neither ``terminated`` nor ``done`` is given.

    """
    terminated = done if terminated is None else terminated
    if terminated is None:
        raise TypeError("td0_return_estimate needs to know which steps are terminal: give terminated (or done)")
    _check_shapes(reward, terminated=terminated)
    if done is not None:
        _check_shapes(reward, done=done)
    if reward.ndim == 0:
        # A single step; `checked` asks for a dimension of time.
        one = td0_return_estimate(gamma, next_state_value[None], reward[None], terminated[None])
        return one.squeeze(0)
    # Of the TD(λ) return of a step that is the last one.
    steps = Recurrence(TD_LAMBDA, gamma, 1.0, reward, None, next_state_value, terminated)
    problem, _ = checked(steps, 0, _NAMES | {"done": "terminated"})
    compute = problem.compute_dtype
    if isinstance(gamma, Tensor):
        gamma = gamma.to(compute)
    # Selected before the product, so that a terminal NaN stays out of the gradient of γ as well.
    bootstrap = torch.where(problem.done, 0, next_state_value.to(compute))
    return (reward.to(compute) + gamma * bootstrap).to(problem.dtype)


def td0_advantage_estimate(
    gamma: Scalar,
    state_value: Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
) -> Tensor:
    """r_t + γ(1−term_t)v'_t − v_t."""
    _check_shapes(reward, state_value=state_value)
    wide, dtype = widened(reward, next_state_value, state_value)
    value_target = td0_return_estimate(gamma, next_state_value, wide, terminated, done=done)
    return (value_target - state_value).to(dtype)


# -- TD(1) -----------------------------------------------------------------------------------------------------------


def vec_td1_return_estimate(
    gamma: Scalar,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    rolling_gamma: bool | None = None,
    time_dim: int = -2,
    *,
    backend: str | None = None,
) -> Tensor:
    """G_t = r_t + γ(1−term_t)G_{t+1}, where G_{t+1} is v'_t if the trajectory ends at t: TD(λ) at λ = 1.

    The last step of the tensor ends a trajectory. Sutton & Barto 2018, section 12.1.

    Examples:
        >>> next_value, reward = torch.tensor([0.0, 0.0, 8.0]), torch.ones(3)
        >>> done, terminated = torch.tensor([False, False, True]), torch.tensor([False, False, False])
        >>> vec_td1_return_estimate(0.5, next_value, reward, done, terminated, time_dim=-1)
        tensor([2.7500, 3.5000, 5.0000])

    """
    return vec_td_lambda_return_estimate(
        gamma,
        1.0,
        next_state_value,
        reward,
        done,
        terminated,
        rolling_gamma,
        time_dim=time_dim,
        backend=backend,
    )


def td1_return_estimate(
    gamma: Scalar,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    rolling_gamma: bool | None = None,
    *,
    time_dim: int = -2,
) -> Tensor:
    """`vec_td1_return_estimate` by the reference loop."""
    return vec_td1_return_estimate(
        gamma, next_state_value, reward, done, terminated, rolling_gamma, time_dim, backend=REFERENCE
    )


def vec_td1_advantage_estimate(
    gamma: Scalar,
    state_value: Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    rolling_gamma: bool | None = None,
    time_dim: int = -2,
    *,
    backend: str | None = None,
) -> Tensor:
    """`vec_td1_return_estimate` − v_t."""
    return vec_td_lambda_advantage_estimate(
        gamma,
        1.0,
        state_value,
        next_state_value,
        reward,
        done,
        terminated,
        rolling_gamma,
        time_dim,
        backend=backend,
    )


def td1_advantage_estimate(
    gamma: Scalar,
    state_value: Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    rolling_gamma: bool | None = None,
    time_dim: int = -2,
) -> Tensor:
    """`vec_td1_advantage_estimate` by the reference loop."""
    return vec_td1_advantage_estimate(
        gamma,
        state_value,
        next_state_value,
        reward,
        done,
        terminated,
        rolling_gamma,
        time_dim,
        backend=REFERENCE,
    )


# -- TD(λ) -----------------------------------------------------------------------------------------------------------


def vec_td_lambda_return_estimate(
    gamma: Scalar,
    lmbda: Scalar,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    rolling_gamma: bool | None = None,
    *,
    time_dim: int = -2,
    backend: str | None = None,
) -> Tensor:
    """G_t = r_t + γ(1−term_t)[(1−λ)v'_t + λG_{t+1}], where G_{t+1} is v'_t if the trajectory ends at t.

    The last step of the tensor ends a trajectory. Sutton & Barto 2018, equation 12.18.

    Examples:
        >>> next_value, reward = torch.tensor([0.0, 0.0, 8.0]), torch.ones(3)
        >>> done, terminated = torch.tensor([False, False, True]), torch.tensor([False, False, False])
        >>> vec_td_lambda_return_estimate(0.5, 1.0, next_value, reward, done, terminated, time_dim=-1)
        tensor([2.7500, 3.5000, 5.0000])

    """
    per_step = any(isinstance(x, Tensor) and x.ndim for x in (gamma, lmbda))
    kind = FIXED_DISCOUNT if rolling_gamma is False and per_step else TD_LAMBDA
    problem = Recurrence(kind, gamma, lmbda, reward, None, next_state_value, done, terminated)
    (value_target,) = solve(problem, time_dim, backend, _NAMES)
    return value_target


def td_lambda_return_estimate(
    gamma: Scalar,
    lmbda: Scalar,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    rolling_gamma: bool | None = None,
    *,
    time_dim: int = -2,
) -> Tensor:
    """`vec_td_lambda_return_estimate` by the reference loop."""
    return vec_td_lambda_return_estimate(
        gamma,
        lmbda,
        next_state_value,
        reward,
        done,
        terminated,
        rolling_gamma,
        time_dim=time_dim,
        backend=REFERENCE,
    )


def vec_td_lambda_advantage_estimate(
    gamma: Scalar,
    lmbda: Scalar,
    state_value: Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    rolling_gamma: bool | None = None,
    time_dim: int = -2,
    *,
    backend: str | None = None,
) -> Tensor:
    """`vec_td_lambda_return_estimate` − v_t."""
    _check_shapes(reward, state_value=state_value)
    wide, dtype = widened(reward, next_state_value, state_value)
    value_target = vec_td_lambda_return_estimate(
        gamma,
        lmbda,
        next_state_value,
        wide,
        done,
        terminated,
        rolling_gamma,
        time_dim=time_dim,
        backend=backend,
    )
    return (value_target - state_value).to(dtype)


def td_lambda_advantage_estimate(
    gamma: Scalar,
    lmbda: Scalar,
    state_value: Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    rolling_gamma: bool | None = None,
    time_dim: int = -2,
) -> Tensor:
    """`vec_td_lambda_advantage_estimate` by the reference loop."""
    return vec_td_lambda_advantage_estimate(
        gamma,
        lmbda,
        state_value,
        next_state_value,
        reward,
        done,
        terminated,
        rolling_gamma,
        time_dim,
        backend=REFERENCE,
    )


# -- V-trace ---------------------------------------------------------------------------------------------------------


def vtrace_advantage_estimate(
    gamma: Scalar,
    log_pi: Tensor,
    log_mu: Tensor,
    state_value: Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    rho_thresh: Scalar = 1.0,
    c_thresh: Scalar = 1.0,
    time_dim: int = -2,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantage ρ_t(r_t + γG_{t+1} − v_t) and value target G_t = v_t + ρ_tδ_t + γc_t(1−done_t)(G_{t+1} − v_{t+1}).

    δ_t = r_t + γ(1−term_t)v'_t − v_t is the step's error, and ρ_t and c_t are the ratio π(a_t|s_t) / μ(a_t|s_t), at
    most ``rho_thresh`` and ``c_thresh``. ``log_pi`` and ``log_mu`` are the logarithms of its parts, for the policy
    that is learned and the one that acted; they have the shape of the reward. In the advantage G_{t+1} is
    (1−term_t)v'_t if the trajectory ends at t, as it does at the last step of the tensor.

    Espeholt et al. 2018 (arXiv:1802.01561), equations 1 and 4.

    Examples:
        >>> value, next_value, reward = torch.zeros(3), torch.tensor([0.0, 0.0, 8.0]), torch.ones(3)
        >>> done, terminated = torch.tensor([False, False, True]), torch.tensor([False, False, False])
        >>> log_pi, log_mu = torch.tensor([0.5, 0.25, 1.0]).log(), torch.tensor([0.5, 0.5, 0.5]).log()
        >>> advantage, value_target = vtrace_advantage_estimate(
        ...     0.5, log_pi, log_mu, value, next_value, reward, done, terminated, time_dim=-1
        ... )
        >>> value_target
        tensor([1.8750, 1.7500, 5.0000])

    """
    problem = VTrace(
        log_pi, log_mu, state_value, next_state_value, reward, gamma, rho_thresh, c_thresh, done, terminated
    )
    return solve_vtrace(problem, time_dim, backend, _NAMES)


def log_ratio(log_pi: Tensor, log_mu: Tensor) -> Tensor:
    """log π − log μ, in float32 at least: the difference of two logarithms keeps none of their leading digits."""
    dtype = torch.promote_types(log_pi.dtype, torch.float32)
    return log_pi.to(dtype) - log_mu


# -- reward-to-go ----------------------------------------------------------------------------------------------------


def reward2go(reward: Tensor, done: Tensor, gamma: Scalar, *, time_dim: int = -2, backend: str | None = None) -> Tensor:
    """G_t = r_t + γ(1−done_t)G_{t+1}, without bootstrap. Sutton & Barto 2018, equation 3.9.

    Examples:
        >>> reward2go(torch.ones(4), torch.tensor([False, True, False, False]), 0.5, time_dim=-1)
        tensor([1.5000, 1.0000, 1.5000, 1.0000])

    """
    check_real("reward", reward)
    check_real("done", done)
    if done.shape != reward.shape:
        raise ValueError(
            f"done has shape {tuple(done.shape)}, but reward has shape {tuple(reward.shape)}: both must agree"
        )
    return kernels.reward_to_go(gamma, reward, done, time_dim=time_dim, backend=backend)


def widened(reward: Tensor, *values: Tensor) -> tuple[Tensor, torch.dtype]:
    """``reward`` so that an estimate comes out in float32 at least, and the dtype that its result is to have.

    For differences of estimates, which are rounded to half precision once.
    """
    dtype = floating(result_dtype(reward, *values))
    return (reward.float() if dtype in (torch.float16, torch.bfloat16) else reward), dtype


def _check_shapes(reward: Tensor, **tensors: Tensor) -> None:
    check_real("reward", reward)
    shape = reward.shape
    for name, x in tensors.items():
        check_real(name, x)
        if x.shape != shape:
            raise RuntimeError(
                f"{name} has shape {tuple(x.shape)}, but reward has shape {tuple(shape)}: both must agree"
            )
