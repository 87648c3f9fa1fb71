"""Distributional deep Q-learning (C51)."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import dispatch
from torch import Tensor, nn

from ..estimators.base import as_hyperparameter
from ..estimators.registry import resolved
from ..kernels import categorical_q_loss
from ..kernels.backend import check_backend
from ..kernels.categorical_problem import check_evenly_spaced
from .q_learning import QLearningLoss
from .reduction import align
from .utils import ValueEstimators


class DistributionalDQNLoss(QLearningLoss):
    r"""Q-learning of the distribution of returns over a fixed support.

    .. math::
        L = -\sum_i m_i \log p_i(s_t, a_t), \qquad
        m = Φ\left[r_t + γ(1 - \text{term}_t)\, z,\ p_\text{target}(s_{t+1}, a^*)\right], \qquad
        a^* = \arg\max_a \sum_j z_j\, p'_j(s_{t+1}, a)

    with the support z, the projection :math:`Φ` onto it (`fusedrl.kernels.categorical_projection`), and p' = p for
    double Q-learning, else p_target. It is in ``loss``; the cross-entropy of each sample is written to the input as
    ``td_error``, shape ``[*B, 1]``, for a prioritised replay buffer. An entry ``steps_to_next_obs`` is the n of n-step
    data: γⁿ for γ.

    From the network's outputs to the loss it is one operator (`fusedrl.kernels.categorical_q_loss`).

    Args:
        value_network: a TensorDictModule that writes log-probabilities as ``action_value``, shape
            ``[*B, atoms, actions]``; or a plain module that makes them of the entry ``observation``. It, or a module in
            it, has the attributes ``support``, increasing and of uniform spacing, shape ``[atoms]``, and
            ``action_space``, ``"one-hot"`` or ``"categorical"`` (or a spec of one of these).
        gamma: γ. It can be assigned, as a schedule does.
        delay_value: keep target parameters of the network; otherwise p_target is p itself, without gradient.
        double_dqn: double Q-learning: the network chooses the next action, the target network evaluates it.
        reduction: ``"mean"`` (None), ``"sum"``, or ``"none"``: a loss of shape ``[*B]``.
        use_prioritized_weights: False leaves the importance weights ``priority_weight`` out of account.
        backend: which implementation computes (see `fusedrl.kernels.backend`); None for the block's or process's.

    Raises:
        ValueError: an argument that can't be used, a network without a support, or one that isn't increasing and evenly
            spaced.
        KeyError: on call, an entry is missing; the message says how to rename it.
        RuntimeError: on call, the shapes of log-probabilities, action and reward don't fit.

    Examples:
        >>> class Network(nn.Module):
        ...     action_space = "categorical"
        ...     support = torch.tensor([0.0, 1.0, 2.0])
        ...     def forward(self, observation):
        ...         return observation.unsqueeze(-1).expand(-1, 3, 2).log_softmax(-2)
        >>> loss = DistributionalDQNLoss(Network(), gamma=0.5, delay_value=False)
        >>> column, action, terminated = torch.ones(1, 1), torch.tensor([1]), torch.tensor([[True]])
        >>> data = {"observation": column, "action": action, "next": {"observation": column, "reward": column}}
        >>> data = TensorDict(data, [1]).set(("next", "terminated"), terminated)
        >>> loss(data)["loss"]  # all mass is at 1, the middle one of three atoms that are equally likely
        tensor(1.0986)

    See Bellemare, Dabney & Munos 2017, A distributional perspective on reinforcement learning (arXiv:1707.06887),
    algorithm 1.

    """

    @dataclass
    class _AcceptedKeys:
        action_value: NestedKey = "action_value"
        action: NestedKey = "action"
        priority: NestedKey = "td_error"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        steps_to_next_obs: NestedKey = "steps_to_next_obs"
        priority_weight: NestedKey = "priority_weight"

    SUPPORTED_VALUE_ESTIMATORS: tuple[ValueEstimators, ...] = (ValueEstimators.TD0,)
    _schedulable_buffers = frozenset({"gamma"})
    _one_choice = True

    gamma: Tensor

    def __init__(
        self,
        value_network: nn.Module,
        *,
        gamma: float | Tensor,
        delay_value: bool = True,
        double_dqn: bool = True,
        reduction: str | None = None,
        use_prioritized_weights: bool | str = "auto",
        backend: str | None = None,
    ) -> None:
        super().__init__(
            value_network,
            delay_value=delay_value,
            double_dqn=double_dqn,
            action_space=None,
            reduction=reduction,
            use_prioritized_weights=use_prioritized_weights,
        )
        self._support_owner = _owner_of_support(self.value_network)
        check_evenly_spaced(self.support)
        masks = (getattr(module, "action_mask_key", None) for module in self.value_network.modules())
        self._masks_actions = any(key is not None for key in masks)
        self.backend = check_backend(backend)
        self.register_buffer("gamma", as_hyperparameter("gamma", gamma, self.support.device))

    @property
    def support(self) -> Tensor:
        """z: the atoms that the network spreads the probability of a return over, shape ``[atoms]``."""
        support: Tensor = self.value_network.get_submodule(self._support_owner).support
        return support

    def make_value_estimator(self, value_type: Any = None, **hyperparams: Any) -> "DistributionalDQNLoss":
        """Choose ``gamma``: a distribution of returns is always estimated by one step, TD0.

        Raises:
            NotImplementedError: ``value_type`` is something else.
            TypeError: there is another hyperparameter.

        """
        named = resolved(value_type) if isinstance(value_type, str | Enum) else value_type
        if named not in (None, ValueEstimators.TD0):
            raise NotImplementedError(
                f"DistributionalDQNLoss doesn't support {value_type!r}, only ValueEstimators.TD0 and its gamma"
            )
        unknown = hyperparams.keys() - {"gamma", "differentiable"}  # the target is a constant, differentiable or not
        if unknown:
            raise TypeError(f"DistributionalDQNLoss has the hyperparameter gamma, but got {', '.join(sorted(unknown))}")
        if "gamma" in hyperparams:
            self.gamma = as_hyperparameter("gamma", hyperparams["gamma"], self.gamma.device)
        return self

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The loss (see the class), for data of batch size ``[*B]``."""
        log_prob, next_log_prob, next_online_log_prob = self._action_values(tensordict, "atoms", "actions")
        if self._masks_actions:
            next_log_prob = _worst_where_masked(next_log_prob)
            if next_online_log_prob is not None:
                next_online_log_prob = _worst_where_masked(next_online_log_prob)
        reward, terminated, discount = self._bellman(tensordict)
        per_sample, priority = categorical_q_loss(
            log_prob,
            self._actions.index(log_prob[..., 0, :], self._taken_action(tensordict)),
            next_log_prob,
            self.support,
            reward,
            terminated,
            discount,
            next_online_log_prob=next_online_log_prob,
            backend=self.backend,
        )
        loss = self._reduce_loss(per_sample, tensordict)
        self._write_priority(tensordict, priority.unsqueeze(-1))
        return TensorDict({"loss": loss})

    def _bellman(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor, Tensor]:
        """Reward and terminated, shape ``[*B]``, and γ, or γⁿ of that shape for n-step data."""
        reward = self._get(tensordict, "reward")
        terminated, key = self._terminated(tensordict)
        self._require_shape(terminated, key, reward, self._keys("reward")[0])
        reward = reward.squeeze(-1)
        valid = self._mask(tensordict, reward)
        if valid is not None:  # a NaN there would make the gradient of a loss that doesn't count NaN, as 0 · NaN
            reward = torch.where(valid, reward, 0)
        key = self.tensor_keys.steps_to_next_obs
        steps = tensordict.get(key, None)
        discount = self.gamma if steps is None else self.gamma ** align(steps, reward, f"{key!r}")
        return reward, terminated.squeeze(-1), discount


def _worst_where_masked(log_prob: Tensor) -> Tensor:
    """``log_prob`` with all mass of a masked action at the least return; TorchRL leaves it none, and so the value 0."""
    masked = (log_prob <= torch.finfo(log_prob.dtype).min).all(-2, keepdim=True)
    first, rest = log_prob[..., :1, :], log_prob[..., 1:, :]
    return torch.cat([first.masked_fill(masked, 0.0), rest.masked_fill(masked, -torch.inf)], -2)


def _owner_of_support(network: nn.Module) -> str:
    """The name of the module in ``network`` that has the support, the outermost one.

    Raises:
        ValueError: none has.

    """
    for name, module in network.named_modules():
        if isinstance(getattr(module, "support", None), Tensor):
            return name
    raise ValueError(
        "DistributionalDQNLoss needs the support of the distributions, as an attribute 'support' of the network or of "
        "a module in it"
    )
