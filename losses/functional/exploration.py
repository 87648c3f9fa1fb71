"""Exploration: how new an observation is to the networks."""

from torch import Tensor


def distillation_error(prediction: Tensor, target: Tensor) -> Tensor:
    r"""Mean squared error of a network that imitates another, :math:`\frac1F \sum_i (\hat f_i(s) - f_i(s))^2`.

    Large where the imitator has seen little: the intrinsic reward of random network distillation.

    Args:
        prediction: :math:`\hat f(s)`, shape ``[*B, F]``.
        target: f(s), the same shape, taken as a constant.

    Returns:
        Shape ``[*B]``.

    Examples:
        >>> import torch
        >>> distillation_error(torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [2.0, 2.0]]))
        tensor([0.5000, 4.0000])

    See Burda et al. 2018, Exploration by random network distillation (arXiv:1810.12894), section 2.2.

    """
    return (prediction - target.detach()).square().mean(-1)
