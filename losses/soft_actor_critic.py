"""What SAC and its relatives (discrete SAC, REDQ, CQL, CrossQ, TQC) share: policy, ensemble of Q, temperature."""

from typing import Any

from tensordict import TensorDict, TensorDictBase
from tensordict.nn import (
    InteractionType,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    set_interaction_type,
)
from torch import Tensor

from ..estimators.calls import distribution
from ..estimators.heads import PolicyDistribution
from ..estimators.modules import check_distribution
from ..kernels import soft_policy_loss
from .action_value import ActionValueLoss
from .functional.soft_actor_critic import temperature_loss
from .policy import ActionHeads
from .reduction import check_scalar_output_mode, has_metrics
from .temperature import TemperatureLoss
from .utils import check_distance

QNetworks = TensorDictModule | list[TensorDictModule]
METRICS = ("alpha", "entropy")


class SoftActorCriticLoss(TemperatureLoss, ActionValueLoss):
    """Base of the losses of a policy that seeks value and entropy, and of the Q networks that judge it.

    Args:
        actor_network: the policy.
        loss_function: ``"l1"``, ``"l2"`` or ``"smooth_l1"`` (`distance_loss`).
        delay_actor: keep target parameters of the policy.
        separate_losses: parameters that Q shares with the policy are trained by the policy's loss only.
        reduction: ``"mean"`` (None), ``"sum"`` or ``"none"``.
        deactivate_vmap: call the Q networks one by one.
        use_prioritized_weights: False leaves importance weights unread.
        scalar_output_mode: see `SACLoss`.

    Raises:
        TypeError: an actor without a distribution.
        ValueError: an option has none of its values.

    """

    actor_network: Any
    qvalue_network: Any

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        *,
        loss_function: str,
        delay_actor: bool = False,
        separate_losses: bool,
        reduction: str | None,
        deactivate_vmap: bool,
        use_prioritized_weights: str | bool,
        scalar_output_mode: str | None,
    ) -> None:
        super().__init__(reduction)
        check_distribution(actor_network, type(self).__name__)
        check_scalar_output_mode(scalar_output_mode)
        self.loss_function = check_distance(loss_function)
        self.delay_actor = delay_actor
        self.separate_losses = separate_losses
        self.deactivate_vmap = deactivate_vmap
        self.use_prioritized_weights = use_prioritized_weights
        self.scalar_output_mode = scalar_output_mode
        self.convert_to_functional(actor_network, "actor_network", create_target_params=delay_actor)
        actions = actor_network.dist_sample_keys
        self.set_keys(action=actions[0] if len(actions) == 1 else actions)

    def _trained_by_policy(self) -> list[Tensor]:
        """The parameters that other networks leave alone."""
        return list(self.actor_network.parameters()) if self.separate_losses else []

    # --- the policy ---------------------------------------------------------------------------------------------

    def _policy(self, data: TensorDictBase, *, target: bool = False) -> PolicyDistribution:
        """π(·|s) of the observations in ``data``, which is left as it is."""
        with self._parameters_in("actor_network", target=target), set_interaction_type(InteractionType.RANDOM):
            return distribution(self.actor_network, data)

    def _draw(
        self, policy: PolicyDistribution, data: TensorDictBase, tensordict: TensorDictBase
    ) -> tuple[TensorDictBase, Tensor]:
        """A copy of ``data`` with an action from ``policy``, and log π(a|s), shape ``[*B]``; both differentiable.

        Raises:
            RuntimeError: there are more or fewer log-probabilities than rewards in ``tensordict``.
            TypeError: the action isn't a differentiable function of the policy's parameters.

        """
        batch_ndim = self._get(tensordict, "reward").ndim - 1 + data.ndim - tensordict.ndim
        heads = ActionHeads(policy, self.actor_network.dist_sample_keys[0], batch_ndim)
        for key, head in heads.heads.items():
            if not head.has_rsample:
                raise TypeError(
                    f"{type(self).__name__} needs a policy whose action {key!r} is a differentiable function of its "
                    f"parameters, but {type(head).__name__} draws none (for discrete actions use DiscreteSACLoss)"
                )
        actions, log_prob = heads.draw()
        data = data.copy()
        for key, action in actions.items():
            data.set(key, action)
        return data, self._one_per_sample(log_prob, "the log-probability of the action", tensordict)

    def _policy_loss(
        self, values: Tensor, log_prob: Tensor, alpha: Tensor, tensordict: TensorDictBase
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The reduced losses of policy and temperature, and the mean entropy, of actions that Q_i gives ``values``."""
        mask, weights = self._mask(tensordict, log_prob), self._priority_weights(tensordict, log_prob)
        loss, entropy = soft_policy_loss(values, log_prob, alpha, mask=mask, weights=weights, reduction=self.reduction)
        if self.reduction == "mean" and mask is None and weights is None:
            # Linear in −log π, whose mean is there already.
            return loss, temperature_loss(entropy, self.log_alpha, self.target_entropy), entropy
        of_alpha = temperature_loss(-log_prob, self.log_alpha, self.target_entropy)
        return loss, self._reduce_loss(of_alpha, tensordict, mask=mask, weights=weights), entropy

    # --- the output ---------------------------------------------------------------------------------------------

    def _names_of_output(self, *more: str) -> list[str]:
        """The names of the three losses and the metrics, and ``more``, in the order of TorchRL's."""
        metrics = METRICS if has_metrics(self.reduction, self.scalar_output_mode) else ()
        return ["loss_actor", "loss_qvalue", "loss_alpha", *metrics, *more]

    def _result(self, losses: dict[str, Tensor], alpha: Tensor, entropy: Tensor) -> TensorDictBase:
        """The loss's output: reduced ``losses``, and the metrics."""
        if has_metrics(self.reduction, self.scalar_output_mode):
            losses = {**losses, **dict(zip(METRICS, (alpha, entropy), strict=True))}
        return TensorDict(losses)
