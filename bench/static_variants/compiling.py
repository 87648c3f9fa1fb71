"""Compile a kernel ahead of time for the arguments that a launch on aligned tensors gives it."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import triton
import triton.language as tl
from fusedrl.kernels.launching import OPTIONS
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Of the dtype of tensors: the dtype that is computed in, and the bytes of an element.
COMPUTE = {"bf16": tl.float32, "fp16": tl.float32, "fp32": tl.float32, "fp64": tl.float64}
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
_DIVISIBLE = [["tt.divisibility", 16]]


class Strided(NamedTuple):
    """A tensor passed as (pointer, strides …); a stride may be a ``tl.constexpr``."""

    pointer: str
    strides: tuple[Any, ...]


class Variant(Protocol):
    """One compiled form of a kernel."""

    @property
    def name(self) -> str:
        """The row's name in the table."""

    @property
    def minimum_bytes(self) -> int | None:
        """Per element, if each input is read once and each output written once; None where elements aren't moved."""

    def compile(self, target: GPUTarget) -> tuple[Any, float]:
        """The compiled kernel, and the elements of a tile that a thread owns."""


def compile_as_launched(kernel: Any, arguments: Mapping[str, Any], target: GPUTarget, warps: int) -> Any:
    """Compile for ``arguments``: `Strided`, a pointer type, "fp64", an integer, or what is a constant to the kernel.

    A launch makes a constant of an integer that is 1, and knows of integers and addresses whether 16 divides them.
    Arguments that aren't given are None.
    """
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def declare(at: tuple[int, ...], x: Any) -> str:
        if isinstance(x, tl.constexpr):
            constants[at] = x.value
            return "constexpr"
        if isinstance(x, str) and x.startswith("*"):
            attributes[at] = _DIVISIBLE
            return x
        if x == "fp64":
            return "fp64"
        if isinstance(x, int) and not isinstance(x, bool) and x != 1 and not kernel.params[at[0]].is_constexpr:
            if x % 16 == 0:
                attributes[at] = _DIVISIBLE
            return "i32"
        constants[at] = x
        return "constexpr"

    for i, name in enumerate(kernel.arg_names):
        x = arguments.get(name)
        if isinstance(x, Strided):
            x = (x.pointer, *x.strides)
        if isinstance(x, tuple):
            signature[name] = tuple(declare((i, k), part) for k, part in enumerate(x))
        else:
            signature[name] = declare((i,), x)
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=OPTIONS | {"num_warps": warps})


def named(variant: Any, always: int) -> str:
    """The name of a named tuple: its first fields ``always``, of the others those that aren't their defaults."""
    other = variant._fields[always:]
    differences = [name for name in other if getattr(variant, name) != variant._field_defaults[name]]
    return ", ".join(
        [*variant[:always], *(f"{name.replace('_', ' ')} {getattr(variant, name)}" for name in differences)]
    )
