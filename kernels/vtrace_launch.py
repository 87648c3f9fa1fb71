"""Host side of the V-trace kernel; the ``triton`` backend of V-trace."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import launching
from .launching import Launcher, Plan, scalar, scalar_arguments
from .scan_launch import lay_out
from .vtrace_kernel import vtrace_kernel
from .vtrace_problem import VTrace

# Bytes of a tensor that a warp has in flight: a thread has registers for the inputs of 8 steps, or 4 in the adjoint.
_WARP_BYTES, _ADJOINT_WARP_BYTES = 1024, 512


def forward(problem: VTrace, time_dim: int) -> list[Tensor]:
    """Advantage and value target."""
    outputs = problem.new_outputs()
    if not _run(problem, time_dim, *outputs):
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
    ]  # of γ and the thresholds none, or this isn't asked
    results = [x for x in found if x is not None]
    if not _run(problem, time_dim, None, value_target, *grads, *found[:5]):
        dense = [None if x is None else x.contiguous() for x in grads]
        copies = backward(_dense(problem), time_dim, value_target.contiguous(), dense, needs)
        for result, copy in zip(results, copies, strict=True):
            result.copy_(copy)
    return results


def _run(
    problem: VTrace,
    time_dim: int,
    advantage: Tensor | None,
    value_target: Tensor,
    *adjoint: Tensor | None,
) -> bool:
    """Launch on the tensors; False, and nothing, if their strides are more than the kernel knows.

    ``adjoint`` are the gradients of advantage and value target, and where those of the inputs are written.
    """
    *inputs, gamma, rho, c, done, terminated = problem
    is_adjoint, reward = bool(adjoint), problem.reward
    scalars = scalar(gamma, reward), scalar(rho, reward), scalar(c, reward)
    settings = time_dim, value_target.dtype, is_adjoint
    return _vtrace(settings, *inputs, done, terminated, advantage, value_target, *adjoint, *scalars)


def _plan(settings: tuple[int, torch.dtype, bool], *arguments: Any) -> Plan | None:
    time_dim, dtype, is_adjoint = settings
    *tensors, gamma, rho, c = arguments
    tensors += [None] * (_TENSORS - len(tensors))  # those of the adjoint
    reward = tensors[4]
    layout = lay_out(
        reward.shape,
        time_dim,
        tuple(None if x is None else x.stride() for x in tensors),
        dtype.itemsize,
        launching.processors(reward.device),
        warp_bytes=_ADJOINT_WARP_BYTES if is_adjoint else _WARP_BYTES,
    )
    if layout is None:
        return None
    scalars = *scalar_arguments(gamma), *scalar_arguments(rho), *scalar_arguments(c)
    strided = map(layout.argument, tensors, layout.strides)
    return layout.plan(vtrace_kernel, [*strided, *scalars], dtype, ends=True, ADJOINT=is_adjoint)


_TENSORS = vtrace_kernel.arg_names.index("gamma")

_vtrace = Launcher(_plan)


def _dense(problem: VTrace) -> VTrace:
    """``problem`` on contiguous copies."""
    return problem._replace(
        **{name: x.contiguous() for name, x in problem._asdict().items() if isinstance(x, Tensor) and x.ndim}
    )
