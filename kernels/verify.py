"""The ``verify`` backend: what ``auto`` picks, compared with the reference loop in float64.

A debugging aid: it reads results on the host, which waits for the device.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import loop
from .backend import fastest_backend
from .operators import backend_module
from .recurrence import Recurrence, fit

# Allowed error relative to the scale of an element (see `_scale`): some hundred roundings of the compute dtype, which
# is float32 for the half types; their own rounding of the result comes on top.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


class VerificationError(RuntimeError):
    """A backend's result differs from the reference."""


def forward(problem: Recurrence, time_dim: int) -> list[Tensor]:
    """The outputs of the fastest backend, once they agree with the reference.

    Raises:
        VerificationError: an output differs; the message has the worst element's index and both values.

    """
    name = fastest_backend(problem.reward)
    outputs = backend_module(name).forward(problem, time_dim)
    expected = loop.forward(_in_float64(problem), time_dim)
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
    expected = loop.backward(
        _in_float64(problem), time_dim, None, [None if g is None else g.double() for g in grads], needs
    )
    names = [n for n, need in zip(Recurrence._fields[1:6], needs, strict=True) if need]
    for what, gradient, wanted in zip(names, found, expected, strict=True):
        scale = fit(gradient.double().abs().amax(time_dim, keepdim=True).expand_as(gradient), wanted)
        compare(f"{problem.kind} gradient of {what}", name, problem.dtype, fit(gradient, wanted), wanted, scale)
    return found


def compare(what: str, backend: str, dtype: torch.dtype, found: Tensor, expected: Tensor, scale: Tensor) -> None:
    """Raise VerificationError if an element of ``found`` is further from ``expected`` than rounding explains.

    ``scale`` is the magnitude of what an element was computed from.
    """
    tolerance = TOLERANCE[dtype]
    error = (found.double() - expected).abs()
    agree = (error <= tolerance * scale) | (found == expected) | (found.isnan() & expected.isnan())
    if agree.all():
        return
    excess = torch.where(agree, -1.0, (error / scale).nan_to_num(nan=torch.inf))
    index = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
    raise VerificationError(
        f"{what}: backend {backend!r} gives {found[index].item()} at index {index}, "
        f"the reference {expected[index].item()}"
    )


def _scale(problem: Recurrence, expected: Tensor, time_dim: int) -> Tensor:
    """The largest magnitude in an element's row, of the inputs that are finite and of the result."""
    terms = [x.double().nan_to_num(0, 0, 0).abs() for x in (*problem[3:6], expected) if x is not None]
    return torch.stack([x.amax(time_dim, keepdim=True) for x in terms]).sum(0).expand_as(expected)


def _in_float64(problem: Recurrence) -> Recurrence:
    def double(x: Any) -> Any:
        return x.double() if isinstance(x, Tensor) and x.dtype != torch.bool else x

    return Recurrence(problem.kind, *(double(x) for x in problem[1:]))
