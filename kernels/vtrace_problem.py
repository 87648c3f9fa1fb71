"""The problem of V-trace, and its checks."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import check_agrees, check_broadcasts, check_not_negative, check_real, check_scalar
from .dtypes import compute_dtype, floating, result_dtype
from .scan_problem import GAE, Recurrence
from .scan_problem import checked as checked_recurrence

_PRECISE = {torch.float32, torch.float64}


class VTrace(NamedTuple):
    """Tensors of one shape; γ and the thresholds are numbers, or tensors that broadcast to it.

    ``log_mu`` may be None, for 0: then ``log_pi`` is the logarithm of the weight itself.
    """

    log_pi: Tensor
    log_mu: Any
    value: Tensor
    next_value: Tensor
    reward: Tensor
    gamma: Any
    rho: Any
    c: Any
    done: Tensor
    terminated: Any

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the results: that of reward, value and next value together, floating point at least."""
        return floating(result_dtype(self.reward, self.value, self.next_value))

    @property
    def log_weight_dtype(self) -> torch.dtype:
        """The dtype of log π − log μ, float32 at least: the difference keeps none of their leading digits."""
        return torch.promote_types(result_dtype(self.log_pi, self.log_mu), torch.float32)

    def log_weight(self) -> Tensor:
        """log π − log μ, in `log_weight_dtype`."""
        log_pi = self.log_pi.to(self.log_weight_dtype)
        return log_pi if self.log_mu is None else log_pi - self.log_mu

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype that is computed in."""
        return compute_dtype(self.dtype)

    @property
    def has_one_precision(self) -> bool:
        """Whether all is computed in the dtype of the results, from end to end."""
        dtypes = {x.dtype for x in self[:5] if x is not None}
        if len(dtypes) == 1 and dtypes <= _PRECISE:  # which is found sooner
            return True
        return self.dtype == self.compute_dtype == self.log_weight_dtype

    @property
    def differentiable(self) -> tuple[Any, ...]:
        """The inputs that can have gradients, in the order of the fields: all but the masks."""
        return self[:-2]

    def names(self, needs: Sequence[bool]) -> list[str]:
        """The names of those of the `differentiable` inputs that need a gradient."""
        return [name for name, need in zip(self._fields, needs, strict=False) if need]

    @property
    def constants(self) -> tuple[Any, Any, Any]:
        """γ and the thresholds ρ̄ and c̄."""
        return self[5:8]

    def suits_kernel(self, *, differentiated: bool) -> bool:
        """Whether one kernel does it all: constants are numbers or 0-d, and none of them wants a gradient."""
        for x in self.constants:
            if isinstance(x, Tensor) and (x.ndim or (differentiated and x.requires_grad)):
                return False
        return self.has_one_precision

    def new_outputs(self) -> list[Tensor]:
        """Uninitialised: the advantage and the value target, laid out like the reward."""
        dtype = self.dtype
        like = self.reward
        first = torch.empty_like(like) if dtype == like.dtype else torch.empty_like(like, dtype=dtype)
        return [first, torch.empty_like(first)]


def checked(problem: VTrace, time_dim: int, names: Mapping[str, str] | None = None) -> tuple[VTrace, int]:
    """``problem`` with bool masks, and ``time_dim`` counted from the front.

    ``names`` are those of the fields that the caller knows by others.

    Raises:
        TypeError: something is no real tensor, or γ or a threshold neither that nor a number.
        RuntimeError: an argument's shape or device isn't the reward's, or γ or a threshold doesn't broadcast to it.
        IndexError: ``time_dim`` is out of range.

    """
    log_pi, log_mu, value, next_value, reward, gamma, rho, c, done, terminated = problem
    recurrence, dim = checked_recurrence(
        Recurrence(GAE, gamma, 1.0, reward, value, next_value, done, terminated), time_dim, names
    )
    check_real("log_pi", log_pi)
    if log_mu is not None:
        check_real("log_mu", log_mu)
    check_agrees("log_pi", log_pi, "reward", reward)
    check_agrees("log_mu", log_mu, "reward", reward)
    check_broadcasts("rho_thresh", rho, "reward", reward.shape, reward.device)
    check_broadcasts("c_thresh", c, "reward", reward.shape, reward.device)
    if recurrence.done is not done or recurrence.terminated is not terminated:
        problem = problem._replace(done=recurrence.done, terminated=recurrence.terminated)
    return problem, dim


def check_thresholds(rho_thresh: Any, c_thresh: Any) -> None:
    """Raise TypeError for a threshold that is no number or tensor, ValueError if it is known to be negative."""
    for name, x in (("rho_thresh", rho_thresh), ("c_thresh", c_thresh)):
        check_scalar(name, x)
        check_not_negative(name, x)
