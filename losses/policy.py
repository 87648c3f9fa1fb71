"""What a loss asks of a policy's distribution: log-probability, entropy and divergence, for one head or several."""

import torch
from tensordict import NestedKey
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent, TransformedDistribution, kl_divergence
from torch.distributions.kl import _KL_MEMOIZE, _dispatch_kl

from ..estimators.heads import Deferred, DistributionHeads, PolicyDistribution, built, diagonal_gaussian


class ActionHeads(DistributionHeads):
    """The heads of a policy's action, with their entropies and their divergence from another policy's."""

    def like(self, dist: PolicyDistribution) -> "ActionHeads":
        """Those of another distribution over the same action."""
        return ActionHeads(dist, next(iter(self.heads)), self.batch_ndim)

    def draw(self) -> tuple[dict[NestedKey, Tensor], Tensor]:
        """The action of each head, and the log-probability of them all; both differentiable.

        Every head must have ``rsample``, whose random numbers are drawn.
        """
        actions, parts = {}, []
        for key, head in self.heads.items():
            actions[key], part = draw(head)
            parts.append(part)
        return actions, self.total(parts)

    def entropies(self, samples: int) -> dict[NestedKey, Tensor]:
        """Entropy of each head, see `entropy`."""
        return {key: self.per_sample(entropy(head, samples)) for key, head in self.heads.items()}

    def divergence_from(self, old: "ActionHeads", samples: int) -> Tensor:
        """KL[old | this], see `divergence`."""
        pairs = [(old.heads[key], head) for key, head in self.heads.items()]
        if torch.compiler.is_compiling():  # where nothing is deferred
            for pair in pairs:
                _look_up_divergence(*map(built, pair))
        return self.total([divergence(*pair, samples) for pair in pairs])


def draw(dist: PolicyDistribution, samples: int | None = None) -> tuple[Tensor, Tensor]:
    """An action of ``dist`` and its log-probability, differentiable; or that many along a first dimension."""
    gaussian = diagonal_gaussian(dist)
    if gaussian is not None:
        return gaussian.draw(samples)
    action = dist.rsample(() if samples is None else (samples,))
    return action, dist.log_prob(action)


def entropy(dist: PolicyDistribution, samples: int) -> Tensor:
    """Entropy in closed form; where there is none, the mean of −log p over ``samples`` draws."""
    gaussian = diagonal_gaussian(dist)
    if gaussian is not None:
        found = gaussian.entropy()
        if found is not None:
            return found
        if samples == 1:
            return -gaussian.draw()[1]
        return -gaussian.draw(samples)[1].mean(0)
    try:
        return dist.entropy()
    except NotImplementedError:
        pass
    if dist.has_rsample:
        return -dist.log_prob(dist.rsample((samples,))).mean(0)
    surprise = -dist.log_prob(dist.sample((samples,)))
    # The draws hold no gradient; the score function's does instead: with s = −log p, ∇H = E[(1 − s) ∇s].
    return (surprise - surprise.detach() * (surprise - surprise.detach())).mean(0)


def divergence(old: PolicyDistribution, new: PolicyDistribution, samples: int) -> Tensor:
    """KL[old | new] in closed form; where there is none, the mean of log old − log new over draws from old.

    Raises:
        RuntimeError: they are of other shapes, and would broadcast.

    """
    before, now = _shape(old), _shape(new)
    if before != now:
        raise RuntimeError(
            f"the old policy's distribution has shape {tuple(before)}, but the policy's has {tuple(now)}: are the "
            "parameters in the data those of this policy?"
        )
    if isinstance(old, Deferred) and isinstance(new, Deferred) and old.module is new.module:
        return new.gaussian.divergence_from(old.gaussian)  # of one module, which squashes them alike
    old, new = built(old), built(new)
    try:
        return kl_divergence(old, new)
    except NotImplementedError:
        with torch.no_grad():  # `sample` of a normal distribution waits for the device, `rsample` doesn't
            action = old.rsample((samples,)) if old.has_rsample else old.sample((samples,))
        return (old.log_prob(action) - new.log_prob(action)).mean(0)


def _shape(dist: PolicyDistribution) -> torch.Size:
    """The shape of the actions; of a categorical one with the number of actions that there are."""
    return dist.param_shape if isinstance(dist, Categorical) else dist.batch_shape + dist.event_shape


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
