"""DreamerV3's world model: discrete latents, and observations and rewards of any scale."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor
from torch.nn import functional as F

from ..estimators.modules import device_of
from ..estimators.precision import FullPrecisionBuffers
from .dreamer_base import ModelLoss
from .functional.categorical_kl import balanced_divergence, divergence_terms
from .functional.discrete_regression import symexp_bins, symlog, two_hot_cross_entropy
from .functional.imagination import over_features, wide
from .utils import distance_loss

KL_MODES = ("balanced", "separate")
RECO_LOSSES = ("l1", "l2")


class DreamerV3ModelLoss(FullPrecisionBuffers, ModelLoss):
    r"""Loss of a world model with discrete latents: what it predicts, and how predictable its latents are.

    .. math::
        L = λ_{kl} L_{kl} + λ_{reco} \sum_i d(\text{symlog}\,\hat o_i, \text{symlog}\,o_i)
        + λ_{reward} L_{reward} + λ_{continue} L_{continue}

    ===========================  ====================================================================================
    ``loss_model_reco``          reconstructions, one or several, over whose features d is summed
    ``loss_model_reward``        `two_hot_cross_entropy` on `symexp_bins`, or (symlog r̂ − symlog r)²
    ``loss_model_kl``            `categorical_kl_balanced`; in the mode "separate" instead of it
    ``loss_model_dynamic``,      the two of `categorical_kl_terms`, weighted by λ_dynamic and λ_representation besides
    ``loss_model_representation``
    ``loss_model_continue``      cross-entropy of the prediction that the episode goes on, if λ_continue isn't zero
    ===========================  ====================================================================================

    Each has shape ``[1]``. The data that comes with them is the input with what the world model wrote; the reward of
    the input is in it as ``true_reward``. All keys are read under "next".

    Args:
        world_model: reads the sequences and writes logits of prior and posterior, shape ``[*B, C, K]`` (C variables
            of K classes), the reconstructions, the reward, and the logit of going on.
        lambda_kl: λ_kl.
        lambda_reco: λ_reco.
        lambda_reward: λ_reward.
        lambda_continue: λ_continue.
        kl_mode: ``"balanced"`` or ``"separate"``.
        lambda_dynamic: λ_dynamic, of the divergence that trains the prior.
        lambda_representation: λ_representation, of the divergence that trains the posterior.
        unimix: the share of a uniform distribution that is mixed into prior and posterior, in both modes.
        continue_target_scale: the target where the episode goes on, such as 1 − 1/333; where it terminates it is 0.
        kl_alpha: the prior's share of the gradient of the balanced divergence.
        free_bits: free nats, of each variable ("balanced") or of their sum ("separate").
        reco_loss: d: ``"l2"``, the square, or ``"l1"``.
        reco_symlog: whether observations are compared as symlogs; a list says it for each. Where they aren't, integers
            are taken for pixels, and divided by 255.
        reward_two_hot: the reward is predicted as logits on the support (``reward_logits`` if the model writes it,
            else ``reward``), otherwise as a number.
        num_reward_bins: the size of the support.
        global_average: average over the features of an observation, instead of summing over them.
        detach_output: detach the data. The losses of DreamerV3 need its gradients, see `DreamerV3Loss`.
        reduction: ``"mean"`` (None), ``"sum"``, or ``"none"``: losses of shape ``[*B]``, one for each step.

    Raises:
        ValueError: an argument has none of its values; on call, the numbers of ``pixels``, ``reco_pixels`` and
            ``reco_symlog`` differ, or that of the bins from that of the logits.
        KeyError: on call, an entry is missing from the input, or isn't written by the world model.
        RuntimeError: on call, what is predicted has another shape than what was seen.

    Examples:
        >>> from tensordict import TensorDict
        >>> latents = torch.zeros(4, 2, 3)
        >>> model = TensorDictModule(
        ...     lambda x: (latents, latents, x + 1, 0 * x[..., :1]),
        ...     [("next", "pixels")],
        ...     [("next", key) for key in ("prior_logits", "posterior_logits", "reco_pixels", "reward")],
        ... )
        >>> data = TensorDict({"next": {"pixels": torch.zeros(4, 2), "reward": torch.zeros(4, 1)}}, [4])
        >>> losses, _ = DreamerV3ModelLoss(model, reward_two_hot=False)(data)
        >>> losses["loss_model_kl"], losses["loss_model_reco"]
        (tensor([1.]), tensor([0.9609]))

    See Hafner et al. 2023, Mastering diverse domains through world models (arXiv:2301.04104), on world model learning
    and robust predictions.

    """

    @dataclass
    class _AcceptedKeys:
        """The entries read, all under "next". ``pixels`` and ``reco_pixels`` can be lists of as many keys."""

        reward: NestedKey = "reward"
        reward_logits: NestedKey = "reward_logits"
        true_reward: NestedKey = "true_reward"
        prior_logits: NestedKey = "prior_logits"
        posterior_logits: NestedKey = "posterior_logits"
        pixels: NestedKey | list[NestedKey] = "pixels"
        reco_pixels: NestedKey | list[NestedKey] = "reco_pixels"
        continue_pred: NestedKey = "continue_pred"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"

    reward_bins: Tensor

    def __init__(
        self,
        world_model: TensorDictModule,
        *,
        lambda_kl: float = 1.0,
        lambda_reco: float = 1.0,
        lambda_reward: float = 1.0,
        lambda_continue: float = 0.0,
        kl_mode: str = "balanced",
        lambda_dynamic: float = 1.0,
        lambda_representation: float = 0.1,
        unimix: float = 0.0,
        continue_target_scale: float = 1.0,
        kl_alpha: float = 0.8,
        free_bits: float = 1.0,
        reco_loss: str = "l2",
        reco_symlog: bool | list[bool] = True,
        reward_two_hot: bool = True,
        num_reward_bins: int = 255,
        global_average: bool = False,
        detach_output: bool = True,
        reduction: str | None = None,
    ) -> None:
        for name, value, options in (("kl_mode", kl_mode, KL_MODES), ("reco_loss", reco_loss, RECO_LOSSES)):
            if value not in options:
                raise ValueError(f"{name} is {value!r}; it can be {', '.join(map(repr, options))}")
        for name, share in (("unimix", unimix), ("kl_alpha", kl_alpha)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be between 0 and 1, but is {share}")
        if not 0 < continue_target_scale <= 1:
            raise ValueError(f"continue_target_scale must be above 0 and at most 1, but is {continue_target_scale}")
        super().__init__(world_model, reduction)
        self.lambda_kl = lambda_kl
        self.lambda_reco = lambda_reco
        self.lambda_reward = lambda_reward
        self.lambda_continue = lambda_continue
        self.kl_mode = kl_mode
        self.lambda_dynamic = lambda_dynamic
        self.lambda_representation = lambda_representation
        self.unimix = unimix
        self.continue_target_scale = continue_target_scale
        self.kl_alpha = kl_alpha
        self.free_bits = free_bits
        self.reco_loss = reco_loss
        self.reco_symlog = reco_symlog
        self.reward_two_hot = reward_two_hot
        self.global_average = global_average
        self.detach_output = detach_output
        self.register_buffer("reward_bins", symexp_bins(num_reward_bins).to(device_of(world_model)))
        divergences = ["kl"] if kl_mode == "balanced" else ["dynamic", "representation"]
        terms = ["reco", "reward", *divergences, *(["continue"] if lambda_continue else [])]
        self.out_keys = [f"loss_model_{term}" for term in terms]

    def _find_in_keys(self) -> Iterator[NestedKey]:
        yield from super()._find_in_keys()
        if self.lambda_continue:
            yield from (*self._keys("done"), *self._keys("terminated"))

    def _losses(self, tensordict: TensorDictBase) -> tuple[TensorDictBase, dict[str, Tensor]]:
        heads = self._heads()
        ends = self._ends(tensordict) if self.lambda_continue else None
        data = self._modelled(tensordict)
        losses = {
            "loss_model_reco": self.lambda_reco * self._reduced(self._reconstruction(data, heads), data),
            "loss_model_reward": self.lambda_reward * self._reduced(self._reward(data), data),
        }
        losses |= {name: self.lambda_kl * self._reduced(kl, data) for name, kl in self._divergences(data).items()}
        if ends is not None:
            continues = self._reduced(self._continues(data, ends), data)
            losses["loss_model_continue"] = self.lambda_continue * continues
        return data, losses

    def _heads(self) -> list[tuple[NestedKey, NestedKey, bool]]:
        """For each observation where it is, where its reconstruction is, and whether symlogs are compared."""
        seen, predicted = self._keys("pixels"), self._keys("reco_pixels")
        squashed = self.reco_symlog if isinstance(self.reco_symlog, list) else [self.reco_symlog] * len(seen)
        if not len(seen) == len(predicted) == len(squashed) or not seen:
            raise ValueError(
                f"pixels, reco_pixels and reco_symlog must be as many, at least one, but are {len(seen)}, "
                f"{len(predicted)} and {len(squashed)}"
            )
        return list(zip(seen, predicted, squashed, strict=True))

    def _reconstruction(self, data: TensorDictBase, heads: list[tuple[NestedKey, NestedKey, bool]]) -> Tensor:
        self._require(data, "reco_pixels")
        distances = []
        for seen, predicted, squashed in heads:
            target, prediction = data.get(seen), data.get(predicted)
            self._require_shape(prediction, predicted, target, seen)
            is_image = not target.is_floating_point() and not squashed
            prediction = wide(prediction)
            target = target.to(prediction.dtype) / (255 if is_image else 1)
            if squashed:
                target, prediction = symlog(target), symlog(prediction)
            distance = distance_loss(prediction, target, self.reco_loss)
            distances.append(over_features(distance, data.ndim, self.global_average))
        return torch.stack(distances).sum(0)

    def _reward(self, data: TensorDictBase) -> Tensor:
        reward = self._get(data, "true_reward")
        if self.reward_two_hot:
            named = "reward_logits" if data.get(*self._keys("reward_logits"), None) is not None else "reward"
            logits = self._get(data, named)
            if reward.shape not in (logits.shape[:-1], (*logits.shape[:-1], 1)):
                raise RuntimeError(
                    f"{type(self).__name__}: {self._keys('true_reward')[0]!r} has shape {tuple(reward.shape)}, but "
                    f"{self._keys(named)[0]!r} has shape {tuple(logits.shape)}: one reward for each distribution"
                )
            return two_hot_cross_entropy(logits, reward, self.reward_bins)
        prediction = self._get(data, "reward")
        self._require_alike(data, "reward", "true_reward")
        prediction = wide(prediction)
        return over_features((symlog(prediction) - symlog(reward.to(prediction.dtype))).square(), data.ndim, True)

    def _divergences(self, data: TensorDictBase) -> dict[str, Tensor]:
        posterior, prior = self._get(data, "posterior_logits"), self._get(data, "prior_logits")
        self._require_alike(data, "posterior_logits", "prior_logits")
        if self.kl_mode == "balanced":
            return {"loss_model_kl": balanced_divergence(posterior, prior, self.kl_alpha, self.free_bits, self.unimix)}
        dynamic, representation = divergence_terms(posterior, prior, self.free_bits, self.unimix)
        return {
            "loss_model_dynamic": self.lambda_dynamic * dynamic,
            "loss_model_representation": self.lambda_representation * representation,
        }

    def _ends(self, tensordict: TensorDictBase) -> Tensor:
        """Whether the episode ends with each step, by termination if that is known."""
        terminated, _ = self._terminated(tensordict)
        return terminated != 0

    def _continues(self, data: TensorDictBase, ends: Tensor) -> Tensor:
        prediction = self._get(data, "continue_pred")
        self._require_shape(prediction, self._keys("continue_pred")[0], ends, self._keys("terminated")[0])
        prediction = wide(prediction)
        target = self.continue_target_scale * (~ends).to(prediction.dtype)
        loss = F.binary_cross_entropy_with_logits(prediction, target, reduction="none")
        return over_features(loss, data.ndim, average=True)
