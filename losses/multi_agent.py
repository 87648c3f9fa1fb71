"""Proximal policy optimisation for teams: MAPPO, whose critic sees the team, and IPPO, whose critic sees an agent."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from tensordict import TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule
from torch import Tensor, nn

from ..estimators.precision import dtypes_kept
from .functional.policy_gradient import fill_padding
from .ppo import ClipPPOLoss
from .utils import ValueEstimators


class ValueNorm(Protocol):
    """Running statistics of value targets, in a `torch.nn.Module`, such as ``torchrl.modules.PopArtValueNorm``."""

    def update(self, value_target: Tensor) -> None:
        """Take a batch of value targets into the statistics."""

    def normalize(self, value_target: Tensor) -> Tensor:
        """What the statistics make of values: mean 0 and standard deviation 1."""


class MAPPOLoss(ClipPPOLoss):
    r"""PPO for a team: a policy of each agent's own observation, a critic of what the team knows.

    .. math::
        L = -\frac{1}{N} \sum_{i=1}^{N} \mathbb{E}_t\left[\min\left(r^i_t \hat A^i_t,\
        \text{clip}(r^i_t,\ 1 - ε,\ 1 + ε) \hat A^i_t\right)\right]
        + c_1 \frac{1}{N} \sum_{i=1}^{N} \mathbb{E}_t\left[d(V^i_t, \hat V^i_t)\right]
        - c_2 \frac{1}{N} \sum_{i=1}^{N} \mathbb{E}_t\left[H[π_θ(\cdot|o^i_t)]\right]

    It is `ClipPPOLoss`, whose arguments, outputs and errors it shares, on samples ``[*B, T, agents]``. Advantages are
    normalised for each agent (Â), and estimated by `fusedrl.estimators.MultiAgentGAE`: the team's reward, done and
    terminated ``[*B, T, 1]`` are those of every agent. Entries of the agents usually have names of their own:
    ``loss.set_keys(value=("agents", "state_value"))``.

    Args:
        actor_network: the policy; observations and actions are ``[*B, T, agents, *]``.
        critic_network: writes values ``[*B, T, agents, 1]``.
        value_norm: running statistics of the value targets (a module with ``update`` and ``normalize``, see
            `ValueNorm`), by which V and V̂ (and V^old, where ``clip_value`` bounds the step from it) are made comparable
            before their distance is taken. Each call updates it with its value targets.
        entropy_coeff: c₂.
        normalize_advantage: shift and scale the advantages to mean 0 and standard deviation 1.
        normalize_advantage_exclude_dims: the dimension of the agents; see `functional.normalize_advantage`.
        kwargs: see `ClipPPOLoss`.

    Raises:
        TypeError: ``value_norm`` is no module that can update and normalize, or there is no critic for it.

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import ProbabilisticTensorDictModule
        >>> actor = ProbabilisticTensorDictSequential(
        ...     TensorDictModule(nn.Linear(4, 2), ["observation"], ["logits"]),
        ...     ProbabilisticTensorDictModule(
        ...         ["logits"], ["action"], distribution_class=torch.distributions.Categorical, return_log_prob=True
        ...     ),
        ... )
        >>> critic = TensorDictModule(nn.Linear(4, 1), ["observation"], ["state_value"])
        >>> following = {"observation": torch.randn(8, 3, 4), "reward": torch.ones(8, 1), "done": torch.zeros(8, 1)}
        >>> data = TensorDict({"observation": torch.randn(8, 3, 4), "next": following}, [8])
        >>> loss = MAPPOLoss(actor, critic)
        >>> loss(actor(data).detach())["loss_objective"].shape
        torch.Size([])

    See Yu et al. 2022, The surprising effectiveness of PPO in cooperative multi-agent games (arXiv:2103.01955).

    """

    default_value_estimator = ValueEstimators.MAGAE

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        critic_network: TensorDictModule | None = None,
        *,
        value_norm: ValueNorm | None = None,
        entropy_coeff: Any = 0.01,
        normalize_advantage: bool = True,
        normalize_advantage_exclude_dims: tuple[int, ...] = (-2,),
        **kwargs: Any,
    ) -> None:
        if value_norm is not None:
            able = isinstance(value_norm, nn.Module) and all(hasattr(value_norm, x) for x in ("update", "normalize"))
            if not able:
                raise TypeError(
                    "value_norm must be a module with the methods update and normalize, but is a "
                    f"{type(value_norm).__name__}"
                )
            if critic_network is None:
                raise TypeError(f"value_norm is a {type(value_norm).__name__}, but there is no critic_network")
        super().__init__(
            actor_network,
            critic_network,
            entropy_coeff=entropy_coeff,
            normalize_advantage=normalize_advantage,
            normalize_advantage_exclude_dims=normalize_advantage_exclude_dims,
            **kwargs,
        )
        self.value_norm = value_norm

    def _critic_values(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor, Tensor | None]:
        value, value_target, old_value = super()._critic_values(tensordict)
        norm = self.value_norm
        if norm is None:
            return value, value_target, old_value
        with torch.no_grad():
            norm.update(fill_padding(value_target, self._mask(tensordict, value_target), tensordict.ndim))
        old_value = None if old_value is None else norm.normalize(old_value)
        return norm.normalize(value), norm.normalize(value_target), old_value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MAPPOLoss":
        """As of the other losses, but statistics keep their dtype: in bfloat16 a running mean stands still."""
        norm: Any = self.value_norm
        with dtypes_kept(*(() if norm is None else norm.modules())):
            super()._apply(fn, recurse)
        return self


class IPPOLoss(MAPPOLoss):
    r"""PPO of independent agents: the critic too sees each agent's own observation alone.

    .. math::
        L = \frac{1}{N} \sum_{i=1}^{N} L^\text{CLIP}\left(π_θ(\cdot|o^i),\ V(o^i)\right)

    with the loss L^CLIP of `ClipPPOLoss`. What tells it from `MAPPOLoss` is the critic that it is given.

    Args:
        actor_network: see `MAPPOLoss`.
        critic_network: see `MAPPOLoss`.
        kwargs: see `MAPPOLoss`.

    Examples:
        See `MAPPOLoss`.

    See de Witt et al. 2020, Is independent learning all you need in the StarCraft multi-agent challenge?
    (arXiv:2011.09533).

    """
