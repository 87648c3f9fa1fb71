"""The scan and V-trace, and their adjoints."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import triton.language as tl
from fusedrl.kernels import scan_launch, vtrace_launch
from fusedrl.kernels.scan_kernel import scan_kernel
from fusedrl.kernels.scan_problem import GAE, SCAN, TD_LAMBDA
from fusedrl.kernels.scan_tiles import STEPS_PER_LANE
from fusedrl.kernels.vtrace_kernel import vtrace_kernel
from triton.backends.compiler import GPUTarget

from .compiling import COMPUTE, ITEMSIZE, Strided, compile_as_launched

# The tensors that each variant gets; all gradients that training a critic and an actor needs are in the adjoint.
_READ = {
    SCAN: ("reward", "done"),
    TD_LAMBDA: ("reward", "next_value", "done", "terminated"),
    GAE: ("reward", "value", "next_value", "done", "terminated"),
}
_ADJOINT_READ = {
    SCAN: ("done", "grad_y"),
    TD_LAMBDA: ("done", "terminated", "grad_y"),
    GAE: ("done", "terminated", "grad_y", "grad_target"),
}
_ADJOINT = {
    SCAN: (*_ADJOINT_READ[SCAN], "grad_reward"),
    TD_LAMBDA: (*_ADJOINT_READ[TD_LAMBDA], "grad_reward", "grad_next_value"),
    GAE: (*_ADJOINT_READ[GAE], "grad_reward", "grad_value", "grad_next_value"),
}
_ADJOINT_OF_SCALARS = {
    SCAN: ("y", "grad_gamma"),
    TD_LAMBDA: ("y", "next_value", "grad_gamma", "grad_lmbda"),
    GAE: ("y", "next_value", "grad_gamma", "grad_lmbda"),
}
_MASKS = ("done", "terminated")


class Scan(NamedTuple):
    """A recurrence or its adjoint; the element is a step of a row."""

    kind: str
    direction: str  # "recurrence", "adjoint", or "adjoint γλ" with the gradients of γ and λ too
    layout: str  # "contiguous time" or "time-major", with ", few rows" or without
    phase: str  # "whole row", or "compose" and "solve" of a split row
    dtype: str

    @property
    def name(self) -> str:
        """The row's name in the table."""
        return ", ".join(self)

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of the kernel's tensors, inputs before outputs."""
        if self.direction == "recurrence":
            return (*_READ[self.kind], "y", *(("target",) if self.kind == GAE else ()))
        return _ADJOINT[self.kind] + (_ADJOINT_OF_SCALARS[self.kind] if self.direction == "adjoint γλ" else ())

    @property
    def minimum_bytes(self) -> int:
        """Per element, if each input is read once and each output written once."""
        used = self.tensors
        if self.phase == "compose":  # which needs what c and d are made of, and writes nothing per element
            used = _READ[self.kind] if self.direction == "recurrence" else _ADJOINT_READ[self.kind]
        return sum(1 if name in _MASKS else ITEMSIZE[self.dtype] for name in used)

    def compile(self, target: GPUTarget) -> tuple[Any, float]:
        """The compiled kernel, and the elements of a tile that a thread owns."""
        scalars = {"gamma": "fp64", "lmbda": "fp64", "KIND": self.kind}
        return _compile_scan(scan_kernel, self, scalars, target, lean=self.direction != "adjoint γλ")


class VTrace(NamedTuple):
    """V-trace, from both policies' log-probabilities, or its adjoint with all gradients; the element is a step."""

    direction: str  # "recurrence" or "adjoint"
    layout: str
    phase: str
    dtype: str

    @property
    def name(self) -> str:
        """The row's name in the table."""
        return ", ".join(("vtrace", *self))

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of the kernel's tensors, inputs before outputs."""
        read = ("log_pi", "log_mu", "value", "next_value", "reward", "done", "terminated")
        if self.direction == "recurrence":
            return (*read, "advantage", "target")
        grads = ("grad_log_pi", "grad_log_mu", "grad_value", "grad_next_value", "grad_reward")
        return (*read, "target", "grad_advantage", "grad_target", *grads)

    @property
    def minimum_bytes(self) -> None:
        """None: it reads neighbouring steps too, whose bytes the cache has."""
        return None

    def compile(self, target: GPUTarget) -> tuple[Any, float]:
        """The compiled kernel, and the elements of a tile that a thread owns."""
        scalars = {"gamma": "fp64", "rho": "fp64", "c": "fp64"}
        adjoint = self.direction == "adjoint"
        in_flight = vtrace_launch._ADJOINT_WARP_BYTES if adjoint else vtrace_launch._WARP_BYTES
        return _compile_scan(vtrace_kernel, self, scalars, target, warp_bytes=in_flight)


def _compile_scan(
    kernel: Any, variant: Scan | VTrace, scalars: Mapping[str, Any], target: GPUTarget, **options: Any
) -> tuple[Any, float]:
    """Compile a kernel that scans, with the tile of `scan_launch.tiling`, to which the ``options`` go."""
    contiguous = variant.layout.startswith("contiguous time")
    split = variant.phase != "whole row"
    # Rows that fill a device, or don't quite; or one row (contiguous), 32 columns (time-major) of a million steps.
    rows, steps = (1 if contiguous else 32, 1 << 20) if split else (1 << 16, 1 << 10)
    if variant.layout.endswith("few rows"):
        rows = 1 << 12
    itemsize = ITEMSIZE[variant.dtype]
    tile = scan_launch.tiling(rows, steps, itemsize, time_is_contiguous=contiguous, processors=132, **options)
    assert (tile.split > 1) == split
    solving = tile
    if variant.phase == "compose":
        tile = tile.composing(ends=True)
    strides = (steps, 0, 1) if contiguous else (1, 0, rows)
    arguments: dict[str, Any] = {
        name: Strided("*u1" if name in _MASKS else "*" + variant.dtype, ()) for name in variant.tensors
    }
    arguments |= scalars
    arguments |= {
        "layout": strides,
        "compositions": f"*{COMPUTE[variant.dtype]}" if split else None,
        "rows": rows,
        "inner": 1,
        "steps": steps,
        "ADJOINT": variant.direction != "recurrence",
        "DTYPE": COMPUTE[variant.dtype],
        "INDEX": tl.int32,
        "TIME_IS_CONTIGUOUS": contiguous,
        "TILE_ROWS": tile.rows,
        "TILE_LANES": tile.lanes,
        "COMPOSE": variant.phase == "compose",
        "PARTS": solving.lanes // tile.lanes,
        "SPLIT": tile.split,
        "SPLIT_POWER": scan_launch.split_power(tile),
        "BLOCKS": tile.blocks,
    }
    compiled = compile_as_launched(kernel, arguments, target, tile.warps)
    return compiled, tile.rows * tile.lanes * STEPS_PER_LANE / (tile.warps * target.warp_size)


def variants() -> Iterable[Scan | VTrace]:
    """Every kind, direction and layout in float32; split rows and the other dtypes for GAE and V-trace."""
    layouts = ("contiguous time", "time-major")
    directions = ("recurrence", "adjoint", "adjoint γλ")
    for kind in (GAE, TD_LAMBDA, SCAN):
        for direction in directions:
            for layout in layouts:
                yield Scan(kind, direction, layout, "whole row", "fp32")
    # The dearest kind in the dearest direction too.
    for kind, direction in (*((GAE, direction) for direction in directions), (TD_LAMBDA, "adjoint γλ")):
        for layout in layouts:
            yield Scan(kind, direction, f"{layout}, few rows", "whole row", "fp32")
        for layout in layouts:
            for phase in ("compose", "solve"):
                yield Scan(kind, direction, layout, phase, "fp32")
    for direction in ("recurrence", "adjoint"):
        for layout in layouts:
            for dtype in ("bf16", "fp64"):
                yield Scan(GAE, direction, layout, "whole row", dtype)
    for direction in ("recurrence", "adjoint"):
        yield VTrace(direction, "time-major, few rows", "whole row", "fp32")
        for layout in layouts:
            for phase in ("whole row", "compose", "solve"):
                yield VTrace(direction, layout, phase, "fp32")
        yield VTrace(direction, "contiguous time", "whole row", "fp64")
