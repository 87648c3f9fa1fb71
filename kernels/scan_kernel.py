"""The Triton kernel behind every estimator: one scan along time, in either direction.

A step of the scan turns a state x into the next one. The recurrence runs backwards in time, x' = d + c·x, and writes
y = x'. Its adjoint runs forwards in time on the incoming gradient d: it writes d + x and passes on x' = c·(d + x).

Tiles, lanes, shares of split rows, and how tensors are passed, are those of `fusedrl.kernels.scan_tiles`.

A tile is loaded as a whole before anything is computed from it, so that it waits for memory once. Left to itself, the
compiler saves registers by computing as soon as it can, and waits up to 9 times. Therefore what follows the loads is a
block of its own, under a condition that always holds, but in tiles beyond the last step, which are composed to nothing.
With contiguous time, the state that enters a share is asked for behind the loads of its first tile, so that both are
waited for at once; with several warps per program that takes longer than before the loads.

A program has BLOCKS times TILE_ROWS rows: more than one block where rows are so many and so short that programs would
take longer to start than to run.

γ and λ are numbers, or tensors, of which a 0-d one is (pointer, 0).
"""

import triton
import triton.language as tl

from .primitives import as_float64
from .scan_problem import GAE, SCAN, TD_LAMBDA
from .scan_tiles import (
    STEPS,
    all_ended,
    enter_lanes,
    entering_state,
    inside,
    join4,
    load,
    prepend,
    share_of_program,
    split4,
    store,
    store_composition,
)

_GAE = tl.constexpr(GAE)
_SCAN = tl.constexpr(SCAN)
_TD_LAMBDA = tl.constexpr(TD_LAMBDA)


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
    PARTS: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLIT_POWER: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Recurrence: reads reward … terminated, writes y and target. Adjoint: also reads grad_y, grad_target and y."""
    inputs = (reward, value, next_value, done, terminated, y, grad_y, grad_target)
    outputs = (y, target, grad_gamma, grad_lmbda, grad_reward, grad_value, grad_next_value)
    scalars = (_number(gamma, gamma_tensor, DTYPE), gamma_tensor, _number(lmbda, lmbda_tensor, DTYPE), lmbda_tensor)
    TILE: tl.constexpr = TILE_LANES * STEPS
    AXIS: tl.constexpr = 1 if TIME_IS_CONTIGUOUS else 0

    share, first, last, tiles = share_of_program(steps, TILE, PARTS, SPLIT)

    lane = tl.arange(0, TILE_LANES).to(INDEX)
    position = lane if ADJOINT else TILE_LANES - 1 - lane
    for block in range(tl.program_id(0) // SPLIT * BLOCKS, tl.program_id(0) // SPLIT * BLOCKS + BLOCKS):
        row = tl.full((), TILE_ROWS, INDEX) * block + tl.arange(0, TILE_ROWS)
        # In COMPOSE (a, x) is the composition of the steps walked so far, and whether a trajectory ended in them. Where
        # there is no row, nothing is looked for.
        a = tl.full((TILE_ROWS,), 1.0, DTYPE)
        ended = tl.where(row < rows, 0, 1)
        x = tl.full((TILE_ROWS,), 0.0, DTYPE)
        if SPLIT > 1 and not COMPOSE and not TIME_IS_CONTIGUOUS:
            x = entering_state(compositions, row, share, TIME_IS_CONTIGUOUS, TILE_LANES, SPLIT_POWER, DTYPE)

        tile = last - 1 if COMPOSE else first
        start = (tile if ADJOINT else tiles - 1 - tile).to(INDEX) * TILE
        left = last - first
        if COMPOSE:
            left = tl.where(share == SPLIT - 1, 0, left)  # no share comes after the last
        while left > 0:
            if TIME_IS_CONTIGUOUS:
                step = tl.arange(0, STEPS)[None, None, :]
                t = start + position[None, :, None] * STEPS + step
                at = (row[:, None, None], t, (row < rows)[:, None, None], inner, steps, layout)
                read = _read(inputs, outputs, scalars, at, 0, KIND, ADJOINT)
            else:
                t = start + position[:, None] * STEPS
                at = (row[None, :], t, (row < rows)[None, :], inner, steps, layout)
                read0 = _read(inputs, outputs, scalars, at, 0, KIND, ADJOINT)
                read1 = _read(inputs, outputs, scalars, at, 1, KIND, ADJOINT)
                read2 = _read(inputs, outputs, scalars, at, 2, KIND, ADJOINT)
                read3 = _read(inputs, outputs, scalars, at, 3, KIND, ADJOINT)
            if SPLIT > 1 and not COMPOSE and TIME_IS_CONTIGUOUS:  # noqa: SIM102  # a constant, unlike the next
                if left == last - first:  # see above
                    x = entering_state(compositions, row, share, TIME_IS_CONTIGUOUS, TILE_LANES, SPLIT_POWER, DTYPE)
            if start < steps:  # always; see above
                if TIME_IS_CONTIGUOUS:
                    c, d, kept = _prologue(read, inputs, scalars, at, 0, KIND, ADJOINT, DTYPE)
                    c0, c1, c2, c3 = split4(c)
                    d0, d1, d2, d3 = split4(d)
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
                    a, x = prepend(a, x, lane_a, lane_b, lane, AXIS)
                    if TIME_IS_CONTIGUOUS:
                        ends = tl.max(_ends(read, inputs, at), 2)
                    else:
                        ends = _ends(read0, inputs, at) | _ends(read1, inputs, at)
                        ends = ends | _ends(read2, inputs, at) | _ends(read3, inputs, at)
                    ended = ended | tl.max(ends, AXIS)
                    left = tl.where(all_ended(ended, lane, AXIS), 0, left)
                else:
                    entering, x = enter_lanes(lane_a, lane_b, x, lane, AXIS)
                    if ADJOINT:
                        o0, o1, o2, o3 = _replay_lane(c0, c1, c2, c3, d0, d1, d2, d3, entering, ADJOINT)
                    else:
                        o3, o2, o1, o0 = _replay_lane(c3, c2, c1, c0, d3, d2, d1, d0, entering, ADJOINT)
                    if TIME_IS_CONTIGUOUS:
                        _epilogue(inputs, outputs, at, 0, join4(o0, o1, o2, o3), kept, KIND, ADJOINT)
                    else:
                        _epilogue(inputs, outputs, at, 0, o0, kept0, KIND, ADJOINT)
                        _epilogue(inputs, outputs, at, 1, o1, kept1, KIND, ADJOINT)
                        _epilogue(inputs, outputs, at, 2, o2, kept2, KIND, ADJOINT)
                        _epilogue(inputs, outputs, at, 3, o3, kept3, KIND, ADJOINT)
            start += TILE if ADJOINT != COMPOSE else -TILE
            left -= 1
        if COMPOSE:
            store_composition(compositions, row, share, a, x, ended, SPLIT_POWER, DTYPE)


@triton.jit
def _read(inputs, outputs, scalars, at, K: tl.constexpr, KIND: tl.constexpr, ADJOINT: tl.constexpr):
    """All that some steps need from memory, loaded before anything is computed, so that one wait serves all loads."""
    reward, value, next_value, done, terminated, y, grad_y, grad_target = inputs
    _, _, grad_gamma, grad_lmbda, _, _, _ = outputs
    _, gamma_tensor, _, lmbda_tensor = scalars
    scalar_gradients: tl.constexpr = ADJOINT and (grad_gamma is not None or grad_lmbda is not None)
    nothing = at[1]  # in the place of what isn't needed, since a tuple of a function has no None in Triton 3.6
    return (
        nothing if ADJOINT else load(reward, at, K),
        nothing if ADJOINT or KIND != _GAE else load(value, at, K),
        nothing if KIND == _SCAN or (ADJOINT and not scalar_gradients) else load(next_value, at, K),
        nothing if done is None else load(done, at, K),
        nothing if terminated is None else load(terminated, at, K),
        load(y, at, K, 1) if scalar_gradients else nothing,
        nothing if grad_y is None else load(grad_y, at, K),
        nothing if grad_target is None else load(grad_target, at, K),
        load(gamma_tensor, at, K) if _is_per_step(gamma_tensor) else nothing,
        load(lmbda_tensor, at, K) if _is_per_step(lmbda_tensor) else nothing,
    )


@triton.jit
def _prologue(
    read, inputs, scalars, at, K: tl.constexpr, KIND: tl.constexpr, ADJOINT: tl.constexpr, DTYPE: tl.constexpr
):
    """c and d of some steps, and what the epilogue will need of their inputs."""
    reward, v, next_v, done, terminated, y_next, g_y, g_target, gamma, lmbda = read
    _, _, _, done_tensor, terminated_tensor, _, grad_y, grad_target = inputs
    gamma_number, gamma_tensor, lmbda_number, lmbda_tensor = scalars
    gamma = gamma.to(DTYPE) if _is_per_step(gamma_tensor) else gamma_number
    lmbda = lmbda.to(DTYPE) if _is_per_step(lmbda_tensor) else lmbda_number
    v = v.to(DTYPE)
    next_v = next_v.to(DTYPE)
    trace = y_next.to(DTYPE)
    g_target = g_target.to(DTYPE)

    cut = done != 0
    terminal = cut
    if terminated_tensor is not None:
        terminal = terminated != 0
        cut = cut | terminal

    if KIND == _SCAN:
        c = gamma + tl.zeros_like(inside(at, K)).to(DTYPE)  # of the shape of the mask, which is that of the tile
        if done_tensor is not None:
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
        if grad_y is None:
            d = g_target
        else:
            d = g_y.to(DTYPE)
            if grad_target is not None:
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
    _, _, _, _, _, _, _, grad_target = inputs
    y, target, grad_gamma, grad_lmbda, grad_reward, grad_value, grad_next_value = outputs
    c, v, next_v, g_target, trace, gamma, lmbda, terminal = kept
    if not ADJOINT:
        store(y, at, K, o)
        if KIND == _GAE:
            store(target, at, K, o + v)
    else:
        if grad_reward is not None:
            store(grad_reward, at, K, o)
        if grad_value is not None:
            if grad_target is not None:
                store(grad_value, at, K, g_target - o)
            else:
                store(grad_value, at, K, -o)
        if grad_next_value is not None:
            # The weight of v' is γ in GAE, and in TD(λ) γ − c: γ(1−λ), or γ where the trajectory ends.
            weighted = gamma * o
            if KIND == _TD_LAMBDA:
                weighted -= c * o
            store(grad_next_value, at, K, tl.where(terminal, 0.0, weighted))
        if grad_gamma is not None:
            if KIND == _SCAN:
                store(grad_gamma, at, K, o * trace)
            else:
                store(grad_gamma, at, K, o * (next_v + lmbda * trace))
        if grad_lmbda is not None:
            store(grad_lmbda, at, K, gamma * o * trace)


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
def _ends(read, inputs, at):
    """1 where a trajectory ends; nothing of what came before passes such a step, be it NaN."""
    _, _, _, done_tensor, terminated_tensor, _, _, _ = inputs
    _, _, _, done, terminated, _, _, _, _, _ = read
    if done_tensor is None:
        ends = at[2] & (at[1] < 0)  # nowhere
    else:
        ends = done != 0
        if terminated_tensor is not None:
            ends = ends | (terminated != 0)
    return ends.to(tl.int32)


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
