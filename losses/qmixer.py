"""QMIX: Q-learning of a team whose agents' values are mixed into the team's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from torch import Tensor

from .action_space import find_action_space
from .action_value import ActionValueLoss
from .utils import check_distance


class QMixerLoss(ActionValueLoss):
    r"""Deep Q-learning of the sum of rewards of a team, from what each agent sees.

    .. math::
        L = d\left(f(Q_1(o_1, a_1), …, Q_N(o_N, a_N); s),\ r + γ(1 - \text{term})\,
        f'(\max_a Q'_1(o'_1, a), …, \max_a Q'_N(o'_N, a); s')\right)

    in ``loss``, where f is the mixer, monotonic in the agents' values, and a prime at f or Q is the target network.
    The squared error of each sample is written to the input as ``td_error``, shape ``[*B, 1]``, for a prioritised
    replay buffer.

    Args:
        local_value_network: writes the values of each agent's actions at ``("agents", "action_value")``, shape
            ``[*B, N, actions]``.
        mixer_network: f; reads the values of the chosen actions at ``("agents", "chosen_action_value")``, shape
            ``[*B, N, 1]``, and the state if it wants, and writes the team's value at ``"chosen_action_value"``,
            shape ``[*B, 1]``.
        loss_function: d: ``"l2"``, ``"l1"`` or ``"smooth_l1"`` (`distance_loss`).
        delay_value: keep target parameters of both networks, for an updater to move.
        action_space: how an agent's action is written, see `DQNLoss`. None: as the network says.
        reduction: ``"mean"`` (None), ``"sum"``, or ``"none"``: a loss of shape ``[*B]``.
        use_prioritized_weights: False leaves the importance weights ``priority_weight`` out of account.

    Raises:
        TypeError: a network that isn't a TensorDictModule; ``gamma`` (see `make_value_estimator`).
        ValueError: an argument that can't be used.
        KeyError: on call, an entry is missing; the message says how to rename it.
        RuntimeError: on call, the shapes of values, action and reward don't fit.

    Examples:
        >>> from tensordict.nn import TensorDictModule
        >>> agents = TensorDictModule(torch.nn.Linear(4, 3), [("agents", "observation")], [("agents", "action_value")])
        >>> mixer = TensorDictModule(lambda q: q.sum(-2), [("agents", "chosen_action_value")], ["chosen_action_value"])
        >>> loss = QMixerLoss(agents, mixer, action_space="categorical")
        >>> seen, action = torch.randn(8, 2, 4), torch.randint(3, (8, 2))
        >>> following = {"agents": {"observation": seen}, "reward": torch.ones(8, 1), "done": torch.ones(8, 1)}
        >>> data = TensorDict({"agents": {"observation": seen, "action": action}, "next": following}, [8])
        >>> loss(data)["loss"].shape
        torch.Size([])

    See Rashid et al. 2018, QMIX: monotonic value function factorisation for deep multi-agent reinforcement learning
    (arXiv:1803.11485), equation 6.

    """

    @dataclass
    class _AcceptedKeys:
        """Values of the agents (``local_value``: of the chosen action) and of the team; the rest as in DQN.

        ``advantage`` and ``value_target`` are there for TorchRL's sake: nothing reads or writes them.
        """

        advantage: NestedKey = "advantage"
        value_target: NestedKey = "value_target"
        local_value: NestedKey = ("agents", "chosen_action_value")
        global_value: NestedKey = "chosen_action_value"
        action_value: NestedKey = ("agents", "action_value")
        action: NestedKey = ("agents", "action")
        priority: NestedKey = "td_error"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        priority_weight: NestedKey = "priority_weight"

    NETWORKS = ("local_value_network", "mixer_network")

    def __init__(
        self,
        local_value_network: TensorDictModuleBase,
        mixer_network: TensorDictModuleBase,
        *,
        loss_function: str = "l2",
        delay_value: bool = True,
        action_space: Any = None,
        reduction: str | None = None,
        use_prioritized_weights: bool | str = "auto",
    ) -> None:
        super().__init__(reduction)
        self.loss_function = check_distance(loss_function)
        self.delay_value = delay_value
        self.use_prioritized_weights = use_prioritized_weights
        for name, network in zip(self.NETWORKS, (local_value_network, mixer_network), strict=True):
            if not isinstance(network, TensorDictModuleBase):
                raise TypeError(
                    f"{name} must be a TensorDictModule, since nothing else says what it reads, but is a "
                    f"{type(network).__name__}"
                )
            self.convert_to_functional(network, name, create_target_params=delay_value)
        self._actions = find_action_space(action_space, local_value_network)
        self.out_keys = ["loss"]

    @dispatch(auto_batch_size=False)  # what all entries of an agent share are more dimensions than one value has
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The loss (see the class), for data of batch size ``[*B]``."""
        action = self._taken_action(tensordict)
        data, next_data = self._transitions(tensordict, self.NETWORKS, self.NETWORKS)
        value = self._team_value(tensordict, data, action)
        with torch.no_grad():
            target = self._value_target(tensordict, self._team_value(tensordict, next_data))
        loss, priority = self._ensemble_loss(value.unsqueeze(0), target, tensordict)
        self._write_priority(tensordict, priority.unsqueeze(-1))
        return TensorDict({"loss": loss})

    def _team_value(self, tensordict: TensorDictBase, data: TensorDictBase, action: Tensor | None = None) -> Tensor:
        """The team's value of ``action``; or by the target networks, of what is best for each agent; shape ``[*B]``."""
        keys, prefix = self.tensor_keys, "target_" if action is None else ""
        local, mixer = (getattr(self, f"{prefix}{name}_params") for name in self.NETWORKS)
        action_value = self._call("local_value_network", data, keys.action_value, local)
        if action is None:
            chosen = self._actions.greedy_value(action_value)
        else:
            chosen = self._actions.value(action_value, action)
        data = data.copy().set(keys.local_value, chosen.unsqueeze(-1))
        value = self._call("mixer_network", data, keys.global_value, mixer)
        return self._one_per_sample(value, keys.global_value, tensordict)

    def _find_reads(self, networks: Sequence[str]) -> list[NestedKey]:
        # The loss itself writes what the mixer reads of the agents.
        return [key for key in super()._find_reads(networks) if key != self.tensor_keys.local_value]
