"""What the losses of a policy with a critic share: networks, advantage, log-probability, the critic's distance."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule
from tensordict.utils import unravel_key
from torch import Tensor

from ..estimators.calls import distribution, written_by
from ..estimators.heads import one_or_list
from ..estimators.modules import check_distribution, check_keyed, keys_read
from ..estimators.vtrace import VTrace
from ..kernels import value_loss
from .base import LossModule
from .functional import explained_variance
from .policy import ActionHeads
from .utils import ValueEstimators, check_distance

Terms = dict[str, Tensor | TensorDictBase]
"""Entries of a loss's output: losses per sample under names ``loss_*``, and metrics."""


class PolicyGradientLoss(LossModule):
    """Base of the losses that follow the gradient of log π(a|s), weighted with an advantage.

    Args:
        actor_network: the policy, a ``ProbabilisticTensorDictSequential``; its action can have several heads
            (`tensordict.nn.CompositeDistribution`).
        critic_network: writes the value of the observation. None: no critic loss, and the advantage must come with
            the data. It may read what the policy's own layers write, so that a common trunk runs once.
        loss_critic_type: ``"l1"``, ``"l2"`` or ``"smooth_l1"`` (`distance_loss`).
        separate_losses: parameters that the policy shares with the critic are trained by the policy's loss only.
        functional: take the networks apart (`convert_to_functional`). False uses them as they are.
        reduction: ``"mean"`` (None), ``"sum"`` or ``"none"``: losses of shape ``[*B]``.
        clip_value: bound on the step of the value away from the one in the data (`fusedrl.kernels.value_loss`).
        delay_actor: keep target parameters of the policy.
        delay_value: keep target parameters of the critic, which then give the value of the next observation.
        device: where the coefficients are put; by default where the parameters are.

    Raises:
        TypeError: an actor without a distribution; a critic that doesn't say what it reads.
        ValueError: an option has none of its values, or needs ``functional=True``.

    """

    @dataclass
    class _AcceptedKeys:
        """The entries read. ``action`` and ``sample_log_prob`` are the policy's own, lists if it has several heads.

        ``reward``, ``done`` and ``terminated`` are read under "next".
        """

        advantage: NestedKey = "advantage"
        value_target: NestedKey = "value_target"
        value: NestedKey = "state_value"
        sample_log_prob: NestedKey | list[NestedKey] = "action_log_prob"
        action: NestedKey | list[NestedKey] = "action"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        priority_weight: NestedKey = "priority_weight"

    default_value_estimator = ValueEstimators.GAE
    SUPPORTED_VALUE_ESTIMATORS = tuple(ValueEstimators)
    _schedulable_buffers = frozenset({"clip_value"})
    log_explained_variance = False

    actor_network: Any
    critic_network: Any
    clip_value: Tensor | None

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        critic_network: TensorDictModule | None,
        *,
        loss_critic_type: str,
        separate_losses: bool,
        functional: bool,
        reduction: str | None,
        clip_value: float | Tensor | None,
        delay_actor: bool = False,
        delay_value: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(reduction)
        check_distribution(actor_network, type(self).__name__)
        if critic_network is not None:
            check_keyed(critic_network, "critic_network", type(self).__name__)
        self.loss_critic_type = check_distance(loss_critic_type, "loss_critic_type")
        self.separate_losses = separate_losses
        self.delay_actor = delay_actor
        self.delay_value = delay_value
        self.has_critic_loss = critic_network is not None
        self._actor_keys = {
            "action": one_or_list(actor_network.dist_sample_keys),
            "sample_log_prob": one_or_list(actor_network.log_prob_keys),
        }
        self._read_by_critic: tuple[list[NestedKey], list[NestedKey]] | None = None
        self._take_networks(actor_network, critic_network, functional)
        if self.functional and self.has_critic_loss:  # otherwise the networks may be exchanged
            self._read_by_critic = self._inputs_of_critic()
        self.set_keys(**self._actor_keys)
        self.register_coeff_buffer("clip_value", clip_value, device=device)
        if clip_value is not None and not clip_value >= 0:
            raise ValueError(f"clip_value is {clip_value}, but must not be negative")

    def _take_networks(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        critic_network: TensorDictModule | None,
        functional: bool,
    ) -> None:
        if not functional:
            if self.delay_actor or self.delay_value or self.separate_losses:
                raise ValueError(
                    "delay_actor, delay_value and separate_losses need functional=True: the loss has to hold "
                    "parameters of its own"
                )
            self.actor_network = actor_network
            self.critic_network = critic_network
            return
        self.convert_to_functional(actor_network, "actor_network", create_target_params=self.delay_actor)
        if critic_network is None:
            self.critic_network = None
        else:
            shared = actor_network.parameters() if self.separate_losses else None
            self.convert_to_functional(
                critic_network, "critic_network", create_target_params=self.delay_value, compare_against=shared
            )

    # --- keys ---------------------------------------------------------------------------------------------------

    def set_keys(self, **keys: NestedKey | list[NestedKey] | None) -> None:
        """Rename entries; None gives an entry its default name back. The value estimator follows.

        Raises:
            ValueError: the loss has no entry of that name.

        """
        super().set_keys(**{name: self._actor_keys.get(name) if key is None else key for name, key in keys.items()})

    def make_value_estimator(self, value_type: Any = None, **hyperparams: Any) -> "PolicyGradientLoss":
        """Choose how returns and advantages are estimated; see `LossModule.make_value_estimator`."""
        super().make_value_estimator(value_type, **hyperparams)
        self._refresh()
        self._in_keys = self.in_keys  # which no compiled call can keep
        return self

    def _find_in_keys(self) -> Iterator[NestedKey]:
        yield from super()._find_in_keys()
        if isinstance(self._value_estimator, VTrace):
            yield from self._keys("sample_log_prob")

    # --- reading ------------------------------------------------------------------------------------------------

    def _with_advantage(self, tensordict: TensorDictBase, *names: str) -> TensorDictBase:
        """``tensordict`` with advantage and value target; padding without NaN; a shallow copy if need be.

        Raises:
            KeyError: an entry that the loss reads is missing; among them are those that the keys ``names`` stand for.

        """
        self._require(tensordict, "action", *names)
        read = keys_read(self.actor_network)
        self._require_inputs(tensordict, read, ["actor_network"], "it is one of the in_keys of actor_network")
        if self.has_critic_loss:
            own, of_policy = self._inputs_of_critic()
            self._require_inputs(tensordict, own, ["critic_network"], "it is one of the in_keys of critic_network")
            read = [*read, *own]
            if of_policy:
                tensordict = tensordict.copy()
        if tensordict.get(self.tensor_keys.advantage, None) is None:
            tensordict = self._marked_padding(tensordict.copy())
            self._estimate_advantage(tensordict)
        if self.has_critic_loss:
            self._require(tensordict, "value_target", *(() if self.clip_value is None else ("value",)))
        # Only now: the value estimator leaves out what is padded by itself.
        fill = {**dict.fromkeys(self._keys("action"), 0.0), **dict.fromkeys(read)}
        return self._padding_filled(tensordict, tensordict, fill)

    def _inputs_of_critic(self) -> tuple[list[NestedKey], list[NestedKey]]:
        """What the critic reads of the data, and of what the policy's layers write."""
        if self._read_by_critic is not None:
            return self._read_by_critic
        written = {unravel_key(key) for key in self.actor_network.out_keys}
        keys = keys_read(self.critic_network)
        return [key for key in keys if key not in written], [key for key in keys if key in written]

    def _estimate_advantage(self, tensordict: TensorDictBase) -> None:
        """Write what the value estimator finds, to which the critic is a constant."""
        if self.value_estimator.value_network is None:
            self._require(tensordict, "advantage")
        else:
            # The estimator knows best which of them it needs.
            self._require_inputs(tensordict, self._inputs_of_critic()[0], [], "the value network reads it", "next")
        if self.critic_network is not None and self.functional:
            # Targets only where there are any: without, an estimator can find both values in one call.
            target_params = self.target_critic_network_params if self.delay_value else None
            self.value_estimator(tensordict, params=self.critic_network_params, target_params=target_params)
        else:
            with torch.no_grad():
                self.value_estimator(tensordict)

    def _action_heads(self, tensordict: TensorDictBase, advantage: Tensor, *, target: bool = False) -> ActionHeads:
        """The policy's distribution; what the critic reads of its layers is written into ``tensordict``."""
        write = not target and self.has_critic_loss and bool(self._inputs_of_critic()[1])
        with self._parameters_in("actor_network", target=target):
            dist = distribution(self.actor_network, tensordict, write=write)
        # An advantage without its last dimension then has another shape than the log-probability.
        batch_ndim = max(advantage.ndim - 1, tensordict.ndim)
        return ActionHeads(dist, self._keys("action")[0], batch_ndim)

    def _log_prob(self, heads: ActionHeads, tensordict: TensorDictBase, advantage: Tensor) -> Tensor:
        """log π(a|s) of the actions in the data, one for each advantage.

        Raises:
            RuntimeError: an action requires grad; there are more or fewer than advantages.

        """
        self._refuse_gradient(tensordict, "action")
        log_prob = heads.log_prob(tensordict)
        name = "the log-probability of the action"
        self._require_shape(log_prob, name, advantage, self.tensor_keys.advantage)
        return log_prob

    def _refuse_gradient(self, tensordict: TensorDictBase, name: str) -> None:
        for key in self._keys(name):
            if tensordict.get(key).requires_grad:
                raise RuntimeError(
                    f"{type(self).__name__}: the entry {key!r} requires grad, but collected data must be a constant: "
                    "detach it"
                )

    # --- the terms of the loss ----------------------------------------------------------------------------------

    def _critic_loss(self, tensordict: TensorDictBase, coefficient: Tensor | None = None) -> tuple[Tensor, Terms]:
        """d(V, V̂), reduced, times the ``coefficient``; and the critic's metrics."""
        value, value_target, old_value = self._critic_values(tensordict)
        mask = self._mask(tensordict, value)
        one_column = value.numel() == value.shape[0]  # a variance for each column would be another one
        loss, clipped, explained = value_loss(
            value,
            value_target,
            self.loss_critic_type,
            old_value=old_value,
            clip=None if old_value is None else self.clip_value,
            coefficient=coefficient,
            mask=mask,
            weights=self._priority_weights(tensordict, value),
            explained_variance=self.log_explained_variance and one_column,
            reduction=self.reduction,
        )
        metrics: Terms = {} if clipped is None else {"value_clip_fraction": clipped}
        if explained is not None:
            metrics["explained_variance"] = explained.expand(value.shape[1:])
        elif self.log_explained_variance:
            metrics["explained_variance"] = explained_variance(value.detach(), value_target.detach(), mask)
        return loss.squeeze(-1) if self.reduction == "none" else loss, metrics

    def _critic_values(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor, Tensor | None]:
        """V, V̂, and V^old if the step of the value is bounded."""
        with self._parameters_in("critic_network"):
            # What the policy's layers wrote holds their gradient.
            inputs = tensordict.detach() if self.separate_losses else tensordict
            value = written_by(self.critic_network, inputs).get(self.tensor_keys.value, None)
        if value is None:
            raise KeyError(
                f"{type(self).__name__}: the critic network doesn't write {self.tensor_keys.value!r} but "
                f"{self.critic_network.out_keys}; say which is the value with set_keys(value=...)"
            )
        value_target = self._get(tensordict, "value_target")
        self._require_shape(value, self.tensor_keys.value, value_target, self.tensor_keys.value_target)
        old_value = None
        if self.clip_value is not None:
            old_value = self._get(tensordict, "value").detach()
            self._require_shape(old_value, self.tensor_keys.value, value_target, self.tensor_keys.value_target)
        return value, value_target, old_value
