"""From a checked clipped surrogate to its loss: an opaque operator, differentiated as `fusedrl.kernels.samples` says.

The operator ``fusedrl::clip_ppo_loss`` hides every backend from the compiler.
"""

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from . import ppo_reference, ppo_vectorized
from .operators import number_or_tensor
from .ppo_problem import PPOConstants, outputs
from .samples import solver

# Where each backend's `forward` lives; imported at the first use, since Triton may be absent.
_BACKEND_MODULES = {
    "triton": ".ppo_launch",
    "torch": ".ppo_vectorized",
    "reference": ".ppo_reference",
    "verify": ".ppo_verify",
}

_library = torch.library.Library("fusedrl", "FRAGMENT")
_library.define(
    "clip_ppo_loss(str backend, bool keep, Tensor log_prob, Tensor old_log_prob, Tensor advantage, "
    "Tensor? proximal_log_prob, Tensor? mask, Tensor? weights, float? clip_low_number, Tensor? clip_low, "
    "float? clip_high_number, Tensor? clip_high, float? max_ratio_number, Tensor? max_ratio, bool normalize, "
    "str reduction) -> Tensor[]"
)


@cache
def backend_module(name: str) -> Any:
    """The module with the ``forward`` of backend ``name``."""
    return import_module(_BACKEND_MODULES[name], __package__)


def _run(name: str, keep: bool, log_prob: Tensor, constants: PPOConstants) -> list[Tensor]:
    *tensors, clip_low, clip_high, max_ratio, normalize, reduction = constants
    scalars = [part for x in (clip_low, clip_high, max_ratio) for part in number_or_tensor(x, log_prob)]
    return torch.ops.fusedrl.clip_ppo_loss(name, keep, log_prob, *tensors, *scalars, normalize, reduction)


def _constants(fields: tuple[Any, ...]) -> PPOConstants:
    *tensors, low_number, low, high_number, high, max_ratio_number, max_ratio, normalize, reduction = fields
    return PPOConstants._make(
        (
            *tensors,
            low_number if low is None else low,
            high_number if high is None else high,
            max_ratio_number if max_ratio is None else max_ratio,
            normalize,
            reduction,
        )
    )


def _clip_ppo_loss(backend: str, keep: bool, log_prob: Tensor, *fields: Any) -> list[Tensor]:
    # The formulas say what means over no samples are.
    module = backend_module(backend) if log_prob.numel() else ppo_reference
    return module.forward(log_prob, _constants(fields), keep)


def _clip_ppo_loss_fake(backend: str, keep: bool, log_prob: Tensor, *fields: Any) -> list[Tensor]:
    return outputs(log_prob, _constants(fields), keep)


_library.impl("clip_ppo_loss", _clip_ppo_loss, "CompositeExplicitAutograd")
torch.library.register_fake("fusedrl::clip_ppo_loss", _clip_ppo_loss_fake, lib=_library)

solve = solver(_run, ppo_reference.compose, ppo_vectorized.compose)
