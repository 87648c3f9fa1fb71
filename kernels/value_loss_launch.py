"""Host side of the critic's loss kernel: one or two launches; the ``triton`` backend."""

from typing import Any

import torch
from torch import Tensor

from .launching import Launcher, Plan, scalar, scalar_arguments
from .samples_launch import plan, walked, with_stride
from .value_loss_kernel import ROWS, value_loss_kernel
from .value_loss_problem import ValueConstants, dtypes, outputs, smallest_variance


def forward(value: Tensor, constants: ValueConstants, keep: bool) -> list[Tensor]:
    """The loss, what is logged, and the slope if it is to be kept."""
    target, old_value, mask, weights, clip, coefficient, kind, explained_variance, reduction = constants
    dtype, precise = dtypes(value, constants)
    found = outputs(value, constants, keep)
    rest = iter(found)
    loss = next(rest)
    clip_fraction = None if old_value is None else next(rest)
    explained = next(rest) if explained_variance else None
    slope = next(rest) if keep else None
    of_samples, of_batch = (loss, None) if reduction == "none" else (None, loss)
    tensors = walked((value, target, old_value, mask, weights, of_samples, slope))
    scalars = scalar(clip, value), scalar(1.0 if coefficient is None else coefficient, value)
    settings = kind, reduction, dtype, precise
    _value_loss(settings, *tensors[:5], *scalars, *tensors[5:], of_batch, clip_fraction, explained)
    return found


def _plan(settings: tuple[str, str, torch.dtype, torch.dtype], *arguments: Any) -> Plan:
    kind, reduction, dtype, precise = settings
    value, target, old_value, mask, weights, clip, coefficient, of_samples, slope, *of_batch = arguments
    tensors = value, target, old_value, mask, weights, of_samples, slope
    mean = reduction == "mean"
    walk = list(map(with_stride, tensors))
    return plan(
        value_loss_kernel,
        "LOSSES",
        tensors,
        [*walk[:5], *scalar_arguments(clip), *scalar_arguments(coefficient), *walk[5:], *of_batch],
        smallest_variance(target, dtype),
        counts=mean and (mask is not None or weights is not None),
        rows=ROWS.value,
        precise=precise,
        KIND=kind,
        MEAN=mean,
    )


_value_loss = Launcher(_plan)
