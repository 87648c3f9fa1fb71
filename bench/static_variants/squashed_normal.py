"""Log-probabilities of a Gaussian policy and draws from it, squashed or not, and their gradients."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import triton.language as tl
from fusedrl.kernels import squashed_normal_kernel
from fusedrl.kernels.squashed_normal_launch import _TILE, _WARPS, tiling
from triton.backends.compiler import GPUTarget

from .compiling import COMPUTE, Strided, compile_as_launched

_KERNELS = ("log_prob", "log_prob_gradient", "sample", "sample_gradient")


class SquashedNormal(NamedTuple):
    """A kernel, with all gradients where it is one of those; the element is one of the action, padding included."""

    kernel: str
    interval: str  # "not squashed", "numbers" or, of each dimension, "tensors"
    columns: int  # dimensions of the action
    dtype: str

    @property
    def name(self) -> str:
        """The row's name in the table."""
        return f"squashed_normal {self.kernel}, {self.interval}, {self.columns} dimensions, {self.dtype}"

    @property
    def minimum_bytes(self) -> None:
        """None: what there is one of for each row is moved as well, and columns are padded."""
        return None

    def compile(self, target: GPUTarget) -> tuple[Any, float]:
        """The compiled kernel, and the elements of a tile that a thread owns."""
        x, row = Strided("*" + self.dtype, (self.columns, 1)), Strided("*" + self.dtype, (1,))
        bound = Strided("*fp32", (0, 1)) if self.interval == "tensors" else None
        rows, width = tiling(self.columns)
        inputs = ("loc", "scale", "action", "noise", "grad_action", "by_loc", "by_scale", "by_action")
        arguments = {
            **dict.fromkeys(inputs, x),
            **dict.fromkeys(("grad", "grad_log_prob"), row),
            "log_prob": "*" + self.dtype,
            **dict.fromkeys(("low", "high"), bound),
            **dict.fromkeys(("center", "half", "limit"), "fp64"),
            "rows": 1 << 12,
            "columns": self.columns,
            "SQUASHED": self.interval != "not squashed",
            "DTYPE": COMPUTE[self.dtype],
            "INDEX": tl.int32,
            "ROWS": rows,
            "COLUMNS": width,
        }
        kernel = getattr(squashed_normal_kernel, f"{self.kernel}_kernel")
        return compile_as_launched(kernel, arguments, target, _WARPS), _TILE / (_WARPS * target.warp_size)


def variants() -> Iterable[SquashedNormal]:
    """All kernels at 6 dimensions; forward also without an interval, and at 16, whose rows are aligned, in bfloat16."""
    for kernel in _KERNELS:
        yield SquashedNormal(kernel, "numbers", 6, "fp32")
    for kernel in ("log_prob", "sample"):
        yield SquashedNormal(kernel, "not squashed", 6, "fp32")
        yield SquashedNormal(kernel, "numbers", 16, "bf16")


def specialisations() -> Iterable[SquashedNormal]:
    """All kernels with rows that are aligned, with bounds that are tensors, and backward of what isn't squashed."""
    for kernel in _KERNELS:
        yield SquashedNormal(kernel, "numbers", 16, "fp32")
        yield SquashedNormal(kernel, "tensors", 8, "fp64")
    for kernel in ("log_prob_gradient", "sample_gradient"):
        yield SquashedNormal(kernel, "not squashed", 6, "fp32")
        yield SquashedNormal(kernel, "numbers", 16, "bf16")
