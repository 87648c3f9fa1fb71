"""The critic's loss that every backend computes: the constants beside the value V, and their checks.

With the samples that count (mask m), importance weights w, a target V̂, a distance d and a coefficient c,

    L = c · d(V, V̂)                                                    without an old value
    L = c · max(d(V, V̂), d(V_old + clip(V − V_old, −ε, ε), V̂))        with V_old

reduced: Σ m w L / Σ m w, Σ m w L, or m w L. Where both distances are the same each has half of the gradient, as in
`torch.max`.

==============  =======================  =====================
loss_function   d(e), e = V − V̂          d'(e)
==============  =======================  =====================
l1              |e|                      sign e
l2              e²                       2 e
smooth_l1       e²/2 if |e| < 1,         clip(e, −1, 1)
                else |e| − 1/2
==============  =======================  =====================
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import REDUCTIONS, check_0d, check_choice, check_not_negative
from .distances import DISTANCES
from .dtypes import compute_dtype, result_dtype
from .samples import check_samples, new_outputs


class ValueConstants(NamedTuple):
    """All but ``value``: tensors of its shape, scalars that are numbers or 0-d tensors, and options."""

    value_target: Any
    old_value: Any  # a tensor, or None
    mask: Any  # a bool tensor, or None
    weights: Any  # a tensor, or None
    clip: Any  # a scalar if there is an old value, else None
    coefficient: Any  # a scalar, or None
    loss_function: str
    explained_variance: bool
    reduction: str


def check(value: Tensor, constants: ValueConstants) -> None:
    """Raise RuntimeError for a shape or device, TypeError for a dtype, ValueError for an option that doesn't fit."""
    value_target, old_value, mask, weights, clip, coefficient, loss_function, _, reduction = constants
    check_choice("loss_function", loss_function, DISTANCES)
    check_choice("reduction", reduction, REDUCTIONS)
    if (old_value is None) != (clip is None):
        there, missing = ("clip", "old_value") if old_value is None else ("old_value", "clip")
        raise ValueError(f"{there} is given, but {missing} isn't: clipping the step of the value takes both")
    optional = {"old_value": old_value, "weights": weights}
    check_samples("value", value, {"value_target": value_target}, optional, mask)
    for name, x in (("clip", clip), ("coefficient", coefficient)):
        if x is not None:
            check_0d(name, x)
    if clip is not None:
        check_not_negative("clip", clip)


def dtypes(value: Tensor, constants: ValueConstants) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of the loss and of what is logged, and the one that is computed in."""
    dtype = result_dtype(value, constants.value_target, constants.old_value, constants.weights)
    return dtype, compute_dtype(dtype)


def smallest_variance(value_target: Tensor, dtype: torch.dtype) -> float:
    """The least variance that a target is taken to have, since a constant has nothing to explain."""
    return torch.finfo(value_target.dtype if value_target.is_floating_point() else dtype).eps


def outputs(value: Tensor, constants: ValueConstants, keep: bool) -> list[Tensor]:
    """Uninitialised: the loss, clip_fraction and explained_variance as wanted, and the slope if it is to be kept."""
    logged = (constants.old_value is not None) + constants.explained_variance
    return new_outputs(value, *dtypes(value, constants), constants.reduction, logged, keep)
