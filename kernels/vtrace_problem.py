"""The problem of V-trace that the fused backends solve, and which inputs have gradients."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dtypes import compute_dtype, result_dtype

_PRECISE = {torch.float32, torch.float64}


class VTrace(NamedTuple):
    """Tensors of one shape; γ and the thresholds are numbers or 0-d tensors, which get no gradient here.

    Log-weights are log π − log μ, or ``log_pi`` itself where ``log_mu`` is None.
    """

    log_pi: Tensor
    log_mu: Any
    value: Tensor
    next_value: Tensor
    reward: Tensor
    done: Tensor
    terminated: Any
    gamma: Any
    rho: Any
    c: Any

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the results: that of reward, value and next value together, floating point at least."""
        dtype = result_dtype(self.reward, self.value, self.next_value)
        return dtype if dtype.is_floating_point else torch.get_default_dtype()

    @property
    def log_weight_dtype(self) -> torch.dtype:
        """The dtype of log π − log μ, float32 at least: the difference keeps none of their leading digits."""
        return torch.promote_types(result_dtype(self.log_pi, self.log_mu), torch.float32)

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
        """The inputs that can have gradients, in the order of the fields."""
        return self[:5]

    def new_outputs(self) -> list[Tensor]:
        """Uninitialised: the advantage and the value target, laid out like the reward."""
        dtype = self.dtype
        like = self.reward
        first = torch.empty_like(like) if dtype == like.dtype else torch.empty_like(like, dtype=dtype)
        return [first, torch.empty_like(first)]
