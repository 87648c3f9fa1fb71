"""Advantage actor-critic."""

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule, dispatch
from torch import Tensor

from .actor_critic import ActorCriticLoss
from .functional import policy_gradient_objective


class A2CLoss(ActorCriticLoss):
    r"""Policy gradient with a learned baseline and an entropy bonus.

    .. math::
        L = -\mathbb{E}_t\left[A_t \log π(a_t|s_t)\right] + c_1 \mathbb{E}_t\left[d(V_t, \hat V_t)\right]
        - c_2 \mathbb{E}_t\left[H[π(\cdot|s_t)]\right]

    The three terms are ``loss_objective``, ``loss_critic`` and ``loss_entropy``. Also in the output: ``entropy``,
    ``value_clip_fraction`` if ``clip_value`` is set, and ``composite_entropy`` of each action head (per sample) if
    there are several and `tensordict.nn.composite_lp_aggregate` is off. Steps that don't count
    (`LossModule.loss_mask_key`) don't count in any of them.

    If the advantage isn't in the data, the loss's value estimator (GAE, see `make_value_estimator`) finds it. The
    TensorDict that is passed stays as it is.

    Args:
        actor_network: the policy π, a ``ProbabilisticTensorDictSequential``.
        critic_network: writes the value V. None only without a critic loss and if the advantage comes with the data.
        entropy_bonus: have the entropy term.
        samples_mc_entropy: draws from which the entropy is estimated where it has no closed form.
        entropy_coeff: c₂ (0.01).
        critic_coeff: c₁. None: no critic term.
        loss_critic_type: d: ``"l1"``, ``"l2"`` or ``"smooth_l1"`` (`distance_loss`).
        separate_losses: parameters that the policy shares with the critic are trained by the policy's loss only.
        functional: hold the networks' parameters in the loss. False uses the networks as they are.
        reduction: ``"mean"`` (None), ``"sum"``, or ``"none"``: losses of shape ``[*B]``.
        clip_value: bound on the step of the value away from the one in the data (`fusedrl.kernels.value_loss`).
        device: where the coefficients are put; by default where the parameters are.

    Raises:
        TypeError: no actor; a critic coefficient without a critic; ``gamma`` (see `make_value_estimator`).
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
        >>> following = {"observation": torch.randn(8, 4), "reward": torch.ones(8, 1), "done": torch.zeros(8, 1)}
        >>> data = actor(TensorDict({"observation": torch.randn(8, 4), "next": following}, [8]))
        >>> loss = A2CLoss(actor, critic).make_value_estimator("TD0", gamma=0.9)
        >>> sorted(loss(data).keys())
        ['entropy', 'loss_critic', 'loss_entropy', 'loss_objective']

    See Mnih et al. 2016, Asynchronous methods for deep reinforcement learning (arXiv:1602.01783), section 4.

    """

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        critic_network: TensorDictModule | None = None,
        *,
        entropy_bonus: bool = True,
        samples_mc_entropy: int = 1,
        entropy_coeff: float | Tensor | None = None,
        critic_coeff: float | Tensor | None = 1.0,
        loss_critic_type: str = "smooth_l1",
        separate_losses: bool = False,
        functional: bool = True,
        reduction: str | None = None,
        clip_value: float | Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            actor_network,
            critic_network,
            entropy_bonus=entropy_bonus,
            samples_mc_entropy=samples_mc_entropy,
            entropy_coeff=entropy_coeff,
            critic_coeff=critic_coeff,
            loss_critic_type=loss_critic_type,
            separate_losses=separate_losses,
            functional=functional,
            reduction=reduction,
            clip_value=clip_value,
            device=device,
        )
        self.out_keys = [
            "loss_objective",
            *(["loss_critic"] if self.has_critic_loss else []),
            *(["entropy", "loss_entropy"] if entropy_bonus else []),
        ]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The loss and its metrics (see the class), for data of batch size ``[*B]``."""
        tensordict = self._with_advantage(tensordict)
        advantage = self._get(tensordict, "advantage")
        heads = self._action_heads(tensordict, advantage)
        log_prob = self._log_prob(heads, tensordict, advantage)
        gain = policy_gradient_objective(log_prob, self._only_valid(advantage, tensordict))
        terms = {"loss_objective": self._reduce_loss(-gain, tensordict)}
        return TensorDict(terms | self._entropy_terms(heads, tensordict) | self._critic_terms(tensordict))
