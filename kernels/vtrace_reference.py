"""The ``reference`` backend of V-trace: the loop of `fusedrl.kernels.reference`, with gradients from autograd."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .scan_reference import gradients
from .vtrace_problem import VTrace


def forward(problem: VTrace, time_dim: int) -> list[Tensor]:
    """Advantage and value target, laid out like the reward."""
    outputs = problem.new_outputs()
    for output, computed in zip(outputs, solve(problem, time_dim), strict=True):
        output.copy_(computed)
    return outputs


def backward(
    problem: VTrace, time_dim: int, value_target: Tensor, grads: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor]:
    """The gradients of the inputs that need one: the loop again, under autograd."""
    return gradients(lambda leaves: solve(leaves, time_dim), problem, problem.names(needs), grads)


def solve(problem: VTrace, time_dim: int) -> tuple[Tensor, Tensor]:
    """The loop in the precision that the kernel computes in: float64 for float64, otherwise float32."""
    _, _, value, next_value, reward, gamma, rho, c, done, terminated = problem
    gamma, log_weight, value, next_value, reward, rho, c = (
        x.to(problem.compute_dtype) if isinstance(x, torch.Tensor) else x
        for x in (gamma, problem.log_weight(), value, next_value, reward, rho, c)
    )
    terminated = done if terminated is None else terminated
    return reference.vtrace(gamma, log_weight, value, next_value, reward, done, terminated, rho, c, time_dim=time_dim)
