"""The parameters of a network as a TensorDict: multiplied, copied, shared, and put into the network for a while.

Most modules keep their parameters one by one. Some keep them in one TensorDict (`held_whole`), which is exchanged as a
whole.
"""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.nn import Buffer

Path = tuple[str, ...]
"""Where in the parameters of a network something is."""

Slots = list[tuple[dict[str, Any], str]]
"""Where a network keeps its parameters and buffers: a module's dict, and the name in it."""

Children = tuple[list[dict[str, Any]], list[str], list[nn.Module | None]]
"""Where a network keeps its modules: the dicts, the names in them, and what is there."""


def stacked(members: Sequence[TensorDictParams], shared: set[int]) -> TensorDictParams:
    """The parameters of several networks, stacked along dimension 0.

    Of those in ``shared`` (by id), which all have in common, all members see the one tensor, without gradient.
    """
    for params in members:
        require_initialised(params)
    values: TensorDictBase = torch.stack([params.data for params in members])

    def stack(key: NestedKey, x: Tensor) -> Tensor:
        if id(x) in shared:
            return Buffer(x.data.expand(len(members), *x.shape))
        value = values.get(key)
        return nn.Parameter(value, x.requires_grad) if isinstance(x, nn.Parameter) else Buffer(value)

    return _mapped(members[0], stack, in_front=[len(members)])


def refuse_aliases(network: nn.Module) -> None:
    """Refuse modules that keep their parameters in a TensorDict a second time: others would have no effect on them."""
    own = {id(x) for x in network.parameters()}
    for module in network.modules():
        for name, x in () if isinstance(module, TensorDictParams) else vars(module).items():
            if isinstance(x, TensorDictBase) and any(id(tensor) in own for tensor in x.values(True, True)):
                raise RuntimeError(
                    f"a {type(module).__name__} reads its parameters from the TensorDict {name!r}, where a loss can't "
                    "exchange them: keep them in a TensorDictParams (TorchRL's multi-agent networks do with "
                    "use_td_params=True)"
                )


def ensemble(params: TensorDictParams, size: int, shared: set[int]) -> TensorDictParams:
    """``size`` members stacked along dimension 0, each parameter drawn anew.

    A parameter is drawn uniformly between the least and the greatest of its entries, so that its scale, and
    what is constant in it (the ones of a normalisation layer), stay as they were. The parameters in ``shared`` (by
    id) are trained elsewhere: all members see the one tensor, without gradient.
    """

    def members(_: NestedKey, x: Tensor) -> Tensor:
        if id(x) in shared:
            return Buffer(x.data.expand(size, *x.shape))
        stacked = x.data.expand(size, *x.shape).clone()
        if not isinstance(x, nn.Parameter):
            return Buffer(stacked)
        low, high = x.data.min(), x.data.max()
        return nn.Parameter(low + (high - low) * torch.rand_like(stacked), x.requires_grad)

    return _mapped(params, members, in_front=[size])


def without_shared(params: TensorDictParams, shared: set[int]) -> TensorDictParams:
    """``params`` with those in ``shared`` (by id) detached: they are trained elsewhere and get no gradient here."""
    sources = {key: x for key, x in params.items(True, True) if id(x) in shared}
    return share(params, sources) if sources else params


def share(params: TensorDictParams, sources: dict[NestedKey, Tensor]) -> TensorDictParams:
    """``params`` with the data of ``sources`` in their places, without gradient, for all members of an ensemble."""

    def shared(key: NestedKey, x: Tensor) -> Tensor:
        return Buffer(sources[key].data.expand_as(x)) if key in sources else x

    return _mapped(params, shared)


def replaced(params: TensorDictParams, sources: dict[NestedKey, Tensor]) -> TensorDictParams:
    """``params`` with the tensors ``sources`` themselves in their places."""
    return _mapped(params, lambda key, x: sources.get(key, x))


def joined(params: TensorDictParams, sources: dict[NestedKey, Tensor]) -> TensorDictBase:
    """``params`` of an ensemble, in which all members have the tensors ``sources``, which they train."""
    result = _plain(params).copy()
    for key, x in sources.items():
        result.set(key, x.expand(*params.shape, *x.shape))
    return result


def held_whole(network: nn.Module) -> dict[Path, TensorDictParams]:
    """The TensorDicts in which modules of ``network`` hold parameters, as TorchRL's multi-agent networks do.

    Such a module reads that TensorDict and not its tensors one by one, which is therefore exchanged as a whole.
    """
    modules = network.named_modules(remove_duplicate=False)
    return {tuple(name.split(".")): module for name, module in modules if isinstance(module, TensorDictParams)}


def _plain(x: Any) -> Any:
    """The TensorDict inside a TensorDictParams; anything else as it is."""
    return getattr(x, "_param_td", x)


def without(params: TensorDictBase, whole: Iterable[Path]) -> TensorDictBase:
    """``params`` but for those that are held ``whole``."""
    return _plain(params).exclude(*whole) if whole else params


def parts_of(params: TensorDictBase, whole: Container[Path]) -> list[Any]:
    """The tensors in ``params``, and the TensorDicts that are ``whole``, in one order for all of the same structure."""
    if not whole:
        return list(params.values(True, True))
    return [part for _, part in _parts_of(params, whole)]


def _parts_of(params: TensorDictBase, whole: Container[Path], above: Path = ()) -> Iterator[tuple[Path, Any]]:
    for key, x in params.items():
        path = (*above, key)
        if isinstance(x, TensorDictBase) and path not in whole:
            yield from _parts_of(x, whole, path)
        else:
            yield path, _plain(x)


def places_of(params: TensorDictBase, whole: Container[Path], above: Path = ()) -> Slots | None:
    """The dicts in which nested ``params`` keep their parts, in the order of `parts_of`; None if there are none.

    To read them costs a fraction of `parts_of`.
    """
    params = _plain(params)
    held = getattr(params, "_tensordict", None)
    if held is None:
        return None
    places: Slots = []
    for name, x in params.items():
        path = (*above, name)
        if not isinstance(x, TensorDictBase):
            places.append((held, name))
        elif path in whole:
            places.append((x.__dict__, "_param_td") if isinstance(x, TensorDictParams) else (held, name))
        else:
            below = places_of(x, whole, path)
            if below is None:
                return None
            places += below
    return places


def slots_of(network: nn.Module, params: TensorDictBase, whole: Mapping[Path, TensorDictParams]) -> Slots:
    """The dicts in which the modules of ``network`` keep what is in ``params``, in the order of `parts_of`."""
    slots: Slots = []
    for path, _ in _parts_of(params, whole):
        if path in whole:
            slots.append((whole[path].__dict__, "_param_td"))
            continue
        *above, name = path
        owner = network.get_submodule(".".join(above))
        slots.append((owner._parameters if name in owner._parameters else owner._buffers, name))
    return slots


def hold(slots: Slots, params: TensorDictBase, whole: Container[Path]) -> bool:
    """Whether the ``slots`` hold the very tensors of ``params``, in the same order."""
    held, wanted = (list(_flat(parts)) for parts in ((slot[key] for slot, key in slots), parts_of(params, whole)))
    return len(held) == len(wanted) and all(a is b for a, b in zip(held, wanted, strict=True))


def _flat(parts: Iterable[Any]) -> Iterator[Tensor]:
    for part in parts:
        yield from part.values(True, True) if isinstance(part, TensorDictBase) else (part,)


@contextmanager
def in_slots(slots: Slots, parts: Sequence[Any]) -> Iterator[None]:
    """Within the block ``parts`` are in the ``slots`` of a network; after it, however it ends, what was there.

    What the network assigns to a buffer, such as a running mean computed anew, is written into the one of ``parts``.
    """
    before = [slot[name] for slot, name in slots]
    try:
        for (slot, name), x in zip(slots, parts, strict=True):
            slot[name] = x
        yield
    finally:
        for (slot, name), x, own in zip(slots, parts, before, strict=True):
            assigned = slot[name]
            if assigned is not x and isinstance(x, Buffer) and assigned.shape == x.shape:
                with torch.no_grad():
                    x.copy_(assigned)
            slot[name] = own


@contextmanager
def not_recomputed(network: str) -> Iterator[None]:
    """Within the block gradient checkpointing raises RuntimeError, but for one that is around all of the block.

    It would compute ``network`` anew in the backward pass, with the parameters that are in it by then.
    """
    # Such a checkpoint hooks into how tensors are saved. Where somebody further out does, it can't be forbidden.
    plain = torch.compiler.is_compiling() or not torch.is_grad_enabled()
    if plain or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        yield
        return
    with disable_saved_tensors_hooks(
        f"{network} is an ensemble, whose members share one module: gradient checkpointing (or any other hook on saved "
        "tensors) inside of it would compute it anew with the parameters of another member. Put it around the loss"
    ):
        yield


def children_of(network: nn.Module) -> Children:
    """The places of all modules below ``network``, and the modules that are there."""
    found = [(p._modules, name, m) for p in network.modules() for name, m in p._modules.items()]
    return [x[0] for x in found], [x[1] for x in found], [x[2] for x in found]


@contextmanager
def swapped_in(
    params: TensorDictBase, network: nn.Module, whole: Mapping[Path, TensorDictParams] | None = None
) -> Iterator[None]:
    """Within the block ``network`` has ``params``; after it, however it ends, its own.

    ``whole`` is what `held_whole` says of the network; compiled code needs it.
    """
    whole = {} if whole is None else whole
    before = [held._param_td for held in whole.values()]
    # Not as `to_module`'s own context, which leaves the parameters in the network when the block raises.
    own = without(params, whole).to_module(network, preserve_module_state=False)
    try:
        for path, held in whole.items():
            # Buffers become plain tensors: compiled code can't put a buffer where a module keeps a plain tensor.
            held._param_td = _plain(params.get(path)).apply(lambda x: x if x.requires_grad else x.detach())
        yield
    finally:
        # Not with `return_swap=False`, which would write into the `params` what a module holds as one TensorDict.
        own.to_module(network, preserve_module_state=False)
        for held, part in zip(whole.values(), before, strict=True):
            held._param_td = part


def fill(network: nn.Module, params: TensorDictBase, leave_out: Container[NestedKey] = ()) -> None:
    """Make the parameters and buffers of ``network`` those in ``params``."""
    whole = held_whole(network)
    for name, _ in (
        *network.named_parameters(remove_duplicate=False),  # tied tensors have several places
        *network.named_buffers(remove_duplicate=False),
    ):
        path = tuple(name.split("."))
        key = unravel_key(path)
        if key not in leave_out and not any(path[: len(at)] == at for at in whole):
            owner, _, attribute = name.rpartition(".")
            setattr(network.get_submodule(owner), attribute, params.get(key))
    fill_whole(whole, params, leave_out)


def fill_whole(
    whole: Mapping[Path, TensorDictParams], params: TensorDictBase, leave_out: Container[NestedKey] = ()
) -> None:
    """Make the entries of those that are held ``whole`` those in ``params``."""
    for path, held in whole.items():
        part = _plain(params.get(path)).copy()
        for key in held.keys(True, True):
            if unravel_key((path, key)) in leave_out:
                part.set(key, held.get(key))
        held._param_td = part
        held._reset_params()


def reset_parameters(network: nn.Module, params: TensorDictBase) -> None:
    """Re-initialise ``params`` in place with the ``reset_parameters`` of the network's modules."""
    for member in params.data.unbind(0) if params.ndim else (params.data,):
        with torch.no_grad(), member.to_module(network):
            for module in network.modules():
                reset = getattr(module, "reset_parameters", None)
                if reset is not None:
                    reset()


def delayed_copy(params: TensorDictParams) -> TensorDictParams:
    """A copy of ``params`` made of buffers, for a target network."""
    return _mapped(params, lambda _, x: Buffer(x.data.clone()))


def _mapped(
    params: TensorDictBase, function: Callable[[NestedKey, Tensor], Tensor], in_front: Sequence[int] = ()
) -> TensorDictParams:
    """What ``function`` makes of key and value of each of ``params``; it may add dimensions ``in_front``."""

    def level(params: TensorDictBase, above: Path = ()) -> TensorDict:
        result = TensorDict({}, [*in_front, *params.batch_size])
        for key, x in params.items():
            path = (*above, key)
            nested = isinstance(x, TensorDictBase)
            result.set(key, level(x, path) if nested else function(unravel_key(path), x))
        return result

    require_initialised(params)
    return TensorDictParams(level(params))


def require_initialised(params: TensorDictBase) -> None:
    """Refuse to copy what has no shape yet, since its module is lazy and has not seen data."""
    for key, x in params.items(True, True):
        if nn.parameter.is_lazy(x):
            raise RuntimeError(
                f"the network's parameter {key!r} is not initialised, but is to be copied for a target network or an "
                "ensemble, or to be kept without gradient: call the network once on data before the loss is built"
            )
