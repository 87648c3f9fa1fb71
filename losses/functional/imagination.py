"""Dreamer: how well a world model explains what was seen, and what an imagined trajectory is worth.

Shapes: ``[*B]`` are the batch dimensions, the last of an imagined trajectory's is time; ``[*F]`` are the dimensions
of what is predicted, such as channels, height and width of an image. What is computed over features is computed in
float32 at least: the squared errors of an image in float16 don't add up.
"""

import torch
from torch import Tensor

from ...kernels.checks import Scalar
from ...kernels.dispatch import as_input


def gaussian_kl(mean: Tensor, std: Tensor, other_mean: Tensor, other_std: Tensor) -> Tensor:
    r"""Kullback–Leibler divergence between Gaussians, dimension by dimension.

    .. math::
        \text{KL}(N(μ, σ) \| N(μ', σ')) = \log\frac{σ'}{σ} + \frac{σ^2 + (μ - μ')^2}{2 σ'^2} - \frac{1}{2}

    Args:
        mean: μ, shape ``[*B, F]``.
        std: σ, the same shape, as all.
        other_mean: μ'.
        other_std: σ'.

    Examples:
        >>> one, zero = torch.ones(1), torch.zeros(1)
        >>> gaussian_kl(one, one, zero, one)
        tensor([0.5000])

    See Kingma & Welling 2014, Auto-encoding variational Bayes (arXiv:1312.6114), appendix B.

    """
    mean, std, other_mean, other_std = (wide(x) for x in (mean, std, other_mean, other_std))
    ratio = std / other_std
    return (ratio.square() + ((mean - other_mean) / other_std).square() - 1) / 2 - ratio.log()


def over_features(x: Tensor, batch_ndim: int, average: bool) -> Tensor:
    """Sum, or ``average``, of ``x``, shape ``[*B, *F]``, over its features: shape ``[*B]``.

    Examples:
        >>> over_features(torch.ones(2, 3, 4), 1, average=False)
        tensor([12., 12.])

    """
    if x.ndim == batch_ndim:
        return wide(x)
    x = wide(x).flatten(batch_ndim)
    return x.mean(-1) if average else x.sum(-1)


def step_divergence(kl: Tensor, batch_ndim: int, free_nats: float | None, average: bool) -> Tensor:
    r"""Divergence of a step, of which the first nats are free: below them there is nothing to gain.

    .. math::
        \max\Big(ν, \sum_i \text{KL}_i\Big), \qquad \text{or with } \texttt{average} \quad
        \frac{1}{F} \sum_i \max(ν, \text{KL}_i)

    Args:
        kl: KL_i, shape ``[*B, F]`` (`gaussian_kl`).
        batch_ndim: the number of dimensions in ``[*B]``.
        free_nats: ν; None for no such bound.
        average: average over the latent dimensions, each with free nats of its own, instead of summing them.

    Returns:
        Shape ``[*B]``.

    Examples:
        >>> kl = torch.tensor([[1.0, 5.0], [0.5, 0.5]])
        >>> step_divergence(kl, 1, 3.0, average=False)
        tensor([6., 3.])
        >>> step_divergence(kl, 1, 3.0, average=True)
        tensor([4., 3.])

    See Kingma et al. 2016, Improving variational inference with inverse autoregressive flow (arXiv:1606.04934),
    appendix C.8.

    """
    if free_nats is None:
        return over_features(kl, batch_ndim, average)
    free_nats = as_input(free_nats, kl)
    if average:
        return over_features(kl.clamp_min(free_nats), batch_ndim, average)
    return over_features(kl, batch_ndim, average).clamp_min(free_nats)


def discounted_sum(x: Tensor, gamma: Scalar | None) -> Tensor:
    r"""What the steps of an imagined trajectory add up to, weighted by how likely they are still to be reached.

    .. math::
        \sum_{t=0}^{H-1} \Big(\prod_{k<t} γ_k\Big) x_t

    Args:
        x: x_t, shape ``[*B, H, 1]``.
        gamma: γ, a number or a tensor that broadcasts to ``x``; None for a plain sum.

    Returns:
        Shape ``[*B]``.

    Examples:
        >>> discounted_sum(torch.ones(1, 3, 1), 0.5)
        tensor([1.7500])

    See Hafner et al. 2020, Dream to control (arXiv:1912.01603), equations 7 and 8.

    """
    if gamma is not None:
        x = x * discount_weight(x, gamma)
    return x.sum((-2, -1))


def discount_weight(like: Tensor, gamma: Scalar, continuation: Tensor | None = None) -> Tensor:
    r"""How much each step of an imagined trajectory counts: how likely it is still to be reached.

    .. math::
        w_t = \prod_{k<t} γ_k \prod_{k \le t} c_k

    Args:
        like: anything of shape ``[*B, H, 1]``, that of the result.
        gamma: γ, a number or a tensor that broadcasts to it.
        continuation: c, how likely it is to go on from each state, the same shape; None where that is certain.

    Examples:
        >>> discount_weight(torch.zeros(1, 3, 1), 0.5).flatten()
        tensor([1.0000, 0.5000, 0.2500])

    See Hafner et al. 2020, Dream to control (arXiv:1912.01603), and 2023 (arXiv:2301.04104) for c.

    """
    ones = torch.ones_like(like)
    steps = torch.cat([ones[..., :1, :], (ones * gamma)[..., :-1, :]], -2)
    return (steps if continuation is None else steps * continuation).cumprod(-2)


def quantile(x: Tensor, q: float, mask: Tensor | None = None) -> Tensor:
    """The ``q``-quantile of ``x``, interpolated between its neighbours. A 0-d tensor; not finite where none counts.

    Unlike `torch.quantile` it takes any number of elements, and never waits for the device.

    Args:
        x: any shape.
        q: between 0 and 1.
        mask: bool, the same shape: the elements that count.

    Examples:
        >>> quantile(torch.tensor([3.0, 1.0, 2.0]), 0.25)
        tensor(1.5000)

    """
    x = wide(x)
    if not x.numel():
        return x.new_full((), torch.nan)
    if mask is not None:
        x = torch.where(mask, x, torch.inf)
    ascending = x.flatten().sort().values
    count = x.numel() if mask is None else mask.sum()
    # float32 doesn't tell the positions beyond 2²⁴ apart.
    position = (q * ascending.new_ones((), dtype=torch.float64) * (count - 1)).clamp(0, x.numel() - 1)
    below, above = ascending.gather(0, torch.stack([position.floor(), position.ceil()]).long()).unbind()
    return torch.lerp(below, above, position.frac().to(x.dtype))


def wide(x: Tensor) -> Tensor:
    """``x`` in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
