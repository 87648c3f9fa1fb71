"""What a call of an operator is allowed to skip, and how numbers and tensors are told apart.

The operators of this library are opaque to the compiler. Where nobody would notice (`runs_plainly`), an operator's
implementation is called without it, which saves the dispatcher's microseconds.
"""

from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from .recognition import Recognition

# What the modules of the backends are called, after the family of operations.
_SUFFIXES = {"triton": "launch", "torch": "vectorized", "reference": "reference", "verify": "verify"}


def backend_modules(family: str) -> Callable[[str], Any]:
    """A function from a backend's name to its module, imported at the first use, since Triton may be absent."""

    @cache
    def backend_module(name: str) -> Any:
        return import_module(f".{family}_{_SUFFIXES[name]}", __package__)

    return backend_module


def tensors_among(fields: Iterable[Any]) -> list[Tensor]:
    """Those of the ``fields`` that are tensors. Usual other types are ruled out first: `isinstance` takes longer."""
    return [x for x in fields if type(x) not in _NO_TENSORS and isinstance(x, Tensor)]


_NO_TENSORS = frozenset((float, int, bool, str, list, type(None)))


def runs_plainly(operator: Hashable, arguments: Sequence[Any]) -> bool:
    """Whether ``operator`` would do nothing with these arguments but call its implementation, unseen by anybody."""
    if not is_unwatched():
        return False
    tensors, plain = _plain_forms(operator, arguments)
    if plain is None:
        plain = are_plain(tensors)
        _plain_forms.remember(operator, arguments, plain)
    return plain


# Whether the tensors that operators were called with are plain.
_plain_forms = Recognition()


def is_unwatched() -> bool:
    """Whether this is eager mode, and nobody is told what is called.

    That is no mode that intercepts functions or operators (``FakeTensorMode``, ``make_fx``, a counter of operators),
    no transform of ``torch.func``, and neither ``torch.jit.trace`` nor a profiler recording.
    """
    return not (
        torch.compiler.is_compiling()
        or _dispatch_modes()
        or _function_modes()
        or _transform() is not None
        or _trace() is not None
        or _profiler()
    )


def are_plain(tensors: Collection[Tensor]) -> bool:
    """Whether the tensors are of no subclass (fake tensors are one) and their memory is what they say.

    It isn't in a negated tensor, such as the imaginary part of a conjugate, nor in one that has outlived a transform.
    """
    return (
        _PLAIN.issuperset(map(type, tensors))
        and not any(map(_is_meta, tensors))
        and not any(map(_is_wrapped, tensors))
        and not any(map(Tensor.is_neg, tensors))
    )


def called(operator: Any, implementation: Callable[..., Any], *arguments: Any) -> Any:
    """What ``operator`` gives: asked for by its implementation where that is all that the operator would do."""
    return (implementation if runs_plainly(operator, arguments) else operator)(*arguments)


# Looked up once, and mapped without a loop in Python: these are a fair part of what a call costs.
_PLAIN = frozenset((Tensor, Parameter))
requires_grad = Tensor.requires_grad.__get__  # type: ignore[attr-defined]  # the getter of a property in C
_is_meta = Tensor.is_meta.__get__  # type: ignore[attr-defined]  # likewise
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._is_torch_function_mode_enabled
_transform = torch._C._functorch.peek_interpreter_stack
_trace = torch._C._get_tracing_state
_profiler = torch.autograd._profiler_enabled


def numbers_and_tensors(scalars: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Tensor | None]]:
    """The ``scalars`` with None for those that are tensors, and these, with None for the others."""
    if not tensors_among(scalars):
        return scalars, [None] * len(scalars)
    return [None if isinstance(x, Tensor) else x for x in scalars], [
        x if isinstance(x, Tensor) else None for x in scalars
    ]


def wants_gradient(x: Tensor) -> bool:
    """`Tensor.requires_grad`, also of a tensor over which `torch.vmap` maps: one that it shows says no."""
    if torch.compiler.is_compiling():
        return x.requires_grad
    while not x.requires_grad:
        if not _is_wrapped(x):
            return False
        x = torch._C._functorch.get_unwrapped(x)
    return True


def constant(x: Any) -> Any:
    """``x``, if it is a tensor without gradient of either mode."""
    # In a transform of torch.func a tensor may hide that a gradient is wanted of it, see `wants_gradient`.
    if isinstance(x, Tensor) and (x.requires_grad or forward_ad._current_level >= 0 or in_transform()):
        return x.detach()
    return x


def in_transform() -> bool:
    """Whether a transform of `torch.func` is active, in compiled code too."""
    return torch._C._are_functorch_transforms_active()


def number_or_tensor(x: float | Tensor | None, like: Tensor | None = None) -> tuple[float | None, Tensor | None]:
    """A scalar as an operator's pair of arguments, of which one is None; see `as_input` for ``like``."""
    if like is not None:
        x = as_input(x, like)
    return (None, x) if isinstance(x, Tensor) else (x, None)


def as_input(x: Any, like: Tensor) -> Any:
    """``x``, but while this is compiled a number becomes a 0-d tensor on the device of ``like``.

    A number that changes is an input of compiled code as far as arithmetic with tensors goes. As an argument of any
    other operator it is part of the code, which is compiled anew for each number.
    """
    if isinstance(x, float) and torch.compiler.is_compiling():
        return like.new_ones((), dtype=torch.float64) * x
    return x
