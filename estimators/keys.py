"""The entries of a value estimator: their names, how a user renames them, and what is said when one is missing."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from tensordict import NestedKey, TensorDictBase, unravel_key
from tensordict.nn import TensorDictModuleBase, composite_lp_aggregate
from torch import Tensor

from .value_network import ValueNetwork

# Keys that can stand for several entries, one for each head of the action.
ONE_PER_HEAD = ("action", "sample_log_prob")


def _key_in_use(name: str) -> property:
    return property(lambda self: getattr(self.tensor_keys, name), doc=f"The key in use for {name}; see `set_keys`.")


class KeyedEstimator(TensorDictModuleBase):
    """A module with a value network, and a dataclass of keys, ``_AcceptedKeys``, whose fields `set_keys` renames."""

    _network: ValueNetwork

    @dataclass
    class _AcceptedKeys:
        """Keys that `set_keys` can rename; reward, done and terminated are read under ``"next"``."""

        advantage: NestedKey = "advantage"
        value_target: NestedKey = "value_target"
        value: NestedKey = "state_value"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        steps_to_next_obs: NestedKey = "steps_to_next_obs"
        sample_log_prob: NestedKey | list[NestedKey] | None = None

        def __post_init__(self) -> None:
            if self.sample_log_prob is None:
                self.sample_log_prob = "sample_log_prob" if composite_lp_aggregate() else "action_log_prob"

    default_keys = _AcceptedKeys

    def __init__(self) -> None:
        super().__init__()
        self._tensor_keys = self._AcceptedKeys()

    @property
    def tensor_keys(self) -> _AcceptedKeys:
        """The keys in use."""
        return self._tensor_keys

    def set_keys(self, **keys: NestedKey | list[NestedKey]) -> None:
        """Rename entries of the TensorDict, as in ``set_keys(value="my_value", reward=("agents", "reward"))``.

        Raises:
            KeyError: no such entry, or the value network doesn't write the new value key.
            ValueError: not a key.

        """
        known = [f.name for f in fields(self._AcceptedKeys)]
        for name, key in keys.items():
            if name not in known:
                raise KeyError(f"{type(self).__name__} has no key {name!r}; it has: {', '.join(known)}")
            if not isinstance(key, str | tuple) and not (isinstance(key, list) and name in ONE_PER_HEAD):
                raise ValueError(f"the key {name!r} must be a str or a tuple of str, but is {key!r}")
            if name == "value":
                check_written(key, self._network.module)
        self._tensor_keys = self._AcceptedKeys(**{**asdict(self._tensor_keys), **keys})

    # The keys in use by a name of their own, as TorchRL's estimators have them.
    advantage_key = _key_in_use("advantage")
    value_target_key = _key_in_use("value_target")
    value_key = _key_in_use("value")
    reward_key = _key_in_use("reward")
    done_key = _key_in_use("done")
    terminated_key = _key_in_use("terminated")
    steps_to_next_obs_key = _key_in_use("steps_to_next_obs")
    sample_log_prob_key = _key_in_use("sample_log_prob")

    @property
    def in_keys(self) -> list[NestedKey]:
        """What `forward` reads."""
        return list(dict.fromkeys(self._find_in_keys()))

    # Not in the property, which the compiler can't follow into that of a base class.
    def _find_in_keys(self) -> list[NestedKey]:
        keys = self._tensor_keys
        value_inputs = [keys.value] if self._network.module is None else self._network.in_keys
        masks = [under_next(keys.reward), under_next(keys.done), under_next(keys.terminated)]
        return [*value_inputs, *masks, *(under_next(key) for key in value_inputs)]

    @property
    def out_keys(self) -> list[NestedKey]:
        """What `forward` returns when it is called with tensors: all it has, or what select_out_keys left."""
        return self.__dict__.get("_out_keys_apparent", self._all_out_keys)

    @out_keys.setter
    def out_keys(self, keys: list[NestedKey]) -> None:
        # Assigned by reset_out_keys alone; the full list must go on following set_keys.
        self.__dict__.pop("_out_keys_apparent", None)
        if list(keys) != self._all_out_keys:
            self._out_keys_apparent = list(keys)

    @property
    def _all_out_keys(self) -> list[NestedKey]:
        return [self._tensor_keys.advantage, self._tensor_keys.value_target]

    def _get(self, tensordict: TensorDictBase, key: NestedKey, name: str | None = None) -> Tensor:
        x = tensordict.get(key, None)
        if x is None:
            raise self._missing(key, name)
        return x

    def _missing(self, key: NestedKey, name: str | None, reader: str = "the value network") -> KeyError:
        """The error for an entry that `set_keys` renames under ``name``, or for an input of the ``reader`` (None)."""
        advice = f"{reader} reads it" if name is None else f"if it has another name, say set_keys({name}=...)"
        return KeyError(f"{type(self).__name__} needs {key!r}, which is missing from the TensorDict: {advice}")


def check_written(key: NestedKey, network: Any) -> None:
    """Raise KeyError if the value ``network``, if there is one, doesn't write the value where it is looked for."""
    if network is not None and key not in network.out_keys:
        raise KeyError(f"the value key {key!r} is not written by the value network: {network.out_keys}")


def is_locked_at(tensordict: TensorDictBase, key: NestedKey) -> bool:
    """Whether the TensorDict that an entry ``key`` would be set in is locked."""
    for name in (key,) if isinstance(key, str) else key:
        place, tensordict = tensordict, tensordict.get(name, None)
        if not isinstance(tensordict, TensorDictBase):
            break
    return place.is_locked


def under_next(key: NestedKey) -> NestedKey:
    """The key of the entry of that name below ``"next"``."""
    return unravel_key(("next", key))
