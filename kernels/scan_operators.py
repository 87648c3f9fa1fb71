"""From a checked recurrence to its solution: opaque operators, and the autograd.Function around them.

The operators ``fusedrl::recurrence`` and ``fusedrl::recurrence_backward`` hide every backend from the compiler,
so that compile time doesn't depend on the length of time and nothing inside is traced.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import scan_batching
from .backend import resolve_backend
from .checks import as_index
from .dispatch import (
    are_plain,
    backend_modules,
    in_transform,
    is_unwatched,
    number_or_tensor,
    numbers_and_tensors,
    runs_plainly,
    tensors_among,
    wants_gradient,
)
from .dtypes import laid_out_like
from .function import gradients_of_inputs, needs_of, plain_apply, signed
from .recognition import Recognition
from .scan_problem import Recurrence, checked, fit, with_one_mask
from .scan_second_order import differentiable_backward

# Each backend's module has a `forward` and a `backward`.
backend_module = backend_modules("scan")

_ARGUMENTS = (
    "str kind, str backend, int time_dim, float? gamma_number, Tensor? gamma, float? lmbda_number, Tensor? lmbda, "
    "Tensor reward, Tensor? value, Tensor? next_value, Tensor? done, Tensor? terminated"
)
_library = torch.library.Library("fusedrl", "DEF")
_library.define(f"recurrence({_ARGUMENTS}) -> Tensor[]")
_library.define(f"recurrence_backward({_ARGUMENTS}, Tensor? y, Tensor?[] grads, bool[] needs) -> Tensor[]")


def solve(
    problem: Recurrence, time_dim: int, backend: str | None, names: Mapping[str, str] | None = None
) -> Sequence[Tensor]:
    """The outputs of ``problem`` (see `fusedrl.kernels.scan_problem`), differentiable.

    Raises what `checked` and `resolve_backend` raise, before anything is computed; ``names`` are for `checked`.
    """
    name = resolve_backend(backend, problem.reward)
    problem = _seen_by_compiler(with_one_mask(problem))
    problem, dim, tensors, requires, plainly = _recognised_or_checked(problem, time_dim, names)
    # Forward-mode tangents don't show in requires_grad. _Solve has no rule for them and says so.
    if not (requires and torch.is_grad_enabled()) and forward_ad._current_level < 0:
        return _solved(problem, name, dim) if plainly else _forward(name, dim, problem)
    if plainly:
        return _solve_plainly((name, dim, problem), *tensors)
    return _Solve.apply(name, dim, *problem)


def _seen_by_compiler(problem: Recurrence) -> Recurrence:
    """``problem``, whose tensors say whether they require a gradient.

    In compiled code the very tensor that `torch.func` differentiates with respect to doesn't; what is computed of it
    does. What `torch.vmap` maps over never does there, so that operators have a rule for autograd as well as `_Solve`.
    """
    if not (torch.compiler.is_compiling() and in_transform()):
        return problem
    kind, *fields = problem
    return Recurrence(kind, *[x.view_as(x) if isinstance(x, Tensor) else x for x in fields])


def _recognised_or_checked(
    problem: Recurrence, time_dim: int, names: Mapping[str, str] | None
) -> tuple[Recurrence, int, tuple[Tensor, ...], bool, bool]:
    """What `checked` gives, the tensors, whether one of them requires a gradient, and whether operators run plainly."""
    unwatched = is_unwatched()
    if unwatched:
        # The kind is no part of the arguments' form, which has the types of strings alone.
        setting = problem.kind, as_index("time_dim", time_dim)
        tensors, known = _checked_forms(setting, problem)
        if known is not None:
            dim, requires = known
            return problem, dim, tensors, requires, True
    given = problem
    problem, dim = checked(problem, time_dim, names)
    tensors = tuple(tensors_among(problem))
    requires = any(map(wants_gradient, tensors))
    plainly = unwatched and are_plain(tensors)
    if plainly and problem is given:
        _checked_forms.remember(setting, problem, (dim, requires))
    return problem, dim, tensors, requires, plainly


# Problems that passed their checks, with tensors on which operators run plainly.
_checked_forms = Recognition()


@signed
class _Solve(torch.autograd.Function):
    """Inputs: backend, time_dim, then the fields of `Recurrence`. γ and λ get gradients if they are tensors."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, time_dim: int, *fields: Any) -> tuple[Tensor, ...]:
        return tuple(_forward(name, time_dim, Recurrence(*fields)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        name, time_dim, *fields = inputs
        _keep(ctx, name, time_dim, Recurrence(*fields), output[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[3:8])
        return gradients_of_inputs(ctx, _gradients(ctx.settings, ctx.saved_tensors, grads, needs))


class _SolvePlainly(torch.autograd.Function):
    """`_Solve` where `runs_plainly`. Inputs: what `_Solve` has as one, and then the tensors that are in it.

    Of each input PyTorch finds out whether it is a tensor, which takes long where it is none. The compiler and
    torch.func, who aren't there, would want forward and context apart, which takes longer too.
    """

    @staticmethod
    def forward(ctx: Any, call: tuple[str, int, Recurrence], *tensors: Tensor) -> tuple[Tensor, ...]:
        name, time_dim, problem = call
        outputs = tuple(_solved(problem, name, time_dim))
        _keep(ctx, name, time_dim, problem, outputs[0])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # each time that this is asked for, they are unpacked
        return gradients_of_inputs(ctx, _gradients(ctx.settings, saved, grads, needs_of(ctx, saved[:5])))


def _keep(ctx: Any, name: str, time_dim: int, problem: Recurrence, y: Tensor) -> None:
    """Save for backward what `_Solve` got, and what it found."""
    (gamma, lmbda), scalars = numbers_and_tensors(problem[1:3])
    needs_y = any(x is not None and wants_gradient(x) for x in scalars)  # it enters only the gradients of γ and λ
    ctx.settings = name, time_dim, problem.kind, gamma, lmbda
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*scalars, *problem[3:], y if needs_y else None)


def _gradients(
    settings: tuple[Any, ...], saved: Sequence[Tensor | None], grads: Sequence[Tensor | None], needs: list[bool]
) -> Sequence[Tensor | None]:
    """The gradients that are needed of γ, λ, reward, value and next value, of what `_keep` kept."""
    if all(g is None for g in grads):
        return [None] * sum(needs)
    name, time_dim, kind, gamma, lmbda = settings
    gamma_tensor, lmbda_tensor, *tensors, y = saved
    gamma = gamma if gamma_tensor is None else gamma_tensor
    lmbda = lmbda if lmbda_tensor is None else lmbda_tensor
    problem = Recurrence(kind, gamma, lmbda, *tensors)
    # A transform of torch.func enables gradients whether or not it goes on to differentiate this one.
    again = torch.is_grad_enabled() and any(x is not None and wants_gradient(x) for x in (*saved, *grads))
    if again and not torch.compiler.is_compiling():
        return differentiable_backward(lambda inner: solve(inner, time_dim, name), time_dim, problem, grads, needs)
    return _backward(name, time_dim, problem, y, grads, needs)


_solve_plainly = plain_apply(_SolvePlainly)


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
    if runs_plainly("recurrence_backward", (*problem, y, *grads)):
        return _solved_backward(problem, name, time_dim, y, grads, needs)
    return torch.ops.fusedrl.recurrence_backward(
        problem.kind, name, time_dim, *_flatten(problem), y, list(grads), needs
    )


def _flatten(problem: Recurrence) -> list[Any]:
    """The fields after ``kind`` as the operators take them: γ and λ as a pair (number, tensor)."""
    _, gamma, lmbda, *tensors = problem
    reward = problem.reward
    return [*number_or_tensor(gamma, reward), *number_or_tensor(lmbda, reward), *tensors]


def _gathered(kind: str, arguments: Sequence[Any]) -> Recurrence:
    """The problem of what `_flatten` gave."""
    gamma_number, gamma, lmbda_number, lmbda, *tensors = arguments
    gamma, lmbda = gamma_number if gamma is None else gamma, lmbda_number if lmbda is None else lmbda
    return Recurrence(kind, gamma, lmbda, *tensors)


def _recurrence(kind: str, backend: str, time_dim: int, *arguments: Any) -> list[Tensor]:
    return _solved(_gathered(kind, arguments), backend, time_dim)


def _solved(problem: Recurrence, backend: str, time_dim: int) -> list[Tensor]:
    if problem.reward.numel() == 0:
        return problem.new_outputs()
    return backend_module(backend).forward(problem, time_dim)


def _recurrence_backward(kind: str, backend: str, time_dim: int, *arguments: Any) -> list[Tensor]:
    *fields, y, grads, needs = arguments
    problem = _gathered(kind, fields)
    found = _solved_backward(problem, backend, time_dim, y, grads, needs)
    wanted = [x for x, need in zip(problem[1:6], needs, strict=True) if need]
    return [laid_out_like(g, x, x.dtype) for g, x in zip(found, wanted, strict=True)]


def _solved_backward(
    problem: Recurrence,
    backend: str,
    time_dim: int,
    y: Tensor | None,
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor]:
    wanted = [x for x, need in zip(problem[1:6], needs, strict=True) if need]
    if problem.reward.numel() == 0:
        return [torch.zeros_like(x) for x in wanted]
    found = backend_module(backend).backward(problem, time_dim, y, grads, needs)
    return [fit(g, x) for g, x in zip(found, wanted, strict=True)]


def _recurrence_fake(kind: str, backend: str, time_dim: int, *arguments: Any) -> list[Tensor]:
    return _gathered(kind, arguments).new_outputs()


def _recurrence_backward_fake(kind: str, backend: str, time_dim: int, *arguments: Any) -> list[Tensor]:
    *fields, _, _, needs = arguments
    problem = _gathered(kind, fields)
    return [torch.empty_like(x) for x, need in zip(problem[1:6], needs, strict=True) if need]


_library.impl("recurrence", _recurrence, "CompositeExplicitAutograd")
_library.impl("recurrence_backward", _recurrence_backward, "CompositeExplicitAutograd")
torch.library.register_fake("fusedrl::recurrence", _recurrence_fake, lib=_library)
torch.library.register_fake("fusedrl::recurrence_backward", _recurrence_backward_fake, lib=_library)
torch.library.register_vmap("fusedrl::recurrence", scan_batching.recurrence, lib=_library)
torch.library.register_vmap("fusedrl::recurrence_backward", scan_batching.recurrence_backward, lib=_library)


# For compiled code in which `torch.vmap` maps over what is differentiated: see `_seen_by_compiler`.
def _keep_of_operator(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    kind, name, time_dim, *fields = inputs
    _keep(ctx, name, time_dim, _gathered(kind, fields), output[0])


def _operator_backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    needs = [ctx.needs_input_grad[i] for i in (4, 6, 7, 8, 9)]
    found = iter(_gradients(ctx.settings, ctx.saved_tensors, grads, needs))
    gamma, lmbda, *others = (next(found) if need else None for need in needs)
    return None, None, None, None, gamma, None, lmbda, *others, None, None


torch.library.register_autograd(
    "fusedrl::recurrence", _operator_backward, setup_context=_keep_of_operator, lib=_library
)
