"""From a checked recurrence to its solution: opaque operators, and the autograd.Function around them.

The operators ``fusedrl::recurrence`` and ``fusedrl::recurrence_backward`` hide every backend from the compiler,
so that compile time doesn't depend on the length of time and nothing inside is traced.
"""

import inspect
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .backend import resolve_backend
from .recurrence import Recurrence, Scalar, checked, fit
from .second_order import differentiable_backward

# Where each backend's `forward` and `backward` live; imported at the first use, since Triton may be absent.
_BACKEND_MODULES = {
    "triton": ".launch",
    "torch": ".vectorized",
    "reference": ".loop",
    "verify": ".verify",
}

_ARGUMENTS = (
    "str kind, str backend, int time_dim, float? gamma_number, Tensor? gamma, float? lmbda_number, Tensor? lmbda, "
    "Tensor reward, Tensor? value, Tensor? next_value, Tensor? done, Tensor? terminated"
)
_library = torch.library.Library("fusedrl", "DEF")
_library.define(f"recurrence({_ARGUMENTS}) -> Tensor[]")
_library.define(f"recurrence_backward({_ARGUMENTS}, Tensor? y, Tensor?[] grads, bool[] needs) -> Tensor[]")


def solve(problem: Recurrence, time_dim: int, backend: str | None) -> Sequence[Tensor]:
    """The outputs of ``problem`` (see `fusedrl.kernels.recurrence`), differentiable.

    Raises what `checked` and `resolve_backend` raise, before anything is computed.
    """
    problem, time_dim = checked(problem, time_dim)
    name = resolve_backend(backend, problem.reward)
    differentiated = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in problem[1:6])
    # Forward-mode tangents don't show in requires_grad. _Solve has no rule for them and says so.
    if differentiated or forward_ad._current_level >= 0:
        return _Solve.apply(name, time_dim, *problem)
    return _forward(name, time_dim, problem)


def backend_module(name: str) -> Any:
    """The module with the ``forward`` and ``backward`` of backend ``name``."""
    return import_module(_BACKEND_MODULES[name], __package__)


class _Solve(torch.autograd.Function):
    """Inputs: backend, time_dim, then the fields of `Recurrence`. γ and λ get gradients if they are tensors."""

    @staticmethod
    def forward(name: str, time_dim: int, *fields: Any) -> tuple[Tensor, ...]:
        return tuple(_forward(name, time_dim, Recurrence(*fields)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        name, time_dim, kind, *fields = inputs
        ctx.set_materialize_grads(False)
        ctx.settings = name, time_dim, kind
        ctx.numbers = [None if isinstance(x, Tensor) else x for x in fields]
        # y enters only the gradients of γ and λ.
        y = output[0] if any(isinstance(x, Tensor) and x.requires_grad for x in fields[:2]) else None
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in fields), y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        name, time_dim, kind = ctx.settings
        *tensors, y = ctx.saved_tensors
        problem = Recurrence(kind, *(n if t is None else t for t, n in zip(tensors, ctx.numbers, strict=True)))
        needs = list(ctx.needs_input_grad[3:8])
        if all(g is None for g in grads):
            found: Sequence[Tensor | None] = [None] * sum(needs)
        elif torch.is_grad_enabled() and not torch.compiler.is_compiling():
            found = differentiable_backward(lambda inner: solve(inner, time_dim, name), time_dim, problem, grads, needs)
        else:
            found = _backward(name, time_dim, problem, y, grads, needs)
        results = iter(found)
        return (None, None, None, *(next(results) if need else None for need in needs), None, None)


# What `apply` looks up in every call; found once.
_Solve.forward.__signature__ = inspect.signature(_Solve.forward)  # type: ignore[attr-defined]  # functions take attributes


def _forward(name: str, time_dim: int, problem: Recurrence) -> list[Tensor]:
    return torch.ops.fusedrl.recurrence(problem.kind, name, time_dim, *_flatten(problem))


def _backward(
    name: str,
    time_dim: int,
    problem: Recurrence,
    y: Tensor | None,
    grads: Sequence[Tensor | None],
    needs: list[bool],
) -> list[Tensor]:
    return torch.ops.fusedrl.recurrence_backward(
        problem.kind, name, time_dim, *_flatten(problem), y, list(grads), needs
    )


def _flatten(problem: Recurrence) -> list[Any]:
    """The fields after ``kind`` as the operators take them: γ and λ as a pair (number, tensor)."""
    _, gamma, lmbda, *tensors = problem
    return [*number_or_tensor(gamma), *number_or_tensor(lmbda), *tensors]


def number_or_tensor(x: Scalar | None) -> tuple[float | None, Tensor | None]:
    """A scalar as an operator's pair of arguments, of which one is None."""
    return (None, x) if isinstance(x, Tensor) else (x, None)


def _recurrence(
    kind: str,
    backend: str,
    time_dim: int,
    gamma_number: float | None,
    gamma: Tensor | None,
    lmbda_number: float | None,
    lmbda: Tensor | None,
    *tensors: Any,
) -> list[Tensor]:
    problem = Recurrence(
        kind,
        gamma_number if gamma is None else gamma,
        lmbda_number if lmbda is None else lmbda,
        *tensors,
    )
    if problem.reward.numel() == 0:
        return problem.new_outputs()
    return backend_module(backend).forward(problem, time_dim)


def _recurrence_backward(
    kind: str,
    backend: str,
    time_dim: int,
    gamma_number: float | None,
    gamma: Tensor | None,
    lmbda_number: float | None,
    lmbda: Tensor | None,
    reward: Tensor,
    value: Tensor | None,
    next_value: Tensor | None,
    done: Tensor | None,
    terminated: Tensor | None,
    y: Tensor | None,
    grads: list[Tensor | None],
    needs: list[bool],
) -> list[Tensor]:
    problem = Recurrence(
        kind,
        gamma_number if gamma is None else gamma,
        lmbda_number if lmbda is None else lmbda,
        reward,
        value,
        next_value,
        done,
        terminated,
    )
    wanted = [x for x, need in zip(problem[1:6], needs, strict=True) if need]
    if reward.numel() == 0:
        return [torch.zeros_like(x) for x in wanted]
    found = backend_module(backend).backward(problem, time_dim, y, grads, needs)
    return [fit(g, x) for g, x in zip(found, wanted, strict=True)]


def _recurrence_fake(
    kind: str,
    backend: str,
    time_dim: int,
    gamma_number: float | None,
    gamma: Tensor | None,
    lmbda_number: float | None,
    lmbda: Tensor | None,
    *tensors: Any,
) -> list[Tensor]:
    return Recurrence(kind, 0.0, None, *tensors).new_outputs()


def _recurrence_backward_fake(
    kind: str,
    backend: str,
    time_dim: int,
    gamma_number: float | None,
    gamma: Tensor | None,
    lmbda_number: float | None,
    lmbda: Tensor | None,
    reward: Tensor,
    value: Tensor | None,
    next_value: Tensor | None,
    done: Tensor | None,
    terminated: Tensor | None,
    y: Tensor | None,
    grads: list[Tensor | None],
    needs: list[bool],
) -> list[Tensor]:
    inputs = (gamma, lmbda, reward, value, next_value)
    return [torch.empty_like(x) for x, need in zip(inputs, needs, strict=True) if need and x is not None]


_library.impl("recurrence", _recurrence, "CompositeExplicitAutograd")
_library.impl("recurrence_backward", _recurrence_backward, "CompositeExplicitAutograd")
torch.library.register_fake("fusedrl::recurrence", _recurrence_fake, lib=_library)
torch.library.register_fake("fusedrl::recurrence_backward", _recurrence_backward_fake, lib=_library)
