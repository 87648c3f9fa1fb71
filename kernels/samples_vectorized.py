"""What the ``torch`` backends of the losses over samples share: leaving out the samples that don't count, and means.

``padding`` marks the samples that don't count; None where all do. ``count`` is the number of those that do, at least 1,
in the dtype that is computed in.
"""

from typing import Any

import torch
from torch import Tensor


def padding_and_count(mask: Tensor | None, samples: int, dtype: torch.dtype) -> tuple[Tensor | None, Any]:
    """The samples that don't count, and the number of those that do."""
    return (None, samples) if mask is None else (~mask, mask.sum(dtype=dtype).clamp_min_(1))


def selected(fresh: Tensor, padding: Tensor | None) -> Tensor:
    """A temporary, with 0 where a sample doesn't count."""
    return fresh if padding is None else fresh.masked_fill_(padding, 0)


def mean(x: Tensor, padding: Tensor | None, count: Any, dtype: torch.dtype) -> Tensor:
    """Mean of ``x``, which is 0 where a sample doesn't count."""
    return x.mean(dtype=dtype) if padding is None else x.sum(dtype=dtype).div_(count)


def factors(weights: Tensor, padding: Tensor | None, reduction: str, dtype: torch.dtype) -> Tensor:
    """What the losses are multiplied with: their weights, for the mean as shares of the sum, 0 where none counts."""
    weights = selected(weights.to(dtype, copy=True), padding)
    if reduction == "mean":
        total = weights.sum()
        weights.div_(total.masked_fill_(total == 0, 1))
    return weights
