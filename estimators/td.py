"""Estimators whose advantage is a TD return minus the value: TD(0), TD(1), TD(λ)."""

from typing import Any

from tensordict import TensorDictBase
from torch import Tensor

from ..kernels.checks import Scalar
from .base import ValueEstimatorBase
from .functional import td0_return_estimate, vec_td1_return_estimate, vec_td_lambda_return_estimate
from .registry import ValueEstimators, register_value_estimator
from .steps import Steps
from .variants import LambdaEstimatorBase


@register_value_estimator(ValueEstimators.TD0, default_kwargs={"gamma": 0.99, "differentiable": True})
class TD0Estimator(ValueEstimatorBase):
    r"""One-step estimate.

    .. math::
        \text{target}_t = r_t + γ(1 - \text{term}_t) v'_t, \qquad A_t = \text{target}_t - v_t

    Its constructor is that of `ValueEstimatorBase`. A backend has nothing to compute here: its choice counts for
    losses, which make the target in one operation with what it is made of.

    See Sutton 1988, Learning to predict by the methods of temporal differences (doi.org/10.1007/BF00115009).

    """

    needs_done = False

    def __init__(self, *, gamma: Scalar, **kwargs: Any) -> None:
        super().__init__(gamma=gamma, **kwargs)

    def one_step(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor, Tensor]:
        """Reward, terminated and the discount γ (or γⁿ of n-step data): all that the estimate asks of a step.

        Raises:
            KeyError: an entry is missing.
            RuntimeError: their shapes differ.

        """
        reward, _, terminated = self._signals(tensordict)
        self._check_mask(self._tensor_keys.terminated, terminated, reward)
        return reward, terminated, self._discount(tensordict, reward)

    def _value_target(self, steps: Steps, next_value: Tensor, time_dim: int) -> Tensor:
        return td0_return_estimate(steps.gamma, next_value, steps.reward, steps.terminated)


@register_value_estimator(ValueEstimators.TD1, default_kwargs={"gamma": 0.99, "differentiable": True})
class TD1Estimator(ValueEstimatorBase):
    r"""Estimate from all rewards up to the end of the trajectory, and the value there (`vec_td1_return_estimate`).

    .. math::
        \text{target}_t = r_t + γ(1 - \text{term}_t)\, \text{target}_{t+1}, \qquad A_t = \text{target}_t - v_t

    with v'_t for target_{t+1} where the trajectory ends at t, as at the last step of the data. Its constructor is that
    of `ValueEstimatorBase`.

    See Sutton & Barto 2018, Reinforcement learning, section 12.1.

    """

    def __init__(self, *, gamma: Scalar, **kwargs: Any) -> None:
        super().__init__(gamma=gamma, **kwargs)

    def _value_target(self, steps: Steps, next_value: Tensor, time_dim: int) -> Tensor:
        return vec_td1_return_estimate(
            steps.gamma,
            next_value,
            steps.reward,
            steps.done,
            steps.terminated,
            time_dim=time_dim,
            backend=self.backend,
        )


@register_value_estimator(
    ValueEstimators.TDLambda, default_kwargs={"gamma": 0.99, "lmbda": 0.95, "differentiable": True}
)
class TDLambdaEstimator(LambdaEstimatorBase):
    r"""TD(λ) estimate (`vec_td_lambda_return_estimate`).

    .. math::
        \text{target}_t = r_t + γ(1 - \text{term}_t)\left[(1 - λ) v'_t + λ\, \text{target}_{t+1}\right], \qquad
        A_t = \text{target}_t - v_t

    with v'_t for target_{t+1} where the trajectory ends at t, as at the last step of the data. Its constructor is that
    of `LambdaEstimatorBase`.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> zero = torch.zeros(3, 1)
        >>> step = {"reward": torch.ones(3, 1), "done": zero.bool(), "state_value": torch.tensor([[0.0], [0.0], [8.0]])}
        >>> rollout = TensorDict({"state_value": zero, "next": step}, batch_size=[3])
        >>> TDLambdaEstimator(gamma=0.5, lmbda=1.0, value_network=None)(rollout)["value_target"].flatten()
        tensor([2.7500, 3.5000, 5.0000])

    See Sutton & Barto 2018, Reinforcement learning, equation 12.18.

    """

    def _value_target(self, steps: Steps, next_value: Tensor, time_dim: int) -> Tensor:
        return vec_td_lambda_return_estimate(
            steps.gamma,
            steps.lmbda,
            next_value,
            steps.reward,
            steps.done,
            steps.terminated,
            time_dim=time_dim,
            backend=self.backend,
        )


# The names that these had in older versions of TorchRL.
TD0Estimate = TD0Estimator
TD1Estimate = TD1Estimator
TDLambdaEstimate = TDLambdaEstimator
