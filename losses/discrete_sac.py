"""Soft actor-critic for discrete actions."""

from dataclasses import dataclass
from math import log
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, dispatch
from torch import Tensor

from .action_space import find_action_space
from .functional.soft_actor_critic import categorical_entropy, expected_soft_value, temperature_loss
from .soft_actor_critic import QNetworks, SoftActorCriticLoss
from .temperature import check_target_entropy


class DiscreteSACLoss(SoftActorCriticLoss):
    r"""Soft actor-critic whose expectations over the policy's discrete actions are exact sums.

    .. math::
        L_Q &= \sum_i d\left(Q_i(s_t, a_t),\ r_t + γ(1 - \text{term}_t) V(s_{t+1})\right), \qquad
        V(s) = \sum_a π(a|s) \left(\min_i \bar Q_i(s, a) - α \log π(a|s)\right) \\
        L_π &= \sum_a π(a|s_t) \left(α \log π(a|s_t) - \min_i Q_i(s_t, a)\right) \\
        L_α &= \log α\,\left(H[π(\cdot|s_t)] - \bar H\right)

    The losses are ``loss_actor``, ``loss_qvalue`` and ``loss_alpha``. Also in the output: ``alpha``, and ``entropy``,
    the mean of H. The priority of a sample, written to the input as ``td_error``, shape ``[*B]``, is the largest
    absolute error of a Q network.

    Args:
        actor_network: the policy π, a ``ProbabilisticTensorDictSequential`` whose distribution has ``logits``;
            actions that can't be taken have the logit −∞.
        qvalue_network: Q of all actions, shape ``[*B, A]``. An ensemble is made of it, each member drawn anew; a list
            of ``num_qvalue_nets`` networks is an ensemble as it is.
        action_space: how the actions in the data are written: ``"one-hot"`` (None), ``"categorical"``, or a spec of
            one of these (see `action_space.find_action_space`).
        num_actions: A, for the target entropy.
        num_qvalue_nets: size of the ensemble.
        loss_function: d: ``"l1"``, ``"l2"`` or ``"smooth_l1"`` (`distance_loss`).
        alpha_init: α at the start.
        min_alpha: the least α.
        max_alpha: the greatest α.
        fixed_alpha: don't learn α. ``loss_alpha`` then has no gradient.
        target_entropy_weight: share of the greatest entropy, log A, that is the target if that is "auto".
        target_entropy: H̄, or ``"auto"``.
        delay_qvalue: have target Q networks Q̄; otherwise Q̄ is Q.
        separate_losses: parameters that Q shares with the policy are trained by the policy's loss only.
        reduction: ``"mean"`` (None), ``"sum"``, or ``"none"``: losses of shape ``[*B]``.
        skip_done_states: changes nothing, see `SACLoss`.
        deactivate_vmap: call the Q networks one by one.
        use_prioritized_weights: False leaves the importance weights in the data unread.
        scalar_output_mode: see `SACLoss`.

    Raises:
        TypeError: a policy without a distribution.
        ValueError: an argument that can't be used, or ``num_actions`` is missing and the target entropy "auto".
        RuntimeError: on call, shapes don't fit.
        KeyError: on call, an entry is missing; the message says how to rename it.

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import ProbabilisticTensorDictModule as Sampler, TensorDictModule
        >>> actor = ProbabilisticTensorDictSequential(
        ...     TensorDictModule(torch.nn.Linear(3, 2), ["observation"], ["logits"]),
        ...     Sampler(["logits"], ["action"], distribution_class=torch.distributions.Categorical),
        ... )
        >>> qvalue = TensorDictModule(torch.nn.Linear(3, 2), ["observation"], ["action_value"])
        >>> loss = DiscreteSACLoss(actor, qvalue, action_space="categorical", num_actions=2)
        >>> loss.target_entropy
        tensor(0.6793)
        >>> following = {"observation": torch.randn(8, 3), "reward": torch.ones(8, 1), "done": torch.zeros(8, 1)}
        >>> data = {"observation": torch.randn(8, 3), "action": torch.ones(8).long(), "next": following}
        >>> sorted(loss(TensorDict(data, [8])).keys())
        ['alpha', 'entropy', 'loss_actor', 'loss_alpha', 'loss_qvalue']

    See Christodoulou 2019, Soft actor-critic for discrete action settings (arXiv:1910.07207).

    """

    @dataclass
    class _AcceptedKeys:
        """The entries read and written. ``reward``, ``done`` and ``terminated`` are read under "next".

        ``action`` is the policy's own; ``action_value`` is written by the Q network, ``value`` and ``log_prob`` by
        nobody.
        """

        action: NestedKey = "action"
        value: NestedKey = "state_value"
        action_value: NestedKey = "action_value"
        priority: NestedKey = "td_error"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        log_prob: NestedKey = "log_prob"
        priority_weight: NestedKey = "priority_weight"

    _target_entropy_name = "target_entropy"
    _schedulable_buffers = frozenset({"target_entropy"})

    target_entropy: Tensor

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        qvalue_network: QNetworks,
        *,
        action_space: Any = None,
        num_actions: int | None = None,
        num_qvalue_nets: int = 2,
        loss_function: str = "smooth_l1",
        alpha_init: float = 1.0,
        min_alpha: float | None = None,
        max_alpha: float | None = None,
        fixed_alpha: bool = False,
        target_entropy_weight: float = 0.98,
        target_entropy: str | float | Tensor = "auto",
        delay_qvalue: bool = True,
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
            separate_losses=separate_losses,
            reduction=reduction,
            deactivate_vmap=deactivate_vmap,
            use_prioritized_weights=use_prioritized_weights,
            scalar_output_mode=scalar_output_mode,
        )
        self.skip_done_states = skip_done_states  # a public attribute in TorchRL; here nothing reads it
        self._actions = find_action_space("one_hot" if action_space is None else action_space, one_choice=True)
        if target_entropy == "auto":
            if num_actions is None:
                raise ValueError("target_entropy is 'auto', which needs num_actions")
            target_entropy = target_entropy_weight * log(num_actions)
        self._take_qvalue_network(qvalue_network, num_qvalue_nets, delay=delay_qvalue, shared=self._trained_by_policy())
        self._set_temperature(
            alpha_init, min_alpha, max_alpha, fixed=fixed_alpha, target_entropy=check_target_entropy(target_entropy)
        )
        self.out_keys = self._names_of_output()

    @property
    def action_space(self) -> str:
        """How actions are written: ``one_hot`` or ``categorical``."""
        return self._actions.name

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The losses and metrics (see the class), for transitions of batch size ``[*B]``."""
        networks = ["qvalue_network", "actor_network"]
        data, next_data = self._transitions(tensordict, networks, networks)
        action = self._taken_action(tensordict)
        alpha = self._bounded_alpha()

        log_prob = self._log_probs(data, tensordict)
        values = self._values(data, log_prob)
        # The policy's loss trains no Q, but observations that require gradients get theirs through Q as well: then it
        # is asked again, with constant parameters.
        inputs_learn = any(x.requires_grad for x in data.values(True, True))
        constant_values = self._values(data, log_prob, detach=True) if inputs_learn else values.detach()
        with torch.no_grad():
            next_log_prob = self._log_probs(next_data, tensordict)
            next_values = self._values(next_data, next_log_prob, target=True)
            next_value = expected_soft_value(next_values.amin(0), next_log_prob, alpha)
            value_target = self._value_target(tensordict, next_value)

        value = self._actions.value(values, action.expand(self.num_qvalue_nets, *action.shape))
        entropy = self._only_valid(categorical_entropy(log_prob), tensordict)  # NaN where no action is allowed
        loss_qvalue, priority = self._ensemble_loss(value, value_target, tensordict, priority="abs")
        of_policy = -expected_soft_value(constant_values.amin(0), log_prob, alpha)
        of_alpha = temperature_loss(entropy, self.log_alpha, self.target_entropy)
        losses = {
            "loss_actor": self._reduce_loss(of_policy, tensordict),
            "loss_qvalue": loss_qvalue,
            "loss_alpha": self._reduce_loss(of_alpha, tensordict),
        }
        result = self._result(losses, alpha, self._metric(entropy, tensordict))
        self._write_priority(tensordict, priority)
        return result

    def _log_probs(self, data: TensorDictBase, tensordict: TensorDictBase) -> Tensor:
        """log π(·|s) of the observations in ``data``, shape ``[*B, A]``."""
        policy = self._policy(data)
        logits = getattr(policy, "logits", None)
        if logits is None:
            raise TypeError(
                f"{type(self).__name__} needs a policy whose distribution has logits, but {type(policy).__name__} has "
                "none (for continuous actions use SACLoss)"
            )
        self._one_per_sample(logits[..., :1], "the logits of the policy", tensordict)
        return logits.log_softmax(-1)

    def _values(self, data: TensorDictBase, log_prob: Tensor, *, target: bool = False, detach: bool = False) -> Tensor:
        """Q_i(s, ·) of the observations in ``data``, shape ``[N, *B, A]``; see `_parameters_in` for the options."""
        key = self.tensor_keys.action_value
        values = self._ensemble("qvalue_network", data, key, target=target, detach=detach)
        self._require_shape(values[0], key, log_prob, "the logits of the policy")
        return values
