"""The log-probability of a Gaussian action in few PyTorch operations, differentiated by autograd: ``torch``.

At the size of a minibatch an `autograd.Function` alone costs more than the operations of both passes, so there is
none.
An operation with a number among its operands costs twice as much as one on tensors alone: factors go along with another
operation, and constants are added once per row. With a negative ``beta``, ``softplus(x, -2)`` is −½ softplus(−2x):

    log |da/dx| = log half + 2 log 2 − 2x + 4 softplus(x, -2)
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .squashed_normal_problem import (
    LOG_SQRT_2PI,
    SOFTPLUS_THRESHOLD,
    Squash,
    is_transformed,
    keep_within,
    tanh_within,
    wide,
)


def log_prob(loc: Tensor, scale: Tensor, action: Tensor, squash: Squash | None) -> Tensor:
    """log π(a), shape ``[*B]``, of actions ``[*B, A]``, in the dtype that is computed in."""
    if squash is None:
        loc, scale, action = wide(loc, scale, action)
        return _of_rows(scale.log(), (action - loc) / scale, -LOG_SQRT_2PI)
    limit = squash.limit_of_inverse(loc, scale, action)
    loc, scale, action = wide(loc, scale, action)
    center, half = squash.center_and_half()
    if isinstance(half, Tensor) or half != 1 or center != 0:
        y = keep_within((action - center) / half, limit)
    else:
        differentiated = action.requires_grad or is_transformed()
        y = keep_within(action.clone(), limit) if differentiated else action.clamp(-limit, limit)
    x = y.atanh()
    terms, constant = _squashed_terms(scale, half, x)
    return _of_rows(terms, (x - loc) / scale, constant)


def sample(loc: Tensor, scale: Tensor, noise: Tensor, squash: Squash | None) -> tuple[Tensor, Tensor]:
    """The action ``[*B, A]`` made of ``noise``, and log π(a), shape ``[*B]``."""
    if squash is None:
        loc, scale, noise = wide(loc, scale, noise)
        return torch.addcmul(loc, scale, noise), _of_rows(scale.log(), noise, -LOG_SQRT_2PI)
    limit = squash.limit_of_draw(loc, scale, noise)
    loc, scale, noise = wide(loc, scale, noise)
    center, half = squash.center_and_half()
    x = torch.addcmul(loc, scale, noise)
    action = tanh_within(x, limit)
    if isinstance(half, Tensor):
        action = torch.addcmul(center, half, action)
    elif half != 1 or center != 0:
        action = action * half + center
    terms, constant = _squashed_terms(scale, half, x)
    return action, _of_rows(terms, noise, constant)


def _squashed_terms(scale: Tensor, half: float | Tensor, x: Tensor) -> tuple[Tensor, float]:
    """log scale + log |da/dx| but for a constant, and that constant with the normal density's, negated."""
    constant = -LOG_SQRT_2PI - 2 * math.log(2)
    if isinstance(half, Tensor):
        scale = scale * half
    else:
        constant -= math.log(half)
    quarter = torch.sub(softplus(x, -2, SOFTPLUS_THRESHOLD), x, alpha=0.5)
    return torch.add(scale.log(), quarter, alpha=4), constant


def _of_rows(terms: Tensor, z: Tensor, constant: float) -> Tensor:
    """Σ constant − terms − z²/2."""
    return torch.rsub(torch.addcmul(terms, z, z, value=0.5).sum(-1), constant * terms.shape[-1])
