"""Randomised ensembled double Q-learning."""

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, dispatch
from torch import Tensor

from ..estimators.keys import under_next
from ..kernels.checks import check_positive
from .functional.soft_actor_critic import temperature_loss
from .soft_actor_critic import QNetworks, SoftActorCriticLoss
from .temperature import continuous_target_entropy

EXPLORATION_NOISE = "_eps_gSDE"


class REDQLoss(SoftActorCriticLoss):
    r"""Soft actor-critic with a large ensemble: the target takes the least value of a few members drawn at random.

    .. math::
        L_{Q_i} &= d\left(Q_i(s_t, a_t),\ r_t + γ(1 - \text{term}_t) V(s_{t+1})\right), \qquad
        V(s) = \min_{i \in M} \bar Q_i(s, a) - α \log π(a|s) \\
        L_{π, i} &= α \log π(a|s_t) - Q_i(s_t, a) \\
        L_α &= α\,\left(-\log π(a|s) - \bar H\right)

    with a drawn from π, and M drawn anew in each call. The policy is asked once, about s_t and s_{t+1}, and both its
    actions count in L_α.

    The losses are ``loss_actor``, ``loss_qvalue`` and ``loss_alpha``, means over the ensemble (for α, over the two
    states). With reduction "none" they have shapes ``[N, *B]``, ``[N, *B]`` and ``[2, *B]``. Also in the output:
    ``alpha`` and ``entropy``, the mean of −log π, and per sample, without gradient:

    ============================  ==============================  ==============
    ``state_action_value_actor``  Q_i(s_t, a)                     ``[N, *B]``
    ``action_log_prob_actor``     log π(a|s_t)                    ``[*B]``
    ``next.state_value``          V(s_{t+1})                      ``[*B]``
    ``target_value``              r_t + γ(1 − term_t) V(s_{t+1})  ``[*B]``
    ============================  ==============================  ==============

    The priority of a sample, written to the input as ``td_error``, shape ``[*B]``, is the largest squared error of a Q
    network.

    Args:
        actor_network: the policy π, a ``ProbabilisticTensorDictSequential`` whose action can be differentiated.
        qvalue_network: Q, which reads the action. An ensemble is made of it, each member drawn anew; a list of
            ``num_qvalue_nets`` networks is an ensemble as it is.
        num_qvalue_nets: N, the size of the ensemble.
        sub_sample_len: the size of M; where it is N or more, M is the whole ensemble. (TorchRL then takes N − 1.)
        loss_function: d: ``"l1"``, ``"l2"`` or ``"smooth_l1"`` (`distance_loss`).
        alpha_init: α at the start.
        min_alpha: the least α (None: no bound).
        max_alpha: the greatest α (None: no bound).
        action_spec: an object with the ``shape`` of an action, such as a spec of TorchRL; by default the policy's.
        fixed_alpha: don't learn α. ``loss_alpha`` then has no gradient.
        target_entropy: H̄. ``"auto"``: minus the number of the action's dimensions.
        delay_qvalue: have target Q networks Q̄; otherwise Q̄ is Q.
        gSDE: the policy explores with noise that depends on the state, which it reads from ``"_eps_gSDE"``; here it
            reads 0 in its place.
        separate_losses: parameters that Q shares with the policy are trained by the policy's loss only.
        reduction: ``"mean"`` (None), ``"sum"``, or ``"none"``.
        deactivate_vmap: call the Q networks one by one.
        scalar_output_mode: see `SACLoss`.
        use_prioritized_weights: False leaves the importance weights in the data unread.

    Raises:
        TypeError: a policy without a distribution; a count that is no integer; on call, a policy whose action can't be
            differentiated.
        ValueError: an argument that can't be used.
        RuntimeError: the target entropy is "auto", and nothing says what shape the action has; on call, there
            are more or fewer values or log-probabilities than rewards.
        KeyError: on call, an entry is missing; the message says how to rename it.

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import ProbabilisticTensorDictModule as Sampler, TensorDictModule
        >>> from torch import nn
        >>> class Judge(nn.Linear):
        ...     def forward(self, observation, action):
        ...         return super().forward(torch.cat([observation, action], -1))
        >>> actor = ProbabilisticTensorDictSequential(
        ...     TensorDictModule(nn.Linear(3, 1), ["observation"], ["loc"]),
        ...     Sampler(["loc"], ["action"], distribution_class=lambda loc: torch.distributions.Normal(loc, 0.5)),
        ... )
        >>> qvalue = TensorDictModule(Judge(4, 1), ["observation", "action"], ["state_action_value"])
        >>> loss = REDQLoss(actor, qvalue, num_qvalue_nets=5, target_entropy=-1.0)
        >>> following = {"observation": torch.randn(8, 3), "reward": torch.ones(8, 1), "done": torch.zeros(8, 1)}
        >>> data = {"observation": torch.randn(8, 3), "action": torch.rand(8, 1), "next": following}
        >>> loss(TensorDict(data, [8]))["state_action_value_actor"].shape
        torch.Size([5, 8])

    See Chen et al. 2021, Randomized ensembled double Q-learning (arXiv:2101.05982), algorithm 1.

    """

    @dataclass
    class _AcceptedKeys:
        """The entries read and written. ``reward``, ``done`` and ``terminated`` are read under "next".

        ``action`` is the policy's own, a list if it has several heads; ``state_action_value`` is written by the
        Q network, ``value`` and ``sample_log_prob`` by nobody.
        """

        action: NestedKey | list[NestedKey] = "action"
        value: NestedKey = "state_value"
        sample_log_prob: NestedKey = "action_log_prob"
        priority: NestedKey = "td_error"
        state_action_value: NestedKey = "state_action_value"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        priority_weight: NestedKey = "priority_weight"

    _target_entropy_name = "target_entropy_buffer"
    _schedulable_buffers = frozenset({"target_entropy_buffer"})

    target_entropy_buffer: Tensor

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        qvalue_network: QNetworks,
        *,
        num_qvalue_nets: int = 10,
        sub_sample_len: int = 2,
        loss_function: str = "smooth_l1",
        alpha_init: float = 1.0,
        min_alpha: float | None = 0.1,
        max_alpha: float | None = 10.0,
        action_spec: Any = None,
        fixed_alpha: bool = False,
        target_entropy: str | float | Tensor = "auto",
        delay_qvalue: bool = True,
        gSDE: bool = False,
        separate_losses: bool = False,
        reduction: str | None = None,
        deactivate_vmap: bool = False,
        scalar_output_mode: str | None = None,
        use_prioritized_weights: str | bool = "auto",
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
        check_positive("sub_sample_len", sub_sample_len)
        self.sub_sample_len = sub_sample_len
        self.gSDE = gSDE
        self._take_qvalue_network(qvalue_network, num_qvalue_nets, delay=delay_qvalue, shared=self._trained_by_policy())
        self._set_temperature(
            alpha_init,
            min_alpha,
            max_alpha,
            fixed=fixed_alpha,
            target_entropy=continuous_target_entropy(target_entropy, action_spec, actor_network),
        )
        self.register_load_state_dict_pre_hook(_keep_target_entropy)
        self.out_keys = self._names_of_output(
            "state_action_value_actor", "action_log_prob_actor", "next.state_value", "target_value"
        )

    @property
    def target_entropy(self) -> Tensor:
        """H̄, a 0-d tensor."""
        return self.target_entropy_buffer

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The losses and metrics (see the class), for transitions of batch size ``[*B]``."""
        data, next_data = self._transitions(
            self._without_noise(tensordict), ["qvalue_network", "actor_network"], ["actor_network", "qvalue_network"]
        )
        trained_alpha = self._trained_alpha()
        alpha = trained_alpha.detach()
        members = torch.randperm(self.num_qvalue_nets, device=self.log_alpha.device)[: self.sub_sample_len]

        states = self._both(data, next_data, tensordict)
        drawn, log_probs = self._draw(self._policy(states), states, tensordict)
        log_prob, next_log_prob = log_probs.unbind(0)
        judged = data.copy()
        for key in self.actor_network.dist_sample_keys:
            action, next_action = drawn.get(key).unbind(0)
            judged.set(key, action)
            next_data.set(key, next_action)

        with torch.no_grad():
            next_values = self._ensemble_values(next_data, tensordict, target=True, members=members)
        target = self._target(tensordict, next_values, log_prob=next_log_prob, alpha=alpha)
        values = self._ensemble_values(data, tensordict)
        policy_values = self._ensemble_values(judged, tensordict, detach=True)

        loss, priority = self._ensemble_loss(values, target.value_target, tensordict, per_member=True)
        surprise = -log_probs
        entropy = self._metric(surprise.movedim(0, -1), tensordict)
        all_alike = self._mask(tensordict, log_prob) is None and self._priority_weights(tensordict, log_prob) is None
        if self.reduction == "mean" and all_alike:
            # Linear in the surprise, whose mean is there already.
            of_alpha = temperature_loss(entropy, trained_alpha, self.target_entropy)
        else:
            of_alpha = self._reduce_all(temperature_loss(surprise, trained_alpha, self.target_entropy), tensordict)
        losses = {
            "loss_actor": self._reduce_all(alpha * log_prob - policy_values, tensordict),
            "loss_qvalue": loss,
            "loss_alpha": of_alpha,
        }
        result = self._result(losses, alpha, entropy)
        result["state_action_value_actor"] = policy_values.detach()
        result["action_log_prob_actor"] = log_prob.detach()
        result["next.state_value"] = target.next_value
        result["target_value"] = target.value_target
        self._write_priority(tensordict, priority)
        return result

    def _both(self, data: TensorDictBase, next_data: TensorDictBase, tensordict: TensorDictBase) -> TensorDict:
        """What the policy reads of the observations and of the next ones, shape ``[2, *B]``.

        Raises:
            KeyError: something that the policy may do without is there for one of the two observations only.

        """
        both = {}
        for key in self._read_by(["actor_network"]):
            x, next_x = data.get(key, None), next_data.get(key, None)
            if x is None and next_x is None:
                continue
            if x is None or next_x is None:
                self._require_entries(
                    tensordict, [key, under_next(key)], "the policy is asked about both observations at once"
                )
            both[key] = torch.stack([x, next_x])
        return TensorDict(both, [2, *tensordict.batch_size])

    def _without_noise(self, tensordict: TensorDictBase) -> TensorDictBase:
        """``tensordict``, or a shallow copy of it without exploration noise if the policy reads any."""
        if not self.gSDE:
            return tensordict
        none = self._get(tensordict, "reward").new_zeros(tensordict.batch_size)
        tensordict = tensordict.copy()
        return tensordict.set(EXPLORATION_NOISE, none).set(("next", EXPLORATION_NOISE), none)

    def _reduce_all(self, loss: Tensor, tensordict: TensorDictBase) -> Tensor:
        """Reduce a loss that has several values for each sample, shape ``[N, *B]``."""
        loss = self._reduce_loss(loss.movedim(0, -1).unsqueeze(-1), tensordict)
        return loss.movedim(-1, 0) if self.reduction == "none" else loss


def _keep_target_entropy(loss: REDQLoss, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A TorchRL checkpoint has no target entropy if it was saved before the first call: then it stays as it is."""
    state_dict.setdefault(f"{prefix}target_entropy_buffer", loss.target_entropy_buffer)
