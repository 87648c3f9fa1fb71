"""Gives differentiable formulas the interface of kernels, forward and backward apart, which `verify` compares."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .action_value_problem import Bootstrap, Improvement, Regression
from .function import autograd_inside


class Composed(NamedTuple):
    """A backend made of a module's differentiable ``bootstrap``, ``regression`` and ``improvement``."""

    module: Any

    def target(self, problem: Bootstrap) -> list[Tensor]:
        """Value target and next value, which may be an input: an operator gives a copy."""
        return [x.clone(memory_format=torch.contiguous_format) for x in self.module.bootstrap(problem)]

    def ensemble(self, problem: Regression, keep: bool) -> list[Tensor]:
        """Loss and priority. Nothing is kept for the gradient."""
        return [x.contiguous() for x in self.module.regression(problem)]

    def ensemble_backward(self, problem: Regression, kept: Sequence[Tensor], grad: Tensor) -> Tensor:
        """∂L/∂Q · grad."""
        leaf = problem.values.detach().requires_grad_()
        with autograd_inside():
            loss, _ = self.module.regression(problem._replace(values=leaf))
            (found,) = torch.autograd.grad(loss, leaf, grad)
        return torch.empty_like(leaf).copy_(found)

    def policy(self, problem: Improvement, keep: bool) -> list[Tensor]:
        """Loss and entropy. Nothing is kept for the gradient."""
        return [x.contiguous() for x in self.module.improvement(problem)]

    def policy_backward(
        self, problem: Improvement, kept: Sequence[Tensor], grad: Tensor, needs: Sequence[bool]
    ) -> list[Tensor]:
        """∂L/∂Q · grad and ∂L/∂log π · grad, those that are needed."""
        inputs = (problem.values, problem.log_prob)
        values, log_prob = (x.detach().requires_grad_(need) for x, need in zip(inputs, needs, strict=True))
        leaves = [x for x, need in zip((values, log_prob), needs, strict=True) if need]
        with autograd_inside():
            loss, *_ = self.module.improvement(problem._replace(values=values, log_prob=log_prob))
            found = torch.autograd.grad(loss, leaves, grad)
        return [torch.empty_like(x).copy_(g) for x, g in zip(leaves, found, strict=True)]
