"""Pieces of the kernels that reduce over samples: reading them, mergeable statistics, and who finishes the sum.

What owns what. Each program owns ``tiles`` consecutive tiles of BLOCK samples, and each of its lanes every BLOCK'th
sample of those, whose statistics it keeps in registers. After the last tile a program merges its lanes, and leaves what
it found in the workspace:

    workspace   [rows, programs], a column for each program, then the 32-bit count of programs that are done

Whoever needs a statistic of all samples merges a row. Lanes and programs are merged by the same functions, in one fixed
order, whichever program comes last: results are bitwise reproducible.

Tensors of samples are passed as (pointer, stride) in the order that samples are walked in; one that isn't there is
None. Scalars are passed as a number and a pointer, of which None leaves the number to be used. POWER is the number of
programs, rounded up to a power of two.
"""

import triton
import triton.language as tl

from .primitives import is_last_to_arrive

# The first rows of every workspace: what `leave_counts` leaves.
COUNT = tl.constexpr(0)
WEIGHT = tl.constexpr(1)
MOMENTS = tl.constexpr(2)  # mean and, in the next row, squared deviations


@triton.jit
def samples_of(tile, tiles, BLOCK: tl.constexpr, INDEX: tl.constexpr):
    """Indices of the samples in one of the program's tiles."""
    return (tl.program_id(0).to(INDEX) * tiles + tile) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def counted(mask, i, samples):
    """Which of the samples i exist and count."""
    counts = i < samples
    if mask is not None:
        counts = counts & (tl.load(mask[0] + i * mask[1], mask=counts, other=0) != 0)
    return counts


@triton.jit
def read(x, i, samples, valid, DTYPE: tl.constexpr):
    """The samples i of x, 0 where one doesn't count: selected after the load, which needn't wait for the mask."""
    return tl.where(valid, tl.load(x[0] + i * x[1], mask=i < samples, other=0.0).to(DTYPE), 0.0)


@triton.jit
def write(x, i, samples, value):
    """Store the samples i of x, if there is one."""
    if x is not None:
        tl.store(x[0] + i * x[1], value.to(x[0].dtype.element_ty), mask=i < samples)


@triton.jit
def write_scalar(pointer, value):
    """Store a result in its dtype."""
    tl.store(pointer, value.to(pointer.dtype.element_ty))


# --- the workspace ------------------------------------------------------------------------------------------------


@triton.jit
def leave(workspace, row: tl.constexpr, value):
    """Write this program's column of a row."""
    tl.store(workspace + row * tl.num_programs(0) + tl.program_id(0), value)


@triton.jit
def leave_sum(workspace, row: tl.constexpr, x):
    """`leave` the sum over lanes."""
    leave(workspace, row, tl.sum(x, 0).to(workspace.dtype.element_ty))


@triton.jit
def left(workspace, row: tl.constexpr, other: tl.constexpr, POWER: tl.constexpr):
    """A row, read past the first-level cache, which doesn't see what other processors wrote."""
    program = tl.arange(0, POWER)
    there = program < tl.num_programs(0)
    return tl.load(workspace + row * tl.num_programs(0) + program, mask=there, other=other, cache_modifier=".cg")


@triton.jit
def total(workspace, row: tl.constexpr, POWER: tl.constexpr):
    """The sum of a row."""
    return tl.sum(left(workspace, row, 0.0, POWER), 0)


@triton.jit
def count_of_finished(workspace, rows: tl.constexpr):
    """Where the programs that are done are counted."""
    return (workspace + rows * tl.num_programs(0)).to(tl.pointer_type(tl.int32))


@triton.jit
def is_last_to_finish(workspace, rows: tl.constexpr, POWER: tl.constexpr):
    """Whether all other programs are done, in which case what they left can be read."""
    if POWER == 1:  # there are no others, and all threads have written what they left
        tl.debug_barrier()
        last = True
    else:
        last = is_last_to_arrive(count_of_finished(workspace, rows))
    return last


# --- mean and variance --------------------------------------------------------------------------------------------


@triton.jit
def observe(x, valid, count, mean, square):
    """Welford's update of each lane's mean and sum of squared deviations by its next sample, the ``count``-th."""
    deviation = tl.where(valid, x - mean, 0.0)
    mean += deviation / tl.maximum(count, 1.0)
    return mean, square + deviation * tl.where(valid, x - mean, 0.0)


@triton.jit
def merge_moments(count, mean, square):
    """Count, mean and sum of squared deviations of everything that lanes or programs have seen.

    See Chan, Golub & LeVeque 1983, Algorithms for computing the sample variance.
    """
    of_all = tl.sum(count, 0)
    mean_of_all = tl.sum(count * mean, 0) / tl.maximum(of_all, 1.0)
    deviation = tl.where(count > 0, mean - mean_of_all, 0.0)
    return of_all, mean_of_all, tl.sum(square + count * deviation * deviation, 0)


@triton.jit
def leave_moments(workspace, row: tl.constexpr, count, mean, square):
    """`leave` mean and, in the next row, squared deviations of what the lanes have seen."""
    _, mean, square = merge_moments(count, mean, square)
    leave(workspace, row, mean)
    leave(workspace, row + 1, square)


@triton.jit
def moments_of_all(workspace, count: tl.constexpr, mean: tl.constexpr, POWER: tl.constexpr):
    """`merge_moments` of the rows ``count``, ``mean``, and the one after, of squared deviations."""
    return merge_moments(
        left(workspace, count, 0.0, POWER), left(workspace, mean, 0.0, POWER), left(workspace, mean + 1, 0.0, POWER)
    )


@triton.jit
def leave_counts(
    x,
    mask,
    weights,
    workspace,
    samples,
    tiles,
    OF_X: tl.constexpr,
    ROWS: tl.constexpr,
    DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Leave how many samples count, the sum of their weights and, if OF_X, the mean and squared deviations of x.

    The count of finished programs is set to zero for what comes after this.
    """
    count = tl.zeros((BLOCK,), DTYPE)
    sum_of_weights, mean, square = count, count, count
    for tile in range(tiles):
        i = samples_of(tile, tiles, BLOCK, INDEX)
        valid = counted(mask, i, samples)
        count += tl.where(valid, 1.0, 0.0)
        if weights is not None:
            sum_of_weights += read(weights, i, samples, valid, DTYPE)
        if OF_X:
            mean, square = observe(read(x, i, samples, valid, DTYPE), valid, count, mean, square)
    leave_sum(workspace, COUNT, count)
    if weights is not None:
        leave_sum(workspace, WEIGHT, sum_of_weights)
    if OF_X:
        leave_moments(workspace, MOMENTS, count, mean, square)
    if tl.program_id(0) == 0:
        tl.store(count_of_finished(workspace, ROWS), 0)
    tl.debug_barrier()  # whatever follows may be in the same launch


@triton.jit
def count_of_all(workspace, mask, samples, POWER: tl.constexpr):
    """How many samples count."""
    # A product, since a launch makes a constant of a 1.
    count = samples * tl.full((), 1.0, workspace.dtype.element_ty)
    if mask is not None:
        count = total(workspace, COUNT, POWER)
    return count


@triton.jit
def share_of_sample(workspace, mask, weights, samples, POWER: tl.constexpr):
    """1 / Σ m w, or 1 where that is 0: what a sample's term is multiplied with in the mean."""
    whole = count_of_all(workspace, mask, samples, POWER)
    if weights is not None:
        whole = total(workspace, WEIGHT, POWER)
    return 1.0 / tl.where(whole == 0.0, 1.0, whole)


# --- sums of exponentials -----------------------------------------------------------------------------------------


@triton.jit
def observe_exponent(x, valid, greatest, first, second):
    """Update each lane's max x, Σ exp(x − max) and Σ exp(x − max)² by its next sample, with one exponential."""
    rises = valid & (x > greatest)
    # Of x = −∞ it is 0 even if nothing greater was seen. A NaN goes into the sums.
    share = tl.where(valid & (x != float("-inf")), tl.exp(-tl.abs(x - greatest)), 0.0)
    first = tl.where(rises, first * share + 1.0, first + share)
    second = tl.where(rises, second * share * share + 1.0, second + share * share)
    return tl.where(rises, x, greatest), first, second


@triton.jit
def merge_exponents(greatest, first, second):
    """`observe_exponent`'s three of everything that lanes or programs have seen."""
    of_all = tl.max(greatest, 0)
    share = tl.where(greatest == float("-inf"), 0.0, tl.exp(greatest - of_all))
    return of_all, tl.sum(first * share, 0), tl.sum(second * share * share, 0)


@triton.jit
def leave_exponents(workspace, row: tl.constexpr, greatest, first, second):
    """`leave` what the lanes have seen, merged, in three rows."""
    greatest, first, second = merge_exponents(greatest, first, second)
    leave(workspace, row, greatest)
    leave(workspace, row + 1, first)
    leave(workspace, row + 2, second)


@triton.jit
def exponents_of_all(workspace, row: tl.constexpr, POWER: tl.constexpr):
    """`merge_exponents` of three rows."""
    return merge_exponents(
        left(workspace, row, float("-inf"), POWER),
        left(workspace, row + 1, 0.0, POWER),
        left(workspace, row + 2, 0.0, POWER),
    )
