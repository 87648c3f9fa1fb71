"""From checked arguments to Gaussian log-probabilities, and the autograd.Functions around the kernels.

The backends ``torch`` and ``reference`` are compositions that autograd, functional transforms and the compiler see
through. The kernels, and their verification, are hidden from the compiler in the operators ``fusedrl::normal_log_prob``
and ``fusedrl::normal_sample`` and their backwards. Inputs are all that these keep, and compute from again.
"""

from collections.abc import Callable, Sequence
from numbers import Real
from reprlib import repr as short  # an array may be long
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import squashed_normal_reference as reference
from . import squashed_normal_vectorized as vectorized
from .backend import resolve_backend
from .checks import check_agrees, check_broadcasts, check_tensor
from .dispatch import backend_modules, called, constant, in_transform, number_or_tensor
from .dtypes import cast, result_dtype
from .function import aliases, apply, autograd_inside, gradients_of_inputs, signed
from .squashed_normal_problem import Bounds, Squash

_COMPOSITIONS: dict[str, Any] = {"torch": vectorized, "reference": reference}
# The modules of the others have the four functions of the operators.
backend_module = backend_modules("squashed_normal")

_SQUASH = "float? low_number, Tensor? low, float? high_number, Tensor? high, float? margin"
_library = torch.library.Library("fusedrl", "FRAGMENT")
_library.define(f"normal_log_prob(str backend, Tensor loc, Tensor scale, Tensor action, {_SQUASH}) -> Tensor")
_library.define(
    f"normal_log_prob_backward(str backend, Tensor loc, Tensor scale, Tensor action, {_SQUASH}, Tensor grad, "
    "bool[] needs) -> Tensor[]"
)
_library.define(f"normal_sample(str backend, Tensor loc, Tensor scale, Tensor noise, {_SQUASH}) -> (Tensor, Tensor)")
_library.define(
    f"normal_sample_backward(str backend, Tensor loc, Tensor scale, Tensor noise, {_SQUASH}, Tensor? grad_action, "
    "Tensor? grad_log_prob, bool[] needs) -> Tensor[]"
)


def log_prob(
    loc: Tensor, scale: Tensor, action: Tensor, squash: Bounds | None, margin: float | None, backend: str | None
) -> Tensor:
    """log π(a) of an action, differentiable.

    Raises what `_checked` and `resolve_backend` raise, before anything is computed.
    """
    interval = _checked("action", loc, scale, action, squash, margin)
    name = resolve_backend(backend, loc)
    composition = _composition(name)
    if composition is not None:
        return cast(composition.log_prob(loc, scale, action, interval), result_dtype(loc, scale, action))
    if torch.is_grad_enabled() and (loc.requires_grad or scale.requires_grad or action.requires_grad):
        return apply(_LogProb, name, loc, scale, action, interval)
    return _LogProb.forward(name, loc, scale, action, interval)


def sample(
    loc: Tensor, scale: Tensor, noise: Tensor, squash: Bounds | None, margin: float | None, backend: str | None
) -> tuple[Tensor, Tensor]:
    """An action and its log-probability, differentiable.

    Raises what `_checked` and `resolve_backend` raise, before anything is computed.
    """
    interval = _checked("noise", loc, scale, noise, squash, margin)
    name = resolve_backend(backend, loc)
    noise = constant(noise)
    composition = _composition(name)
    if composition is not None:
        action, found = composition.sample(loc, scale, noise, interval)
        dtype = result_dtype(loc, scale, noise)
        return cast(action, dtype), cast(found, dtype)
    if torch.is_grad_enabled() and (loc.requires_grad or scale.requires_grad):
        return apply(_Sample, name, loc, scale, noise, interval)
    return _Sample.forward(name, loc, scale, noise, interval)


def gradients(
    function: Callable[..., Any],
    tensors: Sequence[Tensor],
    interval: Squash | None,
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients that are needed of a composition's ``function``; with a graph if they come to have one."""
    create_graph = torch.is_grad_enabled()
    if create_graph:
        tensors = aliases(tensors)
    else:
        tensors = [x.detach().requires_grad_(need) for x, need in zip(tensors, needs, strict=True)]
    wanted = [x for x, need in zip(tensors, needs, strict=True) if need]
    with autograd_inside():
        outputs = function(*tensors, interval)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        used = [(o, g.to(o.dtype)) for o, g in zip(outputs, grads, strict=True) if o.requires_grad and g is not None]
        found = torch.autograd.grad(
            [o for o, _ in used],
            wanted,
            [g for _, g in used],
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
    return list(found)


def _composition(name: str) -> Any:
    """The module whose functions autograd sees through, or None."""
    if forward_ad._current_level >= 0 and name not in _COMPOSITIONS:
        return reference  # forward-mode tangents need operations that autograd knows
    if in_transform() and name not in _COMPOSITIONS:
        return vectorized  # of which torch.vmap and derivatives of every order know what to do
    return _COMPOSITIONS.get(name)


@signed
class _LogProb(torch.autograd.Function):
    """Inputs: backend, loc, scale, action, interval; the last one is a constant."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return called(*_OPERATORS["log_prob"], *_arguments(*inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _keep(ctx, *inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, "log_prob_backward", reference.log_prob, [grad])


@signed
class _Sample(torch.autograd.Function):
    """Inputs: backend, loc, scale, noise, interval; the last two are constants."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return called(*_OPERATORS["sample"], *_arguments(*inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        _keep(ctx, *inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, "sample_backward", reference.sample, grads)


def _keep(ctx: Any, name: str, loc: Tensor, scale: Tensor, third: Tensor, interval: Squash | None) -> None:
    bounds: Sequence[Tensor] = ()
    if interval is not None and isinstance(interval.low, Tensor):  # then so is the other one
        *bounds, margin = interval
        interval = Squash(None, None, margin)
    ctx.name, ctx.interval = name, interval
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(loc, scale, third, *bounds)


def _backward(
    ctx: Any, name: str, function: Callable[..., Any], grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The gradients of a Function's inputs: by the operator ``name``; where they get a graph, by a ``function``."""
    loc, scale, third, *bounds = ctx.saved_tensors
    interval = ctx.interval._replace(low=bounds[0], high=bounds[1]) if bounds else ctx.interval
    needs = ctx.needs_input_grad[1:4]
    found: Sequence[Tensor | None]
    if all(g is None for g in grads):
        found = [None] * sum(needs)
    elif torch.is_grad_enabled() and not torch.compiler.is_compiling():
        found = gradients(function, (loc, scale, third), interval, grads, needs)
    else:
        found = called(*_OPERATORS[name], *_arguments(ctx.name, loc, scale, third, interval), *grads, list(needs))
    return gradients_of_inputs(ctx, found)


def _checked(
    third_name: str, loc: Tensor, scale: Tensor, third: Tensor, squash: Bounds | None, margin: float | None
) -> Squash | None:
    """The interval that tanh squashes into, with both bounds numbers or both tensors.

    Raises:
        RuntimeError: a shape or device isn't that of loc, or there is no dimension.
        TypeError: a tensor is none, or isn't floating point; ``squash`` is no pair of numbers or tensors.
        ValueError: of two numbers low isn't less than high, or the margin isn't in [0, 1).

    """
    for name, x in (("loc", loc), ("scale", scale), (third_name, third)):
        check_tensor(name, x)
    if not loc.ndim:
        raise RuntimeError("loc has no dimension: [*batch, actions] is wanted")
    for name, x in (("scale", scale), (third_name, third)):
        check_agrees(name, x, "loc", loc)
    if not (loc.is_floating_point() and scale.is_floating_point() and third.is_floating_point()):
        dtypes = f"loc {loc.dtype}, scale {scale.dtype}, {third_name} {third.dtype}"
        raise TypeError(f"floating-point tensors are wanted, but the dtypes are {dtypes}")
    if squash is None:
        return None
    if margin is not None and not 0 <= margin < 1:
        raise ValueError(f"margin is {margin}: a number from 0 to below 1 is wanted")
    low, high = _pair(squash)
    if not isinstance(low, Tensor) and not isinstance(high, Tensor):
        if not low < high:
            raise ValueError(f"squash is ({low}, {high}): the first must be less than the second")
        return Squash(low, high, margin)
    return Squash(_checked_bound("low", low, loc), _checked_bound("high", high, loc), margin)


def _pair(squash: Any) -> tuple[Any, Any]:
    """Both bounds; a tensor may be one as well as hold both."""
    try:
        low, high = squash
    except (TypeError, ValueError):
        raise TypeError(f"squash must be a pair (low, high), but is {short(squash)}") from None
    for name, bound in (("low", low), ("high", high)):
        if type(bound) is not float and not isinstance(bound, (Tensor, Real)):
            raise TypeError(f"{name} of squash must be a number or a tensor, but is {short(bound)}")
    return low, high


def _checked_bound(name: str, bound: float | Tensor, loc: Tensor) -> Tensor:
    if not isinstance(bound, Tensor):  # the other one is a tensor: backends get both in one form
        return loc.new_full((), bound)
    check_broadcasts(f"{name} of squash", bound, "loc", loc.shape, loc.device)
    if bound.device != loc.device:
        bound = bound.to(loc.device, non_blocking=True)
    return bound.detach() if bound.requires_grad else bound


# --- the operators --------------------------------------------------------------------------------------------------


def _arguments(name: str, loc: Tensor, scale: Tensor, third: Tensor, interval: Squash | None) -> list[Any]:
    """What the operators take for inputs: each bound as a number and a tensor, of which one counts."""
    low, high, margin = (None, None, None) if interval is None else interval
    return [name, loc, scale, third, *number_or_tensor(low), *number_or_tensor(high), margin]


def _operator(function: str) -> Any:
    """The backend's ``function``, of the arguments that its operator takes."""

    def run(name: str, loc: Tensor, scale: Tensor, third: Tensor, *rest: Any) -> Any:
        low_number, low, high_number, high, margin, *grads_and_needs = rest
        interval = Squash(low_number if low is None else low, high_number if high is None else high, margin)
        implementation = getattr(backend_module(name), function)
        return implementation(loc, scale, third, None if interval.low is None else interval, *grads_and_needs)

    return run


def _log_prob_fake(name: str, loc: Tensor, scale: Tensor, action: Tensor, *_: Any) -> Tensor:
    return loc.new_empty(loc.shape[:-1], dtype=result_dtype(loc, scale, action))


def _sample_fake(name: str, loc: Tensor, scale: Tensor, noise: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = result_dtype(loc, scale, noise)
    return loc.new_empty(loc.shape, dtype=dtype), loc.new_empty(loc.shape[:-1], dtype=dtype)


def _backward_fake(name: str, loc: Tensor, scale: Tensor, third: Tensor, *rest: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x, need in zip((loc, scale, third), rest[-1], strict=True) if need]


# Each with its implementation.
_OPERATORS: dict[str, tuple[Any, Callable[..., Any]]] = {}
for _name, _fake in (
    ("log_prob", _log_prob_fake),
    ("log_prob_backward", _backward_fake),
    ("sample", _sample_fake),
    ("sample_backward", _backward_fake),
):
    _implementation = _operator(_name)
    _library.impl(f"normal_{_name}", _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fusedrl::normal_{_name}", _fake, lib=_library)
    _OPERATORS[_name] = getattr(torch.ops.fusedrl, f"normal_{_name}").default, _implementation
