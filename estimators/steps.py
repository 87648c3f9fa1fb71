"""The steps of a batch of trajectories, and what estimators do to them before and after the recurrence."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

# A smaller standard deviation is taken to be this one: noise is not blown up to size 1.
_SMALLEST_STD = 1e-4


class Steps(NamedTuple):
    """What an estimator knows of each step: tensors of the reward's shape, γ and λ of one that broadcasts to it.

    Which of the fields typed Any are there and which are None depends on the estimator.
    """

    reward: Tensor
    done: Tensor
    terminated: Tensor
    gamma: Tensor
    """The discount to the step's next observation."""
    valid: Tensor | None = None
    """Which steps count; None: all."""
    lmbda: Any = None
    """The trace decay λ."""
    log_weight: Any = None
    """log π(a|s) − log μ(a|s), for the policy π that is learned and the policy μ that acted."""


def cut(steps: Steps, valid: Tensor, time_dim: int) -> Steps:
    """``steps`` of which only those in ``valid`` remain so: before one that isn't, the trajectory is truncated.

    ``valid`` has the batch dimensions alone.
    """
    # What rolls around can only cut after the last step, where the trajectory ends anyway.
    last_valid = valid & ~valid.roll(-1, time_dim)
    done = (steps.done != 0) | expand_right(last_valid, steps.done)
    valid = expand_right(valid, done)
    return steps._replace(done=done, valid=valid if steps.valid is None else valid & steps.valid)


def valid_only(steps: Steps, *tensors: Tensor) -> tuple[Tensor, ...]:
    """``tensors`` with 0 at the steps that aren't valid, and no gradient to what was there."""
    valid = steps.valid
    return tensors if valid is None else tuple(torch.where(valid, x, 0) for x in tensors)


def without_padding(data: TensorDictBase, steps: Steps, keys: Iterable[NestedKey]) -> TensorDictBase:
    """``data`` with entries ``keys`` of 0 in the steps that aren't valid, whose NaN would reach the gradients."""
    if steps.valid is None:
        return data
    data, valid = data.copy(), any_right(steps.valid, data.ndim)
    for key in keys:
        x = data.get(key, None)
        if isinstance(x, Tensor) and x.is_floating_point():
            data.set(key, torch.where(expand_right(valid, x), x, 0))
    return data


def standardize(x: Tensor, valid: Tensor | None = None, own: int | None = None) -> Tensor:
    """(x − mean) / std over all elements, or the valid ones, computed in float32 at least.

    Each index of the dimension ``own`` has statistics of its own.
    """
    dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
    x = x.to(torch.promote_types(dtype, torch.float32))
    dims = [dim for dim in range(x.ndim) if own is None or dim != own % x.ndim]

    def total(values: Tensor) -> Tensor:
        return (values if valid is None else torch.where(valid, values, 0)).sum(dims, keepdim=True)

    count = total(torch.ones_like(x))
    centred = x - total(x) / count
    std = (total(centred.square()) / (count - 1).clamp_min(1)).sqrt()
    return (centred / std.clamp_min(_SMALLEST_STD)).to(dtype)


def expand_right(x: Tensor, like: Tensor) -> Tensor:
    """``x`` with trailing dimensions added until it has the shape of ``like``."""
    return widened_right(x, like).expand_as(like)


def widened_right(x: Tensor, like: Tensor) -> Tensor:
    """``x`` with trailing dimensions of size 1 until it has as many as ``like``, with which it then broadcasts."""
    return x.view(x.shape + (1,) * (like.ndim - x.ndim))


def any_right(mask: Tensor, ndim: int) -> Tensor:
    """Whether anything is set in the dimensions of ``mask`` beyond ``ndim``."""
    if mask.ndim == ndim + 1 and mask.shape[-1] == 1:
        return mask.squeeze(-1)
    return mask.flatten(ndim).any(-1) if mask.ndim > ndim else mask
