r"""Log-probabilities of diagonal Gaussian policies, whose actions may be squashed into an interval by tanh.

The last dimension is that of the action; what belongs to its elements is summed. What runs underneath is chosen by
``backend`` (see `fusedrl.kernels.backend`): one Triton launch forward and one backward, or vectorised PyTorch.

With ``squash=(low, high)`` an action is

.. math::
    a = \text{low} + \tfrac12 (\text{high} - \text{low}) (\tanh x + 1), \qquad
    x \sim N(\text{loc}, \text{scale}), \qquad
    \log\left|\frac{da}{dx}\right|
        = \log\frac{\text{high} - \text{low}}{2} + 2\left(\log 2 - x - \operatorname{softplus}(-2x)\right)

Rounding makes ±1 of tanh x where x is large, from where no inverse leads back. So |tanh x| is kept at 1 − ``margin``
and below, in the actions that are drawn and in those that are inverted. Gradients pass as if it weren't: they are those
of tanh and its inverse at the value that is kept.
"""

from torch import Tensor

from . import squashed_normal_operators
from .squashed_normal_operators import Bounds


def normal_log_prob(
    loc: Tensor,
    scale: Tensor,
    action: Tensor,
    *,
    squash: Bounds | None = None,
    margin: float | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""log π(a) of actions that are there already.

    .. math::
        \log π(a) = \sum_i \log N(x_i; \text{loc}_i, \text{scale}_i) - \log\left|\frac{da_i}{dx_i}\right|

    where x is the action itself, or what is squashed to it.

    Args:
        loc: mean of x, shape ``[*B, A]``.
        scale: standard deviation of x, shape ``[*B, A]``, positive.
        action: a, shape ``[*B, A]``.
        squash: None for a = x; (low, high), two numbers or tensors broadcastable to ``[*B, A]``, of which a gradient
            isn't found.
        margin: how far |tanh x| stays from 1; None for the resolution of the action's dtype, 1e-6 in float32 and 1e-15
            in float64, as in TorchRL's TanhNormal. With 0 every number between the bounds is inverted as it is, and
            the bounds are taken for their neighbours, so that the result is finite.
        backend: which implementation runs; None for the block's or the process's choice.

    Returns:
        log π(a), shape ``[*B]``, of the dtype that the arguments have in common. Differentiable twice in loc, scale and
        action. Half precision is computed in float32. Nothing checks that the scale is positive or the action between
        the bounds, which would wait for the device.

    Raises:
        RuntimeError: shapes or devices differ, or there is no dimension.
        TypeError: an argument isn't floating point, or ``squash`` no pair of numbers or tensors.
        ValueError: low isn't less than high (of numbers), the margin isn't in [0, 1), or the backend doesn't exist.

    Examples:
        >>> import torch
        >>> loc, scale = torch.zeros(2), torch.ones(2)
        >>> normal_log_prob(loc, scale, torch.zeros(2))  # −log 2π
        tensor(-1.8379)
        >>> normal_log_prob(loc, scale, torch.zeros(2), squash=(-2.0, 2.0))  # each is spread twice as wide
        tensor(-3.2242)

    See Haarnoja et al. 2018, Soft actor-critic (arXiv:1801.01290), appendix C.

    """
    return squashed_normal_operators.log_prob(loc, scale, action, squash, margin, backend)


def normal_sample(
    loc: Tensor,
    scale: Tensor,
    noise: Tensor,
    *,
    squash: Bounds | None = None,
    margin: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""An action made of noise, and its log-probability.

    .. math::
        x = \text{loc} + \text{scale} \cdot \text{noise}, \qquad
        \log π(a) = \sum_i \log N(x_i; \text{loc}_i, \text{scale}_i) - \log\left|\frac{da_i}{dx_i}\right|

    The log-probability is that of x itself. It is right where the action is rounded to a bound, and needs no inverse.

    Args:
        loc: mean of x, shape ``[*B, A]``.
        scale: standard deviation of x, shape ``[*B, A]``, positive.
        noise: drawn from N(0, 1), shape ``[*B, A]``; a constant to autograd.
        squash: None for a = x; (low, high), two numbers or tensors broadcastable to ``[*B, A]``, of which a gradient
            isn't found.
        margin: how far |tanh x| of the action stays from 1, 0 to leave it where it is; None for the resolution of the
            dtype, 1e-6 in float32 and 1e-15 in float64, as in TorchRL's TanhNormal.
        backend: which implementation runs; None for the block's or the process's choice.

    Returns:
        The action, shape ``[*B, A]``, and log π(a), shape ``[*B]``, of the dtype that the arguments have in common.
        Both are differentiable twice in loc and scale (pathwise). Half precision is computed in float32.

    Raises:
        RuntimeError: shapes or devices differ, or there is no dimension.
        TypeError: an argument isn't floating point, or ``squash`` no pair of numbers or tensors.
        ValueError: low isn't less than high (of numbers), the margin isn't in [0, 1), or the backend doesn't exist.

    Examples:
        >>> import torch
        >>> loc, scale = torch.tensor([0.0, 30.0]), torch.ones(2)
        >>> action, log_prob = normal_sample(loc, scale, torch.zeros(2), squash=(-1.0, 1.0))
        >>> action, log_prob  # −log 2π − 0 − 2 (log 2 − 30)
        (tensor([0.0000, 1.0000]), tensor(56.7758))

    See Haarnoja et al. 2018, Soft actor-critic (arXiv:1801.01290), appendix C.

    """
    return squashed_normal_operators.sample(loc, scale, noise, squash, margin, backend)
