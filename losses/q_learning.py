"""What DQN and its distributional form share: one network, its delayed copy, and a choice of actions."""

from typing import Any, ClassVar

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn

from ..estimators.calls import called_in_turn, is_watched, written_in_turn
from .action_space import find_action_space
from .action_value import ActionValueLoss
from .networks import Parameters


class QLearningLoss(ActionValueLoss):
    r"""Base of the losses of a value network whose greedy action is the policy.

    .. math::
        a^* = \arg\max_a Q'(s_{t+1}, a)

    where Q' is the target network, or the trained one for double Q-learning; the target network says what a* is worth.
    The loss is in ``loss``.

    Args:
        value_network: a TensorDictModule that writes ``action_value``; or a plain module that makes it of the entry
            ``observation``.
        delay_value: keep target parameters of the network; otherwise the target network is the network itself.
        double_dqn: double Q-learning.
        action_space: see `find_action_space`.
        reduction: see `LossModule`.
        use_prioritized_weights: False leaves ``priority_weight`` out of account.

    """

    value_network: TensorDictModuleBase
    _one_choice: ClassVar[bool] = False
    """Whether an action must be one of those that there are values of."""

    def __init__(
        self,
        value_network: nn.Module,
        *,
        delay_value: bool,
        double_dqn: bool,
        action_space: Any,
        reduction: str | None,
        use_prioritized_weights: bool | str,
    ) -> None:
        super().__init__(reduction)
        self._actions = find_action_space(action_space, value_network, one_choice=self._one_choice)
        self.delay_value = delay_value
        self.double_dqn = double_dqn
        self.use_prioritized_weights = use_prioritized_weights
        if not isinstance(value_network, TensorDictModuleBase):
            # In a sequence: the parameters get the names that they have in TorchRL's checkpoints.
            writer = TensorDictModule(value_network, ["observation"], [self.tensor_keys.action_value])
            value_network = TensorDictSequential(writer)
        self.convert_to_functional(value_network, "value_network", create_target_params=delay_value)
        self.out_keys = ["loss"]

    @property
    def action_space(self) -> str:
        """How actions are written: ``one_hot``, ``mult_one_hot``, ``binary`` or ``categorical``."""
        return self._actions.name

    def _call(self, name: str, data: TensorDictBase, key: NestedKey, params: Parameters) -> Tensor:
        """What the network says at ``key``, without the module at its end that only chooses an action.

        The loss chooses by itself; that module would take the exponential of every atom of every action, and more.
        """
        makers = _without_choice(getattr(self, name), key)
        return self._asked(makers, name, data, key, params)

    def _asked(
        self, makers: list[nn.Module] | None, name: str, data: TensorDictBase, key: NestedKey, params: Parameters
    ) -> Tensor:
        if makers is None:
            return super()._call(name, data, key, params)
        with self._with_parameters(name, params):
            return written_in_turn(makers, data)[key]

    def _action_values(self, tensordict: TensorDictBase, *dimensions: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the network says of s_t, the target network of s_{t+1}, and, if it chooses a*, the network of s_{t+1}.

        Each has the batch's dimensions and then those of the names ``dimensions``. Only the first holds a gradient.

        Raises:
            KeyError: an entry is missing.
            RuntimeError: the network writes another shape.

        """
        self._require(tensordict, "action")
        data, next_data = self._transitions(tensordict, ["value_network"], ["value_network"])
        key, params = self.tensor_keys.action_value, self.value_network_params
        makers = _without_choice(self.value_network, key)
        action_value = self._asked(makers, "value_network", data, key, params)
        reward, reward_key = self._get(tensordict, "reward"), self._keys("reward")[0]
        if (*action_value.shape[: -len(dimensions)], 1) != reward.shape:
            raise RuntimeError(
                f"{type(self).__name__}: {key!r} has shape {tuple(action_value.shape)}, but {reward_key!r} has "
                f"shape {tuple(reward.shape)}: [*batch, {', '.join(dimensions)}] and [*batch, 1] are wanted"
            )
        with torch.no_grad():
            target_params = self._parameters_of("value_network", target=True)
            target = self._asked(makers, "value_network", next_data, key, target_params)
            if not (self.double_dqn and self.delay_value):
                return action_value, target, None
            return action_value, target, self._asked(makers, "value_network", next_data, key, params)


def _without_choice(network: nn.Module, key: NestedKey) -> list[nn.Module] | None:
    """The modules of a sequence but for the last, if that only chooses among values that one of them writes at ``key``.

    That is known of TorchRL's own modules, where no hook looks on and no action is masked. Else None.
    """
    modules = called_in_turn(network)
    if modules is None or len(modules) < 2:
        return None
    *makers, last = modules
    chooses = (
        type(last).__module__.startswith("torchrl.")
        and "forward" not in last.__dict__
        and not is_watched(last)
        and getattr(last, "action_value_key", None) == key
        and getattr(last, "action_mask_key", None) is None
        and any(key in maker.out_keys for maker in makers)
    )
    return makers if chooses else None
