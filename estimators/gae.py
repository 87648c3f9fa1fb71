"""The generalised advantage estimator."""

from typing import Any

import torch
from torch import Tensor

from .functional import vec_generalized_advantage_estimate
from .registry import ValueEstimators, register_value_estimator
from .steps import Steps, standardize
from .variants import BothValuesEstimatorBase, LambdaEstimatorBase


@register_value_estimator(ValueEstimators.GAE, default_kwargs={"gamma": 0.99, "lmbda": 0.95, "differentiable": True})
class GAE(BothValuesEstimatorBase, LambdaEstimatorBase):
    r"""Generalised advantage estimate and value target.

    .. math::
        A_t = r_t + γ(1 - \text{term}_t) v'_t - v_t + γλ(1 - \text{done}_t) A_{t+1}, \qquad
        \text{target}_t = A_t + v_t

    Args:
        average_gae: standardise the advantages over the batch.
        auto_reset_env: the environment resets itself, so that the next observation of a step that ends a trajectory
            belongs to the following one: the step's own value takes the place of its next value.
        kwargs: the arguments of `LambdaEstimatorBase`.

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> value_network = TensorDictModule(torch.nn.Linear(3, 1), in_keys=["obs"], out_keys=["state_value"])
        >>> gae = GAE(gamma=0.99, lmbda=0.95, value_network=value_network)
        >>> done = torch.zeros(2, 8, 1, dtype=torch.bool)
        >>> rollout = TensorDict(
        ...     {
        ...         "obs": torch.randn(2, 8, 3),
        ...         "next": {"obs": torch.randn(2, 8, 3), "reward": torch.randn(2, 8, 1), "done": done},
        ...     },
        ...     batch_size=[2, 8],
        ... )
        >>> gae(rollout)["advantage"].shape
        torch.Size([2, 8, 1])

    Schulman et al. 2016 (arXiv:1506.02438).

    """

    def __init__(self, *, average_gae: bool = False, auto_reset_env: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.average_gae = average_gae
        self.auto_reset_env = auto_reset_env

    def _estimate(self, steps: Steps, value: Tensor, next_value: Tensor, time_dim: int) -> tuple[Tensor, Tensor]:
        if self.auto_reset_env:
            next_value = torch.where(steps.done != 0, value, next_value)
        advantage, value_target = vec_generalized_advantage_estimate(
            steps.gamma,
            steps.lmbda,
            value,
            next_value,
            steps.reward,
            steps.done,
            steps.terminated,
            time_dim=time_dim,
            backend=self.backend,
        )
        return self._averaged(advantage, steps) if self.average_gae else advantage, value_target

    def _averaged(self, advantage: Tensor, steps: Steps) -> Tensor:
        return standardize(advantage, steps.valid)
