"""The log-probability of a Gaussian action, written to be read, and differentiated by autograd: ``reference``.

A gradient of the kernels that is itself differentiated, and a forward-mode tangent, go through here.
"""

import math

from torch import Tensor
from torch.nn.functional import softplus

from .squashed_normal_problem import LOG_SQRT_2PI, SOFTPLUS_THRESHOLD, Squash, keep_within, tanh_within, wide


def log_prob(loc: Tensor, scale: Tensor, action: Tensor, squash: Squash | None) -> Tensor:
    """log π(a), shape ``[*B]``, of actions ``[*B, A]``, in the dtype that is computed in."""
    limit = 1.0 if squash is None else squash.limit_of_inverse(loc, scale, action)
    loc, scale, action = wide(loc, scale, action)
    if squash is None:
        return _log_normal((action - loc) / scale, scale).sum(-1)
    center, half = squash.center_and_half()
    x = keep_within((action - center) / half, limit).atanh()
    return (_log_normal((x - loc) / scale, scale) - _log_slope(x, half)).sum(-1)


def sample(loc: Tensor, scale: Tensor, noise: Tensor, squash: Squash | None) -> tuple[Tensor, Tensor]:
    """The action ``[*B, A]`` made of ``noise``, and log π(a), shape ``[*B]``."""
    limit = 1.0 if squash is None else squash.limit_of_draw(loc, scale, noise)
    loc, scale, noise = wide(loc, scale, noise)
    x = loc + scale * noise
    if squash is None:
        return x, _log_normal(noise, scale).sum(-1)
    center, half = squash.center_and_half()
    action = center + half * tanh_within(x, limit)
    return action, (_log_normal(noise, scale) - _log_slope(x, half)).sum(-1)


def _log_normal(z: Tensor, scale: Tensor) -> Tensor:
    """log N(x; loc, scale) of z = (x − loc) / scale."""
    return -0.5 * z.square() - scale.log() - LOG_SQRT_2PI


def _log_slope(x: Tensor, half: float | Tensor) -> Tensor:
    """log |da/dx|."""
    log_half = half.to(x.dtype).log() if isinstance(half, Tensor) else math.log(half)
    return log_half + 2 * (math.log(2) - x - softplus(-2 * x, threshold=SOFTPLUS_THRESHOLD))
