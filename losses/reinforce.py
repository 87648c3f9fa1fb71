"""REINFORCE with a learned baseline."""

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule, dispatch
from torch import Tensor

from .functional import policy_gradient_objective
from .policy_gradient import PolicyGradientLoss


class ReinforceLoss(PolicyGradientLoss):
    r"""Policy gradient with a learned baseline.

    .. math::
        L_\text{actor} = -\mathbb{E}_t\left[A_t \log π(a_t|s_t)\right], \qquad
        L_\text{value} = \mathbb{E}_t\left[d(V_t, \hat V_t)\right]

    in ``loss_actor`` and ``loss_value``; with a ``clip_value`` also ``value_clip_fraction``. Steps that don't count
    (`LossModule.loss_mask_key`) don't count in any of them.

    If the advantage isn't in the data, the loss's value estimator (GAE, see `make_value_estimator`) finds it. The
    TensorDict that is passed stays as it is.

    Args:
        actor_network: the policy π, a ``ProbabilisticTensorDictSequential``.
        critic_network: writes the value V.
        delay_value: keep target parameters of the critic, which then give the value of the next observation.
        loss_critic_type: d: ``"l1"``, ``"l2"`` or ``"smooth_l1"`` (`distance_loss`).
        separate_losses: parameters that the policy shares with the critic are trained by the policy's loss only.
        functional: hold the networks' parameters in the loss. False uses the networks as they are.
        reduction: ``"mean"`` (None), ``"sum"``, or ``"none"``: losses of shape ``[*B]``.
        clip_value: bound on the step of the value away from the one in the data (`fusedrl.kernels.value_loss`).
        device: where the coefficients are put; by default where the parameters are.

    Raises:
        TypeError: a network is missing; ``gamma`` (see `make_value_estimator`).
        ValueError: an argument that can't be used.
        KeyError: on call, an entry is missing; the message says how to rename it.
        RuntimeError: on call, advantage and log-probability (or value and value target) have different shapes.

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import ProbabilisticTensorDictModule as Sampler
        >>> actor = ProbabilisticTensorDictSequential(
        ...     TensorDictModule(torch.nn.Linear(4, 2), ["observation"], ["logits"]),
        ...     Sampler(["logits"], ["action"], distribution_class=torch.distributions.Categorical),
        ... )
        >>> critic = TensorDictModule(torch.nn.Linear(4, 1), ["observation"], ["state_value"])
        >>> data = actor(TensorDict({"observation": torch.randn(8, 4)}, [8]))
        >>> data["advantage"], data["value_target"] = torch.zeros(8, 1), torch.ones(8, 1)
        >>> ReinforceLoss(actor, critic)(data)["loss_actor"]
        tensor(0., grad_fn=<MeanBackward0>)

    See Williams 1992, Simple statistical gradient-following algorithms for connectionist reinforcement learning,
    https://doi.org/10.1007/BF00992696.

    """

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        critic_network: TensorDictModule,
        *,
        delay_value: bool = False,
        loss_critic_type: str = "smooth_l1",
        separate_losses: bool = False,
        functional: bool = True,
        reduction: str | None = None,
        clip_value: float | Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if critic_network is None:
            raise TypeError("ReinforceLoss needs a critic_network, but it is None")
        super().__init__(
            actor_network,
            critic_network,
            loss_critic_type=loss_critic_type,
            separate_losses=separate_losses,
            functional=functional,
            reduction=reduction,
            clip_value=clip_value,
            delay_value=delay_value,
            device=device,
        )
        self.out_keys = ["loss_actor", "loss_value"]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The losses and their metrics (see the class), for data of batch size ``[*B]``."""
        tensordict = self._with_advantage(tensordict)
        advantage = self._get(tensordict, "advantage")
        log_prob = self._log_prob(self._action_heads(tensordict, advantage), tensordict, advantage)
        gain = policy_gradient_objective(log_prob, self._only_valid(advantage, tensordict))
        value_loss, metrics = self._critic_loss(tensordict)
        loss = self._reduce_loss(-gain, tensordict)
        return TensorDict({"loss_actor": loss, "loss_value": value_loss, **metrics})
