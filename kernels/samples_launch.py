"""Host side of the kernels that reduce over samples: in which order samples are walked, and by how many programs."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching
from .launching import TRITON_DTYPE, Launch, Plan, Workspace

WARPS = 4
# Bytes of a tile of one input: 16 for each thread, which is one 128-bit load. Of float64, twice as many would spill.
TILE_BYTES = 2048
# Programs per processor: with 3 float32 inputs each has 6 KB in flight. An estimate; it wasn't measured.
_PROGRAMS_PER_PROCESSOR = 4
# What a program merges of all others is at most 4 values for each of its threads.
_MOST_PROGRAMS = 512
# Up to this many tiles one program does everything, in one launch. An estimate, likewise.
_TILES_OF_ONE_PROGRAM = 4


class Division(NamedTuple):
    """How samples are divided: programs, the tiles of each, the samples of a tile, and the programs as a power of 2."""

    programs: int
    tiles: int
    block: int
    power: int


def division(samples: int, block: int, processors: int) -> Division:
    """Divide ``samples`` into tiles of ``block``."""
    tiles = triton.cdiv(samples, block)
    most = min(_PROGRAMS_PER_PROCESSOR * processors, _MOST_PROGRAMS)
    tiles_each = tiles if tiles <= _TILES_OF_ONE_PROGRAM else triton.cdiv(tiles, most)
    programs = triton.cdiv(tiles, tiles_each)
    return Division(programs, tiles_each, block, triton.next_power_of_2(programs))


def divided(x: Tensor, precise: torch.dtype) -> Division:
    """`division` of the samples of ``x``, computed in the dtype ``precise``, on their device."""
    return division(x.numel(), TILE_BYTES // precise.itemsize, launching.processors(x.device))


def plan(
    kernel: Any,
    computes: str,
    tensors: Sequence[Any],
    arguments: Sequence[Any],
    *more: Any,
    counts: bool,
    rows: int,
    precise: torch.dtype,
    **constants: Any,
) -> Plan:
    """The launches of a kernel that counts first, if it has to, and then computes.

    Args:
        kernel: the kernel.
        computes: the name of its constant which says that a launch computes; that it counts says ``COUNTS``.
        tensors: what is `walked`.
        arguments: the kernel's arguments before its workspace.
        more: those after the number of tiles.
        counts: whether it has to count.
        rows: of the workspace, which has one number of each program in a row.
        precise: the dtype that is computed in.
        constants: the kernel's other constants.

    """
    parts = divided(tensors[0], precise)
    phases: tuple[tuple[bool, bool], ...] = ((False, True),)
    if counts:
        phases = ((True, True),) if parts.programs == 1 else ((True, False), (False, True))
    # The count of finished programs starts at zero, which the first phase sees to if there is one; a single program
    # needs none.
    workspace = Workspace(rows * parts.programs + 1, precise, zeros=not counts and parts.programs > 1)
    launches = [
        Launch(
            kernel,
            parts.programs,
            [*arguments, workspace, tensors[0].numel(), parts.tiles, *more],
            **{"COUNTS": first, computes: second},
            **constants,
            DTYPE=TRITON_DTYPE[precise],
            INDEX=index_type(tensors, parts),
            BLOCK=parts.block,
            POWER=parts.power,
            num_warps=WARPS,
        )
        for first, second in phases
    ]
    return Plan(launches, [workspace])


def walked(tensors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The tensors flat, in the order in which a dense tensor laid out like the first one is walked.

    Only a tensor that no single stride walks in that order is copied. Where all are contiguous they are as they were.
    """
    if all(x is None or x.is_contiguous() for x in tensors):
        return tensors
    first: Any = tensors[0]  # there in every call
    dense = torch.empty_like(first)
    order = sorted(range(dense.ndim), key=dense.stride, reverse=True)
    return [None if x is None else x.permute(order).reshape(-1) for x in tensors]


def with_stride(x: Tensor | None) -> tuple[Tensor, int] | None:
    """A tensor that is `walked`, with the stride from one sample to the next."""
    return None if x is None else (x, 1 if x.is_contiguous() else x.stride(0))


def index_type(tensors: Sequence[Tensor | None], parts: Division) -> tl.dtype:
    """The integer in which offsets are computed, padding of the last tile included."""
    longest = max(x[1] for x in map(with_stride, tensors) if x is not None)
    return tl.int64 if parts.programs * parts.tiles * parts.block * longest >= 1 << 31 else tl.int32
