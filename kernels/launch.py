"""Host side of the scan kernel: from a problem to tiles, strides and launches; the ``triton`` backend."""

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import fixed_discount
from .recurrence import FIXED_DISCOUNT, Recurrence
from .scan import STEPS_PER_LANE, scan_kernel

# Steps by rows of a tile. A program is one warp, which keeps every exchange between lanes a shuffle: 512 elements are
# 16 per thread, that is four 128-bit loads of each float32 input in flight.
_TILE = 512
_WARPS = 1


class Tiling(NamedTuple):
    """The shape of a tile, and the number of programs that share a row."""

    rows: int
    lanes: int
    split: int


def tiling(rows: int, steps: int, itemsize: int, *, time_is_contiguous: bool, processors: int) -> Tiling:
    """Choose a tile of 512 elements and as many programs as keep the device busy.

    With contiguous time a tile has 4 rows of 128 steps, so that the lanes of a row are the threads of a warp. Otherwise
    it has a cache line (128 bytes) of adjacent rows, or the 32 bytes that memory moves at least where lines would make
    fewer than 4 programs per processor, by as many steps as make 512 elements. Shorter time is made up by more rows and
    the other way round. Rows are split where there is less than one program per processor; a share is two tiles or
    more, and the compositions of all shares of a program's rows are scanned at once, hence at most 1024.
    """
    tile = _TILE // STEPS_PER_LANE
    lanes_of_row = triton.next_power_of_2(triton.cdiv(steps, STEPS_PER_LANE))
    lanes = min(32 if time_is_contiguous else tile * itemsize // 128, lanes_of_row)
    tile_rows = min(tile // lanes, triton.next_power_of_2(rows))
    if not time_is_contiguous and triton.cdiv(rows, tile_rows) < 4 * processors:
        tile_rows = min(tile_rows, 32 // itemsize)
    lanes = min(tile // tile_rows, lanes_of_row)
    programs = triton.cdiv(rows, tile_rows)
    split = 1
    if programs < processors:
        tiles = triton.cdiv(steps, lanes * STEPS_PER_LANE)
        split = max(1, min(tiles // 2, triton.cdiv(8 * processors, programs), 1024 // tile_rows))
    return Tiling(tile_rows, lanes, split)


def forward(problem: Recurrence, time_dim: int) -> list[Tensor]:
    """The outputs of ``problem``, on the Triton kernel."""
    if problem.kind == FIXED_DISCOUNT:
        return fixed_discount.forward(forward, problem, time_dim)
    outputs = problem.new_outputs()
    y, target = [*outputs, None][:2]
    if not _launch(problem, time_dim, y=y, target=target):
        for output, copy in zip(outputs, forward(_dense(problem), time_dim), strict=True):
            output.copy_(copy)
    return outputs


def backward(
    problem: Recurrence, time_dim: int, y: Tensor | None, grads: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor]:
    """Per-step gradients of the needed inputs among γ, λ, reward, value and next value, on the Triton kernel."""
    if problem.kind == FIXED_DISCOUNT:
        return fixed_discount.backward(forward, backward, problem, time_dim, grads, needs)
    grad_y, grad_target = [*grads, None][:2]
    precise = problem.compute_dtype
    dtypes = (
        precise,
        precise,
        *(x.dtype if x is not None and x.is_floating_point() else precise for x in problem[3:6]),
    )
    found = [
        torch.empty_like(problem.reward, dtype=dtype) if need else None
        for need, dtype in zip(needs, dtypes, strict=True)
    ]
    results = [x for x in found if x is not None]
    if not _launch(problem, time_dim, y=y, grad_y=grad_y, grad_target=grad_target, found=found):
        y, *grads = (None if x is None else x.contiguous() for x in (y, *grads))
        copies = backward(_dense(problem), time_dim, y, grads, needs)
        for result, copy in zip(results, copies, strict=True):
            result.copy_(copy)
    return results


def _launch(
    problem: Recurrence,
    time_dim: int,
    *,
    y: Tensor | None,
    target: Tensor | None = None,
    grad_y: Tensor | None = None,
    grad_target: Tensor | None = None,
    found: Sequence[Tensor | None] | None = None,
) -> bool:
    """Run the recurrence, writing ``y`` and ``target``; or, where ``found`` is given, its adjoint, writing that.

    False, and nothing is done, if the strides keep three or more dimensions of rows apart (slices of several batch
    dimensions): the kernel knows two.
    """
    reward = problem.reward
    adjoint = found is not None
    tensors: Sequence[Tensor | None] = (
        None if adjoint else reward,
        problem.value,
        problem.next_value,
        problem.done,
        problem.terminated,
        y,
        target,
        grad_y,
        grad_target,
        *(found or (None,) * 5),
        *(x.expand_as(reward) if isinstance(x, Tensor) and x.ndim else None for x in problem[1:3]),
    )
    strides = tuple(None if x is None else x.stride() for x in tensors)
    plan = _plan(reward.shape, time_dim, strides, problem.dtype.itemsize, _processors(reward.device))
    if plan is None:
        return False
    rows, lanes, split = plan.tiling
    dtype = problem.compute_dtype
    arguments: list[Any] = [
        None if x is None or s is None else (x, *s) for x, s in zip(tensors, plan.strides, strict=True)
    ]
    lmbda_tensor, gamma_tensor = arguments.pop(), arguments.pop()
    compositions = reward.new_empty(2 * plan.rows * split, dtype=dtype) if split > 1 else None
    grid = (triton.cdiv(plan.rows, rows) * split,)
    with torch.cuda.device_of(reward):
        for compose in (True, False) if split > 1 else (False,):
            scan_kernel[grid](
                *arguments,
                *_scalar_arguments(problem.gamma, gamma_tensor, reward.device),
                *_scalar_arguments(problem.lmbda, lmbda_tensor, reward.device),
                compositions,
                plan.rows,
                plan.inner,
                plan.steps,
                KIND=problem.kind,
                ADJOINT=adjoint,
                DTYPE=_TRITON_DTYPE[dtype],
                INDEX=plan.index,
                TIME_IS_CONTIGUOUS=plan.time_is_contiguous,
                TILE_ROWS=rows,
                TILE_LANES=lanes,
                COMPOSE=compose,
                SPLIT=split,
                SPLIT_POWER=triton.next_power_of_2(split),
                num_warps=_WARPS,
            )
    return True


def _dense(problem: Recurrence) -> Recurrence:
    """``problem`` on contiguous copies, γ and λ expanded where they are tensors with dimensions."""

    def dense(x: Any) -> Any:
        return x.expand_as(problem.reward).contiguous() if isinstance(x, Tensor) and x.ndim else x

    return Recurrence(*map(dense, problem))


class Plan(NamedTuple):
    """What a launch needs to know of the layout of its tensors."""

    rows: int
    inner: int
    steps: int
    strides: tuple[tuple[int, int, int] | None, ...]  # outer, inner, time, of each tensor
    time_is_contiguous: bool
    index: tl.dtype
    tiling: Tiling


@lru_cache(maxsize=4096)
def _plan(
    shape: Sequence[int], time_dim: int, strides: tuple[tuple[int, ...] | None, ...], itemsize: int, processors: int
) -> Plan | None:
    """Merge the dimensions that aren't time into two, outer and inner; None if strides don't allow it."""
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
    time_is_contiguous = steps > 1 and next(s[2] for s in found if s is not None) == 1
    furthest = max((outer[0] - 1) * o + (inner[0] - 1) * i + (steps - 1) * t for o, i, t in filter(None, found))
    tile = tiling(rows, steps, itemsize, time_is_contiguous=time_is_contiguous, processors=processors)
    reach = furthest + tile.lanes * STEPS_PER_LANE * max(t for _, _, t in filter(None, found))
    index = tl.int64 if reach >= 1 << 31 else tl.int32
    return Plan(rows, inner[0], steps, found, time_is_contiguous, index, tile)


def _scalar_arguments(x: float | Tensor | None, strided: Any, device: torch.device) -> tuple[float, Any]:
    """A number, or a tensor with its strides (None for a 0-d tensor, which the kernel reads once)."""
    if x is None or not isinstance(x, Tensor):
        return x or 0.0, None
    return 0.0, strided or (x.to(device, non_blocking=True), None, None, None)


@cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of the device; under the interpreter few, so that short rows are split as well."""
    if device.type == "cpu":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


_TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}
