"""`torch.vmap` over the operators of C51: the mapped dimension is one more dimension of the batch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .scan_batching import Dim, mapped_first, mapped_scalar


def loss(info: Any, in_dims: Sequence[Dim], *arguments: Any) -> tuple[list[Tensor], list[Dim]]:
    """The rule of ``fusedrl::categorical_loss``."""
    backend, keep, *fields = arguments
    dims = in_dims[2:]
    transition = [mapped_first(info.batch_size, x, dim) for x, dim in zip(fields[:4], dims[:4], strict=True)]
    found = torch.ops.fusedrl.categorical_loss(
        backend, keep, *transition, *_bellman(info.batch_size, fields[4:], dims[4:])
    )
    return found, [0] * len(found)


def loss_backward(info: Any, in_dims: Sequence[Dim], backend: str, *tensors: Tensor) -> tuple[Tensor, Dim]:
    """The rule of ``fusedrl::categorical_loss_backward``."""
    mapped = [mapped_first(info.batch_size, x, dim) for x, dim in zip(tensors, in_dims[1:], strict=True)]
    return torch.ops.fusedrl.categorical_loss_backward(backend, *mapped), 0


def projection(info: Any, in_dims: Sequence[Dim], backend: str, prob: Tensor, *fields: Any) -> tuple[Tensor, Dim]:
    """The rule of ``fusedrl::categorical_projection``."""
    prob = mapped_first(info.batch_size, prob, in_dims[1])
    bellman = _bellman(info.batch_size, fields, in_dims[2:])
    return torch.ops.fusedrl.categorical_projection(backend, prob, *bellman), 0


def _bellman(size: int, fields: Sequence[Any], dims: Sequence[Dim]) -> list[Any]:
    """Support, reward, terminated and γ, as a number or a tensor, for the larger batch."""
    support, reward, terminated, number, gamma = fields
    if dims[0] is not None:
        raise RuntimeError("torch.vmap can't map over the support: all distributions of a call share it")
    reward, terminated = (mapped_first(size, x, dim) for x, dim in zip((reward, terminated), dims[1:3], strict=True))
    if dims[4] is not None:  # else it broadcasts as it is
        gamma = mapped_scalar(size, gamma, dims[4], reward.ndim)
    return [support, reward, terminated, number, gamma]
