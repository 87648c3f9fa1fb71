"""A policy's log-probability of an action that is made of one or several parts.

A policy with one action head gives a plain distribution, one with several a
`tensordict.nn.CompositeDistribution`; `DistributionHeads` makes them alike. Nothing here depends on
`tensordict.nn.set_composite_lp_aggregate`.

Diagonal Gaussians, squashed by tanh or not, are known by their types, and their log-probabilities are computed by
`fusedrl.kernels` in place of the distribution's own methods.
"""

import math
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import CompositeDistribution, ProbabilisticTensorDictModule
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, TanhTransform, TransformedDistribution
from torch.distributions.utils import _standard_normal

from ..kernels import normal_log_prob, normal_sample
from .modules import is_of_torchrl

_DISTRIBUTIONS = "modules.distributions.continuous"


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
        self.heads: dict[NestedKey, PolicyDistribution] = dict(dist.dists) if self.composite else {action: dist}
        self.batch_ndim = batch_ndim

    def log_prob(self, actions: TensorDictBase | Mapping[NestedKey, Tensor]) -> Tensor:
        """Log-probability of the action in ``actions``."""
        return self.total([log_prob(head, actions[key], key) for key, head in self.heads.items()])

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

    def entropy(self) -> Tensor | None:
        """The entropy, shape ``[*B]``; None if it is squashed, which leaves no closed form."""
        if self.squash is not None:
            return None
        return self.scale.log().sum(-1) + self.scale.shape[-1] * _ENTROPY_OF_STANDARD_NORMAL

    def divergence_from(self, old: "DiagonalGaussian") -> Tensor:
        """KL[old | this], shape ``[*B]``, if both are squashed alike: by what makes no difference then."""
        variance_ratio = (old.scale / self.scale).square()
        distance = ((old.loc - self.loc) / self.scale).square()
        return 0.5 * (variance_ratio + distance - 1 - variance_ratio.log()).sum(-1)

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


class Deferred:
    """A `DiagonalGaussian` and the distribution that it is of, which is built once it is asked for something.

    Any attribute is that of the distribution. To build one takes as long as its log-probability, and on a GPU it waits
    for the device: TorchRL reads the bounds, and PyTorch the parameters unless their validation is turned off, as
    importing TorchRL and compiling do.
    """

    # What losses ask before they draw or judge an action, of which none is built.
    has_rsample = True
    batch_shape = property(lambda self: self.gaussian.loc.shape[:-1])
    event_shape = property(lambda self: self.gaussian.loc.shape[-1:])

    def __init__(self, gaussian: DiagonalGaussian, module: ProbabilisticTensorDictModule) -> None:
        self.gaussian = gaussian
        self.module = module

    @cached_property
    def built(self) -> Distribution:
        """The distribution."""
        parameters = {key: getattr(self.gaussian, key) for key in ("loc", "scale")}
        return self.module.distribution_class(**parameters, **self.module.distribution_kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.built, name)


PolicyDistribution: TypeAlias = Distribution | Deferred


def built(dist: PolicyDistribution) -> Distribution:
    """``dist``, or the distribution that it stands for."""
    return dist.built if isinstance(dist, Deferred) else dist


def distribution_of(module: ProbabilisticTensorDictModule, entries: Any) -> PolicyDistribution:
    """``module.get_dist(entries)``, deferred if it is a ``TanhNormal`` or an ``IndependentNormal`` of TorchRL.

    That goes for those of loc and scale alone, of one shape and dtype, and the bounds of the actions. The ``get_dist``
    of ``module`` must be that of its class `ProbabilisticTensorDictModule`.
    """
    gaussian = _gaussian_of(module, entries)
    return module.get_dist(entries) if gaussian is None else Deferred(gaussian, module)


def _gaussian_of(module: ProbabilisticTensorDictModule, entries: Any) -> DiagonalGaussian | None:
    kind = module.distribution_class
    defaults = _DEFERRABLE.get(getattr(kind, "__name__", ""))
    if (
        defaults is None
        or not is_of_torchrl(kind, kind.__name__, _DISTRIBUTIONS)
        or tuple(module.dist_keys) not in _LOC_AND_SCALE
        or not module.distribution_kwargs.keys() <= defaults.keys()
        or torch.compiler.is_compiling()  # which builds it once, and doesn't wait
    ):
        return None
    found = {name: entries.get(key, None) for name, key in zip(module.dist_keys, module.in_keys, strict=True)}
    loc, scale = found["loc"], found["scale"]
    if not (isinstance(loc, Tensor) and isinstance(scale, Tensor) and loc.is_floating_point() and loc.ndim):
        return None
    if loc.shape != scale.shape or loc.dtype != scale.dtype or loc.device != scale.device:
        return None
    if not defaults:
        return DiagonalGaussian(loc, scale, None, None)
    bounds = {**defaults, **module.distribution_kwargs}
    low, high = bounds["low"], bounds["high"]
    if isinstance(low, (int, float)) and isinstance(high, (int, float)):
        return DiagonalGaussian(loc, scale, (float(low), float(high)), None) if low < high else None
    usable = all(isinstance(x, Tensor) and x.device == loc.device and _is_constant_for(loc, x) for x in (low, high))
    return DiagonalGaussian(loc, scale, (low, high), None) if usable else None


# The classes, and the defaults of the arguments that they may be given.
_DEFERRABLE: dict[str, dict[str, float]] = {"TanhNormal": {"low": -1.0, "high": 1.0}, "IndependentNormal": {}}
_LOC_AND_SCALE = (("loc", "scale"), ("scale", "loc"))
_ENTROPY_OF_STANDARD_NORMAL = 0.5 + 0.5 * math.log(2 * math.pi)


def log_prob(dist: PolicyDistribution, action: Tensor, key: NestedKey = "action") -> Tensor:
    """log π(a) of ``dist``; the ``key`` of the action is for the error.

    Raises:
        RuntimeError: the distribution would broadcast the action.

    """
    gaussian = diagonal_gaussian(dist)
    if gaussian is None or action.shape != gaussian.loc.shape or not action.is_floating_point():
        _refuse_to_broadcast(dist, action, key)
        return dist.log_prob(action)
    return gaussian.log_prob(action)


def _refuse_to_broadcast(dist: PolicyDistribution, action: Tensor, key: NestedKey) -> None:
    """Refuse an ``action`` of another shape than those that are drawn; dimensions in front may be added."""
    wanted = dist.batch_shape + dist.event_shape
    if not wanted or action.shape[-len(wanted) :] == wanted:
        return
    # A one-hot action can have a dimension that its distribution doesn't count.
    logits = getattr(dist, "logits", None)
    is_one_hot = isinstance(logits, Tensor) and action.shape[-1:] == logits.shape[-1:]
    if is_one_hot and action.shape[-1 - len(wanted) : -1] == wanted:
        return
    raise RuntimeError(
        f"{key!r} has shape {tuple(action.shape)}, but the policy's distribution is of actions of shape {tuple(wanted)}"
    )


def diagonal_gaussian(dist: Any) -> DiagonalGaussian | None:
    """What ``dist`` is made of, if it is one of those below and no more than that.

    ===================  =========================================================================================
    torch.distributions  ``Independent(Normal(…), 1)``, ``TransformedDistribution`` of it with one ``TanhTransform``
    torchrl.modules      ``IndependentNormal``, ``TanhNormal``, if the last dimension alone is that of the action
    ===================  =========================================================================================

    Others get None, for they may do more than the formulas that are used in their place: a subclass, whose methods may
    be its own; a distribution that is told to validate its arguments; one of a transform with a cache, which returns
    what it remembers to have drawn.
    """
    kind = type(dist)
    if kind is Deferred:
        return dist.gaussian
    squash, margin = None, None
    independent = dist
    if kind is TransformedDistribution or is_of_torchrl(kind, "TanhNormal", _DISTRIBUTIONS):
        found = _squash_of(dist)
        if found is None:
            return None
        squash, margin = found
        independent = dist.base_dist
        if type(independent) is not Independent:
            return None
    elif kind is not Independent and not is_of_torchrl(kind, "IndependentNormal", _DISTRIBUTIONS):
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
    if is_of_torchrl(type(transform), "_PatchedComposeTransform", _DISTRIBUTIONS) and len(transform.parts) == 2:
        transform, stretch = transform.parts
        if not is_of_torchrl(type(stretch), "_PatchedAffineTransform", _DISTRIBUTIONS):
            return None
        squash = (dist.low, dist.high)
    if transform._cache_size:
        return None
    if is_of_torchrl(type(transform), "SafeTanhTransform", _DISTRIBUTIONS):
        return squash, None
    return (squash, 0.0) if type(transform) is TanhTransform else None


def _is_constant_for(loc: Tensor, bound: float | Tensor) -> bool:
    """Whether a bound of the actions gets no gradient, and leaves them the dtype of ``loc``."""
    if not isinstance(bound, Tensor):
        return True
    promoted = bound.ndim > 0 and torch.promote_types(bound.dtype, loc.dtype) != loc.dtype
    return not (bound.requires_grad or promoted)
