"""A policy's log-probability of an action that is made of one or several parts.

A policy with one action head gives a plain distribution, one with several a
`tensordict.nn.CompositeDistribution`; `DistributionHeads` makes them alike. Nothing here depends on
`tensordict.nn.set_composite_lp_aggregate`.

Diagonal Gaussians, squashed by tanh or not, are known by their types, and their log-probabilities are computed by
`fusedrl.kernels` in place of the distribution's own methods.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import CompositeDistribution
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, TanhTransform, TransformedDistribution
from torch.distributions.utils import _standard_normal

from ..kernels import normal_log_prob, normal_sample


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

    def __init__(self, dist: Any, action: NestedKey, batch_ndim: int) -> None:
        self.composite = isinstance(dist, CompositeDistribution)
        self.heads: dict[NestedKey, Distribution] = dict(dist.dists) if self.composite else {action: dist}
        self.batch_ndim = batch_ndim

    def log_prob(self, actions: TensorDictBase | Mapping[NestedKey, Tensor]) -> Tensor:
        """Log-probability of the action in ``actions``."""
        return self.total([log_prob(head, actions[key]) for key, head in self.heads.items()])

    def total(self, parts: list[Tensor]) -> Tensor:
        """Sum of what belongs to each head."""
        found = [self.per_sample(part) for part in parts]
        return found[0] if len(found) == 1 else torch.stack(found).sum(0)

    def per_sample(self, x: Tensor) -> Tensor:
        """``x``, of a distribution's batch shape, as one value per sample."""
        if self.composite and x.ndim > self.batch_ndim:
            x = x.flatten(self.batch_ndim).sum(-1)
        return x.unsqueeze(-1) if x.ndim == self.batch_ndim else x


class DiagonalGaussian(NamedTuple):
    """What a distribution of actions ``[*B, A]`` is made of, in the words of `fusedrl.kernels.normal_log_prob`."""

    loc: Tensor
    scale: Tensor
    squash: tuple[float | Tensor, float | Tensor] | None
    margin: float | None

    def log_prob(self, action: Tensor) -> Tensor:
        """log π(a), shape ``[*B]``."""
        return normal_log_prob(self.loc, self.scale, action, squash=self.squash, margin=self.margin)

    def draw(self, samples: int | None = None) -> tuple[Tensor, Tensor]:
        """An action and its log-probability, or that many along a first dimension.

        The random numbers are those that the distribution's ``rsample`` would draw.
        """
        loc, scale = self.loc, self.scale
        shape = loc.shape if samples is None else (samples, *loc.shape)
        noise = _standard_normal(shape, dtype=loc.dtype, device=loc.device)
        if samples is not None:
            loc, scale = loc.expand(shape), scale.expand(shape)
        return normal_sample(loc, scale, noise, squash=self.squash, margin=self.margin)


def log_prob(dist: Distribution, action: Tensor) -> Tensor:
    """log π(a) of ``dist``."""
    gaussian = diagonal_gaussian(dist)
    if gaussian is None or action.shape != gaussian.loc.shape or not action.is_floating_point():
        return dist.log_prob(action)
    return gaussian.log_prob(action)


def diagonal_gaussian(dist: Any) -> DiagonalGaussian | None:
    """What ``dist`` is made of, if it is one of those below and no more than that.

    ===================  =========================================================================================
    torch.distributions  ``Independent(Normal(…), 1)``, ``TransformedDistribution`` of it with one ``TanhTransform``
    torchrl.modules      ``IndependentNormal``, ``TanhNormal``, if the last dimension alone is that of the action
    ===================  =========================================================================================

    Types must be exact, since a subclass may have methods of its own. So does a distribution that is told to validate
    its arguments, and a transform with a cache, which remembers what it drew.
    """
    kind = type(dist)
    squash, margin = None, None
    independent = dist
    if kind is TransformedDistribution or _is_of_torchrl(kind, "TanhNormal"):
        found = _squash_of(dist)
        if found is None:
            return None
        squash, margin = found
        independent = dist.base_dist
        if type(independent) is not Independent:
            return None
    elif kind is not Independent and not _is_of_torchrl(kind, "IndependentNormal"):
        return None
    normal = independent.base_dist
    if independent.reinterpreted_batch_ndims != 1 or type(normal) is not Normal or dist.__dict__.get("_validate_args"):
        return None
    loc, scale = normal.loc, normal.scale
    if loc.dtype != scale.dtype or not (squash is None or all(_is_constant_for(loc, bound) for bound in squash)):
        return None
    return DiagonalGaussian(loc, scale, squash, margin)


def _squash_of(dist: Any) -> tuple[tuple[Any, Any], float | None] | None:
    """Bounds and margin of a squashed distribution, None if more than that is done to what is drawn."""
    if len(dist.transforms) != 1:
        return None
    (transform,) = dist.transforms
    squash = (-1.0, 1.0)
    if _is_of_torchrl(type(transform), "_PatchedComposeTransform") and len(transform.parts) == 2:
        transform, stretch = transform.parts
        if not _is_of_torchrl(type(stretch), "_PatchedAffineTransform"):
            return None
        squash = (dist.low, dist.high)
    if transform._cache_size:
        return None
    if _is_of_torchrl(type(transform), "SafeTanhTransform"):
        return squash, None
    return (squash, 0.0) if type(transform) is TanhTransform else None


def _is_of_torchrl(kind: type, name: str) -> bool:
    """Whether ``kind`` is that class of TorchRL, which isn't imported for it."""
    return kind.__name__ == name and kind.__module__ == "torchrl.modules.distributions.continuous"


def _is_constant_for(loc: Tensor, bound: float | Tensor) -> bool:
    """Whether a bound of the actions gets no gradient, and leaves them the dtype of ``loc``."""
    if not isinstance(bound, Tensor):
        return True
    promoted = bound.ndim > 0 and torch.promote_types(bound.dtype, loc.dtype) != loc.dtype
    return not (bound.requires_grad or promoted)
