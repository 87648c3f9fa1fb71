"""The Triton kernels of the Gaussian log-probability: one launch forward and one backward, for each of its two forms.

A program owns a tile [rows, columns] of the batch's rows by the action's dimensions, and goes on to the next columns
where an action has more than a tile. Every element of the inputs is read once; a row's terms are added up per lane and
summed over the lanes after the last columns, in one fixed order, so that results are bitwise reproducible.

With y = tanh x there are two forms of log |da/dx| / half: (1 − y)(1 + y) where y is given, which goes into one
logarithm with the scale, and 2 (log 2 − x − softplus(−2x)) where x is given, in which y may have been rounded to 1.

Tensors are passed as (pointer, row stride, column stride); a tensor that isn't there is None. The interval is center
and half as numbers, or low and high as tensors. A NaN is carried on, which minima and maxima would not do: clamping
selects.
"""

import triton
import triton.language as tl

from .primitives import as_float64


@triton.jit
def log_prob_kernel(
    loc,
    scale,
    action,
    log_prob,
    low,
    high,
    center: "fp64",  # type: ignore[name-defined]  # noqa: F821  # Triton's type: a bare float would be single precision
    half: "fp64",  # type: ignore[name-defined]  # noqa: F821  # likewise
    limit: "fp64",  # type: ignore[name-defined]  # noqa: F821  # likewise
    rows,
    columns,
    SQUASHED: tl.constexpr,
    DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Reads all but log_prob, [rows] and contiguous, which it writes."""
    row = tl.program_id(0).to(INDEX) * ROWS + tl.arange(0, ROWS).to(INDEX)
    terms = tl.zeros((ROWS, COLUMNS), DTYPE)
    for first in range(0, columns, COLUMNS):
        tile = _tile(row, first, rows, columns, COLUMNS, INDEX)
        z, s, _, slope = _inverted(loc, scale, action, low, high, center, half, limit, tile, SQUASHED, DTYPE)
        term = 0.5 * z * z + tl.log(s * slope if SQUASHED else s)
        terms += tl.where(tile[2], term, 0.0)
    _store_log_prob(log_prob, terms, row, rows, columns, DTYPE)


@triton.jit
def log_prob_gradient_kernel(
    loc,
    scale,
    action,
    grad,
    by_loc,
    by_scale,
    by_action,
    low,
    high,
    center: "fp64",  # type: ignore[name-defined]  # noqa: F821  # likewise
    half: "fp64",  # type: ignore[name-defined]  # noqa: F821  # likewise
    limit: "fp64",  # type: ignore[name-defined]  # noqa: F821  # likewise
    rows,
    columns,
    SQUASHED: tl.constexpr,
    DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """∂/∂loc = z / scale, ∂/∂scale = (z² − 1) / scale, ∂/∂a = (2y − z / scale) / (da/dx), times grad.

    ``grad`` is passed as (pointer, row stride). The gradients that are None aren't written.
    """
    row = tl.program_id(0).to(INDEX) * ROWS + tl.arange(0, ROWS).to(INDEX)
    incoming = _gradient_of_rows(grad, row, rows, DTYPE)
    for first in range(0, columns, COLUMNS):
        tile = _tile(row, first, rows, columns, COLUMNS, INDEX)
        z, s, y, slope = _inverted(loc, scale, action, low, high, center, half, limit, tile, SQUASHED, DTYPE)
        along_loc = incoming * z / s
        _store(by_loc, tile, along_loc)
        _store(by_scale, tile, incoming * (z * z - 1.0) / s)
        _store(by_action, tile, (2.0 * incoming * y - along_loc) / slope if SQUASHED else -along_loc)


@triton.jit
def sample_kernel(
    loc,
    scale,
    noise,
    action,
    log_prob,
    low,
    high,
    center: "fp64",  # type: ignore[name-defined]  # noqa: F821  # likewise
    half: "fp64",  # type: ignore[name-defined]  # noqa: F821  # likewise
    limit: "fp64",  # type: ignore[name-defined]  # noqa: F821  # likewise
    rows,
    columns,
    SQUASHED: tl.constexpr,
    DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Reads all but action, and log_prob, [rows] and contiguous, which it writes."""
    row = tl.program_id(0).to(INDEX) * ROWS + tl.arange(0, ROWS).to(INDEX)
    terms = tl.zeros((ROWS, COLUMNS), DTYPE)
    for first in range(0, columns, COLUMNS):
        tile = _tile(row, first, rows, columns, COLUMNS, INDEX)
        s = _load(scale, tile, 1.0, DTYPE)
        z = _load(noise, tile, 0.0, DTYPE)
        x = _load(loc, tile, 0.0, DTYPE) + s * z
        if SQUASHED:
            middle, width = _interval(low, high, center, half, tile, DTYPE)
            # exp(−2|x|): softplus(−2x) + x = log(1 + exp(−2|x|)) + |x|, which doesn't overflow.
            e = tl.exp(-2.0 * tl.abs(x))
            half_log_slope = 0.6931471805599453 - tl.abs(x) - tl.log(1.0 + e)
            term = 0.5 * z * z + tl.log(s * width) + 2.0 * half_log_slope
            drawn = middle + width * _clamp(_tanh(x, e), as_float64(limit).to(DTYPE))
        else:
            term = 0.5 * z * z + tl.log(s)
            drawn = x
        _store(action, tile, drawn)
        terms += tl.where(tile[2], term, 0.0)
    _store_log_prob(log_prob, terms, row, rows, columns, DTYPE)


@triton.jit
def sample_gradient_kernel(
    loc,
    scale,
    noise,
    grad_action,
    grad_log_prob,
    by_loc,
    by_scale,
    low,
    high,
    center: "fp64",  # type: ignore[name-defined]  # noqa: F821  # likewise
    half: "fp64",  # type: ignore[name-defined]  # noqa: F821  # likewise
    limit: "fp64",  # type: ignore[name-defined]  # noqa: F821  # likewise
    rows,
    columns,
    SQUASHED: tl.constexpr,
    DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """∂ log π(a)/∂x = 2 tanh x, ∂a/∂x = half · (1 − y²); x = loc + scale · noise, and −log scale is in log π(a).

    ``grad_log_prob`` is passed as (pointer, row stride). The gradients that are None aren't written.
    """
    row = tl.program_id(0).to(INDEX) * ROWS + tl.arange(0, ROWS).to(INDEX)
    incoming = _gradient_of_rows(grad_log_prob, row, rows, DTYPE)
    for first in range(0, columns, COLUMNS):
        tile = _tile(row, first, rows, columns, COLUMNS, INDEX)
        s = _load(scale, tile, 1.0, DTYPE)
        z = _load(noise, tile, 0.0, DTYPE)
        along_x = tl.zeros((ROWS, COLUMNS), DTYPE)
        if grad_action is not None:
            along_x = _load(grad_action, tile, 0.0, DTYPE)
        if SQUASHED:
            x = _load(loc, tile, 0.0, DTYPE) + s * z
            t = _tanh(x, tl.exp(-2.0 * tl.abs(x)))
            if grad_action is not None:
                _, width = _interval(low, high, center, half, tile, DTYPE)
                y = _clamp(t, as_float64(limit).to(DTYPE))
                along_x *= width * (1.0 - y) * (1.0 + y)
            along_x += 2.0 * incoming * t
        _store(by_loc, tile, along_x)
        _store(by_scale, tile, along_x * z - incoming / s)


@triton.jit
def _tile(row, first, rows, columns, COLUMNS: tl.constexpr, INDEX: tl.constexpr):
    """(rows, columns from the ``first`` on, which of the elements exist) of a tile."""
    column = first + tl.arange(0, COLUMNS).to(INDEX)
    return row, column, (row < rows)[:, None] & (column < columns)[None, :]


@triton.jit
def _load(tensor, tile, other, DTYPE: tl.constexpr):
    """The elements of a tile, ``other`` where they don't exist."""
    row, column, mask = tile
    pointer, row_stride, column_stride = tensor
    offset = row[:, None] * row_stride + column[None, :] * column_stride
    return tl.load(pointer + offset, mask=mask, other=other).to(DTYPE)


@triton.jit
def _store(tensor, tile, value):
    """Store the elements of a tile, if there is a tensor for them."""
    if tensor is not None:
        row, column, mask = tile
        pointer, row_stride, column_stride = tensor
        offset = row[:, None] * row_stride + column[None, :] * column_stride
        tl.store(pointer + offset, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _store_log_prob(log_prob, terms, row, rows, columns, DTYPE: tl.constexpr):
    """Store −Σ terms of each row, less log √2π for each of its columns."""
    # The constant is made a tensor, since a single column is none: Triton compiles an argument of 1 in.
    value = -tl.sum(terms, 1) - columns * tl.full((), 0.9189385332046727, DTYPE)
    tl.store(log_prob + row, value.to(log_prob.dtype.element_ty), mask=row < rows)


@triton.jit
def _gradient_of_rows(grad, row, rows, DTYPE: tl.constexpr):
    """The gradient that comes in for each row, as a column; 0 if there is none."""
    incoming = tl.zeros_like(row).to(DTYPE)
    if grad is not None:
        incoming = tl.load(grad[0] + row * grad[1], mask=row < rows, other=0.0).to(DTYPE)
    return incoming[:, None]


@triton.jit
def _inverted(loc, scale, action, low, high, center, half, limit, tile, SQUASHED: tl.constexpr, DTYPE: tl.constexpr):
    """z = (x − loc) / scale of the action's x, and scale; where the action is squashed, y = tanh x and da/dx, too."""
    s = _load(scale, tile, 1.0, DTYPE)
    a = _load(action, tile, 0.0, DTYPE)
    mean = _load(loc, tile, 0.0, DTYPE)
    if SQUASHED:
        middle, width = _interval(low, high, center, half, tile, DTYPE)
        y = _clamp((a - middle) / width, as_float64(limit).to(DTYPE))
        x, slope = _atanh(y), (1.0 - y) * (1.0 + y) * width
    else:
        x, y, slope = a, a, a  # only x is used, but Triton 3.6 can't return None
    return (x - mean) / s, s, y, slope


@triton.jit
def _interval(low, high, center, half, tile, DTYPE: tl.constexpr):
    """Its center and half its width; of tensors computed in their own dtype, as a distribution does."""
    if low is None:
        middle, width = as_float64(center).to(DTYPE), as_float64(half).to(DTYPE)
    else:
        lower = _load(low, tile, 0, low[0].dtype.element_ty)
        upper = _load(high, tile, 2, high[0].dtype.element_ty)
        middle, width = ((lower + upper) * 0.5).to(DTYPE), ((upper - lower) * 0.5).to(DTYPE)
    return middle, width


@triton.jit
def _clamp(y, limit):
    return tl.where(y > limit, limit, tl.where(y < -limit, -limit, y))


@triton.jit
def _atanh(y):
    """½ log(1 + u) of u = 2|y| / (1 − |y|), with the sign of y.

    log(1 + u) = log(w) · u / (w − 1) of the rounded w = 1 + u, whose error the quotient undoes (Kahan).
    """
    u = 2.0 * tl.abs(y) / (1.0 - tl.abs(y))
    w = 1.0 + u
    moved = tl.where(w == 1.0, 1.0, w - 1.0)
    value = 0.5 * tl.where(w == 1.0, u, tl.log(w) * (u / moved))
    return tl.where(y < 0.0, -value, value)


@triton.jit
def _tanh(x, e):
    """tanh of x, from e = exp(−2|x|); near zero from the continued fraction x / (1 + x² / (3 + x² / (5 + …))).

    Cut off after 11, the fraction's relative error for |x| ≤ ¼ is below the rounding of float64.
    """
    size = tl.abs(x)
    q = tl.where(size < 0.25, x * x, 0.0)
    near = size * (10395.0 + q * (1260.0 + q * 21.0)) / (10395.0 + q * (4725.0 + q * (210.0 + q)))
    value = tl.where(size < 0.25, near, (1.0 - e) / (1.0 + e))
    return tl.where(x < 0.0, -value, value)
