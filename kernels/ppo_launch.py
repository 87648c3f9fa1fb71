"""Host side of the clipped surrogate's kernel: one or two launches; the ``triton`` backend."""

import torch
from torch import Tensor

from .ppo_kernel import ROWS, clip_ppo_kernel
from .ppo_problem import PPOConstants, dtypes, outputs
from .samples_launch import TRITON_DTYPE, WARPS, divided, index_type, phases, scalar_arguments, walked


def forward(log_prob: Tensor, constants: PPOConstants, keep: bool) -> list[Tensor]:
    """The loss, what is logged, and the slope if it is to be kept."""
    old_log_prob, advantage, proximal_log_prob, mask, weights, low, high, max_ratio, normalize, reduction = constants
    _, precise = dtypes(log_prob, constants)
    found = outputs(log_prob, constants, keep)
    loss, logged, slope = found[0], tuple(found[1:6]), found[6] if keep else None
    loss_of_sample = loss if reduction == "none" else None
    tensors = (log_prob, old_log_prob, advantage, proximal_log_prob, mask, weights, loss_of_sample, slope)
    walk = walked(tensors)
    parts = divided(log_prob, precise)
    mean = reduction == "mean"
    counts = normalize or mask is not None or (mean and weights is not None)
    # The count of finished programs starts at zero, which the first phase sees to if there is one.
    new = log_prob.new_empty if counts else log_prob.new_zeros
    workspace = new(ROWS.value * parts.programs + 1, dtype=precise)
    device = log_prob.device
    with torch.cuda.device_of(log_prob):
        for first, second in phases(counts, parts):
            clip_ppo_kernel[parts.programs,](
                *walk[:6],
                *scalar_arguments(low, device),
                *scalar_arguments(high, device),
                *scalar_arguments(max_ratio, device),
                *walk[6:],
                None if reduction == "none" else loss,
                logged,
                workspace,
                log_prob.numel(),
                parts.tiles,
                COUNTS=first,
                SURROGATE=second,
                NORMALIZE=normalize,
                MEAN=mean,
                CAPPED=max_ratio is not None,
                DTYPE=TRITON_DTYPE[precise],
                INDEX=index_type(walk, parts),
                BLOCK=parts.block,
                POWER=parts.power,
                num_warps=WARPS,
            )
    return found
