"""How far what a world model predicts of its discrete latents (the prior) is from what it infers (the posterior).

A latent state is several categorical variables, drawn independently. Computed in float32 at least.
"""

import torch
from torch import Tensor

from ...kernels.dispatch import as_input
from .imagination import wide


def categorical_kl_balanced(
    posterior_logits: Tensor, prior_logits: Tensor, alpha: float = 0.8, free_bits: float = 1.0
) -> Tensor:
    r"""Divergence of the posterior from the prior whose gradient goes more to the prior, averaged over all variables.

    .. math::
        α \max\big(ν, \text{KL}(\text{sg}(q) \| p)\big) + (1 - α) \max\big(ν, \text{KL}(q \| \text{sg}(p))\big)

    where sg holds its argument constant. Each variable has its own free nats: below them there is no gradient.

    Args:
        posterior_logits: of q, shape ``[*B, C, K]``: C variables of K classes.
        prior_logits: of p, the same shape.
        alpha: α, the prior's share of the gradient.
        free_bits: ν, in nats.

    Returns:
        A 0-d tensor, dtype of the logits.

    Raises:
        ValueError: the shapes differ.

    Examples:
        >>> posterior, prior = torch.tensor([[[8.0, 0.0]]]), torch.zeros(1, 1, 2)
        >>> categorical_kl_balanced(posterior, prior, free_bits=0.0), categorical_kl_balanced(posterior, prior)
        (tensor(0.6901), tensor(1.))

    See Hafner et al. 2021, Mastering Atari with discrete world models (arXiv:2010.02193), algorithm 2.

    """
    return balanced_divergence(posterior_logits, prior_logits, alpha, free_bits).mean().to(posterior_logits.dtype)


def categorical_kl_terms(
    posterior_logits: Tensor, prior_logits: Tensor, free_nats: float = 1.0, unimix: float = 0.01
) -> tuple[Tensor, Tensor]:
    r"""The two divergences that DreamerV3 weighs apart, averaged over the batch.

    .. math::
        L_\text{dyn} = \max\big(ν, \text{KL}(\text{sg}(q) \| p)\big), \qquad
        L_\text{rep} = \max\big(ν, \text{KL}(q \| \text{sg}(p))\big)

    where sg holds its argument constant, so that the first trains the prior and the second the posterior; KL is the
    sum over the variables.

    Args:
        posterior_logits: of q, shape ``[*B, C, K]``: C variables of K classes.
        prior_logits: of p, the same shape.
        free_nats: ν.
        unimix: the share of a uniform distribution that is mixed into both.

    Returns:
        L_dyn and L_rep, 0-d tensors, dtype of the logits.

    Raises:
        ValueError: the shapes differ.

    Examples:
        >>> posterior, prior = torch.tensor([[[8.0, 0.0], [0.0, 8.0]]]), torch.zeros(1, 2, 2)
        >>> categorical_kl_terms(posterior, prior, unimix=0.0)
        (tensor(1.3803), tensor(1.3803))

    See Hafner et al. 2023, Mastering diverse domains through world models (arXiv:2301.04104), on world model learning.

    """
    dynamic, representation = divergence_terms(posterior_logits, prior_logits, free_nats, unimix)
    dtype = posterior_logits.dtype
    return dynamic.mean().to(dtype), representation.mean().to(dtype)


def balanced_divergence(
    posterior_logits: Tensor, prior_logits: Tensor, alpha: float, free_bits: float, unimix: float = 0.0
) -> Tensor:
    """What `categorical_kl_balanced` averages, per state: shape ``[*B]``, float32 at least."""
    _check_shapes(posterior_logits, prior_logits)
    posterior, prior = _log_prob(posterior_logits, unimix), _log_prob(prior_logits, unimix)
    # Both divergences of the formula have one value; only the gradients are to be shared out. A step from a constant
    # to its own value changes nothing but passes on that share of the gradient.
    alpha = as_input(alpha, posterior)
    alpha = alpha.to(posterior.dtype) if isinstance(alpha, Tensor) else alpha  # as lerp wants it
    posterior = posterior.detach().lerp(posterior, 1 - alpha)
    prior = prior.detach().lerp(prior, alpha)
    kl = _kl(posterior, prior)
    return kl.clamp_min(as_input(free_bits, kl)).mean(-1)


def divergence_terms(
    posterior_logits: Tensor, prior_logits: Tensor, free_nats: float, unimix: float
) -> tuple[Tensor, Tensor]:
    """What `categorical_kl_terms` averages, per state: shape ``[*B]`` each, float32 at least."""
    _check_shapes(posterior_logits, prior_logits)
    posterior, prior = _log_prob(posterior_logits, unimix), _log_prob(prior_logits, unimix)
    dynamic, representation = _kl(posterior.detach(), prior), _kl(posterior, prior.detach())
    free_nats = as_input(free_nats, dynamic)
    return dynamic.sum(-1).clamp_min(free_nats), representation.sum(-1).clamp_min(free_nats)


def _log_prob(logits: Tensor, unimix: float) -> Tensor:
    logits = wide(logits)
    if unimix:
        return ((1 - unimix) * logits.softmax(-1) + unimix / logits.shape[-1]).log()
    # A class that is ruled out in both has no part in the divergence, but 0 · (−inf + inf) is NaN.
    return logits.log_softmax(-1).clamp_min(torch.finfo(logits.dtype).min)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) of each variable, shape ``[*B, C]``."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _check_shapes(posterior_logits: Tensor, prior_logits: Tensor) -> None:
    if posterior_logits.shape != prior_logits.shape or posterior_logits.ndim < 2:
        raise ValueError(
            f"posterior_logits have shape {tuple(posterior_logits.shape)} and prior_logits "
            f"{tuple(prior_logits.shape)}: both must have one shape [*B, variables, classes]"
        )
