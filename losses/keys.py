"""The entries that a loss reads: their names, how a user renames them, and what is said when they don't fit."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import unravel_key
from torch import Tensor

from ..estimators.modules import can_lack, keys_read

NEEDS = "needs the entry"

NEXT_KEYS = ("reward", "done", "terminated")
"""The keys whose entries are read under "next"."""


class KeyedModule(TensorDictModuleBase):
    """A module with a dataclass of keys, ``_AcceptedKeys``, whose fields `set_keys` renames."""

    @dataclass
    class _AcceptedKeys:
        """The entries a loss reads; `set_keys` renames them."""

    default_keys: type = _AcceptedKeys
    _in_keys_of_class: ClassVar[list[NestedKey] | None] = None
    _sorts_in_keys: ClassVar[bool] = False
    """Whether positional tensors are taken in the alphabetic order of their keys, as by some of TorchRL's losses."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "_AcceptedKeys" in vars(cls):
            cls.default_keys = cls._AcceptedKeys
        if not isinstance(vars(cls).get("in_keys", KeyedModule.in_keys), property):
            cls._in_keys_of_class = cls.in_keys  # type: ignore[assignment]  # a subclass may list them
            del cls.in_keys  # else tensordict.nn puts its own property there

    def __init__(self) -> None:
        super().__init__()
        self._tensor_keys = self.default_keys()
        self._in_keys: list[NestedKey] | None = None
        self._in_keys_assigned = False
        if self._in_keys_of_class is not None:
            self.in_keys = self._in_keys_of_class
        self._absent: dict[NestedKey, KeyError] = {}

    @property
    def tensor_keys(self) -> Any:
        """The entries that the loss reads, under the names that `set_keys` takes."""
        return self._tensor_keys

    def set_keys(self, **keys: NestedKey | list[NestedKey] | None) -> None:
        """Rename entries; None gives an entry its default name back. An assigned ``in_keys`` has them renamed, too.

        Raises:
            ValueError: the loss has no entry of that name, or what it is to be called is no key.

        """
        accepted = list(vars(self.tensor_keys))
        for name in keys:
            if name not in accepted:
                raise ValueError(f"{name} is not a key of {type(self).__name__}; its keys are: {', '.join(accepted)}")
        default = self.default_keys()
        wanted = {n: getattr(default, n) if key is None else _checked_keys(n, key) for n, key in keys.items()}
        before = {name: self._keys(name) for name in wanted}
        for name, key in wanted.items():
            setattr(self._tensor_keys, name, key)
        if self._in_keys_assigned:
            renamed: dict[NestedKey, NestedKey] = {}
            for name, keys_before in before.items():
                renamed.update(zip(keys_before, self._keys(name), strict=False))  # several heads may become fewer
            self.in_keys = [renamed.get(key, key) for key in self.in_keys]
        self._refresh()

    def _refresh(self) -> None:
        """Find out anew what is read: keys or networks have changed."""
        if not self._in_keys_assigned:
            self._in_keys = None
        getattr(self, "_reads", {}).clear()

    @property
    def in_keys(self) -> list[NestedKey]:
        """The entries to read, and the keyword arguments of a call without a TensorDict."""
        if self._in_keys is not None:
            return self._in_keys
        found = list(dict.fromkeys(self._find_in_keys()))
        if self._sorts_in_keys:
            found.sort(key=str)
        if not torch.compiler.is_compiling():  # what is kept now would be found changed in the next call
            self._in_keys = found
        return found

    @in_keys.setter
    def in_keys(self, keys: Iterable[NestedKey]) -> None:
        self._in_keys = [unravel_key(key) for key in keys]
        self._in_keys_assigned = True

    def _find_in_keys(self) -> Iterator[NestedKey]:
        """What the keys say that a loss reads; duplicates are allowed."""
        for name in ("action", *NEXT_KEYS):
            if hasattr(self.tensor_keys, name):
                yield from self._keys(name)

    def _keys(self, name: str) -> list[NestedKey]:
        """The entry, or the several entries (one per action head), that the key ``name`` stands for."""
        key = getattr(self.tensor_keys, name)
        if name in NEXT_KEYS:
            return [("next", key) if isinstance(key, str) else ("next", *key)]
        return key if isinstance(key, list) else [key]

    def _get(self, tensordict: TensorDictBase, name: str) -> Tensor:
        """The entry that the key ``name`` stands for; KeyError if it's missing."""
        (key,) = self._keys(name)
        x = tensordict.get(key, None)
        if x is None:
            self._require(tensordict, name)
        return x

    def _terminated(self, tensordict: TensorDictBase) -> tuple[Tensor, NestedKey]:
        """The entry ``terminated``, or ``done`` where there is none, and its key; KeyError if there is neither."""
        (key,) = self._keys("terminated")
        terminated = tensordict.get(key, None)
        return (self._get(tensordict, "done"), *self._keys("done")) if terminated is None else (terminated, key)

    def _require(self, tensordict: TensorDictBase, *names: str, networks: Iterable[str] = ()) -> None:
        """Check that what the keys ``names`` stand for and the ``networks`` need is there.

        Raises:
            KeyError: an entry is missing; the message says how to rename it.

        """
        for name in names:
            self._require_entries(tensordict, self._keys(name), f"rename it with set_keys({name}=...)")
        for name in networks:
            self._require_inputs(
                tensordict, keys_read(getattr(self, name)), [name], f"it is one of the in_keys of {name}"
            )

    def _require_entries(self, tensordict: TensorDictBase, keys: Iterable[NestedKey], hint: str) -> None:
        """Check that the entries ``keys`` are there; the ``hint`` is for the message of the KeyError."""
        for key in _absent_from(tensordict, keys):
            raise self._missing(tensordict, key, hint)

    def _require_inputs(
        self, tensordict: TensorDictBase, keys: Iterable[NestedKey], networks: Iterable[str], hint: str, below: str = ""
    ) -> None:
        """Check that the inputs ``keys`` of the ``networks`` are there, ``below`` an entry such as "next".

        Those that a network may do without are left to the network, and `_lacking` says what its error is about.

        Raises:
            KeyError: an input that is needed is missing; the ``hint`` is for the message.

        """
        entries = {unravel_key((below, key)) if below else key: key for key in keys}
        for entry in _absent_from(tensordict, entries):
            if not all(can_lack(getattr(self, name), entries[entry]) for name in networks):
                raise self._missing(tensordict, entry, hint)
            if not torch.compiler.is_compiling():  # what is kept now would be found changed in the next call
                self._absent.setdefault(entry, self._missing(tensordict, entry, hint))

    def _lacking(self, error: Exception) -> KeyError | None:
        """The error of an absent entry that the ``error`` of a network is about; None if it is about something else.

        A network that lacks an input complains of its name, or of the None that it got instead.
        """
        complaints = KeyError, TypeError, AttributeError
        # A value estimator says what it makes of the network's own complaint.
        complaint = error.__cause__ if isinstance(error.__cause__, complaints) else error
        if NEEDS in str(error) or not isinstance(complaint, complaints):
            return None
        words = set(re.findall(r"\w+", str(complaint)))
        named = [key for key in self._absent if (key if isinstance(key, str) else key[-1]) in words]
        about = named or (list(self._absent) if {"None", "NoneType"} & words else [])
        return self._absent[about[0]] if about else None

    def _missing(self, tensordict: TensorDictBase, key: NestedKey, hint: str) -> KeyError:
        present = ", ".join(sorted(map(repr, tensordict.keys(True, True))))
        return KeyError(f"{type(self).__name__} {NEEDS} {key!r} ({hint}), but the input has: {present}")

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


def checked_key(name: str, key: Any) -> NestedKey:
    """``key`` in its one form; ValueError, which names what it is for, if it is no key."""
    try:
        return unravel_key(key)
    except RuntimeError as error:
        raise ValueError(f"{name} must be a str or a tuple of str, but is {key!r}") from error


def _checked_keys(name: str, key: Any) -> NestedKey | list[NestedKey]:
    return [checked_key(name, k) for k in key] if isinstance(key, list) else checked_key(name, key)


def _absent_from(tensordict: TensorDictBase, keys: Iterable[NestedKey]) -> Iterator[NestedKey]:
    names = tensordict.keys()
    for key in keys:
        if (key not in names) if isinstance(key, str) else (tensordict.get(key, None) is None):
            yield key
