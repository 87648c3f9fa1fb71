"""DreamerV3's policy, learnt in imagination from returns on a common scale."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from tensordict.utils import unravel_key
from torch import Tensor, nn

from ..estimators.calls import distribution
from ..estimators.modules import device_of, keys_read
from ..estimators.precision import FullPrecisionBuffers
from .dreamer import DreamerActorLoss
from .dreamer_base import held_constant
from .functional.imagination import discount_weight, quantile
from .policy import ActionHeads


class DreamerV3ActorLoss(DreamerActorLoss):
    r"""Policy gradient on the λ-returns of imagined trajectories, divided by the range that returns have.

    .. math::
        L = -\mathbb{E}\left[w_t \Big(\log π(a_t|s_t)\, \text{sg}\Big(\frac{V_λ(s_t) - V(s_t)}{S}\Big)
        + η H[π(\cdot|s_t)]\Big)\right], \qquad
        S = \max(S_\text{min}, \text{high} - \text{low})

    with ``use_reinforce``; otherwise the gradient goes through the model itself, and V_λ(s_t) / S stands in place of
    the first term: only for policies whose draws are differentiable. low and high are moving averages of two quantiles
    of the returns, updated in training mode before they are used; returns that aren't finite don't enter. With c, how
    likely it is that the episode goes on from a state,

    .. math::
        V_λ(s_t) = r_t + γ c(s_{t+1}) \big((1 - λ) V(s_{t+1}) + λ V_λ(s_{t+1})\big), \qquad
        w_t = γ^t \prod_{k \le t} c(s_k)

    The loss is ``loss_actor``. It comes with ``actor_entropy`` (the mean of w H, 0 if η is), ``return_low``,
    ``return_high``, ``return_scale`` (S) and ``continuation_mean`` (of c(s_{t+1})), and with the imagined
    trajectories, batch size ``[*B, H]``, that hold ``lambda_target`` (V_λ), ``discount_weight`` (w) and, with a model
    of it, ``continuation`` (c(s_t)): what `DreamerV3ValueLoss` learns from. Model, value and c are held constant.

    Args:
        actor_model: the policy.
        value_model: writes the value V, as a number.
        model_based_env: see `DreamerActorLoss`; ``rollout`` also gets ``break_when_any_done=False``.
        continuation_model: writes c; None: 1.
        imagination_horizon: H.
        discount_loss: w as above; otherwise 1.
        entropy_bonus: η.
        use_reinforce: see above.
        return_normalization: S as above; otherwise 1.
        return_normalization_rate: of the moving averages.
        return_normalization_quantiles: the two quantiles.
        return_normalization_min_scale: S_min.
        reduction: over the imagined steps: ``"mean"`` (None), ``"sum"`` or ``"none"``, shape ``[*B, H]``.

    Raises:
        TypeError: ``model_based_env`` is not a module; ``gamma`` or ``lmbda`` (see `make_value_estimator`).
        ValueError: an argument that can't be used.
        KeyError: on call, an entry is missing, or isn't written by a model.

    See Hafner et al. 2023, Mastering diverse domains through world models (arXiv:2301.04104), on actor learning.

    """

    @dataclass
    class _AcceptedKeys(DreamerActorLoss._AcceptedKeys):
        """The entries read: ``state`` and ``belief`` of the input, the others of what is imagined or written.

        ``action_log_prob`` is there for TorchRL's sake: nothing reads or writes it.
        """

        state: NestedKey = "state"
        action: NestedKey = "action"
        action_log_prob: NestedKey = "action_log_prob"
        continuation: NestedKey = "continuation"
        discount_weight: NestedKey = "discount_weight"

    out_keys = [  # noqa: RUF012  # tensordict.nn reads a list
        "loss_actor", "actor_entropy", "return_low", "return_high", "return_scale", "continuation_mean",
    ]  # fmt: skip
    _rollout_options = {"break_when_any_done": False}  # noqa: RUF012  # as in the base

    continuation_model: Any

    def __init__(
        self,
        actor_model: TensorDictModule,
        value_model: TensorDictModule,
        model_based_env: Any,
        *,
        continuation_model: TensorDictModuleBase | None = None,
        imagination_horizon: int = 15,
        discount_loss: bool = True,
        entropy_bonus: float = 3e-4,
        use_reinforce: bool = False,
        return_normalization: bool = True,
        return_normalization_rate: float = 0.01,
        return_normalization_quantiles: tuple[float, float] = (0.05, 0.95),
        return_normalization_min_scale: float = 1.0,
        reduction: str | None = None,
    ) -> None:
        if entropy_bonus < 0:
            raise ValueError(f"entropy_bonus must not be negative, but is {entropy_bonus}")
        super().__init__(
            actor_model,
            value_model,
            model_based_env,
            imagination_horizon=imagination_horizon,
            discount_loss=discount_loss,
            reduction=reduction,
        )
        self.__dict__["continuation_model"] = continuation_model  # trained and saved with the world model
        self.entropy_bonus = entropy_bonus
        self.use_reinforce = use_reinforce
        self.return_normalization = return_normalization
        self.retnorm = ReturnRange(
            return_normalization_quantiles, return_normalization_rate, return_normalization_min_scale
        ).to(device_of(actor_model))

    @property
    def return_low(self) -> Tensor:
        """The moving average of the returns' low quantile, a 0-d tensor."""
        return self.retnorm.low.squeeze()

    @property
    def return_high(self) -> Tensor:
        """The moving average of the returns' high quantile, a 0-d tensor."""
        return self.retnorm.high.squeeze()

    @property
    def return_normalization_rate(self) -> float:
        """How far each call moves the averages."""
        return self.retnorm.rate

    @property
    def return_normalization_quantiles(self) -> tuple[float, float]:
        """Those that the averages are of."""
        return self.retnorm.quantiles

    @property
    def return_normalization_min_scale(self) -> float:
        """The least that returns are divided by."""
        return self.retnorm.min_scale

    def _find_in_keys(self) -> Iterator[NestedKey]:
        yield from (self.tensor_keys.state, self.tensor_keys.belief)

    def _check_start(self, tensordict: TensorDictBase) -> None:
        self._require(tensordict, "state", "belief")

    def _losses(self, tensordict: TensorDictBase) -> tuple[TensorDictBase, dict[str, Tensor]]:
        # REINFORCE takes no gradient through the model.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.use_reinforce):
            imagined = self._imagined(tensordict)
            value, next_value = self._values(imagined)
            continuation, next_continuation = self._continuations(imagined, next_value)
            lambda_target = self._lambda_target(imagined, next_value, next_continuation)
        weight = self._weight(lambda_target, continuation)
        low, high = self._return_range(imagined, lambda_target)
        scale = self.retnorm.scale(low, high) if self.return_normalization else torch.ones_like(low)

        gain, entropy = lambda_target / scale, torch.zeros_like(weight)
        if value is not None or self.entropy_bonus:
            heads = self._heads(imagined)
            if value is not None:
                gain = _joint(heads.log_prob(imagined.detach())) * (lambda_target - value) / scale
            if self.entropy_bonus:
                entropy = _joint(heads.total(list(heads.entropies(samples=1).values())))
        objective = weight * (gain + self.entropy_bonus * entropy)

        imagined.set("lambda_target", lambda_target)
        imagined.set(self.tensor_keys.discount_weight, weight)
        if continuation is not None:
            imagined.set(self.tensor_keys.continuation, continuation)
            imagined.set(unravel_key(("next", self.tensor_keys.continuation)), next_continuation)
        losses = {
            "loss_actor": self._reduce_loss(-objective, imagined),
            "actor_entropy": self._metric(weight * entropy, imagined),
            "return_low": low,
            "return_high": high,
            "return_scale": scale,
            "continuation_mean": self._metric(
                torch.ones_like(weight) if next_continuation is None else next_continuation, imagined
            ),
        }
        if self.training and self.return_normalization:
            self.retnorm.move_to(low, high)  # the last thing, since what came before it can fail
        return imagined, losses

    # --- what is imagined -----------------------------------------------------------------------------------------

    def _now_and_next(self, imagined: TensorDictBase, network: nn.Module) -> TensorDictBase:
        """What ``network`` reads of the states that steps start from, and, after them, of those they lead to."""
        now = imagined.select(*keys_read(network), strict=False).detach()
        return torch.cat([now, self._next_states(imagined, network)])

    def _values(self, imagined: TensorDictBase) -> tuple[Tensor | None, Tensor]:
        """V of the states that steps start from, if it is asked for, and of those they lead to."""
        if not self.use_reinforce:
            return None, self._next_value(imagined)
        value, next_value = self._value(self._now_and_next(imagined, self.value_model)).chunk(2)
        return value, next_value

    def _continuations(self, imagined: TensorDictBase, next_value: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """How likely it is to go on from the states that steps start from, and from those they lead to."""
        model = self.continuation_model
        if model is None:
            return None, None
        with held_constant(model):
            both = model(self._now_and_next(imagined, model))
        self._require(both, "continuation")
        continuation, next_continuation = self._get(both, "continuation").chunk(2)
        self._require_shape(continuation, self.tensor_keys.continuation, next_value, self.tensor_keys.value)
        return continuation, next_continuation

    def _weight(self, like: Tensor, continuation: Tensor | None) -> Tensor:
        """How much each step counts; the states that it depends on are constants (`_now_and_next`)."""
        if not self.discount_loss:
            return torch.ones_like(like)
        return discount_weight(like, self.value_estimator.gamma, continuation)

    def _return_range(self, imagined: TensorDictBase, lambda_target: Tensor) -> tuple[Tensor, Tensor]:
        """The range that returns have, these ones included in training mode: two 0-d tensors of their own."""
        if not (self.training and self.return_normalization):
            return self.return_low.clone(), self.return_high.clone()
        return self.retnorm.moved(lambda_target.detach(), self._mask(imagined, lambda_target))

    # --- the policy -----------------------------------------------------------------------------------------------

    def _heads(self, imagined: TensorDictBase) -> ActionHeads:
        """The policy's distribution in the imagined states, which are constants."""
        states = imagined.select(*keys_read(self.actor_model), strict=False).detach()
        dist = distribution(self.actor_model, states)
        return ActionHeads(dist, self.tensor_keys.action, imagined.ndim)


class ReturnRange(FullPrecisionBuffers):
    """The range that returns have: moving averages of two of their quantiles.

    Args:
        quantiles: the two, ascending.
        rate: how far new returns move the averages, from 0 to 1.
        min_scale: the least that returns are divided by: small ones, and their noise, aren't blown up.

    Raises:
        ValueError: an argument that can't be used.

    Examples:
        >>> returns = ReturnRange((0.05, 0.95), rate=1.0, min_scale=1.0)
        >>> low, high = returns.moved(torch.linspace(0, 100, 101))
        >>> returns.scale(low, high)
        tensor(90.)

    """

    low: Tensor
    high: Tensor

    def __init__(self, quantiles: tuple[float, float], rate: float, min_scale: float) -> None:
        super().__init__()
        low, high = quantiles
        if not 0 <= low < high <= 1:
            raise ValueError(f"the quantiles of the returns must ascend between 0 and 1, but are {low} and {high}")
        if not 0 <= rate <= 1:
            raise ValueError(f"the rate of the returns' moving averages must be between 0 and 1, but is {rate}")
        if min_scale <= 0:
            raise ValueError(f"the least scale of the returns must be positive, but is {min_scale}")
        self.quantiles = (low, high)
        self.rate = rate
        self.min_scale = min_scale
        self.register_buffer("low", torch.zeros(1))
        self.register_buffer("high", torch.zeros(1))

    def moved(self, returns: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The averages with the quantiles of the ``returns`` (those in ``mask``, if given) in them, 0-d tensors."""
        low, high = (
            _moved(bound.squeeze(), quantile(returns, q, mask), self.rate)
            for bound, q in zip((self.low, self.high), self.quantiles, strict=True)
        )
        return low, high

    @torch.no_grad()
    def move_to(self, low: Tensor, high: Tensor) -> None:
        """Keep ``low`` and ``high`` as the averages."""
        self.low.copy_(low)
        self.high.copy_(high)

    def scale(self, low: Tensor, high: Tensor) -> Tensor:
        """What returns of this range are divided by."""
        return (high - low).clamp_min(self.min_scale)


def _moved(average: Tensor, new: Tensor, rate: float) -> Tensor:
    """The moving ``average`` with ``new`` in it, unless that isn't finite: it would stay in it for good."""
    new = new.to(average.dtype)
    # Not with lerp, which the compiler takes apart in a way that rounds differently.
    return average + rate * torch.where(new.isfinite(), new - average, 0)


def _joint(x: Tensor) -> Tensor:
    """Of all dimensions of an action together: those of a plain `torch.distributions.Normal` are apart."""
    return x.sum(-1, keepdim=True)
