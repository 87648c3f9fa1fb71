"""What a loss asks of a policy's distribution: log-probability, entropy and divergence, for one head or several.

A policy with one action head gives a plain distribution, one with several a
`tensordict.nn.CompositeDistribution`. Both are a mapping from the action's key to a distribution (`action_heads`):
heads are independent given the observation, so log-probabilities, entropies and divergences add up over them, and
over the dimensions of a head that the samples don't have (the agents of a team with one common reward). Nothing
here depends on `tensordict.nn.set_composite_lp_aggregate`.
"""

from collections.abc import Iterable

import torch
from tensordict import TensorDictBase
from tensordict.nn import CompositeDistribution
from tensordict.utils import NestedKey
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

Heads = dict[NestedKey, Distribution]


def action_heads(dist: Distribution, action: NestedKey | list[NestedKey]) -> Heads:
    """The action heads of ``dist`` by the key of the action that each draws; ``action`` names a single head."""
    if isinstance(dist, CompositeDistribution):
        return dict(dist.dists)
    return {action[0] if isinstance(action, list) else action: dist}


def log_prob(heads: Heads, tensordict: TensorDictBase) -> dict[NestedKey, Tensor]:
    """Log-probability of the actions in ``tensordict``, for each head."""
    return {key: dist.log_prob(tensordict.get(key)) for key, dist in heads.items()}


def entropy(heads: Heads, samples: int) -> dict[NestedKey, Tensor]:
    """Entropy of each head: `head_entropy`."""
    return {key: head_entropy(dist, samples) for key, dist in heads.items()}


def divergence(old: Heads, new: Heads, samples: int) -> dict[NestedKey, Tensor]:
    """KL[old | new] of each head: `head_divergence`."""
    return {key: head_divergence(old[key], dist, samples) for key, dist in new.items()}


def head_entropy(dist: Distribution, samples: int) -> Tensor:
    """Entropy in closed form; where there is none, the mean of −log p over ``samples`` draws."""
    try:
        return dist.entropy()
    except NotImplementedError:
        pass
    if dist.has_rsample:
        return -dist.log_prob(dist.rsample((samples,))).mean(0)
    surprise = -dist.log_prob(dist.sample((samples,)))
    # The draws hold no gradient; the score function's does instead: with s = −log p, ∇H = E[(1 − s) ∇s].
    return (surprise - surprise.detach() * (surprise - surprise.detach())).mean(0)


def head_divergence(old: Distribution, new: Distribution, samples: int) -> Tensor:
    """KL[old | new] in closed form; where there is none, the mean of log old − log new over draws from old."""
    try:
        return kl_divergence(old, new)
    except NotImplementedError:
        action = old.sample((samples,))
        return (old.log_prob(action) - new.log_prob(action)).mean(0)


def total(parts: Iterable[Tensor], ndim: int) -> Tensor:
    """Sum of the heads' ``parts``, each summed over its dimensions beyond the ``ndim`` of the samples."""
    return torch.stack([part.flatten(ndim).sum(-1) if part.ndim > ndim else part for part in parts]).sum(0)
