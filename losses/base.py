"""What every loss is made of: keys, networks and their parameters, a value estimator, reduction."""

import copy
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from inspect import signature
from typing import Any, ClassVar

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import InteractionType, TensorDictModuleBase, set_interaction_type
from tensordict.utils import unravel_key
from torch import Tensor, nn

from .networks import (
    delayed_copy,
    ensemble,
    is_random,
    keys_read,
    parameters_of,
    reset_parameters,
    stateless,
    without_shared,
)
from .reduction import align, check_reduction, reduce_loss
from .utils import ValueEstimators, dispatch_value_estimator

AUTO_LOSS_MASK_KEYS: tuple[NestedKey, ...] = (("collector", "mask"), "shifted_valid")
"""The entries that mark the valid steps of padded data; the first that is there is used."""

NEXT_KEYS = ("reward", "done", "terminated")
"""The keys whose entries are read under "next"."""

VMAP_RANDOMNESS = ("error", "different", "same")


class LossModule(TensorDictModuleBase):
    """Base class of the losses: reads a TensorDict, returns one with ``loss_*`` entries and metrics.

    A loss names the entries it reads in a dataclass ``_AcceptedKeys`` (``default_keys``), whose fields a user
    renames with `set_keys`; takes its networks apart with `convert_to_functional`; and computes in ``forward``,
    decorated with ``tensordict.nn.dispatch`` so that it can be called with keyword tensors too. It is called
    with the distributions' deterministic sample in force (``deterministic_sampling_mode``).

    Steps that are there only as padding don't count: `loss_mask_key` says which. Importance weights of a
    prioritised replay buffer (the key ``priority_weight``, if the loss has it and ``use_prioritized_weights`` is
    not False) weigh the samples.

    Args:
        reduction: ``"mean"`` (None), ``"sum"`` or ``"none"``.

    Raises:
        ValueError: ``reduction`` is something else.
        TypeError: ``gamma`` or ``lmbda`` is given to a loss that has no such argument.

    Examples:
        >>> from tensordict.nn import TensorDictModule, dispatch
        >>> class Prediction(LossModule):
        ...     @dataclass
        ...     class _AcceptedKeys:
        ...         target: NestedKey = "target"
        ...     default_keys = _AcceptedKeys
        ...     out_keys = ["loss_prediction"]
        ...     def __init__(self, network):
        ...         super().__init__()
        ...         self.convert_to_functional(network, "network")
        ...         self.in_keys = ["x", "target"]
        ...     @dispatch
        ...     def forward(self, tensordict):
        ...         self._require(tensordict, "target", networks=["network"])
        ...         with self._parameters_in("network"):
        ...             prediction = self.network(tensordict.copy()).get("prediction")
        ...         loss = (prediction - self._get(tensordict, "target")).square()
        ...         return TensorDict({"loss_prediction": self._reduce_loss(loss, tensordict)})
        >>> net = TensorDictModule(nn.Linear(2, 1, bias=False), ["x"], ["prediction"])
        >>> _ = nn.init.ones_(net.module.weight)
        >>> Prediction(net)(x=torch.ones(3, 2), target=torch.zeros(3, 1))
        tensor(4., grad_fn=<MeanBackward0>)

    """

    @dataclass
    class _AcceptedKeys:
        """The entries a loss reads; `set_keys` renames them."""

    default_keys: type = _AcceptedKeys
    default_value_estimator: ValueEstimators | None = None
    SUPPORTED_VALUE_ESTIMATORS: tuple[ValueEstimators, ...] = ()
    deterministic_sampling_mode = InteractionType.DETERMINISTIC
    use_prioritized_weights: bool | str = "auto"
    _schedulable_buffers: ClassVar[frozenset[str]] = frozenset()
    """The coefficients of this class that can be assigned numbers; those of its bases can too."""

    value_type: Any
    _vmap_randomness: str | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> "LossModule":  # noqa: D102
        for name in ("gamma", "lmbda"):
            if name in kwargs and name not in signature(cls.__init__).parameters:
                raise TypeError(
                    f"{cls.__name__} takes no {name}: call loss.make_value_estimator("
                    f"ValueEstimators.<estimator>, {name}={kwargs[name]!r}) on the loss"
                )
        return super().__new__(cls, *args, **kwargs)

    def __init__(self, reduction: str | None = None) -> None:
        super().__init__()
        self.reduction = check_reduction(reduction)
        self.loss_mask_key: NestedKey | None = "auto"
        self._tensor_keys = self.default_keys()
        self._in_keys: list[NestedKey] | None = None
        self._value_estimator: Any = None
        self.value_type = self.default_value_estimator
        self._stateless: dict[str, nn.Module] = {}
        self._has_update_associated: dict[str, bool] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run ``forward`` with deterministic samples in force; warn if target networks have no updater."""
        if not torch.compiler.is_compiling():
            self._warn_of_idle_targets()
        with set_interaction_type(self.deterministic_sampling_mode):
            return super().__call__(*args, **kwargs)

    # --- keys ---------------------------------------------------------------------------------------------------

    @property
    def tensor_keys(self) -> Any:
        """The entries that the loss reads, under the names that `set_keys` takes."""
        return self._tensor_keys

    def set_keys(self, **keys: NestedKey | list[NestedKey] | None) -> None:
        """Rename entries; None gives an entry its default name back. The value estimator follows.

        Raises:
            ValueError: the loss has no entry of that name.

        """
        accepted = [field.name for field in fields(self.default_keys)]
        for name in keys:
            if name not in accepted:
                raise ValueError(f"{name} is not a key of {type(self).__name__}; its keys are: {', '.join(accepted)}")
        default = self.default_keys()
        for name, key in keys.items():
            if key is None:
                key = getattr(default, name)
            setattr(self._tensor_keys, name, key if isinstance(key, list) else unravel_key(key))
        self._in_keys = None
        if self._value_estimator is not None:
            self._forward_value_estimator_keys(**keys)

    def _forward_value_estimator_keys(self, **keys: Any) -> None:
        """Tell the value estimator the names of the entries that it shares with the loss."""
        known = {field.name for field in fields(self._value_estimator.default_keys)}
        self._value_estimator.set_keys(**{name: getattr(self.tensor_keys, name) for name in keys if name in known})

    @property
    def in_keys(self) -> list[NestedKey]:
        """The entries to read, and the keyword arguments of a call without a TensorDict."""
        if self._in_keys is None:
            self._in_keys = list(dict.fromkeys(self._find_in_keys()))
        return self._in_keys

    @in_keys.setter
    def in_keys(self, keys: Iterable[NestedKey]) -> None:
        self._in_keys = [unravel_key(key) for key in keys]

    def _find_in_keys(self) -> Iterator[NestedKey]:
        """What the tensor keys and the networks say that a loss reads; duplicates are allowed."""
        names = {field.name for field in fields(self.default_keys)}
        if "action" in names:
            yield from self._keys("action")
        for name in NEXT_KEYS:
            if name in names:
                yield from self._keys(name)
        for name in self._network_names():
            for key in keys_read(getattr(self, name)):
                yield key
                yield unravel_key(("next", key))

    def _keys(self, name: str) -> list[NestedKey]:
        """The entry, or the several entries (one per action head), that the key ``name`` stands for."""
        key = getattr(self.tensor_keys, name)
        if name in NEXT_KEYS:
            return [unravel_key(("next", key))]
        return key if isinstance(key, list) else [key]

    def _get(self, tensordict: TensorDictBase, name: str) -> Tensor:
        """The entry that the key ``name`` stands for; KeyError if it's missing."""
        self._require(tensordict, name)
        return tensordict.get(*self._keys(name))

    def _require(self, tensordict: TensorDictBase, *names: str, networks: Iterable[str] = ()) -> None:
        """Check that what the keys ``names`` and the ``networks`` read is there.

        Raises:
            KeyError: an entry is missing; the message says how to rename it.

        """
        for name in names:
            self._require_entries(tensordict, self._keys(name), f"rename it with set_keys({name}=...)")
        for name in networks:
            keys = keys_read(getattr(self, name))
            self._require_entries(tensordict, keys, f"it is one of the in_keys of {name}")

    def _require_entries(self, tensordict: TensorDictBase, keys: Iterable[NestedKey], hint: str) -> None:
        """Check that the entries ``keys`` are there; the ``hint`` is for the message of the KeyError."""
        for key in keys:
            if tensordict.get(key, None) is None:
                present = ", ".join(sorted(map(repr, tensordict.keys(True, True))))
                raise KeyError(f"{type(self).__name__} needs the entry {key!r} ({hint}), but the input has: {present}")

    def _require_shape(self, x: Tensor, key: NestedKey, of: Tensor, of_key: NestedKey) -> None:
        """Refuse what would broadcast by accident.

        Raises:
            RuntimeError: ``x`` and ``of`` have different shapes.

        """
        if x.shape != of.shape:
            raise RuntimeError(
                f"{type(self).__name__}: {key!r} has shape {tuple(x.shape)}, but {of_key!r} has shape "
                f"{tuple(of.shape)}: both must agree"
            )

    # --- networks -----------------------------------------------------------------------------------------------

    def convert_to_functional(
        self,
        module: nn.Module | list[nn.Module],
        module_name: str,
        expand_dim: int | None = None,
        create_target_params: bool = False,
        compare_against: Iterable[Tensor] | None = None,
    ) -> None:
        """Take ``module`` apart: ``<name>`` without parameters, ``<name>_params`` and ``target_<name>_params``.

        ``<name>_params`` are the module's own parameters, not copies: training the loss trains the module.
        ``target_<name>_params`` are never parameters of the loss.

        Args:
            module: the network, or a list of networks that become an ensemble.
            module_name: its name in the loss.
            expand_dim: make an ensemble of that many members, each drawn anew (see `ensemble`), stacked
                along dimension 0 of the parameters; a list isn't drawn anew.
            create_target_params: keep ``target_<name>_params`` as a copy, in buffers, for an updater to move;
                otherwise they are the current parameters, without gradient.
            compare_against: parameters that are trained by another network: here they get no gradient.

        Raises:
            RuntimeError: a parameter isn't initialised (lazy modules).

        """
        shared = list(compare_against or ())
        params = parameters_of(module)
        if isinstance(module, list):
            module = module[0]
        elif expand_dim:
            params = ensemble(params, expand_dim, shared)
        else:
            params = without_shared(params, shared)
        # Kept out of the registered modules: what is trained and saved are the parameters.
        self._stateless[module_name] = stateless(module)
        self.__dict__[module_name] = self._stateless[module_name]
        setattr(self, f"{module_name}_params", params)
        if create_target_params:
            setattr(self, f"target_{module_name}_params", delayed_copy(params))
            self._has_update_associated[module_name] = False
        self._in_keys = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            network = name.removeprefix("target_").removesuffix("_params")
            if name == f"target_{network}_params" and network in self.__dict__.get("_stateless", ()):
                return getattr(self, f"{network}_params").data
            raise

    @property
    def functional(self) -> bool:
        """Whether the networks are called with parameters that the loss holds; else they are used as they are."""
        return bool(self._stateless)

    def _network_names(self) -> list[str]:
        """The names of the networks, taken apart or not."""
        registered = [name for name, m in self.named_children() if name.endswith("_network")]
        return list(self._stateless) + registered

    def _parameters_in(self, name: str, *, target: bool = False, detach: bool = False) -> AbstractContextManager[Any]:
        """Within the block the network ``name`` has its current parameters, or those that the options say."""
        if name not in self._stateless:
            return nullcontext()
        params = getattr(self, f"target_{name}_params" if target else f"{name}_params")
        return (params.detach() if detach else params).to_module(self._stateless[name])

    def get_stateful_net(self, network_name: str, copy: bool = True) -> nn.Module:
        """The network with the loss's own parameters in it (not copies), such as for a policy that collects data.

        Args:
            network_name: its name in the loss.
            copy: put them in a copy of the network; otherwise in the loss's own.

        Raises:
            AttributeError: the loss has no such network.

        """
        network = getattr(self, network_name)
        if network_name not in self._stateless:
            return network
        if copy:
            network = _copy(network)
        getattr(self, f"{network_name}_params").to_module(network, return_swap=False)
        return network

    def from_stateful_net(self, network_name: str, stateful_net: nn.Module) -> None:
        """Copy the parameters of ``stateful_net``, made by `get_stateful_net`, into the loss."""
        if network_name not in self._stateless:
            getattr(self, network_name).load_state_dict(stateful_net.state_dict())
            return
        params = TensorDict.from_module(stateful_net)
        getattr(self, f"{network_name}_params").data.update_(params.data)

    def reset_parameters_recursive(self, parameters: TensorDictBase | None = None) -> None:
        """Initialise all networks anew, target networks as copies of the others."""
        if parameters is not None or not self.functional:
            super().reset_parameters_recursive(parameters)
            return
        for name, network in self._stateless.items():
            params = getattr(self, f"{name}_params")
            reset_parameters(network, params)
            if name in self._has_update_associated:
                getattr(self, f"target_{name}_params").data.update_(params.data)

    def train(self, mode: bool = True) -> "LossModule":
        """Training mode of the loss and of its networks."""
        super().train(mode)
        for network in self._stateless.values():
            network.train(mode)
        return self

    @property
    def vmap_randomness(self) -> str:
        """What random modules do in an ensemble under `torch.vmap`: ``"different"`` if there are any.

        See `set_vmap_randomness`.
        """
        if self._vmap_randomness is None:
            random = any(is_random(getattr(self, name)) for name in self._network_names())
            self._vmap_randomness = "different" if random else "error"
        return self._vmap_randomness

    def set_vmap_randomness(self, value: str) -> None:
        """Choose ``"error"``, ``"different"`` or ``"same"``, see `torch.vmap`.

        Raises:
            ValueError: ``value`` is something else.

        """
        if value not in VMAP_RANDOMNESS:
            raise ValueError(f"vmap randomness is {value!r}; it can be {', '.join(map(repr, VMAP_RANDOMNESS))}")
        self._vmap_randomness = value

    def _warn_of_idle_targets(self) -> None:
        idle = [name for name, associated in self._has_update_associated.items() if not associated]
        if idle and os.environ.get("RL_WARNINGS", "1").lower() not in ("0", "false", "no", "off"):
            warnings.warn(
                f"{type(self).__name__} has target parameters ({', '.join(idle)}), but no target network updater "
                "has been associated with it. Create a SoftUpdate or a HardUpdate, or update them yourself and set "
                "the environment variable RL_WARNINGS to False.",
                stacklevel=3,
            )

    # --- value estimator ----------------------------------------------------------------------------------------

    def make_value_estimator(self, value_type: Any = None, **hyperparams: Any) -> "LossModule":
        """Choose how returns and advantages are estimated.

        Args:
            value_type: a member of `ValueEstimators`, its name, an estimator class, or an estimator. None: the
                loss's default.
            hyperparams: of the estimator; defaults are those of `default_value_kwargs`. For a class, its
                constructor's arguments.

        Returns:
            The loss.

        Raises:
            NotImplementedError: the loss doesn't support this estimator; the message lists those it does.
            TypeError: hyperparameters are given with an estimator that exists already.

        """
        if value_type is None:
            value_type = self.default_value_estimator
        if isinstance(value_type, nn.Module):
            if hyperparams:
                raise TypeError(
                    f"make_value_estimator got a {type(value_type).__name__}, which has its hyperparameters, and "
                    f"also {', '.join(hyperparams)}"
                )
            self._value_estimator = value_type
            self.value_type = type(value_type)
        elif isinstance(value_type, type):
            self._value_estimator = value_type(**hyperparams)
            self.value_type = value_type
        else:
            dispatch_value_estimator(self, value_type, supported=self.SUPPORTED_VALUE_ESTIMATORS, **hyperparams)
        self._forward_value_estimator_keys(**vars(self.tensor_keys))
        return self

    @property
    def value_estimator(self) -> Any:
        """The value estimator; the default one is made when it's first needed."""
        if self._value_estimator is None:
            self.make_value_estimator()
        return self._value_estimator

    # --- coefficients -------------------------------------------------------------------------------------------

    def register_coeff_buffer(
        self,
        name: str,
        value: float | Tensor | None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Keep a coefficient as a buffer, so that a schedule can change it without recompiling; None is kept as it is.

        A coefficient of ``_schedulable_buffers`` is assigned in place: ``loss.entropy_coeff = 0.003``.
        ``device`` defaults to that of the parameters, ``dtype`` to the default floating dtype.

        Raises:
            ValueError: ``value`` is not a number.

        """
        if value is None:
            setattr(self, name, None)
            return
        if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
            raise ValueError(f"{name} must be a number or a 0-d tensor, but is {value!r}")
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"{name} must be a number or a 0-d tensor, but has shape {tuple(value.shape)}")
        if dtype is None:
            dtype = value.dtype if isinstance(value, Tensor) else torch.get_default_dtype()
        if device is None:
            device = next((p.device for p in self.parameters()), None)
        self.__dict__.pop(name, None)
        self.register_buffer(name, torch.as_tensor(value, dtype=dtype, device=device))

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, (int, float, Tensor)) and name in self._coefficients():
            buffer = self._buffers.get(name)
            if buffer is None:
                self.register_coeff_buffer(name, value)
            else:
                with torch.no_grad():
                    buffer.copy_(torch.as_tensor(value, device=buffer.device))
            return
        super().__setattr__(name, value)

    @classmethod
    def _coefficients(cls) -> frozenset[str]:
        return frozenset().union(*(vars(base).get("_schedulable_buffers", ()) for base in cls.__mro__))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LossModule":
        """As of `torch.nn.Module`, but a coefficient keeps its dtype: 0.01 isn't a number of bfloat16."""
        kept = {name: self._buffers[name] for name in self._coefficients() if self._buffers.get(name) is not None}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            self._buffers[name] = value.to(self._buffers[name].device)
        return self

    def reset(self) -> None:
        """Put what the loss adapts while it trains back to its start; nothing, unless a loss says otherwise."""

    # --- reduction ----------------------------------------------------------------------------------------------

    def _reduce_loss(
        self,
        loss: Tensor,
        tensordict: TensorDictBase | None = None,
        *,
        mask: Tensor | None = None,
        reduction: str | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Reduce one loss per sample, shape ``[*B]`` or ``[*B, 1]``, as the loss's ``reduction`` says.

        Args:
            loss: the loss per sample; "none" returns it without the last dimension if that is 1.
            tensordict: where the mask and the importance weights are found.
            mask: instead of that found; see `reduce_loss`.
            reduction: instead of the loss's own.
            weights: instead of those found.

        """
        mask = self._mask(tensordict, loss) if mask is None else align(mask, loss, "the mask")
        weights = self._priority_weights(tensordict, loss) if weights is None else align(weights, loss, "weights")
        reduction = self.reduction if reduction is None else check_reduction(reduction)
        loss = reduce_loss(loss, reduction, mask, weights)
        return loss.squeeze(-1) if reduction == "none" and loss.ndim and loss.shape[-1] == 1 else loss

    def _metric(self, x: Tensor, tensordict: TensorDictBase) -> Tensor:
        """Mean of ``x`` over the samples that count, without gradient."""
        return reduce_loss(x.detach(), "mean", self._mask(tensordict, x))

    def _mask(self, tensordict: TensorDictBase | None, like: Tensor) -> Tensor | None:
        """The samples that count (`loss_mask_key`), in the shape of ``like``; None if all do."""
        if tensordict is None or self.loss_mask_key is None:
            return None
        keys = AUTO_LOSS_MASK_KEYS if self.loss_mask_key == "auto" else (self.loss_mask_key,)
        for key in keys:
            mask = tensordict.get(key, None)
            if mask is not None:
                return align(mask != 0, like, f"the mask {key!r}")
        return None

    def _priority_weights(self, tensordict: TensorDictBase | None, like: Tensor) -> Tensor | None:
        key = getattr(self.tensor_keys, "priority_weight", None)
        if tensordict is None or key is None or self.use_prioritized_weights is False:
            return None
        weights = tensordict.get(key, None)
        return None if weights is None else align(weights, like, f"{key!r}")


def _copy(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module)
