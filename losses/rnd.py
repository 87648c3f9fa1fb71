"""Random network distillation: the predictor's loss."""

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import dispatch
from torch import Tensor, nn

from ..kernels.dispatch import as_input
from .functional.exploration import distillation_error
from .supervised import SupervisedLoss


class RNDLoss(SupervisedLoss):
    r"""Imitate a frozen random network on the observations met: where that succeeds they are no longer new.

    .. math::
        L = \mathbb{E}_s\left[\frac1F ‖\hat f(x) - f(x)‖^2\right], \qquad
        x = \text{clip}\left(\frac{s - μ}{σ},\ -c,\ c\right)

    in ``loss_predictor``; x = s without statistics. Padded steps (`LossModule.loss_mask_key`) don't count. Observations
    are cast to the dtype of the predictor's parameters.

    Args:
        predictor_network: :math:`\hat f`, an ``nn.Module`` from a tensor of observations to features ``[*B, F]``.
        target_network: f, of the same kind. Its parameters are frozen.
        obs_rms: running statistics of the observations, an ``nn.Module`` with a method ``normalize`` (such as that of
            TorchRL's ``RNDTransform``).
        obs_clip: c; only with ``obs_rms``.
        reduction: ``"mean"`` (None), ``"sum"``, or ``"none"``: of shape ``[*B]``.
        update_fraction: the share of the samples that count, drawn anew for each call.

    Raises:
        ValueError: an argument that can't be used.
        KeyError: on call, the observation is missing.
        RuntimeError: on call, the networks' features have different shapes.

    Examples:
        >>> loss = RNDLoss(nn.Linear(4, 3), nn.Linear(4, 3), update_fraction=0.5)
        >>> data = TensorDict({"next": {"observation": torch.randn(8, 4)}}, [8])
        >>> loss(data)["loss_predictor"].shape
        torch.Size([])

    See Burda et al. 2018, Exploration by random network distillation (arXiv:1810.12894).

    """

    @dataclass
    class _AcceptedKeys:
        """The observation that is judged."""

        observation: NestedKey = ("next", "observation")

    _data_keys = ("observation",)

    def __init__(
        self,
        predictor_network: nn.Module,
        target_network: nn.Module,
        *,
        obs_rms: Any = None,
        obs_clip: float = 5.0,
        reduction: str | None = "mean",
        update_fraction: float = 0.25,
    ) -> None:
        super().__init__(reduction)
        if not 0 <= update_fraction <= 1:
            raise ValueError(f"update_fraction must be between 0 and 1, but is {update_fraction}")
        self.predictor_network = predictor_network
        for parameter in target_network.parameters():
            parameter.requires_grad = False  # not with requires_grad_, which a lazy network refuses
        self.target_network = target_network
        self.obs_rms = obs_rms
        self.obs_clip = obs_clip
        self.update_fraction = update_fraction
        self.out_keys = ["loss_predictor"]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The loss (see the class), for data of batch size ``[*B]``."""
        x = self._normalized(self._get(self._read(tensordict, "observation"), "observation"))
        with torch.no_grad():
            target = self.target_network(x)
        prediction = self.predictor_network(x)
        self._require_shape(prediction, "the predictor's features", target, "the target's")
        loss = distillation_error(prediction, target)
        mask = self._mask(tensordict, loss)
        if self.update_fraction < 1:
            drawn = torch.rand(loss.shape, device=loss.device) < self.update_fraction
            mask = drawn if mask is None else drawn & mask
        return TensorDict({"loss_predictor": self._reduce_loss(loss, tensordict, mask=mask)})

    def _normalized(self, observation: Tensor) -> Tensor:
        if self.obs_rms is not None:
            bound = as_input(self.obs_clip, observation)
            observation = self.obs_rms.normalize(observation).clamp(-bound, bound)
        parameter = next(self.predictor_network.parameters(), None)
        return observation if parameter is None else observation.to(parameter.dtype)
