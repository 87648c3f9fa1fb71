"""Host side of the V-trace kernel; the ``triton`` backend of V-trace."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .launch import _TRITON_DTYPE, _plan, _processors
from .launching import launch
from .samples_launch import scalar_arguments
from .vtrace_kernel import vtrace_kernel
from .vtrace_problem import VTrace

# Bytes of a tensor that a warp has in flight: a thread has registers for the inputs of 8 steps, or 4 in the adjoint.
_WARP_BYTES, _ADJOINT_WARP_BYTES = 1024, 512


def forward(problem: VTrace, time_dim: int) -> list[Tensor]:
    """Advantage and value target."""
    outputs = problem.new_outputs()
    if not _launch(problem, time_dim, outputs):
        for output, copy in zip(outputs, forward(_dense(problem), time_dim), strict=True):
            output.copy_(copy)
    return outputs


def backward(
    problem: VTrace, time_dim: int, value_target: Tensor, grads: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor]:
    """The gradients of the inputs that need one, for those of advantage and value target, which may be None."""
    found = [
        torch.empty_like(problem.reward, dtype=x.dtype) if need else None
        for x, need in zip(problem.differentiable, needs, strict=True)
    ]
    results = [x for x in found if x is not None]
    if not _launch(problem, time_dim, [None, value_target], [*grads, *found]):
        dense = [None if x is None else x.contiguous() for x in grads]
        copies = backward(_dense(problem), time_dim, value_target.contiguous(), dense, needs)
        for result, copy in zip(results, copies, strict=True):
            result.copy_(copy)
    return results


def _launch(
    problem: VTrace, time_dim: int, outputs: Sequence[Tensor | None], adjoint: Sequence[Tensor | None] = (None,) * 7
) -> bool:
    """Launch on the tensors; False, and nothing, if their strides are more than the kernel knows."""
    log_pi, log_mu, value, next_value, reward, done, terminated, gamma, rho, c = problem
    is_adjoint = any(x is not None for x in adjoint)
    grads, (by_log_pi, by_log_mu, by_value, by_next_value, by_reward) = adjoint[:2], adjoint[2:]
    tensors = (
        log_pi, log_mu, value, next_value, reward, done, terminated, *outputs, *grads,
        by_log_pi, by_log_mu, by_value, by_next_value, by_reward,
    )  # fmt: skip
    dtype = problem.compute_dtype
    plan = _plan(
        reward.shape,
        time_dim,
        tuple(None if x is None else x.stride() for x in tensors),
        dtype.itemsize,
        _processors(reward.device),
        _ADJOINT_WARP_BYTES if is_adjoint else _WARP_BYTES,
    )
    if plan is None:
        return False
    arguments: list[Any] = [
        None if x is None else (x,) if strides == plan.layout else (x, *strides)  # type: ignore[misc]  # there is x
        for x, strides in zip(tensors, plan.strides, strict=True)
    ]
    for x in (gamma, rho, c):
        arguments += scalar_arguments(x if isinstance(x, Tensor) else float(x), reward.device)
    compositions = reward.new_empty(plan.compositions, dtype=dtype) if plan.compositions else None
    with torch.cuda.device_of(reward):
        for compose in plan.phases:
            launch(
                vtrace_kernel,
                plan.programs,
                *arguments,
                compositions,
                plan.layout,
                plan.rows,
                plan.inner,
                plan.steps,
                ADJOINT=is_adjoint,
                DTYPE=_TRITON_DTYPE[dtype],
                COMPOSE=compose,
                **plan.constants,
            )
    return True


def _dense(problem: VTrace) -> VTrace:
    """``problem`` on contiguous copies."""
    return problem._replace(
        **{name: x.contiguous() for name, x in zip(problem._fields[:7], problem[:7], strict=True) if x is not None}
    )
