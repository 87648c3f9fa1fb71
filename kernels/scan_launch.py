"""Host side of the scan kernel: from a problem to tiles, strides and launches; the ``triton`` backend."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching, scan_fixed_discount
from .dtypes import compute_dtype
from .launching import TRITON_DTYPE, Launch, Launcher, Plan, Workspace, scalar, scalar_arguments
from .scan_kernel import scan_kernel
from .scan_problem import FIXED_DISCOUNT, Recurrence
from .scan_tiles import STEPS_PER_LANE

# Bytes of a tensor that a warp has in flight: four 128-bit loads per thread. Narrow dtypes are computed in float32, for
# more of which registers are few.
_WARP_BYTES = 2048
_WARP_STEPS = 512
_LINE = 128  # bytes of a cache line
_SECTOR = 32  # bytes that memory moves at least
_MOST_WARPS = 8


class Tiling(NamedTuple):
    """The shape of a tile, the programs that share a row, a program's warps, and how many blocks of rows it has.

    ``last_rows`` and ``last_lanes`` are the shape of the tile in which a warp looks for the last end of a trajectory in
    each row of a share.
    """

    rows: int
    lanes: int
    split: int
    warps: int
    blocks: int
    last_rows: int
    last_lanes: int

    def composing(self, *, ends: bool) -> "Tiling":
        """For the launch that composes shares: smaller tiles if trajectories have ends, behind which it stops."""
        return self._replace(rows=self.last_rows, lanes=self.last_lanes, warps=1) if ends else self


def tiling(
    rows: int,
    steps: int,
    itemsize: int,
    *,
    time_is_contiguous: bool,
    processors: int,
    warp_bytes: int = _WARP_BYTES,
    lean: bool = True,
) -> Tiling:
    """Choose the tile, and as many programs as keep the device busy; the numbers were measured on an H200.

    With contiguous time a program is one warp, which keeps every exchange between lanes a shuffle. Its threads have up
    to 4 lanes each, or 2 where all programs run at once with 2, but not with 4, which take more registers; they don't
    with either where a kernel isn't ``lean``. Of many short rows a program has four times as many: programs don't start
    faster than three in two nanoseconds.

    Otherwise a tile has a cache line of adjacent rows, of which a warp takes 4 lanes, one 128-bit load per step and
    thread; and four lines with four warps where that leaves programs enough. Few rows get up to 8 warps, one after the
    other in time.

    Rows are split where there are less than 4 warps per processor, to 16 per processor; a share is two tiles or more.
    Where trajectories have ends it is composed in tiles of one warp, with one row, or time-major as many as memory
    moves at once, and few steps: not much more is read than what comes after the last end.
    """
    most_lanes = min(_WARP_STEPS, warp_bytes // itemsize) // STEPS_PER_LANE  # of a warp
    lanes_of_row = triton.next_power_of_2(triton.cdiv(steps, STEPS_PER_LANE))
    if time_is_contiguous:
        tile_rows = max(1, 32 // lanes_of_row)
        programs = triton.cdiv(rows, tile_rows)
        each = 2 if lean and 16 * processors <= programs <= 32 * processors else 4
        lanes, warps = min(32 * each, most_lanes, lanes_of_row), 1
        blocks = 4 if lanes == lanes_of_row and programs >= 64 * processors else 1
    else:
        line = _LINE // itemsize
        tile_rows = 4 * line if triton.cdiv(rows, 4 * line) >= 16 * processors else line
        tile_rows = min(tile_rows, max(_SECTOR // itemsize, triton.next_power_of_2(rows)))
        programs = triton.cdiv(rows, tile_rows)
        wanted = triton.next_power_of_2(triton.cdiv(9 * processors, programs))
        warps = min(max(wanted, tile_rows // line), _MOST_WARPS)
        lanes = min(most_lanes * warps // tile_rows, lanes_of_row)
        tile_rows = max(tile_rows, 32 // lanes)  # Triton 3.6 fails to compile some tiles of fewer elements than threads
        warps, blocks = max(1, tile_rows * lanes // most_lanes), 1
    split = 1
    if programs * warps < 4 * processors:
        tiles = triton.cdiv(steps, lanes * STEPS_PER_LANE)
        most = (1 << 31) // tiles - 1  # the kernel multiplies tiles by shares, in 32 bits
        split = max(1, min(tiles // 2, triton.cdiv(16 * processors, programs * warps), most))
    if time_is_contiguous:
        last_rows, last_lanes = 1, min(64, lanes)
    else:
        last_rows = min(_SECTOR // itemsize, tile_rows)
        last_lanes = min(_WARP_STEPS, _WARP_BYTES // itemsize) // STEPS_PER_LANE // last_rows
        last_lanes = min(last_lanes, lanes)
        last_rows = min(max(last_rows, 32 // last_lanes), tile_rows)  # again, as many elements as threads
    return Tiling(tile_rows, lanes, split, warps, blocks, last_rows, last_lanes)


def split_power(tile: Tiling) -> int:
    """The places for compositions that a row has: a power of 2, as are those that are composed at once."""
    return max(STEPS_PER_LANE, triton.next_power_of_2(tile.split))


def forward(problem: Recurrence, time_dim: int) -> list[Tensor]:
    """The outputs of ``problem``, on the Triton kernel."""
    if problem.kind == FIXED_DISCOUNT:
        return scan_fixed_discount.forward(forward, problem, time_dim)
    _, gamma, lmbda, reward, value, next_value, done, terminated = problem
    outputs = problem.new_outputs()
    scalars = *_scalar(gamma, reward), *_scalar(lmbda, reward)
    settings = problem.kind, False, time_dim, outputs[0].dtype
    if not _scan(settings, reward, value, next_value, done, terminated, *outputs, *scalars):
        for output, copy in zip(outputs, forward(_dense(problem), time_dim), strict=True):
            output.copy_(copy)
    return outputs


def backward(
    problem: Recurrence, time_dim: int, y: Tensor | None, grads: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor]:
    """Per-step gradients of the needed inputs among γ, λ, reward, value and next value, on the Triton kernel."""
    kind, gamma, lmbda, reward, value, next_value, done, terminated = problem
    if kind == FIXED_DISCOUNT:
        return scan_fixed_discount.backward(forward, backward, problem, time_dim, grads, needs)
    dtype = problem.dtype
    precise = compute_dtype(dtype)
    found = [_like(reward, precise) if need else None for need in needs[:2]]
    for x, need in zip((reward, value, next_value), needs[2:], strict=True):
        found.append(_like(reward, x.dtype if x.is_floating_point() else precise) if need else None)
    if not (needs[0] or needs[1]):  # y_{t+1} and v' enter the gradients of γ and λ alone
        y = next_value = None
    grad_y, grad_target = [*grads, None][:2]
    inputs = (None, None, next_value, done, terminated, y, None, grad_y, grad_target)
    results = [x for x in found if x is not None]
    scalars = *_scalar(gamma, reward), *_scalar(lmbda, reward)
    if not _scan((kind, True, time_dim, dtype), *inputs, *found, *scalars):
        y, *grads = (None if x is None else x.contiguous() for x in (y, *grads))
        copies = backward(_dense(problem), time_dim, y, grads, needs)
        for result, copy in zip(results, copies, strict=True):
            result.copy_(copy)
    return results


def _like(reward: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(reward) if reward.dtype == dtype else torch.empty_like(reward, dtype=dtype)


def _scalar(x: float | Tensor | None, reward: Tensor) -> tuple[float | Tensor | None, Tensor | None]:
    """γ or λ: one for all steps, or one for each of them."""
    if type(x) is float:
        return x, None
    if isinstance(x, Tensor) and x.ndim:
        return None, x.expand_as(reward)
    return scalar(x, reward), None


def _plan(settings: tuple[str, bool, int, torch.dtype], *arguments: Any) -> Plan | None:
    """The launches of the recurrence, or of its adjoint.

    None if the strides keep three or more dimensions of rows apart (slices of several batch dimensions): the kernel
    knows two.
    """
    kind, adjoint, time_dim, dtype = settings
    *tensors, gamma, gammas, lmbda, lmbdas = arguments
    tensors += [None] * (_TENSORS - len(tensors))  # those of the adjoint
    like = next(x for x in tensors if x is not None)
    strides = tuple(None if x is None else x.stride() for x in (*tensors, gammas, lmbdas))
    lean = all(x is None for x in tensors[_GRAD_GAMMA : _GRAD_GAMMA + 2])  # with these there are half as many warps
    layout = lay_out(like.shape, time_dim, strides, dtype.itemsize, launching.processors(like.device), lean=lean)
    if layout is None:
        return None
    *strided, gammas, lmbdas = map(layout.argument, (*tensors, gammas, lmbdas), layout.strides)
    scalars: list[Any] = []
    for x, of_steps in ((gamma, gammas), (lmbda, lmbdas)):
        scalars += scalar_arguments(x, 0) if of_steps is None else (0.0, of_steps)
    return layout.plan(
        scan_kernel, [*strided, *scalars], compute_dtype(dtype), ends=tensors[3] is not None, KIND=kind, ADJOINT=adjoint
    )


_TENSORS = scan_kernel.arg_names.index("gamma")
_GRAD_GAMMA = scan_kernel.arg_names.index("grad_gamma")

_scan = Launcher(_plan)


def _dense(problem: Recurrence) -> Recurrence:
    """``problem`` on contiguous copies, γ and λ expanded where they are tensors with dimensions."""

    def dense(x: Any) -> Any:
        return x.expand_as(problem.reward).contiguous() if isinstance(x, Tensor) and x.ndim else x

    return Recurrence(*map(dense, problem))


class Layout(NamedTuple):
    """What a launch needs to know of the layout of its tensors, and how its work is divided."""

    rows: int
    inner: int
    steps: int
    strides: tuple[tuple[int, int, int] | None, ...]  # outer, inner, time, of each tensor
    common: tuple[int, int, int]  # what most of them are
    time_is_contiguous: bool
    index: tl.dtype
    tiling: Tiling

    def argument(self, x: Tensor | None, strides: tuple[int, int, int] | None) -> tuple[Any, ...] | None:
        """A tensor as kernels take it: with its ``strides`` only if they aren't those that most have."""
        return None if x is None or strides is None else (x,) if strides == self.common else (x, *strides)

    def plan(self, kernel: Any, arguments: Sequence[Any], dtype: torch.dtype, *, ends: bool, **constants: Any) -> Plan:
        """The launches of a kernel that scans, computed in ``dtype``; ``arguments`` are those before compositions.

        Where rows are split, a first launch composes each share, and the second solves it. ``ends`` says whether
        trajectories may end before their rows do.
        """
        solving = self.tiling
        compositions, tiles = None, [solving]
        padded = triton.cdiv(self.rows, solving.rows) * solving.rows
        if solving.split > 1:
            compositions = Workspace(2 * padded * split_power(solving), dtype)
            tiles.insert(0, solving.composing(ends=ends))
        launches = [
            Launch(
                kernel,
                triton.cdiv(padded // tile.rows, tile.blocks) * tile.split,
                [*arguments, compositions, self.common, self.rows, self.inner, self.steps],
                DTYPE=TRITON_DTYPE[dtype],
                INDEX=self.index,
                TIME_IS_CONTIGUOUS=self.time_is_contiguous,
                TILE_ROWS=tile.rows,
                TILE_LANES=tile.lanes,
                COMPOSE=i < len(tiles) - 1,
                PARTS=solving.lanes // tile.lanes,
                SPLIT=tile.split,
                SPLIT_POWER=split_power(tile),
                BLOCKS=tile.blocks,
                num_warps=tile.warps,
                **constants,
            )
            for i, tile in enumerate(tiles)
        ]
        return Plan(launches, () if compositions is None else (compositions,))


def lay_out(
    shape: Sequence[int],
    time_dim: int,
    strides: tuple[tuple[int, ...] | None, ...],
    itemsize: int,
    processors: int,
    **options: Any,
) -> Layout | None:
    """Merge the dimensions that aren't time into two, outer and inner; None if strides don't allow it.

    The ``options`` go to `tiling`.
    """
    present = [s for s in strides if s is not None]
    merged: list[list[int]] = []  # [size, stride of each present tensor …], from the outermost dimension in
    for dim, size in enumerate(shape):
        if dim == time_dim or size == 1:
            continue
        entry = [size, *(s[dim] for s in present)]
        if merged and all(a == b * size for a, b in zip(merged[-1][1:], entry[1:], strict=True)):
            entry[0] *= merged.pop()[0]
        merged.append(entry)
    if len(merged) > 2:
        return None
    one = [1] + [0] * len(present)
    outer, inner = [one] * (2 - len(merged)) + merged
    steps = shape[time_dim]
    triples = iter(zip(outer[1:], inner[1:], (s[time_dim] for s in present), strict=True))
    found = tuple(None if s is None else next(triples) for s in strides)
    if len(merged) == 1:  # one dimension of rows: leave the division by `inner` out
        outer, inner = inner, one
        found = tuple(None if s is None else (s[1], 0, s[2]) for s in found)
    rows = outer[0] * inner[0]
    common = Counter(filter(None, found)).most_common(1)[0][0]
    time_is_contiguous = steps > 1 and common[2] == 1
    furthest = max((outer[0] - 1) * o + (inner[0] - 1) * i + (steps - 1) * t for o, i, t in filter(None, found))
    tile = tiling(
        rows,
        steps,
        itemsize,
        time_is_contiguous=time_is_contiguous,
        processors=processors,
        **options,
    )
    reach = furthest + tile.lanes * STEPS_PER_LANE * max(t for _, _, t in filter(None, found))
    index = tl.int64 if reach >= 1 << 31 else tl.int32
    return Layout(rows, inner[0], steps, found, common, time_is_contiguous, index, tile)
