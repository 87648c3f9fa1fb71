"""The generalised advantage estimator for a team: one reward for all agents, a value for each."""

from typing import Any

from tensordict import TensorDictBase
from torch import Tensor

from ..kernels.checks import broadcasts
from .gae import GAE
from .registry import ValueEstimators, register_value_estimator
from .steps import Steps, standardize


@register_value_estimator(ValueEstimators.MAGAE, default_kwargs={"gamma": 0.99, "lmbda": 0.95, "differentiable": True})
class MultiAgentGAE(GAE):
    r"""Generalised advantage estimate of each agent, where what the agents share lacks their dimension.

    .. math::
        A_t = r_t + γ(1 - \text{term}_t) v'_t - v_t + γλ(1 - \text{done}_t) A_{t+1}, \qquad
        \text{target}_t = A_t + v_t

    The value network writes values ``[*B, T, agents, 1]``. Reward, done and terminated are ``[*B, T, agents, 1]``
    if they are the agents' own and ``[*B, T, 1]`` if they are the team's, each for itself; the team's are those of
    every agent, as are a γ and λ that broadcast to the team's reward. Advantage and value target have the shape of
    the value.

    Args:
        agent_dim: the dimension of the agents in the value.
        kwargs: the arguments of `GAE`; ``average_gae`` standardises the advantages of each agent by themselves.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> zero = torch.zeros(3, 2, 1)
        >>> following = {"reward": torch.ones(3, 1), "done": torch.zeros(3, 1), "state_value": zero}
        >>> rollout = TensorDict({"state_value": zero, "next": following}, batch_size=[3])
        >>> MultiAgentGAE(gamma=0.5, lmbda=1.0, value_network=None)(rollout)["advantage"].squeeze(-1)
        tensor([[1.7500, 1.7500],
                [1.5000, 1.5000],
                [1.0000, 1.0000]])

    Yu et al. 2022, The surprising effectiveness of PPO in cooperative multi-agent games (arXiv:2103.01955).

    """

    def __init__(self, *, agent_dim: int = -2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.agent_dim = agent_dim

    def _signals(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor, Tensor]:
        reward, done, terminated = super()._signals(tensordict)
        widest = reward if reward.ndim >= done.ndim else done
        widest = widest if widest.ndim >= terminated.ndim else terminated
        return self._of_each(reward, widest), self._of_each(done, widest), self._of_each(terminated, widest)

    def _per_value(self, steps: Steps, value: Tensor) -> Steps:
        if not self._is_shared(steps.reward, value):
            return steps
        return Steps._make(self._of_team(x, steps.reward, value) for x in steps)

    def _averaged(self, advantage: Tensor, steps: Steps) -> Tensor:
        return standardize(advantage, steps.valid, own=self.agent_dim)

    def _of_each(self, x: Tensor, like: Tensor) -> Tensor:
        return self._with_agents(x, like) if self._is_shared(x, like) else x

    def _of_team(self, x: Any, reward: Tensor, value: Tensor) -> Any:
        """``x`` for each agent, if it is the team's: γ and λ are if they broadcast to the team's ``reward``."""
        if not isinstance(x, Tensor) or x.ndim == 0 or not broadcasts(x.shape, reward.shape):
            return x
        return self._with_agents(x.expand_as(reward), value)

    def _is_shared(self, x: Tensor, like: Tensor) -> bool:
        """Whether ``x`` has the shape of ``like`` without the agents."""
        if not -like.ndim <= self.agent_dim < like.ndim:
            return False
        dim = self.agent_dim % like.ndim
        return x.shape == like.shape[:dim] + like.shape[dim + 1 :]

    def _with_agents(self, x: Tensor, like: Tensor) -> Tensor:
        """``x`` for each agent of ``like``."""
        dim = self.agent_dim % like.ndim
        return x.unsqueeze(dim).expand(*x.shape[:dim], like.shape[dim], *x.shape[dim:])
