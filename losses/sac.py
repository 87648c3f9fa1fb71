"""Soft actor-critic, with a value network and without."""

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule, dispatch
from torch import Tensor

from ..estimators.heads import PolicyDistribution
from ..estimators.modules import check_keyed
from ..kernels import EnsembleLoss, Target
from .functional.soft_actor_critic import soft_value
from .soft_actor_critic import QNetworks, SoftActorCriticLoss
from .temperature import continuous_target_entropy
from .utils import distance_loss


class SACLoss(SoftActorCriticLoss):
    r"""Policy that seeks both value and entropy, judged by the least favourable of several Q networks.

    .. math::
        L_Q &= \sum_i d\left(Q_i(s_t, a_t),\ r_t + γ(1 - \text{term}_t) V(s_{t+1})\right) \\
        L_π &= α \log π(a|s_t) - \min_i Q_i(s_t, a) \\
        L_α &= \log α\,\left(-\log π(a|s_t) - \bar H\right)

    with a drawn from π. Without a value network (version 2), V is the soft value of one next action,

    .. math::
        V(s_{t+1}) = \min_i \bar Q_i(s_{t+1}, a') - α \log π(a'|s_{t+1}).

    With one (version 1), it is the target value network's, and the value network learns the soft value of an action,

    .. math::
        L_V = d\left(V(s_t),\ \min_i \bar Q_i(s_t, a) - α \log π(a|s_t)\right);

    there, each Q network learns from its own share of the batch, as it does in TorchRL: the i-th of N equal parts of
    dimension 0.

    The losses are ``loss_actor``, ``loss_qvalue``, ``loss_alpha``, and ``loss_value`` if there is a value network. Also
    in the output: ``alpha``, and ``entropy``, the mean of −log π(a|s_t). The priority of a sample, written to the input
    as ``td_error``, shape ``[*B]``, is the largest absolute error of a Q network (version 1: the squared error of the
    network whose share the sample is in).

    Args:
        actor_network: the policy π, a ``ProbabilisticTensorDictSequential`` whose action can be differentiated.
        qvalue_network: Q, which reads the action. An ensemble is made of it, each member drawn anew; a list of
            ``num_qvalue_nets`` networks is an ensemble as it is.
        value_network: V of the observation.
        num_qvalue_nets: size of the ensemble.
        loss_function: d: ``"l1"``, ``"l2"`` or ``"smooth_l1"`` (`distance_loss`).
        alpha_init: α at the start.
        min_alpha: the least α.
        max_alpha: the greatest α.
        action_spec: an object with the ``shape`` of an action, such as a spec of TorchRL; by default the policy's.
        fixed_alpha: don't learn α. ``loss_alpha`` then has no gradient.
        target_entropy: H̄. ``"auto"``: minus the number of the action's dimensions.
        delay_actor: have a target policy, which draws the actions whose soft value is learned from.
        delay_qvalue: have target Q networks Q̄; otherwise Q̄ is Q.
        delay_value: have a target value network.
        separate_losses: parameters that the policy shares with other networks are trained by the policy's loss only,
            those that the value network shares with Q by the value network's.
        reduction: ``"mean"`` (None), ``"sum"``, or ``"none"``: losses of shape ``[*B]``.
        skip_done_states: changes nothing, as what follows a terminal step reaches no result anyway. (TorchRL then
            takes the value 0 for what follows a truncated step too.)
        deactivate_vmap: call the Q networks one by one.
        use_prioritized_weights: False leaves the importance weights in the data unread.
        scalar_output_mode: ``"exclude"`` leaves ``alpha`` and ``entropy`` out where the reduction is "none"; otherwise
            they are there always, as 0-d tensors.

    Raises:
        TypeError: a policy without a distribution; on call, one whose action can't be differentiated.
        ValueError: an argument that can't be used.
        RuntimeError: the target entropy is "auto", and nothing says what shape the action has; on call, there
            are more or fewer values or log-probabilities than rewards.
        KeyError: on call, an entry is missing; the message says how to rename it.

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import ProbabilisticTensorDictModule as Sampler
        >>> from torch import nn
        >>> class GaussianParameters(nn.Linear):
        ...     def forward(self, x):
        ...         loc, log_scale = super().forward(x).chunk(2, -1)
        ...         return loc, log_scale.exp()
        >>> class Judge(nn.Linear):
        ...     def forward(self, observation, action):
        ...         return super().forward(torch.cat([observation, action], -1))
        >>> actor = ProbabilisticTensorDictSequential(
        ...     TensorDictModule(GaussianParameters(3, 2), ["observation"], ["loc", "scale"]),
        ...     Sampler(["loc", "scale"], ["action"], distribution_class=torch.distributions.Normal),
        ... )
        >>> qvalue = TensorDictModule(Judge(4, 1), ["observation", "action"], ["state_action_value"])
        >>> loss = SACLoss(actor, qvalue, target_entropy=-1.0).make_value_estimator("TD0", gamma=0.98)
        >>> following = {"observation": torch.randn(8, 3), "reward": torch.ones(8, 1), "done": torch.zeros(8, 1)}
        >>> data = {"observation": torch.randn(8, 3), "action": torch.rand(8, 1), "next": following}
        >>> sorted(loss(TensorDict(data, [8])).keys())
        ['alpha', 'entropy', 'loss_actor', 'loss_alpha', 'loss_qvalue']

    See Haarnoja et al. 2018, Soft actor-critic (arXiv:1801.01290) for version 1, and Soft actor-critic algorithms and
    applications (arXiv:1812.05905) for version 2 and α.

    """

    @dataclass
    class _AcceptedKeys:
        """The entries read and written. ``reward``, ``done`` and ``terminated`` are read under "next".

        ``action`` is the policy's own, a list if it has several heads; ``value`` and ``state_action_value`` are
        written by the networks, ``log_prob`` by nobody.
        """

        action: NestedKey | list[NestedKey] = "action"
        value: NestedKey = "state_value"
        state_action_value: NestedKey = "state_action_value"
        log_prob: NestedKey = "action_log_prob"
        priority: NestedKey = "td_error"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        priority_weight: NestedKey = "priority_weight"

    _target_entropy_name = "_target_entropy"
    _schedulable_buffers = frozenset({"_target_entropy"})

    value_network: Any

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        qvalue_network: QNetworks,
        value_network: TensorDictModule | None = None,
        *,
        num_qvalue_nets: int = 2,
        loss_function: str = "smooth_l1",
        alpha_init: float = 1.0,
        min_alpha: float | None = None,
        max_alpha: float | None = None,
        action_spec: Any = None,
        fixed_alpha: bool = False,
        target_entropy: str | float | Tensor = "auto",
        delay_actor: bool = False,
        delay_qvalue: bool = True,
        delay_value: bool = True,
        separate_losses: bool = False,
        reduction: str | None = None,
        skip_done_states: bool = False,
        deactivate_vmap: bool = False,
        use_prioritized_weights: str | bool = "auto",
        scalar_output_mode: str | None = None,
    ) -> None:
        super().__init__(
            actor_network,
            loss_function=loss_function,
            delay_actor=delay_actor,
            separate_losses=separate_losses,
            reduction=reduction,
            deactivate_vmap=deactivate_vmap,
            use_prioritized_weights=use_prioritized_weights,
            scalar_output_mode=scalar_output_mode,
        )
        shared = self._trained_by_policy()
        self.delay_value = delay_value
        self.skip_done_states = skip_done_states  # a public attribute in TorchRL; here nothing reads it
        if value_network is None:
            self.value_network = None
        else:
            check_keyed(value_network, "value_network", type(self).__name__)
            self.convert_to_functional(
                value_network, "value_network", create_target_params=delay_value, compare_against=shared
            )
            shared += value_network.parameters() if separate_losses else []
        self._take_qvalue_network(qvalue_network, num_qvalue_nets, delay=delay_qvalue, shared=shared)
        self._set_temperature(
            alpha_init,
            min_alpha,
            max_alpha,
            fixed=fixed_alpha,
            target_entropy=continuous_target_entropy(target_entropy, action_spec, actor_network),
        )
        self.out_keys = self._names_of_output(*([] if value_network is None else ["loss_value"]))

    @property
    def target_entropy(self) -> Tensor:
        """H̄, a 0-d tensor."""
        return self._target_entropy

    @property
    def target_entropy_buffer(self) -> Tensor:
        """H̄ by TorchRL's other name."""
        return self._target_entropy

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The losses and metrics (see the class), for transitions of batch size ``[*B]``."""
        with_value = [] if self.value_network is None else ["value_network"]
        data, next_data = self._transitions(
            tensordict,
            ["qvalue_network", "actor_network", *with_value],
            with_value or ["actor_network", "qvalue_network"],
        )
        alpha = self._bounded_alpha()
        losses = {}

        with torch.no_grad():
            target = self._next_target(next_data, alpha, tensordict)
        losses["loss_qvalue"], priority = self._qvalue_loss(data, target.value_target, tensordict)

        policy = self._policy(data)
        if self.value_network is not None:
            delayed = self._policy(data, target=True) if self.delay_actor else policy
            losses["loss_value"] = self._value_loss(delayed, data, alpha, tensordict)
        judged, log_prob = self._draw(policy, data, tensordict)
        values = self._ensemble_values(judged, tensordict, detach=True)
        losses["loss_actor"], losses["loss_alpha"], entropy = self._policy_loss(values, log_prob, alpha, tensordict)
        result = self._result(losses, alpha, entropy)
        self._write_priority(tensordict, priority)
        return result

    def _next_target(self, next_data: TensorDictBase, alpha: Tensor, tensordict: TensorDictBase) -> Target:
        """The target of Q, and V(s_{t+1})."""
        if self.value_network is not None:
            return self._target(tensordict, self._state_value(next_data, tensordict, target=True).unsqueeze(0))
        policy = self._policy(next_data, target=True)
        judged, log_prob = self._draw(policy, next_data, tensordict)
        values = self._ensemble_values(judged, tensordict, target=True)
        return self._target(tensordict, values, log_prob=log_prob, alpha=alpha)

    def _qvalue_loss(self, data: TensorDictBase, value_target: Tensor, tensordict: TensorDictBase) -> EnsembleLoss:
        """The reduced loss of the Q networks, and the priority of each sample."""
        values = self._ensemble_values(data, tensordict)
        if self.value_network is None:
            return self._ensemble_loss(values, value_target, tensordict, priority="abs")
        return self._ensemble_loss(own_share(values).unsqueeze(0), value_target, tensordict)

    def _value_loss(
        self, policy: PolicyDistribution, data: TensorDictBase, alpha: Tensor, tensordict: TensorDictBase
    ) -> Tensor:
        """Loss of the value network, reduced."""
        with torch.no_grad():
            judged, log_prob = self._draw(policy, data, tensordict)
            target = soft_value(self._ensemble_values(judged, tensordict, target=True).amin(0), log_prob, alpha)
        distance = distance_loss(self._state_value(data, tensordict), target, self.loss_function)
        return self._reduce_loss(distance, tensordict)

    def _state_value(self, data: TensorDictBase, tensordict: TensorDictBase, *, target: bool = False) -> Tensor:
        """What the value network says of the observations in ``data``, shape ``[*B]``."""
        key = self.tensor_keys.value
        params = self._parameters_of("value_network", target=target)
        return self._one_per_sample(self._call("value_network", data, key, params), key, tensordict)


def own_share(value: Tensor) -> Tensor:
    """Of the N values of each sample, shape ``[N, B, *rest]``, that of the network whose share it is in.

    The i-th network has the i-th of N parts of B that are as equal as can be.

    Examples:
        >>> own_share(torch.arange(8).view(2, 4))
        tensor([0, 1, 6, 7])

    """
    if value.ndim == 1:  # a single sample
        return own_share(value.unsqueeze(1)).squeeze(0)
    networks, batch = value.shape[:2]
    owner = torch.arange(batch, device=value.device) * networks // max(batch, 1)
    owner = owner.view(1, batch, *(1,) * (value.ndim - 2)).expand_as(value[:1])
    return value.gather(0, owner).squeeze(0)
