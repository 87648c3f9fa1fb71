"""Host side of the clipped surrogate's kernel: one or two launches; the ``triton`` backend."""

from typing import Any

import torch
from torch import Tensor

from .launching import Launcher, Plan, scalar, scalar_arguments
from .ppo_kernel import ROWS, clip_ppo_kernel
from .ppo_problem import PPOConstants, dtypes, outputs
from .samples_launch import plan, walked, with_stride


def forward(log_prob: Tensor, constants: PPOConstants, keep: bool) -> list[Tensor]:
    """The loss, what is logged, and the slope if it is to be kept."""
    old_log_prob, advantage, proximal_log_prob, mask, weights, low, high, max_ratio, normalize, reduction = constants
    _, precise = dtypes(log_prob, constants)
    found = outputs(log_prob, constants, keep)
    loss, *logged = found
    slope = logged.pop() if keep else None
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
    mean = reduction == "mean"
    walk = list(map(with_stride, tensors))
    scalars = *scalar_arguments(low), *scalar_arguments(high), *scalar_arguments(max_ratio)
    return plan(
        clip_ppo_kernel,
        "SURROGATE",
        tensors,
        [*walk[:6], *scalars, *walk[6:], *of_batch],
        counts=normalize or mask is not None or (mean and weights is not None),
        rows=ROWS.value,
        precise=precise,
        NORMALIZE=normalize,
        MEAN=mean,
        CAPPED=max_ratio is not None,
    )


_clip_ppo = Launcher(_plan)
