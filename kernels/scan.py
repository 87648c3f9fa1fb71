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

Few long rows are split over SPLIT programs each, in two launches. The first (COMPOSE) reduces every share of a row to
its composition, the pair (a, b) with x_out = b + a·x_in. The second scans the compositions of the shares before its own
for the state that enters it, and solves its share. There are no atomics: results are bitwise reproducible.

A tensor is passed as (pointer, outer stride, inner stride, time stride), and row n lies at outer index n // inner and
inner index n % inner. A tensor that isn't there is None. γ and λ are numbers, or tensors, with None for the
strides of a 0-d tensor.
"""

import triton
import triton.language as tl

from .recurrence import GAE, SCAN, TD_LAMBDA

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
):
    """Recurrence: reads reward … terminated, writes y and target. Adjoint: also reads grad_y, grad_target and y."""
    inputs = (reward, value, next_value, done, terminated, y, grad_y, grad_target)
    outputs = (y, target, grad_gamma, grad_lmbda, grad_reward, grad_value, grad_next_value)
    # The product with a float64 one makes a tensor of a number in the interpreter as well as in compiled code.
    one = tl.full((), 1.0, tl.float64)
    scalars = ((gamma * one).to(DTYPE), gamma_tensor, (lmbda * one).to(DTYPE), lmbda_tensor)
    TILE: tl.constexpr = TILE_LANES * _STEPS
    AXIS: tl.constexpr = 1 if TIME_IS_CONTIGUOUS else 0

    share = tl.program_id(0) % SPLIT
    row = (tl.program_id(0) // SPLIT * TILE_ROWS + tl.arange(0, TILE_ROWS)).to(INDEX)
    tiles = tl.cdiv(steps, TILE)
    tiles_per_share = tl.cdiv(tiles, SPLIT)
    first = share * tiles_per_share
    last = tl.minimum(first + tiles_per_share, tiles)

    a = tl.full((TILE_ROWS,), 1.0, DTYPE)  # the composition of the steps walked so far, needed in COMPOSE only
    x = tl.full((TILE_ROWS,), 0.0, DTYPE)
    if SPLIT > 1 and not COMPOSE:
        x = _entering_state(compositions, row, rows, share, SPLIT, SPLIT_POWER)

    lane = tl.arange(0, TILE_LANES).to(INDEX)
    position = lane if ADJOINT else TILE_LANES - 1 - lane
    for i in range(first, last):
        start = (i if ADJOINT else tiles - 1 - i) * TILE
        if TIME_IS_CONTIGUOUS:
            step = tl.arange(0, _STEPS)[None, None, :]
            t = start + position[None, :, None] * _STEPS + step
            at = (row[:, None, None], t, (row < rows)[:, None, None] & (t < steps), inner, steps)
            c, d, kept = _prologue(inputs, outputs, scalars, at, KIND, ADJOINT, DTYPE)
            c0, c1, c2, c3 = _split4(c)
            d0, d1, d2, d3 = _split4(d)
        else:
            t = start + position[:, None] * _STEPS
            r = row[None, :]
            at0 = (r, t, (r < rows) & (t < steps), inner, steps)
            at1 = (r, t + 1, (r < rows) & (t + 1 < steps), inner, steps)
            at2 = (r, t + 2, (r < rows) & (t + 2 < steps), inner, steps)
            at3 = (r, t + 3, (r < rows) & (t + 3 < steps), inner, steps)
            c0, d0, kept0 = _prologue(inputs, outputs, scalars, at0, KIND, ADJOINT, DTYPE)
            c1, d1, kept1 = _prologue(inputs, outputs, scalars, at1, KIND, ADJOINT, DTYPE)
            c2, d2, kept2 = _prologue(inputs, outputs, scalars, at2, KIND, ADJOINT, DTYPE)
            c3, d3, kept3 = _prologue(inputs, outputs, scalars, at3, KIND, ADJOINT, DTYPE)

        # Within a lane the recurrence visits its steps from the last to the first.
        if ADJOINT:
            lane_a, lane_b = _compose_lane(c0, c1, c2, c3, d0, d1, d2, d3, ADJOINT)
        else:
            lane_a, lane_b = _compose_lane(c3, c2, c1, c0, d3, d2, d1, d0, ADJOINT)
        if COMPOSE:
            a, x = _append(a, x, lane_a, lane_b, lane, AXIS)
        else:
            entering, x = _enter_lanes(lane_a, lane_b, x, lane, AXIS)
            if ADJOINT:
                o0, o1, o2, o3 = _replay_lane(c0, c1, c2, c3, d0, d1, d2, d3, entering, ADJOINT)
            else:
                o3, o2, o1, o0 = _replay_lane(c3, c2, c1, c0, d3, d2, d1, d0, entering, ADJOINT)
            if TIME_IS_CONTIGUOUS:
                _epilogue(inputs, outputs, at, _join4(o0, o1, o2, o3), kept, KIND, ADJOINT)
            else:
                _epilogue(inputs, outputs, at0, o0, kept0, KIND, ADJOINT)
                _epilogue(inputs, outputs, at1, o1, kept1, KIND, ADJOINT)
                _epilogue(inputs, outputs, at2, o2, kept2, KIND, ADJOINT)
                _epilogue(inputs, outputs, at3, o3, kept3, KIND, ADJOINT)
    if COMPOSE:
        offset = (row * SPLIT + share) * 2
        tl.store(compositions + offset, a, mask=row < rows)
        tl.store(compositions + offset + 1, x, mask=row < rows)


@triton.jit
def _prologue(inputs, outputs, scalars, at, KIND: tl.constexpr, ADJOINT: tl.constexpr, DTYPE: tl.constexpr):
    """c and d of some steps, and what the epilogue will need of their inputs."""
    reward, value, next_value, done, terminated, y, grad_y, grad_target = inputs
    _, _, grad_gamma, grad_lmbda, _, _, _ = outputs
    gamma = _scalar(scalars[0], scalars[1], at, DTYPE)

    # Names that a kind doesn't use hold a placeholder, since all kinds return the same tuple.
    cut = at[2]
    if done is not None:
        cut = _load_mask(done, at)
    terminal = cut
    if terminated is not None:
        terminal = _load_mask(terminated, at)
        cut = cut | terminal

    if KIND == _SCAN:
        lmbda = gamma
        weight = gamma
        c = gamma + tl.zeros_like(at[2]).to(DTYPE)  # of the shape of the mask, which is that of the tile
        if done is not None:
            c = tl.where(cut, 0.0, c)
    else:
        lmbda = _scalar(scalars[2], scalars[3], at, DTYPE)
        weight = gamma
        if KIND == _TD_LAMBDA:
            cut = cut | (at[1] == at[4] - 1)
            weight = tl.where(cut, gamma, gamma - gamma * lmbda)
        c = tl.where(cut, 0.0, gamma * lmbda)

    v = c
    next_v = c
    g_target = c
    y_next = c
    if ADJOINT:
        d = tl.zeros_like(c)
        if grad_y is not None:
            d += _load(grad_y, at, 0, DTYPE)
        if grad_target is not None:
            g_target = _load(grad_target, at, 0, DTYPE)
            d += g_target
        if grad_gamma is not None or grad_lmbda is not None:
            y_next = _load(y, at, 1, DTYPE)
            if KIND != _SCAN:
                next_v = _load(next_value, at, 0, DTYPE)
    else:
        d = _load(reward, at, 0, DTYPE)
        if KIND != _SCAN:
            # Selected, not multiplied by zero: the next value of a terminal step may be NaN.
            d += tl.where(terminal, 0.0, weight * _load(next_value, at, 0, DTYPE))
        if KIND == _GAE:
            v = _load(value, at, 0, DTYPE)
            d -= v
    return c, d, (v, next_v, g_target, y_next, gamma, lmbda, weight, cut, terminal)


@triton.jit
def _epilogue(inputs, outputs, at, o, kept, KIND: tl.constexpr, ADJOINT: tl.constexpr):
    """Stores what follows from y_t (recurrence) or from ∂L/∂d_t (adjoint); ∂L/∂c_t is ∂L/∂d_t · y_{t+1}."""
    y, target, grad_gamma, grad_lmbda, grad_reward, grad_value, grad_next_value = outputs
    v, next_v, g_target, y_next, gamma, lmbda, weight, cut, terminal = kept
    _, _, _, done, _, _, _, incoming_target = inputs
    if not ADJOINT:
        _store(y, at, o)
        if KIND == _GAE:
            _store(target, at, o + v)
    else:
        if grad_reward is not None:
            _store(grad_reward, at, o)
        if grad_value is not None:
            if incoming_target is not None:
                _store(grad_value, at, g_target - o)
            else:
                _store(grad_value, at, -o)
        if grad_next_value is not None:
            _store(grad_next_value, at, tl.where(terminal, 0.0, weight * o))
        if KIND == _SCAN:
            if grad_gamma is not None:
                if done is not None:
                    _store(grad_gamma, at, tl.where(cut, 0.0, o * y_next))
                else:
                    _store(grad_gamma, at, o * y_next)
        else:
            if grad_gamma is not None:
                bootstrap = o * next_v
                if KIND == _TD_LAMBDA:
                    bootstrap = tl.where(cut, bootstrap, bootstrap * (1 - lmbda))
                bootstrap = tl.where(terminal, 0.0, bootstrap)
                _store(grad_gamma, at, bootstrap + lmbda * tl.where(cut, 0.0, o * y_next))
            if grad_lmbda is not None:
                trace = y_next
                if KIND == _TD_LAMBDA:
                    trace = y_next - next_v
                _store(grad_lmbda, at, gamma * tl.where(cut, 0.0, o * trace))


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
    if AXIS == 1:
        # The lanes of a row are the threads of a warp, so that a gather is one shuffle.
        a, b = tl.associative_scan((lane_a, lane_b), AXIS, _compose)
        leaving = b + a * x
        previous = tl.maximum(lane - 1, 0).to(tl.int32) + tl.zeros_like(leaving).to(tl.int32)
        entering = tl.where(lane == 0, x, tl.gather(leaving, previous, AXIS))
    else:
        # A gather would move the whole tile through shared memory into a layout of its own; a scan that also carries
        # the composition of all lanes but the last stays in the layout of the loads.
        one = tl.full(lane_a.shape, 1.0, lane_a.dtype)
        a, b, a_before, b_before = tl.associative_scan(
            (lane_a, lane_b, one, tl.zeros_like(one)), AXIS, _compose_keeping_previous
        )
        leaving = b + a * x
        entering = b_before + a_before * x
    return entering, _last(leaving, lane, AXIS)


@triton.jit
def _compose_keeping_previous(
    a_first, b_first, a_first_before, b_first_before, a_second, b_second, a_second_before, b_second_before
):
    """`_compose`, and the composition of all but the last lane."""
    a, b = _compose(a_first, b_first, a_second, b_second)
    a_before, b_before = _compose(a_first, b_first, a_second_before, b_second_before)
    return a, b, a_before, b_before


@triton.jit
def _append(a, x, lane_a, lane_b, lane, AXIS: tl.constexpr):
    """The composition (a, x) followed by that of a tile's lanes."""
    lane = tl.expand_dims(lane, 1 - AXIS)
    tile_a, tile_b = tl.associative_scan((lane_a, lane_b), AXIS, _compose)
    return _compose(a, x, _last(tile_a, lane, AXIS), _last(tile_b, lane, AXIS))


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
def _entering_state(compositions, row, rows, share, SPLIT: tl.constexpr, SPLIT_POWER: tl.constexpr):
    """The state that enters a share: the composition of all shares before it, from state 0."""
    k = tl.arange(0, SPLIT_POWER)
    offset = (row[:, None] * SPLIT + k[None, :]) * 2
    mask = (row < rows)[:, None] & (k < share)[None, :]
    a = tl.load(compositions + offset, mask=mask, other=1.0)
    b = tl.load(compositions + offset + 1, mask=mask, other=0.0)
    a, b = tl.associative_scan((a, b), 1, _compose)
    return _last(b, k[None, :], 1)


@triton.jit
def _scalar(number, tensor, at, DTYPE: tl.constexpr):
    """γ or λ at some steps."""
    if tensor is None:
        return number
    elif tensor[3] is None:
        return tl.load(tensor[0]).to(DTYPE)
    else:
        return _load(tensor, at, 0, DTYPE)


@triton.jit
def _load(tensor, at, ahead: tl.constexpr, DTYPE: tl.constexpr):
    """Elements of a tensor ``ahead`` steps after the steps ``at``; zero beyond the last step."""
    row, t, mask, inner, steps = at
    if ahead > 0:
        mask = mask & (t + ahead < steps)
    pointer, outer_stride, inner_stride, time_stride = tensor
    offset = (row // inner) * outer_stride + (row % inner) * inner_stride + (t + ahead) * time_stride
    return tl.load(pointer + offset, mask=mask, other=0.0).to(DTYPE)


@triton.jit
def _load_mask(tensor, at):
    row, t, mask, inner, _ = at
    pointer, outer_stride, inner_stride, time_stride = tensor
    offset = (row // inner) * outer_stride + (row % inner) * inner_stride + t * time_stride
    return tl.load(pointer + offset, mask=mask, other=0) != 0


@triton.jit
def _store(tensor, at, x):
    row, t, mask, inner, _ = at
    pointer, outer_stride, inner_stride, time_stride = tensor
    offset = (row // inner) * outer_stride + (row % inner) * inner_stride + t * time_stride
    tl.store(pointer + offset, x.to(pointer.dtype.element_ty), mask=mask)


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
