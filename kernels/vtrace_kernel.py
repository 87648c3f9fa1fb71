"""The Triton kernel of V-trace: a scan between what makes its inputs and the advantage.

Tiles, lanes, shares of split rows, and how tensors are passed, are those of `fusedrl.kernels.scan_tiles`, blocks those
of `fusedrl.kernels.scan_kernel`.

The recurrence runs backwards in time on x' = d + c·x with d = ρ(r + γ(1−term)v' − v) and c = γ·min(c̄, w); x is the
value target less v. Its adjoint runs forwards in time: a step adds the gradient d of its value target to the state,
o = d + x, and passes on x' = c·o + e, where e = γρ·∂L/∂A goes from the advantage to the next step's value target.

What a step needs of its neighbours is read from memory again, where it is in a cache: v and the value target of the
next step, and, in the adjoint, the e of the one before.

γ and the thresholds are numbers, or 0-d tensors by their address.
"""

import triton
import triton.language as tl

from .primitives import scalar
from .scan_tiles import (
    STEPS,
    all_ended,
    enter_lanes,
    entering_state,
    join4,
    load,
    prepend,
    share_of_program,
    split4,
    store,
    store_composition,
)


@triton.jit
def vtrace_kernel(
    log_pi,
    log_mu,
    value,
    next_value,
    reward,
    done,
    terminated,
    advantage,
    target,
    grad_advantage,
    grad_target,
    grad_log_pi,
    grad_log_mu,
    grad_value,
    grad_next_value,
    grad_reward,
    gamma: "fp64",  # type: ignore[name-defined]  # noqa: F821  # Triton's type: a bare float would be single precision
    gamma_tensor,
    rho: "fp64",  # type: ignore[name-defined]  # noqa: F821  # likewise
    rho_tensor,
    c: "fp64",  # type: ignore[name-defined]  # noqa: F821  # likewise
    c_tensor,
    compositions,
    layout,
    rows,
    inner,
    steps,
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
    """Recurrence: reads log_pi … terminated, writes advantage and target. Adjoint: reads all of these, writes grads."""
    inputs = (log_pi, log_mu, value, next_value, reward, done, terminated, target, grad_advantage, grad_target)
    outputs = (advantage, target, grad_log_pi, grad_log_mu, grad_value, grad_next_value, grad_reward)
    # The thresholds as logarithms: the exponential of a large log-weight is infinite, and its gradient NaN.
    scalars = (
        scalar(gamma, gamma_tensor).to(DTYPE),
        tl.log(scalar(rho, rho_tensor)).to(DTYPE),
        tl.log(scalar(c, c_tensor)).to(DTYPE),
    )
    TILE: tl.constexpr = TILE_LANES * STEPS
    AXIS: tl.constexpr = 1 if TIME_IS_CONTIGUOUS else 0

    share, first, last, tiles = share_of_program(steps, TILE, PARTS, SPLIT)

    lane = tl.arange(0, TILE_LANES).to(INDEX)
    position = lane if ADJOINT else TILE_LANES - 1 - lane
    for block in range(tl.program_id(0) // SPLIT * BLOCKS, tl.program_id(0) // SPLIT * BLOCKS + BLOCKS):
        row = tl.full((), TILE_ROWS, INDEX) * block + tl.arange(0, TILE_ROWS)
        a = tl.full((TILE_ROWS,), 1.0, DTYPE)
        ended = tl.where(row < rows, 0, 1)
        x = tl.full((TILE_ROWS,), 0.0, DTYPE)
        if SPLIT > 1 and not COMPOSE:
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
                read = _read(inputs, at, 0, ADJOINT, COMPOSE)
            else:
                t = start + position[:, None] * STEPS
                at = (row[None, :], t, (row < rows)[None, :], inner, steps, layout)
                read0 = _read(inputs, at, 0, ADJOINT, COMPOSE)
                read1 = _read(inputs, at, 1, ADJOINT, COMPOSE)
                read2 = _read(inputs, at, 2, ADJOINT, COMPOSE)
                read3 = _read(inputs, at, 3, ADJOINT, COMPOSE)
            if start < steps:  # always; see the text of `fusedrl.kernels.scan_kernel`
                if TIME_IS_CONTIGUOUS:
                    c_all, d_all, e_all = _prologue(read, inputs, scalars, ADJOINT, DTYPE)
                    c0, c1, c2, c3 = split4(c_all)
                    d0, d1, d2, d3 = split4(d_all)
                    e0, e1, e2, e3 = split4(e_all)
                else:
                    c0, d0, e0 = _prologue(read0, inputs, scalars, ADJOINT, DTYPE)
                    c1, d1, e1 = _prologue(read1, inputs, scalars, ADJOINT, DTYPE)
                    c2, d2, e2 = _prologue(read2, inputs, scalars, ADJOINT, DTYPE)
                    c3, d3, e3 = _prologue(read3, inputs, scalars, ADJOINT, DTYPE)
                lane_a = c0 * c1 * (c2 * c3)
                if ADJOINT:
                    lane_b = c3 * (d3 + c2 * (d2 + c1 * (d1 + c0 * d0 + e0) + e1) + e2) + e3
                else:
                    lane_b = d0 + c0 * (d1 + c1 * (d2 + c2 * d3))
                if COMPOSE:
                    a, x = prepend(a, x, lane_a, lane_b, lane, AXIS)
                    if TIME_IS_CONTIGUOUS:
                        ends = tl.max(_ends(read, inputs), 2)
                    else:
                        ends = _ends(read0, inputs) | _ends(read1, inputs) | _ends(read2, inputs) | _ends(read3, inputs)
                    ended = ended | tl.max(ends, AXIS)
                    left = tl.where(all_ended(ended, lane, AXIS), 0, left)
                else:
                    entering, x = enter_lanes(lane_a, lane_b, x, lane, AXIS)
                    # o, and the state that entered the step.
                    if ADJOINT:
                        x0 = entering
                        x1 = c0 * (d0 + x0) + e0
                        x2 = c1 * (d1 + x1) + e1
                        x3 = c2 * (d2 + x2) + e2
                        o0, o1, o2, o3 = d0 + x0, d1 + x1, d2 + x2, d3 + x3
                    else:
                        x3 = entering
                        o3 = d3 + c3 * x3
                        x2 = o3
                        o2 = d2 + c2 * x2
                        x1 = o2
                        o1 = d1 + c1 * x1
                        x0 = o1
                        o0 = d0 + c0 * x0
                    if TIME_IS_CONTIGUOUS:
                        o = join4(o0, o1, o2, o3)
                        entered = join4(x0, x1, x2, x3)
                        _epilogue(read, inputs, outputs, scalars, at, 0, o, entered, ADJOINT, DTYPE)
                    else:
                        _epilogue(read0, inputs, outputs, scalars, at, 0, o0, x0, ADJOINT, DTYPE)
                        _epilogue(read1, inputs, outputs, scalars, at, 1, o1, x1, ADJOINT, DTYPE)
                        _epilogue(read2, inputs, outputs, scalars, at, 2, o2, x2, ADJOINT, DTYPE)
                        _epilogue(read3, inputs, outputs, scalars, at, 3, o3, x3, ADJOINT, DTYPE)
            start += TILE if ADJOINT != COMPOSE else -TILE
            left -= 1
        if COMPOSE:
            store_composition(compositions, row, share, a, x, ended, SPLIT_POWER, DTYPE)


@triton.jit
def _read(inputs, at, K: tl.constexpr, ADJOINT: tl.constexpr, COMPOSE: tl.constexpr):
    """All that some steps need from memory, loaded before anything is computed."""
    log_pi, log_mu, value, next_value, reward, done, terminated, target, grad_advantage, grad_target = inputs
    nothing = at[1]  # in the place of what isn't needed, since a tuple of a function has no None in Triton 3.6
    only_state: tl.constexpr = ADJOINT and COMPOSE
    weighted: tl.constexpr = ADJOINT and grad_advantage is not None
    before: tl.constexpr = weighted and not COMPOSE
    return (
        load(log_pi, at, K),
        nothing if log_mu is None else load(log_mu, at, K),
        nothing if only_state else load(value, at, K),
        nothing if only_state else load(next_value, at, K),
        nothing if only_state else load(reward, at, K),
        load(done, at, K),
        nothing if terminated is None else load(terminated, at, K),
        nothing if COMPOSE else load(value, at, K, 1),
        load(target, at, K, 1) if ADJOINT and not COMPOSE else nothing,
        load(grad_advantage, at, K) if weighted else nothing,
        nothing if grad_target is None else load(grad_target, at, K),
        _load_before(log_pi, at, K) if before else nothing,
        _load_before(log_mu, at, K) if before and log_mu is not None else nothing,
        _load_before(done, at, K) if before else nothing,
        _load_before(terminated, at, K) if before and terminated is not None else nothing,
        _load_before(grad_advantage, at, K) if before else nothing,
    )


@triton.jit
def _load_before(tensor, at, K: tl.constexpr):
    """Elements of the steps before those ``at``; zero before the first step."""
    if K > 0:
        return load(tensor, at, K - 1)
    else:
        return load(tensor, (at[0], at[1] - 1, at[2] & (at[1] > 0), at[3], at[4], at[5]), 0)


@triton.jit
def _weights(log_pi, log_mu, has_log_mu: tl.constexpr, scalars, DTYPE: tl.constexpr):
    """log w, ρ and c. A NaN is carried on, which a minimum would not do."""
    _, log_rho_thresh, log_c_thresh = scalars
    log_weight = log_pi.to(DTYPE)
    if has_log_mu:
        log_weight -= log_mu.to(DTYPE)
    rho = tl.exp(tl.where(log_weight > log_rho_thresh, log_rho_thresh, log_weight))
    c = tl.exp(tl.where(log_weight > log_c_thresh, log_c_thresh, log_weight))
    return log_weight, rho, c


@triton.jit
def _masks(done, terminated, has_terminated: tl.constexpr):
    """Where the trajectory ends, and where its last value isn't looked at."""
    ends = done != 0
    terminal = ends
    if has_terminated:
        terminal = terminated != 0
        ends = ends | terminal
    return ends, terminal


@triton.jit
def _ends(read, inputs):
    """1 where a trajectory ends."""
    _, _, _, _, _, _, terminated_tensor, _, _, _ = inputs
    _, _, _, _, _, done, terminated, _, _, _, _, _, _, _, _, _ = read
    ends, _ = _masks(done, terminated, terminated_tensor is not None)
    return ends.to(tl.int32)


@triton.jit
def _prologue(read, inputs, scalars, ADJOINT: tl.constexpr, DTYPE: tl.constexpr):
    """c, d and e of some steps."""
    log_pi, log_mu, v, next_v, r, done, terminated, _, _, g_advantage, g_target, _, _, _, _, _ = read
    _, log_mu_tensor, _, _, _, _, terminated_tensor, _, grad_advantage, grad_target = inputs
    gamma, _, _ = scalars
    _, rho, c = _weights(log_pi, log_mu, log_mu_tensor is not None, scalars, DTYPE)
    ends, terminal = _masks(done, terminated, terminated_tensor is not None)
    zero = tl.zeros_like(rho)
    c = tl.where(ends, 0.0, gamma * c)
    if ADJOINT:
        d = zero
        e = zero
        if grad_target is not None:
            d = g_target.to(DTYPE)
        if grad_advantage is not None:
            e = tl.where(ends, 0.0, gamma * rho * g_advantage.to(DTYPE))
    else:
        bootstrap = tl.where(terminal, 0.0, next_v.to(DTYPE))
        d = rho * (r.to(DTYPE) + gamma * bootstrap - v.to(DTYPE))
        e = zero
    return c, d, e


@triton.jit
def _epilogue(
    read, inputs, outputs, scalars, at, K: tl.constexpr, o, entered, ADJOINT: tl.constexpr, DTYPE: tl.constexpr
):
    """Stores what follows from the value target less v (recurrence) or from the gradient of it (adjoint)."""
    (
        log_pi,
        log_mu,
        v,
        next_v,
        r,
        done,
        terminated,
        v_after,
        target_after,
        g_advantage,
        g_target,
        log_pi_before,
        log_mu_before,
        done_before,
        terminated_before,
        g_before,
    ) = read
    _, log_mu_tensor, _, _, _, _, terminated_tensor, _, grad_advantage, grad_target = inputs
    advantage, target, grad_log_pi, grad_log_mu, grad_value, grad_next_value, grad_reward = outputs
    gamma, log_rho_thresh, log_c_thresh = scalars
    log_weight, rho, c = _weights(log_pi, log_mu, log_mu_tensor is not None, scalars, DTYPE)
    ends, terminal = _masks(done, terminated, terminated_tensor is not None)
    ends = ends | (at[1] == at[4] - 1 - K)
    bootstrap = tl.where(terminal, 0.0, next_v.to(DTYPE))
    v = v.to(DTYPE)
    rest = r.to(DTYPE) - v
    if not ADJOINT:
        following = tl.where(ends, bootstrap, v_after.to(DTYPE) + entered)
        store(target, at, K, v + o)
        store(advantage, at, K, rho * (rest + gamma * following))
    else:
        total = o  # the gradient of r + γv' − v, as far as ρ times it is
        direct = tl.zeros_like(o)  # of v, by way of value targets that hold it
        along_rho = o * (rest + gamma * bootstrap)
        at_end = o
        following = tl.where(ends, bootstrap, target_after.to(DTYPE))
        if grad_target is not None:
            direct = g_target.to(DTYPE)
        if grad_advantage is not None:
            g = g_advantage.to(DTYPE)
            total += g
            along_rho += g * (rest + gamma * following)
            at_end = tl.where(ends, total, o)
            _, rho_before, _ = _weights(log_pi_before, log_mu_before, log_mu_tensor is not None, scalars, DTYPE)
            ended, _ = _masks(done_before, terminated_before, terminated_tensor is not None)
            direct += tl.where(ended, 0.0, gamma * rho_before * g_before.to(DTYPE))
        if grad_reward is not None:
            store(grad_reward, at, K, rho * total)
        if grad_value is not None:
            store(grad_value, at, K, direct - rho * total)
        if grad_next_value is not None:
            store(grad_next_value, at, K, tl.where(terminal, 0.0, gamma * rho * at_end))
        if grad_log_pi is not None or grad_log_mu is not None:
            along_c = tl.where(ends, 0.0, gamma * o * (target_after.to(DTYPE) - v_after.to(DTYPE)))
            slope = tl.where(log_weight > log_rho_thresh, 0.0, rho * along_rho)
            slope += tl.where(log_weight > log_c_thresh, 0.0, c * along_c)
            if grad_log_pi is not None:
                store(grad_log_pi, at, K, slope)
            if grad_log_mu is not None:
                store(grad_log_mu, at, K, -slope)
