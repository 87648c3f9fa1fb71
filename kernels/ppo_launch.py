"""Host side of the clipped surrogate's kernel: one or two launches; the ``triton`` backend."""

from typing import Any

import torch
from torch import Tensor

from .launching import TRITON_DTYPE, Launch, Launcher, Plan, Workspace, number_and_tensor, scalar
from .ppo_kernel import ROWS, clip_ppo_kernel
from .ppo_problem import PPOConstants, dtypes, outputs
from .samples_launch import WARPS, divided, index_type, phases, walked, with_stride


def forward(log_prob: Tensor, constants: PPOConstants, keep: bool) -> list[Tensor]:
    """The loss, what is logged, and the slope if it is to be kept."""
    old_log_prob, advantage, proximal_log_prob, mask, weights, low, high, max_ratio, normalize, reduction = constants
    _, precise = dtypes(log_prob, constants)
    found = outputs(log_prob, constants, keep)
    loss, *logged = found[:6]
    slope = found[6] if keep else None
    of_samples, of_batch = (loss, None) if reduction == "none" else (None, loss)
    tensors = walked((log_prob, old_log_prob, advantage, proximal_log_prob, mask, weights, of_samples, slope))
    scalars = [scalar(x, log_prob) for x in (low, high, max_ratio)]
    _clip_ppo((normalize, reduction, precise), *tensors[:6], *scalars, *tensors[6:], of_batch, *logged)
    return found


def _plan(settings: tuple[bool, str, torch.dtype], *arguments: Any) -> Plan:
    normalize, reduction, precise = settings
    log_prob, old_log_prob, advantage, proximal_log_prob, mask, weights, low, high, max_ratio, *written = arguments
    of_samples, slope, *of_batch = written
    tensors = log_prob, old_log_prob, advantage, proximal_log_prob, mask, weights, of_samples, slope
    parts = divided(log_prob, precise)
    mean = reduction == "mean"
    counts = normalize or mask is not None or (mean and weights is not None)
    # The count of finished programs starts at zero, which the first phase sees to if there is one.
    workspace = Workspace(ROWS.value * parts.programs + 1, precise, zeros=not counts)
    walk = list(map(with_stride, tensors))
    launches = [
        Launch(
            clip_ppo_kernel,
            parts.programs,
            [
                *walk[:6],
                *number_and_tensor(low),
                *number_and_tensor(high),
                *number_and_tensor(max_ratio),
                *walk[6:],
                *of_batch,
                workspace,
                log_prob.numel(),
                parts.tiles,
            ],
            COUNTS=first,
            SURROGATE=second,
            NORMALIZE=normalize,
            MEAN=mean,
            CAPPED=max_ratio is not None,
            DTYPE=TRITON_DTYPE[precise],
            INDEX=index_type(tensors, parts),
            BLOCK=parts.block,
            POWER=parts.power,
            num_warps=WARPS,
        )
        for first, second in phases(counts, parts)
    ]
    return Plan(launches, [workspace])


_clip_ppo = Launcher(_plan, one_shape=True)
