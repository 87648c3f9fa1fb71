"""The Triton kernel of the clipped surrogate: statistics that every sample's loss needs, then the losses.

Two phases, each a launch of the same programs, or both in one launch if there is one program:

    COUNTS      reads advantage, mask and weights, leaves count, Σ w, and mean and squared deviations of A
    SURROGATE   each program merges those, then reads everything once and writes the slope (and loss) of its samples;
                the program that finishes last merges the sums of all and writes the loss and what is logged

See `fusedrl.kernels.samples_kernel` for who owns which samples and how programs meet, and `fusedrl.kernels.ppo_problem`
for the formulas.
"""

import triton
import triton.language as tl

from .ppo_problem import SMALLEST_STD
from .primitives import scalar
from .samples_kernel import (
    COUNT,
    MOMENTS,
    count_of_all,
    counted,
    exponents_of_all,
    is_last_to_finish,
    leave_counts,
    leave_exponents,
    leave_sum,
    moments_of_all,
    observe_exponent,
    read,
    samples_of,
    share_of_sample,
    total,
    write,
    write_scalar,
)

# Rows of the workspace after those of `leave_counts`.
LOSS = tl.constexpr(4)
LOG_WEIGHT = tl.constexpr(5)
OUTSIDE = tl.constexpr(6)
EXPONENTS = tl.constexpr(7)  # and the next two rows
ROWS = tl.constexpr(10)

_SMALLEST_VARIANCE = tl.constexpr(SMALLEST_STD**2)


@triton.jit
def clip_ppo_kernel(
    log_prob,
    old_log_prob,
    advantage,
    proximal_log_prob,
    mask,
    weights,
    clip_low: "fp64",  # type: ignore[name-defined]  # noqa: F821  # Triton's type: a bare float would be single precision
    clip_low_tensor,
    clip_high: "fp64",  # type: ignore[name-defined]  # noqa: F821  # likewise
    clip_high_tensor,
    max_ratio: "fp64",  # type: ignore[name-defined]  # noqa: F821  # likewise
    max_ratio_tensor,
    loss_of_sample,
    slope,
    loss,
    kl_approx,
    clip_fraction,
    ess,
    greatest_ratio,
    mean_ratio,
    workspace,
    samples,
    tiles,
    COUNTS: tl.constexpr,
    SURROGATE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    MEAN: tl.constexpr,
    CAPPED: tl.constexpr,
    DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
    POWER: tl.constexpr,
):
    """Reads samples and scalars, writes the workspace; in the phase SURROGATE also slope, losses and what is logged."""
    if COUNTS:
        leave_counts(advantage, mask, weights, workspace, samples, tiles, NORMALIZE, ROWS, DTYPE, INDEX, BLOCK)
    if SURROGATE:
        if NORMALIZE:
            count, mean, square = moments_of_all(workspace, COUNT, MOMENTS, POWER)
            variance = square / tl.maximum(count - 1.0, 1.0)
            std = tl.sqrt(tl.where(variance < _SMALLEST_VARIANCE, _SMALLEST_VARIANCE, variance))
            # A single sample stays as it is.
            shift, scale = tl.where(count > 1.0, mean, 0.0), tl.where(count > 1.0, 1.0 / std, 1.0)
        if MEAN:
            share = share_of_sample(workspace, mask, weights, samples, POWER)
        low = (1.0 - scalar(clip_low, clip_low_tensor)).to(DTYPE)
        high = (1.0 + scalar(clip_high, clip_high_tensor)).to(DTYPE)
        if CAPPED:
            largest = tl.log(scalar(max_ratio, max_ratio_tensor)).to(DTYPE)

        sum_of_losses = tl.zeros((BLOCK,), DTYPE)
        sum_of_log_weights = sum_of_losses
        count_outside = tl.zeros((BLOCK,), tl.int32)
        greatest, first, second = sum_of_losses + float("-inf"), sum_of_losses, sum_of_losses
        for tile in range(tiles):
            i = samples_of(tile, tiles, BLOCK, INDEX)
            valid = counted(mask, i, samples)
            current = read(log_prob, i, samples, valid, DTYPE)
            old = read(old_log_prob, i, samples, valid, DTYPE)
            adv = read(advantage, i, samples, valid, DTYPE)
            log_weight = current - old
            proximal_log_weight = log_weight
            log_quotient = 0.0  # log r/p
            if proximal_log_prob is not None:
                proximal = read(proximal_log_prob, i, samples, valid, DTYPE)
                proximal_log_weight = current - proximal
                log_quotient = proximal - old
            if CAPPED:
                excess = tl.maximum(log_weight - largest, 0.0)
                log_weight -= excess
                log_quotient -= excess
            if NORMALIZE:
                adv = tl.where(valid, (adv - shift) * scale, 0.0)
            ratio = tl.exp(log_weight)
            proximal_ratio = ratio
            if CAPPED or proximal_log_prob is not None:
                proximal_ratio = tl.exp(proximal_log_weight)
            inside = (proximal_ratio >= low) & (proximal_ratio <= high)
            clipped = tl.where(proximal_ratio < low, low, tl.where(proximal_ratio > high, high, proximal_ratio))
            if CAPPED or proximal_log_prob is not None:
                clipped = clipped * tl.exp(log_quotient)
            gain = tl.minimum(ratio * adv, clipped * adv, propagate_nan=tl.PropagateNan.ALL)
            # Selected, not multiplied: where no gradient passes the gain may be infinite.
            steepness = tl.where((clipped * adv < ratio * adv) & (inside == 0), 0.0, gain)
            if weights is not None:
                weight = read(weights, i, samples, valid, DTYPE)
                gain, steepness = gain * weight, steepness * weight
            if MEAN:
                steepness = steepness * share
            write(slope, i, samples, -steepness)
            write(loss_of_sample, i, samples, -gain)
            sum_of_losses -= gain
            sum_of_log_weights += proximal_log_weight
            count_outside += (valid & (inside == 0)).to(tl.int32)
            greatest, first, second = observe_exponent(log_weight, valid, greatest, first, second)

        leave_sum(workspace, LOSS, sum_of_losses)
        leave_sum(workspace, LOG_WEIGHT, sum_of_log_weights)
        leave_sum(workspace, OUTSIDE, count_outside)
        leave_exponents(workspace, EXPONENTS, greatest, first, second)
        if is_last_to_finish(workspace, ROWS, POWER):
            if loss is not None:
                sum_of_all = total(workspace, LOSS, POWER)
                write_scalar(loss, sum_of_all * share if MEAN else sum_of_all)
            count = count_of_all(workspace, mask, samples, POWER)
            divisor = tl.maximum(count, 1.0)
            write_scalar(kl_approx, -total(workspace, LOG_WEIGHT, POWER) / divisor)
            write_scalar(clip_fraction, total(workspace, OUTSIDE, POWER) / divisor)
            _write_ratios(ess, greatest_ratio, mean_ratio, workspace, count, divisor, POWER)


@triton.jit
def _write_ratios(ess, greatest_ratio, mean_ratio, workspace, count, divisor, POWER: tl.constexpr):
    """Effective sample size, greatest and mean ratio, from the sums of all programs."""
    greatest, first, second = exponents_of_all(workspace, EXPONENTS, POWER)
    write_scalar(ess, tl.where(count == 0.0, 0.0, first * first / second / divisor))
    # A maximum passes a NaN over, a sum doesn't; that of shares of an infinite ratio is one by itself.
    infinite = greatest == float("inf")
    write_scalar(greatest_ratio, tl.where((first == first) | infinite, tl.exp(greatest), first))
    write_scalar(mean_ratio, tl.where(infinite, greatest, tl.exp(greatest) * first / divisor))
