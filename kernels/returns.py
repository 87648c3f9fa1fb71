"""Generalised advantages and returns on tensors: one function per estimator.

Each is an instance of the recurrence y_t = d_t + c_t · y_{t+1} (`reverse_scan`). Tensors have one common shape
``[*B, T, *F]`` with time at ``time_dim``, any strides; γ and λ are numbers, or tensors broadcastable to that
shape. What runs underneath is chosen by ``backend`` (see `fusedrl.kernels.backend`).

A NaN or an infinity in a reward or a value may reach all the steps before it in its row, those of other trajectories
too: the fast backends multiply it by the 0 that stands for an end. What is behind an end by definition, the next value
of a terminal step, is selected away.
"""

from torch import Tensor

from .checks import Scalar, check_real
from .scan_operators import solve
from .scan_problem import FIXED_DISCOUNT, GAE, SCAN, TD_LAMBDA, Recurrence


def gae(
    gamma: Scalar,
    lmbda: Scalar,
    value: Tensor,
    next_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    *,
    time_dim: int = -1,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Generalised advantage estimate and value target, from one pass over the data.

    .. math::
        A_t = r_t + γ(1 - \text{term}_t) v'_t - v_t + γλ(1 - \text{done}_t) A_{t+1}, \qquad
        \text{target}_t = A_t + v_t

    Args:
        gamma: discount γ.
        lmbda: trace decay λ.
        value: v_t, the value of the step's observation.
        next_value: v'_t, the value of the observation that the step led to.
        reward: r_t; integers are computed in the default floating dtype.
        done: the trajectory ends after the step (terminated or truncated). Non-zero means done.
        terminated: the environment terminated: no bootstrap from v'_t, which is then never read into a result.
            Defaults to ``done``. A terminated step also ends its trajectory.
        time_dim: the dimension of time.
        backend: which implementation runs; None for the block's or the process's choice.

    Returns:
        The advantage and the value target, each of the common shape.

    Raises:
        TypeError: an argument isn't a real tensor, or γ or λ not a number either; ``time_dim`` is no int.
        RuntimeError: shapes or devices differ, or the backend doesn't run there.
        IndexError: ``time_dim`` is out of range.
        ValueError: the backend doesn't exist.

    Examples:
        >>> import torch
        >>> value, next_value, reward = torch.zeros(3), torch.tensor([0.0, 0.0, 8.0]), torch.ones(3)
        >>> done = torch.tensor([False, False, True])
        >>> gae(0.5, 0.5, value, next_value, reward, done, torch.zeros_like(done))[0]
        tensor([1.5625, 2.2500, 5.0000])

    See Schulman et al. 2016, High-dimensional continuous control using generalized advantage estimation
    (arXiv:1506.02438).

    """
    advantage, value_target = solve(
        Recurrence(GAE, gamma, lmbda, reward, value, next_value, done, terminated), time_dim, backend
    )
    return advantage, value_target


def td_lambda_return(
    gamma: Scalar,
    lmbda: Scalar,
    next_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    *,
    time_dim: int = -1,
    backend: str | None = None,
) -> Tensor:
    r"""TD(λ) return.

    .. math::
        G_t = r_t + γ(1 - \text{term}_t)\left[(1 - λ) v'_t + λ G_{t+1}\right],

    where :math:`G_{t+1}` is :math:`v'_t` if the trajectory ends at t, as it does at the last step of the tensor.
    Arguments and errors are those of `gae`.

    Examples:
        >>> import torch
        >>> next_value, reward = torch.tensor([0.0, 0.0, 8.0]), torch.ones(3)
        >>> done = torch.tensor([False, False, True])
        >>> td_lambda_return(0.5, 1.0, next_value, reward, done, torch.zeros_like(done))
        tensor([2.7500, 3.5000, 5.0000])

    See Sutton & Barto 2018, Reinforcement learning, equation 12.18.

    """
    (value_target,) = solve(
        Recurrence(TD_LAMBDA, gamma, lmbda, reward, None, next_value, done, terminated), time_dim, backend
    )
    return value_target


def td1_return(
    gamma: Scalar,
    next_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    *,
    time_dim: int = -1,
    backend: str | None = None,
) -> Tensor:
    r"""TD(1) return: the discounted sum of rewards up to the trajectory's end, and the value there.

    .. math::
        G_t = r_t + γ(1 - \text{term}_t) G_{t+1},

    where :math:`G_{t+1}` is :math:`v'_t` if the trajectory ends at t, as it does at the last step of the tensor: the
    return `td_lambda_return` at λ = 1. Arguments and errors are those of `gae`.

    Examples:
        >>> import torch
        >>> next_value, reward = torch.tensor([0.0, 0.0, 8.0]), torch.ones(3)
        >>> td1_return(0.5, next_value, reward, torch.tensor([False, False, True]), torch.zeros(3))
        tensor([2.7500, 3.5000, 5.0000])

    See Sutton & Barto 2018, Reinforcement learning, section 12.1.

    """
    return td_lambda_return(gamma, 1.0, next_value, reward, done, terminated, time_dim=time_dim, backend=backend)


def fixed_discount_td_lambda_return(
    gamma: Scalar,
    lmbda: Scalar,
    next_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    *,
    time_dim: int = -1,
    backend: str | None = None,
) -> Tensor:
    r"""TD(λ) return in which γ_t and λ_t hold for all of the trajectory that follows step t.

    .. math::
        G_t = G_t^{(t)}, \qquad
        G_k^{(t)} = r_k + γ_t(1 - \text{term}_k)\left[(1 - λ_t) v'_k + λ_t G_{k+1}^{(t)}\right],

    with the ends of `td_lambda_return`, which instead uses γ_k at step k, whatever step the return starts from. The
    work grows with the square of the number of steps, the memory linearly. Arguments and errors are those of `gae`.

    Examples:
        >>> import torch
        >>> gamma, reward = torch.tensor([0.5, 1.0, 0.0]), torch.ones(3)
        >>> done = torch.tensor([False, False, True])
        >>> fixed_discount_td_lambda_return(gamma, 1.0, torch.zeros(3), reward, done)
        tensor([1.7500, 2.0000, 1.0000])

    See Sutton & Barto 2018, Reinforcement learning, equation 12.18.

    """
    (value_target,) = solve(
        Recurrence(FIXED_DISCOUNT, gamma, lmbda, reward, None, next_value, done, terminated),
        time_dim,
        backend,
    )
    return value_target


def reward_to_go(
    gamma: Scalar, reward: Tensor, done: Tensor, *, time_dim: int = -1, backend: str | None = None
) -> Tensor:
    r"""Discounted reward-to-go, without bootstrap.

    .. math::
        G_t = r_t + γ(1 - \text{done}_t) G_{t+1}, \qquad G_T = 0

    Arguments and errors are those of `gae`.

    Examples:
        >>> import torch
        >>> reward_to_go(0.5, torch.ones(4), torch.tensor([False, True, False, False]))
        tensor([1.5000, 1.0000, 1.5000, 1.0000])

    See Sutton & Barto 2018, Reinforcement learning, equation 3.9.

    """
    check_real("done", done)  # without which a scan has no ends
    (value,) = solve(Recurrence(SCAN, gamma, None, reward, None, None, done, None), time_dim, backend)
    return value


def reverse_scan(coefficient: Scalar, increment: Tensor, *, time_dim: int = -1, backend: str | None = None) -> Tensor:
    r"""The first-order linear recurrence that every estimator here is an instance of, backwards in time.

    .. math::
        y_t = d_t + c_t y_{t+1}, \qquad y_T = 0

    Args:
        coefficient: c_t, a number or a tensor broadcastable to ``increment``.
        increment: d_t, shape ``[*B, T, *F]``.
        time_dim: the dimension of time.
        backend: which implementation runs; None for the block's or the process's choice.

    Returns:
        y, of the shape of ``increment``.

    Raises:
        TypeError: an argument isn't a real tensor, or the coefficient not a number either.
        RuntimeError: the coefficient doesn't broadcast, devices differ, or the backend doesn't run there.
        IndexError: ``time_dim`` is out of range.
        ValueError: the backend doesn't exist.

    Examples:
        >>> import torch
        >>> reverse_scan(torch.tensor([0.5, 0.0, 0.5]), torch.ones(3))
        tensor([1.5000, 1.0000, 1.0000])

    See Blelloch 1990, Prefix sums and their applications, section 1.4.

    """
    problem = Recurrence(SCAN, coefficient, None, increment, None, None, None, None)
    (y,) = solve(problem, time_dim, backend, {"gamma": "coefficient", "reward": "increment"})
    return y
