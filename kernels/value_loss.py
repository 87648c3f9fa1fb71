"""The critic's loss from values and their targets, its step clipped or not, with what is logged about it.

What runs underneath is chosen by ``backend`` (see `fusedrl.kernels.backend`): at most two Triton launches forward, or
vectorised PyTorch; backward is one product.
"""

from typing import NamedTuple

from torch import Tensor

from . import value_loss_operators
from .checks import Scalar
from .dispatch import constant
from .value_loss_problem import ValueConstants, check


class ValueLoss(NamedTuple):
    """The loss of `value_loss`, and 0-d tensors to log, which hold no gradient."""

    loss: Tensor
    """0-d for the reductions "mean" and "sum", of the samples' shape for "none"."""
    clip_fraction: Tensor | None
    """Share of the samples that count whose step was clipped; None without an old value."""
    explained_variance: Tensor | None
    """How much of the target's variance over the samples that count the value predicts; None unless asked for."""


def value_loss(
    value: Tensor,
    value_target: Tensor,
    loss_function: str,
    *,
    old_value: Tensor | None = None,
    clip: Scalar | None = None,
    coefficient: Scalar | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    explained_variance: bool = False,
    reduction: str = "mean",
    backend: str | None = None,
) -> ValueLoss:
    r"""Distance of the critic's value from its target; with an old value pessimistic, so that its step is bounded.

    .. math::
        L = c\, \mathbb{E}_t\left[\max\left(d(V_t, \hat V_t),\
        d(V^\text{old}_t + \text{clip}(V_t - V^\text{old}_t, -ε, ε), \hat V_t)\right)\right]

    or, without an old value, :math:`c\, \mathbb{E}_t[d(V_t, \hat V_t)]`. The explained variance is

    .. math::
        1 - \frac{\text{Var}[\hat V - V]}{\max(\text{Var}[\hat V],\ ϵ)}

    with biased variances and the machine epsilon ϵ of the target's dtype.

    Args:
        value: V_t, any shape; one element is one sample.
        value_target: the target, the same shape.
        loss_function: d: ``"l1"`` (\|e\|), ``"l2"`` (e²) or ``"smooth_l1"`` (e²/2 where \|e\| < 1, else \|e\| − 1/2).
        old_value: V_old, the value when the data was collected, the same shape. A constant.
        clip: ε, a number or a 0-d tensor; together with ``old_value``.
        coefficient: c, a number or a 0-d tensor; None for 1.
        mask: bool, the same shape: True where a sample counts. What stands at the others is never read into a result
            or a gradient.
        weights: importance weights w_t, the same shape. The mean is then Σ w L / Σ w.
        explained_variance: find it.
        reduction: "mean", "sum", or "none".
        backend: which implementation runs; None for the block's or the process's choice.

    Returns:
        The loss, in the dtype that the samples promote to, and what is logged. The loss is differentiable twice with
        respect to ``value``, and with respect to anything else but the old value that requires grad (which is slower:
        the operations are then PyTorch's own). Half precision is computed in float32.

    Raises:
        RuntimeError: shapes or devices differ, or a scalar has dimensions.
        TypeError: ``value`` isn't floating-point, or ``mask`` not bool.
        ValueError: the distance, the reduction or the backend doesn't exist, or ``clip`` and ``old_value`` aren't
            given together, or ``clip`` is a negative number.

    Examples:
        >>> import torch
        >>> old, new, target = torch.zeros(2), torch.tensor([0.1, 1.0]), torch.tensor([1.0, 2.0])
        >>> value_loss(new, target, "l1", old_value=old, clip=0.2, reduction="none").loss  # |0.1 − 1|, |0.2 − 2|
        tensor([0.9000, 1.8000])
        >>> value_loss(new, target, "l2", explained_variance=True)  # (0.9² + 1²) / 2; 1 − 0.05² / 0.5²
        ValueLoss(loss=tensor(0.9050), clip_fraction=None, explained_variance=tensor(0.9900))

    See Schulman et al. 2016 (arXiv:1506.02438) and the implementation of Dhariwal et al. 2017, OpenAI Baselines.

    """
    old_value = constant(old_value)
    constants = ValueConstants(
        value_target, old_value, mask, weights, clip, coefficient, loss_function, explained_variance, reduction
    )
    check(value, constants)
    loss, *logged = value_loss_operators.solve(value, constants, backend)
    return ValueLoss(
        loss,
        None if old_value is None else logged[0],
        logged[-1] if explained_variance else None,
    )
