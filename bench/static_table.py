"""What the kernels cost, read from the machine code: no GPU is needed to compile for one.

    python bench/static_table.py            compile every variant for every target and print the table
    python bench/static_table.py --write    ... and write bench/results/static_kernels.json

The unit of "per element" is an element that a thread owns: static instructions, shuffles or bytes of the whole kernel
divided by the elements of a tile per thread. What an element is, each kernel's class in `static_variants` says.

Widths and bytes are those of global loads and stores. The minimum is each input read once and each output written once,
in the dtypes of the tensors of the variant. Rows that are split are two launches, which are two rows here; the bytes
include the compositions of shares, which are moved once per share and not per element. V-trace reads neighbouring steps
as well, whose bytes come from a cache; it has no minimum here. A wait is a use of loaded data before which nothing more
is loaded until it has come: one per tile is the least, and a split row's solve has some for the compositions as well.
Spills are bytes of memory: a scalar register that gfx942 keeps in a lane of a vector register is none.

A lane owns 4 steps, and a warp of 32 threads 16 elements per thread: 128 bits of float32 or float64. Of bfloat16, 4
adjacent steps (contiguous time) or the 4 adjacent rows of a thread (time-major) are 64 bits. A warp's 64-bit load is
256 adjacent bytes, whole cache lines as with 128 bits, and moves as many bytes per cycle, so that wider ones would save
instructions alone: time-major, tiles of 1024 elements take 28.6 instead of 30.8 (GAE, sm_90), but 136 registers instead
of 72, and make half the warps. A wave of gfx942 has 64 threads with 8 elements each, which makes time-major accesses
half as wide. The step ahead at which the adjoint reads y is never aligned where time is contiguous: those loads are of
single elements.

Of the losses over samples and of actions, a thread has 4 elements of float32 or bfloat16 and 2 of float64, which it
moves at once: 128 or 64 bits, on gfx942 half of them. Elements are moved one by one where samples have a stride, 16
doesn't divide their number, or rows are of a length like 6 dimensions of an action.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    sys.exit("a function jitted for the interpreter can't be compiled: unset TRITON_INTERPRET")

import triton
from rich.console import Console
from rich.table import Table
from static_variants import TARGETS, Variant, specialisations, table

RESULTS = Path(__file__).parent / "results" / "static_kernels.json"


class Cost(NamedTuple):
    """What is read from the machine code of a kernel."""

    registers: int
    spill_bytes: int
    instructions: int
    shuffles: int
    loads: list[int]  # the bits of each global load
    stores: list[int]
    waits: int | None


def measure(job: tuple[str, Variant]) -> dict[str, Any]:
    """One row of the table."""
    target, variant = job
    compiled, elements = variant.compile(TARGETS[target])
    cost = (_read_amd if target.startswith("gfx") else _read_nvidia)(compiled)
    minimum = variant.minimum_bytes
    return {
        "kernel": variant.name,
        "target": target,
        "registers": cost.registers,
        "spill_bytes": cost.spill_bytes,
        "widest_load_bits": max(cost.loads),
        "widest_store_bits": max(cost.stores),
        "waits": cost.waits,
        "instructions_per_element": round(cost.instructions / elements, 1),
        "shuffles_per_element": round(cost.shuffles / elements, 2),
        "bytes_per_element": minimum and round(sum(cost.loads + cost.stores) / 8 / elements, 2),
        "minimum_bytes": minimum,
    }


def _read_nvidia(compiled: Any) -> Cost:
    binaries = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass = subprocess.run(
            [binaries / "cuobjdump", "-sass", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*)", sass, re.MULTILINE)
    count = Counter(mnemonic.split(".")[0] for mnemonic, _ in lines)
    registers, stack = (int(x) for x in re.search(r"REG:(\d+) STACK:(\d+)", sass).groups())  # type: ignore[union-attr]  # always printed
    return Cost(
        registers=registers,
        spill_bytes=stack + 4 * (count["LDL"] + count["STL"]),
        instructions=len(lines) - count["NOP"],
        shuffles=count["SHFL"],
        loads=[_bits(mnemonic) for mnemonic, _ in lines if mnemonic.startswith("LDG")],
        stores=[_bits(mnemonic) for mnemonic, _ in lines if mnemonic.startswith("STG")],
        waits=_waits(lines),
    )


def _bits(mnemonic: str) -> int:
    """How many bits a global load or store moves: 32, unless its suffix says otherwise."""
    suffix = re.search(r"\.[US]?(8|16|64|128)\b", mnemonic)
    return int(suffix[1]) if suffix else 32


def _waits(lines: list[tuple[str, str]]) -> int:
    """How often loads are followed by a use of what they load before anything more is loaded.

    In the order of the code, which is the order of a tile: a register that was loaded is looked for among operands.
    """
    waits, loaded, in_flight = 0, set[int](), False
    for mnemonic, operands in lines:
        registers = [int(r) for r in re.findall(r"\bR(\d+)\b", operands)]
        if mnemonic.startswith("LDG"):
            loaded.update(range(registers[0], registers[0] + max(1, _bits(mnemonic) // 32)))
            in_flight = True
            continue
        sources = registers if mnemonic.startswith("ST") else registers[1:]
        if not loaded.isdisjoint(sources):
            waits += in_flight
            in_flight = False
            loaded.difference_update(sources)
    return waits


def _read_amd(compiled: Any) -> Cost:
    assembly = compiled.asm["amdgcn"]
    field = {
        name: int(re.search(rf"\.{name}:\s+(\d+)", assembly).group(1))  # type: ignore[union-attr]  # always printed
        for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    }
    mnemonics = re.findall(r"^\t([sv]_\w+|ds_\w+|global_\w+|buffer_\w+|flat_\w+)(.*)$", assembly, re.MULTILINE)
    exchanges = ("ds_bpermute", "ds_permute", "ds_swizzle", "v_permlane")
    bits: dict[str, list[int]] = {"load": [], "store": []}
    for mnemonic, _ in mnemonics:
        move = re.match(r"(?:global|buffer|flat)_(load|store)_[us]?(dword|short|byte)(?:x(\d))?", mnemonic)
        if move:
            bits[move[1]].append({"dword": 32, "short": 16, "byte": 8}[move[2]] * int(move[3] or 1))
    return Cost(
        registers=field["vgpr_count"],
        spill_bytes=4 * field["vgpr_spill_count"] + field["private_segment_fixed_size"],
        instructions=len(mnemonics),
        shuffles=sum(m.startswith(exchanges) or "dpp" in m or "row_sh" in rest for m, rest in mnemonics),
        loads=bits["load"],
        stores=bits["store"],
        waits=None,
    )


def rows_of(jobs: Iterable[tuple[str, Variant]]) -> list[dict[str, Any]]:
    """The rows, compiled on all cores."""
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        return list(pool.map(measure, jobs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS}")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table, with all specialisations")
    arguments = parser.parse_args()
    rows = rows_of(table())
    if arguments.json:
        print(json.dumps({"kernels": rows, "specialisations": rows_of(specialisations())}))
    else:
        view = Table(*(name.replace("_", " ") for name in rows[0]))
        view.columns[0].no_wrap = True
        for row in rows:
            view.add_row(*map(str, row.values()))
        Console(width=160).print(view)
    if arguments.write:
        lines = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in rows)
        RESULTS.write_text(f'{{"triton": "{triton.__version__}", "kernels": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
