"""What kernels of every family do in the same way: read their scalars, and tell which program is the last."""

import triton
import triton.language as tl


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
def is_last_to_arrive(counter):
    """Whether all other programs of the launch have been here, so that this one may read what they left."""
    # All threads have written before one of them says so, and none reads before it has heard of the others'.
    tl.debug_barrier()
    arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    return arrived == tl.num_programs(0) - 1
