"""Conservative Q-learning of continuous actions."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, dispatch
from torch import Tensor, nn

from ..estimators.heads import PolicyDistribution, log_prob
from ..kernels.checks import check_positive
from .functional.conservative import conservative_gap
from .functional.soft_actor_critic import soft_value, temperature_loss
from .policy import draw
from .soft_actor_critic import QNetworks, SoftActorCriticLoss
from .temperature import continuous_target_entropy

# Bounds of α', the multiplier of the conservative term.
_MULTIPLIER_RANGE = (0.0, 1e6)


class CQLLoss(SoftActorCriticLoss):
    r"""Soft actor-critic from stored data alone, with the values of actions that aren't in the data pushed down.

    .. math::
        L_Q &= \sum_i d\left(Q_i(s_t, a_t),\ r_t + γ(1 - \text{term}_t) \min_j \bar Q_j(s_{t+1}, a')\right) \\
        L_\text{CQL} &= w \sum_i \left(τ \log \sum_k \exp\left(\frac{Q_i(s_t, a_k)}{τ} - \log μ(a_k)\right)
            - Q_i(s_t, a_t)\right) \\
        L_π &= α \log π(a|s_t) - \min_i Q_i(s_t, a) \\
        L_\text{BC} &= α \log π(a|s_t) - \log π(a_t|s_t) \\
        L_α &= \log α\,\left(-\log π(a|s_t) - \bar H\right)

    The actions a_k, ``num_random`` of each kind, are drawn uniformly from (−1, 1), from π(·|s_t), and from
    π(·|s_{t+1}); μ is the density that each was drawn from, so that the sum estimates the integral of exp(Q/τ).
    What is minimised is L_Q + L_CQL; the policy first follows L_BC, then L_π.

    With a Lagrange multiplier α', L_CQL is multiplied by it after a threshold ξ is taken off each network's term, and
    ``loss_alpha_prime`` makes α' grow where the terms are above ξ.

    The losses are ``loss_actor``, ``loss_actor_bc``, ``loss_qvalue``, ``loss_cql``, ``loss_alpha``, and with a
    multiplier ``loss_alpha_prime``. Also in the output: ``alpha``, and ``entropy``, the mean of −log π(a|s_t). The
    priority of a sample, written to the input as ``td_error``, shape ``[*B]``, is the largest squared error of a Q
    network.

    Args:
        actor_network: the policy π, a ``ProbabilisticTensorDictSequential`` whose action can be differentiated.
        qvalue_network: Q, which reads the action. An ensemble of two is made of it, each member drawn anew, but for
            parameters that are the policy's too, which stay the policy's and are trained by its loss only; a list of
            two networks is an ensemble as it is.
        loss_function: d: ``"l1"``, ``"l2"`` or ``"smooth_l1"`` (`distance_loss`).
        alpha_init: α at the start.
        min_alpha: the least α.
        max_alpha: the greatest α.
        action_spec: an object with the ``shape`` of an action; by default the policy's.
        fixed_alpha: don't learn α. ``loss_alpha`` then has no gradient.
        target_entropy: H̄. ``"auto"``: minus the number of the action's dimensions.
        delay_actor: have a target policy, which draws a'.
        delay_qvalue: have target Q networks Q̄; otherwise Q̄ is Q.
        temperature: τ.
        min_q_weight: w.
        max_q_backup: the next value of a network is that of the best of ``num_random`` actions of π.
        deterministic_backup: leave the entropy term −α log π(a'|s_{t+1}) out of the next value.
        num_random: number of actions of each kind.
        with_lagrange: learn a multiplier α'.
        lagrange_thresh: ξ; the attribute is ``target_action_gap``, as in TorchRL.
        reduction: ``"mean"`` (None), ``"sum"``, or ``"none"``: losses of shape ``[*B]``.
        deactivate_vmap: call the Q networks one by one.
        scalar_output_mode: see `SACLoss`.
        use_prioritized_weights: False leaves the importance weights in the data unread.

    Raises:
        TypeError: a policy without a distribution; a count that is no integer; on call, a policy whose action can't be
            differentiated.
        ValueError: an argument that can't be used.
        RuntimeError: see `SACLoss`.
        KeyError: on call, an entry is missing; the message says how to rename it.

    See Kumar et al. 2020, Conservative Q-learning for offline reinforcement learning (arXiv:2006.04779), equation 4
    and appendix F.

    """

    @dataclass
    class _AcceptedKeys:
        """The entries read and written. ``reward``, ``done`` and ``terminated`` are read under "next".

        ``value``, ``log_prob``, ``pred_q1``, ``pred_q2``, ``cql_q1_loss`` and ``cql_q2_loss`` are there for TorchRL's
        sake: nothing reads or writes them.
        """

        action: NestedKey = "action"
        value: NestedKey = "state_value"
        state_action_value: NestedKey = "state_action_value"
        log_prob: NestedKey = "_log_prob"
        pred_q1: NestedKey = "pred_q1"
        pred_q2: NestedKey = "pred_q2"
        priority: NestedKey = "td_error"
        cql_q1_loss: NestedKey = "cql_q1_loss"
        cql_q2_loss: NestedKey = "cql_q2_loss"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        priority_weight: NestedKey = "priority_weight"

    _target_entropy_name = "target_entropy_buffer"
    _multipliers = ("log_alpha", "log_alpha_prime")
    _schedulable_buffers = frozenset({"target_entropy_buffer"})

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        qvalue_network: QNetworks,
        *,
        loss_function: str = "smooth_l1",
        alpha_init: float = 1.0,
        min_alpha: float | None = None,
        max_alpha: float | None = None,
        action_spec: Any = None,
        fixed_alpha: bool = False,
        target_entropy: str | float | Tensor = "auto",
        delay_actor: bool = False,
        delay_qvalue: bool = True,
        temperature: float = 1.0,
        min_q_weight: float = 1.0,
        max_q_backup: bool = False,
        deterministic_backup: bool = True,
        num_random: int = 10,
        with_lagrange: bool = False,
        lagrange_thresh: float = 0.0,
        reduction: str | None = None,
        deactivate_vmap: bool = False,
        scalar_output_mode: str | None = None,
        use_prioritized_weights: str | bool = "auto",
    ) -> None:
        check_positive("num_random", num_random)
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, but is {temperature}")
        super().__init__(
            actor_network,
            loss_function=loss_function,
            delay_actor=delay_actor,
            separate_losses=False,
            reduction=reduction,
            deactivate_vmap=deactivate_vmap,
            use_prioritized_weights=use_prioritized_weights,
            scalar_output_mode=scalar_output_mode,
        )
        self._take_qvalue_network(qvalue_network, 2, delay=delay_qvalue, shared=actor_network.parameters())
        self._set_temperature(
            alpha_init,
            min_alpha,
            max_alpha,
            fixed=fixed_alpha,
            target_entropy=continuous_target_entropy(target_entropy, action_spec, actor_network),
        )
        self.temperature = temperature
        self.min_q_weight = min_q_weight
        self.max_q_backup = max_q_backup
        self.deterministic_backup = deterministic_backup
        self.num_random = num_random
        self.with_lagrange = with_lagrange
        self.target_action_gap = lagrange_thresh
        multiplier = nn.Parameter(torch.zeros_like(self.log_alpha)) if with_lagrange else None
        self.register_parameter("log_alpha_prime", multiplier)
        self.out_keys = self._names_of_output(*(["loss_alpha_prime"] if with_lagrange else []))
        self.out_keys = ["loss_actor", "loss_actor_bc", "loss_qvalue", "loss_cql", *self.out_keys[2:]]

    @property
    def target_entropy(self) -> Tensor:
        """H̄, a 0-d tensor."""
        return self.target_entropy_buffer

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The losses and metrics (see the class), for transitions of batch size ``[*B]``."""
        data, next_data = self._transitions(
            tensordict, ["qvalue_network", "actor_network"], ["actor_network", "qvalue_network"]
        )
        action = self._taken_action(tensordict)
        alpha = self._bounded_alpha()
        policy = self._policy(data)
        judged, log_prob = self._draw(policy, data, tensordict)
        policy_value = self._ensemble_values(judged, tensordict, detach=True).amin(0)
        data_log_prob = self._density(policy, action, tensordict)

        with torch.no_grad():
            next_value = self._next_value(next_data, alpha, tensordict)
            value_target = self._value_target(tensordict, next_value)
        values = self._ensemble_values(data, tensordict)
        gaps = self._conservative_gaps(data, next_data, policy, values, tensordict)

        loss_qvalue, priority = self._ensemble_loss(values, value_target, tensordict)
        reduced = partial(self._reduce_loss, tensordict=tensordict)
        losses = {
            "loss_actor": reduced(-soft_value(policy_value, log_prob, alpha)),
            "loss_actor_bc": reduced(alpha * log_prob - data_log_prob),
            "loss_qvalue": loss_qvalue,
            "loss_cql": reduced(self._weighted(gaps).sum(0)),
            "loss_alpha": reduced(temperature_loss(-log_prob, self.log_alpha, self.target_entropy)),
        }
        if self.with_lagrange:
            above = (gaps.detach() - self.target_action_gap).mean(0)
            losses["loss_alpha_prime"] = reduced(-self._multiplier() * above)
        result = self._result(losses, alpha, self._metric(-log_prob, tensordict))
        self._write_priority(tensordict, priority)
        return result

    def _next_value(self, next_data: TensorDictBase, alpha: Tensor, tensordict: TensorDictBase) -> Tensor:
        """What follows is worth, shape ``[*B]``."""
        policy = self._policy(next_data, target=True)
        if self.max_q_backup:
            actions, _ = self._many(policy, tensordict)
            return self._values_of_many(next_data, actions, tensordict, target=True).amax(-1).amin(0)
        judged, log_prob = self._draw(policy, next_data, tensordict)
        value = self._ensemble_values(judged, tensordict, target=True).amin(0)
        return value if self.deterministic_backup else soft_value(value, log_prob, alpha)

    # --- the conservative term ----------------------------------------------------------------------------------

    def _conservative_gaps(
        self,
        data: TensorDictBase,
        next_data: TensorDictBase,
        policy: PolicyDistribution,
        values: Tensor,
        tensordict: TensorDictBase,
    ) -> Tensor:
        """The term of each network and sample, shape ``[2, *B]``."""
        with torch.no_grad():
            drawn = [self._many(p, tensordict) for p in (policy, self._policy(next_data))]
            like = drawn[0][0]
            uniform = torch.rand_like(like) * 2 - 1
            density = -math.log(2) * math.prod(like.shape[values.ndim :])
            actions = torch.cat([uniform, *(action for action, _ in drawn)])
            log_density = torch.cat([torch.full_like(drawn[0][1], density), *(log_prob for _, log_prob in drawn)])
        others = self._values_of_many(data, actions, tensordict)
        corrected = others - self.temperature * log_density.movedim(0, -1)
        return self.min_q_weight * conservative_gap(corrected, values, self.temperature)

    def _weighted(self, gaps: Tensor) -> Tensor:
        return gaps if not self.with_lagrange else self._multiplier().detach() * (gaps - self.target_action_gap)

    def _multiplier(self) -> Tensor:
        return self.log_alpha_prime.exp().clamp(*_MULTIPLIER_RANGE)

    def _many(self, policy: PolicyDistribution, tensordict: TensorDictBase) -> tuple[Tensor, Tensor]:
        """``num_random`` actions, shape ``[K, *B, *A]``, and their log-densities, shape ``[K, *B]``."""
        actions, density = draw(policy, self.num_random)
        return actions, self._without_column(density, tensordict)

    def _density(self, policy: PolicyDistribution, action: Tensor, tensordict: TensorDictBase) -> Tensor:
        """log π(a|s) of the action in the data, shape ``[*B]``."""
        return self._without_column(log_prob(policy, action, self._keys("action")[0]), tensordict)

    def _without_column(self, density: Tensor, tensordict: TensorDictBase) -> Tensor:
        """A log-density as ``[*K, *B]``; that of a distribution without dimensions of its own is ``[*K, *B, 1]``."""
        shape = self._get(tensordict, "reward").shape
        return density.squeeze(-1) if density.shape[-len(shape) :] == shape else density

    def _values_of_many(
        self, data: TensorDictBase, actions: Tensor, tensordict: TensorDictBase, **options: Any
    ) -> Tensor:
        """Q of every state and each of its ``actions``, shape ``[K, *B, *A]``: shape ``[2, *B, K]``."""
        key = self.tensor_keys.state_action_value
        batch = (len(actions), *data.batch_size)
        many = data.expand(batch).clone(recurse=False).set(self.tensor_keys.action, actions)
        # In one dimension: of more, the compiler would make a graph for each size.
        values = self._ensemble("qvalue_network", many.reshape(many.batch_size.numel()), key, **options)
        values = values.view(len(values), *batch, *values.shape[2:])
        return self._one_per_sample(values, key, tensordict).movedim(1, -1)
