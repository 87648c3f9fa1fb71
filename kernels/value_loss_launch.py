"""Host side of the critic's loss kernel: one or two launches; the ``triton`` backend."""

from typing import Any

import torch
from torch import Tensor

from .launching import TRITON_DTYPE, Launch, Launcher, Plan, Workspace, number_and_tensor, scalar
from .samples_launch import WARPS, divided, index_type, phases, walked, with_stride
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
    parts = divided(value, precise)
    mean = reduction == "mean"
    counts = mean and (mask is not None or weights is not None)
    # The count of finished programs starts at zero, which the first phase sees to if there is one.
    workspace = Workspace(ROWS.value * parts.programs + 1, precise, zeros=not counts)
    walk = list(map(with_stride, tensors))
    launches = [
        Launch(
            value_loss_kernel,
            parts.programs,
            [
                *walk[:5],
                *number_and_tensor(clip),
                *number_and_tensor(coefficient),
                *walk[5:],
                *of_batch,
                workspace,
                value.numel(),
                parts.tiles,
                smallest_variance(target, dtype),
            ],
            COUNTS=first,
            LOSSES=second,
            KIND=kind,
            MEAN=mean,
            DTYPE=TRITON_DTYPE[precise],
            INDEX=index_type(tensors, parts),
            BLOCK=parts.block,
            POWER=parts.power,
            num_warps=WARPS,
        )
        for first, second in phases(counts, parts)
    ]
    return Plan(launches, [workspace])


_value_loss = Launcher(_plan, one_shape=True)
