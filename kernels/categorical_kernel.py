"""The Triton kernels of the categorical loss: one launch forward, one backward, and the projection alone.

What owns what. A program is one warp, with one sample, or some after each other.

    choose      tile [atoms, actions], some atoms at a time: z_j · exp(log p_j(a)) is added up per lane, summed over
                atoms after the last tile, and the first of the greatest actions is a*
    project     a lane owns 2 targets i, and adds up p_j · max(0, 1 − |b_j − i|) of the atoms j that may land within 1
                of one: next to each other, and 2/γ or so, since evenly spaced atoms land evenly. It looks p_j up, which
                the cache has. What is clipped to the ends of the support is summed over all atoms, once
    loss        −m_i · log p_i is added up per lane, and summed over lanes after the last targets

Backward a program writes the dense gradient of its samples, zeros included, in tiles [atoms, actions].

Sums run in one fixed order and nothing is added by atomics: results are bitwise reproducible. A NaN is carried on,
which most minima and maxima don't do: where an atom lands nowhere, that takes the place of all mass.

Distributions are passed as (pointer, batch stride, atom stride, action stride), members of the batch as (pointer, batch
stride); a tensor that isn't there is None. γ is a number, or a tensor, whose stride is 0 if it is a 0-d one.
A sample's first element is found in 64 bits, what lies in the sample in INDEX. Where samples are dense their strides
are constants to the kernel, so that addresses are computed once and loads are wide.
"""

import triton
import triton.language as tl

from .primitives import as_float64


@triton.jit
def loss_kernel(
    log_prob,
    action,
    next_log_prob,
    next_online_log_prob,
    support,
    reward,
    terminated,
    gamma: "fp64",  # type: ignore[name-defined]  # noqa: F821  # Triton's type: a bare float would be single precision
    gamma_tensor,
    loss,
    projected,
    samples,
    ATOMS: tl.constexpr,
    ACTIONS: tl.constexpr,
    DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
    ACTIONS_POWER: tl.constexpr,
    TILE_ATOMS: tl.constexpr,
    TARGETS: tl.constexpr,
    SOURCES: tl.constexpr,
    UNEVEN: tl.constexpr,
    ROUNDING: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    """Reads all but loss and projected; writes the loss and, if the gradient will be needed, the projection."""
    chooser = next_log_prob if next_online_log_prob is None else next_online_log_prob
    values = _values(support, gamma, ATOMS, DTYPE, INDEX)
    first = tl.program_id(0) * SAMPLES
    for n in range(first, tl.minimum(first + SAMPLES, samples)):
        sample = tl.full((), 0, tl.int64) + n
        # What doesn't depend on the next action is asked for before it is known.
        bellman = _bellman(values, reward, terminated, gamma_tensor, sample, ATOMS, DTYPE, UNEVEN, ROUNDING)
        taken = tl.load(action[0] + sample * action[1])
        # Of an action that doesn't exist nothing is read, and the loss says so.
        exists = (taken >= 0) & (taken < ACTIONS)
        atoms = tl.where(exists, ATOMS, 0)
        taken = taken.to(INDEX)
        pointer, stride = _column(log_prob, sample, taken)
        best = _greedy_action(chooser, support, sample, ATOMS, ACTIONS, DTYPE, INDEX, ACTIONS_POWER, TILE_ATOMS)
        target = _column(next_log_prob, sample, best)

        clipped = _clipped(target, True, support, bellman, ATOMS, DTYPE, INDEX, SOURCES)
        weighted = tl.zeros((TARGETS,), DTYPE)
        for start in range(0, ATOMS, TARGETS):
            i = start + tl.arange(0, TARGETS)
            log_p = tl.load(pointer + i.to(INDEX) * stride, mask=i < atoms, other=0.0).to(DTYPE)
            m = _project(target, True, support, bellman, clipped, i, ATOMS, DTYPE, INDEX)
            if projected is not None:
                tl.store(projected + sample * ATOMS + i, m, mask=i < ATOMS)
            # Selected: an atom without mass counts for nothing even if its log-probability is −∞.
            weighted += tl.where(m == 0.0, 0.0, m * log_p)
        cross_entropy = tl.where(exists, -tl.sum(weighted, 0), float("nan"))
        tl.store(loss + sample, cross_entropy.to(loss.dtype.element_ty))


@triton.jit
def gradient_kernel(
    action,
    projected,
    grad,
    found,
    samples,
    ATOMS: tl.constexpr,
    ACTIONS: tl.constexpr,
    DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
    ACTIONS_POWER: tl.constexpr,
    TILE_ATOMS: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    """Writes ∂L/∂log p(a)_i · grad: −m_i · grad for the taken action, 0 for the others."""
    a = tl.arange(0, ACTIONS_POWER).to(INDEX)
    first = tl.program_id(0) * SAMPLES
    for n in range(first, tl.minimum(first + SAMPLES, samples)):
        sample = tl.full((), 0, tl.int64) + n
        taken = tl.load(action[0] + sample * action[1]).to(INDEX)
        incoming = tl.load(grad[0] + sample * grad[1]).to(DTYPE)
        for start in range(0, ATOMS, TILE_ATOMS):
            i = start + tl.arange(0, TILE_ATOMS).to(INDEX)
            m = tl.load(projected + sample * ATOMS + i, mask=i < ATOMS, other=0.0)
            value = tl.where(a[None, :] == taken, -(incoming * m)[:, None], 0.0)
            offset = i[:, None] * found[2] + a[None, :] * found[3]
            mask = (i < ATOMS)[:, None] & (a < ACTIONS)[None, :]
            tl.store(found[0] + sample * found[1] + offset, value.to(found[0].dtype.element_ty), mask=mask)


@triton.jit
def projection_kernel(
    prob,
    support,
    reward,
    terminated,
    gamma: "fp64",  # type: ignore[name-defined]  # noqa: F821  # likewise
    gamma_tensor,
    projected,
    samples,
    ATOMS: tl.constexpr,
    DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
    TARGETS: tl.constexpr,
    SOURCES: tl.constexpr,
    UNEVEN: tl.constexpr,
    ROUNDING: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    """The projection of ``prob``, passed as (pointer, batch stride, atom stride)."""
    values = _values(support, gamma, ATOMS, DTYPE, INDEX)
    first = tl.program_id(0) * SAMPLES
    for n in range(first, tl.minimum(first + SAMPLES, samples)):
        sample = tl.full((), 0, tl.int64) + n
        bellman = _bellman(values, reward, terminated, gamma_tensor, sample, ATOMS, DTYPE, UNEVEN, ROUNDING)
        column = (prob[0] + sample * prob[1], prob[2])
        clipped = _clipped(column, False, support, bellman, ATOMS, DTYPE, INDEX, SOURCES)
        for start in range(0, ATOMS, TARGETS):
            i = start + tl.arange(0, TARGETS)
            m = _project(column, False, support, bellman, clipped, i, ATOMS, DTYPE, INDEX)
            tl.store(projected + sample * ATOMS + i, m.to(projected.dtype.element_ty), mask=i < ATOMS)


@triton.jit
def _column(distribution, sample, action):
    """An action's atoms: (pointer to the first, stride)."""
    pointer, batch_stride, atom_stride, action_stride = distribution
    return pointer + sample * batch_stride + action * action_stride, atom_stride


@triton.jit
def _greedy_action(
    log_prob,
    support,
    sample,
    ATOMS: tl.constexpr,
    ACTIONS: tl.constexpr,
    DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
    ACTIONS_POWER: tl.constexpr,
    TILE_ATOMS: tl.constexpr,
):
    """argmax_a Σ_j z_j p_j(a), the first of equals; a NaN is the greatest, as it is to PyTorch."""
    pointer, batch_stride, atom_stride, action_stride = log_prob
    a = tl.arange(0, ACTIONS_POWER).to(INDEX)
    q = tl.zeros((TILE_ATOMS, ACTIONS_POWER), DTYPE)
    for start in range(0, ATOMS, TILE_ATOMS):
        j = start + tl.arange(0, TILE_ATOMS).to(INDEX)
        mask = (j < ATOMS)[:, None] & (a < ACTIONS)[None, :]
        offset = j[:, None] * atom_stride + a[None, :] * action_stride
        log_p = tl.load(pointer + sample * batch_stride + offset, mask=mask, other=0.0).to(DTYPE)
        z = tl.load(support[0] + j * support[1], mask=j < ATOMS, other=0.0).to(DTYPE)
        q += z[:, None] * tl.exp(log_p)
    q = tl.sum(q, 0)
    q = tl.where(a < ACTIONS, tl.where(q == q, q, float("inf")), float("-inf"))
    return tl.argmax(q, 0, tie_break_left=True).to(INDEX)


@triton.jit
def _values(support, gamma, ATOMS: tl.constexpr, DTYPE: tl.constexpr, INDEX: tl.constexpr):
    """What all samples have in common: the ends of the support, how many atoms a return of 1 is, and γ."""
    v_min = tl.load(support[0]).to(DTYPE)
    v_max = tl.load(support[0] + tl.full((), ATOMS - 1, INDEX) * support[1]).to(DTYPE)
    return v_min, v_max, (ATOMS - 1) / (v_max - v_min), as_float64(gamma).to(DTYPE)


@triton.jit
def _bellman(
    values,
    reward,
    terminated,
    gamma_tensor,
    sample,
    ATOMS: tl.constexpr,
    DTYPE: tl.constexpr,
    UNEVEN: tl.constexpr,
    ROUNDING: tl.constexpr,
):
    """Where the atoms of a sample land, b_j = start + step · z_j, and which of them are within 1 of a target.

    They land evenly, ``apart`` = γ from b_0 = ``lowest`` on, but for ``slack``. Those within 1 of target i are among
    ``near`` that follow each other, from (i − 1 − slack − lowest) / apart on. Where that's nearly all, ``apart`` is 0.
    """
    v_min, v_max, atoms_per_value, discount = values
    if gamma_tensor is not None:
        discount = tl.load(gamma_tensor[0] + sample * gamma_tensor[1]).to(DTYPE)
    r = tl.load(reward[0] + sample * reward[1]).to(DTYPE)
    terminal = tl.load(terminated[0] + sample * terminated[1]) != 0
    start, step = (r - v_min) * atoms_per_value, discount * atoms_per_value
    furthest = tl.abs(step) * tl.maximum(tl.abs(v_min), tl.abs(v_max))
    # A quarter of an atom costs nothing where γ is near 1, and lets a support lie less evenly than its dtype says.
    slack = 0.25 + UNEVEN * furthest + ROUNDING * (tl.abs(start) + furthest + ATOMS)
    width = 2.0 + 2.0 * slack
    apart = tl.where(discount * ATOMS > width, discount, 0.0)
    near = tl.where(apart > 0.0, (width / tl.where(apart > 0.0, apart, 1.0)).to(tl.int32) + 1, ATOMS)
    return start, step, terminal, start + step * v_min, slack, apart, near


@triton.jit
def _landing(
    column, LOG: tl.constexpr, support, bellman, j, ATOMS: tl.constexpr, DTYPE: tl.constexpr, INDEX: tl.constexpr
):
    """The mass of atoms j of the column's (log-)probabilities, 0 beyond the last one, and b_j."""
    pointer, stride = column
    start, step, _, _, _, _, _ = bellman
    p = tl.load(pointer + j.to(INDEX) * stride, mask=j < ATOMS, other=float("-inf") if LOG else 0.0).to(DTYPE)
    if LOG:
        p = tl.exp(p)
    # Beyond the last atom not 0, which lands nowhere if γ is infinite.
    z = tl.load(support[0] + j.to(INDEX) * support[1], mask=j < ATOMS, other=1.0).to(DTYPE)
    return p, start + step * z


@triton.jit
def _clipped(
    column,
    LOG: tl.constexpr,
    support,
    bellman,
    ATOMS: tl.constexpr,
    DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
    SOURCES: tl.constexpr,
):
    """The mass that clipping adds to the first target and to the last one: what the hat function leaves of it there.

    The first target's is NaN if an atom lands nowhere, as 0 does if γ is infinite.
    """
    below = tl.zeros((SOURCES,), DTYPE)
    above = tl.zeros((SOURCES,), DTYPE)
    for first in range(0, ATOMS, SOURCES):
        p, b = _landing(column, LOG, support, bellman, first + tl.arange(0, SOURCES), ATOMS, DTYPE, INDEX)
        outside = tl.maximum(0.0 - b, 0.0, propagate_nan=tl.PropagateNan.ALL)
        below += p * tl.minimum(outside, 1.0, propagate_nan=tl.PropagateNan.ALL)
        above += p * tl.minimum(tl.maximum(b - (ATOMS - 1), 0.0), 1.0)
    return tl.sum(below, 0), tl.sum(above, 0)


@triton.jit
def _project(
    column,
    LOG: tl.constexpr,
    support,
    bellman,
    clipped,
    i,
    ATOMS: tl.constexpr,
    DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
):
    """m_i = Σ_j p_j · max(0, 1 − |clip(b_j) − i|) for some targets i."""
    start, _, terminal, lowest, slack, apart, near = bellman
    below, above = clipped
    position = i.to(DTYPE)
    if terminal:  # everything lands at the reward, whatever is said of it
        landed = tl.where(start == start, tl.minimum(tl.maximum(start, 0.0), ATOMS - 1), start)
        m = 1.0 - tl.abs(landed - position)
        m = tl.where(m < 0.0, 0.0, m)
    else:
        m = tl.where(i == 0, below, tl.where(i == ATOMS - 1, above, 0.0))
        first = (position - 1.0 - slack - lowest) / tl.where(apart > 0.0, apart, 1.0)
        first = tl.where(first >= 0.0, tl.minimum(first, ATOMS - 1).to(tl.int32) + 1, 0)
        first = tl.where(apart > 0.0, first, 0)
        for k in range(near):
            p, b = _landing(column, LOG, support, bellman, first + k, ATOMS, DTYPE, INDEX)
            m += p * tl.maximum(1.0 - tl.abs(b - position), 0.0)
        m = tl.where(below == below, m, below)
    return m
