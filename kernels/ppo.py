"""The clipped surrogate of PPO from log-probabilities and advantages, with what is logged about it.

What runs underneath is chosen by ``backend`` (see `fusedrl.kernels.backend`): at most two Triton launches forward, or
vectorised PyTorch; backward is one product.
"""

from typing import NamedTuple

from torch import Tensor

from . import ppo_operators
from .checks import Scalar
from .ppo_problem import PPOConstants, check


class ClipPPO(NamedTuple):
    """The loss of `clip_ppo_loss`, and 0-d tensors to log, which hold no gradient.

    Means, here, are over the samples that count, and 0 where none does.
    """

    loss: Tensor
    """0-d for the reductions "mean" and "sum", of the samples' shape for "none"."""
    kl_approx: Tensor
    """Mean of −log p, an estimate of KL[π_prox | π_θ]."""
    clip_fraction: Tensor
    """Share of the samples whose p isn't inside of the clip range."""
    ess: Tensor
    """Effective sample size as a share of the samples: (Σ r)² / (N Σ r²)."""
    max_ratio: Tensor
    """The largest r, after the cap."""
    mean_ratio: Tensor
    """Mean of r, after the cap."""


def clip_ppo_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    clip_low: Scalar,
    clip_high: Scalar,
    *,
    proximal_log_prob: Tensor | None = None,
    max_ratio: Scalar | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    backend: str | None = None,
) -> ClipPPO:
    r"""Clipped surrogate: no gain is left in moving the policy further than the clip range from the old one.

    .. math::
        L = -\mathbb{E}_t\left[\min\left(r_t A_t,\ \text{clip}(p_t,\ 1 - ε_\text{low},\ 1 + ε_\text{high})
        \frac{r_t}{p_t} A_t\right)\right], \qquad
        r_t = \frac{π_θ(a_t|s_t)}{π_\text{old}(a_t|s_t)}, \quad p_t = \frac{π_θ(a_t|s_t)}{π_\text{prox}(a_t|s_t)}

    where :math:`r_t/p_t` holds no gradient, and is 1 unless one of the options makes :math:`p_t` and :math:`r_t`
    differ.

    Args:
        log_prob: log π_θ(a_t|s_t), any shape; one element is one sample.
        old_log_prob: log π_old(a_t|s_t), the same shape.
        advantage: A_t, the same shape.
        clip_low: ε_low, a number or a 0-d tensor.
        clip_high: ε_high, likewise.
        proximal_log_prob: log π_prox(a_t|s_t), the same shape, of the policy that the range is centred on; π_old
            by default (Hilton et al. 2021). A constant.
        max_ratio: a cap on r_t, a number or a 0-d tensor: as if π_old had given the action more probability. A capped
            sample still moves the policy.
        mask: bool, the same shape: True where a sample counts. What stands at the others is never read into a result
            or a gradient.
        weights: importance weights w_t, the same shape. The mean is then Σ w L / Σ w.
        normalize: shift and scale the advantages to mean 0 and (unbiased) standard deviation 1, which is taken to be
            at least 10⁻⁶. A single sample stays as it is.
        reduction: "mean", "sum", or "none".
        backend: which implementation runs; None for the block's or the process's choice.

    Returns:
        The loss, in the dtype that the samples promote to, and what is logged. The loss is differentiable twice with
        respect to ``log_prob``, and with respect to anything else that requires grad (which is slower: the operations
        are then PyTorch's own). Half precision is computed in float32.

    Raises:
        RuntimeError: shapes or devices differ, or a scalar has dimensions.
        TypeError: ``log_prob`` isn't floating-point, or ``mask`` not bool.
        ValueError: the reduction or the backend doesn't exist, the cap isn't positive, or a number ε is negative.

    Examples:
        >>> import torch
        >>> ratio, advantage = torch.tensor([0.5, 0.5, 1.5, 1.5]), torch.tensor([1.0, -1.0, 1.0, -1.0])
        >>> result = clip_ppo_loss(ratio.log(), torch.zeros(4), advantage, 0.2, 0.2, reduction="none")
        >>> result.loss  # −½, and −1.2 for a gain that ends at 1.2; losses don't end
        tensor([-0.5000,  0.8000, -1.2000,  1.5000])
        >>> result.clip_fraction, result.ess  # all are outside; (Σ r)² / (4 Σ r²) = 16 / 20
        (tensor(1.), tensor(0.8000))

    See Schulman et al. 2017, Proximal policy optimization algorithms (arXiv:1707.06347), equation 7; Yu et al. 2025,
    DAPO (arXiv:2503.14476), equation 10 for ε_high ≠ ε_low; Hilton et al. 2021, Batch size-invariance for policy
    optimization (arXiv:2110.00641) for π_prox and the cap.

    """
    constants = PPOConstants(
        old_log_prob, advantage, proximal_log_prob, mask, weights, clip_low, clip_high, max_ratio, normalize, reduction
    )
    check(log_prob, constants)
    return ClipPPO(*ppo_operators.solve(log_prob, constants, backend))
