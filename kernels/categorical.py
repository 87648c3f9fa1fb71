"""The distributional (C51) Q-learning loss from the networks' outputs, and its projection alone.

Distributions are over atoms z_0 < … < z_{N−1} of uniform spacing. What runs underneath is chosen by ``backend`` (see
`fusedrl.kernels.backend`): one Triton launch forward and one backward, or vectorised PyTorch.
"""

from torch import Tensor

from . import categorical_operators
from .categorical_problem import Bellman, Transition
from .checks import Scalar


def categorical_q_loss(
    log_prob: Tensor,
    action: Tensor,
    next_log_prob: Tensor,
    support: Tensor,
    reward: Tensor,
    terminated: Tensor,
    gamma: Scalar,
    *,
    next_online_log_prob: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Cross-entropy between the projected Bellman target and the distribution of the taken action's return.

    .. math::
        a^* = \arg\max_a \sum_j z_j\, p_j(s_{t+1}, a), \qquad
        m = Φ\left[r + γ(1 - \text{term})\, z,\; p(s_{t+1}, a^*)\right], \qquad
        L = -\sum_i m_i \log p_i(s_t, a_t)

    with the projection :math:`Φ` of `categorical_projection`.

    Args:
        log_prob: log-probabilities at s_t of the network that is trained, shape ``[*B, atoms, actions]``.
        action: a_t, the integer index of the taken action, shape ``[*B]``. For one that doesn't exist the Triton
            kernel, which can't raise without waiting, gives a loss of NaN.
        next_log_prob: the target network's log-probabilities at s_{t+1}, shape ``[*B, atoms, actions]``. Of a
            terminal step they are never read into a result.
        support: z, shape ``[atoms]``, increasing and of uniform spacing, which the kernels rely on: of another support
            they lose mass. It isn't looked at, since that would wait for the device.
        reward: r, shape ``[*B]``; for n-step data the discounted sum of n rewards.
        terminated: the environment terminated, shape ``[*B]``. Non-zero means true.
        gamma: γ, a number, a 0-d tensor or a tensor broadcastable to ``[*B]``; γⁿ for n-step data.
        next_online_log_prob: the trained network's log-probabilities at s_{t+1}. If given they choose a* in place of
            the target's (double Q-learning).
        backend: which implementation runs; None for the block's or the process's choice.

    Returns:
        The loss of each sample, shape ``[*B]``, dtype of ``log_prob``, differentiable twice with respect to
        ``log_prob`` and constant in everything else; and the priority of each sample, which is the loss detached.
        Half precision is computed in float32, which is the result's if the reward isn't of half precision too.

    Raises:
        RuntimeError: shapes or devices differ, or there are less than 2 atoms.
        TypeError: ``action`` isn't an integer.
        ValueError: the backend doesn't exist.

    Examples:
        >>> import torch
        >>> support = torch.tensor([-1.0, 0.0, 1.0])
        >>> log_prob = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.2, 0.2]]).log().t()[None]  # 1 sample, 3 atoms, 2 actions
        >>> loss, priority = categorical_q_loss(
        ...     log_prob, torch.tensor([1]), log_prob, support, torch.tensor([0.5]), torch.tensor([True]), 0.9
        ... )
        >>> loss  # all mass at r = 0.5: half on the atom 0, half on 1, both of log-probability log 0.2
        tensor([1.6094])

    See Bellemare, Dabney & Munos 2017, A distributional perspective on reinforcement learning (arXiv:1707.06887),
    algorithm 1; van Hasselt, Guez & Silver 2016 (arXiv:1509.06461) for double Q-learning.

    """
    loss = categorical_operators.loss(
        Transition(log_prob, action, next_log_prob, next_online_log_prob),
        Bellman(support, reward, terminated, gamma),
        backend,
    )
    return loss, loss.detach()


def categorical_projection(
    prob: Tensor,
    support: Tensor,
    reward: Tensor,
    terminated: Tensor,
    gamma: Scalar,
    *,
    backend: str | None = None,
) -> Tensor:
    r"""Distribution of r + γ(1 − term)Z, for Z distributed as ``prob`` over the support, projected onto the support.

    .. math::
        b_j = \frac{\operatorname{clip}(r + γ(1 - \text{term}) z_j, z_0, z_{N-1}) - z_0}{Δz}, \qquad
        m_i = \sum_j p_j \max(0, 1 - |b_j - i|)

    The mass of ``prob`` is conserved. After a terminal step all mass, one, is at r, and ``prob`` isn't read.

    Args:
        prob: p, shape ``[*B, atoms]``.
        support: z, shape ``[atoms]``, increasing and of uniform spacing, which the kernels rely on: of another support
            they lose mass. It isn't looked at, since that would wait for the device.
        reward: r, shape ``[*B]``.
        terminated: the environment terminated, shape ``[*B]``. Non-zero means true.
        gamma: γ, a number, a 0-d tensor or a tensor broadcastable to ``[*B]``.
        backend: which implementation runs; None for the block's or the process's choice.

    Returns:
        m, shape ``[*B, atoms]``, dtype of ``prob``; a constant to autograd.

    Raises:
        RuntimeError: shapes or devices differ, or there are less than 2 atoms.
        ValueError: the backend doesn't exist.

    Examples:
        >>> import torch
        >>> prob, support = torch.tensor([[0.25, 0.5, 0.25]]), torch.tensor([-1.0, 0.0, 1.0])
        >>> categorical_projection(prob, support, torch.tensor([0.5]), torch.tensor([False]), 1.0)
        tensor([[0.1250, 0.3750, 0.5000]])

    See Bellemare, Dabney & Munos 2017, A distributional perspective on reinforcement learning (arXiv:1707.06887),
    equation 7.

    """
    return categorical_operators.projection(prob, Bellman(support, reward, terminated, gamma), backend)
