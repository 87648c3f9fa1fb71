"""The backward pass as differentiable operations, used when a gradient is itself differentiated.

Everything is written with torch operators and `solve` on a SCAN, whose own backward is again a SCAN.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import scan_reference
from .dispatch import in_transform
from .function import aliases
from .scan_problem import FIXED_DISCOUNT, GAE, SCAN, Recurrence

Solver = Callable[[Recurrence], Sequence[Tensor]]


def differentiable_backward(
    solve: Solver, time_dim: int, problem: Recurrence, grads: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor]:
    """Gradients of the needed inputs among γ, λ, reward, value and next value, with a graph of their own."""
    names = [name for name, need in zip(Recurrence._fields[1:6], needs, strict=True) if need]
    inputs = [getattr(problem, name) for name in names]
    if not problem.reward.numel():
        return [torch.zeros_like(x) for x in inputs]
    if problem.kind == SCAN:
        return _scan_backward(solve, time_dim, problem, grads[0], needs)
    arrived = [g.to(problem.compute_dtype) for g in grads if g is not None]

    def used(*inputs: Tensor) -> list[Tensor]:
        """The outputs whose gradients have arrived."""
        leaves: dict[str, Any] = dict(zip(names, inputs, strict=True))
        given = problem._replace(**leaves)
        fixed = problem.kind == FIXED_DISCOUNT
        outputs = scan_reference.solve(given, time_dim) if fixed else _composed(solve, time_dim, given)
        return [x for x, g in zip(outputs, grads, strict=True) if g is not None]

    if in_transform():
        return list(torch.func.vjp(used, *inputs)[1](arrived))
    inputs = aliases(inputs)
    found = torch.autograd.grad(
        used(*inputs), inputs, arrived, create_graph=True, allow_unused=True, materialize_grads=True
    )
    return list(found)


def _scan_backward(solve: Solver, time_dim: int, problem: Recurrence, grad: Any, needs: Sequence[bool]) -> list[Tensor]:
    """λ_t = g_t + c_{t−1} λ_{t−1};  ∂L/∂d_t = λ_t;  ∂L/∂c_t = λ_t y_{t+1}."""
    dtype = problem.compute_dtype
    coefficient = problem.gamma * torch.ones_like(problem.reward, dtype=dtype)
    if problem.done is not None:
        coefficient = torch.where(problem.done, 0, coefficient)
    reversed_scan = Recurrence(
        SCAN, _shift(coefficient, 1, time_dim).flip(time_dim), None, grad.to(dtype).flip(time_dim)
    )
    adjoint = solve(reversed_scan)[0].flip(time_dim)
    found = []
    if needs[0]:
        y_next = _shift(solve(problem._replace(reward=problem.reward.to(dtype)))[0], -1, time_dim)
        d_gamma = adjoint * y_next
        if problem.done is not None:
            d_gamma = torch.where(problem.done, 0, d_gamma)
        found.append(d_gamma.sum_to_size(problem.gamma.shape).to(problem.gamma.dtype))
    if needs[2]:
        found.append(adjoint.to(problem.reward.dtype))
    return found


def _composed(solve: Solver, time_dim: int, problem: Recurrence) -> list[Tensor]:
    """``problem`` with its prologue and epilogue in torch operators around a SCAN."""
    dtype, device = problem.compute_dtype, problem.reward.device
    # Of a TD(λ) the value is None.
    inputs: Any = [None if x is None else _tensor(x, dtype, device) for x in problem[1:6]]
    gamma, lmbda, reward, value, next_value = inputs
    done, terminated = problem.done, problem.terminated
    terminated = done if terminated is None else terminated
    cut = done | terminated
    # Selected before the product: the gradient of γ would be 0 · NaN.
    bootstrap = gamma * torch.where(terminated, 0, next_value)
    if problem.kind == GAE:
        increment = reward + bootstrap - value
    else:
        last = torch.zeros_like(cut)
        last.select(time_dim, -1).fill_(True)
        cut = cut | last
        increment = reward + bootstrap * torch.where(cut, 1, 1 - lmbda)
    y = solve(Recurrence(SCAN, gamma * lmbda * torch.ones_like(increment), None, increment, done=cut))[0]
    return [y, y + value] if problem.kind == GAE else [y]


def _tensor(x: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number is written on the device: to copy it there would wait for all that the device has to do."""
    return x.to(dtype) if isinstance(x, Tensor) else torch.full((), x, dtype=dtype, device=device)


def _shift(x: Tensor, steps: int, time_dim: int) -> Tensor:
    """``x`` moved by one step towards later (1) or earlier (−1) times, with a zero at the open end."""
    length = x.shape[time_dim]
    kept = x.narrow(time_dim, 0 if steps > 0 else 1, length - 1)
    zero = torch.zeros_like(x.narrow(time_dim, 0, 1))
    return torch.cat([zero, kept] if steps > 0 else [kept, zero], time_dim)
