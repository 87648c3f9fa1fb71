"""The backward pass as differentiable operations, used when a gradient is itself differentiated.

Everything is written with torch operators and `solve` on a SCAN, whose own backward is again a SCAN.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .scan_problem import FIXED_DISCOUNT, GAE, SCAN, Recurrence

Solver = Callable[[Recurrence], Sequence[Tensor]]


def differentiable_backward(
    solve: Solver, time_dim: int, problem: Recurrence, grads: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor]:
    """Gradients of the needed inputs among γ, λ, reward, value and next value, with a graph of their own."""
    if problem.kind == SCAN:
        return _scan_backward(solve, time_dim, problem, grads[0], needs)
    inputs = [x for x, need in zip(problem[1:6], needs, strict=True) if need]
    outputs = _composed(solve, time_dim, problem)
    used = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
    found = torch.autograd.grad(
        [o for o, _ in used], inputs, [g for _, g in used], create_graph=True, allow_unused=True
    )
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def _scan_backward(solve: Solver, time_dim: int, problem: Recurrence, grad: Any, needs: Sequence[bool]) -> list[Tensor]:
    """λ_t = g_t + c_{t−1} λ_{t−1};  ∂L/∂d_t = λ_t;  ∂L/∂c_t = λ_t y_{t+1}."""
    coefficient = _coefficient(problem)
    adjoint = solve(Recurrence(SCAN, _shift(coefficient, 1, time_dim).flip(time_dim), None, grad.flip(time_dim)))[
        0
    ].flip(time_dim)
    found = []
    if needs[0]:
        y_next = _shift(solve(problem)[0], -1, time_dim)
        d_gamma = adjoint * y_next
        if problem.done is not None:
            d_gamma = torch.where(problem.done, 0, d_gamma)
        found.append(d_gamma.sum_to_size(problem.gamma.shape).to(problem.gamma.dtype))
    if needs[2]:
        found.append(adjoint.to(problem.reward.dtype))
    return found


def _composed(solve: Solver, time_dim: int, problem: Recurrence) -> list[Tensor]:
    """``problem`` with its prologue and epilogue in torch operators around a SCAN."""
    _, gamma, lmbda, reward, value, next_value, done, terminated = problem
    terminated = done if terminated is None else terminated
    if problem.kind == FIXED_DISCOUNT:
        return [
            reference.fixed_discount_td_lambda_return(
                gamma, lmbda, next_value, reward, done, terminated, time_dim=time_dim
            )
        ]
    cut = done | terminated
    bootstrap = torch.where(terminated, 0, gamma * next_value)
    if problem.kind == GAE:
        increment = reward + bootstrap - value
    else:
        last = torch.zeros_like(cut)
        last.select(time_dim, -1).fill_(True)
        cut = cut | last
        increment = reward + bootstrap * torch.where(cut, 1, 1 - lmbda)
    y = solve(Recurrence(SCAN, gamma * lmbda * torch.ones_like(increment), None, increment, done=cut))[0]
    return [y, y + value] if problem.kind == GAE else [y]


def _coefficient(problem: Recurrence) -> Tensor:
    coefficient = problem.gamma * torch.ones_like(problem.reward)
    return coefficient if problem.done is None else torch.where(problem.done, 0, coefficient)


def _shift(x: Tensor, steps: int, time_dim: int) -> Tensor:
    """``x`` moved by one step towards later (1) or earlier (−1) times, with a zero at the open end."""
    length = x.shape[time_dim]
    kept = x.narrow(time_dim, 0 if steps > 0 else 1, length - 1)
    zero = torch.zeros_like(x.narrow(time_dim, 0, 1))
    return torch.cat([zero, kept] if steps > 0 else [kept, zero], time_dim)
