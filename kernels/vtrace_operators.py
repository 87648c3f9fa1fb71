"""From a V-trace problem to its solution: opaque operators of the fused backends, and the autograd.Function around."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .backend import resolve_backend
from .checks import as_index
from .dispatch import (
    are_plain,
    backend_modules,
    in_transform,
    is_unwatched,
    number_or_tensor,
    numbers_and_tensors,
    requires_grad,
    runs_plainly,
    tensors_among,
)
from .function import aliases, gradients_of_inputs, needs_of, plain_apply, signed
from .recognition import Recognition
from .scan_problem import with_one_mask
from .vtrace_composed import composed
from .vtrace_problem import VTrace, check_thresholds, checked

# The backends that solve all of it; the module of each has a `forward` and a `backward`.
_FUSED = frozenset(("triton", "reference", "verify"))
_backend_module = backend_modules("vtrace")

_ARGUMENTS = (
    "str backend, int time_dim, Tensor log_pi, Tensor? log_mu, Tensor value, Tensor next_value, Tensor reward, "
    "float? gamma_number, Tensor? gamma, float? rho_number, Tensor? rho, float? c_number, Tensor? c, "
    "Tensor done, Tensor? terminated"
)
_library = torch.library.Library("fusedrl", "FRAGMENT")
_library.define(f"vtrace({_ARGUMENTS}) -> Tensor[]")
_library.define(
    f"vtrace_backward({_ARGUMENTS}, Tensor value_target, Tensor? grad_advantage, Tensor? grad_target, bool[] needs)"
    " -> Tensor[]"
)


def solve(
    problem: VTrace, time_dim: int, backend: str | None, names: Mapping[str, str] | None = None
) -> tuple[Tensor, Tensor]:
    """Advantage and value target, differentiable.

    Raises what `checked`, `check_thresholds` and `resolve_backend` raise, before anything is computed; ``names`` are
    for `checked`.
    """
    name = resolve_backend(backend, problem.reward)
    check_thresholds(problem.rho, problem.c)
    problem, dim, how = _recognised_or_checked(with_one_mask(problem), time_dim, name, names)
    if how is None:
        return composed(problem, dim, name)
    tensors, differentiated, plainly = how
    if not differentiated:
        advantage, value_target = (_solved if plainly else _forward)(name, dim, problem)
    elif plainly:
        advantage, value_target = _solve_plainly((name, dim, problem), *tensors)
    else:
        advantage, value_target = _Solve.apply(name, dim, *problem)
    return advantage, value_target


def _recognised_or_checked(
    problem: VTrace, time_dim: int, backend: str, names: Mapping[str, str] | None
) -> tuple[VTrace, int, tuple[tuple[Tensor, ...], bool, bool] | None]:
    """What `checked` gives, and how it is fused, or None if it isn't.

    That is the tensors, whether the solution is differentiated, and whether operators run plainly.
    """
    # Forward-mode tangents don't show in requires_grad, and the fused backends have no rule for them.
    unwatched = is_unwatched() and forward_ad._current_level < 0
    if unwatched:
        time_dim = as_index("time_dim", time_dim)
        # The default dtype is that of integers.
        setting = backend, time_dim, torch.is_grad_enabled(), torch.get_default_dtype()
        tensors, known = _fused_forms(setting, problem)
        if known is not None:
            dim, differentiated = known
            return problem, dim, (tensors, differentiated, True)
    given = problem
    problem, dim = checked(problem, time_dim, names)
    if not _is_fused(problem, backend):
        return problem, dim, None
    tensors = tuple(tensors_among(problem))
    differentiated = torch.is_grad_enabled() and any(map(requires_grad, tensors))
    plainly = unwatched and are_plain(tensors)
    if plainly and problem is given:
        _fused_forms.remember(setting, problem, (dim, differentiated))
    return problem, dim, (tensors, differentiated, plainly)


# Problems that passed their checks and that a fused backend solves, with tensors on which operators run plainly.
_fused_forms = Recognition()


def _is_fused(problem: VTrace, backend: str) -> bool:
    """Whether the backend solves all of it."""
    if forward_ad._current_level >= 0 or backend not in _FUSED:
        return False
    if in_transform():
        return False  # which knows the recurrence and what is around it
    return backend != "triton" or problem.suits_kernel(differentiated=torch.is_grad_enabled())


@signed
class _Solve(torch.autograd.Function):
    """Inputs: backend, time_dim, then the fields of `VTrace`."""

    @staticmethod
    def forward(backend: str, time_dim: int, *fields: Any) -> tuple[Tensor, ...]:
        return tuple(_forward(backend, time_dim, VTrace(*fields)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        backend, time_dim, *fields = inputs
        _keep(ctx, backend, time_dim, VTrace(*fields), output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[2:10])
        return gradients_of_inputs(ctx, _gradients(ctx.settings, ctx.saved_tensors, grads, needs))


class _SolvePlainly(torch.autograd.Function):
    """`_Solve` where `runs_plainly`; for its inputs see `fusedrl.kernels.scan_operators._SolvePlainly`."""

    @staticmethod
    def forward(ctx: Any, call: tuple[str, int, VTrace], *tensors: Tensor) -> tuple[Tensor, ...]:
        backend, time_dim, problem = call
        outputs = tuple(_solved(backend, time_dim, problem))
        _keep(ctx, backend, time_dim, problem, outputs[1])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # each time that this is asked for, they are unpacked
        return gradients_of_inputs(ctx, _gradients(ctx.settings, saved, grads, needs_of(ctx, saved[:8])))


def _keep(ctx: Any, backend: str, time_dim: int, problem: VTrace, value_target: Tensor) -> None:
    """Save for backward what `_Solve` got, and what it found."""
    numbers, constants = numbers_and_tensors(problem.constants)
    ctx.settings = backend, time_dim, numbers
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*problem[:5], *constants, *problem[8:], value_target)


def _gradients(
    settings: tuple[Any, ...], saved: Sequence[Any], grads: Sequence[Tensor | None], needs: list[bool]
) -> Sequence[Tensor | None]:
    """The gradients that are needed of the inputs that can have one, of what `_keep` kept."""
    if all(g is None for g in grads):
        return [None] * sum(needs)
    backend, time_dim, numbers = settings
    *tensors, value_target = saved
    constants = (n if x is None else x for n, x in zip(numbers, tensors[5:8], strict=True))
    problem = VTrace(*tensors[:5], *constants, *tensors[8:])
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # the gradient will be differentiated
        names = problem.names(needs)
        inputs = aliases(getattr(problem, name) for name in names)
        outputs = composed(problem._replace(**dict(zip(names, inputs, strict=True))), time_dim, backend)
        used = [(x, g) for x, g in zip(outputs, grads, strict=True) if g is not None]
        return torch.autograd.grad(
            [x for x, _ in used], inputs, [g for _, g in used], create_graph=True, allow_unused=True
        )
    if runs_plainly("vtrace_backward", (*problem, *grads)):
        return _solved_backward(backend, time_dim, problem, value_target, grads, needs)
    return torch.ops.fusedrl.vtrace_backward(backend, time_dim, *_flat(problem), value_target, *grads, needs)


_solve_plainly = plain_apply(_SolvePlainly)


def _forward(backend: str, time_dim: int, problem: VTrace) -> Sequence[Tensor]:
    return torch.ops.fusedrl.vtrace(backend, time_dim, *_flat(problem))


def _solved(backend: str, time_dim: int, problem: VTrace) -> list[Tensor]:
    return _backend_module(backend).forward(problem, time_dim) if problem.reward.numel() else problem.new_outputs()


def _solved_backward(
    backend: str,
    time_dim: int,
    problem: VTrace,
    value_target: Tensor,
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor]:
    if not problem.reward.numel():
        return [torch.zeros_like(x) for x, need in zip(problem.differentiable, needs, strict=True) if need]
    return _backend_module(backend).backward(problem, time_dim, value_target, grads, needs)


def _flat(problem: VTrace) -> list[Any]:
    """The fields as the operators take them: each scalar as a pair (number, tensor)."""
    constants = [part for x in problem.constants for part in number_or_tensor(x, problem.reward)]
    return [*problem[:5], *constants, *problem[8:]]


def _gathered(arguments: Sequence[Any]) -> VTrace:
    pairs = zip(arguments[5:11:2], arguments[6:11:2], strict=True)
    constants = (number if tensor is None else tensor for number, tensor in pairs)
    return VTrace(*arguments[:5], *constants, *arguments[11:])


def _vtrace(backend: str, time_dim: int, *arguments: Any) -> list[Tensor]:
    return _solved(backend, time_dim, _gathered(arguments))


def _vtrace_backward(backend: str, time_dim: int, *arguments: Any) -> list[Tensor]:
    *fields, value_target, grad_advantage, grad_target, needs = arguments
    grads = [grad_advantage, grad_target]
    return _solved_backward(backend, time_dim, _gathered(fields), value_target, grads, needs)


def _vtrace_fake(backend: str, time_dim: int, *arguments: Any) -> list[Tensor]:
    return _gathered(arguments).new_outputs()


def _vtrace_backward_fake(backend: str, time_dim: int, *arguments: Any) -> list[Tensor]:
    *fields, _, _, _, needs = arguments
    problem = _gathered(fields)
    of_steps = [
        torch.empty_like(problem.reward, dtype=x.dtype) for x, need in zip(problem[:5], needs, strict=False) if need
    ]
    return of_steps + [torch.empty_like(x) for x, need in zip(problem.constants, needs[5:], strict=True) if need]


_library.impl("vtrace", _vtrace, "CompositeExplicitAutograd")
_library.impl("vtrace_backward", _vtrace_backward, "CompositeExplicitAutograd")
torch.library.register_fake("fusedrl::vtrace", _vtrace_fake, lib=_library)
torch.library.register_fake("fusedrl::vtrace_backward", _vtrace_backward_fake, lib=_library)
