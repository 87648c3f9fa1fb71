"""What the Triton kernels of scans share: tiles and their addresses, lanes, and the shares of a split row.

A program owns some rows and walks their time axis (or its share of it, see below) tile by tile, carrying one state per
row. In a tile, a *lane* owns 4 consecutive steps of a row: it composes them in registers, one associative scan runs
over the lanes' compositions, a shift hands every lane the state that enters it, and the lane replays its 4 steps.
Sequential within a thread, parallel across threads: a scan over single steps would need three times the shuffles.

    TIME_IS_CONTIGUOUS                              otherwise (rows contiguous, or any strides)
    a tile is [rows, lanes]; the 4 adjacent         a tile is [lanes, rows]; each of the 4 steps is one load over
    elements of a lane are one 128-bit load         adjacent rows, 128 bits wide where rows are contiguous

Lanes lie in the order of the scan: descending time for the recurrence, ascending for the adjoint. Memory is read in
ascending order in both.

Few long rows are split over SPLIT programs each, in two launches. The first (COMPOSE) reduces every share of a row to
its composition, the pair (a, b) with x_out = b + a·x_in. It walks a share from its end and stops where a trajectory
ended in every row of the tile: of what came before nothing is left. If trajectories have ends, its tiles are parts of
the second's, with fewer rows and steps, so that it stops early. The second likewise composes the shares before its own,
from the nearest back, to the state that enters it, and solves its share. Where trajectories are short against a share,
little is read twice. There are no atomics: results are bitwise reproducible.

A tensor is passed as (pointer, outer stride, inner stride, time stride), or as (pointer,) if its strides are those of
`layout`, so that addresses that tensors have in common are computed once. Row n lies at outer index n // inner and
inner index n % inner. A tensor that isn't there is None. ``at`` says which elements: (row, step, whether the row
exists, inner, steps, layout).
"""

import triton
import triton.language as tl

STEPS_PER_LANE = 4
STEPS = tl.constexpr(STEPS_PER_LANE)


@triton.jit
def share_of_program(steps, TILE: tl.constexpr, PARTS: tl.constexpr, SPLIT: tl.constexpr):
    """Which share of its rows' tiles this program has, the first of them and the one after the last; and all tiles.

    ``PARTS`` tiles are the unit of which shares are made; they differ by one unit at most. Of the last unit some tiles
    may lie beyond the last step.
    """
    share = tl.program_id(0) % SPLIT
    units = (steps - 1) // (TILE * PARTS) + 1  # rounded up, without a sum that may overflow
    first = share * units // SPLIT
    last = (share * units + units) // SPLIT
    return share, first * PARTS, last * PARTS, units * PARTS


@triton.jit
def _compose(a_first, b_first, a_second, b_second):
    """First x → b₁ + a₁x, then x → b₂ + a₂x."""
    return a_first * a_second, b_second + a_second * b_first


@triton.jit
def enter_lanes(lane_a, lane_b, x, lane, AXIS: tl.constexpr):
    """The state that enters each lane, and the state that leaves the last one."""
    x = tl.expand_dims(x, AXIS)
    lane = tl.expand_dims(lane, 1 - AXIS)
    # The state that enters the tile is made a part of the first lane's composition.
    lane_b = tl.where(lane == 0, lane_b + lane_a * x, lane_b)
    if AXIS == 1:
        # The lanes of a row are the threads of a warp, so that a gather is one shuffle.
        _, leaving = tl.associative_scan((lane_a, lane_b), AXIS, _compose)
        previous = tl.maximum(lane - 1, 0).to(tl.int32) + tl.zeros_like(leaving).to(tl.int32)
        before = tl.gather(leaving, previous, AXIS)
    else:
        # A gather would move the whole tile through shared memory into a layout of its own; a scan that also carries
        # the composition of all lanes but the last stays in the layout of the loads.
        one = tl.full(lane_a.shape, 1.0, lane_a.dtype)
        zero = tl.zeros_like(one) * -1.0  # −0: the zero whose addition changes nothing, and is left out
        _, leaving, _, before = tl.associative_scan((lane_a, lane_b, one, zero), AXIS, _compose_keeping_previous)
    return tl.where(lane == 0, x, before), _last(leaving, lane, AXIS)


@triton.jit
def _compose_keeping_previous(
    a_first, b_first, a_first_before, b_first_before, a_second, b_second, a_second_before, b_second_before
):
    """`_compose`, and the composition of all but the last lane."""
    a, b = _compose(a_first, b_first, a_second, b_second)
    a_before, b_before = _compose(a_first, b_first, a_second_before, b_second_before)
    return a, b, a_before, b_before


@triton.jit
def prepend(a, x, lane_a, lane_b, lane, AXIS: tl.constexpr):
    """The composition of a tile's lanes (or of several shares) followed by (a, x)."""
    lane = tl.expand_dims(lane, 1 - AXIS)
    tile_a, tile_b = tl.associative_scan((lane_a, lane_b), AXIS, _compose)
    return _compose(_last(tile_a, lane, AXIS), _last(tile_b, lane, AXIS), a, x)


@triton.jit
def _last(tile, lane, AXIS: tl.constexpr):
    """The last lane of a tile."""
    if AXIS == 1:
        index = tl.full((tile.shape[0], 1), tile.shape[1] - 1, tl.int32)
        return tl.reshape(tl.gather(tile, index, 1), (tile.shape[0],))
    else:
        # A sum over one term: see `enter_lanes` for why there is no gather along this axis.
        return tl.sum(tl.where(lane == tile.shape[0] - 1, tile, 0.0), 0)


@triton.jit
def all_ended(ended, lane, AXIS: tl.constexpr):
    """Whether all rows have ended.

    The sum is over lanes as well, though they agree: its result is known to be that of all threads of a warp, while on
    a condition that looks as if threads could differ every exchange in the loop would be compiled for that.
    """
    everywhere = tl.expand_dims(tl.zeros_like(lane).to(tl.int32), 1 - AXIS)
    return tl.sum(tl.expand_dims(1 - ended, AXIS) + everywhere) == 0


@triton.jit
def store_composition(compositions, row, share, a, x, ended, SPLIT_POWER: tl.constexpr, DTYPE: tl.constexpr):
    """Stores (a, x) of a share for `entering_state`, where a = 0 says that a trajectory ended in the share.

    A product of discounts that underflowed to 0 is stored as the smallest subnormal number: no finite state passes it,
    but NaN and infinity do, as they would in a whole row.
    """
    least = tl.full(a.shape, 5e-324 if tl.float64 == DTYPE else 1.4e-45, DTYPE)
    place = compositions + row * (2 * SPLIT_POWER) + share
    tl.store(place, tl.where(ended != 0, 0.0, tl.where(a == 0, least, a)))
    tl.store(place + SPLIT_POWER, x)


@triton.jit
def entering_state(
    compositions,
    row,
    share,
    TIME_IS_CONTIGUOUS: tl.constexpr,
    TILE_LANES: tl.constexpr,
    SPLIT_POWER: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The state that enters a share: the composition of the shares before it, back to one in which each row ended.

    A thread has up to 4 shares at once where one warp may have many of a row to go through; one share where a tile has
    several warps, which exchange compositions through shared memory.
    """
    AT_ONCE: tl.constexpr = min(TILE_LANES if TIME_IS_CONTIGUOUS else max(4, TILE_LANES // 4), SPLIT_POWER)
    a = tl.full(row.shape, 1.0, DTYPE)
    x = tl.full(row.shape, 0.0, DTYPE)
    ended = tl.full(row.shape, 0, tl.int32)
    column = tl.arange(0, AT_ONCE)
    turns = tl.cdiv(share, AT_ONCE)
    while turns > 0:
        turns -= 1
        earlier = turns * AT_ONCE + column
        at = compositions + row[:, None] * (2 * SPLIT_POWER) + earlier[None, :]
        is_before = (earlier < share)[None, :]
        share_a = tl.load(at, mask=is_before, other=1.0)
        share_b = tl.load(at + SPLIT_POWER, mask=is_before, other=0.0)
        a, x = prepend(a, x, share_a, share_b, column, 1)
        ended = ended | tl.max((share_a == 0).to(tl.int32), 1)
        turns = tl.where(tl.sum(1 - ended) == 0, 0, turns)
    return x


@triton.jit
def load(tensor, at, K: tl.constexpr, ahead: tl.constexpr = 0):
    """Elements of a tensor ``ahead`` steps after the steps ``at``; zero beyond the last step."""
    return tl.load(_address(tensor, at, K + ahead), mask=inside(at, K + ahead), other=0)


@triton.jit
def store(tensor, at, K: tl.constexpr, x):
    """Writes x to the elements K steps after those of ``at``, as far as they exist."""
    tl.store(_address(tensor, at, K), x.to(tensor[0].dtype.element_ty), mask=inside(at, K))


@triton.jit
def inside(at, K: tl.constexpr):
    """Which of the elements that are K steps after the steps ``at`` exist."""
    return at[2] & (at[1] + K < at[4])


@triton.jit
def _address(tensor, at, K: tl.constexpr):
    """Addresses of the elements K steps after those of ``at``, which are the first of their lanes.

    A lane's first address is computed once; from there on, each is a step's stride from the one before.
    """
    row, t, _, inner, _, layout = at
    if len(tensor) == 1:
        outer_stride, inner_stride, time_stride = layout
    else:
        _, outer_stride, inner_stride, time_stride = tensor
    address = tensor[0] + ((row // inner) * outer_stride + (row % inner) * inner_stride + t * time_stride)
    for _ in tl.static_range(K):
        address += time_stride
    return address


@triton.jit
def split4(x):
    """[…, 4] to its four slices: the last dimension is (high bit, low bit)."""
    even, odd = tl.split(tl.reshape(x, x.shape[0], x.shape[1], 2, 2))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def join4(x0, x1, x2, x3):
    """The inverse of `split4`."""
    joined = tl.join(tl.join(x0, x2), tl.join(x1, x3))
    return tl.reshape(joined, x0.shape[0], x0.shape[1], 4)
