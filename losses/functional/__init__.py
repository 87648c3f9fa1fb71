"""The mathematics of the losses, on tensors: no TensorDict, no network, no host synchronisation.

An objective is what the papers maximise, one value per sample; a loss is its negative. One file per family:

=========================  =============================================
``policy_gradient``        REINFORCE, A2C, the PPO family
=========================  =============================================
"""

from .policy_gradient import (
    adapted_beta,
    approximate_kl,
    clip_fraction,
    clip_ppo_objective,
    effective_sample_size,
    explained_variance,
    kl_penalty_objective,
    largest_ratio,
    masked_mean,
    normalize_advantage,
    policy_gradient_objective,
    ppo_objective,
    weight_excess,
)

__all__ = [
    "adapted_beta",
    "approximate_kl",
    "clip_fraction",
    "clip_ppo_objective",
    "effective_sample_size",
    "explained_variance",
    "kl_penalty_objective",
    "largest_ratio",
    "masked_mean",
    "normalize_advantage",
    "policy_gradient_objective",
    "ppo_objective",
    "weight_excess",
]
