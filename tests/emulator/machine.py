"""Threads: they run a `Code`, 32 in step."""

from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any

import numpy as np

from .arithmetic import (
    ELEMENTWISE,
    LOGICAL,
    UNSIGNED,
    Array,
    compared,
    converted,
    decoded,
    encoded,
    field,
    immediate,
    permuted,
    shifted,
    size,
    wide_product,
)
from .code import Code, Instruction
from .memory import Fault, Memory, SharedMemory, Traffic

LANES = 32
_MOST_PROGRAMS = 16  # that run in step


def run(
    code: Code, grid: int, parameters: Sequence[bytes], blocks: Iterable[tuple[int, int]], random: Any, traffic: Traffic
) -> None:
    """Run the programs of a launch.

    Args:
        code: of the kernel.
        grid: the number of programs.
        parameters: the bytes of each.
        blocks: address and size of the memory that programs may access.
        random: a ``numpy.random.Generator``, which chooses their order.
        traffic: counts what they execute, but for branches and barriers, load and store.

    Raises:
        Fault: they do what a machine leaves undefined.

    """
    memory, given = Memory(blocks), dict(zip(code.parameters, parameters, strict=True))
    left = random.permutation(grid).astype(np.uint32)
    groups = []
    while len(left):
        count = random.integers(1, _MOST_PROGRAMS, endpoint=True)
        groups.append(_Group(code, left[:count], grid, given, memory, random, traffic))
        left = left[count:]
    while groups:
        group = groups[random.integers(len(groups))]
        group.go_on()
        if not group.running:
            groups.remove(group)


class _Group:
    """Some of the programs, which run in step: the first warp of each, and then the second, as chance has it."""

    def __init__(
        self,
        code: Code,
        programs: Array,
        grid: int,
        parameters: dict[str, bytes],
        memory: Memory,
        random: Any,
        traffic: Traffic,
    ) -> None:
        self.code, self.parameters, self.memory, self.random, self.traffic = code, parameters, memory, random, traffic
        self.shared = SharedMemory(len(programs), code.shared_bytes)
        self.threads = LANES * len(programs)  # of one warp each
        self.lane = np.tile(np.arange(LANES), len(programs))
        self.program = np.repeat(np.arange(len(programs)), LANES)
        self.special = {"%ctaid.x": programs[self.program], "%nctaid.x": np.full(self.threads, grid, np.uint32)}

        self.running = [_Warps(self, i) for i in range(code.warps)]
        """What hasn't come to the next barrier yet."""
        self._at_barrier: list[_Warps] = []

    def go_on(self) -> None:
        """One warp of each program, to the next barrier."""
        warps = self.running.pop(self.random.integers(len(self.running)))
        warps.run()
        self._at_barrier.append(warps)
        if not self.running:
            places = [x.waiting.keys() for x in self._at_barrier]
            if any(x != places[0] for x in places):
                raise Fault(f"{self.code.name}: warps of a program come to different barriers")
            self.running, self._at_barrier = (self._at_barrier if places[0] else []), []


class _Warps:
    """The warps of one number, of each program of a group."""

    def __init__(self, group: _Group, number: int) -> None:
        self._group = group
        self._registers: dict[str, Array] = {}
        self._thread = (LANES * number + group.lane).astype(np.uint32)
        self.waiting: dict[int, Array] = {0: np.ones(group.threads, bool)}
        """Where in the code to go on, and which threads."""

    def run(self) -> None:
        """To the next barrier, or the end. Threads that are behind the others in the code go on first.

        Where threads of a warp exchange something, those that come first wait for the others.
        """
        ready, self.waiting = self.waiting, {}
        parted: dict[int, Array] = {}
        while ready:
            at = min(ready)
            self._go_on(at, ready.pop(at), ready, parted)
        for at in parted:
            raise Fault(f"{self._group.code.instructions[at].text}: not all threads of a warp come to it")

    def _go_on(self, at: int, active: Array, ready: dict[int, Array], parted: dict[int, Array]) -> None:
        """From an instruction on, as far as these threads stay together and no others are behind them."""
        while True:
            i = self._group.code.instructions[at]
            name = i.parts[0]
            if name in _EXCHANGES or i.parts[:2] == ["bar", "warp"]:
                active = active | parted.pop(at, False)
                if not _are_whole(active):
                    parted[at] = active
                    return
            taking = active if i.predicate is None else active & (self._read(i.predicate, 0) != i.negated)
            at += 1
            if name == "bra":
                _join(ready, self._group.code.labels[i.operands[0]], taking)
                _join(ready, at, active & ~taking)
                return
            if i.parts[:2] == ["bar", "sync"]:
                _join(self.waiting, at, active)
                return
            if name == "ret":
                active = active & ~taking
            elif taking.any():
                self._execute(i, taking)
            if not active.any():
                return
            if ready and min(ready) <= at:
                _join(ready, at, active)
                return

    # --- registers ----------------------------------------------------------------------------------------------------

    def _read(self, name: str, bytes: int) -> Array:
        """The bits of a register, or of so many bytes of it, or of a number; 0 bytes for a predicate."""
        threads = self._group.threads
        if not name.startswith("%"):
            bits = UNSIGNED[bytes](0) if name == "global_smem" else immediate(name, bytes) if bytes else name != "0"
            return np.full(threads, bits)
        if name == "%tid.x":
            return self._thread
        found = self._group.special.get(name)
        if found is None:
            found = self._registers.get(name)
        if found is None:
            found = _undefined(name, threads)
        return found if bytes in (0, found.itemsize) else found.astype(UNSIGNED[bytes])

    def _write(self, name: str, x: Array, taking: Array) -> None:
        if name not in ("_", "tmp"):
            old = self._registers.get(name)
            if not taking.all():
                x = np.where(taking, x, _undefined(name, len(x)) if old is None else old)
            self._registers[name] = x

    def _address(self, operand: tuple[str, int], taking: Array) -> Array:
        base, offset = operand
        return (self._read(base, 8) + np.uint64(offset % (1 << 64)))[taking]

    # --- instructions -------------------------------------------------------------------------------------------------

    def _execute(self, i: Instruction, taking: Array) -> None:
        name = i.parts[0]
        self._group.traffic.executed += int(taking.reshape(-1, LANES).any(1).sum())
        special = getattr(self, f"_{name}", None)
        try:
            with np.errstate(all="ignore"):
                if special is not None:
                    special(i, taking)
                elif name not in ("bar", "fence", "membar"):
                    self._write(i.operands[0], self._computed(i), taking)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise NotImplementedError(i.text) from error

    def _computed(self, i: Instruction) -> Array:
        """The bits of what an instruction computes of each thread's own registers."""
        (name, *parts), sources, type = i.parts, i.operands[1:], i.parts[-1]
        if type == "pred":
            x = [self._read(source, 0) for source in sources]
            return x[0] if name == "mov" else LOGICAL[name](*x)
        bytes = size(type)
        x = [self._read(source, bytes) for source in sources[:2]]
        if name in ("mul", "mad") and ("wide" in parts or "hi" in parts):
            product = wide_product(*x, type)
            if "hi" in parts:
                return (product >> product.dtype.type(8 * bytes)).astype(UNSIGNED[bytes])
            return product.view(UNSIGNED[2 * bytes]) + (self._read(sources[2], 2 * bytes) if name == "mad" else 0)
        if name == "selp":
            return np.where(self._read(sources[2], 0), *x)
        if name == "prmt":
            return permuted(*x, self._read(sources[2], 4))
        if name == "popc":
            return np.bitwise_count(x[0]).astype(np.uint32)
        numbers = [decoded(bits, type) for bits in x]
        if name == "setp":
            return compared(parts[0], *numbers)
        if name in ("shl", "shr"):
            return shifted(numbers[0], self._read(sources[1], 4), left=name == "shl").view(UNSIGNED[bytes])
        if name == "bfe":
            start, length = (self._read(source, 4).astype(np.int64) for source in sources[1:])
            return field(numbers[0], start, length).view(UNSIGNED[bytes])
        numbers += [decoded(self._read(source, bytes), type) for source in sources[2:]]
        found = ELEMENTWISE[name](*numbers)
        if "NaN" in parts:
            found = np.where(np.isnan(numbers[0]) | np.isnan(numbers[1]), np.nan, found)
        return encoded(found, type)

    def _cvt(self, i: Instruction, taking: Array) -> None:
        (_, rounding, *_), (target, *sources) = i.parts, i.operands
        kind, source_kind = i.parts[-2:]
        narrow = kind.removesuffix("x2")
        bits = [converted(self._read(x, size(source_kind)), source_kind, narrow, rounding) for x in sources]
        if narrow != kind:  # two in one register, the first one in its upper half
            bits = [bits[1].astype(np.uint32) | bits[0].astype(np.uint32) << np.uint32(16)]
        self._write(target, bits[0], taking)

    def _mov(self, i: Instruction, taking: Array) -> None:
        """Also of a register into several, or of several into one, the lowest bits first."""
        target, source = i.operands
        if isinstance(target, list):
            bytes = size(i.parts[-1]) // len(target)
            bits = self._read(source, size(i.parts[-1]))
            for j, name in enumerate(target):
                self._write(name, (bits >> bits.dtype.type(8 * bytes * j)).astype(UNSIGNED[bytes]), taking)
        elif isinstance(source, list):
            bytes = size(i.parts[-1])
            each = bytes // len(source)
            bits = [self._read(name, each).astype(UNSIGNED[bytes]) for name in source]
            whole = [x << x.dtype.type(8 * each * j) for j, x in enumerate(bits)]
            self._write(target, np.bitwise_or.reduce(whole), taking)
        else:
            self._write(target, self._computed(i), taking)

    # --- memory -------------------------------------------------------------------------------------------------------

    def _ld(self, i: Instruction, taking: Array) -> None:
        targets, source = i.operands
        targets = targets if isinstance(targets, list) else [targets]
        bytes = size(i.parts[-1])
        if i.parts[1] == "param":
            number = int.from_bytes(self._group.parameters[source[0]][:bytes], "little", signed=i.parts[-1][0] == "s")
            kind = _kind(targets[0])
            words = [np.full(taking.sum(), number & np.iinfo(kind).max, kind)]
        elif _is_shared(i):
            program = self._group.program[taking]
            words = self._group.shared.load(program, self._address(source, taking), bytes, len(targets), i.text)
        else:
            address = self._address(source, taking)
            words = self._group.memory.load(address, bytes, len(targets), i.text)
            self._group.traffic.loaded += Traffic.sectors(self._group.program[taking], address, bytes * len(targets))
        for name, word in zip(targets, words, strict=True):
            self._write(name, _spread(word.astype(_kind(name)), taking), taking)

    def _st(self, i: Instruction, taking: Array) -> None:
        target, sources = i.operands
        sources = sources if isinstance(sources, list) else [sources]
        words = [self._read(source, size(i.parts[-1]))[taking] for source in sources]
        address = self._address(target, taking)
        if _is_shared(i):
            self._group.shared.store(self._group.program[taking], address, words, i.text)
        else:
            self._group.memory.store(address, words, i.text)
            bytes = size(i.parts[-1]) * len(words)
            self._group.traffic.stored += Traffic.sectors(self._group.program[taking], address, bytes)

    def _atom(self, i: Instruction, taking: Array) -> None:
        target, place, source = i.operands
        (*_, how, type), bytes = i.parts, size(i.parts[-1])
        address, value = self._address(place, taking), decoded(self._read(source, bytes), type)[taking]
        found = np.empty(len(address), UNSIGNED[bytes])
        for j in self._group.random.permutation(len(address)):
            one = slice(j, j + 1)
            (found[one],) = self._group.memory.load(address[one], bytes, 1, i.text)
            changed = encoded(ELEMENTWISE[how](decoded(found[one], type), value[one]), type)
            self._group.memory.store(address[one], [changed], i.text)
        self._write(target, _spread(found, taking), taking)

    # --- exchanges between the threads of a warp ----------------------------------------------------------------------

    def _shfl(self, i: Instruction, taking: Array) -> None:
        target, source, by, clamp, _ = i.operands
        lane, (by, clamp) = self._group.lane, (self._read(x, 4).astype(np.int64) for x in (by, clamp))
        segment, last = clamp >> 8, clamp & 31
        low = lane & segment
        high = low | (last & ~segment)
        how = i.parts[2]
        place = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": low | (by & ~segment)}[how]
        place = np.where(place >= high if how == "up" else place <= high, place, lane)
        self._write(target, self._read(source, 4)[self._group.program * LANES + place], taking)

    def _redux(self, i: Instruction, taking: Array) -> None:
        target, source, _ = i.operands
        x = decoded(self._read(source, 4), i.parts[-1]).reshape(-1, LANES)
        found = reduce(ELEMENTWISE[i.parts[2]], x.T)
        self._write(target, encoded(np.repeat(found, LANES), i.parts[-1]), taking)

    def _ldmatrix(self, i: Instruction, taking: Array) -> None:
        targets, source = i.operands
        program = self._group.program[taking]
        for name, elements in zip(targets, self._elements(source, len(targets), i, taking), strict=True):
            low, high = (self._group.shared.load(program, address, 2, 1, i.text)[0] for address in elements)
            word = low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)
            self._write(name, _spread(word, taking), taking)

    def _stmatrix(self, i: Instruction, taking: Array) -> None:
        target, sources = i.operands
        program = self._group.program[taking]
        for name, elements in zip(sources, self._elements(target, len(sources), i, taking), strict=True):
            word = self._read(name, 4)[taking]
            for half, address in enumerate(elements):
                self._group.shared.store(program, address, [(word >> np.uint32(16 * half)).astype(np.uint16)], i.text)

    def _elements(self, operand: tuple[str, int], matrices: int, i: Instruction, taking: Array) -> list[list[Array]]:
        """The addresses of the two elements that a thread has of each 8×8 matrix; 8 threads each have its rows'."""
        starts = self._address(operand, taking).reshape(-1, LANES)[:, : 8 * matrices].reshape(-1, matrices, 8)
        lane = np.arange(LANES)
        found = []
        for matrix in range(matrices):
            pair = []
            for half in range(2):
                row, column = lane // 4, lane % 4 * 2 + half
                if "trans" in i.parts:
                    row, column = column, row
                pair.append((starts[:, matrix, row] + 2 * column.astype(np.uint64)).ravel())
            found.append(pair)
        return found


_EXCHANGES = ("shfl", "redux", "ldmatrix", "stmatrix")


def _is_shared(i: Instruction) -> bool:
    """Whether memory is that of a program, and not that of tensors."""
    return i.parts[1].partition("::")[0] == "shared"


def _join(groups: dict[int, Array], at: int, threads: Array) -> None:
    """Add threads to those that are at a place of the code."""
    if threads.any():
        groups[at] = groups[at] | threads if at in groups else threads


def _are_whole(threads: Array) -> bool:
    """Whether of no warp some are there and others aren't."""
    rows = threads.reshape(-1, LANES)
    return bool((rows.any(1) == rows.all(1)).all())


def _kind(register: str) -> Any:
    return UNSIGNED[8 if register.startswith("%rd") else 2 if register.startswith("%rs") else 4]


def _undefined(register: str, threads: int) -> Array:
    """All bits set. A register may be read before it is written, by threads of which nobody uses the result."""
    if register.startswith("%p"):
        return np.ones(threads, bool)
    return np.full(threads, np.iinfo(_kind(register)).max, _kind(register))


def _spread(x: Array, taking: Array) -> Array:
    """What these threads have, beside zeros for the others."""
    found = np.zeros(len(taking), x.dtype)
    found[taking] = x
    return found
