"""Proximal policy optimisation: the plain and the clipped surrogate.

See Schulman et al. 2017, Proximal policy optimization algorithms (arXiv:1707.06347).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import (
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    dispatch,
)
from torch import Tensor
from torch import distributed as dist

from ..kernels import clip_ppo_loss
from .actor_critic import ActorCriticLoss
from .functional import (
    approximate_kl,
    effective_sample_size,
    normalize_advantage,
    ppo_objective,
    weight_excess,
)
from .policy import ActionHeads
from .policy_gradient import Terms

DEFAULT_CRITIC_COEFF = 1.0


@dataclass
class Comparison:
    """The policy beside the one that collected the data, at each sample; tensors are ``[*B, 1]``."""

    tensordict: TensorDictBase
    """The data, with what the policy's layers found."""
    heads: ActionHeads
    """π_θ(·|s)."""
    advantage: Tensor
    """A, as it is in the data."""
    log_prob: Tensor
    """log π_θ(a|s)."""
    old_log_prob: Tensor
    """log π_old(a|s)."""
    proximal_log_prob: Tensor | None
    """log π_prox(a|s) of a delayed actor."""
    mask: Tensor | None
    """The samples that count."""


class PPOLoss(ActorCriticLoss):
    r"""Importance-weighted policy gradient, without a bound on the step: the base of the other two.

    .. math::
        L = -\mathbb{E}_t\left[r_t A_t\right] + c_1 \mathbb{E}_t\left[d(V_t, \hat V_t)\right]
        - c_2 \mathbb{E}_t\left[H[π_θ(\cdot|s_t)]\right],
        \qquad r_t = \frac{π_θ(a_t|s_t)}{π_\text{old}(a_t|s_t)}

    The three terms are ``loss_objective``, ``loss_critic`` and ``loss_entropy``. Also in the output: ``entropy``,
    ``kl_approx`` (see `functional.approximate_kl`), ``explained_variance`` of the critic along the first batch
    dimension (for batch size ``[N, *B]`` of shape ``[*B, 1]``), ``value_clip_fraction`` if ``clip_value`` is set, and
    ``composite_entropy`` of each action head (per sample) if there are several and
    `tensordict.nn.composite_lp_aggregate` is off. Steps that don't count (`LossModule.loss_mask_key`) don't count in
    any of them.

    If the advantage isn't in the data, the loss's value estimator (GAE, see `make_value_estimator`) finds it. The
    TensorDict that is passed stays as it is.

    Args:
        actor_network: the policy π_θ, a ``ProbabilisticTensorDictSequential``.
        critic_network: writes the value V. None: no critic loss, and the advantage must come with the data. It may
            read what the policy's own layers write, so that a common trunk runs once.
        entropy_bonus: have the entropy term.
        samples_mc_entropy: draws from which the entropy is estimated where it has no closed form.
        entropy_coeff: c₂ (0.01). For several action heads it can be a mapping from each head's action key (or
            ``<action>_log_prob``, or ``<action>_entropy``) to the head's coefficient.
        log_explained_variance: have ``explained_variance`` in the output.
        critic_coeff: c₁ (1.0). 0: no critic term.
        loss_critic_type: d: ``"l1"``, ``"l2"`` or ``"smooth_l1"``.
        normalize_advantage: shift and scale the advantages of the batch to mean 0 and standard deviation 1.
        normalize_advantage_exclude_dims: see `functional.normalize_advantage`.
        normalize_advantage_over_ranks: normalise over the batches of all ranks of the default process group.
        separate_losses: parameters that the policy shares with the critic are trained by the policy's loss only.
        functional: hold the networks' parameters in the loss. False uses the networks as they are.
        reduction: ``"mean"`` (None), ``"sum"``, or ``"none"``: losses of shape ``[*B]``.
        clip_value: bound on the step of the value away from the one in the data (`fusedrl.kernels.value_loss`).
        delay_actor: keep a copy of the policy in ``target_actor_network_params`` for an updater to move, and take
            it instead of π_old as the policy that the clip range, the KL penalty and ``kl_approx`` refer to (Hilton
            et al. 2021, arXiv:2110.00641).
        max_importance_ratio: bound on r_t, see `functional.weight_excess`.
        device: where the coefficients are put; by default where the parameters are.

    Raises:
        TypeError: no actor; a critic coefficient without a critic; ``gamma`` (see `make_value_estimator`).
        ValueError: an argument that can't be used.
        KeyError: on call, an entry is missing; the message says how to rename it.
        RuntimeError: on call, advantage and log-probability (or value and value target) have different shapes, data
            that must be constant requires grad, or there is no process group to normalise over.

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential
        >>> actor = ProbabilisticTensorDictSequential(
        ...     TensorDictModule(torch.nn.Linear(4, 2), ["observation"], ["logits"]),
        ...     ProbabilisticTensorDictModule(
        ...         ["logits"], ["action"], distribution_class=torch.distributions.Categorical, return_log_prob=True
        ...     ),
        ... )
        >>> critic = TensorDictModule(torch.nn.Linear(4, 1), ["observation"], ["state_value"])
        >>> loss = PPOLoss(actor, critic)
        >>> data = actor(TensorDict({"observation": torch.randn(8, 4)}, [8])).detach()
        >>> data["advantage"], data["value_target"] = torch.ones(8, 1), torch.zeros(8, 1)
        >>> loss(data)["loss_objective"].item()
        -1.0

    """

    _schedulable_buffers = frozenset({"max_importance_ratio"})
    _first_metrics: tuple[str, ...] = ()
    _last_metrics: tuple[str, ...] = ()

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        critic_network: TensorDictModule | None = None,
        *,
        entropy_bonus: bool = True,
        samples_mc_entropy: int = 1,
        entropy_coeff: float | Tensor | Mapping[NestedKey, float] | None = None,
        log_explained_variance: bool = True,
        critic_coeff: float | Tensor | None = None,
        loss_critic_type: str = "smooth_l1",
        normalize_advantage: bool = False,
        normalize_advantage_exclude_dims: tuple[int, ...] = (),
        normalize_advantage_over_ranks: bool = False,
        separate_losses: bool = False,
        functional: bool = True,
        reduction: str | None = None,
        clip_value: float | Tensor | None = None,
        delay_actor: bool = False,
        max_importance_ratio: float | Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if critic_network is not None:
            critic_coeff = DEFAULT_CRITIC_COEFF if critic_coeff is None else critic_coeff
        critic_coeff = None if critic_coeff == 0 else critic_coeff
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
            delay_actor=delay_actor,
            device=device,
        )
        if max_importance_ratio is not None and not max_importance_ratio > 0:
            raise ValueError(f"max_importance_ratio is {max_importance_ratio}, but must be positive")
        self.register_coeff_buffer("max_importance_ratio", max_importance_ratio, device=device)
        self.log_explained_variance = log_explained_variance
        self.normalize_advantage = normalize_advantage
        self.normalize_advantage_exclude_dims = normalize_advantage_exclude_dims
        self.normalize_advantage_over_ranks = normalize_advantage_over_ranks
        self.out_keys = self._names_of_outputs()

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The loss and its metrics (see the class), for data of batch size ``[*B]``."""
        new = self._compare(tensordict)
        log_weight, _ = self._log_weights(new)
        gain = ppo_objective(log_weight, self._normalized(new))
        return self._losses(new, {"loss_objective": self._reduce_loss(-gain, new.tensordict)})

    # --- keys ---------------------------------------------------------------------------------------------------

    def _find_in_keys(self) -> Iterator[NestedKey]:
        yield from super()._find_in_keys()
        yield from self._keys("sample_log_prob")

    def _names_of_outputs(self) -> list[NestedKey]:
        """What a call with keyword tensors returns, in this order."""
        names = ["loss_objective", *self._first_metrics]
        if self.entropy_bonus:
            names += ["entropy", "loss_entropy"]
        if self.has_critic_loss:
            names += ["loss_critic"] if self.clip_value is None else ["loss_critic", "value_clip_fraction"]
        return [*names, *self._last_metrics]

    # --- steps of the three losses ------------------------------------------------------------------------------

    def _compare(self, tensordict: TensorDictBase) -> Comparison:
        """Evaluate the policy at the actions in the data, and find their advantages."""
        if self.normalize_advantage_over_ranks:
            self._ranks()
        tensordict = self._with_advantage(tensordict, "sample_log_prob")
        advantage = self._get(tensordict, "advantage")
        self._refuse_gradient(tensordict, "sample_log_prob")
        proximal_log_prob = self._proximal_log_prob(tensordict, advantage) if self.delay_actor else None
        heads = self._action_heads(tensordict, advantage)
        log_prob = self._log_prob(heads, tensordict, advantage)
        old_log_prob = self._old_log_prob(heads, tensordict, advantage)
        mask = self._mask(tensordict, advantage)
        return Comparison(tensordict, heads, advantage, log_prob, old_log_prob, proximal_log_prob, mask)

    def _log_weights(self, new: Comparison) -> tuple[Tensor, Tensor]:
        """log r = log π_θ − log π_old, capped; and log π_θ − log π_prox, or without π_prox log r before the cap."""
        log_weight = self._only_valid(new.log_prob - new.old_log_prob, new.tensordict)
        proximal_log_weight = log_weight
        if new.proximal_log_prob is not None:
            proximal_log_weight = self._only_valid(new.log_prob - new.proximal_log_prob, new.tensordict)
        if self.max_importance_ratio is not None:
            log_weight = log_weight - weight_excess(log_weight, self.max_importance_ratio)
        return log_weight, proximal_log_weight

    def _normalized(self, new: Comparison) -> Tensor:
        """The advantage, normalised if it is to be."""
        if not self.normalize_advantage:
            return new.advantage
        group = self._ranks() if self.normalize_advantage_over_ranks else None
        return normalize_advantage(new.advantage, self.normalize_advantage_exclude_dims, new.mask, group)

    def _ranks(self) -> "dist.ProcessGroup | None":
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "normalize_advantage_over_ranks=True needs a process group: call torch.distributed.init_process_group"
            )
        return dist.group.WORLD

    def _old_log_prob(self, heads: ActionHeads, tensordict: TensorDictBase, advantage: Tensor) -> Tensor:
        keys = self._keys("sample_log_prob")
        old_log_prob = heads.total([tensordict.get(key) for key in keys])
        self._require_shape(old_log_prob, keys[0], advantage, self.tensor_keys.advantage)
        return old_log_prob

    @torch.no_grad()
    def _proximal_log_prob(self, tensordict: TensorDictBase, advantage: Tensor) -> Tensor:
        return self._log_prob(self._proximal_heads(tensordict, advantage), tensordict, advantage)

    def _proximal_heads(self, tensordict: TensorDictBase, advantage: Tensor) -> ActionHeads:
        return self._action_heads(tensordict, advantage, target=True)

    def _losses(self, new: Comparison, terms: Terms) -> TensorDictBase:
        """``terms`` with what the three losses have in common."""
        if "kl_approx" not in terms:
            _, log_weight = self._log_weights(new)
            terms["kl_approx"] = approximate_kl(log_weight.detach(), new.mask)
        return TensorDict(terms | self._entropy_terms(new.heads, new.tensordict) | self._critic_terms(new.tensordict))


class ClipPPOLoss(PPOLoss):
    r"""PPO with the clipped surrogate.

    .. math::
        L = -\mathbb{E}_t\left[\min\left(r_t A_t,\ \text{clip}(r_t,\ 1 - ε,\ 1 + ε) A_t\right)\right] + \dots

    with the critic's and the entropy's term of `PPOLoss`, whose arguments, outputs and errors it shares. Further
    outputs: ``clip_fraction``, ``ESS`` (`functional.effective_sample_size`, shape ``[*B]`` for batch size ``[N, *B]``),
    ``max_ratio`` and ``mean_ratio`` (of r_t).

    Args:
        actor_network: see `PPOLoss`.
        critic_network: see `PPOLoss`.
        clip_epsilon: ε, or a pair (ε_low, ε_high) for the range [1 − ε_low, 1 + ε_high] (Yu et al. 2025,
            arXiv:2503.14476). A pair is kept in two coefficients ``clip_epsilon_low`` and ``clip_epsilon_high``.
        clip_value: see `PPOLoss`; True means ε.
        kwargs: see `PPOLoss`.

    Raises:
        ValueError: ε is negative, ε_low is not below 1, or ``clip_value`` is True beside a pair.

    Examples:
        See `PPOLoss`.

    """

    _schedulable_buffers = frozenset({"clip_epsilon", "clip_epsilon_low", "clip_epsilon_high"})
    _first_metrics = ("clip_fraction",)
    _last_metrics = ("ESS", "kl_approx", "max_ratio", "mean_ratio")

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        critic_network: TensorDictModule | None = None,
        *,
        clip_epsilon: float | Tensor | tuple[float, float] = 0.2,
        clip_value: bool | float | Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        bounds: dict[str, float | Tensor] = {}
        if not isinstance(clip_epsilon, (tuple, list)):
            bounds["clip_epsilon"] = clip_epsilon
            clip_value = clip_epsilon if clip_value is True else clip_value
        elif clip_value is True:
            raise ValueError(f"clip_value=True takes the value of clip_epsilon, but that is a pair: {clip_epsilon}")
        elif len(clip_epsilon) != 2 or clip_epsilon[0] >= 1:
            raise ValueError(f"clip_epsilon is {clip_epsilon}, but must be a number or a pair, its first below 1")
        else:
            bounds["clip_epsilon_low"], bounds["clip_epsilon_high"] = clip_epsilon
        if not all(bound >= 0 for bound in bounds.values()):
            raise ValueError(f"clip_epsilon is {clip_epsilon}, but must not be negative")
        clip_value = None if clip_value is False else clip_value
        super().__init__(actor_network, critic_network, clip_value=clip_value, **kwargs)
        for name, bound in bounds.items():
            self.register_coeff_buffer(name, bound, device=kwargs.get("device"))

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The loss and its metrics (see the class), for data of batch size ``[*B]``."""
        new = self._compare(tensordict)
        # Statistics over all of the batch are found on the way; others beforehand.
        on_the_way = not (self.normalize_advantage_exclude_dims or self.normalize_advantage_over_ranks)
        found = clip_ppo_loss(
            new.log_prob,
            new.old_log_prob,
            new.advantage if on_the_way else self._normalized(new),
            *self.clip_bounds,
            proximal_log_prob=new.proximal_log_prob,
            max_ratio=self.max_importance_ratio,
            mask=new.mask,
            weights=self._priority_weights(new.tensordict, new.log_prob),
            normalize=self.normalize_advantage and on_the_way,
            reduction=self.reduction,
        )
        effective = found.ess
        if new.log_prob.ndim > 2:  # one for each column of the first batch dimension
            with torch.no_grad():
                effective = effective_sample_size(self._log_weights(new)[0], new.mask).squeeze(-1)
        return self._losses(
            new,
            {
                "loss_objective": found.loss.squeeze(-1) if self.reduction == "none" else found.loss,
                "kl_approx": found.kl_approx,
                "clip_fraction": found.clip_fraction,
                "ESS": effective,
                "max_ratio": found.max_ratio,
                "mean_ratio": found.mean_ratio,
            },
        )

    @property
    def clip_bounds(self) -> tuple[Tensor, Tensor]:
        """ε_low and ε_high."""
        if "clip_epsilon" in self._buffers:
            return self.clip_epsilon, self.clip_epsilon
        return self.clip_epsilon_low, self.clip_epsilon_high

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ClipPPOLoss._schedulable_buffers and name not in self._buffers:
            kept = ", ".join(ClipPPOLoss._schedulable_buffers & self._buffers.keys())
            raise AttributeError(f"the clip range of this {type(self).__name__} is kept in {kept}, not in {name}")
        super().__setattr__(name, value)
