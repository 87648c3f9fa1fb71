"""The ``verify`` backend: what ``auto`` picks, compared with the reference loop in float64.

A debugging aid: it reads results on the host, which waits for the device.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import scan_reference
from .backend import fastest_backend
from .compare import compare
from .scan_operators import backend_module
from .scan_problem import Recurrence, fit


def forward(problem: Recurrence, time_dim: int) -> list[Tensor]:
    """The outputs of the fastest backend, once they agree with the reference.

    Raises:
        VerificationError: an output differs; the message has the worst element's index and both values.

    """
    name = fastest_backend(problem.reward)
    outputs = backend_module(name).forward(problem, time_dim)
    expected = scan_reference.forward(_in_float64(problem), time_dim)
    for what, output, wanted in zip(("result", "value target"), outputs, expected, strict=False):
        compare(f"{problem.kind} {what}", name, problem.dtype, output, wanted, _scale(problem, wanted, time_dim))
    return outputs


def backward(
    problem: Recurrence, time_dim: int, y: Tensor | None, grads: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor]:
    """The gradients of the fastest backend, once they agree with autograd through the reference.

    Raises:
        VerificationError: a gradient differs; the message has the worst element's index and both values.

    """
    name = fastest_backend(problem.reward)
    found = backend_module(name).backward(problem, time_dim, y, grads, needs)
    expected = scan_reference.backward(
        _in_float64(problem), time_dim, None, [None if g is None else g.double() for g in grads], needs
    )
    names = [n for n, need in zip(Recurrence._fields[1:6], needs, strict=True) if need]
    for what, gradient, wanted in zip(names, found, expected, strict=True):
        scale = fit(gradient.double().abs().amax(time_dim, keepdim=True).expand_as(gradient), wanted)
        compare(f"{problem.kind} gradient of {what}", name, problem.dtype, fit(gradient, wanted), wanted, scale)
    return found


def _scale(problem: Recurrence, expected: Tensor, time_dim: int) -> Tensor:
    """The largest magnitude in an element's row, of the inputs that are finite and of the result."""
    terms = [x.double().nan_to_num(0, 0, 0).abs() for x in (*problem[3:6], expected) if x is not None]
    return torch.stack([x.amax(time_dim, keepdim=True) for x in terms]).sum(0).expand_as(expected)


def _in_float64(problem: Recurrence) -> Recurrence:
    def double(x: Any) -> Any:
        return x.double() if isinstance(x, Tensor) and x.dtype != torch.bool else x

    return Recurrence(problem.kind, *(double(x) for x in problem[1:]))
