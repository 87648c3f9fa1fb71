"""The Triton kernel of the critic's loss.

Two phases, each a launch of the same programs, or both in one launch if there is one program:

    COUNTS      reads mask and weights, leaves count and Σ w; needed only for the mean of some, or of weighted, samples
    LOSSES      reads everything once and writes the slope (and loss) of the samples; the program that finishes last
                merges the sums of all and writes the loss and what is logged

See `fusedrl.kernels.samples_kernel` for who owns which samples and how programs meet, and
`fusedrl.kernels.value_loss_problem` for the formulas.
"""

import triton
import triton.language as tl

from .primitives import distance_and_slope, scalar
from .samples_kernel import (
    counted,
    is_last_to_finish,
    leave_counts,
    leave_moments,
    leave_sum,
    moments_of_all,
    observe,
    read,
    samples_of,
    share_of_sample,
    total,
    write,
    write_scalar,
)

# Rows of the workspace after those of `leave_counts`.
LOSS = tl.constexpr(4)
CLIPPED = tl.constexpr(5)
SEEN = tl.constexpr(6)  # the samples that count
TARGET = tl.constexpr(7)  # mean and, in the next row, squared deviations
ERROR = tl.constexpr(9)  # likewise
ROWS = tl.constexpr(11)


@triton.jit
def value_loss_kernel(
    value,
    value_target,
    old_value,
    mask,
    weights,
    clip: "fp64",  # type: ignore[name-defined]  # noqa: F821  # Triton's type: a bare float would be single precision
    clip_tensor,
    coefficient: "fp64",  # type: ignore[name-defined]  # noqa: F821  # likewise
    coefficient_tensor,
    loss_of_sample,
    slope,
    loss,
    clip_fraction,
    explained_variance,
    workspace,
    samples,
    tiles,
    smallest_variance: "fp64",  # type: ignore[name-defined]  # noqa: F821  # likewise
    COUNTS: tl.constexpr,
    LOSSES: tl.constexpr,
    KIND: tl.constexpr,
    MEAN: tl.constexpr,
    DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
    POWER: tl.constexpr,
):
    """Reads samples and scalars, writes the workspace; in the phase LOSSES also slope, losses and what is logged."""
    if COUNTS:
        leave_counts(value, mask, weights, workspace, samples, tiles, False, ROWS, DTYPE, INDEX, BLOCK)
    if LOSSES:
        factor = scalar(coefficient, coefficient_tensor).to(DTYPE)
        if MEAN:
            factor = factor * share_of_sample(workspace, mask, weights, samples, POWER)
        if old_value is not None:
            bound = scalar(clip, clip_tensor).to(DTYPE)

        count = tl.zeros((BLOCK,), DTYPE)
        sum_of_losses = count
        count_clipped = tl.zeros((BLOCK,), tl.int32)
        target_mean, target_square, error_mean, error_square = count, count, count, count
        for tile in range(tiles):
            i = samples_of(tile, tiles, BLOCK, INDEX)
            valid = counted(mask, i, samples)
            now = read(value, i, samples, valid, DTYPE)
            target = read(value_target, i, samples, valid, DTYPE)
            count += tl.where(valid, 1.0, 0.0)
            distance, derivative = distance_and_slope(now - target, KIND)
            if old_value is not None:
                old = read(old_value, i, samples, valid, DTYPE)
                step = now - old
                clipped = tl.abs(step) > bound
                moved = old + tl.where(step > bound, bound, tl.where(step < -bound, -bound, step))
                other, _ = distance_and_slope(moved - target, KIND)
                # A step inside of the range is the same for both but for rounding.
                derivative = tl.where(clipped & (other > distance), 0.0, derivative)
                derivative = tl.where(clipped & (other == distance), 0.5 * derivative, derivative)
                distance = tl.maximum(distance, other, propagate_nan=tl.PropagateNan.ALL)
                count_clipped += (valid & clipped).to(tl.int32)
            scale = factor
            if weights is not None:
                scale = factor * read(weights, i, samples, valid, DTYPE)
            write(slope, i, samples, derivative * scale)
            write(loss_of_sample, i, samples, distance * scale)
            sum_of_losses += distance * scale
            if explained_variance is not None:
                target_mean, target_square = observe(target, valid, count, target_mean, target_square)
                error_mean, error_square = observe(now - target, valid, count, error_mean, error_square)

        leave_sum(workspace, LOSS, sum_of_losses)
        leave_sum(workspace, SEEN, count)
        if old_value is not None:
            leave_sum(workspace, CLIPPED, count_clipped)
        if explained_variance is not None:
            leave_moments(workspace, TARGET, count, target_mean, target_square)
            leave_moments(workspace, ERROR, count, error_mean, error_square)
        if is_last_to_finish(workspace, ROWS, POWER):
            if loss is not None:
                write_scalar(loss, total(workspace, LOSS, POWER))
            if old_value is not None:
                seen = total(workspace, SEEN, POWER)
                write_scalar(clip_fraction, total(workspace, CLIPPED, POWER) / tl.maximum(seen, 1.0))
            if explained_variance is not None:
                seen, _, square = moments_of_all(workspace, SEEN, TARGET, POWER)
                _, _, unexplained = moments_of_all(workspace, SEEN, ERROR, POWER)
                seen = tl.maximum(seen, 1.0)
                variance = square / seen
                smallest = scalar(smallest_variance, None).to(DTYPE)
                variance = tl.where(variance < smallest, smallest, variance)
                write_scalar(explained_variance, 1.0 - unexplained / seen / variance)
