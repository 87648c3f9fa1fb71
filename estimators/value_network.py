"""Values of the current and the next observations, from one value network.

The network can be called in three ways that give the same values: once on both stacked (under `torch.vmap`),
twice, or once on the T + k observations of a trajectory in which each next observation is the observation of the
following step (`shifted`, see `fusedrl.estimators.shifted`).
"""

from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import skip_existing
from torch import Tensor

from ..kernels.checks import check_positive
from .modules import is_random, is_recurrent


class ValueNetwork:
    """How an estimator calls its value network: at once or in turn, whole or in chunks.

    Args:
        module: reads ``module.in_keys`` from a TensorDict and writes the value. None: the values must be there.
        skip_existing: take values that are present instead of calling the network; None for what
            `tensordict.nn.set_skip_existing` says.
        deactivate_vmap: never call the network under `torch.vmap`.
        chunk_size: call the network on at most so many elements of ``chunk_dim`` at a time.
        num_chunks: call it on so many parts of ``chunk_dim`` in turn.
        chunk_dim: the batch dimension that is cut.

    """

    def __init__(
        self,
        module: Any,
        *,
        skip_existing: bool | None,
        deactivate_vmap: bool,
        chunk_size: int | None,
        num_chunks: int | None,
        chunk_dim: int,
    ) -> None:
        for name, count in (("value_chunk_size", chunk_size), ("num_chunks", num_chunks)):
            if count is not None:
                check_positive(name, count)
        if chunk_size is not None and num_chunks is not None:
            raise ValueError(
                f"value_chunk_size is {chunk_size} and num_chunks is {num_chunks}: only one of them can be set"
            )
        if not isinstance(chunk_dim, int):
            raise TypeError(f"value_chunk_dim must be an int, but is a {type(chunk_dim).__name__}")
        if module is not None and not (hasattr(module, "in_keys") and hasattr(module, "out_keys")):
            raise TypeError(
                f"value_network must be None or have in_keys and out_keys, as a TensorDictModule has, but is a "
                f"{type(module).__name__}"
            )
        self.module = module
        self.skip_existing = skip_existing
        self.deactivate_vmap = deactivate_vmap
        self.chunk_size = chunk_size
        self.num_chunks = num_chunks
        self.chunk_dim = chunk_dim
        self._chosen_randomness: str | None = None

    def calling(self, module: Any) -> "ValueNetwork":
        """Another with the same settings, for another ``module``."""
        other = ValueNetwork(
            module,
            skip_existing=self.skip_existing,
            deactivate_vmap=self.deactivate_vmap,
            chunk_size=self.chunk_size,
            num_chunks=self.num_chunks,
            chunk_dim=self.chunk_dim,
        )
        other._chosen_randomness = self._chosen_randomness
        return other

    @property
    def vmap_randomness(self) -> str:
        """How the network draws under `torch.vmap`: as chosen; else anew for each observation if it draws at all."""
        return _default_randomness(self.module) if self._chosen_randomness is None else self._chosen_randomness

    @vmap_randomness.setter
    def vmap_randomness(self, value: str) -> None:
        self._chosen_randomness = value

    @property
    def in_keys(self) -> list[NestedKey]:
        """What the network reads; nothing without a network."""
        return [] if self.module is None else list(self.module.in_keys)

    def both(
        self,
        data: TensorDictBase,
        next_data: TensorDictBase,
        value_key: NestedKey,
        params: TensorDictBase | None,
        next_params: TensorDictBase | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """The values of ``data`` and ``next_data``, in one call where that is possible."""
        present = any(_present(x, value_key) for x in (data, next_data))
        chunked = self.chunk_size is not None or self.num_chunks is not None
        # Compiled code fails under vmap once a length is dynamic. One draw for both takes one call all the same.
        in_turn = self.deactivate_vmap or (
            (torch.compiler.is_compiling() or is_recurrent(self.module)) and self.vmap_randomness != "same"
        )
        keys = list(data.keys(True, True))
        # Inputs that a network can do without, such as a first hidden state, may be there for one and not the other.
        alike = bool(keys) and set(keys) == set(next_data.keys(True, True))
        # Only tensors are stacked: neither what the network reads as one TensorDict, nor what is no tensor.
        inputs = (x.get(key, None) for x in (data, next_data) for key in self.in_keys)
        alike = alike and all(x is None or isinstance(x, Tensor) for x in inputs)
        alike = alike and not _keeps_statistics(self.module)
        if present or chunked or in_turn or not alike or params is not next_params:
            return (
                self.value(data, value_key, params, **kwargs),
                self.value(next_data, value_key, next_params, **kwargs),
            )

        shape = data.batch_size

        def call(*tensors: Tensor) -> Tensor:
            part = TensorDict({}, shape)
            for key, x in zip(keys, tensors, strict=True):
                part.set(key, x)
            return self.value(part, value_key, params, **kwargs)

        stacked = [torch.stack([data.get(key), next_data.get(key)]) for key in keys]
        value, next_value = torch.vmap(call, randomness=self.vmap_randomness)(*stacked)
        return value, next_value

    def value(self, data: TensorDictBase, value_key: NestedKey, params: TensorDictBase | None, **kwargs: Any) -> Tensor:
        """The value of ``data``, which is left as it is: what is there already, else what the network says.

        Without ``params`` the network's own are used, as constants.
        """
        if _present(data, value_key):
            return data.get(value_key)
        if params is None and torch.is_grad_enabled():
            params = TensorDict.from_module(self.module).detach()
        if params is None:
            return self._call(data, value_key, **kwargs)
        # Not as a context manager: that one leaves `params` in the module when an error passes through it.
        own = params.to_module(self.module, preserve_module_state=False)
        try:
            return self._call(data, value_key, **kwargs)
        finally:
            # Not with `return_swap=False`, which would write into the `params` what a module holds as one TensorDict.
            own.to_module(self.module, preserve_module_state=False)

    def _call(self, data: TensorDictBase, value_key: NestedKey, **kwargs: Any) -> Tensor:
        parts = [self.module(part.copy(), **kwargs).get(value_key) for part in self._parts(data)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self._chunk_dim(data))

    def skips(self) -> bool:
        """Whether values that are present are taken instead of calling the network."""
        return self.module is None or (skip_existing() if self.skip_existing is None else self.skip_existing)

    def _parts(self, data: TensorDictBase) -> tuple[TensorDictBase, ...]:
        if self.num_chunks is not None:
            return data.chunk(self.num_chunks, self._chunk_dim(data))
        if self.chunk_size is not None:
            return data.split(self.chunk_size, self._chunk_dim(data))
        return (data,)

    def _chunk_dim(self, data: TensorDictBase) -> int:
        if not -data.ndim <= self.chunk_dim < data.ndim:
            raise ValueError(
                f"value_chunk_dim is {self.chunk_dim}, but the TensorDict has batch size {tuple(data.batch_size)}"
            )
        return self.chunk_dim % data.ndim


def _present(data: TensorDictBase, key: NestedKey) -> bool:
    return data.get(key, None) is not None


def _keeps_statistics(module: Any) -> bool:
    """Whether layers such as batch normalisation average what they see, which they can't under `torch.vmap`."""
    return isinstance(module, torch.nn.Module) and any(
        layer.training and getattr(layer, "track_running_stats", False) for layer in module.modules()
    )


def _default_randomness(module: Any) -> str:
    """Networks with dropout draw per observation; the others must not draw at all."""
    return "different" if isinstance(module, torch.nn.Module) and is_random(module) else "error"
