"""Host side of the action-value kernels: blocks, strides and launches; the ``triton`` backend."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .action_value_kernel import ensemble_kernel, policy_kernel, target_kernel
from .action_value_problem import Bootstrap, Improvement, Regression, count_is_unknown
from .checks import MEAN, NONE
from .dtypes import compute_dtype
from .launching import TRITON_DTYPE, Launch, Launcher, Plan, Workspace, scalar, scalar_arguments, strided

_WARPS = 8
# Bytes of a tile's row in the dtype that is computed in: one 128-bit load per thread. A float32 batch of 1024 or less
# is one program, whose sums need no second step.
_TILE_BYTES = 4096
# Programs that share a sum at most, a power of two: the last adds what all have found in one tile. They are more than
# the 132 processors of an H100 hold at once.
_PROGRAMS = 1024
# Rows of the workspace: the sums that `ensemble_kernel` and `policy_kernel` make at most.
_ENSEMBLE_SUMS, _POLICY_SUMS = 2, 4


def block(dtype: torch.dtype) -> int:
    """Samples of a tile, computed in ``dtype``."""
    return _TILE_BYTES // dtype.itemsize


def target(problem: Bootstrap) -> list[Tensor]:
    """Value target and next value."""
    next_values, reward, terminated, gamma, log_prob, alpha = problem
    dtype = problem.dtype
    results = [reward.new_empty(reward.shape, dtype=dtype) for _ in range(2)]
    if isinstance(gamma, Tensor) and gamma.ndim:
        gamma = _row(gamma.expand_as(reward))
    inputs = _rows(next_values), _row(reward), _row(terminated), scalar(gamma, reward), _row(log_prob)
    _target(dtype, *inputs, scalar(alpha, reward), *results)
    return results


def _plan_target(result: torch.dtype, *arguments: Any) -> Plan:
    next_values, reward, terminated, gamma, log_prob, alpha, *results = arguments
    members, samples = next_values.shape
    dtype = compute_dtype(result)
    passed = [strided(x) for x in (next_values, reward, terminated, log_prob)]
    launch = Launch(
        target_kernel,
        max(1, triton.cdiv(samples, block(dtype))),
        [
            *passed[:3],
            *_coefficient(gamma),
            passed[3],
            *_coefficient(alpha),
            *results,
            samples,
            members,
        ],
        DTYPE=TRITON_DTYPE[dtype],
        INDEX=_index(samples, *passed, strided(gamma) if isinstance(gamma, Tensor) and gamma.ndim else None),
        BLOCK=block(dtype),
        num_warps=_WARPS,
    )
    return Plan([launch])


_target = Launcher(_plan_target)


def ensemble(problem: Regression, keep: bool) -> list[Tensor]:
    """Loss and priority; kept for the gradient are the slopes and, if it is unknown before, one over the count."""
    values, target, mask, weights, loss_function, priority, per_member, reduction = problem
    new, dtype = target.new_empty, problem.dtype
    results = [new(problem.loss_shape, dtype=dtype), new(target.shape, dtype=dtype)]
    kept = _new_kept(problem, keep, values.shape)
    inputs = (_rows(values), _row(target), _row(mask), _row(weights))
    settings = loss_function, priority, per_member, reduction, dtype, count_is_unknown(problem)
    _ensemble(settings, *inputs, *results, *kept)
    return [*results, *(x for x in kept if x is not None)]


def _plan_ensemble(settings: tuple[str, str, bool, str, torch.dtype, bool], *arguments: Any) -> Plan:
    loss_function, priority, per_member, reduction, result, counts = settings
    values, target, mask, weights, *written = arguments
    members, samples = values.shape
    passed = [strided(x) for x in (values, target, mask, weights)]
    scale = _scale(reduction, (members if per_member else 1) * (1 if counts else samples))
    return _plan_sums(
        ensemble_kernel,
        0 if reduction == NONE else _ENSEMBLE_SUMS,
        passed,
        [*passed, scale, *written],
        compute_dtype(result),
        LOSS_FUNCTION=loss_function,
        PRIORITY=priority,
        PER_MEMBER=per_member,
        REDUCTION=reduction,
        COUNT=counts,
    )


_ensemble = Launcher(_plan_ensemble)


def ensemble_backward(problem: Regression, kept: Sequence[Tensor], grad: Tensor) -> Tensor:
    """The slopes times ``grad``: one product, for which a call of PyTorch costs the host less than a launch."""
    slopes, *reciprocal = kept
    return torch.mul(slopes, _factor(grad, reciprocal, slopes.dtype), out=torch.empty_like(problem.values))


def policy(problem: Improvement, keep: bool) -> list[Tensor]:
    """Loss and entropy; kept are both slopes and, if unknown, one over the count."""
    values, log_prob, alpha, mask, weights, reduction = problem
    new, dtype = log_prob.new_empty, problem.dtype
    loss, entropy = new(problem.loss_shape, dtype=dtype), new((), dtype=dtype)
    written = loss, entropy, *_new_kept(problem, keep, values.shape, log_prob.shape)
    inputs = (_rows(values), _row(log_prob), scalar(alpha, values), _row(mask), _row(weights))
    _policy((reduction, dtype, count_is_unknown(problem)), *inputs, *written)
    return [x for x in written if x is not None]


def _plan_policy(settings: tuple[str, torch.dtype, bool], *inputs: Any) -> Plan:
    reduction, result, counts = settings
    values, log_prob, alpha, mask, weights, *written = inputs
    samples = log_prob.numel()
    passed = [strided(x) for x in (values, log_prob, mask, weights)]
    scales = _scale(reduction, 1 if counts else samples), 1 / samples if samples else math.nan
    arguments = [*passed[:2], *_coefficient(alpha), *passed[2:], *scales, *written]
    return _plan_sums(
        policy_kernel, _POLICY_SUMS, passed, arguments, compute_dtype(result), REDUCTION=reduction, COUNT=counts
    )


_policy = Launcher(_plan_policy)


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


def _plan_sums(
    kernel: Any, sums: int, passed: Sequence[Any], arguments: Sequence[Any], dtype: torch.dtype, **constants: Any
) -> Plan:
    """The launch of a kernel that makes ``sums`` over samples; ``arguments`` are those before its workspaces.

    ``passed`` are the inputs as they are passed, the first one the values of the members.
    """
    members, samples = passed[0][0].shape
    programs = max(1, triton.cdiv(samples, block(dtype)))
    if sums:
        programs = min(programs, _PROGRAMS)
    # Where programs leave their parts of the sums, and count themselves.
    workspaces = []
    if sums and programs > 1:
        workspaces = [Workspace(sums * programs, dtype), Workspace(1, torch.int32, zeros=True)]
    launch = Launch(
        kernel,
        programs,
        [*arguments, *(workspaces or (None, None)), samples, members],
        **constants,
        DTYPE=TRITON_DTYPE[dtype],
        INDEX=_index(samples, *passed),
        BLOCK=block(dtype),
        PROGRAMS=_PROGRAMS,
        num_warps=_WARPS,
    )
    return Plan([launch], workspaces)


def _new_kept(problem: Regression | Improvement, keep: bool, *slopes: torch.Size) -> list[Tensor | None]:
    """Where the slopes go, and one over the count."""
    if not keep:
        return [None] * (len(slopes) + 1)
    shapes: list[Any] = [*slopes, () if count_is_unknown(problem) else None]
    dtype = compute_dtype(problem.dtype)
    return [None if shape is None else problem.values.new_empty(shape, dtype=dtype) for shape in shapes]


def _scale(reduction: str, terms: int) -> float:
    """What a mean of so many ``terms`` divides by, as a factor: a mean of nothing is NaN."""
    if reduction != MEAN:
        return 1.0
    return 1 / terms if terms else math.nan


def _factor(grad: Tensor, reciprocal: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return grad if not reciprocal else grad.to(dtype) * reciprocal[0]


def _coefficient(x: Any) -> tuple[Any, Any]:
    """γ or α as a number and a tensor, of which one counts."""
    return (0.0, strided(x)) if isinstance(x, Tensor) else scalar_arguments(x)


def _rows(values: Tensor) -> Tensor:
    """``[members, *B]`` with one dimension of samples; a copy is made only of what no single stride walks."""
    return values if values.ndim == 2 else values.reshape(len(values), -1)


def _row(x: Any) -> Any:
    """``[*B]`` with one dimension, likewise; None remains None."""
    return x if x is None or x.ndim == 1 else x.reshape(-1)


def _index(samples: int, *tensors: tuple[Any, ...] | None) -> tl.dtype:
    """The integer in which the places of samples are computed, those past the end included."""
    reach = (samples + _TILE_BYTES * _PROGRAMS) * max(1, *(x[-1] for x in tensors if x is not None))
    return tl.int64 if reach >= 1 << 31 else tl.int32
