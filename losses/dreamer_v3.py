"""DreamerV3: its world model, its policy and its value, learnt together from replayed sequences."""

from collections.abc import Iterator
from dataclasses import dataclass

from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import dispatch
from tensordict.utils import unravel_key
from torch import Tensor

from .base import LossModule
from .dreamer_v3_actor import DreamerV3ActorLoss
from .dreamer_v3_model import DreamerV3ModelLoss
from .dreamer_v3_value import DreamerV3ValueLoss

__all__ = ["DreamerV3ActorLoss", "DreamerV3Loss", "DreamerV3ModelLoss", "DreamerV3ValueLoss"]


class DreamerV3Loss(LossModule):
    r"""The three losses of DreamerV3 on one batch of sequences, and the value's on the sequences themselves.

    .. math::
        L = L_\text{model} + L_\text{actor} + L_\text{value} + β_\text{replay} L_\text{replay}

    The world model infers the states of the sequences. From each of them, as a constant, the policy imagines a
    trajectory that policy and value learn from. The first return of each is what the λ-returns of the sequences
    bootstrap from (`DreamerV3ValueLoss.replay_value_loss`); this last loss trains the world model too.

    The output has the entries of the three losses (see there), ``loss_replay_value`` (weighted), ``replay_value`` (not
    weighted, without gradient), and in ``replay_context`` the states, detached, for a replay buffer to start from. The
    sum of what starts with ``loss_`` is the objective. The input stays as it is.

    Args:
        model_loss: with ``detach_output=False``, unless ``replay_value_loss_weight`` is 0.
        actor_loss: imagines with the same world model.
        value_loss: of the same value model as ``actor_loss``.
        replay_value_loss_weight: β_replay.
        continuation_horizon: the discount of the replayed returns is 1 − 1 / horizon.
        lmbda: λ of the replayed returns.

    Raises:
        ValueError: an argument that can't be used.
        KeyError: on call, an entry is missing, or isn't written by the world model.

    See Hafner et al. 2023, Mastering diverse domains through world models (arXiv:2301.04104).

    """

    @dataclass
    class _AcceptedKeys:
        """``state`` and ``belief`` are what the world model writes under "next"; ``is_init`` marks first steps."""

        state: NestedKey = "state"
        belief: NestedKey = "belief"
        is_init: NestedKey = "is_init"
        replay_context: NestedKey = "replay_context"

    def __init__(
        self,
        model_loss: DreamerV3ModelLoss,
        actor_loss: DreamerV3ActorLoss,
        value_loss: DreamerV3ValueLoss,
        *,
        replay_value_loss_weight: float = 0.3,
        continuation_horizon: float = 333.0,
        lmbda: float = 0.95,
    ) -> None:
        if replay_value_loss_weight < 0:
            raise ValueError(f"replay_value_loss_weight must not be negative, but is {replay_value_loss_weight}")
        if continuation_horizon < 1:
            raise ValueError(f"continuation_horizon must be at least 1, but is {continuation_horizon}")
        if replay_value_loss_weight and model_loss.detach_output:
            raise ValueError(
                "replay_value_loss_weight is not 0, so that the replayed values train the world model, but model_loss "
                "detaches what it returns: make it with detach_output=False"
            )
        super().__init__()
        self.model_loss = model_loss
        self.actor_loss = actor_loss
        self.value_loss = value_loss
        self.replay_value_loss_weight = replay_value_loss_weight
        self.continuation_horizon = continuation_horizon
        self.lmbda = lmbda
        self.out_keys = [
            *model_loss.out_keys,
            *actor_loss.out_keys,
            *value_loss.out_keys,
            "loss_replay_value",
            "replay_value",
            "replay_context",
        ]

    def set_keys(self, **keys: NestedKey | list[NestedKey] | None) -> None:
        """Rename entries; None gives an entry its default name back."""
        super().set_keys(**keys)
        self.out_keys = [*self.out_keys[:-1], self.tensor_keys.replay_context]

    def _find_in_keys(self) -> Iterator[NestedKey]:
        yield from self.model_loss.in_keys
        yield self.tensor_keys.is_init
        for name in ("reward", "done", "terminated"):
            yield from self.model_loss._keys(name)

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The losses and their metrics (see the class), for sequences of batch size ``[*B, T]``."""
        if self.replay_value_loss_weight:
            self.model_loss._require(tensordict, "done")
        model_losses, modelled = self.model_loss(tensordict)
        states = self._states(modelled)
        actor_losses, imagined = self.actor_loss(self._starts(states, tensordict))
        value_losses, _ = self.value_loss(imagined)
        replay_value = self._replay_value(states, imagined, tensordict)
        if self.model_loss.reduction != "none":
            model_losses = {name: x.squeeze(-1) for name, x in model_losses.items()}
        return TensorDict(
            {
                **model_losses,
                **actor_losses,
                **value_losses,
                "loss_replay_value": self.replay_value_loss_weight * replay_value,
                "replay_value": replay_value.detach(),
                self.tensor_keys.replay_context: states.detach(),
            }
        )

    def _states(self, modelled: TensorDictBase) -> TensorDictBase:
        """The states that the world model inferred."""
        names = {key: unravel_key(("next", key)) for key in (self.tensor_keys.state, self.tensor_keys.belief)}
        self._require_entries(modelled, names.values(), "the world model must write it; see set_keys")
        return TensorDict({key: modelled.get(at) for key, at in names.items()}, modelled.batch_size)

    def _starts(self, states: TensorDictBase, tensordict: TensorDictBase) -> TensorDictBase:
        """The ``states`` in one row, and which of them count. The actor's loss takes them as constants."""
        starts = states.copy()
        for key in self.actor_loss._mask_keys():
            mask = tensordict.get(key, None)
            if mask is not None:
                starts.set(key, mask)
        return starts.reshape(starts.batch_size.numel())

    def _replay_value(self, states: TensorDictBase, imagined: TensorDictBase, tensordict: TensorDictBase) -> Tensor:
        """The value's loss on the sequences, not weighted; 0 if it has no weight."""
        if not self.replay_value_loss_weight:
            return imagined.get("lambda_target").new_zeros(())
        first_return = imagined.get("lambda_target")[..., 0, 0]
        replayed = tensordict.select(*self.value_loss._mask_keys(), strict=False).update(states)
        keys = self.value_loss._keys
        replayed.set(*keys("bootstrap"), first_return.reshape(states.shape))
        for name in ("reward", "done", "terminated"):
            x = tensordict.get(*self.model_loss._keys(name), None)
            if x is not None:
                replayed.set(*keys(name), x)
        losses = self.value_loss.replay_value_loss(replayed, horizon=self.continuation_horizon, lmbda=self.lmbda)
        return losses.get("loss_replay_value")
