"""The three problems that every backend of the action-value losses solves: their inputs and checks.

An ensemble of N networks judges each sample, so that its values have the shape ``[N, *B]``; all else is ``[*B]``.

    Bootstrap      v' = min_i Q_i − α log π,  y = r + γ(1 − term)·v'               what the values are drawn to
    Regression     L  = Σ_i d(Q_i, y),  priority = max_i |Q_i − y| or its square   how they are drawn to it
    Improvement    L  = α log π − min_i Q_i                                        what a soft policy learns from them

with the losses reduced over samples by the coefficients m·w (mask and importance weights), over Σ m·w for a mean.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import MEAN, NONE, REDUCTIONS, check_0d, check_broadcasts, check_choice, check_scalar, check_tensor
from .distances import DISTANCES
from .dtypes import result_dtype

SQUARE, ABS = PRIORITIES = ("square", "abs")


class Bootstrap(NamedTuple):
    """Target of a transition; γ is a number or broadcastable to ``[*B]``, α a number or a 0-d tensor."""

    next_values: Any
    reward: Any
    terminated: Any
    gamma: Any
    log_prob: Any = None
    alpha: Any = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the results: that of the next values, log-probabilities and rewards together."""
        return result_dtype(self.next_values, self.reward, self.log_prob)


class Regression(NamedTuple):
    """Loss of an ensemble whose members have one target, a constant."""

    values: Any
    target: Any
    mask: Any
    weights: Any
    loss_function: str
    priority: str
    per_member: bool
    reduction: str

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the results: that of the values and the target together."""
        return result_dtype(self.values, self.target)

    @property
    def loss_shape(self) -> torch.Size:
        """The shape of the loss."""
        if self.reduction != NONE:
            return torch.Size()
        return self.values.shape if self.per_member else self.target.shape

    @property
    def terms_per_sample(self) -> int:
        """How many terms a sample adds to the count that a mean divides by."""
        return len(self.values) if self.per_member else 1


class Improvement(NamedTuple):
    """Loss of a policy that seeks value and entropy; α is a number or a 0-d tensor."""

    values: Any
    log_prob: Any
    alpha: Any
    mask: Any
    weights: Any
    reduction: str

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the results: that of the values and the log-probabilities together."""
        return result_dtype(self.values, self.log_prob)

    @property
    def loss_shape(self) -> torch.Size:
        """The shape of the loss."""
        return self.log_prob.shape if self.reduction == NONE else torch.Size()

    @property
    def terms_per_sample(self) -> int:
        """How many terms a sample adds to the count that a mean divides by."""
        return 1


def count_is_unknown(problem: Regression | Improvement) -> bool:
    """Whether what the mean divides by has to be read from tensors: Σ m·w."""
    return problem.reduction == MEAN and (problem.mask is not None or problem.weights is not None)


# --- checks -------------------------------------------------------------------------------------------------------


def check_bootstrap(problem: Bootstrap) -> None:
    """Raise RuntimeError for a shape, dtype or device that doesn't fit, TypeError for what isn't there or no tensor."""
    next_values, reward, terminated, gamma, log_prob, alpha = problem
    _check_ensemble("next_values", next_values)
    _check_member("reward", reward, "next_values", next_values)
    _check_member("terminated", terminated, "next_values", next_values)
    check_scalar("gamma", gamma)
    check_broadcasts("gamma", gamma, "reward", reward.shape, next_values.device)
    if log_prob is not None:
        _check_member("log_prob", log_prob, "next_values", next_values)
        if alpha is None:
            raise TypeError("log_prob is given, but alpha is None: a number or a 0-d tensor is wanted")
        check_0d("alpha", alpha)


def check_regression(problem: Regression) -> None:
    """Raise RuntimeError for a shape or device, TypeError for a dtype, ValueError for a name that doesn't exist."""
    values = problem.values
    _check_ensemble("values", values)
    _check_member("target", problem.target, "values", values)
    _check_mask_and_weights(problem, values)
    check_choice("loss_function", problem.loss_function, DISTANCES)
    check_choice("priority", problem.priority, PRIORITIES)
    check_choice("reduction", problem.reduction, REDUCTIONS)


def check_improvement(problem: Improvement) -> None:
    """Raise RuntimeError for a shape or device, TypeError for a dtype, ValueError for a name that doesn't exist."""
    values = problem.values
    _check_ensemble("values", values)
    _check_member("log_prob", problem.log_prob, "values", values)
    check_0d("alpha", problem.alpha)
    _check_mask_and_weights(problem, values)
    check_choice("reduction", problem.reduction, REDUCTIONS)


def _check_ensemble(name: str, values: Tensor) -> None:
    check_tensor(name, values)
    if not values.ndim or not values.shape[0] or not values.is_floating_point():
        raise RuntimeError(
            f"{name} has shape {tuple(values.shape)} and dtype {values.dtype}: floating-point values "
            "[members, *batch] of at least one member are wanted"
        )


def _check_member(name: str, x: Tensor, ensemble: str, values: Tensor) -> None:
    check_tensor(name, x)
    if x.shape != values.shape[1:] or x.device != values.device:
        raise RuntimeError(
            f"{name} has shape {tuple(x.shape)} on {x.device}, but {ensemble} has shape {tuple(values.shape)} on "
            f"{values.device}: shape {tuple(values.shape[1:])}, one value per sample, is wanted there"
        )


def _check_mask_and_weights(problem: Regression | Improvement, values: Tensor) -> None:
    if problem.mask is not None:
        _check_member("mask", problem.mask, "values", values)
        if problem.mask.dtype != torch.bool:
            raise TypeError(f"mask has dtype {problem.mask.dtype}: torch.bool is wanted")
    if problem.weights is not None:
        _check_member("weights", problem.weights, "values", values)
