"""What kernels of several families do in the same way: read their scalars, measure distances, tell who is last."""

import triton
import triton.language as tl

from . import distances

_L1, _L2, _SMOOTH_L1 = (tl.constexpr(name) for name in (distances.L1, distances.L2, distances.SMOOTH_L1))


@triton.jit
def as_float64(number):
    """A tensor of a number: the product with one makes it that in the interpreter as well as in compiled code."""
    return number * tl.full((), 1.0, tl.float64)


@triton.jit
def scalar(number, tensor):
    """A scalar in float64: the number, or what the 0-d tensor holds if there is one."""
    value = as_float64(number)
    if tensor is not None:
        value = tl.load(tensor).to(tl.float64)
    return value


@triton.jit
def distance_and_slope(error, LOSS_FUNCTION: tl.constexpr):
    """The distance of a prediction that is off by ``error``, and its derivative; the sign of a NaN is 0."""
    size = tl.abs(error)
    sign = tl.where(error > 0.0, 1.0, tl.where(error < 0.0, -1.0, 0.0)).to(error.dtype)
    if LOSS_FUNCTION == _L1:
        distance, slope = size, sign
    elif LOSS_FUNCTION == _L2:
        distance, slope = error * error, 2.0 * error
    else:
        tl.static_assert(LOSS_FUNCTION == _SMOOTH_L1, "this distance has no branch here")
        distance = tl.where(size >= 1.0, size - 0.5, 0.5 * error * error)
        slope = tl.where(size >= 1.0, sign, error)
    return distance, slope


@triton.jit
def is_last_to_arrive(counter):
    """Whether all other programs of the launch have been here, so that this one may read what they left."""
    # All threads have written before one of them says so, and none reads before it has heard of the others'.
    tl.debug_barrier()
    arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    return arrived == tl.num_programs(0) - 1
