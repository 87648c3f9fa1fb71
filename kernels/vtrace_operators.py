"""From a V-trace problem to its solution by a fused backend: opaque operators, and the autograd.Function around."""

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .function import apply
from .operators import number_or_tensor
from .vtrace_composed import composed
from .vtrace_problem import VTrace

# Where the `forward` and `backward` of the backends live that solve all of it; imported at the first use.
_BACKEND_MODULES = {"triton": ".vtrace_launch", "verify": ".vtrace_verify"}

_ARGUMENTS = (
    "str backend, int time_dim, Tensor log_pi, Tensor? log_mu, Tensor value, Tensor next_value, Tensor reward, "
    "Tensor done, Tensor? terminated, float? gamma_number, Tensor? gamma, float? rho_number, Tensor? rho, "
    "float? c_number, Tensor? c"
)
_library = torch.library.Library("fusedrl", "FRAGMENT")
_library.define(f"vtrace({_ARGUMENTS}) -> Tensor[]")
_library.define(
    f"vtrace_backward({_ARGUMENTS}, Tensor value_target, Tensor? grad_advantage, Tensor? grad_target, bool[] needs)"
    " -> Tensor[]"
)


def solve(problem: VTrace, time_dim: int, backend: str) -> Sequence[Tensor]:
    """Advantage and value target, differentiable in the inputs of that name."""
    return apply(_Solve, backend, time_dim, *problem)


class _Solve(torch.autograd.Function):
    """Inputs: backend, time_dim, then the fields of `VTrace`."""

    @staticmethod
    def forward(backend: str, time_dim: int, *fields: Any) -> tuple[Tensor, ...]:
        return tuple(torch.ops.fusedrl.vtrace(backend, time_dim, *_flat(VTrace(*fields))))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        backend, time_dim, *fields = inputs
        ctx.set_materialize_grads(False)
        ctx.settings = backend, time_dim, [None if isinstance(x, Tensor) else x for x in fields]
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in fields), output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        backend, time_dim, numbers = ctx.settings
        *tensors, value_target = ctx.saved_tensors
        problem = VTrace(*(n if x is None else x for n, x in zip(numbers, tensors, strict=True)))
        needs = list(ctx.needs_input_grad[2:7])
        found: Sequence[Tensor | None]
        if all(g is None for g in grads):
            found = [None] * sum(needs)
        elif torch.is_grad_enabled() and not torch.compiler.is_compiling():  # the gradient will be differentiated
            inputs = [x for x, need in zip(problem.differentiable, needs, strict=True) if need]
            outputs = composed(problem, time_dim, "triton")
            used = [(x, g) for x, g in zip(outputs, grads, strict=True) if g is not None]
            found = torch.autograd.grad(
                [x for x, _ in used], inputs, [g for _, g in used], create_graph=True, allow_unused=True
            )
        else:
            found = torch.ops.fusedrl.vtrace_backward(backend, time_dim, *_flat(problem), value_target, *grads, needs)
        results = iter(found)
        return (None, None, *[next(results) if need else None for need in needs], None, None, None, None, None)


def _flat(problem: VTrace) -> list[Any]:
    """The fields as the operators take them: each scalar as a pair (number, tensor)."""
    scalars = [part for x in problem[7:] for part in number_or_tensor(x, problem.reward)]
    return [*problem[:7], *scalars]


def _gathered(arguments: Sequence[Any]) -> VTrace:
    pairs = zip(arguments[7:13:2], arguments[8:13:2], strict=True)
    return VTrace(*arguments[:7], *(number if tensor is None else tensor for number, tensor in pairs))


@cache
def _backend_module(name: str) -> Any:
    return import_module(_BACKEND_MODULES[name], __package__)


def _vtrace(backend: str, time_dim: int, *arguments: Any) -> list[Tensor]:
    problem = _gathered(arguments)
    return _backend_module(backend).forward(problem, time_dim) if problem.reward.numel() else problem.new_outputs()


def _vtrace_backward(backend: str, time_dim: int, *arguments: Any) -> list[Tensor]:
    *fields, value_target, grad_advantage, grad_target, needs = arguments
    problem = _gathered(fields)
    wanted = [x for x, need in zip(problem.differentiable, needs, strict=True) if need]
    if not problem.reward.numel():
        return [torch.zeros_like(x) for x in wanted]
    return _backend_module(backend).backward(problem, time_dim, value_target, [grad_advantage, grad_target], needs)


def _vtrace_fake(backend: str, time_dim: int, *arguments: Any) -> list[Tensor]:
    return _gathered(arguments).new_outputs()


def _vtrace_backward_fake(backend: str, time_dim: int, *arguments: Any) -> list[Tensor]:
    *fields, _, _, _, needs = arguments
    problem = _gathered(fields)
    wanted = [x for x, need in zip(problem.differentiable, needs, strict=True) if need]
    return [torch.empty_like(problem.reward, dtype=x.dtype) for x in wanted]


_library.impl("vtrace", _vtrace, "CompositeExplicitAutograd")
_library.impl("vtrace_backward", _vtrace_backward, "CompositeExplicitAutograd")
torch.library.register_fake("fusedrl::vtrace", _vtrace_fake, lib=_library)
torch.library.register_fake("fusedrl::vtrace_backward", _vtrace_backward_fake, lib=_library)
