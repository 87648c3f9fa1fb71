"""From one loss per sample to what a loss returns: padded steps left out, priorities weighed in."""

import torch
from torch import Tensor

from ..kernels.checks import REDUCTIONS, broadcasts

SCALAR_OUTPUT_MODES = (None, "exclude", "non_tensor")


def check_reduction(reduction: str | None) -> str:
    """``reduction``, or ``"mean"`` where it is None.

    Raises:
        ValueError: ``reduction`` is something else.

    """
    if reduction is None:
        return "mean"
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; it can be None (mean), {', '.join(map(repr, REDUCTIONS))}")
    return reduction


def check_scalar_output_mode(mode: str | None) -> None:
    """Raise ValueError if no loss knows this way to hand over numbers that hold for the whole batch."""
    if mode not in SCALAR_OUTPUT_MODES:
        raise ValueError(f"scalar_output_mode is {mode!r}; it can be {', '.join(map(repr, SCALAR_OUTPUT_MODES))}")


def has_metrics(reduction: str, mode: str | None) -> bool:
    """Whether numbers that hold for the whole batch are in the output of a loss, under the scalar output ``mode``."""
    return not (mode == "exclude" and reduction == "none")


def align(x: Tensor, loss: Tensor, name: str) -> Tensor:
    """``x``, one value per sample of shape ``[*B]`` or ``[*B, 1]``, expanded to the shape of ``loss``, ``[*B, *F]``.

    Raises:
        RuntimeError: the shapes don't agree.

    """
    shape = x.shape
    if x.ndim > loss.ndim:
        x = x.squeeze(-1)
    x = x.reshape(x.shape + (1,) * (loss.ndim - x.ndim))
    if not broadcasts(x.shape, loss.shape):
        raise RuntimeError(
            f"{name} has shape {tuple(shape)}, which does not fit a loss of shape {tuple(loss.shape)}: it must have "
            "one value per sample"
        )
    return x.expand_as(loss)


def without_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x`` with 0 at the samples that don't count: what padding holds must not reach a gradient as 0 · NaN.

    A bool is no NaN, and of several, such as the actions that are allowed, it may matter that one is True.
    """
    return x if mask is None or x.dtype == torch.bool else torch.where(mask, x, 0)


def reduce_loss(loss: Tensor, reduction: str, mask: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
    r"""Reduce one loss per sample.

    ========  ==================================
    mean      Σ m·w·l / Σ m·w; 0 where m = 0 for all
    sum       Σ m·w·l
    none      m·w·l
    ========  ==================================

    Args:
        loss: l, any shape.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        mask: m, bool, the same shape: the samples that count. What stands at the others is not read into a result.
        weights: w, the same shape: importance weights, such as those of a prioritised replay buffer. Their scale
            cancels in the mean, where Schaul et al. divide them by the greatest.

    Examples:
        >>> loss, mask = torch.tensor([1.0, 2.0, 30.0]), torch.tensor([True, True, False])
        >>> reduce_loss(loss, "mean", mask)
        tensor(1.5000)
        >>> reduce_loss(loss, "sum", mask, weights=torch.tensor([2.0, 1.0, 1.0]))
        tensor(4.)

    See Schaul et al. 2016, Prioritized experience replay (arXiv:1511.05952), section 3.4, for the weights.

    """
    if mask is None and weights is None:
        return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()
    if weights is not None and mask is not None:
        weights = torch.where(mask, weights, 0)  # before the product, whose gradient would be 0 · NaN
    if weights is not None:
        loss = loss * weights
    if mask is not None:
        loss = torch.where(mask, loss, 0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    counted = torch.ones_like(loss) if weights is None else weights
    if mask is not None:
        counted = torch.where(mask, counted, 0)
    # float16 holds the mean of a large batch, but not its sum.
    dtype = torch.promote_types(loss.dtype, torch.float32)
    count = counted.sum(dtype=dtype)
    return (loss.sum(dtype=dtype) / torch.where(count == 0, 1, count)).to(loss.dtype)
