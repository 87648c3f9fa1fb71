"""Host side of the Gaussian kernels: tiles, strides and launches; the ``triton`` backend."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dtypes import compute_dtype, result_dtype
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
    _launch(log_prob_kernel, (loc, scale, action), squash, limit, log_prob=found)
    return found


def log_prob_backward(
    loc: Tensor, scale: Tensor, action: Tensor, squash: Squash | None, grad: Tensor, needs: Sequence[bool]
) -> list[Tensor]:
    """The gradients that are needed of loc, scale and action."""
    inputs = (loc, scale, action)
    gradients = [x.new_empty(x.shape) if need else None for x, need in zip(inputs, needs, strict=True)]
    by_loc, by_scale, by_action = map(_strided, gradients)
    _launch(
        log_prob_gradient_kernel,
        inputs,
        squash,
        1.0 if squash is None else squash.limit_of_inverse(*inputs),
        grad=_per_row(grad),
        by_loc=by_loc,
        by_scale=by_scale,
        by_action=by_action,
    )
    return [g for g in gradients if g is not None]


def sample(loc: Tensor, scale: Tensor, noise: Tensor, squash: Squash | None) -> tuple[Tensor, Tensor]:
    """The action ``[*B, A]`` made of ``noise``, and log π(a), shape ``[*B]``."""
    dtype = result_dtype(loc, scale, noise)
    action, found = loc.new_empty(loc.shape, dtype=dtype), loc.new_empty(loc.shape[:-1], dtype=dtype)
    limit = 1.0 if squash is None else squash.limit_of_draw(loc, scale, noise)
    _launch(sample_kernel, (loc, scale, noise), squash, limit, action=_strided(action), log_prob=found)
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
    by_loc, by_scale, _ = map(_strided, gradients)
    _launch(
        sample_gradient_kernel,
        inputs,
        squash,
        1.0 if squash is None else squash.limit_of_draw(*inputs),
        grad_action=_strided(grad_action),
        grad_log_prob=_per_row(grad_log_prob),
        by_loc=by_loc,
        by_scale=by_scale,
    )
    return [g for g in gradients if g is not None]


def _launch(
    kernel: Any, inputs: tuple[Tensor, Tensor, Tensor], squash: Squash | None, limit: float, **arguments: Any
) -> None:
    shape = inputs[0].shape
    if shape.numel() == 0:
        if "log_prob" in arguments:  # of actions without dimensions: an empty sum
            arguments["log_prob"].zero_()
        return
    columns = shape[-1]
    rows = shape.numel() // columns
    low = high = None
    center, half = 0.0, 1.0
    if squash is not None:
        if isinstance(squash.low, Tensor):
            low, high = (_strided(x.expand(shape)) for x in squash[:2])
        else:
            center, half = squash.center_and_half()
    names = kernel.arg_names[:3]
    strided = {name: _strided(x) for name, x in zip(names, inputs, strict=True)} | arguments
    tile_rows, tile_columns = tiling(columns)
    reach = max(
        (rows + tile_rows) * x[1] + (columns + tile_columns) * x[2]
        for x in (*strided.values(), low, high)
        if isinstance(x, tuple) and len(x) == 3
    )
    with torch.cuda.device_of(inputs[0]):
        kernel[triton.cdiv(rows, tile_rows),](
            **strided,
            low=low,
            high=high,
            center=center,
            half=half,
            limit=limit,
            rows=rows,
            columns=columns,
            SQUASHED=squash is not None,
            DTYPE=_TRITON_DTYPE[compute_dtype(result_dtype(*inputs))],
            INDEX=tl.int64 if reach >= 1 << 31 else tl.int32,
            ROWS=tile_rows,
            COLUMNS=tile_columns,
            num_warps=_WARPS,
        )


def _strided(x: Tensor | None) -> tuple[Any, ...] | None:
    """``x`` as (pointer, row stride, column stride); a copy is made only where no single stride walks the rows."""
    if x is None:
        return None
    x = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    return (x, *x.stride())


def _per_row(x: Tensor | None) -> tuple[Any, ...] | None:
    """``x`` as (pointer, row stride)."""
    if x is None:
        return None
    x = x.reshape(-1)
    return (x, *x.stride())


_TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}
