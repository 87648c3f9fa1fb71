"""Host side of the critic's loss kernel: one or two launches; the ``triton`` backend."""

import torch
from torch import Tensor

from .samples_launch import TRITON_DTYPE, WARPS, divided, index_type, phases, scalar_arguments, walked
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
    loss_of_sample = loss if reduction == "none" else None
    walk = walked((value, target, old_value, mask, weights, loss_of_sample, slope))
    parts = divided(value, precise)
    mean = reduction == "mean"
    counts = mean and (mask is not None or weights is not None)
    # The count of finished programs starts at zero, which the first phase sees to if there is one.
    new = value.new_empty if counts else value.new_zeros
    workspace = new(ROWS.value * parts.programs + 1, dtype=precise)
    device = value.device
    with torch.cuda.device_of(value):
        for first, second in phases(counts, parts):
            value_loss_kernel[parts.programs,](
                *walk[:5],
                *scalar_arguments(clip, device),
                *scalar_arguments(1.0 if coefficient is None else coefficient, device),
                *walk[5:],
                None if reduction == "none" else loss,
                clip_fraction,
                explained,
                workspace,
                value.numel(),
                parts.tiles,
                smallest_variance(target, dtype),
                COUNTS=first,
                LOSSES=second,
                KIND=kind,
                MEAN=mean,
                DTYPE=TRITON_DTYPE[precise],
                INDEX=index_type(walk, parts),
                BLOCK=parts.block,
                POWER=parts.power,
                num_warps=WARPS,
            )
    return found
