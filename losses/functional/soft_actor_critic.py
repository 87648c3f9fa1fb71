"""Soft actor-critic: values that count the policy's entropy, and the loss of the coefficient that weighs it.

Losses are one per sample. Tensors of one call have one shape ``[*B]`` unless said otherwise; those of discrete
actions have the actions as their last dimension, ``[*B, A]``. α is a number or a 0-d tensor.
"""

import torch
from torch import Tensor

from ...kernels.checks import Scalar


def soft_value(action_value: Tensor, log_prob: Tensor, alpha: Scalar) -> Tensor:
    r"""Value of a state, estimated from one action of the policy.

    .. math::
        V(s) = Q(s, a) - α \log π(a|s), \qquad a \sim π(\cdot|s)

    Its negative is the policy's loss, if a is a differentiable function of the policy's parameters.

    Args:
        action_value: Q(s, a), shape ``[*B]``.
        log_prob: log π(a|s), the same shape.
        alpha: α.

    Examples:
        >>> soft_value(torch.tensor([1.0]), torch.tensor([-2.0]), 0.5)
        tensor([2.])

    See Haarnoja et al. 2018, Soft actor-critic algorithms and applications (arXiv:1812.05905), equations 3 and 7.

    """
    return action_value - alpha * log_prob


def expected_soft_value(action_value: Tensor, log_prob: Tensor, alpha: Scalar) -> Tensor:
    r"""Value of a state, in expectation over the discrete actions of the policy.

    .. math::
        V(s) = \sum_a π(a|s) \left(Q(s, a) - α \log π(a|s)\right)

    Args:
        action_value: Q(s, ·), shape ``[*B, A]``.
        log_prob: log π(·|s), the same shape; −∞ for an action that can't be taken.
        alpha: α.

    Returns:
        Shape ``[*B]``. Its negative is the policy's loss.

    Examples:
        >>> expected_soft_value(torch.tensor([4.0, 2.0]), torch.tensor([0.5, 0.5]).log(), 0.0)
        tensor(3.)

    See Christodoulou 2019, Soft actor-critic for discrete action settings (arXiv:1910.07207), equations 10 and 12.

    """
    return (log_prob.exp() * (action_value - alpha * _finite(log_prob))).sum(-1)


def categorical_entropy(log_prob: Tensor) -> Tensor:
    """Entropy of a policy over discrete actions, shape ``[*B]``, from its log-probabilities, shape ``[*B, A]``.

    Examples:
        >>> categorical_entropy(torch.tensor([0.5, 0.5]).log())
        tensor(0.6931)

    """
    return -(log_prob.exp() * _finite(log_prob)).sum(-1)


def _finite(log_prob: Tensor) -> Tensor:
    """``log_prob`` with 0 for what never happens: p log p vanishes there, but 0 · ∞ is NaN."""
    return log_prob.masked_fill(log_prob == -torch.inf, 0.0)


def temperature_loss(entropy: Tensor, coefficient: Tensor, target_entropy: Scalar) -> Tensor:
    r"""Loss under which α grows where the policy's entropy is below its target, and shrinks where it's above.

    .. math::
        L(α) = c(α) \left(H[π(\cdot|s)] - \bar H\right)

    Args:
        entropy: H, or its estimate −log π(a|s), shape ``[*B]``; taken as a constant.
        coefficient: c: α itself, as in the paper, or log α, whose steps don't shrink with α. A 0-d tensor.
        target_entropy: H̄.

    Examples:
        >>> temperature_loss(torch.tensor([1.0, 3.0]), torch.tensor(0.5), 2.0)
        tensor([-0.5000,  0.5000])

    See Haarnoja et al. 2018 (arXiv:1812.05905), equation 18.

    """
    return coefficient * (entropy.detach() - target_entropy)
