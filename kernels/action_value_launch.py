"""Host side of the action-value kernels: blocks, strides and launches; the ``triton`` backend."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .action_value_kernel import ensemble_kernel, policy_kernel, target_kernel
from .action_value_problem import (
    MEAN,
    NONE,
    Bootstrap,
    Improvement,
    Regression,
    count_is_unknown,
)
from .dtypes import compute_dtype

_WARPS = 8
# Bytes of a tile's row in the dtype that is computed in: one 128-bit load per thread. A float32 batch of 1024 or less
# is one program, whose sums need no second step.
_TILE_BYTES = 4096
# Programs that share a sum at most, a power of two: the last adds what all have found in one tile. They are more than
# the 132 processors of an H100 hold at once.
_PROGRAMS = 1024
# Rows of the workspace: the sums that `ensemble_kernel` and `policy_kernel` make at most.
_ENSEMBLE_SUMS, _POLICY_SUMS = 2, 5


def block(dtype: torch.dtype) -> int:
    """Samples of a tile, computed in ``dtype``."""
    return _TILE_BYTES // dtype.itemsize


def target(problem: Bootstrap) -> list[Tensor]:
    """Value target and next value."""
    next_values, reward, terminated, gamma, log_prob, alpha = problem
    samples, device, dtype = reward.numel(), reward.device, compute_dtype(problem.dtype)
    results = [reward.new_empty(reward.shape, dtype=problem.dtype) for _ in range(2)]
    if isinstance(gamma, Tensor) and gamma.ndim:
        gamma = gamma.expand_as(reward)
    values = _rows(next_values)
    members = (_row(reward), _row(terminated), None if log_prob is None else _row(log_prob))
    with torch.cuda.device_of(reward):
        target_kernel[max(1, triton.cdiv(samples, block(dtype))),](
            values,
            *members[:2],
            *_coefficient(gamma, device),
            members[2],
            *_coefficient(alpha, device),
            *results,
            samples,
            len(next_values),
            DTYPE=_TRITON_DTYPE[dtype],
            INDEX=_index(samples, values, *members),
            BLOCK=block(dtype),
            num_warps=_WARPS,
        )
    return results


def ensemble(problem: Regression, keep: bool) -> list[Tensor]:
    """Loss and priority; kept for the gradient are the slopes and, if it is unknown before, one over the count."""
    values, target, mask, weights, loss_function, priority, per_member, reduction = problem
    samples, new = problem.samples, target.new_empty
    dtype = compute_dtype(problem.dtype)
    results = [new(problem.loss_shape, dtype=problem.dtype), new(target.shape, dtype=problem.dtype)]
    slopes, reciprocal = _new_kept(problem, keep, values.shape)
    programs, partials, arrivals = _shares(target, 0 if reduction == NONE else _ENSEMBLE_SUMS, samples, dtype)
    inputs = (_rows(values), *(None if x is None else _row(x) for x in (target, mask, weights)))
    with torch.cuda.device_of(values):
        ensemble_kernel[programs,](
            *inputs,
            _scale(problem),
            *results,
            slopes,
            reciprocal,
            partials,
            arrivals,
            samples,
            len(values),
            LOSS_FUNCTION=loss_function,
            PRIORITY=priority,
            PER_MEMBER=per_member,
            REDUCTION=reduction,
            COUNT=count_is_unknown(problem),
            DTYPE=_TRITON_DTYPE[dtype],
            INDEX=_index(samples, *inputs),
            BLOCK=block(dtype),
            PROGRAMS=_PROGRAMS,
            num_warps=_WARPS,
        )
    return [*results, *(x for x in (slopes, reciprocal) if x is not None)]


def ensemble_backward(problem: Regression, kept: Sequence[Tensor], grad: Tensor) -> Tensor:
    """The slopes times ``grad``: one product, for which a call of PyTorch costs the host less than a launch."""
    slopes, *reciprocal = kept
    return torch.mul(slopes, _factor(grad, reciprocal, slopes.dtype), out=torch.empty_like(problem.values))


def policy(problem: Improvement, keep: bool) -> list[Tensor]:
    """Loss, entropy, the surprise if it isn't the entropy; kept are both slopes and, if unknown, one over the count."""
    values, log_prob, alpha, mask, weights, reduction = problem
    samples, new = problem.samples, log_prob.new_empty
    dtype = compute_dtype(problem.dtype)
    loss, entropy = new(problem.loss_shape, dtype=problem.dtype), new((), dtype=problem.dtype)
    surprise = None if problem.surprise_is_entropy else torch.empty_like(loss)
    *slopes, reciprocal = _new_kept(problem, keep, values.shape, log_prob.shape)
    programs, partials, arrivals = _shares(log_prob, _POLICY_SUMS, samples, dtype)
    inputs = (_rows(values), *(None if x is None else _row(x) for x in (log_prob, mask, weights)))
    with torch.cuda.device_of(values):
        policy_kernel[programs,](
            *inputs[:2],
            *_coefficient(alpha, values.device),
            *inputs[2:],
            _scale(problem),
            1 / samples if samples else math.nan,
            loss,
            entropy,
            surprise,
            *slopes,
            reciprocal,
            partials,
            arrivals,
            samples,
            len(values),
            REDUCTION=reduction,
            COUNT=count_is_unknown(problem),
            DTYPE=_TRITON_DTYPE[dtype],
            INDEX=_index(samples, *inputs),
            BLOCK=block(dtype),
            PROGRAMS=_PROGRAMS,
            num_warps=_WARPS,
        )
    return [x for x in (loss, entropy, surprise, *slopes, reciprocal) if x is not None]


def policy_backward(problem: Improvement, kept: Sequence[Tensor], grad: Tensor, needs: Sequence[bool]) -> list[Tensor]:
    """The slopes that are needed times ``grad``."""
    slopes, reciprocal = (kept[:-1], kept[-1]) if count_is_unknown(problem) else (kept, None)
    factor = _factor(grad, [] if reciprocal is None else [reciprocal], slopes[0].dtype)
    inputs = (problem.values, problem.log_prob)
    return [
        torch.mul(slope, factor, out=torch.empty_like(x))
        for slope, x, need in zip(slopes, inputs, needs, strict=True)
        if need
    ]


def _shares(like: Tensor, sums: int, samples: int, dtype: torch.dtype) -> tuple[int, Tensor | None, Tensor | None]:
    """How many programs there are, and where they leave their parts of the sums and count themselves."""
    programs = max(1, triton.cdiv(samples, block(dtype)))
    if not sums:
        return programs, None, None
    programs = min(programs, _PROGRAMS)
    if programs == 1:
        return programs, None, None
    return programs, like.new_empty(sums, programs, dtype=dtype), like.new_zeros((), dtype=torch.int32)


def _new_kept(problem: Regression | Improvement, keep: bool, *slopes: torch.Size) -> list[Tensor | None]:
    """Where the slopes go, and one over the count."""
    if not keep:
        return [None] * (len(slopes) + 1)
    shapes: list[Any] = [*slopes, () if count_is_unknown(problem) else None]
    dtype = compute_dtype(problem.dtype)
    return [None if shape is None else problem.values.new_empty(shape, dtype=dtype) for shape in shapes]


def _scale(problem: Regression | Improvement) -> float:
    """What a mean divides by, as a factor, as far as it is known: a mean of nothing is NaN."""
    if problem.reduction != MEAN:
        return 1.0
    terms = problem.terms_per_sample * (1 if count_is_unknown(problem) else problem.samples)
    return 1 / terms if terms else math.nan


def _factor(grad: Tensor, reciprocal: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return grad if not reciprocal else grad.to(dtype) * reciprocal[0]


def _coefficient(x: float | Tensor | None, device: torch.device) -> tuple[float, Any]:
    """γ or α as a number and a tensor, of which one counts."""
    if not isinstance(x, Tensor):
        return x or 0.0, None
    return 0.0, _row(x) if x.ndim else (x.to(device, non_blocking=True),)


def _rows(values: Tensor) -> tuple[Any, ...]:
    """``[members, *B]`` with one dimension of samples; a copy is made only of what no single stride walks."""
    values = values if values.ndim == 2 else values.reshape(len(values), -1)
    return (values, *values.stride())


def _row(x: Tensor) -> tuple[Tensor, int]:
    """``[*B]`` with one dimension, likewise."""
    x = x if x.ndim == 1 else x.reshape(-1)
    return x, x.stride(0)


def _index(samples: int, *tensors: tuple[Any, ...] | None) -> tl.dtype:
    """The integer in which the places of samples are computed, those past the end included."""
    reach = (samples + _TILE_BYTES * _PROGRAMS) * max(1, *(x[-1] for x in tensors if x is not None))
    return tl.int64 if reach >= 1 << 31 else tl.int32


_TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}
