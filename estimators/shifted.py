"""One value-network call for a trajectory and its next observations.

In a rollout the next observation of step t is the observation of step t + 1, except where an episode was truncated
and at the rollout's end. So instead of 2T observations the network sees T + ``budget``: the trajectory, with the
true next observation inserted after each truncated step and after the last one. With T = 4, a truncation at t = 1,
observations o and next observations n::

    budget 1    o₀ o₁ n₁ o₂ o₃        step 3 lost its next observation: it is not valid
    budget 2    o₀ o₁ n₁ o₂ o₃ n₃     all steps valid

A terminal step needs no insertion, since its next value is not read. What doesn't fit is cut off at the end, so
shapes depend on ``budget`` alone.
"""

from collections.abc import Callable

import torch
from tensordict import NonTensorData, TensorDict, TensorDictBase, is_leaf_nontensor
from torch import Tensor


def shifted_values(
    network: Callable[[TensorDictBase], Tensor],
    data: TensorDictBase,
    next_data: TensorDictBase,
    truncated: Tensor,
    time_dim: int,
    budget: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Value, next value and validity of each step, from one call on T + ``budget`` observations.

    Args:
        network: the values of its argument.
        data: the network's inputs, of batch size ``[*B, T, *B']``.
        next_data: the same keys for the next observations.
        truncated: bool ``[*B, T, *B']``, where the trajectory ends without being terminated.
        time_dim: the dimension of time.
        budget: how many observations more than T are looked at.

    Returns:
        value, next value (the network's shape) and a bool ``[*B, T, *B']`` that says which steps fitted.

    Raises:
        RuntimeError: an input is no tensor, and another at each step.

    """
    steps = truncated.shape[time_dim]
    if steps == 0:
        nothing = network(data)
        return nothing, nothing, truncated
    length = steps + budget
    shape = [1] * truncated.ndim
    shape[time_dim] = steps
    step = torch.arange(steps, device=truncated.device).view(shape).expand_as(truncated)

    inserted = truncated.long()
    slot = step + inserted.cumsum(time_dim) - inserted
    # Slot `length` collects what doesn't fit and is cut off.
    own_slot = slot.clamp(max=length)
    next_slot = torch.where(truncated | (step == steps - 1), slot + 1, length).clamp(max=length)
    shape = list(truncated.shape)
    shape[time_dim] = length + 1
    source = step.new_zeros(shape).scatter(time_dim, own_slot, step).scatter(time_dim, next_slot, step + steps)
    source = source.narrow(time_dim, 0, length)

    sequence = TensorDict({}, source.shape)
    for key in data.keys(True, True, is_leaf=is_leaf_nontensor):
        x = data.get(key)
        if isinstance(x, Tensor):
            sequence.set(key, _take(torch.cat([x, next_data.get(key)], time_dim), source, time_dim))
        elif isinstance(x, NonTensorData):  # one for all steps
            sequence.set_non_tensor(key, x.data)
        else:
            raise RuntimeError(
                f"shifted=True can't move {key!r} from step to step, which is no tensor: use shifted=False"
            )
    values = network(sequence)
    valid = slot + 1 < length
    value = _take(values, slot.clamp(max=length - 1), time_dim)
    next_value = _take(values, (slot + 1).clamp(max=length - 1), time_dim)
    return value, next_value, valid


def _take(x: Tensor, index: Tensor, time_dim: int) -> Tensor:
    """Steps ``index`` of ``x``, which may have more dimensions than ``index``."""
    extra = x.ndim - index.ndim
    index = index.view(index.shape + (1,) * extra)
    return x.gather(time_dim, index.expand(index.shape[: index.ndim - extra] + x.shape[x.ndim - extra :]))
