"""From checked problems to targets and losses: the backend, and opaque operators and autograd.Functions around it.

The backends ``torch`` and ``reference`` are compositions that autograd, functional transforms and the compiler see
through. The kernels, and their verification, are hidden from the compiler in the operators ``fusedrl::action_value_…``.
A loss returns after its results what is kept for the gradient: the derivatives themselves, so that backward is one
product.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import action_value_reference as reference
from . import action_value_vectorized as vectorized
from .action_value_composed import Composed
from .action_value_problem import (
    Bootstrap,
    Improvement,
    Regression,
    check_bootstrap,
    check_improvement,
    check_regression,
    count_is_unknown,
)
from .backend import fastest_backend, resolve_backend
from .dispatch import as_input, backend_modules, called, constant, in_transform, number_or_tensor
from .dtypes import compute_dtype
from .function import aliases, apply, gradients_of_inputs, signed

_COMPOSITIONS: dict[str, Any] = {"torch": vectorized, "reference": reference}
# The modules of the others have a `target`, `ensemble`, `ensemble_backward`, `policy` and `policy_backward`.
_operator_module = backend_modules("action_value")

_BOOTSTRAP = (
    "Tensor next_values, Tensor reward, Tensor terminated, float? gamma_number, Tensor? gamma, Tensor? log_prob, "
    "float? alpha_number, Tensor? alpha"
)
_REGRESSION = (
    "Tensor values, Tensor target, Tensor? mask, Tensor? weights, str loss_function, str priority, bool per_member, "
    "str reduction"
)
_IMPROVEMENT = (
    "Tensor values, Tensor log_prob, float? alpha_number, Tensor? alpha, Tensor? mask, Tensor? weights, str reduction"
)
_library = torch.library.Library("fusedrl", "FRAGMENT")
_library.define(f"action_value_target(str backend, {_BOOTSTRAP}) -> Tensor[]")
_library.define(f"action_value_ensemble(str backend, bool keep, {_REGRESSION}) -> Tensor[]")
_library.define(f"action_value_ensemble_backward(str backend, {_REGRESSION}, Tensor[] kept, Tensor grad) -> Tensor")
_library.define(f"action_value_policy(str backend, bool keep, {_IMPROVEMENT}) -> Tensor[]")
_library.define(
    f"action_value_policy_backward(str backend, {_IMPROVEMENT}, Tensor[] kept, Tensor grad, bool[] needs) -> Tensor[]"
)


def target(problem: Bootstrap, backend: str | None) -> Sequence[Tensor]:
    """Value target and next value, constants to autograd.

    Raises what `check_bootstrap` and `resolve_backend` raise, before anything is computed.
    """
    check_bootstrap(problem)
    name = resolve_backend(backend, problem.next_values)
    constants = Bootstrap(*_constants(problem))
    if torch.compiler.is_compiling():
        numbers = {name: as_input(getattr(constants, name), constants.reward) for name in ("gamma", "alpha")}
        constants = constants._replace(**numbers)
    composition = _composition(name)
    if composition is not None:
        return composition.bootstrap(constants)
    next_values, reward, terminated, gamma, log_prob, alpha = constants
    scalars = number_or_tensor(gamma), number_or_tensor(alpha)
    return called(_target_operator, _target, name, next_values, reward, terminated, *scalars[0], log_prob, *scalars[1])


def ensemble(problem: Regression, backend: str | None) -> Sequence[Tensor]:
    """Loss and priority, the loss differentiable in the values.

    Raises what `check_regression` and `resolve_backend` raise, before anything is computed.
    """
    check_regression(problem)
    name = resolve_backend(backend, problem.values)
    problem = Regression(problem.values, *_constants(problem[1:]))
    composition = _composition(name)
    if composition is not None:
        return composition.regression(problem)
    if torch.is_grad_enabled() and problem.values.requires_grad:
        return apply(_Ensemble, name, *problem)[:2]
    return called(_ensemble_operator, _ensemble, name, False, *_constants(problem))


def policy(problem: Improvement, backend: str | None) -> Sequence[Tensor]:
    """Loss and entropy, the loss differentiable in the values and the log-probability.

    Raises what `check_improvement` and `resolve_backend` raise, before anything is computed.
    """
    check_improvement(problem)
    name = resolve_backend(backend, problem.values)
    problem = Improvement(*problem[:2], *_constants(problem[2:]))
    composition = _composition(name)
    if composition is not None:
        return composition.improvement(problem)
    if torch.is_grad_enabled() and (problem.values.requires_grad or problem.log_prob.requires_grad):
        return apply(_Policy, name, *problem)[:2]
    return called(_policy_operator, _policy, name, False, *_policy_arguments(_constants(problem)))


def _composition(name: str) -> Any:
    """The module whose functions autograd sees through, or None."""
    if forward_ad._current_level >= 0:
        return reference  # forward-mode tangents need operations that autograd knows
    if in_transform() and name not in _COMPOSITIONS:
        return vectorized  # of which torch.vmap and derivatives of every order know what to do
    return _COMPOSITIONS.get(name)


@cache
def backend_module(name: str) -> Any:
    """What has the passes of backend ``name``."""
    if name in _COMPOSITIONS:
        return Composed(_COMPOSITIONS[name])
    return _operator_module(name)


@signed
class _Ensemble(torch.autograd.Function):
    """Inputs: backend, then the fields of `Regression`, all constants but the values."""

    @staticmethod
    def forward(name: str, *fields: Any) -> tuple[Tensor, ...]:
        return tuple(called(_ensemble_operator, _ensemble, name, True, *fields))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.name, values, target, mask, weights, *ctx.settings = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(values, target, mask, weights, *output[2:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        values, target, mask, weights, *kept = ctx.saved_tensors
        constants = (target, mask, weights, *ctx.settings)
        if grad is None:
            found = None
        elif torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # To be differentiated again: the same gradient, composed of what autograd knows.
            loss = reference.regression(Regression(values, *constants))[0]
            (found,) = torch.autograd.grad(loss, values, grad, create_graph=True)
        else:
            found = called(_ensemble_backward_operator, _ensemble_backward, ctx.name, values, *constants, kept, grad)
        return gradients_of_inputs(ctx, [found])


@signed
class _Policy(torch.autograd.Function):
    """Inputs: backend, then the fields of `Improvement`, all constants but the values and the log-probability."""

    @staticmethod
    def forward(name: str, *fields: Any) -> tuple[Tensor, ...]:
        return tuple(called(_policy_operator, _policy, name, True, *_policy_arguments(fields)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.name, values, log_prob, alpha, mask, weights, ctx.reduction = inputs
        ctx.alpha, alpha = number_or_tensor(alpha)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(values, log_prob, alpha, mask, weights, *output[2:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        values, log_prob, alpha, mask, weights, *kept = ctx.saved_tensors
        alpha = ctx.alpha if alpha is None else alpha
        problem = Improvement(values, log_prob, alpha, mask, weights, ctx.reduction)
        needs = list(ctx.needs_input_grad[1:3])
        if grad is None:
            found: Sequence[Tensor | None] = [None] * sum(needs)
        elif torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # To be differentiated again: the same gradients, composed of what autograd knows.
            values, log_prob = aliases((values, log_prob))
            loss = reference.improvement(Improvement(values, log_prob, *problem[2:]))[0]
            inputs = [x for x, need in zip((values, log_prob), needs, strict=True) if need]
            found = torch.autograd.grad(loss, inputs, grad, create_graph=True)
        else:
            found = called(
                _policy_backward_operator, _policy_backward, ctx.name, *_policy_arguments(problem), kept, grad, needs
            )
        return gradients_of_inputs(ctx, found)


def _constants(fields: Sequence[Any]) -> list[Any]:
    return [constant(x) for x in fields]


def _policy_arguments(fields: Sequence[Any]) -> list[Any]:
    """The fields of an `Improvement` as the operators take them: α as a pair (number, tensor)."""
    values, log_prob, alpha, *rest = fields
    return [values, log_prob, *number_or_tensor(alpha, values), *rest]


# --- the operators ------------------------------------------------------------------------------------------------


def _bootstrap(
    next_values: Tensor,
    reward: Tensor,
    terminated: Tensor,
    gamma_number: float | None,
    gamma: Tensor | None,
    log_prob: Tensor | None,
    alpha_number: float | None,
    alpha: Tensor | None,
) -> Bootstrap:
    return Bootstrap(
        next_values,
        reward,
        terminated,
        gamma_number if gamma is None else gamma,
        log_prob,
        alpha_number if alpha is None else alpha,
    )


def _improvement(
    values: Tensor, log_prob: Tensor, alpha_number: float | None, alpha: Tensor | None, *rest: Any
) -> Improvement:
    return Improvement(values, log_prob, alpha_number if alpha is None else alpha, *rest)


def _target(backend: str, *fields: Any) -> list[Tensor]:
    return backend_module(backend).target(_bootstrap(*fields))


def _target_fake(backend: str, *fields: Any) -> list[Tensor]:
    problem = _bootstrap(*fields)
    return [problem.reward.new_empty(problem.reward.shape, dtype=problem.dtype) for _ in range(2)]


def _ensemble(backend: str, keep: bool, *fields: Any) -> list[Tensor]:
    return backend_module(backend).ensemble(Regression(*fields), keep)


def _ensemble_fake(backend: str, keep: bool, *fields: Any) -> list[Tensor]:
    problem = Regression(*fields)
    new = problem.target.new_empty
    results = [new(shape, dtype=problem.dtype) for shape in (problem.loss_shape, problem.target.shape)]
    return results + (_kept_fake(backend, problem, problem.values.shape) if keep else [])


def _ensemble_backward(backend: str, *fields: Any) -> Tensor:
    *problem, kept, grad = fields
    return backend_module(backend).ensemble_backward(Regression(*problem), kept, grad)


def _ensemble_backward_fake(backend: str, values: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(values)


def _policy(backend: str, keep: bool, *fields: Any) -> list[Tensor]:
    return backend_module(backend).policy(_improvement(*fields), keep)


def _policy_fake(backend: str, keep: bool, *fields: Any) -> list[Tensor]:
    problem = _improvement(*fields)
    results = [problem.values.new_empty(shape, dtype=problem.dtype) for shape in (problem.loss_shape, ())]
    return results + (_kept_fake(backend, problem, problem.values.shape, problem.log_prob.shape) if keep else [])


def _policy_backward(backend: str, *fields: Any) -> list[Tensor]:
    *problem, kept, grad, needs = fields
    return backend_module(backend).policy_backward(_improvement(*problem), kept, grad, needs)


def _policy_backward_fake(backend: str, values: Tensor, log_prob: Tensor, *fields: Any) -> list[Tensor]:
    return [torch.empty_like(x) for x, need in zip((values, log_prob), fields[-1], strict=True) if need]


def _kept_fake(backend: str, problem: Regression | Improvement, *slopes: torch.Size) -> list[Tensor]:
    """What a backend keeps for the gradient."""
    name = fastest_backend(problem.values) if backend == "verify" else backend
    shapes: list[Sequence[int]] = list(slopes) if name == "triton" else []
    if count_is_unknown(problem) and name == "triton":
        shapes.append(())
    return [problem.values.new_empty(shape, dtype=compute_dtype(problem.dtype)) for shape in shapes]


for _name, _implementation, _fake in (
    ("action_value_target", _target, _target_fake),
    ("action_value_ensemble", _ensemble, _ensemble_fake),
    ("action_value_ensemble_backward", _ensemble_backward, _ensemble_backward_fake),
    ("action_value_policy", _policy, _policy_fake),
    ("action_value_policy_backward", _policy_backward, _policy_backward_fake),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fusedrl::{_name}", _fake, lib=_library)

# Bound once: an attribute of torch.ops is found anew in each call.
_target_operator = torch.ops.fusedrl.action_value_target.default
_ensemble_operator = torch.ops.fusedrl.action_value_ensemble.default
_ensemble_backward_operator = torch.ops.fusedrl.action_value_ensemble_backward.default
_policy_operator = torch.ops.fusedrl.action_value_policy.default
_policy_backward_operator = torch.ops.fusedrl.action_value_policy_backward.default
