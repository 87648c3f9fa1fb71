"""DreamerV3's value, learnt from imagined trajectories and from replayed ones."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from ..estimators.functional import vec_td_lambda_return_estimate
from ..estimators.modules import device_of, keys_read
from ..estimators.precision import FullPrecisionBuffers
from ..kernels.dispatch import as_input
from .dreamer_base import DreamerLoss
from .dreamer_v3_actor import DreamerV3ActorLoss
from .functional.discrete_regression import symexp_bins, symlog, two_hot_cross_entropy, two_hot_decode
from .functional.imagination import Scalar, discount_weight, wide

VALUE_LOSSES = ("symlog_mse", "two_hot")


class DreamerV3ValueLoss(FullPrecisionBuffers, DreamerLoss):
    r"""Distance of the value from the λ-returns of trajectories, and from a slowly moving copy of itself.

    .. math::
        L = \mathbb{E}\left[w_t \big(d(V(s_t), V_λ(s_t)) + β\, d(V(s_t), \bar V(s_t))\big)\right]

    ==============  =========================================================================
    ``symlog_mse``  d(V, y) = (symlog V − symlog y)²
    ``two_hot``     d(V, y) = `two_hot_cross_entropy` of the value's logits on `symexp_bins`
    ==============  =========================================================================

    w is the entry ``discount_weight`` that `DreamerV3ActorLoss` writes. Without it, it is γ^t, t being the last batch
    dimension if there are two at least. The loss is ``loss_value``; ``value_slow_loss`` is the part of β, without it.
    The data that comes with them is the input.

    Args:
        value_model: writes the value V, or its logits (``value_logits``; if it doesn't write that, ``value``).
        value_loss: d.
        discount_loss: where there is no weight in the data: γ^t as above, otherwise 1.
        gamma: γ, a number or a 0-d tensor.
        num_value_bins: the size of the support.
        actor_loss: take γ from its value estimator instead, whenever it is needed.
        slow_critic_regularization: β. If it is positive there are ``target_value_model_params``, for V̄, which an
            updater such as `SoftUpdate` moves.
        reduction: over the steps: ``"mean"`` (None), ``"sum"`` or ``"none"``, shape ``[*B]``.

    Raises:
        ValueError: an argument that can't be used; on call, the number of logits isn't that of the bins.
        KeyError: on call, an entry is missing, or isn't written by the value model.
        RuntimeError: on call, there isn't one value or return for each step.

    Examples:
        >>> value = TensorDictModule(lambda x: 0 * x, ["state"], ["state_value"])
        >>> ones = torch.ones(2, 3, 1)
        >>> data = TensorDict({"state": ones, "lambda_target": (torch.e - 1) * ones}, [2, 3])
        >>> losses, _ = DreamerV3ValueLoss(value, gamma=0.5)(data)
        >>> losses["loss_value"]  # (1 + 1/2 + 1/4) / 3
        tensor(0.5833)

    See Hafner et al. 2023, Mastering diverse domains through world models (arXiv:2301.04104), on critic learning.

    """

    @dataclass
    class _AcceptedKeys:
        """What the value model writes, and what is read. The returns are read as "lambda_target"."""

        value: NestedKey = "state_value"
        value_logits: NestedKey = "state_value_logits"
        discount_weight: NestedKey = "discount_weight"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        bootstrap: NestedKey = "bootstrap"

    out_keys = ["loss_value", "value_slow_loss"]  # noqa: RUF012  # tensordict.nn reads a list
    value_bins: Tensor
    value_model: nn.Module

    def __init__(
        self,
        value_model: TensorDictModule,
        value_loss: str = "symlog_mse",
        discount_loss: bool = True,
        gamma: Scalar = 0.99,
        num_value_bins: int = 255,
        actor_loss: DreamerV3ActorLoss | None = None,
        slow_critic_regularization: float = 0.0,
        reduction: str | None = None,
    ) -> None:
        if value_loss not in VALUE_LOSSES:
            raise ValueError(f"value_loss is {value_loss!r}; it can be {', '.join(map(repr, VALUE_LOSSES))}")
        if slow_critic_regularization < 0:
            raise ValueError(f"slow_critic_regularization must not be negative, but is {slow_critic_regularization}")
        super().__init__(reduction)
        self.convert_to_functional(value_model, "value_model", create_target_params=slow_critic_regularization > 0)
        self.value_loss = value_loss
        self.discount_loss = discount_loss
        self.slow_critic_regularization = slow_critic_regularization
        self._gamma = gamma
        self.__dict__["_actor_loss"] = actor_loss  # trained and saved on its own
        self.register_buffer("value_bins", symexp_bins(num_value_bins).to(device_of(value_model)))

    @property
    def gamma(self) -> Scalar:
        """γ, that of the actor's loss if there is one; what is assigned takes its place."""
        actor_loss: DreamerV3ActorLoss | None = self.__dict__["_actor_loss"]
        return self._gamma if actor_loss is None else actor_loss.value_estimator.gamma

    @gamma.setter
    def gamma(self, gamma: Scalar) -> None:
        self._gamma = gamma
        self.__dict__["_actor_loss"] = None

    def sync_gamma_with_actor_loss(self, actor_loss: DreamerV3ActorLoss) -> None:
        """Take the γ that ``actor_loss`` has now. (One given to the constructor is asked whenever γ is needed.)"""
        self.gamma = actor_loss.value_estimator.gamma.clone()

    def _find_in_keys(self) -> Iterator[NestedKey]:
        yield from (*keys_read(self.value_model), "lambda_target")

    def _losses(self, tensordict: TensorDictBase) -> tuple[TensorDictBase, dict[str, Tensor]]:
        self._require_entries(tensordict, ["lambda_target"], "DreamerV3ActorLoss writes it")
        data = self._without_padding(tensordict, *self.in_keys, self.tensor_keys.discount_weight)
        target = self._per_step(data.get("lambda_target"), "lambda_target", data)
        loss, slow_loss = self._distances(data, target)
        weight = self._weight(data, target)
        return data, {
            "loss_value": self._reduce_loss(weight * loss, tensordict),
            "value_slow_loss": self._reduce_loss(weight * slow_loss, tensordict).detach(),
        }

    def replay_value_loss(
        self, tensordict: TensorDictBase, *, horizon: float = 333.0, lmbda: float = 0.95
    ) -> TensorDictBase:
        r"""Distance of the value of replayed states from their λ-returns, which bootstrap from imagined ones.

        .. math::
            y_t = r_{t+1} + γ (1 - \text{term}_{t+1}) \big((1 - λ) b_{t+1} + λ y_{t+1}\big), \qquad
            γ = 1 - 1 / \text{horizon}

        where b is the bootstrap, and y_{t+1} is b_{t+1} where the trajectory or the sequence ends. The loss of a state
        that ends a trajectory is 0, since what follows it in the sequence is another's; the last state has none. The
        gradient also goes to what the value model reads.

        Args:
            tensordict: sequences of states, batch size ``[*B, T]``, with ``bootstrap``, and under "next" the reward
                that was received on arrival at the state, and whether the trajectory ended there.
            horizon: see above.
            lmbda: λ.

        Returns:
            ``loss_replay_value``.

        Raises:
            KeyError: an entry is missing.
            RuntimeError: shapes don't agree, or T is less than 2.
            ValueError: ``horizon`` is less than 1.

        """
        if horizon < 1:
            raise ValueError(f"horizon must be at least 1, but is {horizon}")
        self._require(tensordict, "bootstrap", "reward", "done")
        if not tensordict.ndim or tensordict.shape[-1] < 2:
            raise RuntimeError(f"sequences of at least 2 steps are needed, but the batch size is {tensordict.shape}")
        names = ("bootstrap", "reward", "done", "terminated")
        read = [key for name in names for key in self._keys(name)]
        data = self._without_padding(tensordict, *keys_read(self.value_model), *read)
        bootstrap, reward, done = (self._per_step(self._get(data, n), self._keys(n)[0], data) for n in names[:3])
        done = done != 0
        terminated = self._per_step(*self._terminated(data), data) != 0
        ends = done | terminated
        valid = self._mask(tensordict, reward)
        if valid is not None:
            ends, valid = ends | (valid & ~valid.roll(-1, -1)), valid[..., :-1] & valid[..., 1:]
        with torch.no_grad():
            b, r, end, term = (x[..., 1:].unsqueeze(-1) for x in (bootstrap, reward, ends, terminated))
            # A tensor before the division: of a quotient of numbers PyTorch 2.11 makes a constant of the compiled code.
            gamma = 1 - 1 / as_input(horizon, r)
            target = vec_td_lambda_return_estimate(gamma, lmbda, b, r, end, term).squeeze(-1)
        # Not data[..., :-1], which would make compiled code good for one size alone.
        last, size = data.ndim - 1, target.shape
        without_last = data.apply(lambda x: x.narrow(last, 0, size[last]), batch_size=size)
        loss, _ = self._distances(without_last, target)
        loss = torch.where(ends[..., :-1], 0, loss)
        return TensorDict({"loss_replay_value": self._reduce_loss(loss, without_last, mask=valid)})

    # --- parts ----------------------------------------------------------------------------------------------------

    def _distances(self, data: TensorDictBase, target: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each state, with that of the slow value in it, and the latter alone without its weight."""
        prediction = self._predicted(data)
        loss = self._distance(prediction, target)
        if not self.slow_critic_regularization:
            return loss, torch.zeros_like(loss)
        with torch.no_grad():
            slow = self._predicted(data, target=True)
            if self.value_loss == "two_hot":
                slow = two_hot_decode(wide(slow), self.value_bins)  # a mean of bins that float16 can't hold
        slow_loss = self._distance(prediction, slow)
        return loss + self.slow_critic_regularization * slow_loss, slow_loss

    def _distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        if self.value_loss == "two_hot":
            return two_hot_cross_entropy(prediction, target, self.value_bins)
        return (symlog(wide(prediction)) - symlog(wide(target))).square()

    def _predicted(self, data: TensorDictBase, *, target: bool = False) -> Tensor:
        """The value, shape ``[*B]``, or its logits, ``[*B, N]``."""
        with self._parameters_in("value_model", target=target):
            if self.value_loss == "symlog_mse":
                return self._per_step(self._value(data), self.tensor_keys.value, data)
            return self._value(data, self.tensor_keys.value_logits)

    def _per_step(self, x: Tensor, key: NestedKey, data: TensorDictBase) -> Tensor:
        """``x``, shape ``[*B, 1]`` or ``[*B]``, as the latter."""
        if x.shape != data.shape and x.shape != (*data.shape, 1):
            raise RuntimeError(
                f"{type(self).__name__}: {key!r} has shape {tuple(x.shape)}, but there must be one for each of the "
                f"steps, which have the batch size {tuple(data.shape)}"
            )
        return x.reshape(data.shape)

    def _weight(self, data: TensorDictBase, target: Tensor) -> Tensor:
        """How much each step counts, shape ``[*B]``."""
        key = self.tensor_keys.discount_weight
        weight = data.get(key, None)
        if weight is not None:
            return self._per_step(weight, key, data)
        if self.discount_loss and data.ndim > 1:
            return discount_weight(target.unsqueeze(-1), self.gamma).squeeze(-1)
        return torch.ones_like(target)
