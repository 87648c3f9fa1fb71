"""What arguments of every operation may be, and the errors that say that one isn't."""

from collections.abc import Iterable
from operator import index
from reprlib import repr as short  # an array may be long
from typing import Any

import torch
from torch import Tensor

Scalar = float | Tensor
"""A number, or a tensor that broadcasts to the tensors it is used with."""

REDUCTIONS = NONE, MEAN, SUM = ("none", "mean", "sum")


def check_agrees(name: str, x: Tensor | None, other: str, y: Tensor) -> None:
    """Raise RuntimeError for ``x`` of another shape or on another device than ``y``, TypeError if it is no tensor."""
    if x is None:
        return
    check_tensor(name, x)
    if x.shape != y.shape or x.device != y.device:
        raise RuntimeError(
            f"{name} has shape {tuple(x.shape)} on {x.device}, but {other} has shape {tuple(y.shape)} on {y.device}: "
            "both must agree"
        )


def check_broadcasts(name: str, x: Any, other: str, shape: torch.Size, device: torch.device) -> None:
    """Raise RuntimeError for a tensor ``x`` with dimensions that doesn't broadcast to ``shape``, or lies elsewhere."""
    if isinstance(x, Tensor) and x.ndim:
        if not broadcasts(x.shape, shape):
            raise RuntimeError(
                f"{name} has shape {tuple(x.shape)}, which does not broadcast to {tuple(shape)} of {other}"
            )
        if x.device != device:
            raise RuntimeError(f"{name} is on {x.device}, but {other} is on {device}")


def broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    """Whether a tensor of ``shape`` expands to the shape ``to``."""
    return len(shape) <= len(to) and all(n == 1 or n == m for n, m in zip(reversed(shape), reversed(to), strict=False))


def check_tensor(name: str, x: Any) -> None:
    """Raise TypeError for what isn't a tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, but is {short(x)}")


def check_real(name: str, x: Any) -> None:
    """Raise TypeError for what isn't a real tensor."""
    if not isinstance(x, Tensor) or x.is_complex():
        raise TypeError(f"{name} must be a real tensor, but is {_described(x)}")


def check_scalar(name: str, x: Any) -> None:
    """Raise TypeError for what is neither a real number nor a real tensor."""
    if not isinstance(x, (float, int, Tensor)) or (isinstance(x, Tensor) and x.is_complex()):
        raise TypeError(f"{name} must be a number or a real tensor, but is {_described(x)}")


def _described(x: Any) -> str:
    return f"a tensor of {x.dtype}" if isinstance(x, Tensor) else short(x)


def check_0d(name: str, x: Any) -> None:
    """Raise RuntimeError for a tensor with dimensions, TypeError for what is neither a number nor a tensor."""
    check_scalar(name, x)
    if isinstance(x, Tensor) and x.ndim:
        raise RuntimeError(f"{name} has shape {tuple(x.shape)}: a number or a 0-d tensor is wanted")


def check_not_negative(name: str, x: Any) -> None:
    """Raise ValueError for a number that is negative or NaN; nothing is known here of what a tensor holds."""
    if not isinstance(x, Tensor) and not x >= 0:
        raise ValueError(f"{name} is {x}, but must not be negative")


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise ValueError if ``value`` isn't one of the ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it can be {', '.join(map(repr, choices))}")


def as_index(name: str, x: Any) -> int:
    """``x`` as an int; TypeError, naming the argument, if it stands for none."""
    try:
        return index(x)
    except TypeError:
        raise TypeError(f"{name} must be an int, but is {short(x)}") from None


def check_positive(name: str, count: Any) -> None:
    """Raise TypeError or ValueError, naming the argument, unless ``count`` is an int of at least 1."""
    if not isinstance(count, int) or isinstance(count, bool):
        raise TypeError(f"{name} must be an int, but is a {type(count).__name__}")
    if count < 1:
        raise ValueError(f"{name} must be at least 1, but is {count}")
