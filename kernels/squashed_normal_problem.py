"""What every backend of the Gaussian log-probability is given: the interval that tanh squashes into, and dtypes."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .dispatch import in_transform
from .dtypes import cast, compute_dtype, result_dtype

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)
# From where log(1 + eˣ) is x, in float64 too.
SOFTPLUS_THRESHOLD = 40

Bounds = tuple[float | Tensor, float | Tensor]


class Squash(NamedTuple):
    """a = center + half · tanh x for the bounds low and high, both numbers or both tensors; 1 − |tanh x| ≥ margin."""

    low: Any
    high: Any
    margin: float | None

    def center_and_half(self) -> tuple[Any, Any]:
        """(low + high) / 2 and (high − low) / 2, computed in the bounds' own dtype."""
        return (self.low + self.high) / 2, (self.high - self.low) / 2

    def limit_of_draw(self, *tensors: Tensor) -> float:
        """The greatest |tanh x| of an action that is drawn from loc, scale and noise."""
        return 1 - self._margin(result_dtype(*tensors))

    def limit_of_inverse(self, *tensors: Tensor) -> float:
        """The greatest |tanh x| that is inverted, of loc, scale and action: less than 1, whose inverse is infinite."""
        return 1 - max(self._margin(tensors[2].dtype), _LAST_STEP[compute_dtype(result_dtype(*tensors))])

    def _margin(self, dtype: torch.dtype) -> float:
        return torch.finfo(dtype).resolution if self.margin is None else self.margin


# From the greatest number below 1 to 1.
_LAST_STEP = {dtype: torch.finfo(dtype).eps / 2 for dtype in (torch.float32, torch.float64)}


def tanh_within(x: Tensor, limit: float) -> Tensor:
    """tanh x, within ±``limit``. Its slope is that of tanh at the value that is kept, which is small but not zero."""
    if limit < 1 and is_transformed():
        # tanh (x + s) for s = 0, by the addition theorem, as if x were where tanh x is the value that is kept.
        y, step = x.detach().tanh().clamp(-limit, limit), _no_step(x).tanh()
        return (y + step) / (1 + y * step)
    y = x.tanh()
    if limit < 1:
        y.data.clamp_(-limit, limit)
    return y


def keep_within(y: Tensor, limit: float) -> Tensor:
    """``y``, which may be overwritten, within ±``limit``. Its slope stays one, for what follows has its own."""
    if limit < 1:
        if is_transformed():
            return y.detach().clamp(-limit, limit) + _no_step(y)
        y.data.clamp_(-limit, limit)
    return y


def is_transformed() -> bool:
    """Whether `Tensor.data`, the quickest way past autograd, is refused or leaves out a derivative."""
    return in_transform() or forward_ad._current_level >= 0


def _no_step(x: Tensor) -> Tensor:
    """0 with the slope of x, and without it where x is infinite."""
    return torch.where(x.isinf(), 0, x - x.detach())


def wide(*tensors: Tensor) -> list[Tensor]:
    """``tensors`` in the dtype that they are computed in."""
    dtype = compute_dtype(result_dtype(*tensors))
    return [cast(x, dtype) for x in tensors]
