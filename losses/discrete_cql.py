"""Conservative Q-learning of discrete actions."""

from dataclasses import dataclass
from typing import Any

from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import dispatch
from torch import nn

from .dqn import DQNLoss
from .functional.conservative import conservative_gap


class DiscreteCQLLoss(DQNLoss):
    r"""Q-learning from stored data alone, with the values of actions that aren't in the data pushed down.

    .. math::
        L_Q &= \tfrac{1}{2}\, d\left(Q(s_t, a_t),\ r_t + γ(1 - \text{term}_t) \max_a \bar Q(s_{t+1}, a)\right) \\
        L_\text{CQL} &= \log \sum_a \exp Q(s_t, a) - Q(s_t, a_t)

    with the target network Q̄. They are ``loss_qvalue`` and ``loss_cql``; what the paper minimises is L_Q + α L_CQL
    with an α of the user's choice. Also in the output, as means over the samples: ``td_error``, the squared error;
    ``target_value``; and ``pred_value``, Q of all actions. The squared error of each sample is written to the input as
    ``td_error``, shape ``[*B, 1]``, for a prioritised replay buffer.

    Args:
        value_network: see `DQNLoss`.
        loss_function: d: ``"l1"``, ``"l2"`` or ``"smooth_l1"`` (`distance_loss`).
        delay_value: keep target parameters of the network; otherwise Q̄ is Q itself, without gradient.
        action_space: see `DQNLoss`; actions of one head.
        reduction: ``"mean"`` (None), ``"sum"``, or ``"none"``: losses of shape ``[*B]``.
        use_prioritized_weights: False leaves the importance weights ``priority_weight`` out of account.

    Raises:
        TypeError: ``gamma`` (see `make_value_estimator`).
        ValueError: an argument that can't be used, such as an action space of several heads.
        KeyError: on call, an entry is missing; the message says how to rename it.
        RuntimeError: on call, the shapes of values, action and reward don't fit.

    See Kumar et al. 2020, Conservative Q-learning for offline reinforcement learning (arXiv:2006.04779), equation 4.

    """

    @dataclass
    class _AcceptedKeys:
        """The entries read and written. ``reward``, ``done`` and ``terminated`` are read under "next".

        ``value_target``, ``value`` and ``pred_val`` are there for TorchRL's sake: nothing reads or writes them.
        """

        value_target: NestedKey = "value_target"
        value: NestedKey = "chosen_action_value"
        action_value: NestedKey = "action_value"
        action: NestedKey = "action"
        priority: NestedKey = "td_error"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        pred_val: NestedKey = "pred_val"
        priority_weight: NestedKey = "priority_weight"

    _one_choice = True
    _sorts_in_keys = True

    def __init__(
        self,
        value_network: nn.Module,
        *,
        loss_function: str = "l2",
        delay_value: bool = True,
        action_space: Any = None,
        reduction: str | None = None,
        use_prioritized_weights: bool | str = "auto",
    ) -> None:
        super().__init__(
            value_network,
            loss_function=loss_function,
            delay_value=delay_value,
            action_space=action_space,
            reduction=reduction,
            use_prioritized_weights=use_prioritized_weights,
        )
        self.out_keys = ["loss_qvalue", "loss_cql"]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The losses and metrics (see the class), for data of batch size ``[*B]``."""
        action_value, next_action_value, _ = self._action_values(tensordict, "actions")
        value = self._actions.value(action_value, self._taken_action(tensordict))
        target = self._value_target(tensordict, self._actions.greedy_value(next_action_value, None))
        loss, td_error = self._ensemble_loss(value.unsqueeze(0), target, tensordict)
        losses = {
            "loss_qvalue": loss / 2,
            "loss_cql": self._reduce_loss(conservative_gap(action_value, value), tensordict),
        }
        metrics = {"td_error": td_error, "pred_value": action_value.mean(-1), "target_value": target}
        result = TensorDict(losses | {name: self._metric(x, tensordict) for name, x in metrics.items()})
        self._write_priority(tensordict, td_error.unsqueeze(-1))
        return result
