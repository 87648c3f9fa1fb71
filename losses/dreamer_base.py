"""What the losses of Dreamer, of the first version and the third, have in common."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, dispatch
from tensordict.utils import unravel_key
from torch import Tensor, nn

from ..estimators.modules import keys_read
from .base import LossModule
from .parameters import require_initialised, swapped_in


class DreamerLoss(LossModule):
    """Base of Dreamer's losses, which return a pair: the losses, and the data that they were computed from.

    The data is detached (unless ``detach_output`` is False), and the input stays as it is. Called with tensors
    instead of a TensorDict, a loss returns the tuple of its ``out_keys``.
    """

    detach_output = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The losses and their data; the losses alone if called with tensors."""
        tensordict = args[0] if args else kwargs.get("tensordict")
        if not isinstance(tensordict, TensorDictBase):
            return super().__call__(*args, **kwargs)
        data: list[TensorDictBase] = []
        losses = super().__call__(*args, **kwargs, data=data)
        return losses, data[0].detach() if self.detach_output else data[0]

    @dispatch
    def forward(self, tensordict: TensorDictBase, *, data: list[TensorDictBase] | None = None) -> TensorDictBase:
        """The losses; the data that they were computed from is appended to ``data``."""
        found, losses = self._losses(_leveled(tensordict) if data is None else tensordict)
        if data is not None:
            data.append(found)
        return TensorDict(losses)

    def _losses(self, tensordict: TensorDictBase) -> tuple[TensorDictBase, dict[str, Tensor]]:
        raise NotImplementedError(f"{type(self).__name__} has no _losses")

    def _without_padding(self, tensordict: TensorDictBase, *keys: NestedKey) -> TensorDictBase:
        """A shallow copy with zeros in the padded steps of the entries ``keys``: NaN would reach the gradients."""
        tensordict = tensordict.copy()
        found = [(key, tensordict.get(key, None)) for key in keys]
        for key, x in found:
            if x is not None and x.is_floating_point():
                mask = self._mask(tensordict, x)
                if mask is not None:
                    tensordict.set(key, torch.where(mask, x, 0))
        return tensordict

    def _value(self, states: TensorDictBase, *preferred: NestedKey) -> Tensor:
        """V of the ``states``, which are left as they are, or what is written at one of the ``preferred`` keys."""
        inputs = keys_read(self.value_model)
        self._require_inputs(states, inputs, ["value_model"], "it is one of the in_keys of value_model")
        written = self.value_model(states.copy())
        for key in (*preferred, self.tensor_keys.value):
            value = written.get(key, None)
            if value is not None:
                return value
        raise KeyError(
            f"{type(self).__name__}: value_model doesn't write {self.tensor_keys.value!r} but "
            f"{self.value_model.out_keys}; say which is the value with set_keys(value=...)"
        )


class ModelLoss(DreamerLoss):
    """Base of the losses of world models, whose keys are all read under "next".

    The world model writes its reward in place of that of the input, which is then in the data as ``true_reward``.
    """

    def __init__(self, world_model: TensorDictModule, reduction: str | None) -> None:
        super().__init__(reduction)
        self.world_model = world_model

    def _keys(self, name: str) -> list[NestedKey]:
        keys = getattr(self.tensor_keys, name)
        return [unravel_key(("next", key)) for key in (keys if isinstance(keys, list) else [keys])]

    def _read_by_model(self) -> list[NestedKey]:
        """What the world model reads of the data; it may read the reward where the loss moves that."""
        return [key for key in keys_read(self.world_model) if key not in self._keys("true_reward")]

    def _find_in_keys(self) -> Iterator[NestedKey]:
        yield from self._read_by_model()
        yield from (*self._keys("pixels"), *self._keys("reward"))

    def _modelled(self, tensordict: TensorDictBase) -> TensorDictBase:
        """A copy of the data with what the world model says of it, and the reward under another name."""
        self._require(tensordict, "reward", "pixels")
        inputs = self._read_by_model()
        self._require_inputs(tensordict, inputs, ["world_model"], "it is one of the in_keys of world_model")
        data = self._without_padding(tensordict, *self.in_keys)
        data.rename_key_(*self._keys("reward"), *self._keys("true_reward"))
        return self.world_model(data)

    def _require_alike(self, data: TensorDictBase, name: str, of: str) -> None:
        self._require_shape(self._get(data, name), self._keys(name)[0], self._get(data, of), self._keys(of)[0])

    def _reduced(self, loss: Tensor, data: TensorDictBase) -> Tensor:
        """A loss as TorchRL returns it: of shape ``[1]``, unless there is one for each step."""
        loss = self._reduce_loss(loss, data)
        return loss if self.reduction == "none" else loss.unsqueeze(-1)


def _leveled(tensordict: TensorDictBase) -> TensorDictBase:
    """A shallow copy whose nested TensorDicts have its batch size, so that what a network writes fits into them.

    From `dispatch` they have all the dimensions that their entries share, be they of features.
    """
    tensordict = tensordict.copy()
    for x in tensordict.values(include_nested=True):
        if isinstance(x, TensorDictBase):
            x.batch_size = tensordict.batch_size
    return tensordict


def held_constant(network: nn.Module) -> AbstractContextManager[None]:
    """Within the block no gradient reaches the parameters of ``network``, but it passes through to its inputs."""
    params = TensorDict.from_module(network)
    if not torch.compiler.is_compiling():  # which can't ask whether a parameter is lazy
        require_initialised(params)
    return swapped_in(params.detach(), network)
