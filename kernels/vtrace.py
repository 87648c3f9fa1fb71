"""V-trace: returns of one policy from the steps of another, by importance weights that are clipped.

One kernel solves it where Triton runs; elsewhere, and where γ or a threshold wants a gradient, the recurrence runs on
the backend in force between elementwise operations (`vtrace_composed`).
"""

from torch import Tensor

from .checks import Scalar
from .vtrace_operators import solve
from .vtrace_problem import VTrace


def vtrace(
    gamma: Scalar,
    log_pi: Tensor,
    log_mu: Tensor | None,
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
        log_pi: log π(a_t|s_t), for the policy π that is learned.
        log_mu: log μ(a_t|s_t), for the policy μ that acted. None stands for 0, for a ``log_pi`` that is log w_t itself.
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
        TypeError: an argument is no real tensor, or γ or a threshold no number either.
        RuntimeError: shapes or devices differ, or the backend doesn't run here.
        IndexError: ``time_dim`` is out of range.
        ValueError: a threshold is a negative number; the backend doesn't exist.

    Examples:
        >>> import torch
        >>> value, next_value, reward = torch.zeros(3), torch.tensor([0.0, 0.0, 8.0]), torch.ones(3)
        >>> done, log_weight = torch.tensor([False, False, True]), torch.tensor([1.0, 0.5, 2.0]).log()
        >>> vtrace(0.5, log_weight, None, value, next_value, reward, done, torch.zeros_like(done))
        (tensor([1.8750, 1.7500, 5.0000]), tensor([1.8750, 1.7500, 5.0000]))

    See Espeholt et al. 2018, IMPALA (arXiv:1802.01561), equations 1 and 4.

    """
    problem = VTrace(log_pi, log_mu, value, next_value, reward, gamma, rho_thresh, c_thresh, done, terminated)
    return solve(problem, time_dim, backend)
