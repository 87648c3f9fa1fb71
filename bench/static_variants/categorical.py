"""The kernels of the categorical loss."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import triton.language as tl
from fusedrl.kernels import categorical_kernel, categorical_launch
from triton.backends.compiler import GPUTarget

from .compiling import COMPUTE, Strided, compile_as_launched

_SAMPLES = 4096


class Categorical(NamedTuple):
    """A kernel of the categorical loss.

    The element is one of a tile [atoms, actions], in the projection a target.
    """

    kernel: str  # "loss" (with the online network's choice), "gradient" or "projection"
    layout: str  # "actions last" or "atoms last"
    atoms: int
    actions: int
    dtype: str

    @property
    def name(self) -> str:
        """The row's name in the table."""
        return f"categorical {self.kernel}, {self.layout}, {self.atoms} atoms × {self.actions} actions, {self.dtype}"

    @property
    def minimum_bytes(self) -> None:
        """None: of most elements one tensor alone is read or written."""
        return None

    def compile(self, target: GPUTarget) -> tuple[Any, float]:
        """The compiled kernel, and the elements of a tile that a thread owns."""
        compute = COMPUTE[self.dtype]
        floating, precise = "*" + self.dtype, f"*{compute}"
        tile = categorical_launch.tiling(
            self.atoms, self.actions, compute.primitive_bitwidth // 8, sources=target.warp_size
        )
        inner = (self.actions, 1) if self.layout == "actions last" else (1, self.atoms)
        distribution = Strided(floating, tuple(map(tl.constexpr, (self.atoms * self.actions, *inner))))
        arguments = {
            "log_prob": distribution,
            "next_log_prob": distribution,
            "next_online_log_prob": distribution,
            "found": distribution,
            "prob": Strided(floating, (self.atoms, 1)),
            "action": Strided("*i64", (1,)),
            "support": Strided("*fp32", (1,)),
            "reward": Strided("*fp32", (1,)),
            "terminated": Strided("*u1", (1,)),
            "grad": Strided(floating, (1,)),
            "gamma": "fp64",
            "loss": floating,
            "projected": floating if self.kernel == "projection" else precise,
            "samples": _SAMPLES,
            "ATOMS": self.atoms,
            "ACTIONS": self.actions,
            "DTYPE": compute,
            "INDEX": tl.int32,
            "ACTIONS_POWER": tile.actions_power,
            "TILE_ATOMS": tile.atoms,
            "TARGETS": tile.targets,
            "SOURCES": tile.sources,
            "UNEVEN": 2.0**-22,
            "ROUNDING": 2.0**-19,
            "SAMPLES": 1,
        }
        kernel = getattr(categorical_kernel, f"{self.kernel}_kernel")
        compiled = compile_as_launched(kernel, arguments, target, categorical_launch._WARPS)
        elements = tile.targets if self.kernel == "projection" else tile.atoms * tile.actions_power
        return compiled, elements / (categorical_launch._WARPS * target.warp_size)


def variants() -> Iterable[Categorical]:
    """All kernels at 51 atoms and 6 actions in every dtype; other layouts and sizes in float32."""
    for kernel in ("loss", "gradient", "projection"):
        for dtype in ("fp32", "bf16", "fp64"):
            yield Categorical(kernel, "actions last", 51, 6, dtype)
    for kernel in ("loss", "gradient"):
        yield Categorical(kernel, "atoms last", 51, 6, "fp32")
        yield Categorical(kernel, "actions last", 512, 6, "fp32")
    for atoms, actions in ((51, 18), (101, 6)):
        yield Categorical("loss", "actions last", atoms, actions, "fp32")
