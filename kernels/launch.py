"""Host side of the scan kernel: from a problem to tiles, strides and launches; the ``triton`` backend."""

from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import fixed_discount
from .launching import ADDRESS, NUMBER, Launch
from .recurrence import FIXED_DISCOUNT, Recurrence
from .scan import STEPS_PER_LANE, scan_kernel

# Bytes of a tensor that a warp has in flight: four 128-bit loads per thread. Narrow dtypes are computed in float32, for
# more of which registers are few.
_WARP_BYTES = 2048
_WARP_STEPS = 512
_LINE = 128  # bytes of a cache line
_MOST_WARPS = 8


class Tiling(NamedTuple):
    """The shape of a tile, the programs that share a row, a program's warps, and how many blocks of rows it has."""

    rows: int
    lanes: int
    split: int
    warps: int
    blocks: int = 1


def tiling(
    rows: int,
    steps: int,
    itemsize: int,
    *,
    time_is_contiguous: bool,
    processors: int,
    warp_bytes: int = _WARP_BYTES,
) -> Tiling:
    """Choose the tile, and as many programs as keep the device busy; the numbers were measured on an H200.

    With contiguous time a program is one warp, which keeps every exchange between lanes a shuffle. Its threads have a
    lane each, a row has up to 32, and many small programs hide each other's waiting; fewer rows, and those that are
    split, get up to 4 lanes per thread. Of many short rows a program has four times as many: programs don't start
    faster than three in two nanoseconds.

    Otherwise a tile has a cache line of adjacent rows, of which a warp takes 4 lanes, one 128-bit load per step and
    thread; and four lines with four warps where that leaves programs enough. Few rows get up to 8 warps, one after the
    other in time.

    Rows are split where there are less than 4 warps per processor; a share is two tiles or more. A program holds the
    compositions of all shares of its rows, hence the limit on their number.
    """
    most_lanes = min(_WARP_STEPS, warp_bytes // itemsize) // STEPS_PER_LANE  # of a warp
    lanes_of_row = triton.next_power_of_2(triton.cdiv(steps, STEPS_PER_LANE))
    if time_is_contiguous:
        tile_rows = max(1, 32 // lanes_of_row)
        programs = triton.cdiv(rows, tile_rows)
        each = 1 if programs >= 32 * processors else 2 if programs >= 16 * processors else 4
        lanes, warps = min(32 * each, most_lanes, lanes_of_row), 1
        blocks = 4 if lanes == lanes_of_row and programs >= 64 * processors else 1
    else:
        line = _LINE // itemsize
        tile_rows = 4 * line if triton.cdiv(rows, 4 * line) >= 16 * processors else line
        tile_rows = min(tile_rows, max(line // 4, triton.next_power_of_2(rows)))  # memory moves 32 bytes at least
        programs = triton.cdiv(rows, tile_rows)
        wanted = triton.next_power_of_2(triton.cdiv(9 * processors, programs))
        warps = min(max(wanted, tile_rows // line), _MOST_WARPS)
        lanes = min(most_lanes * warps // tile_rows, lanes_of_row)
        tile_rows = max(tile_rows, 32 // lanes)  # Triton 3.6 fails to compile some tiles of fewer elements than threads
        warps, blocks = max(1, tile_rows * lanes // most_lanes), 1
    split = 1
    if programs * warps < 4 * processors:
        if not time_is_contiguous:
            tile_rows = min(tile_rows, 32)
        tiles = triton.cdiv(steps, lanes * STEPS_PER_LANE)
        most = max(1024 // tile_rows, 128)
        split = max(1, min(tiles // 2, triton.cdiv(8 * processors, programs * warps), most))
    return Tiling(tile_rows, lanes, split, warps, blocks)


def split_power(tile: Tiling) -> int:
    """The places for compositions that a row has: a power of 2, and enough for a load of 4."""
    return max(STEPS_PER_LANE, triton.next_power_of_2(tile.split))


def forward(problem: Recurrence, time_dim: int) -> list[Tensor]:
    """The outputs of ``problem``, on the Triton kernel."""
    kind, _, _, reward, value, next_value, done, terminated = problem
    if kind == FIXED_DISCOUNT:
        return fixed_discount.forward(forward, problem, time_dim)
    outputs = problem.new_outputs()
    inputs = (reward, value, next_value, done, terminated)
    present = [x for x in inputs if x is not None]
    key = _key(problem, time_dim, outputs[0].dtype, present, done is None, terminated is None)
    prepared = _prepared.get(key)
    if prepared is None:
        tensors = (*inputs, *outputs, *(None,) * (9 - len(outputs)))
        prepared = _remember(key, _prepare(problem, time_dim, tensors, adjoint=False))
    if prepared.launches:
        prepared.run(problem, present + outputs)
    else:
        for output, copy in zip(outputs, forward(_dense(problem), time_dim), strict=True):
            output.copy_(copy)
    return outputs


def backward(
    problem: Recurrence, time_dim: int, y: Tensor | None, grads: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor]:
    """Per-step gradients of the needed inputs among γ, λ, reward, value and next value, on the Triton kernel."""
    kind, _, _, reward, value, next_value, done, terminated = problem
    if kind == FIXED_DISCOUNT:
        return fixed_discount.backward(forward, backward, problem, time_dim, grads, needs)
    precise = problem.compute_dtype
    found = [_like(reward, precise) if need else None for need in needs[:2]]
    for x, need in zip((reward, value, next_value), needs[2:], strict=True):
        found.append(_like(reward, x.dtype if x.is_floating_point() else precise) if need else None)
    results = [x for x in found if x is not None]
    if not (needs[0] or needs[1]):  # y_{t+1} and v' enter the gradients of γ and λ alone
        y = next_value = None
    inputs = (next_value, done, terminated, y, *grads)
    present = [x for x in inputs if x is not None]
    wanted = [None if x is None else x.dtype for x in found]
    key = _key(problem, time_dim, precise, present, *[x is None for x in inputs], *wanted, results[0].stride())
    prepared = _prepared.get(key)
    if prepared is None:
        grad_y, grad_target = [*grads, None][:2]
        tensors = (None, None, next_value, done, terminated, y, None, grad_y, grad_target, *found)
        prepared = _remember(key, _prepare(problem, time_dim, tensors, adjoint=True))
    if prepared.launches:
        prepared.run(problem, present + results)
    else:
        y, *grads = (None if x is None else x.contiguous() for x in (y, *grads))
        copies = backward(_dense(problem), time_dim, y, grads, needs)
        for result, copy in zip(results, copies, strict=True):
            result.copy_(copy)
    return results


def _like(reward: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(reward) if reward.dtype == dtype else torch.empty_like(reward, dtype=dtype)


def _key(
    problem: Recurrence, time_dim: int, dtype: torch.dtype, inputs: Sequence[Tensor], *more: Any
) -> tuple[Any, ...]:
    """All that what `_prepare` returns depends on: what is computed, the forms of the inputs, and what ``more`` says.

    Outputs are laid out like the reward.
    """
    kind, gamma, lmbda, reward, *_ = problem
    return (
        kind,
        time_dim,
        dtype,
        reward.shape,
        reward.get_device(),
        tuple(map(_dtype, inputs)),
        all(map(Tensor.is_contiguous, inputs)) or tuple(map(Tensor.stride, inputs)),
        (gamma.dtype, gamma.shape, gamma.stride()) if isinstance(gamma, Tensor) else None,
        (lmbda.dtype, lmbda.shape, lmbda.stride()) if isinstance(lmbda, Tensor) else None,
        more,
    )


_dtype = Tensor.dtype.__get__  # type: ignore[attr-defined]  # the getter of a property in C


class _Prepared(NamedTuple):
    """The launches that solve a recurrence or its adjoint; none if its strides are more than the kernel knows."""

    launches: tuple[Launch, ...]
    compositions: int = 0  # elements that the launches share
    dtype: torch.dtype = torch.float32  # of those

    def run(self, problem: Recurrence, tensors: list[Tensor]) -> None:
        """Launch on the tensors that are there, in the order of the kernel's arguments."""
        _, gamma, lmbda, reward, *_ = problem
        numbers = []
        for x in (gamma, lmbda):
            if isinstance(x, Tensor):  # one of 0 dimensions may be on another device
                tensors.append(x.to(reward.device, non_blocking=True))
            elif x is not None:
                numbers.append(x)
        if self.compositions:
            tensors.append(reward.new_empty(self.compositions, dtype=self.dtype))
        for launch in self.launches:
            launch(reward.get_device(), tensors, numbers)


_prepared: dict[tuple[Any, ...], _Prepared] = {}
_MOST_PREPARED = 4096


def _remember(key: tuple[Any, ...], prepared: _Prepared) -> _Prepared:
    if len(_prepared) >= _MOST_PREPARED:
        _prepared.clear()
    _prepared[key] = prepared
    return prepared


def _prepare(problem: Recurrence, time_dim: int, tensors: Sequence[Tensor | None], *, adjoint: bool) -> _Prepared:
    """The launches for tensors of this form: those of the recurrence, or of its adjoint.

    None are there if the strides keep three or more dimensions of rows apart (slices of several batch dimensions): the
    kernel knows two.
    """
    reward, dtype = problem.reward, problem.compute_dtype
    scalars = [x.expand_as(reward) if isinstance(x, Tensor) and x.ndim else None for x in problem[1:3]]
    strides = tuple(None if x is None else x.stride() for x in (*tensors, *scalars))
    plan = _plan(reward.shape, time_dim, strides, problem.dtype.itemsize, _processors(reward.device))
    if plan is None:
        return _Prepared(())
    *arguments, gamma, lmbda = (
        None if s is None else (ADDRESS,) if s == plan.layout else (ADDRESS, *s) for s in plan.strides
    )
    launches = tuple(
        Launch(
            scan_kernel,
            plan.programs,
            [
                *arguments,
                *_scalar_arguments(problem.gamma, gamma),
                *_scalar_arguments(problem.lmbda, lmbda),
                ADDRESS if plan.compositions else None,
                plan.layout,
                plan.rows,
                plan.inner,
                plan.steps,
            ],
            KIND=problem.kind,
            ADJOINT=adjoint,
            DTYPE=_TRITON_DTYPE[dtype],
            COMPOSE=compose,
            **plan.constants,
        )
        for compose in plan.phases
    )
    return _Prepared(launches, plan.compositions, dtype)


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
    layout: tuple[int, int, int]  # what most of them are
    time_is_contiguous: bool
    index: tl.dtype
    tiling: Tiling

    @property
    def programs(self) -> int:
        """The programs of a launch."""
        return triton.cdiv(triton.cdiv(self.rows, self.tiling.rows), self.tiling.blocks) * self.tiling.split

    @property
    def phases(self) -> tuple[bool, ...]:
        """What COMPOSE is in each launch, one after the other."""
        return (True, False) if self.tiling.split > 1 else (False,)

    @property
    def compositions(self) -> int:
        """The elements that the launches of split rows share; 0 if no row is split."""
        if self.tiling.split == 1:
            return 0
        return 2 * triton.cdiv(self.rows, self.tiling.rows) * self.tiling.rows * split_power(self.tiling)

    @property
    def constants(self) -> dict[str, Any]:
        """The kernel's constants that say how its work is divided, and the warps of a program."""
        tile = self.tiling
        return {
            "INDEX": self.index,
            "TIME_IS_CONTIGUOUS": self.time_is_contiguous,
            "TILE_ROWS": tile.rows,
            "TILE_LANES": tile.lanes,
            "SPLIT": tile.split,
            "SPLIT_POWER": split_power(tile),
            "BLOCKS": tile.blocks,
            "num_warps": tile.warps,
        }


def _plan(
    shape: Sequence[int],
    time_dim: int,
    strides: tuple[tuple[int, ...] | None, ...],
    itemsize: int,
    processors: int,
    warp_bytes: int = _WARP_BYTES,
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
    layout = Counter(filter(None, found)).most_common(1)[0][0]
    time_is_contiguous = steps > 1 and layout[2] == 1
    furthest = max((outer[0] - 1) * o + (inner[0] - 1) * i + (steps - 1) * t for o, i, t in filter(None, found))
    tile = tiling(
        rows,
        steps,
        itemsize,
        time_is_contiguous=time_is_contiguous,
        processors=processors,
        warp_bytes=warp_bytes,
    )
    reach = furthest + tile.lanes * STEPS_PER_LANE * max(t for _, _, t in filter(None, found))
    index = tl.int64 if reach >= 1 << 31 else tl.int32
    return Plan(rows, inner[0], steps, found, layout, time_is_contiguous, index, tile)


def _scalar_arguments(x: float | Tensor | None, strided: Any) -> tuple[Any, Any]:
    """A number, or a tensor with its strides ((0,) for a 0-d tensor, which the kernel reads once)."""
    if isinstance(x, Tensor):
        return 0.0, strided or (ADDRESS, 0)
    return 0.0 if x is None else NUMBER, None


@cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of the device; under the interpreter few, so that short rows are split as well."""
    if device.type == "cpu":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


_TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}
