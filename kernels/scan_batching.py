"""`torch.vmap` over the recurrence's operators: the mapped dimension is one more dimension of the batch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Dim = int | None


def recurrence(info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[list[Tensor], list[Dim]]:
    """The rule of ``fusedrl::recurrence``."""
    kind, backend, time_dim, *fields = arguments
    mapped = _mapped(info.batch_size, fields, in_dims[3:], (False, False))
    outputs = torch.ops.fusedrl.recurrence(kind, backend, time_dim + 1, *mapped)
    return outputs, [0] * len(outputs)


def recurrence_backward(info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[list[Tensor], list[Dim]]:
    """The rule of ``fusedrl::recurrence_backward``. The gradient of a γ that isn't mapped over is mapped over, too."""
    kind, backend, time_dim, *fields, y, grads, needs = arguments
    *dims, y_dim, grad_dims, _ = in_dims[3:]
    mapped = _mapped(info.batch_size, fields, dims, needs[:2])
    y, *grads = (mapped_first(info.batch_size, x, dim) for x, dim in zip((y, *grads), (y_dim, *grad_dims), strict=True))
    found = torch.ops.fusedrl.recurrence_backward(kind, backend, time_dim + 1, *mapped, y, grads, needs)
    inputs = (1, 3, 4, 5, 6)  # γ, λ, reward, value, next value
    shapes = [_shape(fields[i], dims[i]) for i, need in zip(inputs, needs, strict=True) if need]
    return [g.reshape(info.batch_size, *shape) for g, shape in zip(found, shapes, strict=True)], [0] * len(found)


def _mapped(size: int, fields: Sequence[Any], dims: Sequence[Dim], differentiated: Sequence[bool]) -> list[Any]:
    """γ and λ, each as a number and a tensor, and the tensors of steps, with the mapped dimension first.

    A γ or λ that isn't mapped over broadcasts as it is, unless each of the mapped problems gives it a gradient.
    """
    scalars, steps = fields[:4], fields[4:]
    found = [mapped_first(size, x, dim) for x, dim in zip(steps, dims[4:], strict=True)]
    rank = found[0].ndim
    for i, need in ((3, differentiated[1]), (1, differentiated[0])):
        x = scalars[i]
        if isinstance(x, Tensor) and (need or dims[i] is not None):
            x = mapped_scalar(size, x, dims[i], rank)
        found = [scalars[i - 1], x, *found]
    return found


def mapped_first(size: int, x: Any, dim: Dim) -> Any:
    """``x`` with its mapped dimension first, expanded if it has none."""
    return x if not isinstance(x, Tensor) else x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def mapped_scalar(size: int, x: Tensor, dim: Dim, rank: int) -> Tensor:
    """`mapped_first`, of a γ or λ that broadcasts to ``rank`` dimensions: what broadcasts is aligned at the end."""
    x = mapped_first(size, x, dim)
    return x.reshape(size, *(1,) * (rank - x.ndim), *x.shape[1:])


def _shape(x: Tensor, dim: Dim) -> list[int]:
    """The shape of ``x`` without the mapped dimension."""
    return [n for i, n in enumerate(x.shape) if i != dim]
