"""The cost of PILCO's policy search."""

import copy
from dataclasses import dataclass

from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import dispatch
from torch import Tensor

from .functional.policy_search import saturating_cost
from .supervised import SupervisedLoss


class ExponentialQuadraticCost(SupervisedLoss):
    r"""Expected saturating cost of states that are known up to a Gaussian.

    .. math::
        L = \mathbb{E}_x\left[1 - \exp\left(-\tfrac12 (x - x^*)^\top W (x - x^*)\right)\right],
        \qquad x \sim \mathcal{N}(m, S)

    in closed form and differentiable, in ``loss_cost`` (``set_keys(loss_cost=...)`` renames it). m is read at
    ``("observation", "mean")``, shape ``[*B, F]``, and S at ``("observation", "var")``, shape ``[*B, F, F]``. Padded
    steps (`LossModule.loss_mask_key`) don't count.

    Args:
        target: x*, shape ``[F]``. None: the origin.
        weights: W, positive semidefinite, shape ``[F, F]``. None: the identity.
        reduction: ``"mean"`` (None), ``"sum"``, or ``"none"``: of shape ``[*B]``.

    Raises:
        ValueError: an argument that can't be used.
        KeyError: on call, an entry is missing; the message says how to rename it.
        RuntimeError: on call, the shapes of mean, covariance, target and weights don't fit.

    Examples:
        >>> import torch
        >>> cost = ExponentialQuadraticCost(target=torch.tensor([1.0]))
        >>> belief = {"mean": torch.ones(1, 1), "var": torch.tensor([[[3.0]]])}
        >>> cost(TensorDict({"observation": belief}, [1]))["loss_cost"]  # 1 - 1 / sqrt(1 + 3)
        tensor(0.5000)

    See Deisenroth & Rasmussen 2011, PILCO: a model-based and data-efficient approach to policy search, ICML,
    equations 24 and 25; Deisenroth et al. 2015, Gaussian processes for data-efficient learning in robotics and control
    (arXiv:1502.02860).

    """

    @dataclass
    class _AcceptedKeys:
        """Mean and covariance of the state, and the name of the loss."""

        loc: NestedKey = ("observation", "mean")
        scale: NestedKey = ("observation", "var")
        loss_cost: NestedKey = "loss_cost"

    _schedulable_buffers = frozenset({"target", "weights"})
    _data_keys = ("loc", "scale")

    target: Tensor | None
    weights: Tensor | None

    def __init__(
        self, target: Tensor | None = None, weights: Tensor | None = None, reduction: str | None = "mean"
    ) -> None:
        super().__init__(reduction)
        for name, value, ndim in (("target", target, 1), ("weights", weights, 2)):
            if value is not None and (value.ndim != ndim or value.shape[0] != value.shape[-1]):
                wanted = "[F]" if ndim == 1 else "[F, F]"
                raise ValueError(f"{name} must have shape {wanted}, but has shape {tuple(value.shape)}")
            self.register_buffer(name, None if value is None else copy.deepcopy(value))  # to assign one writes it
        self.out_keys = [self.tensor_keys.loss_cost]

    def set_keys(self, **keys: NestedKey | list[NestedKey] | None) -> None:
        """Rename entries, that of the cost too; see `LossModule`."""
        super().set_keys(**keys)
        self.out_keys = [self.tensor_keys.loss_cost]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The cost (see the class), for data of batch size ``[*B]``."""
        data = self._read(tensordict, "loc", "scale")
        mean, covariance = self._get(data, "loc"), self._get(data, "scale")
        size = mean.shape[-1]
        shapes = {
            self.tensor_keys.scale: (covariance.shape, (*mean.shape, size)),
            "target": ((size,) if self.target is None else self.target.shape, (size,)),
            "weights": ((size, size) if self.weights is None else self.weights.shape, (size, size)),
        }
        for name, (shape, wanted) in shapes.items():
            if tuple(shape) != tuple(wanted):
                raise RuntimeError(
                    f"ExponentialQuadraticCost: {name!r} has shape {tuple(shape)}, but {self.tensor_keys.loc!r} has "
                    f"shape {tuple(mean.shape)}: {tuple(wanted)} is wanted"
                )
        cost = saturating_cost(mean, covariance, self.target, self.weights)
        return TensorDict({self.tensor_keys.loss_cost: self._reduce_loss(cost, tensordict)})
