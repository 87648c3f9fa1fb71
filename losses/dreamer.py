"""Dreamer: a world model learnt from experience, and a policy and its value learnt in the model's imagination."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import InteractionType, TensorDictModule, set_interaction_type
from torch import Tensor, nn

from ..estimators.base import PADDING_MASK
from ..estimators.modules import keys_read
from ..estimators.steps import any_right, expand_right
from ..kernels.checks import check_positive
from .dreamer_base import DreamerLoss, ModelLoss, held_constant
from .functional.imagination import Scalar, discounted_sum, gaussian_kl, over_features, step_divergence
from .utils import ValueEstimators, check_distance, distance_loss


class DreamerModelLoss(ModelLoss):
    r"""Negative evidence lower bound of a world model: it reconstructs what it saw, from latents that it can predict.

    .. math::
        L = λ_{kl} \max\big(ν, \text{KL}(q(s_t|s_{t-1},a_{t-1},o_t) \| p(s_t|s_{t-1},a_{t-1}))\big)
        + λ_{reco} d(\hat o_t, o_t) + λ_{reward} d(\hat r_t, r_t)

    The three terms are ``loss_model_kl``, ``loss_model_reco`` and ``loss_model_reward``, each of shape ``[1]``. The
    data that comes with them is the input with what the world model wrote; the reward of the input is in it as
    ``true_reward``. All keys are read under "next".

    Args:
        world_model: reads the sequences and writes prior and posterior of the latents, the reconstruction and the
            reward.
        lambda_kl: λ_kl.
        lambda_reco: λ_reco.
        lambda_reward: λ_reward.
        reco_loss: d of observations: ``"l2"`` (None), ``"l1"`` or ``"smooth_l1"``; see `distance_loss`.
        reward_loss: d of rewards, ``"l2"`` (None).
        free_nats: ν.
        delayed_clamp: take the maximum with ν after averaging over the batch, instead of before.
        global_average: average over the features of a step, instead of summing over them. Then each dimension of the
            latents has free nats of its own.
        reduction: ``"mean"`` (None), ``"sum"``, or ``"none"``: losses of shape ``[*B]``, one for each step.

    Raises:
        ValueError: an argument has none of its values.
        KeyError: on call, an entry is missing from the input, or isn't written by the world model.
        RuntimeError: on call, what is predicted has another shape than what was seen.

    Examples:
        >>> from tensordict.nn import TensorDictModule
        >>> model = TensorDictModule(
        ...     lambda x: (x, x.exp(), 0 * x, x.exp() / x.exp(), 0 * x, x[..., :1]),
        ...     [("next", "pixels")],
        ...     [("next", key) for key in ("posterior_mean", "posterior_std", "prior_mean", "prior_std",
        ...      "reco_pixels", "reward")],
        ... )
        >>> zeros, ones = torch.zeros(4, 2), torch.ones(4, 1)
        >>> data = TensorDict({"next": {"pixels": zeros, "reward": ones}}, [4])
        >>> losses, data = DreamerModelLoss(model)(data)
        >>> {name: x.item() for name, x in losses.items()}
        {'loss_model_kl': 3.0, 'loss_model_reco': 0.0, 'loss_model_reward': 1.0}

    See Hafner et al. 2020, Dream to control: learning behaviors by latent imagination (arXiv:1912.01603),
    equation 10, and Hafner et al. 2019 (arXiv:1811.04551) for the model.

    """

    @dataclass
    class _AcceptedKeys:
        """The entries read, all under "next". The world model writes ``reward``, in whose place it then stands."""

        reward: NestedKey = "reward"
        true_reward: NestedKey = "true_reward"
        prior_mean: NestedKey = "prior_mean"
        prior_std: NestedKey = "prior_std"
        posterior_mean: NestedKey = "posterior_mean"
        posterior_std: NestedKey = "posterior_std"
        pixels: NestedKey = "pixels"
        reco_pixels: NestedKey = "reco_pixels"

    out_keys = ["loss_model_kl", "loss_model_reco", "loss_model_reward"]  # noqa: RUF012  # tensordict.nn reads a list
    _alike: ClassVar[dict[str, str]] = {
        "reco_pixels": "pixels",
        "reward": "true_reward",
        "prior_mean": "posterior_mean",
        "prior_std": "posterior_mean",
        "posterior_std": "posterior_mean",
    }
    """The entries that must have the same shape."""

    def __init__(
        self,
        world_model: TensorDictModule,
        *,
        lambda_kl: float = 1.0,
        lambda_reco: float = 1.0,
        lambda_reward: float = 1.0,
        reco_loss: str | None = None,
        reward_loss: str | None = None,
        free_nats: float = 3,
        delayed_clamp: bool = False,
        global_average: bool = False,
        reduction: str | None = None,
    ) -> None:
        super().__init__(world_model, reduction)
        self.lambda_kl = lambda_kl
        self.lambda_reco = lambda_reco
        self.lambda_reward = lambda_reward
        self.reco_loss = check_distance("l2" if reco_loss is None else reco_loss, "reco_loss")
        self.reward_loss = check_distance("l2" if reward_loss is None else reward_loss, "reward_loss")
        self.free_nats = free_nats
        self.delayed_clamp = delayed_clamp
        self.global_average = global_average

    def _losses(self, tensordict: TensorDictBase) -> tuple[TensorDictBase, dict[str, Tensor]]:
        data = self._modelled(tensordict)
        mean, std, prior_mean, prior_std = (
            self._get(data, name) for name in ("posterior_mean", "posterior_std", "prior_mean", "prior_std")
        )
        free_nats = None if self.delayed_clamp else self.free_nats
        kl = step_divergence(
            gaussian_kl(mean, std, prior_mean, prior_std), data.ndim, free_nats, average=self.global_average
        )
        kl = self._reduced(kl, data)
        return data, {
            "loss_model_kl": self.lambda_kl * (kl.clamp_min(self.free_nats) if self.delayed_clamp else kl),
            "loss_model_reco": self.lambda_reco * self._distance(data, "pixels", "reco_pixels", self.reco_loss),
            "loss_model_reward": self.lambda_reward * self._distance(data, "true_reward", "reward", self.reward_loss),
        }

    def _modelled(self, tensordict: TensorDictBase) -> TensorDictBase:
        data = super()._modelled(tensordict)
        reward = self._get(data, "true_reward")
        if reward.ndim > data.ndim + 1:
            raise RuntimeError(
                f"{self.tensor_keys.true_reward!r} has shape {tuple(reward.shape)}, but the batch size is "
                f"{tuple(data.batch_size)}: it must be that of a step, time included"
            )
        for name, of in self._alike.items():
            self._require_alike(data, name, of)
        return data

    def _distance(self, data: TensorDictBase, seen: str, predicted: str, loss_function: str) -> Tensor:
        prediction = self._get(data, predicted)
        distance = distance_loss(self._get(data, seen).to(prediction.dtype), prediction, loss_function)
        return self._reduced(over_features(distance, data.ndim, self.global_average), data)


class DreamerActorLoss(DreamerLoss):
    r"""Negative λ-return of the trajectories that a policy imagines: its gradient goes through the model itself.

    .. math::
        L = -\mathbb{E}\Big[\sum_{t=0}^{H-1} γ^t V_λ(s_t)\Big]

    From each state of the input the policy takes H steps in the model. The loss is ``loss_actor``; the data that
    comes with it are the imagined trajectories, batch size ``[*B, H]``, with their λ-returns as ``lambda_target``:
    what `DreamerValueLoss` learns from. The parameters of the model and of the value are constants here; they get no
    gradient. Where the model says that a trajectory ends (``done`` and ``terminated``), so do its returns.

    Args:
        actor_model: the policy, reads "state" and belief and writes the action.
        value_model: writes the value V.
        model_based_env: a module whose method ``reset(tensordict)`` returns the given states ready to start from, and
            whose ``rollout(max_steps, policy, auto_reset=False, tensordict)`` takes H steps from there, and returns
            them with batch size ``[*B, H]`` and, under "next", the reward and the states they led to.
        imagination_horizon: H.
        discount_loss: weigh the steps with γ^t, γ being that of the value estimator.
        reduction: over the starting states: ``"mean"`` (None), ``"sum"`` or ``"none"``, shape ``[*B]``.

    Raises:
        TypeError: ``model_based_env`` is not a module, ``imagination_horizon`` no integer; ``gamma`` or ``lmbda`` (see
            `make_value_estimator`).
        ValueError: ``imagination_horizon`` is not positive.
        KeyError: on call, an entry is missing.

    See Hafner et al. 2020, Dream to control: learning behaviors by latent imagination (arXiv:1912.01603),
    equations 6 and 7.

    """

    @dataclass
    class _AcceptedKeys:
        """The entries read: ``belief`` of the input, the others (under "next") of what is imagined."""

        belief: NestedKey = "belief"
        reward: NestedKey = "reward"
        value: NestedKey = "state_value"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"

    out_keys = ["loss_actor"]  # noqa: RUF012  # as above
    default_value_estimator = ValueEstimators.TDLambda
    SUPPORTED_VALUE_ESTIMATORS = (ValueEstimators.TD0, ValueEstimators.TD1, ValueEstimators.TDLambda)

    _rollout_options: ClassVar[dict[str, Any]] = {}

    value_model: nn.Module

    def __init__(
        self,
        actor_model: TensorDictModule,
        value_model: TensorDictModule,
        model_based_env: Any,
        *,
        imagination_horizon: int = 15,
        discount_loss: bool = True,
        reduction: str | None = None,
    ) -> None:
        super().__init__(reduction)
        if not isinstance(model_based_env, nn.Module):
            raise TypeError(f"model_based_env must be a module, but is a {type(model_based_env).__name__}")
        check_positive("imagination_horizon", imagination_horizon)
        self.actor_model = actor_model
        self.model_based_env: Any = model_based_env
        self.__dict__["value_model"] = value_model  # the value is trained, moved and saved with the loss of its own
        self.imagination_horizon = imagination_horizon
        self.discount_loss = discount_loss

    def _find_in_keys(self) -> Iterator[NestedKey]:
        yield from ("state", self.tensor_keys.belief)

    def _losses(self, tensordict: TensorDictBase) -> tuple[TensorDictBase, dict[str, Tensor]]:
        imagined = self._imagined(tensordict)
        lambda_target = self._lambda_target(imagined, self._next_value(imagined))
        imagined.set("lambda_target", lambda_target)
        gain = discounted_sum(lambda_target, self.value_estimator.gamma if self.discount_loss else None)
        return imagined, {"loss_actor": self._reduce_loss(-gain, tensordict)}

    def _check_start(self, tensordict: TensorDictBase) -> None:
        self._require_entries(tensordict, ["state"], "it is where the imagination starts")
        self._require(tensordict, "belief")

    def _imagined(self, tensordict: TensorDictBase) -> TensorDictBase:
        """H steps of the policy in the model, from each state."""
        self._check_start(tensordict)
        start = self._without_padding(tensordict, *self.in_keys).select(*self.in_keys).detach()
        with set_interaction_type(InteractionType.RANDOM), held_constant(self.model_based_env):
            imagined = self.model_based_env.rollout(
                max_steps=self.imagination_horizon,
                policy=self.actor_model,
                auto_reset=False,
                tensordict=self.model_based_env.reset(start),
                **self._rollout_options,
            )
        self._require(imagined, "reward")
        mask = self._mask(tensordict, self._get(imagined, "reward").squeeze(-1)[..., 0])
        if mask is not None:
            key = PADDING_MASK if self.loss_mask_key in ("auto", None) else self.loss_mask_key
            imagined.set(key, expand_right(mask, self._get(imagined, "reward")).squeeze(-1))
        return imagined

    def _next_value(self, imagined: TensorDictBase) -> Tensor:
        """V of the states that the imagined steps lead to, with gradients to them."""
        with held_constant(self.value_model):
            return self._value(self._next_states(imagined, self.value_model))

    def _next_states(self, imagined: TensorDictBase, network: nn.Module) -> TensorDictBase:
        """What ``network`` reads of the states that the imagined steps lead to."""
        next_states = imagined.get("next").select(*keys_read(network), strict=False)
        terminal = any_right(self._terminal(imagined) != 0, imagined.ndim)
        for key, x in list(next_states.items(True, True)):
            if x.is_floating_point():  # what is made of a terminal state isn't read, but its NaN would be as 0 · NaN
                next_states.set(key, torch.where(expand_right(terminal, x), 0, x))
        return next_states

    def _terminal(self, imagined: TensorDictBase) -> Tensor:
        return imagined.get(*self._keys("terminated"), self._done(imagined))

    def _done(self, imagined: TensorDictBase) -> Tensor:
        reward = self._get(imagined, "reward")
        return imagined.get(*self._keys("done"), torch.zeros_like(reward, dtype=torch.bool))

    def _lambda_target(
        self, imagined: TensorDictBase, next_value: Tensor, continuation: Tensor | None = None
    ) -> Tensor:
        """The return of each imagined step, shape ``[*B, H, 1]``, with gradients through rewards and values.

        Args:
            imagined: batch size ``[*B, H]``.
            next_value: V of the states that the steps lead to, shape ``[*B, H, 1]``.
            continuation: how likely it is to go on from there, the same shape; it multiplies γ.

        """
        steps = TensorDict({}, imagined.batch_size)
        steps.set(*self._keys("reward"), self._get(imagined, "reward"))
        steps.set(*self._keys("done"), self._done(imagined))
        steps.set(*self._keys("terminated"), self._terminal(imagined))
        return self.value_estimator.value_estimate(steps, next_value=next_value, time_dim=-1, continuation=continuation)


class DreamerValueLoss(DreamerLoss):
    r"""Distance of the value from the λ-returns of imagined trajectories.

    .. math::
        L = \mathbb{E}\Big[\sum_{t=0}^{H-1} γ^t d(V(s_t), V_λ(s_t))\Big]

    It reads what `DreamerActorLoss` imagined. The loss is ``loss_value``; the data that comes with it is the input.

    Args:
        value_model: writes the value V.
        value_loss: d: ``"l2"`` (None), ``"l1"`` or ``"smooth_l1"``; see `distance_loss`.
        discount_loss: weigh the steps with γ^t.
        gamma: γ, a number or a 0-d tensor.
        reduction: over trajectories: ``"mean"`` (None), ``"sum"`` or ``"none"``, shape ``[*B]``.

    Raises:
        ValueError: an argument has none of its values.
        KeyError: on call, an entry is missing.
        RuntimeError: on call, value and return have different shapes.

    Examples:
        >>> from tensordict.nn import TensorDictModule
        >>> value = TensorDictModule(lambda x: 0 * x, ["state"], ["state_value"])
        >>> data = TensorDict({"state": torch.ones(2, 3, 1), "lambda_target": torch.ones(2, 3, 1)}, [2, 3])
        >>> losses, _ = DreamerValueLoss(value, gamma=0.5)(data)
        >>> losses["loss_value"]
        tensor(1.7500)

    See Hafner et al. 2020, Dream to control: learning behaviors by latent imagination (arXiv:1912.01603), equation 8.

    """

    @dataclass
    class _AcceptedKeys:
        """The value model writes ``value``; the returns are read as "lambda_target"."""

        value: NestedKey = "state_value"

    out_keys = ["loss_value"]  # noqa: RUF012  # as above

    def __init__(
        self,
        value_model: TensorDictModule,
        value_loss: str | None = None,
        discount_loss: bool = True,
        gamma: Scalar = 0.99,
        *,
        reduction: str | None = None,
    ) -> None:
        super().__init__(reduction)
        self.value_model = value_model
        self.value_loss = check_distance("l2" if value_loss is None else value_loss, "value_loss")
        self.discount_loss = discount_loss
        self.gamma = gamma

    def _find_in_keys(self) -> Iterator[NestedKey]:
        yield from (*keys_read(self.value_model), "lambda_target")

    def _losses(self, tensordict: TensorDictBase) -> tuple[TensorDictBase, dict[str, Tensor]]:
        self._require_entries(tensordict, ["lambda_target"], "DreamerActorLoss writes it")
        data = self._without_padding(tensordict, *self.in_keys)
        value, lambda_target = self._value(data), data.get("lambda_target")
        self._require_shape(value, self.tensor_keys.value, lambda_target, "lambda_target")
        distance = distance_loss(value, lambda_target, self.value_loss)
        mask = self._mask(tensordict, distance)
        if mask is not None:
            distance, mask = torch.where(mask, distance, 0), mask.any(-2).squeeze(-1)
        loss = discounted_sum(distance, self.gamma if self.discount_loss else None)
        return data, {"loss_value": self._reduce_loss(loss, tensordict, mask=mask)}
