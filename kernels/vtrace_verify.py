"""The ``verify`` backend of V-trace: what ``auto`` picks, compared with the reference loop in float64.

A debugging aid: it reads results on the host, which waits for the device.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import vtrace_reference
from .backend import fastest_backend
from .compare import compare
from .scan_problem import fit
from .scan_reference import gradients
from .vtrace_composed import composed
from .vtrace_problem import VTrace


def forward(problem: VTrace, time_dim: int) -> list[Tensor]:
    """Advantage and value target, once they agree with the reference.

    Raises:
        VerificationError: one differs; the message has the worst element's index and both values.

    """
    name = fastest_backend(problem.reward)
    kernel = _kernel(problem, name, differentiated=True)
    found = list(composed(problem, time_dim, name)) if kernel is None else kernel.forward(problem, time_dim)
    precise = _in_float64(problem)
    expected = vtrace_reference.solve(precise, time_dim)
    scale = _scale(precise, expected, time_dim)
    for what, x, wanted in zip(("V-trace advantage", "V-trace value target"), found, expected, strict=True):
        compare(what, name, problem.dtype, x, wanted, scale)
    return found


def backward(
    problem: VTrace, time_dim: int, value_target: Tensor, grads: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor]:
    """The gradients of the inputs that need one, once they agree with autograd through the reference.

    Raises:
        VerificationError: one differs; the message has the worst element's index and both values.

    """
    name, names = fastest_backend(problem.reward), problem.names(needs)
    kernel = _kernel(problem, name, differentiated=not set(names).isdisjoint(("gamma", "rho", "c")))
    if kernel is None:
        found = gradients(lambda leaves: composed(leaves, time_dim, name), problem, names, grads)
    else:
        found = kernel.backward(problem, time_dim, value_target, grads, needs)
    precise = _in_float64(problem)
    expected = gradients(lambda leaves: vtrace_reference.solve(leaves, time_dim), precise, names, grads)
    size = torch.stack([g.double().abs() for g in grads if g is not None]).sum(0).amax(time_dim, keepdim=True)
    scale = size * (1 + _scale(precise, vtrace_reference.solve(precise, time_dim), time_dim))
    for what, gradient, wanted in zip(names, found, expected, strict=True):
        compare(f"V-trace gradient of {what}", name, problem.dtype, gradient, wanted, fit(scale, wanted))
    return found


def _kernel(problem: VTrace, name: str, *, differentiated: bool) -> Any:
    """The module of the kernel if it solves ``problem`` for the backend ``name``, else None."""
    if name != "triton" or not problem.suits_kernel(differentiated=differentiated):
        return None
    from . import vtrace_launch  # Triton may be absent

    return vtrace_launch


def _in_float64(problem: VTrace) -> VTrace:
    return VTrace(*(x.double() if isinstance(x, Tensor) and x.dtype != torch.bool else x for x in problem))


def _scale(problem: VTrace, outputs: Sequence[Tensor], time_dim: int) -> Tensor:
    """The largest magnitude in an element's row, of the inputs that are finite and of the results."""
    terms = [problem.value, problem.next_value, problem.reward, *outputs]
    largest = [x.nan_to_num(0, 0, 0).abs().amax(time_dim, keepdim=True) for x in terms]
    weight = torch.as_tensor(problem.rho, dtype=torch.float64, device=problem.reward.device).clamp(1, 1e6)
    return (weight * torch.stack(largest).sum(0)).expand_as(problem.reward)
