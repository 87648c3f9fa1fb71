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

SCAN, TD_LAMBDA, GAE, FIXED_DISCOUNT = "scan", "td_lambda", "gae", "fixed_discount"

Scalar = float | Tensor


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
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the result: that of reward, value and next value together, floating point at least."""
        dtype = self.reward.dtype
        for x in (self.value, self.next_value):
            if x is not None and x.dtype != dtype:
                dtype = torch.promote_types(dtype, x.dtype)
        return dtype if dtype.is_floating_point else torch.get_default_dtype()

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
        check_agrees(names.get(name, name), getattr(problem, name), problem.reward)


def _check_kinds(problem: Recurrence, names: Mapping[str, str]) -> None:
    """Raise TypeError for what isn't a real tensor, or a number or real tensor, and has to be."""
    for field in _TENSORS[problem.kind]:
        x = getattr(problem, field)
        if not isinstance(x, Tensor) or x.is_complex():
            raise TypeError(f"{names.get(field, field)} must be a real tensor, but is {_described(x)}")
    for field in ("gamma",) if problem.kind == SCAN else ("gamma", "lmbda"):
        check_scalar(names.get(field, field), getattr(problem, field))


# The fields that a kind can't do without; ``terminated`` is always optional, and ``done`` in a bare scan.
_TENSORS = {
    SCAN: ("reward",),
    TD_LAMBDA: ("reward", "next_value", "done"),
    GAE: ("reward", "value", "next_value", "done"),
    FIXED_DISCOUNT: ("reward", "next_value", "done"),
}


def check_scalar(name: str, x: Any) -> None:
    """Raise TypeError for what is neither a real number nor a real tensor."""
    if not isinstance(x, (float, int, Tensor)) or (isinstance(x, Tensor) and x.is_complex()):
        raise TypeError(f"{name} must be a number or a real tensor, but is {_described(x)}")


def _described(x: Any) -> str:
    return f"a tensor of {x.dtype}" if isinstance(x, Tensor) else repr(x)


def _check_scalars(problem: Recurrence, names: Mapping[str, str]) -> None:
    for name in ("gamma", "lmbda"):
        check_broadcasts(names.get(name, name), getattr(problem, name), problem.reward, names.get("reward", "reward"))


def check_agrees(name: str, x: Tensor | None, reward: Tensor) -> None:
    """Raise RuntimeError for a tensor ``x`` that is not of the reward's shape and on its device."""
    if x is not None and (x.shape != reward.shape or x.device != reward.device):
        raise RuntimeError(
            f"{name} has shape {tuple(x.shape)} on {x.device}, but reward has shape {tuple(reward.shape)} on "
            f"{reward.device}: both must agree"
        )


def check_broadcasts(name: str, x: Any, reward: Tensor, its_name: str = "reward") -> None:
    """Raise RuntimeError for a tensor ``x`` with dimensions that doesn't broadcast to the reward, or lies elsewhere."""
    if isinstance(x, Tensor) and x.ndim:
        if not broadcasts(x.shape, reward.shape):
            raise RuntimeError(
                f"{name} has shape {tuple(x.shape)}, which does not broadcast to {tuple(reward.shape)} of {its_name}"
            )
        if x.device != reward.device:
            raise RuntimeError(f"{name} is on {x.device}, but {its_name} is on {reward.device}")


def fit(gradient: Tensor, x: Tensor) -> Tensor:
    """A per-step gradient summed to the shape of the input it belongs to, in that input's dtype."""
    if gradient.shape != x.shape:
        gradient = gradient.sum_to_size(x.shape)
    return gradient if gradient.dtype == x.dtype else gradient.to(x.dtype)


def broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    """Whether a tensor of ``shape`` expands to the shape ``to``."""
    return len(shape) <= len(to) and all(n in (1, m) for n, m in zip(reversed(shape), reversed(to), strict=False))
