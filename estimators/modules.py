"""What estimators and losses ask of any network: what it reads and can lack, where it is, whether it is random."""

import sys
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import Any

import torch
from tensordict import NestedKey, unravel_key
from tensordict.nn import ProbabilisticTensorDictModule, TensorDictModule, TensorDictSequential
from torch import nn

VMAP_RANDOMNESS = ("error", "different", "same")
_random_modules: list[type[nn.Module]] = [torch.nn.modules.dropout._DropoutNd, torch.nn.RReLU]


def add_random_module(module: type[nn.Module]) -> None:
    """Make it known that modules of this class draw random numbers when they're called, as dropout does.

    Networks that contain one then draw anew for each member of an ensemble and for each observation of a pair, where
    they are called under `torch.vmap`; otherwise PyTorch refuses the call.

    Raises:
        TypeError: ``module`` is not a class of modules.

    Examples:
        >>> class Noise(nn.Module):
        ...     def forward(self, x):
        ...         return x + torch.randn_like(x)
        >>> is_random(nn.Sequential(Noise()))
        False
        >>> add_random_module(Noise)
        >>> is_random(nn.Sequential(Noise()))
        True

    """
    if not (isinstance(module, type) and issubclass(module, nn.Module)):
        raise TypeError(f"add_random_module takes a subclass of torch.nn.Module, but got {module!r}")
    if module not in _random_modules:
        _random_modules.append(module)


def is_random(network: nn.Module) -> bool:
    """Whether the network draws random numbers: dropout, and what `add_random_module` made known."""
    return any(isinstance(module, tuple(_random_modules)) for module in network.modules())


def is_recurrent(network: Any) -> bool:
    """Whether the network has a recurrent layer of PyTorch, which has no rule for `torch.vmap`."""
    return isinstance(network, nn.Module) and any(isinstance(module, nn.RNNBase) for module in network.modules())


def device_of(module: Any) -> torch.device | None:
    """Where the parameters of ``module`` are; None if it has none."""
    return next((p.device for p in module.parameters()), None) if isinstance(module, nn.Module) else None


def has_distribution(policy: object) -> bool:
    """Whether a policy draws its action. One that computes it may have a ``get_dist``, too, but not the rest."""
    return hasattr(policy, "get_dist") and hasattr(policy, "dist_sample_keys")


def check_distribution(actor_network: object, owner: str) -> None:
    """Raise TypeError, in the name of its ``owner``, if the policy has no distribution."""
    if not has_distribution(actor_network):
        raise TypeError(
            f"{owner} needs an actor_network that has a distribution, such as a ProbabilisticTensorDictSequential, but "
            f"it is a {type(actor_network).__name__}"
        )


def check_keyed(network: Any, name: str, owner: str) -> None:
    """Raise TypeError, in the name of its ``owner``, for a module that doesn't say what it reads and writes.

    What is no module at all is refused by what takes it apart.
    """
    if isinstance(network, nn.Module) and not (hasattr(network, "in_keys") and hasattr(network, "out_keys")):
        raise TypeError(
            f"{owner} needs {name} to have in_keys and out_keys, as a TensorDictModule has, but it is a "
            f"{type(network).__name__}"
        )


def keys_read(network: nn.Module) -> list[NestedKey]:
    """The entries that ``network`` reads and doesn't itself write a part of."""
    written = [_as_tuple(key) for key in getattr(network, "out_keys", ())]

    def writes_into(key: NestedKey) -> bool:
        path = _as_tuple(key)
        return any(len(out) > len(path) and out[: len(path)] == path for out in written)

    return [unravel_key(key) for key in getattr(network, "in_keys", ()) if not writes_into(key)]


def can_lack(network: Any, key: NestedKey) -> bool:
    """Whether the ``network`` may do without its input ``key``: as far as one can see, the modules that read it may.

    That is: they have a ``forward`` of their own, as recurrent ones that start from zeros; or None is their default.
    """
    if isinstance(network, TensorDictSequential):
        if network.partial_tolerant:  # leaves out the modules whose inputs aren't there
            return True
        for module in network.module:
            if key in map(unravel_key, module.in_keys) and not can_lack(module, key):
                return False
            if key in map(unravel_key, module.out_keys):
                break
        return True
    if isinstance(network, ProbabilisticTensorDictModule):
        return False
    if getattr(type(network), "forward", None) is not TensorDictModule.forward or key not in network.in_keys:
        return True
    try:
        parameters = signature(getattr(network.module, "forward", network.module)).parameters
    except ValueError:  # a function of PyTorch, about which nothing can be found out
        return False
    names = getattr(network, "_kwargs", None) or list(parameters)  # the arguments that the inputs are, or their places
    at = network.in_keys.index(key)
    return at < len(names) and names[at] in parameters and parameters[names[at]].default is None


def _as_tuple(key: NestedKey) -> tuple[str, ...]:
    return (key,) if isinstance(key, str) else tuple(unravel_key(key))


def recurrent_mode() -> AbstractContextManager[None]:
    """Inside the block TorchRL's recurrent networks read sequences ``[*B, T, F]``, and not one step with its state."""
    modules = sys.modules.get("torchrl.modules")  # who has such a network has imported it
    return nullcontext() if modules is None else modules.set_recurrent_mode(True)


def is_of_torchrl(kind: type, name: str, module: str) -> bool:
    """Whether ``kind`` is the class ``name`` of ``torchrl.<module>``, which isn't imported for it."""
    return kind.__name__ == name and kind.__module__ == f"torchrl.{module}"
