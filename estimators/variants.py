"""What some of the estimators have in common beyond their base: the current values in the target, a trace decay λ."""

from typing import Any

from tensordict import TensorDictBase
from torch import Tensor

from .base import Scalar, ValueEstimatorBase, as_hyperparameter
from .steps import Steps


class BothValuesEstimatorBase(ValueEstimatorBase):
    """Base of the estimators whose value target depends on the current values too, not on next values alone."""

    def value_estimate(  # type: ignore[override]  # `params` come second in TorchRL's order
        self,
        tensordict: TensorDictBase,
        params: TensorDictBase | None = None,
        target_params: TensorDictBase | None = None,
        time_dim: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The value target of `forward` alone, with its gradients; ``tensordict`` is left as it is.

        Args are those of `forward`; ``kwargs`` are passed to the value network.
        """
        return self._compute(tensordict, params, target_params, time_dim, **kwargs).value_target


class LambdaEstimatorBase(ValueEstimatorBase):
    """Base of the estimators with a trace decay λ.

    Args:
        gamma: discount γ, see `ValueEstimatorBase`.
        lmbda: trace decay λ, a number or a tensor that broadcasts to the reward; kept as γ is.
        vectorized: False is backend ``"reference"``.
        kwargs: the arguments of `ValueEstimatorBase`.

    """

    def __init__(self, *, gamma: Scalar, lmbda: Scalar, vectorized: bool | None = None, **kwargs: Any) -> None:
        super().__init__(gamma=gamma, **kwargs)
        self.register_buffer("lmbda", as_hyperparameter("lmbda", lmbda, self.gamma.device))
        self._vectorized: bool | None = None
        self.vectorized = vectorized

    @property
    def vectorized(self) -> bool | None:
        """False: the backend is ``"reference"``; set to anything else afterwards, it is the block's or process's."""
        return self._vectorized

    @vectorized.setter
    def vectorized(self, value: bool | None) -> None:
        if value is False:
            if self.backend not in (None, "reference"):
                raise ValueError(f"vectorized=False is backend 'reference', but backend is {self.backend!r}")
            self.backend = "reference"
        elif self._vectorized is False:
            self.backend = None
        self._vectorized = value

    def _steps(self, tensordict: TensorDictBase, time_dim: int) -> Steps:
        return super()._steps(tensordict, time_dim)._replace(lmbda=self.lmbda)
