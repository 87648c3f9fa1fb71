"""The Triton kernels of the categorical loss: one launch forward, one backward, and the projection alone.

What owns what. A program is one sample and one warp: its time goes into the exponential of all actions' atoms, once,
and into the atoms² values of the projection's hat function, in registers.

    choose      tile [atoms, actions], some atoms at a time: z_j · exp(log p_j(a)) is added up per lane, summed over
                atoms after the last tile, and the first of the greatest actions is a*
    project     tile [sources j, targets i], looped over sources within targets: m_i += p_j · max(0, 1 − |b_j − i|).
                A lane prepares p_j and b_j of one source, and owns every 32nd target, whose sum meets all sources
    loss        −m_i · log p_i is added up per lane, and summed over lanes after the last targets

Backward a program writes the dense gradient of its sample, zeros included, in tiles [atoms, actions].

Sums run in one fixed order and nothing is added by atomics: results are bitwise reproducible. A NaN is carried on,
which minima and maxima would not do: clipping selects, and a NaN position takes the place of its mass.

Distributions are passed as (pointer, batch stride, atom stride, action stride), members of the batch as (pointer, batch
stride); a tensor that isn't there is None. γ is a number, or a tensor, whose stride is 0 if it is a 0-d one.
A sample's first element is found in 64 bits, what lies in the sample in INDEX.
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
    atoms,
    actions,
    DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
    ACTIONS_POWER: tl.constexpr,
    TILE_ATOMS: tl.constexpr,
    TARGETS: tl.constexpr,
    SOURCES: tl.constexpr,
):
    """Reads all but loss and projected; writes the loss and, if the gradient will be needed, the projection."""
    sample = tl.program_id(0).to(tl.int64)
    chooser = next_log_prob if next_online_log_prob is None else next_online_log_prob
    best = _greedy_action(chooser, support, sample, atoms, actions, DTYPE, INDEX, ACTIONS_POWER, TILE_ATOMS)
    target = _column(next_log_prob, sample, best)
    bellman = _bellman(support, reward, terminated, gamma, gamma_tensor, sample, atoms, DTYPE, INDEX)
    taken = tl.load(action[0] + sample * action[1]).to(INDEX)
    exists = (taken >= 0) & (taken < actions)
    pointer, stride = _column(log_prob, sample, taken)

    weighted = tl.zeros((TARGETS,), DTYPE)
    for start in range(0, atoms, TARGETS):
        i = start + tl.arange(0, TARGETS)
        log_p = tl.load(pointer + i.to(INDEX) * stride, mask=(i < atoms) & exists, other=0.0).to(DTYPE)
        m = _project(target, True, support, bellman, i, atoms, DTYPE, INDEX, SOURCES)
        if projected is not None:
            tl.store(projected + sample * atoms + i, m, mask=i < atoms)
        # Selected: an atom without mass counts for nothing even if its log-probability is −∞.
        weighted += tl.where(m == 0.0, 0.0, m * log_p)
    # No such action: nothing outside of the tensor was read, and the loss says so.
    cross_entropy = tl.where(exists, -tl.sum(weighted, 0), float("nan"))
    tl.store(loss + sample, cross_entropy.to(loss.dtype.element_ty))


@triton.jit
def gradient_kernel(
    action,
    projected,
    grad,
    found,
    atoms,
    actions,
    DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
    ACTIONS_POWER: tl.constexpr,
    TILE_ATOMS: tl.constexpr,
):
    """Writes ∂L/∂log p(a)_i · grad: −m_i · grad for the taken action, 0 for the others."""
    sample = tl.program_id(0).to(tl.int64)
    taken = tl.load(action[0] + sample * action[1]).to(INDEX)
    incoming = tl.load(grad[0] + sample * grad[1]).to(DTYPE)
    a = tl.arange(0, ACTIONS_POWER).to(INDEX)
    for start in range(0, atoms, TILE_ATOMS):
        i = start + tl.arange(0, TILE_ATOMS).to(INDEX)
        m = tl.load(projected + sample * atoms + i, mask=i < atoms, other=0.0)
        value = tl.where(a[None, :] == taken, -(incoming * m)[:, None], 0.0)
        offset = i[:, None] * found[2] + a[None, :] * found[3]
        mask = (i < atoms)[:, None] & (a < actions)[None, :]
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
    atoms,
    DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
    TARGETS: tl.constexpr,
    SOURCES: tl.constexpr,
):
    """The projection of ``prob``, passed as (pointer, batch stride, atom stride)."""
    sample = tl.program_id(0).to(tl.int64)
    bellman = _bellman(support, reward, terminated, gamma, gamma_tensor, sample, atoms, DTYPE, INDEX)
    column = (prob[0] + sample * prob[1], prob[2])
    for start in range(0, atoms, TARGETS):
        i = start + tl.arange(0, TARGETS)
        m = _project(column, False, support, bellman, i, atoms, DTYPE, INDEX, SOURCES)
        tl.store(projected + sample * atoms + i, m.to(projected.dtype.element_ty), mask=i < atoms)


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
    atoms,
    actions,
    DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
    ACTIONS_POWER: tl.constexpr,
    TILE_ATOMS: tl.constexpr,
):
    """argmax_a Σ_j z_j p_j(a), the first of equals; a NaN is the greatest, as it is to PyTorch."""
    pointer, batch_stride, atom_stride, action_stride = log_prob
    a = tl.arange(0, ACTIONS_POWER).to(INDEX)
    q = tl.zeros((TILE_ATOMS, ACTIONS_POWER), DTYPE)
    for start in range(0, atoms, TILE_ATOMS):
        j = start + tl.arange(0, TILE_ATOMS).to(INDEX)
        mask = (j < atoms)[:, None] & (a < actions)[None, :]
        offset = j[:, None] * atom_stride + a[None, :] * action_stride
        log_p = tl.load(pointer + sample * batch_stride + offset, mask=mask, other=float("-inf")).to(DTYPE)
        z = tl.load(support[0] + j * support[1], mask=j < atoms, other=0.0).to(DTYPE)
        q += z[:, None] * tl.exp(log_p)
    q = tl.sum(q, 0)
    q = tl.where(a < actions, tl.where(q == q, q, float("inf")), float("-inf"))
    return tl.argmax(q, 0, tie_break_left=True).to(INDEX)


@triton.jit
def _bellman(support, reward, terminated, gamma, gamma_tensor, sample, atoms, DTYPE: tl.constexpr, INDEX: tl.constexpr):
    """(start, step, term) of a sample: atom j lands at b_j = clip(start + step · z_j, 0, N − 1)."""
    discount = as_float64(gamma).to(DTYPE)
    if gamma_tensor is not None:
        discount = tl.load(gamma_tensor[0] + sample * gamma_tensor[1]).to(DTYPE)
    v_min = tl.load(support[0]).to(DTYPE)
    v_max = tl.load(support[0] + (atoms - 1).to(INDEX) * support[1]).to(DTYPE)
    atoms_per_value = (atoms - 1).to(DTYPE) / (v_max - v_min)
    r = tl.load(reward[0] + sample * reward[1]).to(DTYPE)
    terminal = tl.load(terminated[0] + sample * terminated[1]) != 0
    return (r - v_min) * atoms_per_value, tl.where(terminal, 0.0, discount * atoms_per_value), terminal


@triton.jit
def _project(
    column,
    LOG: tl.constexpr,
    support,
    bellman,
    i,
    atoms,
    DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
    SOURCES: tl.constexpr,
):
    """m_i = Σ_j p_j · max(0, 1 − |b_j − i|) of the column's (log-)probabilities, for some targets i."""
    pointer, stride = column
    start, step, terminal = bellman
    last = (atoms - 1).to(DTYPE)
    position = i.to(DTYPE)
    m = tl.zeros_like(position)
    for first in range(0, atoms, SOURCES):
        j = first + tl.arange(0, SOURCES)
        p = tl.load(pointer + j.to(INDEX) * stride, mask=j < atoms, other=float("-inf") if LOG else 0.0).to(DTYPE)
        if LOG:
            p = tl.exp(p)
        z = tl.load(support[0] + j.to(INDEX) * support[1], mask=j < atoms, other=0.0).to(DTYPE)
        b = start + step * z
        b = tl.where(b < 0.0, 0.0, tl.where(b > last, last, b))
        # After a terminal step one atom, the first, has all mass; all of them land at the reward.
        p = tl.where(terminal, tl.where(j == 0, 1.0, 0.0).to(DTYPE), p)
        p = tl.where(b == b, p, b)
        m += tl.sum(p[:, None] * tl.maximum(1.0 - tl.abs(b[:, None] - position[None, :]), 0.0), 0)
    return m
