"""Memory that knows its bounds."""

import ctypes
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from .arithmetic import UNSIGNED, Array


class Fault(Exception):
    """A kernel did what a machine leaves undefined."""


class Traffic:
    """How many instructions warps execute, and how many sectors of 32 bytes they load and store.

    Each counts once for a warp, however many of its threads are at it.
    """

    def __init__(self) -> None:
        self.executed = 0
        self.loaded = 0
        self.stored = 0

    @staticmethod
    def sectors(warp: Array, address: Array, bytes: int) -> int:
        """Of an access of so many bytes at each address, by threads of these warps."""
        sector = address // np.uint64(32) + (warp.astype(np.uint64) << np.uint64(48))  # to tell the warps apart
        return len(np.unique(sector)) * max(1, bytes // 32)


class Memory:
    """The memory of tensors, by address."""

    def __init__(self, blocks: Iterable[tuple[int, int]]) -> None:
        blocks = sorted((start, size) for start, size in blocks if size)
        self._starts = np.array([start for start, _ in blocks], np.uint64)
        self._ends = np.array([start + size for start, size in blocks], np.uint64)
        self._bytes = [np.frombuffer((ctypes.c_uint8 * size).from_address(start), np.uint8) for start, size in blocks]

    def load(self, address: Array, bytes: int, words: int, text: str) -> list[Array]:
        """So many words of so many bytes at each address; ``text`` is for errors."""
        found = np.empty((len(address), bytes * words), np.uint8)
        for memory, who, places in self._places(address, bytes * words, text):
            found[who] = memory[places]
        return list(found.view(UNSIGNED[bytes]).T)

    def store(self, address: Array, words: Sequence[Array], text: str) -> None:
        """The words of each address."""
        values = as_bytes(words)
        refuse_to_disagree(address, values, text)
        for memory, who, places in self._places(address, values.shape[1], text):
            memory[places] = values[who]

    def _places(self, address: Array, bytes: int, text: str) -> Iterator[tuple[Array, Array, Array]]:
        """The memory of each tensor that is among what is accessed, by whom, and where."""
        refuse_unaligned(address, bytes, text)
        block = np.searchsorted(self._starts, address, "right") - 1
        if (block < 0).any() or (address + np.uint64(bytes) > self._ends[block]).any():
            raise Fault(f"{text} is outside of every tensor")
        for i in np.unique(block):
            who = block == i
            offset = (address[who] - self._starts[i]).astype(np.int64)
            yield self._bytes[i], who, offset[:, None] + np.arange(bytes)


class SharedMemory:
    """That of several programs. It starts with all bits set, which as floating-point numbers are NaN."""

    def __init__(self, programs: int, bytes: int) -> None:
        self._bytes = np.full((programs, bytes), 0xFF, np.uint8)

    def load(self, program: Array, address: Array, bytes: int, words: int, text: str) -> list[Array]:
        """So many words of so many bytes at each address of a program."""
        places = self._places(address, bytes * words, text)
        return list(self._bytes[program[:, None], places].view(UNSIGNED[bytes]).T)

    def store(self, program: Array, address: Array, words: Sequence[Array], text: str) -> None:
        """The words of each address of a program."""
        values = as_bytes(words)
        refuse_to_disagree(address + program.astype(np.uint64) * np.uint64(1 << 32), values, text)
        self._bytes[program[:, None], self._places(address, values.shape[1], text)] = values

    def _places(self, address: Array, bytes: int, text: str) -> Array:
        refuse_unaligned(address, bytes, text)
        if (address + np.uint64(bytes) > self._bytes.shape[1]).any():
            raise Fault(f"{text} is outside of the shared memory")
        return address.astype(np.int64)[:, None] + np.arange(bytes)


def as_bytes(words: Sequence[Array]) -> Array:
    """One row for each address."""
    return np.ascontiguousarray(np.stack(words, -1)).view(np.uint8)


def refuse_unaligned(address: Array, bytes: int, text: str) -> None:
    """Raise `Fault` if an address isn't a multiple of what is accessed at once."""
    if (address % np.uint64(bytes)).any():
        raise Fault(f"{text} isn't aligned to {bytes} bytes")


def refuse_to_disagree(address: Array, values: Array, text: str) -> None:
    """Raise `Fault` if different values are written to one address."""
    order = np.argsort(address, kind="stable")
    same = address[order][1:] == address[order][:-1]
    if (values[order][1:] != values[order][:-1]).any(-1)[same].any():
        raise Fault(f"{text} writes different values to one address")
