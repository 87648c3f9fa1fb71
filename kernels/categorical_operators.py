"""From a checked categorical problem to the loss: opaque operators, and the autograd.Function around them.

The operators ``fusedrl::categorical_loss``, ``fusedrl::categorical_loss_backward`` and
``fusedrl::categorical_projection`` hide every backend from the compiler. The loss is linear in the log-probabilities
of the taken action and constant in everything else, so that its gradient is all that the projected distribution is
kept for.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import categorical_batching
from .backend import resolve_backend
from .categorical_problem import (
    Bellman,
    Transition,
    check_bellman,
    check_transition,
    flat,
    flat_bellman,
    flat_transition,
    loss_dtype,
    new_gradient,
)
from .checks import check_tensor
from .dispatch import backend_modules, called, in_transform, number_or_tensor, runs_plainly, wants_gradient
from .dtypes import compute_dtype
from .function import apply, signed

# Each backend's module has a `forward`, a `backward` and a `project`.
backend_module = backend_modules("categorical")

_BELLMAN = "Tensor support, Tensor reward, Tensor terminated, float? gamma_number, Tensor? gamma"
_library = torch.library.Library("fusedrl", "FRAGMENT")
_library.define(
    "categorical_loss(str backend, bool keep, Tensor log_prob, Tensor action, Tensor next_log_prob, "
    f"Tensor? next_online_log_prob, {_BELLMAN}) -> Tensor[]"
)
_library.define(
    "categorical_loss_backward(str backend, Tensor log_prob, Tensor action, Tensor projected, Tensor grad) -> Tensor"
)
_library.define(f"categorical_projection(str backend, Tensor prob, {_BELLMAN}) -> Tensor")


def loss(transition: Transition, bellman: Bellman, backend: str | None) -> Tensor:
    """The loss of each sample, differentiable in ``log_prob``.

    Raises what `check_transition` and `resolve_backend` raise, before anything is computed.
    """
    check_transition(transition, bellman)
    name = resolve_backend(backend, transition.log_prob)
    constants = _constants((*transition[1:], *bellman))
    if torch.compiler.is_compiling() and in_transform():
        return _composed(name, transition.log_prob, *constants)
    differentiated = torch.is_grad_enabled() and wants_gradient(transition.log_prob)
    # Forward-mode tangents don't show in requires_grad. _Loss has no rule for them and says so.
    if differentiated or forward_ad._current_level >= 0:
        function = _LossPlainly if runs_plainly(_loss_operator, (transition.log_prob, *constants)) else _Loss
        return apply(function, name, transition.log_prob, *constants)[0]
    return _forward(name, False, transition.log_prob.detach(), *constants)[0]


def _composed(name: str, log_prob: Tensor, action: Tensor, *others: Any) -> Tensor:
    """The loss, of what autograd knows: in compiled code no tensor says what a transform wants of it."""
    projected = _forward(name, True, log_prob.detach(), action, *others)[1]
    taken = log_prob.gather(-1, _index_of_taken(action, projected)).squeeze(-1)
    return -torch.where(projected == 0, 0, projected * taken).sum(-1).to(loss_dtype(log_prob, others[3]))


def projection(prob: Tensor, bellman: Bellman, backend: str | None) -> Tensor:
    """The projected distribution, a constant to autograd.

    Raises what `check_bellman` and `resolve_backend` raise, before anything is computed.
    """
    check_tensor("prob", prob)
    if not prob.ndim or not prob.is_floating_point():
        raise RuntimeError(
            f"prob has shape {tuple(prob.shape)} and dtype {prob.dtype}: floating-point probabilities [*batch, atoms] "
            "are wanted"
        )
    check_bellman(bellman, prob.shape, prob.device)
    name = resolve_backend(backend, prob)
    *tensors, gamma = _constants(bellman)
    scalar = number_or_tensor(gamma, prob)
    return called(_projection_operator, _categorical_projection, name, prob.detach(), *tensors, *scalar)


@signed
class _Loss(torch.autograd.Function):
    """Inputs: backend, log_prob, then the other fields of `Transition` and those of `Bellman`, which are constants."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, log_prob: Tensor, *constants: Any) -> tuple[Tensor, Tensor]:
        loss, projected = _forward(name, True, log_prob, *constants)
        return loss, projected

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        name, log_prob, action, *_ = inputs
        _keep(ctx, name, log_prob, action, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        log_prob, action, projected = ctx.saved_tensors
        if grad is None:
            found = None
        elif torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # To be differentiated again: the same gradient, composed of what autograd knows.
            values = (-projected * grad[..., None]).to(log_prob.dtype)
            found = torch.zeros_like(log_prob).scatter(-1, _index_of_taken(action, projected), values[..., None])
        else:
            inputs = ctx.name, log_prob, action, projected, grad
            found = called(_loss_backward_operator, _categorical_loss_backward, *inputs)
        return None, found, *[None] * 7


class _LossPlainly(torch.autograd.Function):
    """`_Loss` where `runs_plainly`. The compiler and torch.func want forward and context apart, which takes longer."""

    @staticmethod
    def forward(ctx: Any, name: str, log_prob: Tensor, *constants: Any) -> tuple[Tensor, Tensor]:
        loss, projected = _forward(name, True, log_prob, *constants)
        _keep(ctx, name, log_prob, constants[0], projected)
        return loss, projected

    backward = _Loss.backward


def _keep(ctx: Any, name: str, log_prob: Tensor, action: Tensor, projected: Tensor) -> None:
    """Save for backward what `_Loss` got, and what it found."""
    ctx.name = name
    ctx.mark_non_differentiable(projected)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(log_prob, action, projected)


def _index_of_taken(action: Tensor, projected: Tensor) -> Tensor:
    """Where the log-probabilities of the taken action are among those of all, shape ``[*B, atoms, 1]``."""
    return action.long()[..., None, None].expand(*projected.shape, 1)


def _constants(tensors: tuple[Any, ...]) -> list[Any]:
    hidden = in_transform()  # whether a gradient is wanted of a tensor
    return [x.detach() if isinstance(x, Tensor) and (hidden or x.requires_grad) else x for x in tensors]


def _forward(name: str, keep: bool, *fields: Any) -> list[Tensor]:
    *tensors, gamma = fields
    return called(_loss_operator, _categorical_loss, name, keep, *tensors, *number_or_tensor(gamma, tensors[0]))


def _bellman(
    support: Tensor, reward: Tensor, terminated: Tensor, gamma_number: float | None, gamma: Tensor | None
) -> Bellman:
    return flat_bellman(Bellman(support, reward, terminated, gamma_number if gamma is None else gamma))


def _categorical_loss(backend: str, keep: bool, *fields: Any) -> list[Tensor]:
    transition = Transition(*fields[:4])
    batch = transition.action.shape
    if batch.numel() == 0:
        return _categorical_loss_fake(backend, keep, *fields)
    found = backend_module(backend).forward(flat_transition(transition), _bellman(*fields[4:]), keep)
    return found if len(batch) == 1 else [x.view(batch + x.shape[1:]) for x in found]


def _categorical_loss_fake(backend: str, keep: bool, log_prob: Tensor, *fields: Any) -> list[Tensor]:
    *batch, atoms = log_prob.shape[:-1]
    projected = [log_prob.new_empty(*batch, atoms, dtype=compute_dtype(log_prob.dtype))] if keep else []
    reward = fields[4]  # behind the other three of the transition and the support
    return [log_prob.new_empty(batch, dtype=loss_dtype(log_prob, reward)), *projected]


def _categorical_loss_backward(
    backend: str, log_prob: Tensor, action: Tensor, projected: Tensor, grad: Tensor
) -> Tensor:
    if action.numel() == 0:
        return torch.zeros_like(log_prob)
    found = backend_module(backend).backward(
        flat(log_prob, 2), action.reshape(-1), flat(projected, 1), grad.reshape(-1)
    )
    return found.view(log_prob.shape)


def _categorical_loss_backward_fake(backend: str, log_prob: Tensor, *_: Tensor) -> Tensor:
    return new_gradient(log_prob).view(log_prob.shape)


def _categorical_projection(backend: str, prob: Tensor, *fields: Any) -> Tensor:
    if prob.numel() == 0:
        return _categorical_projection_fake(backend, prob)
    return backend_module(backend).project(flat(prob, 1), _bellman(*fields)).view(prob.shape)


def _categorical_projection_fake(backend: str, prob: Tensor, *_: Any) -> Tensor:
    return prob.new_empty(prob.shape)


for _name, _implementation, _fake, _mapped in (
    ("categorical_loss", _categorical_loss, _categorical_loss_fake, categorical_batching.loss),
    (
        "categorical_loss_backward",
        _categorical_loss_backward,
        _categorical_loss_backward_fake,
        categorical_batching.loss_backward,
    ),
    ("categorical_projection", _categorical_projection, _categorical_projection_fake, categorical_batching.projection),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fusedrl::{_name}", _fake, lib=_library)
    torch.library.register_vmap(f"fusedrl::{_name}", _mapped, lib=_library)

# Bound once: an attribute of torch.ops is found anew in each call.
_loss_operator = torch.ops.fusedrl.categorical_loss.default
_loss_backward_operator = torch.ops.fusedrl.categorical_loss_backward.default
_projection_operator = torch.ops.fusedrl.categorical_projection.default
