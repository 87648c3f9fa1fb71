"""From the description of a loss over samples to the function that solves it, by an opaque operator.

The operator hides every backend from the compiler. It takes the backend's name, whether the slope is to be kept, x, and
the constants: a scalar as a number and a tensor, of which one is None.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .dispatch import number_or_tensor, runs_plainly
from .samples import solver

# The type of a constant that is a number or a 0-d tensor, or None.
SCALAR = "scalar"

_library = torch.library.Library("fusedrl", "FRAGMENT")


def loss_operator(
    name: str,
    x: str,
    constants: Any,
    types: Mapping[str, str],
    outputs: Callable[..., list[Tensor]],
    backend_module: Callable[[str], Any],
    slope_of: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Callable[[Tensor, Any, str | None], Sequence[Tensor]]:
    """Define the operator ``fusedrl::name``, and give the loss's `fusedrl.kernels.samples.solver`.

    Args:
        name: what the operator is called.
        x: what the tensor is called that the loss is a function of.
        constants: the NamedTuple of all else.
        types: the type of each of its fields, in the words of a schema: first tensors, then SCALAR, then options.
        outputs: ``outputs(x, constants, keep)`` gives uninitialised tensors of the shapes and dtypes of the results.
        backend_module: finds a backend's ``forward(x, constants, keep)``, and ``compose(x, constants)`` of the backends
            that autograd sees through.
        slope_of: see `fusedrl.kernels.samples.solver`.

    """
    kinds = [types[field] for field in constants._fields]
    # Where scalars are among the constants, and where the arguments made of them end.
    first, last = kinds.index(SCALAR), kinds.index(SCALAR) + kinds.count(SCALAR)
    end = first + 2 * (last - first)
    arguments = ", ".join(
        f"float? {field}_number, Tensor? {field}" if kind == SCALAR else f"{kind} {field}"
        for field, kind in zip(constants._fields, kinds, strict=True)
    )
    _library.define(f"{name}(str backend, bool keep, Tensor {x}, {arguments}) -> Tensor[]")
    operator = getattr(torch.ops.fusedrl, name).default

    def run(backend: str, keep: bool, x: Tensor, fields: Any) -> list[Tensor]:
        if runs_plainly(operator, (x, *fields)):
            return solved(backend, keep, x, fields)
        scalars = [part for scalar in fields[first:last] for part in number_or_tensor(scalar)]
        return operator(backend, keep, x, *fields[:first], *scalars, *fields[last:])

    def gathered(arguments: Sequence[Any]) -> Any:
        pairs = zip(arguments[first:end:2], arguments[first + 1 : end : 2], strict=True)
        scalars = (number if tensor is None else tensor for number, tensor in pairs)
        return constants._make((*arguments[:first], *scalars, *arguments[end:]))

    def solved(backend: str, keep: bool, x: Tensor, fields: Any) -> list[Tensor]:
        # The formulas say what means over no samples are.
        return backend_module(backend if x.numel() else "reference").forward(x, fields, keep)

    def implementation(backend: str, keep: bool, x: Tensor, *arguments: Any) -> list[Tensor]:
        return solved(backend, keep, x, gathered(arguments))

    def fake(backend: str, keep: bool, x: Tensor, *arguments: Any) -> list[Tensor]:
        return outputs(x, gathered(arguments), keep)

    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fusedrl::{name}", fake, lib=_library)
    return solver(run, backend_module("reference").compose, backend_module("torch").compose, first, slope_of)
