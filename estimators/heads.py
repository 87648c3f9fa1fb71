"""A policy's log-probability of an action that is made of one or several parts.

A policy with one action head gives a plain distribution, one with several a
`tensordict.nn.CompositeDistribution`; `DistributionHeads` makes them alike. Nothing here depends on
`tensordict.nn.set_composite_lp_aggregate`.
"""

from collections.abc import Iterable

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import CompositeDistribution
from torch import Tensor
from torch.distributions import Distribution


def one_or_list(keys: Iterable[NestedKey]) -> NestedKey | list[NestedKey]:
    """The key of the only head, or those of several."""
    keys = list(keys)
    return keys[0] if len(keys) == 1 else keys


class DistributionHeads:
    """The distribution of an action that is made of one or several parts, independent given the observation.

    What belongs to the heads of a `CompositeDistribution` adds up over them, and over the dimensions of a head that
    the samples don't have (the agents of a team with one common reward). That of a plain distribution is taken as it
    is: summing over the dimensions of an action is `torch.distributions.Independent`'s task. All have one trailing
    dimension more than the batch: ``[*B, 1]``.

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

    def log_prob(self, tensordict: TensorDictBase) -> Tensor:
        """Log-probability of the action in ``tensordict``."""
        return self.total([head.log_prob(tensordict.get(key)) for key, head in self.heads.items()])

    def total(self, parts: list[Tensor]) -> Tensor:
        """Sum of what belongs to each head."""
        return torch.stack([self.per_sample(part) for part in parts]).sum(0)

    def per_sample(self, x: Tensor) -> Tensor:
        """``x``, of a distribution's batch shape, as one value per sample."""
        if self.composite and x.ndim > self.batch_ndim:
            x = x.flatten(self.batch_ndim).sum(-1)
        return x.unsqueeze(-1) if x.ndim == self.batch_ndim else x
