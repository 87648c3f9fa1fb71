"""What every loss is made of: keys, networks and their parameters, a value estimator, reduction."""

import os
import warnings
from abc import ABCMeta
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from functools import reduce
from inspect import Signature, signature
from numbers import Real
from operator import and_
from typing import Any, ClassVar

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import InteractionType, set_interaction_type
from tensordict.utils import unravel_key
from torch import Tensor, nn

from ..estimators.base import PADDING_MASK, SHIFTED_VALID, owned
from ..estimators.modules import keys_read, recurrent_mode
from ..estimators.precision import dtypes_kept
from ..estimators.steps import any_right
from .distributed import findable
from .keys import KeyedModule, checked_key
from .networks import FunctionalModule
from .reduction import align, check_reduction, reduce_loss, without_padding
from .utils import ValueEstimators, dispatch_value_estimator

AUTO_LOSS_MASK_KEYS: tuple[NestedKey, ...] = (PADDING_MASK, SHIFTED_VALID)
"""The entries that mark the valid steps of padded data; a step counts if all of those that are there say so."""


class _LossType(ABCMeta):
    """What surrounds the construction of every loss, abstract ones too."""

    @property
    def __signature__(cls) -> Signature:
        """The constructor's, not that of `__call__`."""
        of_init = signature(cls.__init__)  # type: ignore[misc]  # cls is the very class that is constructed
        return of_init.replace(parameters=list(of_init.parameters.values())[1:])

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        for name in ("gamma", "lmbda"):
            if name in kwargs and name not in cls.__signature__.parameters:
                raise TypeError(
                    f"{cls.__name__} takes no {name}: call make_value_estimator(ValueEstimators.<name>, "
                    f"{name}={kwargs[name]!r}) on the loss"
                )
        loss = super().__call__(*args, **kwargs)
        # Not when they're first needed: that may be inside a compiled function, which can't make a module, and is
        # compiled anew for what it found missing.
        loss._in_keys = loss.in_keys
        if loss.default_value_estimator in loss.SUPPORTED_VALUE_ESTIMATORS and loss._value_estimator is None:
            loss._default_value_estimator()
            loss._value_estimator_used = False
        return loss


class LossModule(KeyedModule, FunctionalModule, metaclass=_LossType):
    """Base class of the losses: reads a TensorDict, returns one with ``loss_*`` entries and metrics.

    A loss names the entries it reads in a dataclass ``_AcceptedKeys``, whose fields a user renames with `set_keys`;
    takes its networks apart with `convert_to_functional`; and computes in ``forward``,
    decorated with ``tensordict.nn.dispatch`` so that it can be called with keyword tensors too. It is called
    with the distributions' deterministic sample in force (``deterministic_sampling_mode``), and TorchRL's recurrent
    networks in recurrent mode: they read sequences.

    A lazy network, whose parameters have no shape before it sees data, is initialised by the first call of a loss that
    keeps no copy of it. Before a loss that does is built (an ensemble, a target network), and before one that needs its
    constant parameters first (the critic that advantages are estimated with), call it once on data.

    Steps that are there only as padding don't count. The attribute ``loss_mask_key`` says which: with ``"auto"``, its
    default, those with a False in an entry of `AUTO_LOSS_MASK_KEYS`; with a key, those with a False there; with None,
    none. Where the data has no such entry, all steps count. Importance weights of a prioritised replay buffer (the key
    ``priority_weight``, if the loss has it and ``use_prioritized_weights`` is not False) weigh the samples.

    Args:
        reduction: ``"mean"`` (None), ``"sum"`` or ``"none"``.

    Raises:
        ValueError: ``reduction`` is something else.
        TypeError: ``gamma`` or ``lmbda`` is given to a loss that has no such argument.

    Examples:
        >>> from dataclasses import dataclass
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule, dispatch
        >>> class Prediction(LossModule):
        ...     @dataclass
        ...     class _AcceptedKeys:
        ...         target: NestedKey = "target"
        ...     out_keys = ["loss_prediction"]
        ...     def __init__(self, network):
        ...         super().__init__()
        ...         self.convert_to_functional(network, "network")
        ...         self.in_keys = ["x", "target"]  # follows when the target is renamed
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

    default_value_estimator: ValueEstimators | None = None
    SUPPORTED_VALUE_ESTIMATORS: tuple[ValueEstimators, ...] = ()
    deterministic_sampling_mode = InteractionType.DETERMINISTIC
    use_prioritized_weights: bool | str = "auto"
    _schedulable_buffers: ClassVar[frozenset[str]] = frozenset()
    """The coefficients of this class that can be assigned numbers; those of its bases can too."""

    _all_schedulable_buffers: ClassVar[frozenset[str]] = frozenset()

    value_type: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._all_schedulable_buffers = cls._schedulable_buffers.union(
            *(base._all_schedulable_buffers for base in cls.__bases__ if issubclass(base, LossModule))
        )

    def __init__(self, reduction: str | None = None) -> None:
        super().__init__()
        self.reduction = check_reduction(reduction)
        self.loss_mask_key: NestedKey | None = "auto"
        self._value_estimator: Any = None
        self._value_estimator_used = False
        self.value_type = self.default_value_estimator
        self.register_state_dict_post_hook(_leave_out_unused_estimator)
        self.register_load_state_dict_pre_hook(_expect_no_unused_estimator)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run ``forward`` on sequences, with deterministic samples; warn if target networks have no updater."""
        if not torch.compiler.is_compiling():
            self._warn_of_idle_targets()
            self._absent.clear()
        try:
            with set_interaction_type(self.deterministic_sampling_mode), recurrent_mode():
                out = super().__call__(*args, **kwargs)
        except Exception as error:
            lacking = None if torch.compiler.is_compiling() else self._lacking(error)
            if lacking is None:
                raise
            raise lacking from error
        # Whether tensordict.nn's own hook selects depends on the optional in_keys being there.
        chosen = getattr(self, "_out_keys_apparent", None)
        if isinstance(out, TensorDictBase) and chosen is not None and chosen != getattr(self, "_out_keys", None):
            out = out.select(*chosen)
        return out if torch.compiler.is_compiling() else findable(out, self)

    def _warn_of_idle_targets(self) -> None:
        idle = [name for name, associated in self._has_update_associated.items() if not associated]
        if idle and os.environ.get("RL_WARNINGS", "1").lower() not in ("0", "false", "no", "off"):
            warnings.warn(
                f"{type(self).__name__} has target parameters ({', '.join(idle)}), but no target network updater "
                "has been associated with it. Create a SoftUpdate or a HardUpdate, or update them yourself and set "
                "the environment variable RL_WARNINGS to False.",
                stacklevel=3,
            )

    # --- keys ---------------------------------------------------------------------------------------------------

    def set_keys(self, **keys: NestedKey | list[NestedKey] | None) -> None:
        """Rename entries; None gives an entry its default name back. The value estimator follows.

        Raises:
            ValueError: the loss has no entry of that name.
            KeyError: the value estimator can't read an entry by its new name. The loss keeps the names it had.

        """
        before = copy(self._tensor_keys), self._in_keys
        super().set_keys(**keys)
        try:
            self._forward_value_estimator_keys(**keys)
        except (KeyError, ValueError):
            self._tensor_keys, self._in_keys = before
            raise
        self._set_in_keys()

    def _set_in_keys(self) -> None:
        """For subclasses that assign ``in_keys``: called when keys were renamed."""

    def _forward_value_estimator_keys(self, **keys: Any) -> None:
        """Tell the value estimator, if there is one, the names of the entries that it shares with the loss."""
        if self._value_estimator is None:
            return
        current = vars(self._value_estimator.tensor_keys)
        shared = {name: getattr(self.tensor_keys, name) for name in keys if name in current}
        self._value_estimator.set_keys(**{name: key for name, key in shared.items() if key != current[name]})

    def _find_in_keys(self) -> Iterator[NestedKey]:
        yield from super()._find_in_keys()
        networks = [getattr(self, name) for name in self._network_names()]
        written = {unravel_key(key) for network in networks for key in getattr(network, "out_keys", ())}
        for network in networks:
            for key in keys_read(network):
                yield key
                if key not in written:  # such as the next action, which the policy writes
                    yield unravel_key(("next", key))

    # --- value estimator ----------------------------------------------------------------------------------------

    def _marked_padding(self, tensordict: TensorDictBase) -> TensorDictBase:
        """``tensordict``, or a copy with the loss's mask, and no other, where a value estimator looks for one."""
        if self.loss_mask_key == "auto":
            return tensordict
        mask = None if self.loss_mask_key is None else tensordict.get(self.loss_mask_key, None)
        if mask is not None:
            return tensordict.copy().set(PADDING_MASK, mask)
        return tensordict if tensordict.get(PADDING_MASK, None) is None else tensordict.exclude(PADDING_MASK)

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
        before = self._value_estimator, self.value_type
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
        try:
            self._forward_value_estimator_keys(**vars(self.tensor_keys))
        except (KeyError, ValueError):
            self._value_estimator, self.value_type = before
            raise
        return self

    def _default_value_estimator(self) -> None:
        """Make the value estimator that the loss has if nobody chose one."""
        if self.default_value_estimator is None:
            raise NotImplementedError(
                f"{type(self).__name__} has no value estimator by default: call make_value_estimator"
            )
        self.make_value_estimator(self.default_value_estimator)

    @property
    def value_estimator(self) -> Any:
        """The value estimator: that of `make_value_estimator`, else the loss's default.

        Raises:
            NotImplementedError: the loss has no default and none was made.

        """
        if self._value_estimator is None:
            self._default_value_estimator()
        # Not by way of torch.nn.Module, which first looks for a parameter, buffer or module of that name.
        object.__setattr__(self, "_value_estimator_used", True)
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

        A tensor is copied, unless it requires grad. A coefficient of ``_schedulable_buffers`` is assigned in place:
        ``loss.entropy_coeff = 0.003``. ``device`` defaults to that of the parameters, ``dtype`` to the default
        floating dtype.

        Raises:
            ValueError: ``value`` is not a number.

        """
        if value is None:
            setattr(self, name, None)
            return
        if isinstance(value, bool) or not isinstance(value, (Real, Tensor)):
            raise ValueError(f"{name} must be a number or a 0-d tensor, but is {value!r}")
        if isinstance(value, Tensor):
            value = _of_one_element(name, value)
        if dtype is None:
            dtype = value.dtype if isinstance(value, Tensor) else torch.get_default_dtype()
        if device is None:
            device = next((p.device for p in self.parameters()), None)
        self.__dict__.pop(name, None)
        self.register_buffer(name, owned(torch.as_tensor(value, dtype=dtype), device))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "use_prioritized_weights" and value not in (True, False, "auto"):
            raise ValueError(f"use_prioritized_weights is {value!r}; it can be True, False or 'auto'")
        if name == "loss_mask_key" and value is not None:
            value = checked_key(name, value)
        if name in self._all_schedulable_buffers and isinstance(value, (Real, Tensor)):
            buffer = self._buffers.get(name)
            if buffer is None:
                self.register_coeff_buffer(name, value)  # type: ignore[arg-type]  # NumPy's numbers are such
            else:
                if isinstance(value, Tensor) and buffer.ndim == 0:
                    value = _of_one_element(name, value)
                with torch.no_grad():
                    # A number is written on the device: to copy it there would wait for all that the device has to do.
                    buffer.copy_(value) if isinstance(value, Tensor) else buffer.fill_(value)
            return
        if name in ("value_estimator", "_value_estimator"):
            name = "_value_estimator"
            self._value_estimator_used = value is not None
        super().__setattr__(name, value)
        unused = name == "gamma" and not self.__dict__.get("_value_estimator_used", True)
        if unused and self._value_estimator is not None:
            self._default_value_estimator()  # which takes its discount from the loss
            self._value_estimator_used = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LossModule":
        """As of `torch.nn.Module`, but a coefficient keeps its dtype: 0.01 isn't a number of bfloat16."""
        with dtypes_kept(self, names=self._all_schedulable_buffers):
            super()._apply(fn, recurse)
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
        trailing = loss.ndim > (0 if tensordict is None else tensordict.ndim) and loss.shape[-1] == 1
        return loss.squeeze(-1) if reduction == "none" and trailing else loss

    def _metric(self, x: Tensor, tensordict: TensorDictBase) -> Tensor:
        """Mean of ``x`` over the samples that count, without gradient."""
        return reduce_loss(x.detach(), "mean", self._mask(tensordict, x))

    def _mask(self, tensordict: TensorDictBase | None, like: Tensor) -> Tensor | None:
        """The samples that count (`loss_mask_key`), in the shape of ``like``; None if all do."""
        if tensordict is None:
            return None
        masks = [align(mask, like, f"the mask {key!r}") for key, mask in self._masks(tensordict)]
        return reduce(and_, masks) if masks else None

    def _mask_keys(self) -> tuple[NestedKey, ...]:
        """Where masks are looked for."""
        if self.loss_mask_key is None:
            return ()
        return AUTO_LOSS_MASK_KEYS if self.loss_mask_key == "auto" else (self.loss_mask_key,)

    def _masks(self, tensordict: TensorDictBase) -> list[tuple[NestedKey, Tensor]]:
        """Where there are masks, and the masks."""
        keys, masks = self._mask_keys(), []
        present = tensordict.keys() if keys else ()
        for key in keys:
            if (key if isinstance(key, str) else key[0]) not in present:
                continue
            mask = tensordict.get(key, None)
            if mask is not None:
                masks.append((key, mask != 0))
        return masks

    def _padding_filled(
        self, data: TensorDictBase, tensordict: TensorDictBase, fill: Mapping[NestedKey, float | None]
    ) -> TensorDictBase:
        """``data`` with other numbers at the steps of ``tensordict`` that don't count; itself if all do, else a copy.

        What padding holds would reach the gradients through a network or a distribution, as 0 · NaN, or other samples
        where a network mixes them. The entries in ``fill`` are 0 there (None); or the number given, where they aren't
        finite, since a distribution may not take 0.
        """
        masks = [(key, any_right(mask, tensordict.ndim)) for key, mask in self._masks(tensordict)]
        if not masks:
            return data
        data = data.copy()
        for key, number in [(leaf, number) for entry, number in fill.items() for leaf in _leaves(data, entry)]:
            x = data.get(key)
            if isinstance(x, Tensor) and x.is_floating_point():
                kept = reduce(and_, (align(mask, x, f"the mask {at!r}") for at, mask in masks))
                kept = kept if number is None else kept | x.isfinite()
                data.set(key, torch.where(kept, x, number or 0))
        return data

    def _only_valid(self, x: Tensor, tensordict: TensorDictBase) -> Tensor:
        """``x`` with 0 at the steps that don't count, see `without_padding`."""
        mask = None if x.dtype == torch.bool else self._mask(tensordict, x)  # which need not fit a bool
        return without_padding(x, mask)

    def _priority_weights(self, tensordict: TensorDictBase | None, like: Tensor) -> Tensor | None:
        key = getattr(self.tensor_keys, "priority_weight", None)
        if tensordict is None or key is None or self.use_prioritized_weights is False:
            return None
        names = tensordict.keys()
        if isinstance(key, str) and key not in names:  # which says so sooner than `get`
            return None
        weights = tensordict.get(key, None)
        return None if weights is None else align(weights, like, f"{key!r}")


def _of_one_element(name: str, value: Tensor) -> Tensor:
    """``value`` as a 0-d tensor."""
    if value.numel() != 1:
        raise ValueError(f"{name} must be a number, but has shape {tuple(value.shape)}")
    return value.reshape(())


def _leaves(data: TensorDictBase, key: NestedKey) -> list[NestedKey]:
    """The entry ``key``, or those below it; none if it isn't there."""
    x = data.get(key, None)
    if isinstance(x, TensorDictBase):
        return [unravel_key((key, below)) for below in x.keys(True, True)]
    return [] if x is None else [key]


def _leave_out_unused_estimator(loss: LossModule, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """An estimator that nobody asked for or used is not part of what is saved."""
    if not loss._value_estimator_used:
        for key in [key for key in state_dict if key.startswith(f"{prefix}_value_estimator.")]:
            del state_dict[key]


def _expect_no_unused_estimator(loss: LossModule, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Saved before the default estimator was used: then it stays as it is. Otherwise it is loaded."""
    if loss._value_estimator is None or loss._value_estimator_used:
        return
    prefix = f"{prefix}_value_estimator."
    if any(key.startswith(prefix) for key in state_dict):
        loss._value_estimator_used = True
    else:
        loss._value_estimator.state_dict(destination=state_dict, prefix=prefix)
