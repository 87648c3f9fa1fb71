"""The ``reference`` backend: the loops of `fusedrl.kernels.reference`, with gradients from autograd."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .recurrence import FIXED_DISCOUNT, GAE, SCAN, Recurrence


def forward(problem: Recurrence, time_dim: int) -> list[Tensor]:
    """The outputs of ``problem``, laid out like the reward."""
    outputs = []
    for computed in _solve(problem, time_dim):
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
    fields: list[Any] = list(problem)
    inputs = []
    for i, need in enumerate(needs, start=1):
        if need:
            fields[i] = fields[i].detach().requires_grad_()
            inputs.append(fields[i])
    with torch.enable_grad():
        outputs = _solve(Recurrence(*fields), time_dim)
    used = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
    found = torch.autograd.grad([o for o, _ in used], inputs, [g.to(o.dtype) for o, g in used], allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def _solve(problem: Recurrence, time_dim: int) -> list[Tensor]:
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
