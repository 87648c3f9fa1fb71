"""What losses that learn action values share, on the tensors that the networks give: target, loss, policy's loss.

An ensemble of N networks judges each sample: its values have the shape ``[N, *B]``, all else has the shape ``[*B]``.
What runs underneath is chosen by ``backend`` (see `fusedrl.kernels.backend`): one Triton launch for each function, two
where the sum over the batch takes several programs, or few calls of PyTorch. float16 and bfloat16 are computed in
float32; results have the floating dtype of the inputs together.
"""

from typing import NamedTuple

from torch import Tensor

from . import action_value_operators as operators
from .action_value_problem import Bootstrap, Improvement, Regression
from .checks import Scalar


class Target(NamedTuple):
    """What an ensemble is drawn to, each of shape ``[*B]`` and without gradient."""

    value_target: Tensor
    """y = r + γ(1 − term)·v'"""
    next_value: Tensor
    """v' = min_i Q_i − α log π, after terminal steps too; of a single network it may be a view of what it said"""


class EnsembleLoss(NamedTuple):
    """Loss of an ensemble, and how wrong it is about each sample."""

    loss: Tensor
    """0-d, or one per sample"""
    priority: Tensor
    """shape ``[*B]``, without gradient, 0 where masked"""


class SoftPolicyLoss(NamedTuple):
    """Loss of a policy, and its entropy."""

    loss: Tensor
    """E[α log π − min_i Q_i], 0-d, or one per sample"""
    entropy: Tensor
    """0-d, the mean of −log π over the samples that count, whatever the reduction and weights, without gradient"""


def value_target(
    next_values: Tensor,
    reward: Tensor,
    terminated: Tensor,
    gamma: Scalar,
    *,
    log_prob: Tensor | None = None,
    alpha: Scalar | None = None,
    backend: str | None = None,
) -> Target:
    r"""Target of DQN, DDPG, TD3 and SAC: the least of several estimates of what follows, and the policy's entropy.

    .. math::
        v' = \min_i Q_i(s_{t+1}, a') - α \log π(a'|s_{t+1}), \qquad y = r + γ(1 - \text{term})\, v'

    Args:
        next_values: Q_i(s_{t+1}, a'), shape ``[N, *B]``.
        reward: r, shape ``[*B]``; for n-step data the discounted sum of n rewards.
        terminated: the environment terminated, shape ``[*B]``. Non-zero means true; v' and γ are then not read
            into y.
        gamma: γ, a number, a 0-d tensor or a tensor broadcastable to ``[*B]``; γⁿ for n-step data.
        log_prob: log π(a'|s_{t+1}), shape ``[*B]``; None for a target without entropy.
        alpha: α, a number or a 0-d tensor; wanted with ``log_prob``.
        backend: which implementation runs; None for the block's or the process's choice.

    Returns:
        y and v', constants to autograd.

    Raises:
        RuntimeError: shapes or devices differ, ``next_values`` isn't floating-point or has no members.
        TypeError: ``log_prob`` is given without ``alpha``.
        ValueError: the backend doesn't exist.

    Examples:
        >>> import torch
        >>> next_values = torch.tensor([[3.0, 5.0], [4.0, torch.nan]])  # 2 networks, 2 samples
        >>> reward, terminated = torch.tensor([1.0, 1.0]), torch.tensor([False, True])
        >>> value_target(next_values, reward, terminated, 0.5).value_target  # 1 + ½·3, and 1 after a terminal step
        tensor([2.5000, 1.0000])

    See Fujimoto et al. 2018, Addressing function approximation error in actor-critic methods (arXiv:1802.09477),
    equation 10; Haarnoja et al. 2018, Soft actor-critic algorithms and applications (arXiv:1812.05905), equations 3
    and 5.

    """
    return Target(*operators.target(Bootstrap(next_values, reward, terminated, gamma, log_prob, alpha), backend))


def ensemble_loss(
    values: Tensor,
    target: Tensor,
    loss_function: str,
    *,
    priority: str = "square",
    per_member: bool = False,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> EnsembleLoss:
    r"""Distance of all networks to their common target, and each sample's priority in a replay buffer.

    .. math::
        l = \sum_i d(Q_i, y), \qquad p = \max_i (Q_i - y)^2

    ==============  ====================================================
    ``l1``          d = \|Q − y\|
    ``l2``          d = (Q − y)²
    ``smooth_l1``   d = (Q − y)²/2 where \|Q − y\| < 1, else \|Q − y\| − 1/2
    ==============  ====================================================

    ==============  ===============  ==================================
    reduction       loss             with ``per_member``
    ==============  ===============  ==================================
    ``mean``        Σ m·w·l / Σ m·w  Σ_i Σ m·w·d(Q_i, y) / (N Σ m·w)
    ``sum``         Σ m·w·l          Σ_i Σ m·w·d(Q_i, y)
    ``none``        m·w·l, ``[*B]``  m·w·d(Q_i, y), ``[N, *B]``
    ==============  ===============  ==================================

    The mean is 0 where all of m·w is 0.

    Args:
        values: Q_i, shape ``[N, *B]``.
        target: y, shape ``[*B]``, a constant.
        loss_function: d: ``"l1"``, ``"l2"`` or ``"smooth_l1"``.
        priority: p: ``"square"``, or ``"abs"`` for max_i \|Q_i − y\|.
        per_member: take the members' losses one by one, instead of their sum for each sample.
        mask: m, bool, shape ``[*B]``: the samples that count. What stands at the others reaches nothing.
        weights: w, importance weights, shape ``[*B]``, constants.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        backend: which implementation runs; None for the block's or the process's choice.

    Returns:
        The loss, differentiable in ``values``, twice if its gradient is made with a graph; and the priorities.

    Raises:
        RuntimeError: shapes or devices differ, ``values`` isn't floating-point or has no members.
        TypeError: ``mask`` isn't bool.
        ValueError: a loss function, priority, reduction or backend doesn't exist.

    Examples:
        >>> import torch
        >>> values, target = torch.tensor([[1.0, 4.0], [3.0, 2.0]]), torch.tensor([1.0, 4.0])
        >>> ensemble_loss(values, target, "smooth_l1")  # errors (0, 2) and (0, −2)
        EnsembleLoss(loss=tensor(1.5000), priority=tensor([4., 4.]))

    See Fujimoto et al. 2018 (arXiv:1802.09477), algorithm 1; Schaul et al. 2016, Prioritized experience replay
    (arXiv:1511.05952), section 3.

    """
    problem = Regression(values, target, mask, weights, loss_function, priority, per_member, reduction)
    return EnsembleLoss(*operators.ensemble(problem, backend))


def soft_policy_loss(
    values: Tensor,
    log_prob: Tensor,
    alpha: Scalar,
    *,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> SoftPolicyLoss:
    r"""Loss of a policy that seeks both value and entropy, judged by the least favourable of several networks.

    .. math::
        l = α \log π(a|s) - \min_i Q_i(s, a), \qquad a \sim π(\cdot|s)

    reduced as in `ensemble_loss`. The gradient of the minimum goes to the least value, in equal shares to those that
    tie.

    Args:
        values: Q_i(s, a), shape ``[N, *B]``.
        log_prob: log π(a|s), shape ``[*B]``.
        alpha: α, a number or a 0-d tensor, a constant.
        mask: m, bool, shape ``[*B]``: the samples that count. What stands at the others reaches nothing.
        weights: w, importance weights, shape ``[*B]``, constants.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        backend: which implementation runs; None for the block's or the process's choice.

    Returns:
        The loss, differentiable in ``values`` and ``log_prob``, twice if its gradient is made with a graph; and the
        entropy.

    Raises:
        RuntimeError: shapes or devices differ, ``values`` isn't floating-point or has no members, α has dimensions.
        TypeError: ``mask`` isn't bool.
        ValueError: a reduction or backend doesn't exist.

    Examples:
        >>> import torch
        >>> values, log_prob = torch.tensor([[1.0, 4.0], [3.0, 2.0]]), torch.tensor([-1.0, -3.0])
        >>> loss, entropy = soft_policy_loss(values, log_prob, 0.5)
        >>> loss, entropy  # the mean of −½ − 1 and −1½ − 2
        (tensor(-2.5000), tensor(2.))

    See Haarnoja et al. 2018, Soft actor-critic algorithms and applications (arXiv:1812.05905), equation 7.

    """
    problem = Improvement(values, log_prob, alpha, mask, weights, reduction)
    return SoftPolicyLoss(*operators.policy(problem, backend))
