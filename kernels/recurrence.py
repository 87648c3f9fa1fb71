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
        return torch.empty_like(self.reward, dtype=self.dtype)

    def new_outputs(self) -> list[Tensor]:
        """Uninitialised tensors for all outputs of this kind."""
        return [self.new_output() for _ in range(2 if self.kind == GAE else 1)]


def checked(problem: Recurrence, time_dim: int) -> tuple[Recurrence, int]:
    """``problem`` with bool masks, and ``time_dim`` counted from the front.

    Raises:
        RuntimeError: an argument's shape or device isn't the reward's, or γ or λ doesn't broadcast to it.
        IndexError: ``time_dim`` is out of range.

    """
    reward = problem.reward
    shape, device = reward.shape, reward.device
    for name in ("value", "next_value", "done", "terminated"):
        x = getattr(problem, name)
        if x is not None and (x.shape != shape or x.device != device):
            raise RuntimeError(
                f"{name} has shape {tuple(x.shape)} on {x.device}, but reward has shape {tuple(shape)} on {device}: "
                "both must agree"
            )
    for name in ("gamma", "lmbda"):
        x = getattr(problem, name)
        if isinstance(x, Tensor) and x.ndim:
            if not broadcasts(x.shape, shape):
                raise RuntimeError(
                    f"{name} has shape {tuple(x.shape)}, which does not broadcast to the reward's {tuple(shape)}"
                )
            if x.device != device:
                raise RuntimeError(f"{name} is on {x.device}, but reward is on {device}")
    if not -len(shape) <= time_dim < len(shape):
        raise IndexError(f"time_dim is {time_dim}, but reward has shape {tuple(shape)}")
    done, terminated = _as_mask(problem.done), _as_mask(problem.terminated)
    if problem.terminated is problem.done:
        terminated = None  # which means the same; the compiler refuses a function of one tensor twice
    if done is not problem.done or terminated is not problem.terminated:
        problem = problem._replace(done=done, terminated=terminated)
    return problem, time_dim % len(shape)


def fit(gradient: Tensor, x: Tensor) -> Tensor:
    """A per-step gradient summed to the shape of the input it belongs to, in that input's dtype."""
    if gradient.shape != x.shape:
        gradient = gradient.sum_to_size(x.shape)
    return gradient if gradient.dtype == x.dtype else gradient.to(x.dtype)


def _as_mask(mask: Tensor | None) -> Tensor | None:
    """Non-zero means true, whatever the dtype."""
    return mask if mask is None or mask.dtype == torch.bool else mask != 0


def broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    """Whether a tensor of ``shape`` expands to the shape ``to``."""
    return len(shape) <= len(to) and all(n in (1, m) for n, m in zip(reversed(shape), reversed(to), strict=False))
