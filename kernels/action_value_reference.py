"""The action-value losses as their formulas, differentiated by autograd: what the fast backends are tested against.

They make the ``reference`` backend, and give the second derivatives of the others.
"""

import torch
from torch import Tensor

from .action_value_problem import SQUARE, Bootstrap, Improvement, Regression
from .checks import MEAN, NONE
from .distances import DISTANCES
from .dtypes import compute_dtype
from .samples_reference import reduced


def bootstrap(problem: Bootstrap) -> tuple[Tensor, Tensor]:
    """y = r + γ(1 − term)·v' and v' = min_i Q_i − α log π."""
    dtype = compute_dtype(problem.dtype)
    next_value = problem.next_values.to(dtype).amin(0)
    if problem.log_prob is not None:
        next_value = next_value - _scalar(problem.alpha, dtype) * problem.log_prob.to(dtype)
    reward = problem.reward.to(dtype)
    # Selected, not multiplied by zero: after a terminal step neither v' nor γ is read.
    bootstrapped = reward + _scalar(problem.gamma, dtype) * next_value
    value_target = torch.where(problem.terminated != 0, reward, bootstrapped)
    return value_target.to(problem.dtype), next_value.to(problem.dtype)


def regression(problem: Regression) -> tuple[Tensor, Tensor]:
    """The loss, Σ_i d(Q_i, y) of a sample reduced over the batch, and the priority."""
    dtype = compute_dtype(problem.dtype)
    values, target = problem.values.to(dtype), problem.target.to(dtype)
    if problem.mask is not None:
        values, target = torch.where(problem.mask, values, 0), torch.where(problem.mask, target, 0)
    distance = DISTANCES[problem.loss_function](values, target.expand_as(values), reduction="none")
    error = (values.detach() - target).abs().amax(0)
    if not problem.per_member:
        distance = distance.sum(0)
    loss = _reduce(distance, problem.reduction, problem.mask, problem.weights)
    priority = error.square() if problem.priority == SQUARE else error
    return loss.to(problem.dtype), priority.to(problem.dtype)


def improvement(problem: Improvement) -> tuple[Tensor, Tensor]:
    """The loss, α log π − min_i Q_i of a sample reduced over the batch, and the entropy."""
    dtype = compute_dtype(problem.dtype)
    values, log_prob = problem.values.to(dtype), problem.log_prob.to(dtype)
    if problem.mask is not None:  # before the minimum, whose gradient at a NaN is NaN
        values = torch.where(problem.mask, values, 0)
    least = values.amin(0)
    loss = _scalar(problem.alpha, dtype) * log_prob - least
    loss = _reduce(loss, problem.reduction, problem.mask, problem.weights)
    entropy = _reduce(-log_prob.detach(), MEAN, problem.mask, None)
    return loss.to(problem.dtype), entropy.to(problem.dtype)


def _reduce(x: Tensor, reduction: str, mask: Tensor | None, weights: Tensor | None) -> Tensor:
    """`reduced`, of the members of each sample too; the mean of no samples at all is NaN, as PyTorch's."""
    if mask is None and weights is None:
        return x if reduction == NONE else x.mean() if reduction == MEAN else x.sum()
    mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.expand_as(x)
    weights = None if weights is None else weights.to(x.dtype).expand_as(x)
    return reduced(x, mask, weights, reduction)


def _scalar(x: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    return x.to(dtype) if isinstance(x, Tensor) else x
