"""The mathematics of the losses, on tensors: no TensorDict, no network, no host synchronisation.

An objective is what the papers maximise, one value per sample; a loss is its negative. One file per family:

=======================  ==================================================================
``policy_gradient``      REINFORCE, A2C, the PPO family
``q_learning``           DQN: values of discrete actions
``deterministic``        TD3, TD3+BC
``soft_actor_critic``    SAC, its discrete form, REDQ, CrossQ
``quantiles``            TQC
``conservative``         CQL
``offline``              IQL
``imitation``            behaviour cloning, GAIL and others that learn from demonstrations
``exploration``          RND
``policy_search``        PILCO's cost
``imagination``          Dreamer: world models and imagined trajectories
``categorical_kl``       DreamerV3: balanced divergence of discrete latents
``discrete_regression``  DreamerV3: symlog, and regression as classification
=======================  ==================================================================
"""

from .categorical_kl import balanced_divergence, categorical_kl_balanced, categorical_kl_terms, divergence_terms
from .conservative import conservative_gap
from .deterministic import cloning_error, smoothed_action, value_weight
from .discrete_regression import symexp, symexp_bins, symlog, two_hot_cross_entropy, two_hot_decode, two_hot_encode
from .exploration import distillation_error
from .imagination import discount_weight, discounted_sum, gaussian_kl, over_features, quantile, step_divergence, wide
from .imitation import classification_loss, discriminator_loss, gradient_penalty, standard_normal_divergence
from .offline import advantage_weighted_objective, expectile_loss
from .policy_gradient import (
    adapted_beta,
    approximate_kl,
    clip_fraction,
    clip_ppo_objective,
    effective_sample_size,
    explained_variance,
    fill_padding,
    kl_penalty_objective,
    largest_ratio,
    masked_mean,
    normalize_advantage,
    policy_gradient_objective,
    ppo_objective,
    weight_excess,
)
from .policy_search import saturating_cost
from .q_learning import greedy_binary_value, greedy_value, value_of_index, value_of_parts
from .quantiles import mean_atom_distance, quantile_huber_loss, truncated_mixture
from .soft_actor_critic import categorical_entropy, expected_soft_value, soft_value, temperature_loss

__all__ = [
    "adapted_beta",
    "advantage_weighted_objective",
    "approximate_kl",
    "balanced_divergence",
    "categorical_entropy",
    "categorical_kl_balanced",
    "categorical_kl_terms",
    "classification_loss",
    "clip_fraction",
    "clip_ppo_objective",
    "cloning_error",
    "conservative_gap",
    "discount_weight",
    "discounted_sum",
    "discriminator_loss",
    "distillation_error",
    "divergence_terms",
    "effective_sample_size",
    "expected_soft_value",
    "expectile_loss",
    "explained_variance",
    "fill_padding",
    "gaussian_kl",
    "gradient_penalty",
    "greedy_binary_value",
    "greedy_value",
    "kl_penalty_objective",
    "largest_ratio",
    "masked_mean",
    "mean_atom_distance",
    "normalize_advantage",
    "over_features",
    "policy_gradient_objective",
    "ppo_objective",
    "quantile",
    "quantile_huber_loss",
    "saturating_cost",
    "smoothed_action",
    "soft_value",
    "standard_normal_divergence",
    "step_divergence",
    "symexp",
    "symexp_bins",
    "symlog",
    "temperature_loss",
    "truncated_mixture",
    "two_hot_cross_entropy",
    "two_hot_decode",
    "two_hot_encode",
    "value_of_index",
    "value_of_parts",
    "value_weight",
    "weight_excess",
    "wide",
]
