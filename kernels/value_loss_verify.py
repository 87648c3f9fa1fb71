"""The ``verify`` backend of the critic's loss: what ``auto`` picks, compared with the reference in float64."""

from typing import Any

import torch
from torch import Tensor

from . import value_loss_reference
from .backend import fastest_backend
from .samples_verify import compare_all, factors, in_float64, share_scale, size_of, undecided
from .value_loss_operators import backend_module
from .value_loss_problem import ValueConstants, dtypes, smallest_variance


def forward(value: Tensor, constants: ValueConstants, keep: bool) -> list[Tensor]:
    """The results of the fastest backend, once they agree with the reference.

    The slope of a sample that is no further than rounding from a kink isn't compared.

    Raises:
        VerificationError: a result differs; the message has the worst element's index and both values.

    """
    name = fastest_backend(value)
    found = backend_module(name).forward(value, constants, keep)
    dtype, precise = dtypes(value, constants)
    wanted = in_float64(constants)
    expected = value_loss_reference.forward(value.detach().double(), wanted, keep)
    mask = torch.ones_like(value, dtype=torch.bool) if wanted.mask is None else wanted.mask
    now: Any
    target: Any
    now, target, old, weights = (
        None if x is None else torch.where(mask, x, 0)
        for x in (value.detach().double(), wanted.value_target, wanted.old_value, wanted.weights)
    )
    coefficient = torch.as_tensor(1 if wanted.coefficient is None else wanted.coefficient).to(now).abs()
    factor = coefficient * factors(mask, weights, wanted.reduction)
    size = size_of(now, target, old)
    distance = size * (1 + size)
    near = undecided(now - target, size, precise) & (wanted.loss_function == "l1")
    names, scales = ["critic's loss"], [factor * distance if wanted.reduction == "none" else (factor * distance).sum()]
    if old is not None:
        clip = torch.as_tensor(wanted.clip).to(now)
        step = now - old
        error, other = (now - target).abs(), (old + step.clamp(-clip, clip) - target).abs()
        at_end = undecided(step.abs() - clip, size, precise)
        near |= at_end | ((step.abs() > clip) & undecided(error - other, size, precise))
        names.append("clip_fraction")
        scales.append(share_scale(at_end, mask, dtype))
    if wanted.explained_variance:
        smallest = smallest_variance(constants.value_target, dtype)
        variance = value_loss_reference.variance(target, mask).clamp_min(smallest)
        # The reference knows of no other floor of the variance than that of float64.
        expected[len(names)] = 1 - value_loss_reference.variance(now - target, mask) / variance
        names.append("explained_variance")
        scales.append(1 + size.square().max() / variance)
    compared = list(found)
    if keep:
        names.append("slope of value")
        scales.append(factor * (1 + size))
        compared[-1] = torch.where(near, expected[-1].to(found[-1].dtype), found[-1])
    compare_all(names, name, compared, expected, scales)
    return found
