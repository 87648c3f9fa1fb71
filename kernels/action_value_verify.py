"""The ``verify`` backend of the action-value losses: what ``auto`` picks, compared with the reference in float64.

A debugging aid: it reads results on the host, which waits for the device. An element may be off by some roundings of
what it is computed from, so that the reference is also asked for sums of magnitudes.
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from . import action_value_reference
from .action_value_composed import Composed
from .action_value_operators import backend_module
from .action_value_problem import Bootstrap, Improvement, Regression
from .backend import fastest_backend
from .compare import compare
from .distances import L1, L2

reference = Composed(action_value_reference)

Problem = TypeVar("Problem", Bootstrap, Regression, Improvement)


def target(problem: Bootstrap) -> list[Tensor]:
    """The results of the fastest backend, once they agree with the reference.

    Raises:
        VerificationError: a result differs; the message has the worst sample's index and both values.

    """
    name = fastest_backend(problem.next_values)
    found = backend_module(name).target(problem)
    precise = _in_float64(problem)
    next_size = precise.next_values.amin(0).abs()
    if problem.log_prob is not None:
        next_size = next_size + abs(precise.alpha) * precise.log_prob.abs()
    size = precise.reward.abs() + torch.where(problem.terminated != 0, 0, abs(precise.gamma) * next_size)
    expected = reference.target(precise)
    for what, x, wanted, scale in zip(("value target", "next value"), found, expected, (size, next_size), strict=True):
        compare(what, name, problem.dtype, x, wanted, scale)
    return found


def ensemble(problem: Regression, keep: bool) -> list[Tensor]:
    """The results of the fastest backend, once they agree with the reference.

    Raises:
        VerificationError: a result differs; the message has the worst element's index and both values.

    """
    name = fastest_backend(problem.values)
    found = backend_module(name).ensemble(problem, keep)
    precise = _in_float64(problem)
    expected = reference.ensemble(precise, False)
    scales = reference.ensemble(_magnitudes(precise), False)
    for what, x, wanted, scale in zip(("ensemble loss", "priority"), found, expected, scales, strict=False):
        compare(what, name, problem.dtype, x, wanted, scale)
    return found


def ensemble_backward(problem: Regression, kept: Sequence[Tensor], grad: Tensor) -> Tensor:
    """The gradient of the fastest backend, once it agrees with autograd through the reference.

    Raises:
        VerificationError: an element differs; the message has the worst one's index and both values.

    """
    name = fastest_backend(problem.values)
    found = backend_module(name).ensemble_backward(problem, kept, grad)
    precise = _in_float64(problem)
    expected = reference.ensemble_backward(precise, (), grad.double())
    # The derivative of l1 is ±1, of l2 and smooth_l1 at most twice the error.
    farther = _magnitudes(precise)._replace(loss_function=L1 if problem.loss_function == L1 else L2)
    scale = reference.ensemble_backward(farther._replace(values=1 + farther.values), (), grad.double().abs())
    compare("gradient of values", name, problem.values.dtype, found, expected, scale)
    return found


def policy(problem: Improvement, keep: bool) -> list[Tensor]:
    """The results of the fastest backend, once they agree with the reference.

    Raises:
        VerificationError: a result differs; the message has the worst element's index and both values.

    """
    name = fastest_backend(problem.values)
    found = backend_module(name).policy(problem, keep)
    precise = _in_float64(problem)
    expected = reference.policy(precise, False)
    # −|log π| has the magnitudes as its entropy, and −|α| as a coefficient those of the loss.
    scales = reference.policy(
        precise._replace(
            values=-precise.values.abs(),
            log_prob=-precise.log_prob.abs(),
            alpha=-abs(precise.alpha),
            weights=None if problem.weights is None else precise.weights.abs(),
        ),
        False,
    )
    for what, x, wanted, scale in zip(("soft policy loss", "entropy"), found, expected, scales, strict=False):
        compare(what, name, problem.dtype, x, wanted, scale)
    return found


def policy_backward(problem: Improvement, kept: Sequence[Tensor], grad: Tensor, needs: Sequence[bool]) -> list[Tensor]:
    """The gradients of the fastest backend, once they agree with autograd through the reference.

    Raises:
        VerificationError: an element differs; the message has the worst one's index and both values.

    """
    name = fastest_backend(problem.values)
    found = backend_module(name).policy_backward(problem, kept, grad, needs)
    expected = reference.policy_backward(_in_float64(problem), (), grad.double(), needs)
    names = [x for x, need in zip(("values", "log_prob"), needs, strict=True) if need]
    for what, x, wanted in zip(names, found, expected, strict=True):
        compare(f"gradient of {what}", name, x.dtype, x, wanted, wanted.abs())
    return found


def _magnitudes(problem: Regression) -> Regression:
    """The problem whose errors are |Q| + |y|, the largest that could have been."""
    return problem._replace(
        values=problem.values.abs() + problem.target.abs(),
        target=torch.zeros_like(problem.target),
        weights=None if problem.weights is None else problem.weights.abs(),
    )


def _in_float64(problem: Problem) -> Problem:
    return type(problem)._make(x.double() if isinstance(x, Tensor) and x.dtype != torch.bool else x for x in problem)
