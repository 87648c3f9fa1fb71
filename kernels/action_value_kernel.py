"""The Triton kernels of the action-value losses: everything forward in one launch, and the derivatives with it.

What owns what. A program owns tiles of BLOCK samples, the first at BLOCK times its number, then every programs-th one.
A lane owns samples: it walks their values, one row of the ensemble after the other, and keeps in registers what is
carried from member to member (the least value, the largest error, the sum of distances) and from tile to tile (the
sums over samples).

    target_kernel       one tile a program; min_i Q_i − α log π, then r + γ(1 − term)·v'
    ensemble_kernel     Σ_i d(Q_i, y) and max_i |Q_i − y|; writes ∂/∂Q_i as it goes
    policy_kernel       α log π − min_i Q_i; once the least value and its ties are known, the values are read again
                        (from a cache) to write ∂/∂Q_i, the share of the ties

Sums over the batch. With one program its own sums are the results. Otherwise each program writes its sums to its
columns of ``partials`` [sums, programs] and counts itself at ``arrivals``; the last to arrive adds all columns, in one
fixed order whichever it is: results are bitwise reproducible.

The denominator of a weighed mean, Σ m·w, is known to the last program only. The derivatives are then left undivided,
and 1 / Σ m·w is written to ``reciprocal``, with which backward multiplies. If known beforehand it is in ``scale``.

A NaN is carried on, which minima and maxima would not do: comparisons select. A masked sample is selected away before
it meets anything else.

Values are passed as (pointer, member stride, sample stride), other tensors as (pointer, sample stride); those written
are contiguous. A tensor that isn't there is None. γ and α are numbers, or a tensor, without a stride if it is a 0-d
one. The place of a sample in a row is computed in INDEX; from row to row goes the pointer.
"""

import triton
import triton.language as tl

from . import action_value_problem as problem
from . import checks
from .primitives import as_float64, distance_and_slope, is_last_to_arrive

_ABS, _SQUARE = tl.constexpr(problem.ABS), tl.constexpr(problem.SQUARE)
_NONE = tl.constexpr(checks.NONE)


@triton.jit
def target_kernel(
    next_values,
    reward,
    terminated,
    gamma: "fp64",  # type: ignore[name-defined]  # noqa: F821  # Triton's type: a bare float would be single precision
    gamma_tensor,
    log_prob,
    alpha: "fp64",  # type: ignore[name-defined]  # noqa: F821  # likewise
    alpha_tensor,
    value_target,
    next_value,
    samples,
    members,
    DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Reads all but value_target and next_value, and writes those."""
    b = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    inside = b < samples
    following, _ = _least(next_values, b, inside, members, DTYPE)
    r = _load(reward, b, inside, DTYPE)
    terminal = tl.load(terminated[0] + b * terminated[1], mask=inside, other=0) != 0
    discount = _coefficient(gamma, gamma_tensor, b, inside, DTYPE)
    if log_prob is not None:
        following -= _coefficient(alpha, alpha_tensor, b, inside, DTYPE) * _load(log_prob, b, inside, DTYPE)
    # Selected: after a terminal step neither v' nor γ reaches the target.
    _store(value_target, b, tl.where(terminal, r, r + discount * following), inside)
    _store(next_value, b, following, inside)


@triton.jit
def ensemble_kernel(
    values,
    target,
    mask,
    weights,
    scale: "fp64",  # type: ignore[name-defined]  # noqa: F821  # likewise
    loss,
    priority,
    slopes,
    reciprocal,
    partials,
    arrivals,
    samples,
    members,
    LOSS_FUNCTION: tl.constexpr,
    PRIORITY: tl.constexpr,
    PER_MEMBER: tl.constexpr,
    REDUCTION: tl.constexpr,
    COUNT: tl.constexpr,
    DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Reads values, target, mask and weights; writes the rest, the slopes and the reciprocal if they are there."""
    factor = as_float64(scale).to(DTYPE)
    total = tl.zeros((BLOCK,), DTYPE)
    count = tl.zeros((BLOCK,), DTYPE)
    for start in range(tl.program_id(0).to(INDEX) * BLOCK, samples, tl.num_programs(0) * BLOCK):
        b = start + tl.arange(0, BLOCK)
        inside = b < samples
        counts = _counts(mask, b, inside)
        weight = _weight(weights, b, counts, DTYPE)
        y = _load(target, b, inside, DTYPE)
        distance = tl.zeros((BLOCK,), DTYPE)
        largest = tl.zeros((BLOCK,), DTYPE)
        row, losses, derivatives = values[0], loss, slopes
        for _ in range(members):
            error = tl.where(counts, _load((row, values[2]), b, inside, DTYPE) - y, 0.0)
            size = tl.abs(error)
            largest = tl.where((size > largest) | (size != size), size, largest)
            d, slope = distance_and_slope(error, LOSS_FUNCTION)
            if PER_MEMBER and REDUCTION == _NONE:
                _store(losses, b, d * weight, inside)
                losses += samples
            else:
                distance += d
            if slopes is not None:
                _store(derivatives, b, slope * (weight * factor), inside)
                derivatives += samples
            row += values[1]
        _store(priority, b, largest * largest if PRIORITY == _SQUARE else largest, inside)
        if REDUCTION != _NONE:
            total += distance * weight
            count += weight
        elif not PER_MEMBER:
            _store(loss, b, distance * weight, inside)

    if REDUCTION != _NONE:
        total = tl.sum(total, 0)
        count = tl.sum(count, 0)
        last = True
        if partials is not None:
            _put(partials, 0, total)
            if COUNT:
                _put(partials, 1, count)
            last = is_last_to_arrive(arrivals)
        if last:
            if partials is not None:
                total = _sum_of(partials, 0, PROGRAMS)
                if COUNT:
                    count = _sum_of(partials, 1, PROGRAMS)
            if COUNT:
                per_count = 1.0 / _divisor(count)
                factor *= per_count
                if reciprocal is not None:
                    _put_number(reciprocal, per_count)
            _put_number(loss, total * factor)


@triton.jit
def policy_kernel(
    values,
    log_prob,
    alpha: "fp64",  # type: ignore[name-defined]  # noqa: F821  # likewise
    alpha_tensor,
    mask,
    weights,
    scale: "fp64",  # type: ignore[name-defined]  # noqa: F821  # likewise
    sample_scale: "fp64",  # type: ignore[name-defined]  # noqa: F821  # likewise
    loss,
    entropy,
    value_slopes,
    log_prob_slopes,
    reciprocal,
    partials,
    arrivals,
    samples,
    members,
    REDUCTION: tl.constexpr,
    COUNT: tl.constexpr,
    DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Reads values, log_prob, α, mask and weights; writes the rest, of which loss and entropy are always there.

    ``sample_scale`` is one over the number of samples, for the entropy, which isn't weighed.
    """
    factor = as_float64(scale).to(DTYPE)
    a = _coefficient(alpha, alpha_tensor, 0, True, DTYPE)
    information = tl.zeros((BLOCK,), DTYPE)  # −log π
    valid = tl.zeros((BLOCK,), DTYPE)
    total = tl.zeros((BLOCK,), DTYPE)
    count = tl.zeros((BLOCK,), DTYPE)
    for start in range(tl.program_id(0).to(INDEX) * BLOCK, samples, tl.num_programs(0) * BLOCK):
        b = start + tl.arange(0, BLOCK)
        inside = b < samples
        counts = _counts(mask, b, inside)
        weight = _weight(weights, b, counts, DTYPE)
        least, ties = _least(values, b, inside, members, DTYPE)
        log_p = tl.where(counts, _load(log_prob, b, inside, DTYPE), 0.0)
        term = weight * (a * log_p - tl.where(counts, least, 0.0))
        information -= log_p
        valid += tl.where(counts, 1.0, 0.0)
        if REDUCTION == _NONE:
            _store(loss, b, term, inside)
        else:
            total += term
            count += weight
        if log_prob_slopes is not None:
            slope = weight * factor
            _store(log_prob_slopes, b, a * slope, inside)
            share = slope / ties
            row, derivatives = values[0], value_slopes
            for _ in range(members):
                q = _load((row, values[2]), b, inside, DTYPE)
                # Where the least is NaN, so is the derivative.
                slope = tl.where(q == least, -share, tl.where(least == least, 0.0, least))
                _store(derivatives, b, tl.where(counts, slope, 0.0), inside)
                derivatives += samples
                row += values[1]

    information = tl.sum(information, 0)
    valid = tl.sum(valid, 0)
    total = tl.sum(total, 0)
    count = tl.sum(count, 0)
    last = True
    if partials is not None:
        _put(partials, 0, information)
        if mask is not None:
            _put(partials, 1, valid)
        if REDUCTION != _NONE:
            _put(partials, 2, total)
            if COUNT:
                _put(partials, 3, count)
        last = is_last_to_arrive(arrivals)
    if last:
        if partials is not None:
            information = _sum_of(partials, 0, PROGRAMS)
            if mask is not None:
                valid = _sum_of(partials, 1, PROGRAMS)
            if REDUCTION != _NONE:
                total = _sum_of(partials, 2, PROGRAMS)
                if COUNT:
                    count = _sum_of(partials, 3, PROGRAMS)
        if mask is None:
            _put_number(entropy, information * as_float64(sample_scale).to(DTYPE))
        else:
            _put_number(entropy, information / _divisor(valid))
        if REDUCTION != _NONE:
            if COUNT:
                per_count = 1.0 / _divisor(count)
                factor *= per_count
                if reciprocal is not None:
                    _put_number(reciprocal, per_count)
            _put_number(loss, total * factor)


# --- samples ------------------------------------------------------------------------------------------------------


@triton.jit
def _coefficient(number, tensor, b, inside, DTYPE: tl.constexpr):
    """γ or α: the number, or what the tensor holds."""
    if tensor is None:
        return as_float64(number).to(DTYPE)
    elif len(tensor) == 1:
        return tl.load(tensor[0]).to(DTYPE)
    else:
        return _load(tensor, b, inside, DTYPE)


@triton.jit
def _load(x, b, inside, DTYPE: tl.constexpr):
    return tl.load(x[0] + b * x[1], mask=inside, other=0.0).to(DTYPE)


@triton.jit
def _store(pointer, b, x, inside):
    tl.store(pointer + b, x.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _counts(mask, b, inside):
    """Which samples count."""
    if mask is None:
        return inside
    else:
        return inside & (tl.load(mask[0] + b * mask[1], mask=inside, other=0) != 0)


@triton.jit
def _weight(weights, b, counts, DTYPE: tl.constexpr):
    """m·w."""
    if weights is None:
        return tl.where(counts, 1.0, 0.0).to(DTYPE)
    else:
        return tl.where(counts, _load(weights, b, counts, DTYPE), 0.0)


@triton.jit
def _least(values, b, inside, members, DTYPE: tl.constexpr):
    """The least value of each sample, NaN if there is one, and how many members have it."""
    row = values[0]
    least = _load((row, values[2]), b, inside, DTYPE)
    ties = tl.full(least.shape, 1.0, DTYPE)
    for _ in range(1, members):
        row += values[1]
        q = _load((row, values[2]), b, inside, DTYPE)
        below = (q < least) | (q != q)
        ties = tl.where(below, 1.0, tl.where(q == least, ties + 1.0, ties))
        least = tl.where(below, q, least)
    return least, ties


# --- sums over the batch ------------------------------------------------------------------------------------------


@triton.jit
def _put(partials, row, x):
    """This program's part of a sum."""
    tl.store(partials + row * tl.num_programs(0) + tl.program_id(0), x)


@triton.jit
def _sum_of(partials, row, PROGRAMS: tl.constexpr):
    """All programs' parts, past the cache that other programs don't write to."""
    i = tl.arange(0, PROGRAMS)
    programs = tl.num_programs(0)
    x = tl.load(partials + row * programs + i, mask=i < programs, other=0.0, cache_modifier=".cg")
    return tl.sum(x, 0)


@triton.jit
def _put_number(pointer, x):
    tl.store(pointer, x.to(pointer.dtype.element_ty))


@triton.jit
def _divisor(count):
    """What a mean divides by: of nothing it is 0."""
    return tl.where(count == 0.0, 1.0, count)
