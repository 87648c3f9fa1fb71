"""What A2C and the PPO family add to a policy gradient: an entropy bonus, and the coefficients of the three terms."""

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule, composite_lp_aggregate
from tensordict.utils import unravel_key
from torch import Tensor

from .policy import ActionHeads
from .policy_gradient import PolicyGradientLoss, Terms

DEFAULT_ENTROPY_COEFF = 0.01


class ActorCriticLoss(PolicyGradientLoss):
    """Base of the losses of the form objective + c₁ · critic − c₂ · entropy.

    Args:
        actor_network: see `PolicyGradientLoss`, as for all that isn't here.
        critic_network: see `PolicyGradientLoss`.
        entropy_bonus: reward the policy's entropy.
        samples_mc_entropy: draws from which the entropy is estimated where it has no closed form.
        entropy_coeff: c₂ (0.01). For several heads it can be a mapping from each head's action key (or
            ``<action>_log_prob``, or ``<action>_entropy``) to the head's coefficient.
        critic_coeff: c₁. None: no critic loss.

    Raises:
        TypeError: a critic coefficient without a critic; an entropy coefficient that is neither a number nor a mapping.
        KeyError: the heads of ``entropy_coeff`` are not those of the policy.

    """

    _schedulable_buffers = frozenset({"entropy_coeff", "critic_coeff"})

    entropy_coeff: Tensor
    critic_coeff: Tensor | None

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        critic_network: TensorDictModule | None = None,
        *,
        entropy_bonus: bool = True,
        samples_mc_entropy: int = 1,
        entropy_coeff: float | Tensor | Mapping[NestedKey, float] | None = None,
        critic_coeff: float | Tensor | None = None,
        loss_critic_type: str = "smooth_l1",
        separate_losses: bool = False,
        functional: bool = True,
        reduction: str | None = None,
        clip_value: float | Tensor | None = None,
        delay_actor: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        if critic_network is None and critic_coeff is not None:
            raise TypeError(f"critic_coeff is {critic_coeff}, but there is no critic_network")
        super().__init__(
            actor_network,
            critic_network,
            loss_critic_type=loss_critic_type,
            separate_losses=separate_losses,
            functional=functional,
            reduction=reduction,
            clip_value=clip_value,
            delay_actor=delay_actor,
            device=device,
        )
        self.entropy_bonus = entropy_bonus
        self.samples_mc_entropy = samples_mc_entropy
        self._head_coeffs: dict[NestedKey, float] | None = None
        if isinstance(entropy_coeff, Mapping):
            self._head_coeffs = self._coeff_of_each_head(entropy_coeff)
            entropy_coeff = 0.0
        elif not isinstance(entropy_coeff, (Real, Tensor, type(None))):
            raise TypeError(f"entropy_coeff must be a number or a mapping, but is {entropy_coeff!r}")
        entropy_coeff = DEFAULT_ENTROPY_COEFF if entropy_coeff is None else entropy_coeff
        self.register_coeff_buffer("entropy_coeff", entropy_coeff, device=device)
        self.register_coeff_buffer("critic_coeff", critic_coeff, device=device)
        self.has_critic_loss = critic_coeff is not None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "entropy_coeff" and getattr(self, "_head_coeffs", None) is not None:
            raise AttributeError(
                f"the entropy of this {type(self).__name__} has a coefficient for each head, fixed at construction: "
                "entropy_coeff can't be assigned"
            )
        super().__setattr__(name, value)

    def _coeff_of_each_head(self, coeffs: Mapping[NestedKey, float]) -> dict[NestedKey, float]:
        by_head = {_head_of(key): float(coeff) for key, coeff in coeffs.items()}
        heads = self._keys("action")
        if set(by_head) != set(heads):
            raise KeyError(f"entropy_coeff has the heads {sorted(map(str, by_head))}, but the policy's are {heads}")
        return by_head

    # --- the terms of the loss ----------------------------------------------------------------------------------

    def _entropy_terms(self, heads: ActionHeads, tensordict: TensorDictBase) -> Terms:
        """−c·H, reduced, and the entropy H that is logged; nothing without the entropy bonus."""
        if not self.entropy_bonus:
            return {}
        entropies = heads.entropies(self.samples_mc_entropy)
        total = heads.total(list(entropies.values()))
        if self._head_coeffs is None:
            reduced = self._reduce_loss(total, tensordict)
            loss = -self.entropy_coeff * reduced
        else:
            reduced = None
            weighted = [self._head_coeffs[key] * entropy for key, entropy in entropies.items()]
            loss = self._reduce_loss(-heads.total(weighted), tensordict)
        # The plain mean is what is logged too.
        plain = self.reduction == "mean" and self._priority_weights(tensordict, total) is None
        logged = self._metric(total, tensordict) if reduced is None or not plain else reduced.detach()
        terms: Terms = {"entropy": logged, "loss_entropy": loss}
        if heads.composite and not composite_lp_aggregate():
            by_head = {_suffixed(key, "_entropy"): entropy.detach() for key, entropy in entropies.items()}
            terms["composite_entropy"] = TensorDict(by_head, total.shape)
        return terms

    def _critic_terms(self, tensordict: TensorDictBase) -> Terms:
        """c·d(V, V̂), reduced, and the critic's metrics; nothing without a critic's coefficient."""
        if self.critic_coeff is None:
            return {}
        loss, metrics = self._critic_loss(tensordict, self.critic_coeff)
        return {"loss_critic": loss, **metrics}


def _suffixed(key: NestedKey, suffix: str) -> NestedKey:
    return key + suffix if isinstance(key, str) else (*key[:-1], key[-1] + suffix)


def _head_of(key: NestedKey) -> NestedKey:
    """The key of the action that an entropy coefficient is for."""
    key = unravel_key(key)
    *path, last = (key,) if isinstance(key, str) else key
    return unravel_key((*path, last.removesuffix("_log_prob").removesuffix("_entropy")))
