"""IQL: learning from stored data without ever asking for the value of an action that isn't in it."""

import torch
from torch import Tensor

from ...kernels.dtypes import autocast_is_on

LARGEST_WEIGHT = 100.0
"""Bound on the weight of an action in the regression of the policy, as in the code published with the paper."""


def expectile_loss(error: Tensor, expectile: float) -> Tensor:
    r"""Asymmetric square, least in the mean where the prediction is the expectile τ of its targets.

    .. math::
        L_τ(u) = |τ - 1(u < 0)| u^2

    Args:
        error: u, target − prediction, any shape; under autocast its square is in float32 at least.
        expectile: τ: 0.5 gives (half of) the ordinary square, 1 in the limit the greatest target.

    Examples:
        >>> expectile_loss(torch.tensor([-1.0, 2.0]), 0.9)
        tensor([0.1000, 3.6000])

    See Kostrikov et al. 2021, Offline reinforcement learning with implicit Q-learning (arXiv:2110.06169), equation 3.

    """
    if autocast_is_on(error):
        error = error.to(torch.promote_types(error.dtype, torch.float32))
    square = error.square()
    return torch.where(error > 0, expectile * square, (1 - expectile) * square)


def advantage_weighted_objective(log_prob: Tensor, advantage: Tensor, temperature: float) -> Tensor:
    r"""Log-likelihood of the data's actions, the better ones weighing more.

    .. math::
        L_t = \min\left(e^{β A_t}, 100\right) \log π(a_t|s_t)

    Args:
        log_prob: log π(a_t|s_t), any shape.
        advantage: A_t, the same shape; a constant.
        temperature: β, an inverse temperature: 0 imitates all of the data.

    Examples:
        >>> advantage_weighted_objective(torch.tensor([-1.0, -1.0]), torch.tensor([0.0, 9.0]), 1.0)
        tensor([  -1., -100.])

    See Kostrikov et al. 2021 (arXiv:2110.06169), equation 7.

    """
    return (temperature * advantage.detach()).exp().clamp_max(LARGEST_WEIGHT) * log_prob
