"""Autograd functions, applied without what only transforms of functions need."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def signed(function: type[Function]) -> type[Function]:
    """A class decorator: the signature of ``forward``, which `Function.apply` looks up in every call, is found once."""
    function.forward.__signature__ = inspect.signature(function.forward)  # type: ignore[attr-defined]  # functions take attributes
    return function


def plain_apply(function: type[Function]) -> Callable[..., Any]:
    """``function.apply`` at a third of its cost to the host, for where no transform of `torch.func` is.

    What is left out binds the arguments to the signature of ``forward``, for the transforms and for default arguments,
    of which there are none here.
    """
    return super(Function, function).apply  # type: ignore[misc]  # torch._C._FunctionBase, untyped


def apply(function: type[Function], *arguments: Any) -> Any:
    """``function.apply(*arguments)``, by `plain_apply` where that is the same."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    return plain_apply(function)(*arguments)


@contextmanager
def autograd_inside() -> Iterator[None]:
    """Within the block autograd works, also in an operator, which compiled code and dispatch modes run below it."""
    with torch.enable_grad(), torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False):
        yield


def aliases(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Views of the ``tensors``, to differentiate with respect to what a Function got within the graph that it is in.

    Of two inputs one may be computed from the other, or be the other. With respect to the inputs themselves autograd
    finds total derivatives, in which such a path counts already, and then it would follow that path a second time.
    """
    return [x.view_as(x) for x in tensors]


def needs_of(ctx: Any, fields: Iterable[Tensor | None]) -> list[bool]:
    """Which of the ``fields`` want a gradient of a Function that is called with a problem and the tensors in it."""
    needed = iter(ctx.needs_input_grad[1:])
    return [x is not None and next(needed) for x in fields]


def gradients_of_inputs(ctx: Any, found: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
    """What ``backward`` returns: the gradients that were found of the inputs that want one, None for the others."""
    results = iter(found)
    return tuple([next(results) if need else None for need in ctx.needs_input_grad])
