"""The ``reference`` backend: the loops of `fusedrl.kernels.reference`, with gradients from autograd."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from . import reference
from .function import autograd_inside
from .scan_problem import FIXED_DISCOUNT, GAE, SCAN, Recurrence

Problem = TypeVar("Problem", bound=tuple)


def forward(problem: Recurrence, time_dim: int) -> list[Tensor]:
    """The outputs of ``problem``, laid out like the reward."""
    outputs = []
    for computed in solve(problem, time_dim):
        output = problem.new_output()
        output.copy_(computed)
        outputs.append(output)
    return outputs


def backward(
    problem: Recurrence,
    time_dim: int,
    y: Tensor | None,
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of the needed inputs among γ, λ, reward, value and next value: the loop again, under autograd."""
    names = [name for name, need in zip(Recurrence._fields[1:6], needs, strict=True) if need]
    return gradients(lambda leaves: solve(leaves, time_dim), problem, names, grads)


def gradients(
    solution: Callable[[Problem], Sequence[Tensor]],
    problem: Problem,
    names: Sequence[str],
    grads: Sequence[Tensor | None],
) -> list[Tensor]:
    """Those of the fields ``names`` of ``problem``, from ``grads`` of what ``solution`` makes of it, by autograd."""
    leaves = {name: getattr(problem, name).detach().requires_grad_() for name in names}
    with autograd_inside():
        outputs = solution(problem._replace(**leaves))  # type: ignore[attr-defined]  # of a NamedTuple
        used = [(x, g.to(x.dtype)) for x, g in zip(outputs, grads, strict=True) if g is not None]
        found = torch.autograd.grad(
            [x for x, _ in used], list(leaves.values()), [g for _, g in used], allow_unused=True, materialize_grads=True
        )
    return list(found)


def solve(problem: Recurrence, time_dim: int) -> list[Tensor]:
    """The loop in the precision that the kernels compute in: float64 for float64, otherwise float32."""
    dtype = problem.compute_dtype
    gamma, lmbda, reward, value, next_value = (x.to(dtype) if isinstance(x, Tensor) else x for x in problem[1:6])
    done, terminated = problem.done, problem.terminated
    if done is None:
        done = torch.zeros_like(reward, dtype=torch.bool)
    if terminated is None:
        terminated = done
    if problem.kind == SCAN:
        return [reference.reward_to_go(gamma, reward, done, time_dim=time_dim)]
    if problem.kind == GAE:
        return list(reference.gae(gamma, lmbda, value, next_value, reward, done, terminated, time_dim=time_dim))
    td_lambda = (
        reference.fixed_discount_td_lambda_return if problem.kind == FIXED_DISCOUNT else reference.td_lambda_return
    )
    return [td_lambda(gamma, lmbda, next_value, reward, done, terminated, time_dim=time_dim)]
