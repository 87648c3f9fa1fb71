"""What a benchmark measures: a case is one computation on given data, its arms are the implementations of it.

Nothing is timed before it was checked: `refuse_if_wrong` compares an arm's outputs and gradients with the expected.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

Outputs = Sequence[Tensor]
Gradients = Sequence[Tensor | None]

DIRECTIONS = ("forward", "backward", "both")


class WrongResult(Exception):
    """An arm's result isn't the expected one."""


@dataclass(frozen=True)
class Arm:
    """An implementation, bound to its data.

    ``forward`` gives the outputs as users ask for them, ``recorded`` the same with a graph for backward (the same
    function, where forward is never called without). The first output is differentiated with respect to ``leaves``,
    with ``cotangent`` as its gradient. ``restored`` puts outputs and gradients of an arm that wants its data
    differently laid out as the others' are.
    """

    forward: Callable[[], Outputs]
    recorded: Callable[[], Outputs]
    leaves: Sequence[Tensor]
    cotangent: Tensor
    restored: Callable[[Tensor], Tensor] = lambda x: x

    def backward(self, output: Tensor) -> Gradients:
        """The gradients from an output that `recorded` gave, whose graph is spent by this."""
        return torch.autograd.grad(output, self.leaves, self.cotangent, allow_unused=True)

    def both(self) -> Gradients:
        """Forward and backward."""
        return self.backward(self.recorded()[0])

    def run(self, direction: str) -> Callable[[], Any]:
        """What is called for ``"forward"`` or ``"both"``."""
        return self.forward if direction == "forward" else self.both


@dataclass
class Case:
    """One computation at one shape.

    Args:
        name: what is computed.
        shape: the sizes that identify it, such as ``{"B": 16, "T": 128}``.
        arms: the implementations, ours first.
        shown: outputs and gradients of an arm → the tensors that are compared, by name.
        expected: the same tensors, from a reference, on whichever device it ran.
        bytes_moved: per direction (``"forward"``, ``"both"``), what has to be moved at least: every input read once
            and every output written once.
        absent: peers that can't run here, and why.
        tolerance: the greatest error, in units of the greatest expected magnitude (at least 1).

    """

    name: str
    shape: dict[str, int]
    arms: dict[str, Arm]
    shown: Callable[[Outputs, Gradients], dict[str, Tensor]]
    expected: Callable[[], dict[str, Tensor]]
    bytes_moved: dict[str, int]
    absent: dict[str, str] = field(default_factory=dict)
    tolerance: float = 1e-3
    layout: str = ""

    @cached_property
    def wanted(self) -> dict[str, Tensor]:
        """What is expected, computed once."""
        return self.expected()

    def __str__(self) -> str:
        return " ".join(filter(None, (self.name, "×".join(map(str, self.shape.values())), self.layout)))


def refuse_if_wrong(case: Case, names: Iterable[str] | None = None) -> None:
    """Compare the arms (all, or those named) with the expected values and gradients.

    Every arm draws the random numbers of the same seed.

    Raises:
        WrongResult: an arm is off by more than the tolerance, or its result has another shape.

    """
    for name in case.arms if names is None else names:
        arm = case.arms[name]
        torch.manual_seed(0)
        plain = arm.forward()
        torch.manual_seed(0)
        outputs = arm.recorded()
        gradients = arm.backward(outputs[0])
        gradients = [g if g is None else arm.restored(g) for g in gradients]
        for results in (plain, outputs):
            found = case.shown([arm.restored(x) for x in results], gradients)
            _compare(f"{name} of {case}", found, case.wanted, case.tolerance)


def _compare(what: str, found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    for key, expected in wanted.items():
        if key not in found:
            raise WrongResult(f"{what} has no {key}: not timed")
        result = found[key].detach()
        if result.shape != expected.shape:
            raise WrongResult(f"{key} of {what} has shape {tuple(result.shape)}, not {tuple(expected.shape)}")
        if not expected.numel():
            continue
        error = off_by(result, expected, tolerance)
        if error is not None:
            raise WrongResult(f"{key} of {what} is wrong by {error:.3g}: not timed")


def off_by(result: Tensor, expected: Tensor, tolerance: float) -> float | None:
    """The greatest error, if it is more than ``tolerance`` in units of the greatest expected magnitude (at least 1)."""
    error = (result.to(expected.device).double() - expected.double()).abs().max().item()
    return None if error <= tolerance * max(1.0, expected.abs().max().item()) else error


def nbytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the elements of ``tensors``."""
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)
