"""CrossQ: soft actor-critic without target networks."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, dispatch
from torch import Tensor, nn

from .soft_actor_critic import QNetworks, SoftActorCriticLoss
from .temperature import continuous_target_entropy


class CrossQLoss(SoftActorCriticLoss):
    r"""Soft actor-critic in which one call of the Q networks, with batch normalisation, sees both ends of a transition.

    .. math::
        \begin{bmatrix} Q_i(s_t, a_t) \\ Q_i(s_{t+1}, a') \end{bmatrix} &=
            Q_i\left(\begin{bmatrix} s_t \\ s_{t+1} \end{bmatrix}, \begin{bmatrix} a_t \\ a' \end{bmatrix}\right),
            \qquad a' \sim π(\cdot|s_{t+1}) \\
        L_Q &= \sum_i d\left(Q_i(s_t, a_t),\ r_t + γ(1 - \text{term}_t)
            \left(\min_j Q_j(s_{t+1}, a') - α \log π(a'|s_{t+1})\right)\right) \\
        L_π &= α \log π(a|s_t) - \min_i Q_i(s_t, a) \\
        L_α &= \log α\,\left(-\log π(a|s_t) - \bar H\right)

    The statistics of the normalisation are then those of both distributions of actions, which is what lets the target
    networks go. The target is a constant. Normalisation is by the batch's statistics there, and by the running ones
    where the policy's action is judged, whatever mode the networks are in.

    Padded steps (`LossModule.loss_mask_key`) don't count in the losses, but are among what the normalisation sees.

    The losses are ``loss_actor``, ``loss_qvalue`` and ``loss_alpha``. Also in the output: ``log_prob`` and ``td_error``
    of each sample, ``alpha``, and ``entropy``, the mean of −log π(a|s_t). The priority of a sample, written to the
    input as ``td_error``, shape ``[*B]``, is the largest absolute error of a Q network.

    Args:
        actor_network: the policy π, a ``ProbabilisticTensorDictSequential`` whose action can be differentiated.
        qvalue_network: Q, which reads the action. An ensemble is made of it, each member drawn anew; a list of
            ``num_qvalue_nets`` networks is an ensemble as it is.
        num_qvalue_nets: size of the ensemble.
        loss_function: d: ``"l1"``, ``"l2"`` or ``"smooth_l1"`` (`distance_loss`).
        alpha_init: α at the start.
        min_alpha: the least α.
        max_alpha: the greatest α.
        action_spec: an object with the ``shape`` of an action; by default the policy's.
        fixed_alpha: don't learn α. ``loss_alpha`` then has no gradient.
        target_entropy: H̄. ``"auto"``: minus the number of the action's dimensions.
        separate_losses: parameters that the policy shares with Q are trained by the policy's loss only.
        reduction: ``"mean"`` (None), ``"sum"``, or ``"none"``: losses of shape ``[*B]``.
        deactivate_vmap: call the Q networks one by one.
        scalar_output_mode: see `SACLoss`.
        use_prioritized_weights: False leaves the importance weights in the data unread.

    Raises:
        TypeError: a policy without a distribution; on call, one whose action can't be differentiated.
        ValueError: an argument that can't be used.
        RuntimeError: see `SACLoss`.
        KeyError: on call, an entry is missing; the message says how to rename it.

    See Bhatt et al. 2024, CrossQ: batch normalization in deep reinforcement learning for greater sample efficiency and
    simplicity (arXiv:1902.05605).

    """

    @dataclass
    class _AcceptedKeys:
        """The entries read and written. ``reward``, ``done`` and ``terminated`` are read under "next".

        ``log_prob`` is there for TorchRL's sake: nothing reads or writes it.
        """

        action: NestedKey | list[NestedKey] = "action"
        state_action_value: NestedKey = "state_action_value"
        priority: NestedKey = "td_error"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        log_prob: NestedKey = "_log_prob"
        priority_weight: NestedKey = "priority_weight"

    _target_entropy_name = "_target_entropy"
    _schedulable_buffers = frozenset({"_target_entropy"})

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        qvalue_network: QNetworks,
        *,
        num_qvalue_nets: int = 2,
        loss_function: str = "smooth_l1",
        alpha_init: float = 1.0,
        min_alpha: float | None = None,
        max_alpha: float | None = None,
        action_spec: Any = None,
        fixed_alpha: bool = False,
        target_entropy: str | float | Tensor = "auto",
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
        self._take_qvalue_network(qvalue_network, num_qvalue_nets, delay=False, shared=self._trained_by_policy())
        self._set_temperature(
            alpha_init,
            min_alpha,
            max_alpha,
            fixed=fixed_alpha,
            target_entropy=continuous_target_entropy(target_entropy, action_spec, actor_network),
        )
        self.out_keys = self._names_of_output()

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
        data, next_data = self._transitions(
            tensordict, ["qvalue_network", "actor_network"], ["actor_network", "qvalue_network"]
        )
        self._check_columns(tensordict)
        alpha = self._bounded_alpha()
        read = self._read_by(["qvalue_network"])

        with torch.no_grad():
            judged, next_log_prob = self._draw(self._policy(next_data), next_data, tensordict)
        with _in_mode(self.qvalue_network, training=True):
            values = self._values(_stacked(data, judged, read), tensordict)
        target = self._target(tensordict, values[:, 1], log_prob=next_log_prob, alpha=alpha)
        loss, priority = self._ensemble_loss(values[:, 0], target.value_target, tensordict, priority="abs")

        judged, log_prob = self._draw(self._policy(data), data, tensordict)
        with _in_mode(self.qvalue_network, training=False):
            judgements = self._values(judged.select(*read), tensordict, detach=True)
        of_policy, of_alpha, entropy = self._policy_loss(judgements, log_prob, alpha, tensordict)
        result = self._result({"loss_actor": of_policy, "loss_qvalue": loss, "loss_alpha": of_alpha}, alpha, entropy)
        result["log_prob"], result["td_error"] = log_prob.detach(), priority
        self._write_priority(tensordict, priority)
        return result

    def _check_columns(self, tensordict: TensorDictBase) -> None:
        """Refuse what has another shape than the reward while no statistics of the normalisation have moved."""
        reward = self._get(tensordict, "reward")
        self._require_shape(*self._terminated(tensordict), reward, self._keys("reward")[0])
        per_sample = reward.squeeze(-1)
        self._mask(tensordict, per_sample)
        self._priority_weights(tensordict, per_sample)

    def _values(self, data: TensorDictBase, tensordict: TensorDictBase, *, detach: bool = False) -> Tensor:
        """Q of ``data``, shape ``[N, *D]`` for its batch size ``*D``, which a normalisation sees as one dimension."""
        key = self.tensor_keys.state_action_value
        values = self._ensemble("qvalue_network", data.reshape(data.batch_size.numel()), key, detach=detach)
        values = values.view(len(values), *data.batch_size, *values.shape[2:])
        return self._one_per_sample(values, key, tensordict)


def _stacked(data: TensorDictBase, other: TensorDictBase, keys: Iterable[NestedKey]) -> TensorDictBase:
    """The entries ``keys`` of both along a new dimension 0. What they are nested in may have other batch sizes."""
    return TensorDict({key: torch.stack([data[key], other[key]]) for key in keys}, [2, *data.batch_size])


@contextmanager
def _in_mode(network: nn.Module, *, training: bool) -> Iterator[None]:
    """Within the block ``network`` is in training mode, or in evaluation mode; after it, as it was."""
    before = [(module, module.training) for module in network.modules()]
    network.train(training)
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode
