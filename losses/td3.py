"""Twin delayed deep deterministic policy gradient."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, dispatch
from torch import Tensor

from .ddpg import DeterministicPolicyLoss
from .functional.deterministic import smoothed_action


class TD3Loss(DeterministicPolicyLoss):
    r"""DDPG with the lesser of two values as target, at an action that is smoothed with noise.

    .. math::
        L_\text{actor} = -\mathbb{E}\left[Q_1(s, π(s))\right], \qquad
        L_\text{qvalue} = \mathbb{E}\left[\sum_i d(Q_i(s, a), y)\right], \qquad
        y = r + γ(1 - \text{term}) \min_i \bar Q_i(s', \tilde a)

    in ``loss_actor``, which trains the policy alone, and ``loss_qvalue``, which trains the values alone; \tilde a is
    \bar π(s') with noise (`smoothed_action`). Also in the output, without gradient: ``pred_value`` Q_i(s, a) and
    ``state_action_value_actor`` Q_i(s, π(s)), of shape ``[N, *B]``, ``next_state_value`` min_i \bar Q_i(s', \tilde a)
    and ``target_value`` y, of shape ``[*B]``. The greatest squared error max_i (Q_i(s, a) − y)² is written to the input
    as its priority ``td_error``, shape ``[*B]``; nothing else in it changes.

    The paper updates the policy and the targets once for every two updates of the values: step the optimizer of
    ``loss_actor`` and the `SoftUpdate` in every other iteration.

    The target is that of the loss's value estimator (TD0, see `make_value_estimator`).

    Args:
        actor_network: the policy π: writes the action.
        qvalue_network: Q: reads the action, writes ``state_action_value``. It is multiplied (drawn anew) to
            ``num_qvalue_nets`` networks; a list of so many is taken as it is.
        action_spec: the spec of the action, an object with ``space.low`` and ``space.high``, or a composite of specs.
        bounds: the least and the greatest action, each a number or of the shape of the last dimensions of an action.
            Either this or ``action_spec``.
        num_qvalue_nets: N.
        policy_noise: standard deviation of the noise.
        noise_clip: bound on the noise.
        loss_function: d: ``"smooth_l1"``, ``"l1"`` or ``"l2"`` (`distance_loss`).
        delay_actor: keep target parameters of the policy, \bar π.
        delay_qvalue: keep target parameters of the values, \bar Q.
        separate_losses: parameters that the policy shares with the values are trained by the policy's loss only.
        reduction: ``"mean"`` (None), ``"sum"``, or ``"none"``: losses of shape ``[*B]``.
        deactivate_vmap: call the networks one after the other, for those that don't work under `torch.vmap`.
        use_prioritized_weights: weigh the samples with the entry ``priority_weight``: ``"auto"``, if there is one;
            False: never.

    Raises:
        TypeError: ``action_spec`` has no bounds; ``gamma`` (see `make_value_estimator`).
        ValueError: both or none of ``bounds`` and ``action_spec``; an argument that can't be used.
        KeyError: on call, an entry is missing; the message says how to rename it.
        RuntimeError: on call, a value has another shape than the reward, or the bounds don't fit the action.

    Examples:
        >>> class Value(torch.nn.Linear):
        ...     def forward(self, observation, action):
        ...         return super().forward(torch.cat([observation, action], -1))
        >>> actor = TensorDictModule(torch.nn.Linear(4, 2), ["observation"], ["action"])
        >>> value = TensorDictModule(Value(6, 1), ["observation", "action"], ["state_action_value"])
        >>> loss = TD3Loss(actor, value, bounds=(-1.0, 1.0))
        >>> following = {"observation": torch.randn(8, 4), "reward": torch.ones(8, 1), "done": torch.zeros(8, 1)}
        >>> replayed = {"observation": torch.randn(8, 4), "action": torch.rand(8, 2), "next": following}
        >>> loss(TensorDict(replayed, [8]))["pred_value"].shape
        torch.Size([2, 8])

    See Fujimoto et al. 2018, Addressing function approximation error in actor-critic methods (arXiv:1802.09477),
    algorithm 1.

    """

    @dataclass
    class _AcceptedKeys:
        """The entries read and written. ``reward``, ``done`` and ``terminated`` are read under "next"."""

        action: NestedKey = "action"
        state_action_value: NestedKey = "state_action_value"
        priority: NestedKey = "td_error"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        priority_weight: NestedKey = "priority_weight"

    _schedulable_buffers = frozenset({"min_action", "max_action"})

    min_action: Tensor
    max_action: Tensor

    def __init__(
        self,
        actor_network: TensorDictModule,
        qvalue_network: TensorDictModule | list[TensorDictModule],
        *,
        action_spec: Any = None,
        bounds: Sequence[Any] | None = None,
        num_qvalue_nets: int = 2,
        policy_noise: float = 0.2,
        noise_clip: float = 0.5,
        loss_function: str = "smooth_l1",
        delay_actor: bool = True,
        delay_qvalue: bool = True,
        separate_losses: bool = False,
        reduction: str | None = None,
        deactivate_vmap: bool = False,
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
        self.deactivate_vmap = deactivate_vmap
        self.policy_noise = policy_noise
        self.noise_clip = noise_clip
        self._take_qvalue_network(qvalue_network, num_qvalue_nets, delay=delay_qvalue, shared=self._trained_by_policy())
        if (action_spec is None) == (bounds is None):
            raise ValueError(
                f"{type(self).__name__} needs either bounds or action_spec, and not both: got bounds={bounds} and "
                f"action_spec={action_spec}"
            )
        low, high = _limits(bounds) if action_spec is None else _limits_of_spec(action_spec, self.tensor_keys.action)
        device = next((p.device for p in self.parameters()), None)
        self.register_buffer("max_action", high.to(device))
        self.register_buffer("min_action", low.to(device))
        self.out_keys = [
            "loss_actor", "loss_qvalue", "pred_value", "state_action_value_actor", "next_state_value", "target_value",
        ]  # fmt: skip

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The losses and their metrics (see the class), for data of batch size ``[*B]``."""
        data, following = self._transitions(
            tensordict, ["qvalue_network", "actor_network"], ["actor_network", "qvalue_network"]
        )
        with torch.no_grad():
            following = self._with_smoothed_action(following)
            target = self._target(tensordict, self._ensemble_values(following, tensordict, target=True))
        values = self._ensemble_values(data, tensordict)
        loss, priority = self._ensemble_loss(values, target.value_target, tensordict)
        out = TensorDict(
            {
                **self._policy_terms(data, tensordict),
                "loss_qvalue": loss,
                "pred_value": values.detach(),
                "next_state_value": target.next_value,
                "target_value": target.value_target,
            }
        )
        self._write_priority(tensordict, priority)
        return out

    def _policy_terms(self, data: TensorDictBase, tensordict: TensorDictBase) -> dict[str, Tensor]:
        """The policy's loss and its metrics, for the observations in ``data``."""
        values = self._ensemble_values(self._with_action(data), tensordict, detach=True)
        return {
            "loss_actor": self._reduce_loss(-values[0], tensordict),
            "state_action_value_actor": values.detach(),
        }

    def _with_smoothed_action(self, following: TensorDictBase) -> TensorDictBase:
        """``following`` with the target policy's action and its noise: a shallow copy."""
        key = self.tensor_keys.action
        if key not in self.actor_network.out_keys:
            raise KeyError(
                f"{type(self).__name__}: the actor network doesn't write {key!r} but {self.actor_network.out_keys}; "
                "say which is the action with set_keys(action=...)"
            )
        following = self._with_action(following, target=True)
        action = following.get(key)
        for bound in (self.min_action, self.max_action):
            if bound.shape != action.shape[action.ndim - bound.ndim :] and bound.numel() != 1:
                raise RuntimeError(
                    f"{type(self).__name__}: the bounds of the action have shape {tuple(bound.shape)}, but the actor "
                    f"network's {key!r} has shape {tuple(action.shape)}: its last dimensions must agree"
                )
        noise = self.policy_noise * torch.randn_like(action)
        low, high = self.min_action.to(action.dtype), self.max_action.to(action.dtype)
        return following.set(key, smoothed_action(action, noise, self.noise_clip, low, high))


def _limits(bounds: Any) -> tuple[Tensor, Tensor]:
    """The least and the greatest action as tensors of one floating dtype.

    Raises:
        ValueError: they are not two, or the least is above the greatest.

    """
    if not isinstance(bounds, Sequence) or len(bounds) != 2:
        raise ValueError(f"bounds must be two, the least and the greatest action, but are {bounds!r}")
    low, high = (torch.as_tensor(bound).detach().clone() for bound in bounds)
    dtype = torch.promote_types(low.dtype, high.dtype)
    dtype = dtype if dtype.is_floating_point else torch.get_default_dtype()
    low, high = low.to(dtype), high.to(dtype)
    if (low > high).any():
        raise ValueError(f"the least action {low} is above the greatest, {high}")
    return low, high


def _limits_of_spec(spec: Any, key: NestedKey) -> tuple[Tensor, Tensor]:
    """Those of the action's ``spec``, or of the entry ``key`` of a composite of specs.

    Raises:
        KeyError: the composite has no such entry.
        TypeError: the spec has no bounds.

    """
    batch: tuple[int, ...] = ()
    if hasattr(spec, "keys"):
        # The dimensions that all entries share are those of the batch of environments.
        batch = tuple(spec.shape)
        if key not in spec.keys(True, True):
            raise KeyError(f"action_spec has the entries {list(spec.keys(True, True))}, but the action is {key!r}")
        spec = spec[key]
    space: Any = getattr(spec, "space", None)
    if not (hasattr(space, "low") and hasattr(space, "high")):
        raise TypeError(f"action_spec must say the action's bounds in space.low and space.high, but is {spec!r}")
    first = (0,) * len(batch)
    return _limits((space.low[first], space.high[first]))
