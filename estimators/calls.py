"""Networks called on TensorDicts, with less around the call: estimators and losses only want their tensors.

A ``TensorDictModule`` may be told where to write, to skip what is there already, or to take keyword tensors, and looks
for all of that in every call: several times what a small network costs. `call` and `distribution` go straight
to the modules inside where a network is nothing but them, and leave everything else to the network.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, is_non_tensor
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
    skip_existing,
)
from tensordict.nn.probabilistic import interaction_type
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .heads import PolicyDistribution, distribution_of
from .modules import is_of_torchrl


def call(network: Any, tensordict: TensorDictBase) -> TensorDictBase:
    """``network(tensordict)``: reads its in_keys, writes its out_keys into ``tensordict``, and returns that.

    Examples:
        >>> import torch
        >>> network = TensorDictModule(nn.Identity(), ["observation"], ["copy"])
        >>> call(network, TensorDict({"observation": torch.ones(2)}, [2]))["copy"]
        tensor([1., 1.])

    """
    if skip_existing():
        return network(tensordict)
    if is_plain(network):
        return _call_module(network, tensordict)
    modules = called_in_turn(network)
    if modules is None:
        return network(tensordict)
    for module in modules:
        tensordict = call(module, tensordict)
    return tensordict


def is_plain(network: Any) -> bool:
    """Whether a call of ``network`` is a call of its ``module`` on its in_keys, and nothing else."""
    return (
        _has_methods_of(TensorDictModule, network, "forward", "__call__", "_call_module", "_write_to_tensordict")
        and not is_watched(network)
        and network.inplace is True
        and network.method is None
        and network._kwargs is None
        and not (network.method_kwargs or network._get_kwargs or network.strict)
    )


def called_in_turn(network: Any) -> list[Any] | None:
    """The modules of a sequence ``network`` of which a call is a call of each of them, and nothing else; else None."""
    if (
        not _has_methods_of(TensorDictSequential, network, "forward", "__call__", "_run_module", "_module_iter")
        or network.inplace not in (None, True)
        or network.partial_tolerant
        or network._select_before_return
        or is_watched(network)
    ):
        return None
    modules = network.module
    return [*modules] if isinstance(modules, nn.ModuleList) else None


def written_by(network: Any, tensordict: TensorDictBase) -> Mapping[NestedKey, Tensor]:
    """What ``network`` writes when it reads ``tensordict``, which is left as it is.

    Examples:
        >>> import torch
        >>> data = TensorDict({"observation": torch.ones(2)}, [2])
        >>> written_by(TensorDictModule(nn.Identity(), ["observation"], ["copy"]), data)
        {'copy': tensor([1., 1.])}

    """
    if skip_existing():
        return network(tensordict.copy())
    return written_in_turn([network], tensordict)


def written_in_turn(networks: Iterable[Any], tensordict: TensorDictBase) -> Mapping[NestedKey, Tensor]:
    """What ``networks`` write one after the other, each of which reads what those before it wrote, see `written_by`."""
    modules = _plain_modules(networks)
    if modules is None:
        tensordict = tensordict.copy()
        for network in networks:
            tensordict = call(network, tensordict)
        return tensordict
    if len(modules) == 1:
        return _asked(modules[0], tensordict)
    entries = _Entries(tensordict)
    for module in modules:
        entries.written.update(_asked(module, entries))
    return entries.written


def distribution(policy: Any, tensordict: TensorDictBase, *, write: bool = False) -> PolicyDistribution:
    """``policy.get_dist(tensordict)``, which leaves ``tensordict`` as it is; see `distribution_of`.

    With ``write``, what the policy's networks find is written into it.
    """
    last = _last_of(policy)
    if last is None:
        return policy.get_dist(tensordict if write else tensordict.copy())
    if write:
        return distribution_of(last, call(policy._det_part, tensordict))
    found = written_in_turn([policy._det_part], tensordict)
    if all(key in found for key in last.in_keys):
        return distribution_of(last, found)
    tensordict = tensordict.copy()
    for key, x in found.items():
        tensordict.set(key, x)
    return distribution_of(last, tensordict)


def distribution_from_parameters(policy: Any, tensordict: TensorDictBase) -> PolicyDistribution:
    """``policy.build_dist_from_params(tensordict)``; see `distribution_of`."""
    last = _last_of(policy)
    return policy.build_dist_from_params(tensordict) if last is None else distribution_of(last, tensordict)


class _Entries:
    """A TensorDict and what was written since, without writing it there."""

    def __init__(self, tensordict: TensorDictBase) -> None:
        self.tensordict = tensordict
        self.written: dict[NestedKey, Tensor] = {}

    def get(self, key: NestedKey, default: Any = None) -> Any:
        """The entry ``key``, ``default`` if there is none."""
        x = self.written.get(key)
        return self.tensordict.get(key, default) if x is None else x


def _plain_modules(networks: Iterable[Any]) -> list[Any] | None:
    """The networks that ``networks`` are sequences of, if `_asked` can ask all of them; else None.

    An entry that one of them writes whole and another reads a part of, or the other way round, is beyond it, too.
    """
    modules: list[Any] = []
    for network in networks:
        if is_plain(network) or _is_log_softmax(network):
            modules.append(network)
            continue
        inner = called_in_turn(network)
        plain = None if inner is None else _plain_modules(inner)
        if plain is None:
            return None
        modules += plain
    return None if len(modules) > 1 and _share_a_part(modules) else modules


def _share_a_part(modules: list[Any]) -> bool:
    """Whether one of ``modules`` may write below an entry that another reads, or read below one that another writes."""
    written: set[NestedKey] = set()
    for module in modules:
        for key in module.in_keys:
            if isinstance(key, tuple) and key[0] in written:
                return True
        for key in module.out_keys:
            if isinstance(key, tuple):
                return True
            written.add(key)
    return False


def _is_log_softmax(network: Any) -> bool:
    """Whether ``network`` is TorchRL's last layer of a distributional network, and no more than that."""
    return (
        is_of_torchrl(type(network), "DistributionalDQNnet", "modules.tensordict_module.common")
        and "forward" not in network.__dict__
        and not is_watched(network)
    )


def _log_softmax(*logits: Tensor) -> tuple[Tensor, ...]:
    """Log-probabilities of logits ``[*B, atoms, actions]``."""
    return tuple(x.log_softmax(-2) for x in logits)


def _last_of(policy: Any) -> ProbabilisticTensorDictModule | None:
    """Its last module, if that makes the distribution of what ``_det_part`` finds, and nothing else does; else None.

    Until tensordict 0.15 a policy asked its ``det_part``, which is deprecated since, and a class could have its own.
    """
    methods = "get_dist", "get_dist_params", "build_dist_from_params", "det_part"
    if (
        not _has_methods_of(ProbabilisticTensorDictSequential, policy, *methods)
        or getattr(policy, "_det_part", None) is None
        or policy.return_composite
        or interaction_type() is None  # the policy's own decides what is drawn on the way
        or skip_existing()
    ):
        return None
    modules = policy.module
    last = modules[-1] if isinstance(modules, nn.ModuleList) else None
    plain = isinstance(last, ProbabilisticTensorDictModule) and _has_methods_of(
        ProbabilisticTensorDictModule, last, "get_dist"
    )
    return last if plain else None


def _has_methods_of(kind: type, network: Any, *names: str) -> bool:
    """Whether the methods ``names`` of ``network`` are those of the class ``kind``: neither overridden nor patched."""
    own, cls = network.__dict__, type(network)
    for name in names:
        if name in own:
            return False
    if cls is kind:
        return True
    inherits = None if torch.compiler.is_compiling() else _known_to_inherit.get((cls, names))
    if inherits is None:
        inherits = all(getattr(cls, name, None) is getattr(kind, name, None) for name in names)
        if not torch.compiler.is_compiling():  # which would guard all that is known
            _known_to_inherit[cls, names] = inherits
    return inherits


_known_to_inherit: dict[tuple[type, tuple[str, ...]], bool] = {}


def is_watched(network: nn.Module) -> bool:
    """Whether hooks run around the network's call, such as the one that selects its out_keys, or those of all calls."""
    return bool(
        network._forward_hooks
        or network._forward_pre_hooks
        or network._backward_hooks
        or network._backward_pre_hooks
        or _has_any_global_hook()
    )


def _call_module(network: Any, tensordict: TensorDictBase) -> TensorDictBase:
    for key, x in _asked(network, tensordict).items():
        tensordict.set(key, x)
    return tensordict


def _value_of(x: Any) -> Any:
    """An entry as a module takes it: of what is no tensor, the value."""
    if not is_non_tensor(x):
        return x
    return x.tolist(as_linked_list=True) if isinstance(x, TensorDictBase) else x.data


def _asked(network: Any, entries: "TensorDictBase | _Entries") -> dict[NestedKey, Tensor]:
    """What a ``network`` that is plain, or a log-softmax of TorchRL, says of its entries."""
    given = [entries.get(key, None) for key in network.in_keys]
    tensors = [x if isinstance(x, Tensor) else _value_of(x) for x in given]
    module = _log_softmax if _is_log_softmax(network) else network.module
    try:
        found = module(*tensors)
    except Exception:
        if any(x is None for x in tensors):
            there = {key: x for key, x in zip(network.in_keys, tensors, strict=True) if x is not None}
            network(TensorDict(there))  # which says what is missing
        raise
    keys = network.out_keys
    if isinstance(found, Tensor):
        if len(keys) == 1 and keys[0] != "_":
            return {keys[0]: found}
        found = (found,)
    elif found is None:
        found = ()
    elif isinstance(found, (dict, TensorDictBase)) and all(key in found for key in keys):
        found = tuple(found[key] for key in keys)
    elif not isinstance(found, tuple):
        found = (found,)
    if len(found) != len(keys):
        raise RuntimeError(f"the network writes {keys}, but its module returned {len(found)} tensors")
    return {
        key: x if isinstance(x, Tensor) else TensorDict.from_any(x)
        for key, x in zip(keys, found, strict=True)
        if key != "_"
    }
