"""What a loss asks of a policy's distribution: log-probability, entropy and divergence, for one head or several.

A policy with one action head gives a plain distribution, one with several a
`tensordict.nn.CompositeDistribution`; `ActionHeads` makes them alike. Nothing here depends on
`tensordict.nn.set_composite_lp_aggregate`.
"""

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import CompositeDistribution
from torch import Tensor
from torch.distributions import Distribution, Independent, TransformedDistribution, kl_divergence
from torch.distributions.kl import _KL_MEMOIZE, _dispatch_kl


class ActionHeads:
    """The distribution of an action that is made of one or several parts, independent given the observation.

    Log-probabilities, entropies and divergences add up over the heads of a `CompositeDistribution`, and over the
    dimensions of a head that the samples don't have (the agents of a team with one common reward). Those of a plain
    distribution are taken as they are: summing over the dimensions of an action is `torch.distributions.Independent`'s
    task. All have one trailing dimension more than the batch: ``[*B, 1]``.

    Args:
        dist: the policy's distribution.
        action: the key of the action that a plain distribution draws.
        batch_ndim: number of dimensions ``*B`` of the samples.

    """

    def __init__(self, dist: Distribution, action: NestedKey, batch_ndim: int) -> None:
        self.composite = isinstance(dist, CompositeDistribution)
        self.heads: dict[NestedKey, Distribution] = (
            dict(dist.dists) if isinstance(dist, CompositeDistribution) else {action: dist}
        )
        self.batch_ndim = batch_ndim

    def like(self, dist: Distribution) -> "ActionHeads":
        """Those of another distribution over the same action."""
        return ActionHeads(dist, next(iter(self.heads)), self.batch_ndim)

    def log_prob(self, tensordict: TensorDictBase) -> Tensor:
        """Log-probability of the action in ``tensordict``."""
        return self.total([head.log_prob(tensordict.get(key)) for key, head in self.heads.items()])

    def entropies(self, samples: int) -> dict[NestedKey, Tensor]:
        """Entropy of each head, see `entropy`."""
        return {key: self.per_sample(entropy(head, samples)) for key, head in self.heads.items()}

    def divergence_from(self, old: "ActionHeads", samples: int) -> Tensor:
        """KL[old | this], see `divergence`."""
        pairs = [(old.heads[key], head) for key, head in self.heads.items()]
        for pair in pairs:
            _look_up_divergence(*pair)
        return self.total([divergence(*pair, samples) for pair in pairs])

    def total(self, parts: list[Tensor]) -> Tensor:
        """Sum of what belongs to each head."""
        return torch.stack([self.per_sample(part) for part in parts]).sum(0)

    def per_sample(self, x: Tensor) -> Tensor:
        """``x``, of a distribution's batch shape, as one value per sample."""
        if self.composite and x.ndim > self.batch_ndim:
            x = x.flatten(self.batch_ndim).sum(-1)
        return x.unsqueeze(-1) if x.ndim == self.batch_ndim else x


def entropy(dist: Distribution, samples: int) -> Tensor:
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


def divergence(old: Distribution, new: Distribution, samples: int) -> Tensor:
    """KL[old | new] in closed form; where there is none, the mean of log old − log new over draws from old."""
    try:
        return kl_divergence(old, new)
    except NotImplementedError:
        action = old.sample((samples,))
        return (old.log_prob(action) - new.log_prob(action)).mean(0)


WRAPPERS = (Independent, TransformedDistribution)


def _look_up_divergence(old: Distribution, new: Distribution) -> None:
    """Fill the table in which `kl_divergence` keeps its formulas.

    torch.compile can't, and it reads the table only once for all heads.
    """
    _fill_table(type(old), type(new))
    if isinstance(old, WRAPPERS) and isinstance(new, WRAPPERS):
        _look_up_divergence(old.base_dist, new.base_dist)


@torch.compiler.assume_constant_result
def _fill_table(old: type, new: type) -> bool:
    return _KL_MEMOIZE.setdefault((old, new), _dispatch_kl(old, new)) is not NotImplemented
