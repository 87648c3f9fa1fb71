"""Deep deterministic policy gradient, and what TD3 shares with it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from tensordict.nn import TensorDictModule, dispatch, skip_existing
from torch import Tensor

from ..estimators.calls import call
from ..estimators.modules import check_keyed, keys_read
from .action_value import ActionValueLoss
from .utils import check_distance


class DeterministicPolicyLoss(ActionValueLoss):
    """Base of the losses whose policy writes one action, which is moved to where the value is greater.

    Args:
        actor_network: the policy, a ``TensorDictModule``.
        loss_function: distance of the values to their target, see `distance_loss`.
        delay_actor: keep target parameters of the policy, which then choose the next action.
        separate_losses: parameters that the policy shares with the value are trained by the policy's loss only.
        reduction: ``"mean"`` (None), ``"sum"`` or ``"none"``.
        use_prioritized_weights: weigh the samples with the entry ``priority_weight`` if there is one.

    Raises:
        ValueError: an argument has none of its values.

    """

    def __init__(
        self,
        actor_network: TensorDictModule,
        *,
        loss_function: str,
        delay_actor: bool,
        separate_losses: bool,
        reduction: str | None,
        use_prioritized_weights: bool | str,
    ) -> None:
        super().__init__(reduction)
        self.loss_function = check_distance(loss_function)
        self.delay_actor = delay_actor
        self.separate_losses = separate_losses
        self.use_prioritized_weights = use_prioritized_weights
        check_keyed(actor_network, "actor_network", type(self).__name__)
        self.convert_to_functional(actor_network, "actor_network", create_target_params=delay_actor)

    def _trained_by_policy(self) -> Iterable[Tensor] | None:
        """The parameters that the value's network must leave to the policy."""
        return self.actor_network.parameters() if self.separate_losses else None

    def _with_action(self, data: TensorDictBase, *, target: bool = False) -> TensorDictBase:
        """``data`` with the policy's action in it: a shallow copy."""
        data = data.copy()
        if skip_existing():  # the action that was taken isn't the policy's
            read = keys_read(self.actor_network)
            data = data.exclude(*(key for key in self.actor_network.out_keys if unravel_key(key) not in read))
        with self._parameters_in("actor_network", target=target):
            return call(self.actor_network, data)


class DDPGLoss(DeterministicPolicyLoss):
    r"""A deterministic policy that follows the gradient of its value.

    .. math::
        L_\text{actor} = -\mathbb{E}\left[Q(s, π(s))\right], \qquad
        L_\text{value} = \mathbb{E}\left[d(Q(s, a), y)\right], \qquad
        y = r + γ(1 - \text{term}) \bar Q(s', \bar π(s'))

    in ``loss_actor``, which trains the policy alone, and ``loss_value``, which trains the value alone. Also in the
    output, without gradient: ``pred_value`` Q(s, a), ``target_value`` y and ``td_error`` (Q(s, a) − y)², all of
    shape ``[*B]``, and the greatest ``pred_value_max`` and ``target_value_max``. The ``td_error`` is written to the
    input as its priority; nothing else in it changes.

    The target is that of the loss's value estimator (TD0, see `make_value_estimator`).

    Args:
        actor_network: the policy π: writes the action.
        value_network: Q: reads the action, writes ``state_action_value``.
        loss_function: d: ``"l2"``, ``"l1"`` or ``"smooth_l1"`` (`distance_loss`).
        delay_actor: keep target parameters of the policy, \bar π.
        delay_value: keep target parameters of the value, \bar Q.
        separate_losses: parameters that the policy shares with the value are trained by the policy's loss only.
        reduction: ``"mean"`` (None), ``"sum"``, or ``"none"``: losses of shape ``[*B]``.
        use_prioritized_weights: weigh the samples with the entry ``priority_weight``: ``"auto"``, if there is one;
            False: never.

    Raises:
        TypeError: ``gamma`` (see `make_value_estimator`).
        ValueError: an argument has none of its values.
        KeyError: on call, an entry is missing; the message says how to rename it.
        RuntimeError: on call, the value has another shape than the reward.

    Examples:
        >>> class Value(torch.nn.Linear):
        ...     def forward(self, observation, action):
        ...         return super().forward(torch.cat([observation, action], -1))
        >>> actor = TensorDictModule(torch.nn.Linear(4, 2), ["observation"], ["action"])
        >>> value = TensorDictModule(Value(6, 1), ["observation", "action"], ["state_action_value"])
        >>> loss = DDPGLoss(actor, value)
        >>> loss_actor, loss_value, *_ = loss(
        ...     observation=torch.randn(8, 4), action=torch.randn(8, 2), next_observation=torch.randn(8, 4),
        ...     next_reward=torch.ones(8, 1), next_done=torch.zeros(8, 1), next_terminated=torch.zeros(8, 1),
        ... )
        >>> (loss_actor + loss_value).backward()

    See Lillicrap et al. 2016, Continuous control with deep reinforcement learning (arXiv:1509.02971), algorithm 1.

    """

    @dataclass
    class _AcceptedKeys:
        """The entries read and written. ``reward``, ``done`` and ``terminated`` are read under "next"."""

        state_action_value: NestedKey = "state_action_value"
        priority: NestedKey = "td_error"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        priority_weight: NestedKey = "priority_weight"

    def __init__(
        self,
        actor_network: TensorDictModule,
        value_network: TensorDictModule,
        *,
        loss_function: str = "l2",
        delay_actor: bool = False,
        delay_value: bool = True,
        separate_losses: bool = False,
        reduction: str | None = None,
        use_prioritized_weights: bool | str = "auto",
    ) -> None:
        super().__init__(
            actor_network,
            loss_function=loss_function,
            delay_actor=delay_actor,
            separate_losses=separate_losses,
            reduction=reduction,
            use_prioritized_weights=use_prioritized_weights,
        )
        self.delay_value = delay_value
        check_keyed(value_network, "value_network", type(self).__name__)
        self.convert_to_functional(
            value_network,
            "value_network",
            create_target_params=delay_value,
            compare_against=self._trained_by_policy(),
        )
        self.out_keys = [
            "loss_actor", "loss_value", "pred_value", "target_value", "pred_value_max", "target_value_max",
        ]  # fmt: skip

    def _find_in_keys(self) -> Iterator[NestedKey]:
        yield from super()._find_in_keys()
        if self.use_prioritized_weights is not False:  # of all losses TorchRL's DDPG alone has them among its in_keys
            yield from self._keys("priority_weight")

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The losses and their metrics (see the class), for data of batch size ``[*B]``."""
        data, following = self._transitions(
            tensordict, ["value_network", "actor_network"], ["actor_network", "value_network"]
        )
        with torch.no_grad():
            next_value = self._value(self._with_action(following, target=True), tensordict, target=True)
        value_target = self._target(tensordict, next_value.unsqueeze(0)).value_target
        value = self._value(data, tensordict)
        policy_value = self._value(self._with_action(data), tensordict, detach=True)
        loss, td_error = self._ensemble_loss(value.unsqueeze(0), value_target, tensordict)
        out = TensorDict(
            {
                "loss_actor": self._reduce_loss(-policy_value, tensordict),
                "loss_value": loss,
                "pred_value": value.detach(),
                "target_value": value_target,
                "td_error": td_error,
                "pred_value_max": self._largest(value.detach(), tensordict),
                "target_value_max": self._largest(value_target, tensordict),
            }
        )
        self._write_priority(tensordict, td_error)
        return out

    def _value(
        self, data: TensorDictBase, tensordict: TensorDictBase, *, target: bool = False, detach: bool = False
    ) -> Tensor:
        """Q of ``data``, shape ``[*B]``; for the options see `_parameters_in`."""
        key = self.tensor_keys.state_action_value
        (value,) = self._ensemble("value_network", data, key, target=target, detach=detach)
        return self._one_per_sample(value, key, tensordict)

    def _largest(self, x: Tensor, tensordict: TensorDictBase) -> Tensor:
        """The greatest value of the samples that count; 0 if there are no samples."""
        if not x.numel():
            return x.sum()
        mask = self._mask(tensordict, x)
        if mask is None:
            return x.amax()
        return torch.where(mask.any(), torch.where(mask, x, -torch.inf).amax(), 0)
