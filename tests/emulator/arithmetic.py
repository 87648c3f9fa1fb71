"""Numbers as the bits of registers, and what instructions compute of them."""

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
_KINDS = {"b": UNSIGNED, "u": UNSIGNED, "s": SIGNED, "f": {4: np.float32, 8: np.float64}}
_FLOATING = ("f16", "bf16", "f32", "f64")


def size(type: str) -> int:
    """Bytes of a type such as ``f32``."""
    return int(type.lstrip("busf")) // 8


def immediate(text: str, bytes: int) -> Any:
    """The bits of a number in the code."""
    if text[:2] in ("0f", "0d"):
        return UNSIGNED[bytes](int(text[2:], 16))
    return UNSIGNED[bytes](int(text.rstrip("U"), 0) & (1 << 8 * bytes) - 1)


def decoded(bits: Array, type: str) -> Array:
    """The numbers of a type that the ``bits`` are; narrow floating-point ones as float32."""
    if type == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if type == "f16":
        return bits.view(np.float16).astype(np.float32)
    return bits.view(_KINDS[type[0]][size(type)])


def encoded(x: Array, type: str) -> Array:
    """The bits of the numbers ``x``, rounded to nearest."""
    bytes = size(type)
    if type == "bf16":
        bits = x.astype(np.float32).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)
    return x.astype(np.float16 if type == "f16" else _KINDS[type[0]][bytes]).view(UNSIGNED[bytes])


_TO_INTEGER = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


def converted(bits: Array, source: str, target: str, rounding: str) -> Array:
    """The bits of a number in another type."""
    numbers = decoded(bits, source)
    if source in _FLOATING and rounding in _TO_INTEGER:
        numbers = _TO_INTEGER[rounding](numbers)
    if source in _FLOATING and target not in _FLOATING:
        limits = np.iinfo(_KINDS[target[0]][size(target)])
        numbers = np.clip(np.nan_to_num(numbers.astype(np.longdouble)), limits.min, limits.max)
    return encoded(numbers, target)


_COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


def compared(how: str, a: Array, b: Array) -> Array:
    """Whether a number stands to another as in ``setp``; to a NaN it does in no way but those that end with u."""
    unordered = (a != a) | (b != b)
    if how in ("nan", "num"):
        return unordered if how == "nan" else ~unordered
    found = _COMPARISONS[how[:2]](a, b)
    return found | unordered if how.endswith("u") else found & ~unordered


def _divided(a: Array, b: Array) -> Array:
    if a.dtype.kind == "f":
        return a / b
    quotient = np.abs(a) // np.abs(b)
    return np.where((a < 0) != (b < 0), -quotient, quotient)


def _product_and_sum(a: Array, b: Array, c: Array) -> Array:
    """Rounded once; of float64 all but, by way of a mantissa of 64 bits."""
    wide = {"f": np.float64 if a.dtype == np.float32 else np.longdouble}.get(a.dtype.kind, a.dtype)
    return (a.astype(wide) * b + c).astype(a.dtype)


ELEMENTWISE: dict[str, Callable[..., Array]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": _divided, "max": np.fmax, "min": np.fmin,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    "fma": _product_and_sum, "mad": _product_and_sum, "mov": lambda x: x, "neg": np.negative, "abs": np.abs,
    "ex2": np.exp2, "lg2": np.log2, "sqrt": np.sqrt, "rcp": lambda x: 1 / x,
}  # fmt: skip
LOGICAL = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, "not": np.logical_not}


def wide_product(a: Array, b: Array, type: str) -> Array:
    """Of twice the width."""
    wide = _KINDS[type[0]][2 * size(type)]
    return decoded(a, type).astype(wide) * decoded(b, type).astype(wide)


def shifted(x: Array, by: Array, *, left: bool) -> Array:
    """By the width or more, everything is shifted out."""
    width = 8 * x.dtype.itemsize
    amount = np.minimum(by, width - 1).astype(x.dtype)
    if not left and x.dtype.kind == "i":
        return x >> amount
    return np.where(by < width, x << amount if left else x >> amount, x.dtype.type(0))


def field(x: Array, start: Array, length: Array) -> Array:
    """So many bits of x, the highest of which is the sign if x is signed."""
    width = 8 * x.dtype.itemsize
    return shifted(shifted(x, width - length - start, left=True), width - length, left=False)


def permuted(low: Array, high: Array, selector: Array) -> Array:
    """Four of the eight bytes, as the selector's digits say; with 8 added to a digit, the byte's sign."""
    source = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    found = np.zeros_like(low)
    for i in range(4):
        digit = selector >> np.uint32(4 * i)
        byte = source >> (np.uint64(8) * (digit & np.uint32(7)).astype(np.uint64)) & np.uint64(0xFF)
        sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
        byte = np.where(digit & np.uint32(8), sign, byte)
        found |= byte.astype(np.uint32) << np.uint32(8 * i)
    return found
