"""Host side of the Gaussian kernels: tiles, strides and launches; the ``triton`` backend."""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .dtypes import compute_dtype, result_dtype
from .launching import TRITON_DTYPE, Launch, Launcher, Plan, strided
from .squashed_normal_kernel import (
    log_prob_gradient_kernel,
    log_prob_kernel,
    sample_gradient_kernel,
    sample_kernel,
)
from .squashed_normal_problem import Squash

# Elements of a tile and its warps: four elements per thread, one 128-bit access of each float32 tensor where columns
# are as many, so that small batches still make several programs.
_TILE = 512
_WARPS = 4


def tiling(columns: int) -> tuple[int, int]:
    """Rows and columns of a tile: as many columns as there are, up to a whole tile."""
    width = min(triton.next_power_of_2(columns), _TILE)
    return _TILE // width, width


def log_prob(loc: Tensor, scale: Tensor, action: Tensor, squash: Squash | None) -> Tensor:
    """log π(a), shape ``[*B]``, of actions ``[*B, A]``."""
    found = loc.new_empty(loc.shape[:-1], dtype=result_dtype(loc, scale, action))
    limit = 1.0 if squash is None else squash.limit_of_inverse(loc, scale, action)
    if not loc.numel():
        return found.zero_()  # of actions without dimensions: an empty sum
    _log_prob(None, *map(_rows, (loc, scale, action)), found, *_interval(loc, squash, limit))
    return found


def log_prob_backward(
    loc: Tensor, scale: Tensor, action: Tensor, squash: Squash | None, grad: Tensor, needs: Sequence[bool]
) -> list[Tensor]:
    """The gradients that are needed of loc, scale and action."""
    inputs = (loc, scale, action)
    gradients = [x.new_empty(x.shape) if need else None for x, need in zip(inputs, needs, strict=True)]
    limit = 1.0 if squash is None else squash.limit_of_inverse(*inputs)
    if loc.numel():
        written = map(_rows, gradients)
        _log_prob_gradient(None, *map(_rows, inputs), grad.reshape(-1), *written, *_interval(loc, squash, limit))
    return [g for g in gradients if g is not None]


def sample(loc: Tensor, scale: Tensor, noise: Tensor, squash: Squash | None) -> tuple[Tensor, Tensor]:
    """The action ``[*B, A]`` made of ``noise``, and log π(a), shape ``[*B]``."""
    dtype = result_dtype(loc, scale, noise)
    action, found = loc.new_empty(loc.shape, dtype=dtype), loc.new_empty(loc.shape[:-1], dtype=dtype)
    limit = 1.0 if squash is None else squash.limit_of_draw(loc, scale, noise)
    if not loc.numel():
        return action, found.zero_()  # likewise
    inputs = map(_rows, (loc, scale, noise, action))
    _sample(None, *inputs, found, *_interval(loc, squash, limit))
    return action, found


def sample_backward(
    loc: Tensor,
    scale: Tensor,
    noise: Tensor,
    squash: Squash | None,
    grad_action: Tensor | None,
    grad_log_prob: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients that are needed of loc and scale; that of the noise never is."""
    inputs = (loc, scale, noise)
    gradients = [x.new_empty(x.shape) if need else None for x, need in zip(inputs, needs, strict=True)]
    limit = 1.0 if squash is None else squash.limit_of_draw(*inputs)
    if loc.numel():
        grads = _rows(grad_action), None if grad_log_prob is None else grad_log_prob.reshape(-1)
        written = map(_rows, gradients[:2])
        _sample_gradient(None, *map(_rows, inputs), *grads, *written, *_interval(loc, squash, limit))
    return [g for g in gradients if g is not None]


def _interval(loc: Tensor, squash: Squash | None, limit: float) -> tuple[Any, ...]:
    """Bounds that are tensors, those that are numbers as center and half, and the limit; None where not squashed."""
    if squash is None:
        return None, None, None, None, None
    if isinstance(squash.low, Tensor):
        low, high = (_rows(x.expand(loc.shape)) for x in squash[:2])
        return low, high, 0.0, 1.0, float(limit)
    center, half = squash.center_and_half()
    return None, None, float(center), float(half), float(limit)


def _launcher(kernel: Any) -> Launcher:
    """Of a kernel whose arguments are tensors, then those of `_interval`."""

    def plan(_: None, *arguments: Any) -> Plan:
        *tensors, center, half, limit = arguments
        rows, columns = tensors[0].shape
        tile_rows, tile_columns = tiling(columns)
        # log π(a) is contiguous, and passed without a stride.
        names = kernel.arg_names[: len(tensors)]
        passed = [x if name == "log_prob" else strided(x) for name, x in zip(names, tensors, strict=True)]
        ends = rows + tile_rows, columns + tile_columns
        strides = [x[1:] for x in passed if isinstance(x, tuple)]  # of a gradient there is one
        reach = max(sum(end * stride for end, stride in zip(ends, x, strict=False)) for x in strides)
        launch = Launch(
            kernel,
            triton.cdiv(rows, tile_rows),
            [
                *passed,
                0.0 if center is None else center,
                1.0 if half is None else half,
                1.0 if limit is None else limit,
                rows,
                columns,
            ],
            SQUASHED=limit is not None,
            DTYPE=TRITON_DTYPE[compute_dtype(result_dtype(*tensors[:3]))],
            INDEX=tl.int64 if reach >= 1 << 31 else tl.int32,
            ROWS=tile_rows,
            COLUMNS=tile_columns,
            num_warps=_WARPS,
        )
        return Plan([launch])

    return Launcher(plan)


_log_prob, _log_prob_gradient = _launcher(log_prob_kernel), _launcher(log_prob_gradient_kernel)
_sample, _sample_gradient = _launcher(sample_kernel), _launcher(sample_gradient_kernel)


def _rows(x: Any) -> Any:
    """``[*B, A]`` with one dimension of rows; a copy is made only where no single stride walks them."""
    return x if x is None or x.ndim == 2 else x.reshape(-1, x.shape[-1])
