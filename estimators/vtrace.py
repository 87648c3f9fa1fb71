"""The V-trace estimator."""

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from ..kernels.checks import Scalar
from ..kernels.vtrace import vtrace
from ..kernels.vtrace_problem import check_thresholds
from .base import ValueEstimatorBase, as_hyperparameter
from .calls import distribution
from .functional import log_ratio
from .heads import DistributionHeads, one_or_list
from .modules import check_distribution, keys_read
from .registry import ValueEstimators, register_value_estimator
from .steps import Steps, standardize, valid_only, without_padding
from .variants import BothValuesEstimatorBase


@register_value_estimator(ValueEstimators.VTrace, default_kwargs={"gamma": 0.99, "differentiable": True})
class VTrace(BothValuesEstimatorBase):
    r"""V-trace: value target and advantage for a policy π, from steps in which an older policy μ acted.

    .. math::
        \text{target}_t - v_t &= ρ_t (r_t + γ(1 - \text{term}_t) v'_t - v_t)
            + γ c_t (1 - \text{done}_t) (\text{target}_{t+1} - v_{t+1}) \\
        A_t &= ρ_t (r_t + γ\, \text{target}_{t+1} - v_t), \qquad
        ρ_t = \min\left(\bar ρ, \frac{π(a_t|s_t)}{μ(a_t|s_t)}\right), \quad
        c_t = \min\left(\bar c, \frac{π(a_t|s_t)}{μ(a_t|s_t)}\right)

    where in the advantage target_{t+1} is (1−term_t)v'_t if the trajectory ends at t. log π is that of the action in
    the data, under ``actor_network``'s distribution; log μ is read from the data. To both no gradient is given: the
    weights are constants.

    Args:
        gamma: discount γ, see `ValueEstimatorBase`.
        actor_network: π, a ``ProbabilisticTensorDictSequential``; its action can have several heads. The names of
            action and log-probability are its own, unless `set_keys` says otherwise (``action``,
            ``sample_log_prob``; a list for several heads).
        rho_thresh: ρ̄, the largest weight of a step's error.
        c_thresh: c̄, the largest weight of what follows a step.
        average_adv: standardise the advantages over the batch.
        kwargs: the arguments of `ValueEstimatorBase`.

    Raises:
        TypeError: ``actor_network`` has no distribution, when constructed.
        ValueError: a threshold is a negative number, when constructed.
        KeyError, RuntimeError: see `ValueEstimatorBase`.

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
        >>> actor = ProbabilisticTensorDictSequential(
        ...     TensorDictModule(torch.nn.Linear(3, 2), ["obs"], ["logits"]),
        ...     ProbabilisticTensorDictModule(
        ...         ["logits"], ["action"], distribution_class=torch.distributions.Categorical, return_log_prob=True
        ...     ),
        ... )
        >>> value_network = TensorDictModule(torch.nn.Linear(3, 1), in_keys=["obs"], out_keys=["state_value"])
        >>> estimator = VTrace(gamma=0.99, actor_network=actor, value_network=value_network)
        >>> rollout = actor(TensorDict({"obs": torch.randn(2, 8, 3)}, [2, 8]))
        >>> done = torch.zeros(2, 8, 1, dtype=torch.bool)
        >>> rollout["next"] = {"obs": torch.randn(2, 8, 3), "reward": torch.randn(2, 8, 1), "done": done}
        >>> estimator(rollout)["advantage"].shape
        torch.Size([2, 8, 1])

    Espeholt et al. 2018 (arXiv:1802.01561).

    """

    @dataclass
    class _AcceptedKeys(ValueEstimatorBase._AcceptedKeys):
        """Keys that `set_keys` can rename; reward, done and terminated are read under ``"next"``."""

        action: NestedKey | list[NestedKey] = "action"

    default_keys = _AcceptedKeys

    def __init__(
        self,
        *,
        gamma: Scalar,
        actor_network: Any,
        rho_thresh: Scalar = 1.0,
        c_thresh: Scalar = 1.0,
        average_adv: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(gamma=gamma, **kwargs)
        check_distribution(actor_network, "VTrace")
        check_thresholds(rho_thresh, c_thresh)
        for name, threshold in (("rho_thresh", rho_thresh), ("c_thresh", c_thresh)):
            self.register_buffer(name, as_hyperparameter(name, threshold, self.gamma.device))
        self.actor_network = actor_network
        self.average_adv = average_adv
        self.set_keys(
            action=one_or_list(actor_network.dist_sample_keys), sample_log_prob=one_or_list(actor_network.log_prob_keys)
        )

    @classmethod
    def for_loss(cls, loss_module: Any, **hyperparams: Any) -> ValueEstimatorBase:
        """An estimator with the critic and the actor_network of ``loss_module``."""
        hyperparams.setdefault("actor_network", getattr(loss_module, "actor_network", None))
        return super().for_loss(loss_module, **hyperparams)

    def _find_in_keys(self) -> list[NestedKey]:
        of_actor = [*keys_read(self.actor_network), *self._keys("action"), *self._keys("sample_log_prob")]
        return [*super()._find_in_keys(), *of_actor]

    def _keys(self, name: str) -> list[NestedKey]:
        key = getattr(self._tensor_keys, name)
        return key if isinstance(key, list) else [key]

    def _steps(self, tensordict: TensorDictBase, time_dim: int) -> Steps:
        steps = super()._steps(tensordict, time_dim)
        (log_weight,) = valid_only(steps, self._log_weight(tensordict, steps))
        return steps._replace(log_weight=log_weight)

    @torch.no_grad()
    def _log_weight(self, tensordict: TensorDictBase, steps: Steps) -> Tensor:
        """log π(a|s) − log μ(a|s) of the actions in the data."""
        for name in ("action", "sample_log_prob"):
            for key in self._keys(name):
                self._get(tensordict, key, name)
        inputs = self.actor_network.in_keys
        data = without_padding(tensordict.select(*inputs, strict=False), steps, inputs)
        try:
            dist = distribution(self.actor_network, data)
        except KeyError as error:
            for key in keys_read(self.actor_network):
                if tensordict.get(key, None) is None:
                    raise self._missing(key, None, "the actor network") from error
            raise
        heads = DistributionHeads(dist, self._keys("action")[0], max(steps.reward.ndim - 1, tensordict.ndim))
        log_pi = heads.log_prob(tensordict)
        log_mu = heads.total([tensordict.get(key) for key in self._keys("sample_log_prob")])
        for key, x in ((self._keys("action")[0], log_pi), (self._keys("sample_log_prob")[0], log_mu)):
            if x.shape != steps.reward.shape:
                raise RuntimeError(
                    f"the log-probability of {key!r} has shape {tuple(x.shape)}, but {self._tensor_keys.reward!r} has "
                    f"shape {tuple(steps.reward.shape)}: both must agree"
                )
        return log_ratio(log_pi, log_mu)

    def _estimate(self, steps: Steps, value: Tensor, next_value: Tensor, time_dim: int) -> tuple[Tensor, Tensor]:
        advantage, value_target = vtrace(
            steps.gamma,
            steps.log_weight,
            None,
            value,
            next_value,
            steps.reward,
            steps.done,
            steps.terminated,
            self.rho_thresh,
            self.c_thresh,
            time_dim=time_dim,
            backend=self.backend,
        )
        return standardize(advantage, steps.valid) if self.average_adv else advantage, value_target
