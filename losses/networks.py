"""Networks as pure functions: a module split into its parameters and a copy that holds none.

A loss calls a network with the parameters of its choice (trained, target, one of an ensemble, detached):

    with params.to_module(network):
        network(tensordict)
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn
from torch.nn import Buffer

M = TypeVar("M", bound=nn.Module)

RANDOM_MODULES = (nn.modules.dropout._DropoutNd, nn.RReLU)


def stateless(module: M) -> M:
    """A copy of ``module`` whose parameters and buffers have shapes but no data (device ``meta``).

    Raises:
        RuntimeError: the module is lazy and has not seen data yet, so that its parameters have no shape.

    """
    memo: dict[int, Tensor] = {}
    for name, x in (*module.named_parameters(), *module.named_buffers()):
        if nn.parameter.is_lazy(x):
            raise RuntimeError(
                f"{name} of the {type(module).__name__} is not initialised: call the network once on data before the "
                "loss is built"
            )
        empty = torch.empty_like(x, device="meta")
        memo[id(x)] = nn.Parameter(empty, x.requires_grad) if isinstance(x, nn.Parameter) else empty
    return copy.deepcopy(module, memo)


def parameters_of(module: nn.Module | Sequence[nn.Module]) -> TensorDictParams:
    """The parameters and buffers of ``module`` itself, not copies; those of several modules are stacked."""
    if isinstance(module, nn.Module):
        return TensorDict.from_module(module, as_module=True)
    each = [TensorDict.from_module(m, as_module=True) for m in module]
    stacked: TensorDictBase = torch.stack([params.data for params in each])  # type: ignore[assignment, arg-type]  # TensorDicts stack like tensors
    trained = {key: x.requires_grad for key, x in each[0].items(True, True) if isinstance(x, nn.Parameter)}
    result = TensorDict({}, [len(each)])
    for key, x in stacked.items(True, True):
        result.set(key, nn.Parameter(x, trained[key]) if key in trained else Buffer(x))
    return TensorDictParams(result)


def ensemble(params: TensorDictParams, size: int, shared: Iterable[Tensor]) -> TensorDictParams:
    """``size`` members stacked along dimension 0, each parameter drawn anew.

    A parameter is drawn uniformly between the least and the greatest of its entries, so that its scale, and
    what is constant in it (the ones of a normalisation layer), stay as they were. The parameters in ``shared`` are
    trained elsewhere: all members see the one tensor, without gradient.
    """
    shared_ids = {id(x) for x in shared}

    def members(x: Tensor) -> Tensor:
        if id(x) in shared_ids:
            return Buffer(x.data.expand(size, *x.shape))
        stacked = x.data.expand(size, *x.shape).clone()
        if not isinstance(x, nn.Parameter):
            return Buffer(stacked)
        low, high = x.data.min(), x.data.max()
        return nn.Parameter(low + (high - low) * torch.rand_like(stacked), x.requires_grad)

    return _mapped(params, members, [size])


def without_shared(params: TensorDictParams, shared: Iterable[Tensor]) -> TensorDictParams:
    """``params`` with those in ``shared`` detached: they are trained elsewhere and get no gradient here."""
    shared_ids = {id(x) for x in shared}
    if not any(id(x) in shared_ids for x in params.parameters()):
        return params
    return _mapped(params, lambda x: Buffer(x.data) if id(x) in shared_ids else x, [])


def reset_parameters(network: nn.Module, params: TensorDictBase) -> None:
    """Re-initialise ``params`` in place with the ``reset_parameters`` of the network's modules."""
    for member in params.data.unbind(0) if params.ndim else (params.data,):
        with torch.no_grad(), member.to_module(network):
            for module in network.modules():
                reset = getattr(module, "reset_parameters", None)
                if reset is not None:
                    reset()


def is_random(network: nn.Module) -> bool:
    """Whether the network draws random numbers (dropout)."""
    return any(isinstance(module, RANDOM_MODULES) for module in network.modules())


def keys_read(network: nn.Module) -> list[NestedKey]:
    """The entries that ``network`` reads and doesn't itself write a part of."""
    written = [_as_tuple(key) for key in getattr(network, "out_keys", ())]

    def writes_into(key: NestedKey) -> bool:
        path = _as_tuple(key)
        return any(len(out) > len(path) and out[: len(path)] == path for out in written)

    return [unravel_key(key) for key in getattr(network, "in_keys", ()) if not writes_into(key)]


def delayed_copy(params: TensorDictParams) -> TensorDictParams:
    """A copy of ``params`` made of buffers, for a target network."""
    return _mapped(params, lambda x: Buffer(x.data.clone()), params.batch_size)


def _mapped(
    params: TensorDictBase, function: Callable[[Tensor], Tensor], batch_size: Sequence[int]
) -> TensorDictParams:
    result = TensorDict({}, batch_size)
    for key, x in params.items(True, True):
        result.set(key, function(x))
    return TensorDictParams(result)


def _as_tuple(key: NestedKey) -> tuple[str, ...]:
    return (key,) if isinstance(key, str) else tuple(unravel_key(key))
