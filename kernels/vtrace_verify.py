"""The ``verify`` backend of V-trace: the kernel, compared with the reference in float64.

A debugging aid: it reads results on the host, which waits for the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import vtrace_launch
from .verify import compare
from .vtrace_composed import composed
from .vtrace_problem import VTrace


def forward(problem: VTrace, time_dim: int) -> list[Tensor]:
    """Advantage and value target, once they agree with the reference.

    Raises:
        VerificationError: one differs; the message has the worst element's index and both values.

    """
    found = vtrace_launch.forward(problem, time_dim)
    precise = _in_float64(problem)
    expected = composed(precise, time_dim, "reference")
    scale = _scale(precise, expected, time_dim)
    for what, x, wanted in zip(("V-trace advantage", "V-trace value target"), found, expected, strict=True):
        compare(what, "triton", problem.dtype, x, wanted, scale)
    return found


def backward(
    problem: VTrace, time_dim: int, value_target: Tensor, grads: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor]:
    """The gradients of the inputs that need one, once they agree with autograd through the reference.

    Raises:
        VerificationError: one differs; the message has the worst element's index and both values.

    """
    found = vtrace_launch.backward(problem, time_dim, value_target, grads, needs)
    precise = _in_float64(problem)
    leaves = {
        name: x.detach().requires_grad_()
        for name, x, need in zip(VTrace._fields, precise.differentiable, needs, strict=False)
        if need
    }
    with torch.enable_grad():
        outputs = composed(precise._replace(**leaves), time_dim, "reference")
    used = [(x, g.double()) for x, g in zip(outputs, grads, strict=True) if g is not None]
    expected = torch.autograd.grad(
        [x for x, _ in used], list(leaves.values()), [g for _, g in used], allow_unused=True, materialize_grads=True
    )
    size = torch.stack([g.abs() for _, g in used]).sum(0).amax(time_dim, keepdim=True)
    scale = size * (1 + _scale(precise, outputs, time_dim))
    for name, gradient, wanted in zip(leaves, found, expected, strict=True):
        compare(f"V-trace gradient of {name}", "triton", problem.dtype, gradient, wanted, scale.expand_as(wanted))
    return found


def _in_float64(problem: VTrace) -> VTrace:
    return VTrace(*(x.double() if isinstance(x, Tensor) and x.dtype != torch.bool else x for x in problem))


def _scale(problem: VTrace, outputs: Sequence[Tensor], time_dim: int) -> Tensor:
    """The largest magnitude in an element's row, of the inputs that are finite and of the results."""
    terms = [problem.value, problem.next_value, problem.reward, *(x.detach() for x in outputs)]
    largest = [x.nan_to_num(0, 0, 0).abs().amax(time_dim, keepdim=True) for x in terms]
    weight = torch.as_tensor(problem.rho, dtype=torch.float64, device=problem.reward.device).clamp(1, 1e6)
    return (weight * torch.stack(largest).sum(0)).expand_as(problem.reward)
