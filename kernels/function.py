"""Autograd functions, applied without what only transforms of functions need."""

from typing import Any

import torch
from torch.autograd import Function


def apply(function: type[Function], *arguments: Any) -> Any:
    """``function.apply(*arguments)``, at a third of its cost to the host.

    What is left out binds the arguments to the signature of ``forward``, for `torch.func` and for default arguments, of
    which there are none here.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    return super(Function, function).apply(*arguments)  # type: ignore[misc]  # torch._C._FunctionBase, untyped
