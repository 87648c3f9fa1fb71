"""The problem that every backend solves: inputs of a recurrence y_t = d_t + c_t · y_{t+1}, and their checks.

==============  =====================  ==========================================  ==========================
kind            c_t                    d_t                                         outputs
==============  =====================  ==========================================  ==========================
SCAN            γ(1−done)              r                                           y
TD_LAMBDA       γλ(1−done)             r + γ(1−term)v'·(1 − λ(1−done))             y
GAE             γλ(1−done)             r + γ(1−term)v' − v                         y (advantage), y + v (target)
FIXED_DISCOUNT  as TD_LAMBDA, but γ and λ of the trajectory's first step hold for all of it
==============  =====================  ==========================================  ==========================

``done`` in the table is ``done | terminated``, and in TD_LAMBDA also the last step of the tensor, where the
trajectory bootstraps from v' whether or not it goes on.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import check_agrees, check_broadcasts, check_real, check_scalar
from .dtypes import compute_dtype, floating, result_dtype

SCAN, TD_LAMBDA, GAE, FIXED_DISCOUNT = "scan", "td_lambda", "gae", "fixed_discount"


class Recurrence(NamedTuple):
    """Inputs of one recurrence: tensors of one shape, γ and λ numbers or broadcastable tensors, masks bool.

    Which of the fields typed Any are there and which are None depends on the kind.
    """

    kind: str
    gamma: Any
    lmbda: Any
    reward: Any
    value: Any = None
    next_value: Any = None
    done: Any = None
    terminated: Any = None

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype that backends compute in: float64 for float64, otherwise float32."""
        return compute_dtype(self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the result: that of reward, value and next value together, floating point at least."""
        return floating(result_dtype(self.reward, self.value, self.next_value))

    def new_output(self) -> Tensor:
        """An uninitialised tensor for a result, laid out like the reward."""
        dtype = self.dtype
        return (
            torch.empty_like(self.reward) if dtype == self.reward.dtype else torch.empty_like(self.reward, dtype=dtype)
        )

    def new_outputs(self) -> list[Tensor]:
        """Uninitialised tensors for all outputs of this kind."""
        output = self.new_output()
        return [output, torch.empty_like(output)] if self.kind == GAE else [output]


def checked(problem: Recurrence, time_dim: int, names: Mapping[str, str] | None = None) -> tuple[Recurrence, int]:
    """``problem`` with bool masks, and ``time_dim`` counted from the front.

    ``names`` are those of the fields that the caller knows by others.

    Raises:
        TypeError: an argument isn't a real tensor, or γ or λ not a number either.
        RuntimeError: an argument's shape or device isn't the reward's, or γ or λ doesn't broadcast to it.
        IndexError: ``time_dim`` is out of range.

    """
    _, gamma, lmbda, reward, value, next_value, done, terminated = problem
    _check_kinds(problem, names or {})
    shape, device = reward.shape, reward.device
    for x in (value, next_value, done, terminated):
        if x is not None and (_shape(x) != shape or _device(x) != device):
            _name_disagreement(problem, names or {})
    if type(gamma) is not float or (lmbda is not None and type(lmbda) is not float):
        _check_scalars(problem, names or {})
    if not -len(shape) <= time_dim < len(shape):
        name = (names or {}).get("reward", "reward")
        raise IndexError(f"time_dim is {time_dim}, but {name} has shape {tuple(shape)}")
    for name, mask in (("done", done), ("terminated", terminated)):
        if mask is not None and mask.dtype != torch.bool:  # non-zero means true
            problem = problem._replace(**{name: mask != 0})
    return problem, time_dim % len(shape)


def with_one_mask(problem: Any) -> Any:
    """``problem`` with no ``terminated`` where it is ``done`` itself, which means the same.

    The compiler refuses a function of one tensor twice.
    """
    return problem._replace(terminated=None) if problem.terminated is problem.done else problem


# The getters of properties in C: what a call costs is also what it looks up.
_shape = Tensor.shape.__get__  # type: ignore[attr-defined]
_device = Tensor.device.__get__


def _name_disagreement(problem: Recurrence, names: Mapping[str, str]) -> None:
    """Raise for the first tensor that is not of the reward's shape and on its device."""
    for name in ("value", "next_value", "done", "terminated"):
        check_agrees(names.get(name, name), getattr(problem, name), "reward", problem.reward)


def _check_kinds(problem: Recurrence, names: Mapping[str, str]) -> None:
    """Raise TypeError for what isn't a real tensor, or a number or real tensor, and has to be."""
    for field in _TENSORS[problem.kind]:
        check_real(names.get(field, field), getattr(problem, field))
    for field in ("done", "terminated"):
        if getattr(problem, field) is not None:
            check_real(names.get(field, field), getattr(problem, field))
    for field in ("gamma",) if problem.kind == SCAN else ("gamma", "lmbda"):
        check_scalar(names.get(field, field), getattr(problem, field))


# The fields that a kind can't do without; ``terminated`` is always optional, and ``done`` in a bare scan.
_TENSORS = {
    SCAN: ("reward",),
    TD_LAMBDA: ("reward", "next_value", "done"),
    GAE: ("reward", "value", "next_value", "done"),
    FIXED_DISCOUNT: ("reward", "next_value", "done"),
}


def _check_scalars(problem: Recurrence, names: Mapping[str, str]) -> None:
    reward = problem.reward
    for name in ("gamma", "lmbda"):
        x = getattr(problem, name)
        check_broadcasts(names.get(name, name), x, names.get("reward", "reward"), reward.shape, reward.device)


def fit(gradient: Tensor, x: Tensor) -> Tensor:
    """A per-step gradient summed to the shape of the input it belongs to, in that input's dtype."""
    if gradient.shape != x.shape:
        gradient = gradient.sum_to_size(x.shape)
    return gradient if gradient.dtype == x.dtype else gradient.to(x.dtype)
