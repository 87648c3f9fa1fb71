"""Which class estimates values under which name, and how a loss obtains one.

An estimator class joins with the decorator `register_value_estimator`; losses look it up by a member of
`ValueEstimators`, by that member's name in any case (``"gae"``), or by whatever else it was registered under.
"""

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar

from tensordict import NestedKey

T = TypeVar("T", bound=type)


class ValueEstimators(Enum):
    """The value estimators that a loss can be asked for.

    Examples:
        >>> default_value_kwargs(ValueEstimators.GAE)
        {'gamma': 0.99, 'lmbda': 0.95, 'differentiable': True}

    """

    TD0 = "TD(0): one step, then the value"
    TD1 = "TD(1): the rewards to the end of the trajectory, then the value"
    TDLambda = "TD(λ)"
    GAE = "generalised advantage estimate"
    MAGAE = "multi-agent generalised advantage estimate"
    VTrace = "V-trace"


@dataclass(frozen=True)
class ValueEstimatorEntry:
    """An estimator class and the hyperparameters it gets from a loss that doesn't name them."""

    cls: type
    default_kwargs: dict[str, Any] = field(default_factory=dict)


_entries: dict[Hashable, ValueEstimatorEntry] = {}


def register_value_estimator(value_type: Hashable, *, default_kwargs: dict[str, Any] | None = None) -> Callable[[T], T]:
    """Class decorator: ``value_type`` stands for the decorated class in `build_value_estimator`.

    A loss builds it if its ``SUPPORTED_VALUE_ESTIMATORS`` have ``value_type``; it takes the class itself in any case.

    Args:
        value_type: a member of `ValueEstimators`, of another enum, or a string.
        default_kwargs: hyperparameters used where the caller gives none.

    """

    def register(cls: T) -> T:
        _entries[value_type] = ValueEstimatorEntry(cls, dict(default_kwargs or {}))
        return cls

    return register


def get_value_estimator_entry(value_type: Hashable) -> ValueEstimatorEntry:
    """The entry registered under ``value_type``.

    Raises:
        KeyError: a string that names no estimator.
        TypeError: ``value_type`` is neither a string nor a member of an enum.
        NotImplementedError: nothing is registered under this member of an enum.

    """
    value_type = resolved(value_type)
    if value_type in _entries:
        return _entries[value_type]
    raise NotImplementedError(f"{value_type} is not implemented: no estimator is registered under it")


def default_value_kwargs(value_type: Hashable) -> dict[str, Any]:
    """The default hyperparameters of the estimator registered under ``value_type``, as a new dict."""
    return dict(get_value_estimator_entry(value_type).default_kwargs)


def build_value_estimator(loss_module: Any, value_type: Hashable, **hyperparams: Any) -> Any:
    """A value estimator for ``loss_module``: ``hyperparams`` over the registered defaults.

    The class's ``for_loss`` finds the network that it needs in the loss.
    """
    entry = get_value_estimator_entry(value_type)
    return entry.cls.for_loss(loss_module, **{**entry.default_kwargs, **hyperparams})  # type: ignore[attr-defined]  # what registering asks for


def dispatch_value_estimator(
    loss_module: Any,
    value_type: Hashable,
    *,
    supported: Iterable[Hashable],
    tensor_keys: dict[str, NestedKey] | None = None,
    **hyperparams: Any,
) -> Any:
    """What a loss's ``make_value_estimator`` does: check, build, set keys, and keep the result on the loss.

    Args:
        loss_module: the loss. A ``gamma`` attribute of it is the default discount.
        value_type: the estimator asked for.
        supported: the estimators that the loss can work with.
        tensor_keys: passed to the estimator's ``set_keys``.
        hyperparams: passed to `build_value_estimator`.

    Returns:
        The estimator, which is also ``loss_module._value_estimator``; ``loss_module.value_type`` becomes its type.

    Raises:
        NotImplementedError: ``value_type`` isn't supported.

    """
    value_type = resolved(value_type)
    supported = tuple(supported)
    if value_type not in supported:
        names = ", ".join(getattr(x, "name", str(x)) for x in supported)
        raise NotImplementedError(
            f"{type(loss_module).__name__} does not support the value estimator {value_type}; it supports: {names}"
        )
    gamma = getattr(loss_module, "gamma", None)
    if gamma is not None:
        hyperparams.setdefault("gamma", gamma)
    estimator = build_value_estimator(loss_module, value_type, **hyperparams)
    if tensor_keys is not None:
        estimator.set_keys(**tensor_keys)
    loss_module.value_type = value_type
    loss_module._value_estimator = estimator
    return estimator


def resolved(value_type: Hashable) -> Hashable:
    """The key that ``value_type`` stands for: itself, or the enum member whose name it is, in any case.

    A member of another enum, such as TorchRL's, stands for ours of the same name if it isn't registered itself.
    """
    if value_type in _entries:
        return value_type
    if isinstance(value_type, Enum):
        return ValueEstimators.__members__.get(value_type.name, value_type)
    if not isinstance(value_type, str):
        raise TypeError(
            f"value_type must be a string or a member of an enum, such as ValueEstimators.GAE, but is a "
            f"{type(value_type).__name__}"
        )
    members = {x.name.lower(): x for x in (*ValueEstimators, *_entries) if isinstance(x, Enum)}
    if value_type.lower() not in members:
        names = [*members, *(name for name in _entries if isinstance(name, str))]
        raise KeyError(f"no value estimator is called {value_type!r}; there are: {', '.join(names)}")
    return members[value_type.lower()]
