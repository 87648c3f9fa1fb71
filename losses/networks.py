"""Networks as pure functions: a module split into its parameters and a copy that holds none.

A loss calls a network with the parameters of its choice (trained, target, one of an ensemble, detached), which are put
into it for the time of the call.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from operator import is_
from typing import Any, TypeAlias

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor, nn

from ..estimators.modules import VMAP_RANDOMNESS, is_random
from .ensemble import Perceptron
from .parameters import (
    Children,
    Path,
    Slots,
    children_of,
    delayed_copy,
    ensemble,
    fill,
    fill_whole,
    held_whole,
    hold,
    in_slots,
    joined,
    parts_of,
    places_of,
    refuse_aliases,
    replaced,
    reset_parameters,
    share,
    slots_of,
    stacked,
    swapped_in,
    without,
    without_shared,
)

Entry = tuple[str, NestedKey]
"""A parameter of a loss: the network, and where in its parameters."""

Parameters: TypeAlias = TensorDictBase | Sequence[Any]
"""Parameters of a network: by their names, or in the order of `parts_of`."""

_ABSENT = object()


class FunctionalModule(TensorDictModuleBase):
    """A module that holds the parameters of its networks apart from the networks (`convert_to_functional`)."""

    _vmap_randomness: str | None = None

    def __init__(self) -> None:
        super().__init__()
        self._functional_networks: dict[str, nn.Module] = {}
        # Of each network, what it has of one before it: as a view of its data, since it is a constant here
        # (`compare_against`) or is there for all members of an ensemble; or the tensor itself.
        self._shared: dict[str, dict[NestedKey, Entry]] = {}
        self._common: dict[str, dict[NestedKey, Entry]] = {}
        # Of what an ensemble shares, what it trains.
        self._trained: dict[str, dict[NestedKey, Entry]] = {}
        self._has_update_associated: dict[str, bool] = {}
        self._slots: dict[str, Slots] = {}
        self._has_buffers: dict[str, bool] = {}
        self._children: dict[str, Children] = {}
        self._whole: dict[str, dict[Path, TensorDictParams]] = {}
        self._own_params: dict[str, TensorDictBase | None] = {}
        self._perceptrons: dict[str, Perceptron | None] = {}
        self._random: dict[str, bool] = {}
        self._places: dict[str, list[tuple[TensorDictBase, Slots]]] = {}
        self._reads: dict[tuple[str, ...], list[NestedKey]] = {}
        self.register_load_state_dict_pre_hook(_load_shared_once)

    def convert_to_functional(
        self,
        module: nn.Module | list[nn.Module] | tuple[nn.Module, ...],
        module_name: str,
        expand_dim: int | None = None,
        create_target_params: bool = False,
        compare_against: Iterable[Tensor] | None = None,
    ) -> None:
        """Take ``module`` apart: a network ``<name>``, its ``<name>_params`` and ``target_<name>_params``.

        The network is ``module`` itself and ``<name>_params`` are its own parameters, not copies: training the loss
        trains the module. That of an ensemble is ``module`` too, or the first of several, but with its parameters it
        is left alone: it has those of a member while that is asked. ``target_<name>_params`` are never parameters of
        the loss.

        Args:
            module: the network, or several (a list or tuple) that become an ensemble.
            module_name: its name in the loss.
            expand_dim: make an ensemble of that many members, each drawn anew (see `ensemble`), stacked
                along dimension 0 of the parameters; several that are given aren't drawn anew. Each member has
                parameters of its own, but for those that several that are given all have in common with a network
                that was taken apart before, such as the policy's trunk: the ensemble trains that one, too.
            create_target_params: keep ``target_<name>_params`` as a copy, in buffers, for an updater to move;
                otherwise they are the current parameters, without gradient.
            compare_against: parameters that are trained by another network: here they get no gradient.

        Raises:
            TypeError: ``module`` is no module, nor several.
            RuntimeError: what would be copied isn't initialised (lazy modules): all of an ensemble or of a network
                with a target, and what is in ``compare_against``. Or a parameter can't be exchanged for another.

        """
        several = isinstance(module, list | tuple)
        modules: list[nn.Module] = list(module) if several else [module]  # type: ignore[arg-type, list-item]
        for m in modules:
            if not isinstance(m, nn.Module):
                raise TypeError(f"{type(self).__name__} needs a module as {module_name}, but it is {m!r}")
            refuse_aliases(m)
        members = [TensorDict.from_module(m, as_module=True) for m in modules]
        everywhere = [{id(x) for x in params.values(True, True)} for params in members]
        shared = {id(x) for x in compare_against or ()}.intersection(*everywhere)
        params, network = members[0], modules[0]
        self._shared[module_name] = self._found_elsewhere(params, shared)
        self._trained[module_name] = {}
        if several:
            trained = {id(x) for x in params.parameters()}.intersection(*everywhere) - shared
            self._trained[module_name] = self._found_elsewhere(params, trained)
            self._shared[module_name] |= self._trained[module_name]
            params = stacked(members, shared | {id(params.get(key)) for key in self._trained[module_name]})
        elif expand_dim:
            params = ensemble(params, expand_dim, shared)
        else:
            params = without_shared(params, shared)
        self._common[module_name] = self._found_elsewhere(params, {id(x) for x in params.values(True, True)})
        # Not among the registered modules: what is trained and saved are the parameters.
        self._functional_networks[module_name] = self.__dict__[module_name] = network
        # Not when it's first needed, which may be in compiled code, where a module may not be looked into at any time.
        self._random[module_name] = is_random(network)
        setattr(self, f"{module_name}_params", params)
        if create_target_params:
            setattr(self, f"target_{module_name}_params", delayed_copy(params))
            self._has_update_associated[module_name] = False
        self._find_slots(module_name)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            network = name.removeprefix("target_").removesuffix("_params")
            if name == f"target_{network}_params" and network in self.__dict__.get("_functional_networks", ()):
                return getattr(self, f"{network}_params").data
            raise

    @property
    def functional(self) -> bool:
        """Whether the networks are called with parameters that the loss holds; else they are used as they are."""
        return len(self._functional_networks) > 0

    def _network_names(self) -> list[str]:
        """The names of the networks, taken apart or not."""
        # Not `named_children`, which makes a set of the modules: the compiler of PyTorch 2.11 refuses to.
        registered = [name for name, m in self._modules.items() if m is not None and name.endswith("_network")]
        return list(self._functional_networks) + registered

    def _parameters_in(self, name: str, *, target: bool = False, detach: bool = False) -> AbstractContextManager[Any]:
        """Within the block the network ``name`` has its current parameters, or those that the options say."""
        if name not in self._functional_networks:
            return nullcontext()
        return self._with_parameters(name, self._parameters_of(name, target=target, detach=detach))

    def _parameters_of(self, name: str, *, target: bool = False, detach: bool = False) -> Parameters:
        """The current parameters of the network ``name``, or those that the options say."""
        if target and name not in self._has_update_associated:  # a network without delay is its own target
            # Detached, too, if the network could assign to a buffer: as its own target it may not.
            target, detach = False, detach or torch.is_grad_enabled() or self._has_buffers[name]
        params = getattr(self, f"target_{name}_params" if target else f"{name}_params")
        if self._trained[name] and not (target or detach):
            params = joined(params, self._sources(self._trained[name]))
        if torch.compiler.is_compiling():  # which follows what happens to a TensorDict, and not what happens to slots
            return params.detach() if detach else params
        if params is self._own_params[name] and not detach:
            return params
        parts = self._parts_of(name, params)
        return [x.detach() for x in parts] if detach else parts

    def _parts_of(self, name: str, params: TensorDictBase) -> list[Any]:
        """`parts_of` the ``params`` of the network ``name``."""
        for known, places in self._places[name]:
            if params is known:
                return [place[key] for place, key in places]
        return parts_of(params, self._whole[name])

    def _with_parameters(self, name: str, params: Parameters) -> AbstractContextManager[Any]:
        """Within the block the network ``name`` has ``params``, such as those of one member of an ensemble."""
        if torch.compiler.is_compiling():
            if params is self._own_params[name]:
                return nullcontext()
            if isinstance(params, TensorDictBase):
                return swapped_in(params, self._functional_networks[name], self._whole[name])
            return in_slots(self._slots[name], params)
        parts = self._parts_of(name, params) if isinstance(params, TensorDictBase) else params
        where, keys, modules = self._children[name]
        if not all(map(is_, map(dict.get, where, keys), modules)):
            self._find_slots(name)  # a layer was exchanged
        there = [slot.get(key, _ABSENT) for slot, key in self._slots[name]]
        if params is self._own_params[name] and all(map(is_, there, parts)):
            return nullcontext()
        if any(x is _ABSENT for x in there):  # others were put into the network, some as buffers
            self._find_slots(name)
        return in_slots(self._slots[name], parts)

    def _find_slots(self, name: str) -> None:
        """Where the network ``name`` keeps its parameters, whether they are the loss's own, and what network it is."""
        network, params = self._functional_networks[name], getattr(self, f"{name}_params")
        self._reads.clear()
        self._whole[name] = whole = held_whole(network)
        self._slots[name] = slots_of(network, params, whole)
        self._has_buffers[name] = any(True for _ in network.buffers())
        self._children[name] = children_of(network)
        own = hold(self._slots[name], params, whole)
        self._own_params[name] = params if own else None
        self._places[name] = []
        for kept in (params, self._modules.get(f"target_{name}_params")):
            places = None if kept is None else places_of(kept, whole)
            if places is not None and hold(places, kept, whole):
                self._places[name].append((kept, places))
        self._perceptrons[name] = Perceptron.of(network, params) if params.ndim else None

    def get_stateful_net(self, network_name: str, copy: bool = True) -> nn.Module:
        """The network with the loss's own parameters in it (not copies), such as for a policy that collects data.

        Args:
            network_name: its name in the loss.
            copy: put them in a copy of the network; otherwise in the loss's own.

        Raises:
            AttributeError: the loss has no such network.

        """
        network = getattr(self, network_name)
        if network_name not in self._functional_networks:
            return network
        if copy:
            network = deepcopy(network)
        params, whole = getattr(self, f"{network_name}_params"), held_whole(network)
        without(params, whole).to_module(network, return_swap=False)
        fill_whole(whole, params)
        return network

    def from_stateful_net(self, network_name: str, stateful_net: nn.Module) -> None:
        """Copy the parameters of ``stateful_net``, made by `get_stateful_net`, into the loss.

        Raises:
            RuntimeError: the network has other parameters than the loss; nothing is copied then.

        """
        if network_name not in self._functional_networks:
            getattr(self, network_name).load_state_dict(stateful_net.state_dict())
            return
        found, held = TensorDict.from_module(stateful_net), getattr(self, f"{network_name}_params")
        shapes, wanted = ({key: x.shape for key, x in params.items(True, True)} for params in (found, held))
        other = [key for key in {**wanted, **shapes} if shapes.get(key) != wanted.get(key)]
        if other:
            raise RuntimeError(
                f"{network_name} can't take the parameters of this network, which differ in number or shape: {other}"
            )
        held.data.update_(found.data)

    def reset_parameters_recursive(self, parameters: TensorDictBase | None = None) -> None:
        """Initialise all networks anew, target networks as copies of the others."""
        if parameters is not None or not self.functional:
            super().reset_parameters_recursive(parameters)
            return
        for name, network in self._functional_networks.items():
            reset_parameters(network, getattr(self, f"{name}_params"))
        for name in self._has_update_associated:  # once all are reset, since they may have modules in common
            getattr(self, f"target_{name}_params").data.update_(getattr(self, f"{name}_params").data)

    def _found_elsewhere(self, params: TensorDictBase, shared: set[int]) -> dict[NestedKey, Entry]:
        """Which of the ``params`` in ``shared`` (by id) are those of which network that was taken apart before."""
        elsewhere = {
            id(x): (name, key)
            for name in self._functional_networks
            for key, x in getattr(self, f"{name}_params").items(True, True)
        }
        return {key: elsewhere[id(x)] for key, x in params.items(True, True) if id(x) in shared and id(x) in elsewhere}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FunctionalModule":
        # Converts parameters in place, but puts new tensors in the place of buffers.
        super()._apply(fn, recurse)
        self._tie()
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Slots and places are dicts of modules and TensorDicts, which know what of theirs can be pickled.
        return {**self.__dict__, "_slots": {}, "_children": {}, "_places": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy is made of each tensor for itself, wherever it occurs.
        super().__setstate__(state)
        self._tie()

    def _tie(self) -> None:
        """Make one tensor again of what is in several places: in two networks, or in a network and in the loss."""
        for name, network in self._functional_networks.items():
            shared, common = self._sources(self._shared[name]), self._sources(self._common[name])
            params = getattr(self, f"{name}_params")
            if shared:
                params = share(params, shared)
            if any(params.get(key) is not x for key, x in common.items()):
                params = replaced(params, common)
            if params is not getattr(self, f"{name}_params"):
                setattr(self, f"{name}_params", params)
            if params.ndim == 0:
                fill(network, params, leave_out=set(shared))
        for name in self._functional_networks:  # once all are filled, since they may have modules in common
            self._find_slots(name)

    def _sources(self, entries: dict[NestedKey, Entry]) -> dict[NestedKey, Tensor]:
        return {key: getattr(self, f"{other}_params").get(at) for key, (other, at) in entries.items()}

    def train(self, mode: bool = True) -> "FunctionalModule":
        """Training mode of the loss and of its networks."""
        super().train(mode)
        for network in self._functional_networks.values():
            network.train(mode)
        return self

    @property
    def vmap_randomness(self) -> str:
        """What random modules do in an ensemble under `torch.vmap`: ``"different"`` if there are any.

        See `set_vmap_randomness`.
        """
        if self._vmap_randomness is not None:
            return self._vmap_randomness
        registered = (name for name in self._network_names() if name not in self._functional_networks)
        random = any(self._random.values()) or any(is_random(getattr(self, name)) for name in registered)
        found = "different" if random else "error"
        if not torch.compiler.is_compiling():  # what is kept now would be found changed in the next call
            self._vmap_randomness = found
        return found

    def set_vmap_randomness(self, value: str) -> None:
        """Choose ``"error"``, ``"different"`` or ``"same"``, see `torch.vmap`.

        Raises:
            ValueError: ``value`` is something else.

        """
        if value not in VMAP_RANDOMNESS:
            raise ValueError(f"vmap randomness is {value!r}; it can be {', '.join(map(repr, VMAP_RANDOMNESS))}")
        self._vmap_randomness = value


def _load_shared_once(module: FunctionalModule, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """What an ensemble shares with another network is loaded there: its own entry, a view for all members, follows."""
    for name, entries in module._shared.items():
        params = getattr(module, f"{name}_params")
        for key in entries if params.ndim else ():
            path = key if isinstance(key, str) else ".".join(key)
            state_dict[f"{prefix}{name}_params.{path}"] = params.get(key)
