"""TD3 and TD3+BC: actor-critic learning with a deterministic policy."""

import torch
from torch import Tensor

from ...kernels.dispatch import as_input


def smoothed_action(action: Tensor, noise: Tensor, noise_clip: float, low: Tensor, high: Tensor) -> Tensor:
    r"""Action of the target policy with clipped noise, so that a value can't exploit a narrow peak of Q.

    .. math::
        \tilde a = \text{clip}\left(\bar π(s') + \text{clip}(ε, -c, c),\ a_\text{low},\ a_\text{high}\right)

    Args:
        action: \bar π(s'), shape ``[*B, *A]``.
        noise: ε, the same shape.
        noise_clip: c.
        low: a_low, a shape that broadcasts to that of the action.
        high: a_high, likewise.

    Examples:
        >>> action, noise = torch.tensor([0.0, 0.0, 0.9]), torch.tensor([0.1, -3.0, 3.0])
        >>> smoothed_action(action, noise, 0.5, torch.tensor(-1.0), torch.tensor(1.0))
        tensor([ 0.1000, -0.5000,  1.0000])

    See Fujimoto et al. 2018, Addressing function approximation error in actor-critic methods (arXiv:1802.09477),
    section 5.3.

    """
    noise_clip = as_input(noise_clip, noise)
    return (action + noise.clamp(-noise_clip, noise_clip)).clamp(low, high)


def cloning_error(action: Tensor, data_action: Tensor, batch_ndim: int) -> Tensor:
    r"""How far a policy is from the data, the square averaged over the d dimensions of an action.

    .. math::
        \tfrac{1}{d} \lVert π(s) - a \rVert^2

    Args:
        action: π(s), shape ``[*B, *A]``.
        data_action: a, the same shape.
        batch_ndim: number of dimensions ``*B``.

    Returns:
        Shape ``[*B]``.

    Examples:
        >>> cloning_error(torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 1.0]]), 1)
        tensor([2.])

    """
    error = (action - data_action).square()
    return error if error.ndim == batch_ndim else error.flatten(batch_ndim).mean(-1)


def value_weight(magnitude: Tensor, alpha: float) -> Tensor:
    r"""What a value weighs against the imitation of the data, whatever the scale of the rewards.

    .. math::
        λ = \frac{α}{\mathbb{E}\left[|Q(s, π(s))|\right]}

    Args:
        magnitude: the mean of |Q|, 0-d, a constant. Where it is 0 the values prefer no action, and λ is 0.
        alpha: α.

    Examples:
        >>> value_weight(torch.tensor(50.0), 2.5), value_weight(torch.tensor(0.0), 2.5)
        (tensor(0.0500), tensor(0.))

    See Fujimoto and Gu 2021, A minimalist approach to offline reinforcement learning (arXiv:2106.06860), equation 5,
    with the policy's actions in the place of the data's, as in the code published with it.

    """
    return torch.where(magnitude == 0, 0, alpha / magnitude)
