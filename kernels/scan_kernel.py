"""The Triton kernel behind every estimator: one scan along time, in either direction.

A step of the scan turns a state x into the next one. The recurrence runs backwards in time, x' = d + c·x, and writes
y = x'. Its adjoint runs forwards in time on the incoming gradient d: it writes d + x and passes on x' = c·(d + x).

What owns what. A program owns some rows and walks their time axis (or its share of it, see below) tile by tile,
carrying one state per row. In a tile, a *lane* owns 4 consecutive steps of a row: it composes them in registers, one
associative scan runs over the lanes' compositions, a shift hands every lane the state that enters it, and the lane
replays its 4 steps. Sequential within a thread, parallel across threads: a scan over single steps would need three
times the shuffles.

    TIME_IS_CONTIGUOUS                              otherwise (rows contiguous, or any strides)
    a tile is [rows, lanes]; the 4 adjacent         a tile is [lanes, rows]; each of the 4 steps is one load over
    elements of a lane are one 128-bit load         adjacent rows, 128 bits wide where rows are contiguous

Lanes lie in the order of the scan: descending time for the recurrence, ascending for the adjoint. Memory is read in
ascending order in both.

A tile is loaded as a whole before anything is computed from it, so that it waits for memory once. Left to itself, the
compiler saves registers by computing as soon as it can, and waits up to 9 times. Therefore what follows the loads is a
block of its own, under a condition that always holds.

A program has BLOCKS times TILE_ROWS rows: more than one block where rows are so many and so short that programs would
take longer to start than to run.

Few long rows are split over SPLIT programs each, in two launches. The first (COMPOSE) reduces every share of a row to
its composition, the pair (a, b) with x_out = b + a·x_in. It walks a share from its end and stops where a trajectory
ended in every row of the tile: of what came before nothing is left. The second likewise composes the shares before its
own, from the nearest back, to the state that enters it, and solves its share. Where trajectories are short against a
share, little is read twice. There are no atomics: results are bitwise reproducible.

A tensor is passed as (pointer, outer stride, inner stride, time stride), or as (pointer,) if its strides are those of
`layout`, so that addresses that tensors have in common are computed once. Row n lies at outer index n // inner and
inner index n % inner. A tensor that isn't there is None. γ and λ are numbers, or tensors, of which a 0-d one is
(pointer, 0).
"""

import triton
import triton.language as tl

from .primitives import as_float64
from .scan_problem import GAE, SCAN, TD_LAMBDA

STEPS_PER_LANE = 4

_GAE = tl.constexpr(GAE)
_SCAN = tl.constexpr(SCAN)
_TD_LAMBDA = tl.constexpr(TD_LAMBDA)
_STEPS = tl.constexpr(STEPS_PER_LANE)


@triton.jit
def scan_kernel(
    reward,
    value,
    next_value,
    done,
    terminated,
    y,
    target,
    grad_y,
    grad_target,
    grad_gamma,
    grad_lmbda,
    grad_reward,
    grad_value,
    grad_next_value,
    gamma: "fp64",  # type: ignore[name-defined]  # noqa: F821  # Triton's type: a bare float would be single precision
    gamma_tensor,
    lmbda: "fp64",  # type: ignore[name-defined]  # noqa: F821  # likewise
    lmbda_tensor,
    compositions,
    layout,
    rows,
    inner,
    steps,
    KIND: tl.constexpr,
    ADJOINT: tl.constexpr,
    DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
    TIME_IS_CONTIGUOUS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_LANES: tl.constexpr,
    COMPOSE: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLIT_POWER: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Recurrence: reads reward … terminated, writes y and target. Adjoint: also reads grad_y, grad_target and y."""
    inputs = (reward, value, next_value, done, terminated, y, grad_y, grad_target)
    outputs = (y, target, grad_gamma, grad_lmbda, grad_reward, grad_value, grad_next_value)
    scalars = (_number(gamma, gamma_tensor, DTYPE), gamma_tensor, _number(lmbda, lmbda_tensor, DTYPE), lmbda_tensor)
    TILE: tl.constexpr = TILE_LANES * _STEPS
    AXIS: tl.constexpr = 1 if TIME_IS_CONTIGUOUS else 0

    share = tl.program_id(0) % SPLIT
    tiles = tl.cdiv(steps, TILE)
    tiles_per_share = tl.cdiv(tiles, SPLIT)
    first = share * tiles_per_share
    last = tl.minimum(first + tiles_per_share, tiles)

    lane = tl.arange(0, TILE_LANES).to(INDEX)
    position = lane if ADJOINT else TILE_LANES - 1 - lane
    for block in range(tl.program_id(0) // SPLIT * BLOCKS, tl.program_id(0) // SPLIT * BLOCKS + BLOCKS):
        row = (block * TILE_ROWS + tl.arange(0, TILE_ROWS)).to(INDEX)
        # In COMPOSE (a, x) is the composition of the steps walked so far, and whether a trajectory ended in them. Where
        # there is no row, nothing is looked for.
        a = tl.full((TILE_ROWS,), 1.0, DTYPE)
        ended = tl.where(row < rows, 0, 1)
        x = tl.full((TILE_ROWS,), 0.0, DTYPE)
        if SPLIT > 1 and not COMPOSE:
            x = _entering_state(compositions, row, share, TIME_IS_CONTIGUOUS, TILE_LANES, SPLIT_POWER, DTYPE)

        tile = last - 1 if COMPOSE else first
        start = (tile if ADJOINT else tiles - 1 - tile) * TILE
        left = last - first
        while left > 0:
            if TIME_IS_CONTIGUOUS:
                step = tl.arange(0, _STEPS)[None, None, :]
                t = start + position[None, :, None] * _STEPS + step
                at = (row[:, None, None], t, (row < rows)[:, None, None], inner, steps, layout)
                read = _read(inputs, outputs, scalars, at, 0, KIND, ADJOINT)
            else:
                t = start + position[:, None] * _STEPS
                at = (row[None, :], t, (row < rows)[None, :], inner, steps, layout)
                read0 = _read(inputs, outputs, scalars, at, 0, KIND, ADJOINT)
                read1 = _read(inputs, outputs, scalars, at, 1, KIND, ADJOINT)
                read2 = _read(inputs, outputs, scalars, at, 2, KIND, ADJOINT)
                read3 = _read(inputs, outputs, scalars, at, 3, KIND, ADJOINT)
            if start < steps:  # always; see above
                if TIME_IS_CONTIGUOUS:
                    c, d, kept = _prologue(read, inputs, scalars, at, 0, KIND, ADJOINT, DTYPE)
                    c0, c1, c2, c3 = _split4(c)
                    d0, d1, d2, d3 = _split4(d)
                else:
                    c0, d0, kept0 = _prologue(read0, inputs, scalars, at, 0, KIND, ADJOINT, DTYPE)
                    c1, d1, kept1 = _prologue(read1, inputs, scalars, at, 1, KIND, ADJOINT, DTYPE)
                    c2, d2, kept2 = _prologue(read2, inputs, scalars, at, 2, KIND, ADJOINT, DTYPE)
                    c3, d3, kept3 = _prologue(read3, inputs, scalars, at, 3, KIND, ADJOINT, DTYPE)
                # Within a lane the recurrence visits its steps from the last to the first.
                if ADJOINT:
                    lane_a, lane_b = _compose_lane(c0, c1, c2, c3, d0, d1, d2, d3, ADJOINT)
                else:
                    lane_a, lane_b = _compose_lane(c3, c2, c1, c0, d3, d2, d1, d0, ADJOINT)
                if COMPOSE:
                    a, x = _prepend(a, x, lane_a, lane_b, lane, AXIS)
                    if TIME_IS_CONTIGUOUS:
                        ends = tl.max(_ends(read, inputs, at), 2)
                    else:
                        ends = _ends(read0, inputs, at) | _ends(read1, inputs, at)
                        ends = ends | _ends(read2, inputs, at) | _ends(read3, inputs, at)
                    ended = ended | tl.max(ends, AXIS)
                    left = tl.where(_all_ended(ended, lane, AXIS), 0, left)
                else:
                    entering, x = _enter_lanes(lane_a, lane_b, x, lane, AXIS)
                    if ADJOINT:
                        o0, o1, o2, o3 = _replay_lane(c0, c1, c2, c3, d0, d1, d2, d3, entering, ADJOINT)
                    else:
                        o3, o2, o1, o0 = _replay_lane(c3, c2, c1, c0, d3, d2, d1, d0, entering, ADJOINT)
                    if TIME_IS_CONTIGUOUS:
                        _epilogue(inputs, outputs, at, 0, _join4(o0, o1, o2, o3), kept, KIND, ADJOINT)
                    else:
                        _epilogue(inputs, outputs, at, 0, o0, kept0, KIND, ADJOINT)
                        _epilogue(inputs, outputs, at, 1, o1, kept1, KIND, ADJOINT)
                        _epilogue(inputs, outputs, at, 2, o2, kept2, KIND, ADJOINT)
                        _epilogue(inputs, outputs, at, 3, o3, kept3, KIND, ADJOINT)
            start += TILE if ADJOINT != COMPOSE else -TILE
            left -= 1
        if COMPOSE:
            place = compositions + row * (2 * SPLIT_POWER) + share
            tl.store(place, _a_of_share(a, ended, DTYPE))
            tl.store(place + SPLIT_POWER, x)


@triton.jit
def _read(inputs, outputs, scalars, at, K: tl.constexpr, KIND: tl.constexpr, ADJOINT: tl.constexpr):
    """All that some steps need from memory, loaded before anything is computed, so that one wait serves all loads."""
    reward, value, next_value, done, terminated, y, grad_y, grad_target = inputs
    _, _, grad_gamma, grad_lmbda, _, _, _ = outputs
    scalar_gradients: tl.constexpr = ADJOINT and (grad_gamma is not None or grad_lmbda is not None)
    nothing = at[1]  # in the place of what isn't needed, since a tuple of a function has no None in Triton 3.6
    return (
        nothing if ADJOINT else _load(reward, at, K),
        nothing if ADJOINT or KIND != _GAE else _load(value, at, K),
        nothing if KIND == _SCAN or (ADJOINT and not scalar_gradients) else _load(next_value, at, K),
        nothing if done is None else _load(done, at, K),
        nothing if terminated is None else _load(terminated, at, K),
        _load(y, at, K, 1) if scalar_gradients else nothing,
        nothing if grad_y is None else _load(grad_y, at, K),
        nothing if grad_target is None else _load(grad_target, at, K),
        _load(scalars[1], at, K) if _is_per_step(scalars[1]) else nothing,
        _load(scalars[3], at, K) if _is_per_step(scalars[3]) else nothing,
    )


@triton.jit
def _prologue(
    read, inputs, scalars, at, K: tl.constexpr, KIND: tl.constexpr, ADJOINT: tl.constexpr, DTYPE: tl.constexpr
):
    """c and d of some steps, and what the epilogue will need of their inputs."""
    reward, v, next_v, done, terminated, y_next, g_y, g_target, gamma, lmbda = read
    gamma = gamma.to(DTYPE) if _is_per_step(scalars[1]) else scalars[0]
    lmbda = lmbda.to(DTYPE) if _is_per_step(scalars[3]) else scalars[2]
    v = v.to(DTYPE)
    next_v = next_v.to(DTYPE)
    trace = y_next.to(DTYPE)
    g_target = g_target.to(DTYPE)

    cut = done != 0
    terminal = cut
    if inputs[4] is not None:
        terminal = terminated != 0
        cut = cut | terminal

    if KIND == _SCAN:
        c = gamma + tl.zeros_like(_inside(at, K)).to(DTYPE)  # of the shape of the mask, which is that of the tile
        if inputs[3] is not None:
            c = tl.where(cut, 0.0, c)
            trace = tl.where(cut, 0.0, trace)
    else:
        if KIND == _TD_LAMBDA:
            cut = cut | (at[1] == at[4] - 1 - K)
            trace -= next_v
        c = tl.where(cut, 0.0, gamma * lmbda)
        trace = tl.where(cut, 0.0, trace)

    if ADJOINT:
        if KIND != _SCAN:
            next_v = tl.where(terminal, 0.0, next_v)
        if inputs[6] is None:
            d = g_target
        else:
            d = g_y.to(DTYPE)
            if inputs[7] is not None:
                d += g_target
    else:
        d = reward.to(DTYPE)
        if KIND != _SCAN:
            # Selected, not multiplied by zero: the next value of a terminal step may be NaN.
            weight = gamma - c if KIND == _TD_LAMBDA else gamma
            d += tl.where(terminal, 0.0, weight * next_v)
        if KIND == _GAE:
            d -= v
    return c, d, (c, v, next_v, g_target, trace, gamma, lmbda, terminal)


@triton.jit
def _epilogue(inputs, outputs, at, K: tl.constexpr, o, kept, KIND: tl.constexpr, ADJOINT: tl.constexpr):
    """Stores what follows from y_t (recurrence) or from ∂L/∂d_t (adjoint); ∂L/∂c_t is ∂L/∂d_t · y_{t+1}."""
    y, target, grad_gamma, grad_lmbda, grad_reward, grad_value, grad_next_value = outputs
    c, v, next_v, g_target, trace, gamma, lmbda, terminal = kept
    if not ADJOINT:
        _store(y, at, K, o)
        if KIND == _GAE:
            _store(target, at, K, o + v)
    else:
        if grad_reward is not None:
            _store(grad_reward, at, K, o)
        if grad_value is not None:
            if inputs[7] is not None:
                _store(grad_value, at, K, g_target - o)
            else:
                _store(grad_value, at, K, -o)
        if grad_next_value is not None:
            # The weight of v' is γ in GAE, and in TD(λ) γ − c: γ(1−λ), or γ where the trajectory ends.
            weighted = gamma * o
            if KIND == _TD_LAMBDA:
                weighted -= c * o
            _store(grad_next_value, at, K, tl.where(terminal, 0.0, weighted))
        if grad_gamma is not None:
            if KIND == _SCAN:
                _store(grad_gamma, at, K, o * trace)
            else:
                _store(grad_gamma, at, K, o * (next_v + lmbda * trace))
        if grad_lmbda is not None:
            _store(grad_lmbda, at, K, gamma * o * trace)


@triton.jit
def _compose_lane(c0, c1, c2, c3, d0, d1, d2, d3, ADJOINT: tl.constexpr):
    """(a, b) of 4 steps in scan order."""
    b = c0 * d0 if ADJOINT else d0
    b = _advance(c1, d1, b, ADJOINT)
    b = _advance(c2, d2, b, ADJOINT)
    b = _advance(c3, d3, b, ADJOINT)
    return c0 * c1 * (c2 * c3), b


@triton.jit
def _replay_lane(c0, c1, c2, c3, d0, d1, d2, d3, x, ADJOINT: tl.constexpr):
    """The outputs of 4 steps in scan order, from the state x that enters the first."""
    o0 = d0 + x if ADJOINT else d0 + c0 * x
    x = c0 * o0 if ADJOINT else o0
    o1 = d1 + x if ADJOINT else d1 + c1 * x
    x = c1 * o1 if ADJOINT else o1
    o2 = d2 + x if ADJOINT else d2 + c2 * x
    x = c2 * o2 if ADJOINT else o2
    o3 = d3 + x if ADJOINT else d3 + c3 * x
    return o0, o1, o2, o3


@triton.jit
def _advance(c, d, x, ADJOINT: tl.constexpr):
    return c * (d + x) if ADJOINT else d + c * x


@triton.jit
def _compose(a_first, b_first, a_second, b_second):
    """First x → b₁ + a₁x, then x → b₂ + a₂x."""
    return a_first * a_second, b_second + a_second * b_first


@triton.jit
def _enter_lanes(lane_a, lane_b, x, lane, AXIS: tl.constexpr):
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
def _prepend(a, x, lane_a, lane_b, lane, AXIS: tl.constexpr):
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
        # A sum over one term: see `_enter_lanes` for why there is no gather along this axis.
        return tl.sum(tl.where(lane == tile.shape[0] - 1, tile, 0.0), 0)


@triton.jit
def _ends(read, inputs, at):
    """1 where a trajectory ends; nothing of what came before passes such a step, be it NaN."""
    if inputs[3] is None:
        ends = at[2] & (at[1] < 0)  # nowhere
    else:
        ends = read[3] != 0
        if inputs[4] is not None:
            ends = ends | (read[4] != 0)
    return ends.to(tl.int32)


@triton.jit
def _all_ended(ended, lane, AXIS: tl.constexpr):
    """Whether all rows have ended.

    The sum is over lanes as well, though they agree: its result is known to be that of all threads of a warp, while on
    a condition that looks as if threads could differ every exchange in the loop would be compiled for that.
    """
    everywhere = tl.expand_dims(tl.zeros_like(lane).to(tl.int32), 1 - AXIS)
    return tl.sum(tl.expand_dims(1 - ended, AXIS) + everywhere) == 0


@triton.jit
def _a_of_share(a, ended, DTYPE: tl.constexpr):
    """The a of a share as it is stored: 0 where a trajectory ended, and nowhere else.

    Where many discounts have made it 0 it is the least of numbers, which a NaN or an infinity passes, and nothing else.
    """
    least = tl.full(a.shape, 5e-324 if tl.float64 == DTYPE else 1.4e-45, DTYPE)
    return tl.where(ended != 0, 0.0, tl.where(a == 0, least, a))


@triton.jit
def _entering_state(
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
        a, x = _prepend(a, x, share_a, share_b, column, 1)
        ended = ended | tl.max((share_a == 0).to(tl.int32), 1)
        turns = tl.where(tl.sum(1 - ended) == 0, 0, turns)
    return x


@triton.jit
def _number(number, tensor, DTYPE: tl.constexpr):
    """γ or λ: a number, or what a 0-d tensor holds."""
    x = as_float64(number)
    if tensor is not None and len(tensor) == 2:
        x = tl.load(tensor[0]).to(tl.float64)
    return x.to(DTYPE)


@triton.constexpr_function
def _is_per_step(tensor):
    """Whether γ or λ is a tensor that has to be read at each step."""
    return tensor is not None and len(tensor) != 2


@triton.jit
def _load(tensor, at, K: tl.constexpr, ahead: tl.constexpr = 0):
    """Elements of a tensor ``ahead`` steps after the steps ``at``; zero beyond the last step."""
    return tl.load(_address(tensor, at, K + ahead), mask=_inside(at, K + ahead), other=0)


@triton.jit
def _store(tensor, at, K: tl.constexpr, x):
    tl.store(_address(tensor, at, K), x.to(tensor[0].dtype.element_ty), mask=_inside(at, K))


@triton.jit
def _inside(at, K: tl.constexpr):
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
def _split4(x):
    """[…, 4] to its four slices: the last dimension is (high bit, low bit)."""
    even, odd = tl.split(tl.reshape(x, x.shape[0], x.shape[1], 2, 2))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _join4(x0, x1, x2, x3):
    joined = tl.join(tl.join(x0, x2), tl.join(x1, x3))
    return tl.reshape(joined, x0.shape[0], x0.shape[1], 4)
