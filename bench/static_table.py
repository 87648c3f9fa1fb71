"""What the scan kernel costs, read from the machine code: no GPU is needed to compile for one.

    python bench/static_table.py            compile every variant for every target and print the table
    python bench/static_table.py --write    ... and write bench/results/static_kernels.json

The unit of "per element" is an element that a thread owns: static instructions, or shuffles, of the whole kernel
divided by the elements of a tile per thread. Tensors are aligned to 16 bytes.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    sys.exit("a function jitted for the interpreter can't be compiled: unset TRITON_INTERPRET")

import triton
import triton.language as tl
from fusedrl.kernels.launch import _WARPS, tiling
from fusedrl.kernels.recurrence import GAE, SCAN, TD_LAMBDA
from fusedrl.kernels.scan import STEPS_PER_LANE, scan_kernel
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

RESULTS = Path(__file__).parent / "results" / "static_kernels.json"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

# The tensors that each variant gets; all gradients that training a critic and an actor needs are in the adjoint.
_READ = {
    SCAN: ("reward", "done"),
    TD_LAMBDA: ("reward", "next_value", "done", "terminated"),
    GAE: ("reward", "value", "next_value", "done", "terminated"),
}
_ADJOINT = {
    SCAN: ("done", "grad_y", "grad_reward"),
    TD_LAMBDA: ("done", "terminated", "grad_y", "grad_reward", "grad_next_value"),
    GAE: ("done", "terminated", "grad_y", "grad_target", "grad_reward", "grad_value", "grad_next_value"),
}
_ADJOINT_OF_SCALARS = {
    SCAN: ("y", "grad_gamma"),
    TD_LAMBDA: ("y", "next_value", "grad_gamma", "grad_lmbda"),
    GAE: ("y", "next_value", "grad_gamma", "grad_lmbda"),
}
_MASKS = ("done", "terminated")
_ITEMSIZE = {"bf16": 2, "fp32": 4, "fp64": 8}


class Variant(NamedTuple):
    """One compiled form of the kernel."""

    kind: str
    direction: str  # "recurrence", "adjoint", or "adjoint γλ" with the gradients of γ and λ too
    layout: str  # "contiguous time" or "time-major"
    phase: str  # "whole row", or "compose" and "solve" of a split row
    dtype: str

    @property
    def name(self) -> str:
        """The row's name in the table."""
        return ", ".join(self)


def variants() -> list[Variant]:
    """Every kind, direction and layout in float32; split rows and the other dtypes for GAE."""
    layouts = ("contiguous time", "time-major")
    found = [
        Variant(kind, direction, layout, "whole row", "fp32")
        for kind in (GAE, TD_LAMBDA, SCAN)
        for direction in ("recurrence", "adjoint", "adjoint γλ")
        for layout in layouts
    ]
    found += [Variant(GAE, "recurrence", "time-major, few rows", "whole row", "fp32")]
    found += [Variant(GAE, "recurrence", layout, phase, "fp32") for layout in layouts for phase in ("compose", "solve")]
    found += [
        Variant(GAE, "recurrence", layout, "whole row", dtype) for layout in layouts for dtype in ("bf16", "fp64")
    ]
    return found


def compile_variant(variant: Variant, target: GPUTarget) -> tuple[Any, float]:
    """The compiled kernel as a launch on aligned tensors would make it, and the elements of a thread."""
    contiguous = variant.layout == "contiguous time"
    split = variant.phase != "whole row"
    # Rows that fill a device, or don't quite; or one row (contiguous) or 32 columns (time-major) of a million steps.
    rows, steps = (1 if contiguous else 32, 1 << 20) if split else (1 << 16, 1 << 10)
    if variant.layout.endswith("few rows"):
        rows = 1 << 12
    tile = tiling(rows, steps, _ITEMSIZE[variant.dtype], time_is_contiguous=contiguous, processors=132)
    assert (tile.split > 1) == split
    adjoint = variant.direction != "recurrence"
    present = (_ADJOINT if adjoint else _READ)[variant.kind]
    if variant.direction == "adjoint γλ":
        present += _ADJOINT_OF_SCALARS[variant.kind]
    if not adjoint:
        present += ("y", "target") if variant.kind == GAE else ("y",)
    constants: dict[str, Any] = {
        "inner": 1,
        "KIND": variant.kind,
        "ADJOINT": adjoint,
        "DTYPE": tl.float64 if variant.dtype == "fp64" else tl.float32,
        "INDEX": tl.int32,
        "TIME_IS_CONTIGUOUS": contiguous,
        "TILE_ROWS": tile.rows,
        "TILE_LANES": tile.lanes,
        "COMPOSE": variant.phase == "compose",
        "SPLIT": tile.split,
        "SPLIT_POWER": triton.next_power_of_2(tile.split),
    }
    if rows == 1:
        constants["rows"] = 1  # as a launch specialises it
    types = {"gamma": "fp64", "lmbda": "fp64", "rows": "i32", "steps": "i32"}
    if split:
        types["compositions"] = "*" + str(constants["DTYPE"])
    signature: dict[str, Any] = {}
    fixed: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    divisible = [["tt.divisibility", 16]]
    for i, name in enumerate(scan_kernel.arg_names):
        if name in present:
            pointer = "*u1" if name in _MASKS else "*" + variant.dtype
            attributes[i, 0] = divisible
            attributes[i, 2] = divisible  # the inner stride is 0
            if contiguous:  # (pointer, row stride, 0, 1)
                signature[name] = (pointer, "i32", "i32", "constexpr")
                attributes[i, 1] = divisible
                fixed[i, 3] = 1
            else:  # (pointer, 1, 0, row of all columns)
                signature[name] = (pointer, "constexpr", "i32", "i32")
                fixed[i, 1] = 1
                attributes[i, 3] = divisible
        elif name in types and name not in constants:
            signature[name] = types[name]
            if name not in ("gamma", "lmbda"):
                attributes[i,] = divisible
        else:
            signature[name] = "constexpr"
            fixed[i,] = constants.get(name)
    source = ASTSource(scan_kernel, signature=signature, constexprs=fixed, attrs=attributes)
    compiled = triton.compile(source, target=target, options={"num_warps": _WARPS})
    return compiled, tile.rows * tile.lanes * STEPS_PER_LANE / (_WARPS * target.warp_size)


def measure(job: tuple[str, Variant]) -> dict[str, Any]:
    """One row of the table."""
    target, variant = job
    compiled, elements = compile_variant(variant, TARGETS[target])
    read = _read_amd if target.startswith("gfx") else _read_nvidia
    registers, spills, instructions, shuffles, load_bits = read(compiled)
    return {
        "kernel": variant.name,
        "target": target,
        "registers": registers,
        "spill_bytes": spills,
        "widest_load_bits": load_bits,
        "instructions_per_element": round(instructions / elements, 1),
        "shuffles_per_element": round(shuffles / elements, 2),
    }


def _read_nvidia(compiled: Any) -> tuple[int, int, int, int, int]:
    binaries = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass = subprocess.run(
            [binaries / "cuobjdump", "-sass", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    mnemonics = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE)
    count = Counter(m.split(".")[0] for m in mnemonics)
    registers, stack = (int(x) for x in re.search(r"REG:(\d+) STACK:(\d+)", sass).groups())  # type: ignore[union-attr]  # always printed
    local = count["LDL"] + count["STL"]
    widths = [int(w) for m in mnemonics if m.startswith("LDG") for w in re.findall(r"\.(64|128)\b", m) or ["32"]]
    return registers, stack + 4 * local, len(mnemonics) - count["NOP"], count["SHFL"], max(widths)


def _read_amd(compiled: Any) -> tuple[int, int, int, int, int]:
    assembly = compiled.asm["amdgcn"]
    field = {
        name: int(re.search(rf"\.{name}:\s+(\d+)", assembly).group(1))  # type: ignore[union-attr]  # always printed
        for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    }
    mnemonics = re.findall(r"^\t([sv]_\w+|ds_\w+|global_\w+|buffer_\w+|flat_\w+)(.*)$", assembly, re.MULTILINE)
    exchanges = ("ds_bpermute", "ds_permute", "ds_swizzle", "v_permlane")
    shuffles = sum(m.startswith(exchanges) or "dpp" in m or "row_sh" in rest for m, rest in mnemonics)
    words = [int(n or 1) for m, _ in mnemonics for n in re.findall(r"(?:global|buffer|flat)_load_dword(?:x(\d))?", m)]
    spilled = 4 * (field["vgpr_spill_count"] + field["sgpr_spill_count"]) + field["private_segment_fixed_size"]
    return field["vgpr_count"], spilled, len(mnemonics), shuffles, 32 * max(words, default=1)


def table() -> list[dict[str, Any]]:
    """All rows, compiled on all cores."""
    jobs = [(target, variant) for variant in variants() for target in TARGETS]
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        return list(pool.map(measure, jobs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS}")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    rows = table()
    if arguments.json:
        print(json.dumps(rows))
    else:
        view = Table(*rows[0])
        for row in rows:
            view.add_row(*map(str, row.values()))
        Console(width=160).print(view)
    if arguments.write:
        lines = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in rows)
        RESULTS.write_text(f'{{"triton": "{triton.__version__}", "kernels": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
