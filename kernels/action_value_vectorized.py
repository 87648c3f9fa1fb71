"""The action-value losses in as few torch calls as can be, differentiated by autograd: the ``torch`` backend.

On small batches a call costs more than its arithmetic, on a CPU as on a GPU, where each is a launch; and an
`autograd.Function` costs more than the calls of both passes, so there is none.
"""

import torch
from torch import Tensor

from .action_value_problem import SQUARE, Bootstrap, Improvement, Regression
from .checks import MEAN, NONE
from .distances import L2, distance
from .dtypes import cast, compute_dtype


def bootstrap(problem: Bootstrap) -> tuple[Tensor, Tensor]:
    """Value target and next value, of constants."""
    next_values, reward, terminated, gamma, log_prob, alpha = problem
    dtype = compute_dtype(problem.dtype)
    next_value, reward = cast(_least(next_values), dtype), cast(reward, dtype)
    if log_prob is not None:
        log_prob = cast(log_prob, dtype)
        if isinstance(alpha, Tensor):
            next_value = torch.addcmul(next_value, log_prob, _beside(reward, alpha), value=-1)
        else:
            next_value = torch.add(next_value, log_prob, alpha=-alpha)
    if not isinstance(gamma, Tensor):
        value_target = torch.add(reward, next_value, alpha=gamma)
    else:
        value_target = torch.addcmul(reward, next_value, _beside(reward, gamma))
    # Selected: after a terminal step neither v' nor γ is read.
    terminated = terminated if terminated.dtype == torch.bool else terminated != 0
    value_target = torch.where(terminated, reward, value_target)
    return cast(value_target, problem.dtype), cast(next_value, problem.dtype)


def regression(problem: Regression) -> tuple[Tensor, Tensor]:
    """Loss and priority."""
    dtype = compute_dtype(problem.dtype)
    values, target = cast(problem.values, dtype), cast(problem.target, dtype)
    if problem.mask is not None:
        values, target = torch.where(problem.mask, values, 0), torch.where(problem.mask, target, 0)
    target = target.expand_as(values)  # which the distances don't do under `torch.vmap`
    with torch.no_grad():
        if problem.priority == SQUARE:
            square = distance(values, target, L2, NONE)
            priority = square.amax(0) if len(square) > 1 else square[0]
        else:
            priority = torch.linalg.vector_norm(torch.sub(values, target), torch.inf, 0)
    coefficient = _coefficient(problem)
    if coefficient is None and problem.reduction != NONE:
        loss = distance(values, target, problem.loss_function, problem.reduction)
        # Of all members and samples it was the mean; the members are summed.
        if problem.reduction == MEAN and not problem.per_member and len(values) > 1:
            loss = loss * len(values)
    else:
        loss = distance(values, target, problem.loss_function, NONE)
        loss = _reduced(loss if problem.per_member else loss.sum(0), coefficient, problem.reduction)
    return cast(loss, problem.dtype), cast(priority, problem.dtype)


def improvement(problem: Improvement) -> tuple[Tensor, Tensor]:
    """Loss and entropy."""
    dtype = compute_dtype(problem.dtype)
    values, log_prob = problem.values, cast(problem.log_prob, dtype)
    if problem.mask is not None:  # before the minimum, whose gradient at a NaN is NaN
        values, log_prob = torch.where(problem.mask, values, 0), torch.where(problem.mask, log_prob, 0)
    least = cast(_least(values), dtype)
    alpha = _beside(least, problem.alpha) if isinstance(problem.alpha, Tensor) else problem.alpha
    loss = _reduced(log_prob * alpha - least, _coefficient(problem), problem.reduction)
    with torch.no_grad():
        if problem.mask is None:
            entropy = log_prob.mean().neg_()
        else:
            entropy = log_prob.sum().neg_().div_(problem.mask.sum().clamp_min_(1))
    return cast(loss, problem.dtype), cast(entropy, problem.dtype)


def _least(values: Tensor) -> Tensor:
    """Over the members, the least value of each sample; of one member a view."""
    return values.amin(0) if len(values) > 1 else values[0]


def _reduced(x: Tensor, coefficient: Tensor | None, reduction: str) -> Tensor:
    """``x`` weighed and reduced."""
    if coefficient is not None:
        x = x * coefficient
    if reduction == NONE:
        return x
    # The coefficients of a mean have been divided by their sum.
    return x.mean() if coefficient is None and reduction == MEAN else x.sum()


def _coefficient(problem: Regression | Improvement) -> Tensor | None:
    """m·w of each sample, divided by what a mean divides by; None where all are alike. Not to be written to."""
    mask, weights = problem.mask, problem.weights
    if mask is None and weights is None:
        return None
    dtype = compute_dtype(problem.dtype)
    if weights is None:
        coefficient = mask.to(dtype)
    else:
        coefficient = cast(weights, dtype)
        coefficient = coefficient if mask is None else torch.where(mask, coefficient, 0)
    if problem.reduction != MEAN:
        return coefficient
    count = coefficient.sum()
    count.masked_fill_(count == 0, 1)
    terms = problem.terms_per_sample
    return coefficient / (count if terms == 1 else count.mul_(terms))


def _beside(x: Tensor, scalar: Tensor) -> Tensor:
    """``scalar`` on the device of ``x`` and in its dtype; of a 0-d tensor the dtype doesn't count in an operation."""
    if scalar.device == x.device and (scalar.ndim == 0 or scalar.dtype == x.dtype):
        return scalar
    return scalar.to(x.device, x.dtype, non_blocking=True)
