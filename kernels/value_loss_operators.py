"""From a checked critic's loss to its value: an opaque operator, differentiated as `fusedrl.kernels.samples` says.

The operator ``fusedrl::value_loss`` hides every backend from the compiler.
"""

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from . import value_loss_reference, value_loss_vectorized
from .operators import number_or_tensor
from .samples import solver
from .value_loss_problem import ValueConstants, outputs

# Where each backend's `forward` lives; imported at the first use, since Triton may be absent.
_BACKEND_MODULES = {
    "triton": ".value_loss_launch",
    "torch": ".value_loss_vectorized",
    "reference": ".value_loss_reference",
    "verify": ".value_loss_verify",
}

_library = torch.library.Library("fusedrl", "FRAGMENT")
_library.define(
    "value_loss(str backend, bool keep, Tensor value, Tensor value_target, Tensor? old_value, Tensor? mask, "
    "Tensor? weights, float? clip_number, Tensor? clip, float? coefficient_number, Tensor? coefficient, "
    "str loss_function, bool explained_variance, str reduction) -> Tensor[]"
)


@cache
def backend_module(name: str) -> Any:
    """The module with the ``forward`` of backend ``name``."""
    return import_module(_BACKEND_MODULES[name], __package__)


def _run(name: str, keep: bool, value: Tensor, constants: ValueConstants) -> list[Tensor]:
    *tensors, clip, coefficient, loss_function, explained_variance, reduction = constants
    scalars = (*number_or_tensor(clip, value), *number_or_tensor(coefficient, value))
    return torch.ops.fusedrl.value_loss(
        name, keep, value, *tensors, *scalars, loss_function, explained_variance, reduction
    )


def _constants(fields: tuple[Any, ...]) -> ValueConstants:
    *tensors, clip_number, clip, coefficient_number, coefficient, loss_function, explained, reduction = fields
    return ValueConstants._make(
        (
            *tensors,
            clip_number if clip is None else clip,
            coefficient_number if coefficient is None else coefficient,
            loss_function,
            explained,
            reduction,
        )
    )


def _value_loss(backend: str, keep: bool, value: Tensor, *fields: Any) -> list[Tensor]:
    # The formulas say what means over no samples are.
    module = backend_module(backend) if value.numel() else value_loss_reference
    return module.forward(value, _constants(fields), keep)


def _value_loss_fake(backend: str, keep: bool, value: Tensor, *fields: Any) -> list[Tensor]:
    return outputs(value, _constants(fields), keep)


_library.impl("value_loss", _value_loss, "CompositeExplicitAutograd")
torch.library.register_fake("fusedrl::value_loss", _value_loss_fake, lib=_library)

solve = solver(_run, value_loss_reference.compose, value_loss_vectorized.compose)
