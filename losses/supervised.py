"""What the losses that fit networks to recorded data share: reading, and predictions that are really predicted."""

from collections.abc import Iterator
from typing import ClassVar

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.utils import unravel_key
from torch import Tensor

from ..estimators.modules import keys_read
from .base import LossModule
from .keys import NEXT_KEYS


class SupervisedLoss(LossModule):
    """Base of the losses whose targets are in the data: no value, no return.

    Steps that don't count (`LossModule.loss_mask_key`) are 0 in what is read, since a NaN there would reach the
    gradients through a network, as 0 · NaN.
    """

    _data_keys: ClassVar[tuple[str, ...]] = ()
    """The keys whose entries are read, besides those that the networks read."""

    def _find_in_keys(self) -> Iterator[NestedKey]:
        for name in self._network_names():
            yield from keys_read(getattr(self, name))
        for name in self._data_keys:
            yield from self._keys(name)

    def _read(self, tensordict: TensorDictBase, *names: str, networks: tuple[str, ...] = ()) -> TensorDictBase:
        """The entries that the keys ``names`` stand for, and those that the ``networks`` read: a new TensorDict.

        Raises:
            KeyError: an entry is missing.

        """
        self._require(tensordict, *names, networks=networks)
        data = tensordict.select(
            *(key for name in names for key in self._keys(name)),
            *(key for name in networks for key in keys_read(getattr(self, name))),
            strict=False,  # a network may do without some of its inputs
        )
        for key in data.keys(True, True):
            data.set(key, self._only_valid(data.get(key), tensordict))
        return data

    def _predict(self, network: str, data: TensorDictBase, *names: str) -> list[Tensor]:
        """What the ``network`` writes for ``data``, which is left as it is, at what the keys ``names`` stand for.

        Raises:
            KeyError: the network doesn't write there, so that what is found would be the data itself.
            TypeError: it writes integers, such as an action that was drawn, which have no gradient.

        """
        keys = [self._keys(name)[0] for name in names]
        self._require_written(getattr(self, network), network, dict(zip(names, keys, strict=True)))
        with self._parameters_in(network):
            out = getattr(self, network)(data.copy())
        found = [out.get(key) for key in keys]
        for key, x in zip(keys, found, strict=True):
            if not x.is_floating_point():
                raise TypeError(f"{type(self).__name__}: the {network} writes {key!r} as {x.dtype}, without a gradient")
        return found

    def _require_written(self, module: torch.nn.Module, network: str, keys: dict[str, NestedKey]) -> None:
        written = [unravel_key(key) for key in module.out_keys]  # type: ignore[union-attr]  # a TensorDictModule
        for name, key in keys.items():
            if key not in written:
                hint = "" if name in NEXT_KEYS else f"; say which it is with set_keys({name}=...)"
                raise KeyError(f"{type(self).__name__}: the {network} doesn't write {key!r} but {written}{hint}")
