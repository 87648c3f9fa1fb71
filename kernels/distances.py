"""The distances between a prediction and its target, by the names that losses take.

==============  ==========================================
``l1``          \\|x − y\\|
``l2``          (x − y)²
``smooth_l1``   (x − y)²/2 where \\|x − y\\| < 1, else \\|x − y\\| − 1/2
==============  ==========================================
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import MEAN, NONE, REDUCTIONS

L1, L2, SMOOTH_L1 = "l1", "l2", "smooth_l1"

# Another one also needs a branch in `fusedrl.kernels.primitives.distance_and_slope`, and its kinks in `*_verify`.
DISTANCES: dict[str, Callable[..., Tensor]] = {L1: F.l1_loss, L2: F.mse_loss, SMOOTH_L1: F.smooth_l1_loss}

# What `torch.nn.functional` calls once it has compared shapes. They know a reduction by its index.
_mse_loss: Any = torch._C._nn.mse_loss
_smooth_l1_loss: Any = torch._C._nn.smooth_l1_loss
_INDEX = {reduction: index for index, reduction in enumerate(REDUCTIONS)}
_BETA = 1.0  # where the smooth l1 distance turns linear


def distance(x: Tensor, y: Tensor, loss_function: str, reduction: str) -> Tensor:
    """One of `DISTANCES`, reduced, between tensors that are known to have one shape, at less cost to the host."""
    if loss_function == L2:
        return _mse_loss(x, y, _INDEX[reduction])
    if loss_function == SMOOTH_L1:
        return _smooth_l1_loss(x, y, _INDEX[reduction], _BETA)
    if loss_function != L1:
        return DISTANCES[loss_function](x, y, reduction=reduction)
    size = torch.sub(x, y).abs()
    return size if reduction == NONE else size.mean() if reduction == MEAN else size.sum()
