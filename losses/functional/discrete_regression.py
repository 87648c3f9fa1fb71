"""Regression of numbers of any scale: the symmetric logarithm, and a number as two weights on a fixed support.

The support (``bins``) may reach further than float16 can say, and its products further still: what is computed on
it is computed in float32 at least.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

LARGEST_EXPONENT = 20.0  # of the support that the paper uses: symexp(20) is 4.85e8


def symlog(value: Tensor) -> Tensor:
    r"""Symmetric logarithm, sign(x) log(1 + \|x\|): like x near zero, like ±log \|x\| far from it.

    Args:
        value: x, any shape.

    Examples:
        >>> symlog(torch.tensor([-100.0, 0.0, 100.0]))
        tensor([-4.6151,  0.0000,  4.6151])

    See Hafner et al. 2023, Mastering diverse domains through world models (arXiv:2301.04104), on symlog predictions.

    """
    # Not with sign and abs, whose gradient at zero is zero, where that of symlog is one: heads that start from zero
    # would never learn. Of the two parts here, only the first has a gradient at zero.
    return torch.log1p(_positive_part(value)) - torch.log1p(F.relu(-value))


def symexp(value: Tensor) -> Tensor:
    r"""Inverse of `symlog`: sign(x) (exp \|x\| − 1).

    Args:
        value: x, any shape.

    Examples:
        >>> symexp(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([-1.7183,  0.0000,  1.7183])

    See Hafner et al. 2023 (arXiv:2301.04104), on symlog predictions.

    """
    return torch.expm1(_positive_part(value)) - torch.expm1(F.relu(-value))  # in two parts as in `symlog`


def _positive_part(value: Tensor) -> Tensor:
    """max(x, 0) with gradient 1 at 0, where that of `torch.clamp` depends on the version of PyTorch."""
    return value.masked_fill(value < 0, 0)


def symexp_bins(num_bins: int) -> Tensor:
    """The support of the paper: `symexp` of ``num_bins`` numbers evenly spaced from −20 to 20.

    Raises:
        ValueError: ``num_bins`` is less than 2.

    Examples:
        >>> symexp_bins(5)
        tensor([-4.8517e+08, -2.2025e+04,  0.0000e+00,  2.2025e+04,  4.8517e+08])

    See Hafner et al. 2023 (arXiv:2301.04104), on symexp two-hot predictions.

    """
    if num_bins < 2:
        raise ValueError(f"the number of bins must be at least 2, but is {num_bins}")
    grid = torch.linspace(-LARGEST_EXPONENT, LARGEST_EXPONENT, num_bins)
    return symexp((grid - grid.flip(-1)) / 2)  # symmetric about zero to the last bit: see `two_hot_decode`


def two_hot_encode(x: Tensor, bins: Tensor) -> Tensor:
    r"""Weights of the two neighbouring bins whose mean is x; of the first or last bin alone beyond the support.

    .. math::
        w_k = \frac{b_{k+1} - x}{b_{k+1} - b_k}, \qquad w_{k+1} = 1 - w_k \qquad \text{where } b_k \le x \le b_{k+1}

    The weights add up to 1. Those of a NaN are NaN. The gradient with respect to x is that of the weights.

    Args:
        x: shape ``[*B]``.
        bins: b, ascending, shape ``[N]``, N ≥ 2.

    Returns:
        Shape ``[*B, N]``, dtype of ``x``, or the default if that isn't floating.

    Raises:
        ValueError: ``bins`` has another shape.

    Examples:
        >>> two_hot_encode(torch.tensor([0.25, 7.0]), torch.tensor([-1.0, 0.0, 1.0]))
        tensor([[0.0000, 0.7500, 0.2500],
                [0.0000, 0.0000, 1.0000]])

    See Hafner et al. 2023 (arXiv:2301.04104), on symexp two-hot predictions.

    """
    _check_bins(bins)
    out_dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
    dtype = torch.promote_types(out_dtype, torch.float32)
    bins = bins.to(dtype)
    # How far each gap between neighbours lies behind x: 1 up to the gap that x is in, there the fraction, then 0. The
    # weights are the differences: nothing is searched for, gathered or scattered, and their sum telescopes to 1.
    behind = (x.to(dtype).unsqueeze(-1) - bins[:-1]) / bins.diff()
    # Not with clamp, whose gradient on a bin would be that of both gaps beside it: of these, x is in the upper one.
    behind = _positive_part(behind.masked_fill(behind >= 1, 1))
    return (F.pad(behind, (1, 0), value=1.0) - F.pad(behind, (0, 1))).to(out_dtype)


def two_hot_decode(logits: Tensor, bins: Tensor) -> Tensor:
    r"""Mean of the bins under the softmax of the logits, Σ_k softmax(l)_k b_k.

    Probabilities that are the same on both sides of a support that is symmetric about zero give zero exactly, though
    its outer bins are 10⁸ times what is typically decoded.

    Args:
        logits: l, shape ``[*B, N]``.
        bins: b, shape ``[N]``.

    Returns:
        Shape ``[*B]``, dtype of ``logits``.

    Raises:
        ValueError: the last dimension of ``logits`` isn't N.

    Examples:
        >>> bins = torch.tensor([-1.0, 0.0, 1.0])
        >>> two_hot_decode(two_hot_encode(torch.tensor([0.25]), bins).log(), bins)
        tensor([0.2500])

    See Hafner et al. 2023 (arXiv:2301.04104), on symexp two-hot predictions.

    """
    _check_logits(logits, bins)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    probability = logits.to(dtype).softmax(-1)
    bins = bins.to(dtype)
    mirrored = bins.flip(-1)
    # Each bin as an odd part, for which only the difference from the mirrored probability counts, and an even one.
    odd = (probability - probability.flip(-1)) * (bins - mirrored)
    even = probability * (bins + mirrored)
    return (odd / 4 + even / 2).sum(-1).to(logits.dtype)


def two_hot_cross_entropy(logits: Tensor, target: Tensor, bins: Tensor) -> Tensor:
    r"""Cross-entropy of the logits with a two-hot target, −Σ_k w_k log softmax(l)_k.

    Args:
        logits: l, shape ``[*B, N]``. A bin whose logit is −inf doesn't count unless the target needs it.
        target: a number for each, shape ``[*B]`` or ``[*B, 1]``; its weights w are those of `two_hot_encode`.
        bins: shape ``[N]``.

    Returns:
        Shape ``[*B]``, float32 at least.

    Raises:
        ValueError: the shapes don't agree.

    Examples:
        >>> two_hot_cross_entropy(torch.zeros(2, 3), torch.tensor([-0.5, 0.5]), torch.tensor([-1.0, 0.0, 1.0]))
        tensor([1.0986, 1.0986])

    See Hafner et al. 2023 (arXiv:2301.04104), on symexp two-hot predictions.

    """
    _check_logits(logits, bins)
    batch = logits.shape[:-1]
    if target.shape not in (batch, (*batch, 1)):
        raise ValueError(
            f"target has shape {tuple(target.shape)}, but logits of shape {tuple(logits.shape)} need one number for "
            f"each distribution: {tuple(batch)} or {(*tuple(batch), 1)}"
        )
    dtype = torch.promote_types(logits.dtype, torch.float32)
    weight = two_hot_encode(target.reshape(batch).to(dtype), bins)
    log_prob = logits.to(dtype).log_softmax(-1)
    # 0 · −inf is NaN: what has no weight is left out, a NaN weight isn't.
    return -(weight * torch.where(weight == 0, 0, log_prob)).sum(-1)


def _check_bins(bins: Tensor) -> None:
    if bins.ndim != 1 or len(bins) < 2:
        raise ValueError(f"bins must be one-dimensional, with at least 2 of them, but have shape {tuple(bins.shape)}")


def _check_logits(logits: Tensor, bins: Tensor) -> None:
    _check_bins(bins)
    if logits.ndim == 0 or logits.shape[-1] != len(bins):
        raise ValueError(f"logits have shape {tuple(logits.shape)}, but there are {len(bins)} bins: one logit for each")
