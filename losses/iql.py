"""Implicit Q-learning."""

from dataclasses import dataclass

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule, dispatch
from torch import Tensor

from ..estimators.calls import distribution
from ..estimators.modules import check_distribution, check_keyed
from .action_value import ActionValueLoss
from .functional.offline import advantage_weighted_objective, expectile_loss
from .policy import ActionHeads
from .reduction import check_scalar_output_mode, has_metrics
from .utils import check_distance


class IQLLoss(ActionValueLoss):
    r"""Q-learning from stored data alone: the value of the best action is an expectile over the data's actions.

    .. math::
        L_\text{value} &= \mathbb{E}\left[|τ - 1(A < 0)| A^2\right], \qquad A = \min_i \bar Q_i(s, a) - V(s) \\
        L_\text{qvalue} &= \mathbb{E}\left[\sum_i d(Q_i(s, a), r + γ(1 - \text{term}) V(s'))\right] \\
        L_\text{actor} &= -\mathbb{E}\left[\min\left(e^{β A}, 100\right) \log π(a|s)\right]

    in ``loss_value``, ``loss_qvalue`` and ``loss_actor``, each of which trains its own network alone. Also in the
    output: ``entropy``, the mean of −log π(a|s) over the data's actions. The greatest squared error
    max_i (Q_i(s, a) − y)², with y the target of the Q networks, is written to the input as its priority ``td_error``,
    shape ``[*B]``; nothing else in it changes.

    The target is that of the loss's value estimator (TD0, see `make_value_estimator`).

    Args:
        actor_network: the policy π, a ``ProbabilisticTensorDictSequential``.
        qvalue_network: Q: reads the action, writes ``state_action_value``. It is multiplied (drawn anew) to
            ``num_qvalue_nets`` networks; a list of so many is taken as it is.
        value_network: V: writes ``state_value``.
        num_qvalue_nets: number of Q networks.
        loss_function: d: ``"smooth_l1"``, ``"l1"`` or ``"l2"`` (`distance_loss`).
        temperature: β, an inverse temperature: 0 imitates all of the data's actions, a large one the best of them.
        expectile: τ, in (0, 1).
        separate_losses: parameters that the policy shares with V and Q are trained by the policy's loss only, those
            that V shares with Q by V's loss only.
        reduction: ``"mean"`` (None), ``"sum"``, or ``"none"``: losses of shape ``[*B]``.
        deactivate_vmap: call the Q networks one after the other, for those that don't work under `torch.vmap`.
        scalar_output_mode: with ``reduction="none"``, ``"exclude"`` leaves the scalar ``entropy`` out of the output.
        use_prioritized_weights: weigh the samples with the entry ``priority_weight``: ``"auto"``, if there is one;
            False: never.

    Raises:
        TypeError: a network is missing; ``gamma`` (see `make_value_estimator`).
        ValueError: an argument that can't be used.
        KeyError: on call, an entry is missing; the message says how to rename it.
        RuntimeError: on call, a value or a log-probability has another shape than the reward.

    Examples:
        >>> from tensordict.nn import ProbabilisticTensorDictModule as Sampler
        >>> class Value(torch.nn.Linear):
        ...     def forward(self, observation, action):
        ...         return super().forward(torch.cat([observation, action], -1))
        >>> def normal(loc):
        ...     return torch.distributions.Independent(torch.distributions.Normal(loc, 1.0), 1)
        >>> actor = ProbabilisticTensorDictSequential(
        ...     TensorDictModule(torch.nn.Linear(4, 2), ["observation"], ["loc"]),
        ...     Sampler(["loc"], ["action"], distribution_class=normal),
        ... )
        >>> qvalue = TensorDictModule(Value(6, 1), ["observation", "action"], ["state_action_value"])
        >>> value = TensorDictModule(torch.nn.Linear(4, 1), ["observation"], ["state_value"])
        >>> following = {"observation": torch.randn(8, 4), "reward": torch.ones(8, 1), "done": torch.zeros(8, 1)}
        >>> stored = {"observation": torch.randn(8, 4), "action": torch.randn(8, 2), "next": following}
        >>> sorted(IQLLoss(actor, qvalue, value, expectile=0.7)(TensorDict(stored, [8])).keys())
        ['entropy', 'loss_actor', 'loss_qvalue', 'loss_value']

    See Kostrikov et al. 2021, Offline reinforcement learning with implicit Q-learning (arXiv:2110.06169).

    """

    @dataclass
    class _AcceptedKeys:
        """The entries read and written. ``reward``, ``done`` and ``terminated`` are read under "next".

        ``log_prob`` is there for TorchRL's sake, which writes the log-probability to the input; here nothing does.
        """

        value: NestedKey = "state_value"
        action: NestedKey = "action"
        log_prob: NestedKey = "_log_prob"
        priority: NestedKey = "td_error"
        state_action_value: NestedKey = "state_action_value"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        priority_weight: NestedKey = "priority_weight"

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        qvalue_network: TensorDictModule | list[TensorDictModule],
        value_network: TensorDictModule,
        *,
        num_qvalue_nets: int = 2,
        loss_function: str = "smooth_l1",
        temperature: float = 1.0,
        expectile: float = 0.5,
        separate_losses: bool = False,
        reduction: str | None = None,
        deactivate_vmap: bool = False,
        scalar_output_mode: str | None = None,
        use_prioritized_weights: bool | str = "auto",
    ) -> None:
        super().__init__(reduction)
        check_distribution(actor_network, type(self).__name__)
        if value_network is None:
            raise TypeError(f"{type(self).__name__} needs a value_network, but it is None")
        if not 0 < expectile < 1:
            raise ValueError(f"expectile must be in (0, 1), but is {expectile}")
        check_scalar_output_mode(scalar_output_mode)
        self.loss_function = check_distance(loss_function)
        self.temperature = temperature
        self.expectile = expectile
        self.separate_losses = separate_losses
        self.deactivate_vmap = deactivate_vmap
        self.scalar_output_mode = scalar_output_mode
        self.use_prioritized_weights = use_prioritized_weights

        self.convert_to_functional(actor_network, "actor_network")
        of_policy = list(actor_network.parameters()) if separate_losses else []
        check_keyed(value_network, "value_network", type(self).__name__)
        self.convert_to_functional(value_network, "value_network", compare_against=of_policy)
        of_others = of_policy + list(value_network.parameters()) if separate_losses else []
        self._take_qvalue_network(qvalue_network, num_qvalue_nets, delay=True, shared=of_others, one_alone=True)
        metrics = ["entropy"] if has_metrics(self.reduction, scalar_output_mode) else []
        self.out_keys = ["loss_actor", "loss_qvalue", "loss_value", *metrics]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The losses and the entropy (see the class), for data of batch size ``[*B]``."""
        data, following = self._transitions(
            tensordict, ["qvalue_network", "value_network", "actor_network"], ["value_network"]
        )
        log_prob = self._log_prob(data, tensordict)
        value = self._value(data, tensordict)
        with torch.no_grad():
            next_value = self._value(following, tensordict)
            advantage_bound = self._ensemble_values(data, tensordict, target=True).amin(0)
        advantage = advantage_bound - value
        value_target = self._target(tensordict, next_value.unsqueeze(0)).value_target
        loss, priority = self._ensemble_loss(self._ensemble_values(data, tensordict), value_target, tensordict)
        objective = advantage_weighted_objective(log_prob, advantage, self.temperature)
        out = TensorDict(
            {
                "loss_actor": self._reduce_loss(-objective, tensordict),
                "loss_qvalue": loss,
                "loss_value": self._reduce_loss(expectile_loss(advantage, self.expectile), tensordict),
            }
        )
        if has_metrics(self.reduction, self.scalar_output_mode):
            out["entropy"] = self._metric(-log_prob, tensordict)
        self._write_priority(tensordict, priority)
        return out

    def _log_prob(self, data: TensorDictBase, tensordict: TensorDictBase) -> Tensor:
        """log π(a|s) of the data's actions, shape ``[*B]``."""
        action = self._keys("action")[0]
        with self._parameters_in("actor_network"):
            dist = distribution(self.actor_network, data)
        heads = ActionHeads(dist, action, self._get(tensordict, "reward").ndim - 1)
        log_prob = heads.log_prob({key: self._taken_action(tensordict, key) for key in heads.heads})
        return self._one_per_sample(log_prob, "the log-probability of the action", tensordict)

    def _value(self, data: TensorDictBase, tensordict: TensorDictBase) -> Tensor:
        """V of ``data``, shape ``[*B]``."""
        key = self.tensor_keys.value
        return self._one_per_sample(self._call("value_network", data, key, self.value_network_params), key, tensordict)
