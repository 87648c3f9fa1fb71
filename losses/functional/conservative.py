"""Conservative Q-learning: what pushes down the values of actions that the data doesn't have."""

from torch import Tensor


def conservative_gap(action_value: Tensor, value: Tensor, temperature: float = 1.0) -> Tensor:
    r"""How far the softest maximum of the values lies above the value of the action in the data.

    .. math::
        L = τ \log \sum_a \exp\frac{Q(s, a)}{τ} - Q(s, a_t)

    Args:
        action_value: Q(s, ·), shape ``[*B, A]``; for sampled actions less τ times the log-density of each, by which
            it becomes an estimate of the integral.
        value: Q(s, a_t), shape ``[*B]``.
        temperature: τ.

    Examples:
        >>> import torch
        >>> conservative_gap(torch.zeros(2), torch.tensor(0.0))
        tensor(0.6931)

    See Kumar et al. 2020, Conservative Q-learning for offline reinforcement learning (arXiv:2006.04779), equation 4.

    """
    return temperature * (action_value / temperature).logsumexp(-1) - value
