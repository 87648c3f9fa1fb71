"""Deep Q-learning."""

from dataclasses import dataclass
from typing import Any

from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import dispatch
from torch import nn

from .q_learning import QLearningLoss
from .utils import check_distance


class DQNLoss(QLearningLoss):
    r"""Q-learning with a target network.

    .. math::
        L = d\left(Q(s_t, a_t),\ r_t + γ(1 - \text{term}_t)\, Q_\text{target}(s_{t+1}, a^*)\right), \qquad
        a^* = \arg\max_a Q'(s_{t+1}, a)

    with Q' = Q for double Q-learning, else Q_target. It is in ``loss``; the squared error of each sample is written to
    the input as ``td_error``, shape ``[*B, 1]``, for a prioritised replay buffer.

    The value estimator (TD0, see `make_value_estimator`) makes the target of the next values: with TD(λ) in place of
    it the time is the last batch dimension. An entry ``steps_to_next_obs`` is the n of n-step data: γⁿ for γ.

    Args:
        value_network: a TensorDictModule that writes ``action_value``, shape ``[*B, actions]``; or a plain module that
            makes it of the entry ``observation``.
        loss_function: d: ``"l1"``, ``"l2"`` or ``"smooth_l1"`` (`distance_loss`).
        delay_value: keep target parameters of the network; otherwise Q_target is Q itself, without gradient.
        double_dqn: double Q-learning: the network chooses the next action, the target network evaluates it.
        action_space: how actions are written: ``"one-hot"``, ``"mult-one-hot"`` (the values of several heads add up),
            ``"binary"`` (the values of what is set add up) or ``"categorical"``; or a spec of one of these. None: as
            the network says, in an attribute ``action_space``.
        reduction: ``"mean"`` (None), ``"sum"``, or ``"none"``: a loss of shape ``[*B]``.
        use_prioritized_weights: False leaves the importance weights ``priority_weight`` out of account.

    Raises:
        TypeError: ``gamma`` (see `make_value_estimator`).
        ValueError: an argument that can't be used; double Q-learning without a delayed network.
        KeyError: on call, an entry is missing; the message says how to rename it.
        RuntimeError: on call, the shapes of values, action and reward don't fit.

    Examples:
        >>> import torch
        >>> network = nn.Linear(1, 2, bias=False)
        >>> _ = nn.init.ones_(network.weight)
        >>> loss = DQNLoss(network, action_space="categorical").make_value_estimator(gamma=0.5)
        >>> state, action, terminated = torch.tensor([[2.0]]), torch.tensor([1]), torch.tensor([[False]])
        >>> data = {"observation": state, "action": action, "next": {"observation": 2 * state, "reward": state}}
        >>> data = TensorDict(data, [1]).set(("next", "terminated"), terminated)
        >>> loss(data)["loss"]  # Q is 2, and the target 2 + 0.5 * 4
        tensor(4., grad_fn=<MseLossBackward0>)

    See Mnih et al. 2015, Human-level control through deep reinforcement learning,
    https://doi.org/10.1038/nature14236; van Hasselt et al. 2016, Deep reinforcement learning with double
    Q-learning (arXiv:1509.06461).

    """

    @dataclass
    class _AcceptedKeys:
        """The entries read and written. ``reward``, ``done`` and ``terminated`` are read under "next".

        ``advantage``, ``value_target`` and ``value`` are there for TorchRL's sake: nothing reads or writes them.
        """

        advantage: NestedKey = "advantage"
        value_target: NestedKey = "value_target"
        value: NestedKey = "chosen_action_value"
        action_value: NestedKey = "action_value"
        action: NestedKey = "action"
        priority: NestedKey = "td_error"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        priority_weight: NestedKey = "priority_weight"

    def __init__(
        self,
        value_network: nn.Module,
        *,
        loss_function: str = "l2",
        delay_value: bool = True,
        double_dqn: bool = False,
        action_space: Any = None,
        reduction: str | None = None,
        use_prioritized_weights: bool | str = "auto",
    ) -> None:
        if double_dqn and not delay_value:
            raise ValueError("double_dqn=True needs delay_value=True: one network chooses, another evaluates")
        super().__init__(
            value_network,
            delay_value=delay_value,
            double_dqn=double_dqn,
            action_space=action_space,
            reduction=reduction,
            use_prioritized_weights=use_prioritized_weights,
        )
        self.loss_function = check_distance(loss_function)

    def make_value_estimator(self, value_type: Any = None, **hyperparams: Any) -> "DQNLoss":
        """Choose how the target is made of the next values: TD0, TD1 or TDLambda; see `LossModule`."""
        if not isinstance(value_type, nn.Module):
            # The loss finds the next values: the network doesn't write one value per sample.
            hyperparams = {"value_network": None, **hyperparams}
        super().make_value_estimator(value_type, **hyperparams)
        return self

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The loss (see the class), for data of batch size ``[*B]``."""
        action_value, next_action_value, choosing_value = self._action_values(tensordict, "actions")
        value = self._actions.value(action_value, self._taken_action(tensordict))
        next_value = self._actions.greedy_value(next_action_value, choosing_value)
        target = self._target(tensordict, next_value.unsqueeze(0)).value_target
        loss, priority = self._ensemble_loss(value.unsqueeze(0), target, tensordict)
        self._write_priority(tensordict, priority.unsqueeze(-1))
        return TensorDict({"loss": loss})
