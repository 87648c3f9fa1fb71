"""Q-learning with discrete actions: the value of an action, and that of the greedy one.

A network gives one value per action, or per part of an action, in the last dimension.
"""

import torch
from torch import Tensor


def value_of_index(action_value: Tensor, action: Tensor) -> Tensor:
    """Q(s, a) of an action given by its index.

    Args:
        action_value: Q(s, ·), shape ``[*B, actions]``.
        action: a, integer, shape ``[*B]``.

    Returns:
        Shape ``[*B]``.

    Examples:
        >>> value_of_index(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1, 0]))
        tensor([2., 3.])

    """
    return action_value.gather(-1, action.long().unsqueeze(-1)).squeeze(-1)


def value_of_parts(action_value: Tensor, action: Tensor) -> Tensor:
    r"""Q(s, a) of an action that says of each of its parts whether it is taken: one-hot, multi-one-hot, binary.

    .. math::
        Q(s, a) = \sum_i a_i Q_i(s)

    Args:
        action_value: Q_i(s), shape ``[*B, parts]``.
        action: a_i, shape ``[*B, parts]``: non-zero means taken. The value of a part that isn't is never read.

    Returns:
        Shape ``[*B]``.

    Examples:
        >>> value_of_parts(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1, 0, 1]))
        tensor(5.)

    """
    return torch.where(action != 0, action_value, 0).sum(-1)


def greedy_value(action_value: Tensor, choosing_value: Tensor, heads: tuple[int, ...] | None = None) -> Tensor:
    r"""Q(s, a*) of the greedy action, summed over heads that act at the same time.

    .. math::
        \sum_h Q_h(s, a_h^*), \qquad a_h^* = \arg\max_a Q'_h(s, a)

    Args:
        action_value: Q, shape ``[*B, actions]``; of several heads, one after the other.
        choosing_value: Q', the same shape: Q itself, or another network's for double Q-learning.
        heads: the number of actions of each head; None where there is one.

    Returns:
        Shape ``[*B]``.

    Examples:
        >>> q, online = torch.tensor([1.0, 5.0, 2.0]), torch.tensor([0.0, 1.0, 2.0])
        >>> greedy_value(q, q), greedy_value(q, online), greedy_value(q, online, heads=(1, 2))
        (tensor(5.), tensor(2.), tensor(3.))

    See Mnih et al. 2015, Human-level control through deep reinforcement learning,
    https://doi.org/10.1038/nature14236; van Hasselt et al. 2016, Deep reinforcement learning with double
    Q-learning (arXiv:1509.06461), equation 4.

    """
    if heads is None:
        return action_value.gather(-1, choosing_value.argmax(-1, keepdim=True)).squeeze(-1)
    split = zip(action_value.split(heads, -1), choosing_value.split(heads, -1), strict=True)
    return torch.stack([greedy_value(q, choosing) for q, choosing in split]).sum(0)


def greedy_binary_value(action_value: Tensor, choosing_value: Tensor) -> Tensor:
    r"""Q(s, a*) where each part of an action is taken or not (see `value_of_parts`), whatever the others are.

    .. math::
        \sum_i a_i^* Q_i(s), \qquad a_i^* = [Q'_i(s) > 0]

    Args:
        action_value: Q, shape ``[*B, parts]``.
        choosing_value: Q', the same shape: Q itself, or another network's for double Q-learning.

    Returns:
        Shape ``[*B]``.

    Examples:
        >>> q = torch.tensor([1.0, -2.0, 4.0])
        >>> greedy_binary_value(q, q)
        tensor(5.)

    """
    return value_of_parts(action_value, choosing_value > 0)
