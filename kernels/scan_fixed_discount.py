"""FIXED_DISCOUNT on top of any backend: one TD(λ) scan per starting step, of which the first element is kept.

O(T²) time, as the definition asks, and O(B·T) memory. Slices of the inputs are views, never copies.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .scan_problem import TD_LAMBDA, Recurrence

Forward = Callable[[Recurrence, int], list[Tensor]]
Backward = Callable[
    [Recurrence, int, Tensor | None, Sequence[Tensor | None], Sequence[bool]],
    list[Tensor],
]


def forward(solve: Forward, problem: Recurrence, time_dim: int) -> list[Tensor]:
    """G_t is the first element of the TD(λ) return of the steps t … T−1 with the constants γ_t and λ_t."""
    output = problem.new_output()
    for t in range(output.shape[time_dim]):
        (returns,) = solve(_from_step(problem, time_dim, t), time_dim)
        output.select(time_dim, t).copy_(returns.select(time_dim, 0))
    return [output]


def backward(
    solve: Forward,
    solve_backward: Backward,
    problem: Recurrence,
    time_dim: int,
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor]:
    """Each start's gradients, added to the steps they belong to: γ's and λ's to the start, the rest from there on."""
    (grad,) = grads
    assert grad is not None
    dtype = problem.compute_dtype
    found = [torch.zeros_like(problem.reward, dtype=dtype) for need in needs if need]
    constants = sum(needs[:2])
    for t in range(grad.shape[time_dim]):
        part = _from_step(problem, time_dim, t)
        (y,) = solve(part, time_dim) if constants else (None,)
        grad_part = torch.zeros_like(part.reward, dtype=grad.dtype)
        grad_part.select(time_dim, 0).copy_(grad.select(time_dim, t))
        partial = solve_backward(part, time_dim, y, [grad_part], needs)
        for i, (total, gradient) in enumerate(zip(found, partial, strict=True)):
            if i < constants:
                total.select(time_dim, t).add_(gradient.sum(time_dim))
            else:
                total.narrow(time_dim, t, gradient.shape[time_dim]).add_(gradient)
    return found


def _from_step(problem: Recurrence, time_dim: int, start: int) -> Recurrence:
    """The TD(λ) problem of the steps from ``start`` on, with γ and λ of that step."""
    _, gamma, lmbda, *tensors = problem
    steps = problem.reward.shape[time_dim] - start

    def constant(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.ndim:
            return x
        return x.expand_as(problem.reward).narrow(time_dim, start, 1)

    rest = (None if x is None else x.narrow(time_dim, start, steps) for x in tensors)
    return Recurrence(TD_LAMBDA, constant(gamma), constant(lmbda), *rest)
