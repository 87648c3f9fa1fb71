"""What the kernels cost, read from the machine code: no GPU is needed to compile for one.

    python bench/static_table.py            compile every variant for every target and print the table
    python bench/static_table.py --write    ... and write bench/results/static_kernels.json

The unit of "per element" is an element that a thread owns: static instructions, or shuffles, of the whole kernel
divided by the elements of a tile per thread. What an element is, each kernel's class in `static_variants` says.
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
from typing import Any

if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    sys.exit("a function jitted for the interpreter can't be compiled: unset TRITON_INTERPRET")

import triton
from rich.console import Console
from rich.table import Table
from static_variants import Variant, variants
from triton.backends.compiler import GPUTarget

RESULTS = Path(__file__).parent / "results" / "static_kernels.json"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


def measure(job: tuple[str, Variant]) -> dict[str, Any]:
    """One row of the table."""
    target, variant = job
    compiled, elements = variant.compile(TARGETS[target])
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
