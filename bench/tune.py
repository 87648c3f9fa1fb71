"""Time other tilings of a scan than the one that is chosen, on a GPU: what `scan_launch.tiling` was made from.

    python -m bench.tune gae td_lambda --shape 64x262144 1x16777216
    python -m bench.tune vtrace --shape 8192x2048 --layout time-major --json tune.json

Of each tiling rows, lanes, warps and shares are halved and doubled, and every combination is tried that leaves a thread
4 to 16 elements. V-trace and its adjoint, which choose differently, get the same. Before anything is timed, the results
are compared with those of the tiling that is chosen. Times are the device's, in CUDA graphs, as in `python -m bench`.
"""

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from fusedrl.kernels import launching, scan_launch
from fusedrl.kernels.scan_launch import Tiling
from fusedrl.kernels.scan_tiles import STEPS_PER_LANE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench import scans
from bench.__main__ import on_device
from bench.cases import Arm, Case, off_by
from bench.profile.__main__ import LAYOUTS, parsed

ELEMENTS = (4, 16)  # of a thread, at least and at most
SHOWN = 12  # tilings in the table, the fastest first
TOLERANCE = 1e-4


def neighbours(tile: Tiling, *, time_is_contiguous: bool) -> Iterator[Tiling]:
    """``tile``, and those that have half or twice its rows, lanes, warps or shares, as far as they make sense."""

    def near(x: int) -> set[int]:
        return {max(1, x // 2), x, 2 * x}

    yield tile
    rows = [tile.rows] if time_is_contiguous else near(tile.rows)
    warps = [1] if time_is_contiguous else near(tile.warps)
    splits = [1] if tile.split == 1 else [x for x in near(tile.split) if x > 1]
    for r, lanes, w, split in itertools.product(rows, near(tile.lanes), warps, splits):
        elements = r * lanes * STEPS_PER_LANE // (32 * w)
        if ELEMENTS[0] <= elements <= ELEMENTS[1] and tile.last_lanes <= lanes and tile.last_rows <= r:
            found = tile._replace(rows=r, lanes=lanes, warps=w, split=split)
            if found != tile:
                yield found


@contextmanager
def planned_with(tile: Tiling | None) -> Iterator[list[tuple[Tiling, bool]]]:
    """Within the block launches have ``tile``, or the chosen one.

    Yields the tilings that they were planned with, and whether time is contiguous.
    """
    choose, seen = scan_launch.tiling, []

    def note(*arguments: Any, **options: Any) -> Tiling:
        found = tile or choose(*arguments, **options)
        seen.append((found, options["time_is_contiguous"]))
        return found

    launching.Launcher.forget()
    try:
        with patch.object(scan_launch, "tiling", note):
            yield seen
    finally:
        launching.Launcher.forget()


def results(arm: Arm) -> list[Tensor]:
    """Outputs and gradients."""
    outputs = arm.recorded()
    return [x.detach() for x in (*outputs, *arm.backward(outputs[0])) if x is not None]


def measure(case: Case, tile: Tiling, wanted: Sequence[Tensor], *, chosen: bool = False) -> dict[str, Any]:
    """A row: the tiling, and its times and shares of a copy's bandwidth, or what is wrong with it.

    Where it is ``chosen``, the adjoint has what is chosen for itself.
    """
    with planned_with(None if chosen else tile):
        try:
            found = results(next(iter(case.arms.values())))
        except Exception as problem:  # of whatever kind the compiler has for a tile that it can't do
            return {"tiling": tile, "failed": f"{type(problem).__name__}: {str(problem).splitlines()[:1]}"}
        for x, expected in zip(found, wanted, strict=True):
            error = off_by(x, expected, TOLERANCE)
            if error is not None:
                return {"tiling": tile, "failed": f"off by {error:.1e}"}
        return {"tiling": tile} | on_device(case, "forward") | on_device(case, "both")


def tune(case: Case) -> list[dict[str, Any]]:
    """The rows of the chosen tiling, which is the first, and of its neighbours, the fastest first."""
    with planned_with(None) as seen:
        wanted = results(next(iter(case.arms.values())))
    tile, time_is_contiguous = seen[0]
    _, *tiles = neighbours(tile, time_is_contiguous=time_is_contiguous)
    chosen = measure(case, tile, wanted, chosen=True)
    others = [measure(case, other, wanted) for other in tiles]
    return [chosen, *sorted(others, key=lambda row: row.get("both_device_us", float("inf")))]


def show(title: str, rows: Sequence[dict[str, Any]], console: Console) -> None:
    """The chosen tiling and the fastest of the others."""
    table = Table(*Tiling._fields, "forward µs", "of a copy", "both µs", "of a copy", title=title)
    for row in rows[: SHOWN + 1]:
        times = [
            text
            for way in ("forward", "both")
            for text in (f"{row[f'{way}_device_us']:.1f}", f"{row[f'fraction_of_copy_{way}']:.1%}")
        ] if "failed" not in row else [row["failed"]]  # fmt: skip
        table.add_row(*map(str, row["tiling"]), *times)
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m bench.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", choices=scans.OPERATORS, help="what is computed")
    parser.add_argument("--shape", nargs="+", required=True, metavar="BxT", help="rows and steps")
    parser.add_argument("--layout", choices=LAYOUTS, default="batch-major", help="what is contiguous in memory")
    parser.add_argument("--json", type=Path, help="where all rows are written")
    chosen = parser.parse_args(arguments)
    try:
        shapes = [parsed(shape, "BxT") for shape in chosen.shape]
    except ValueError as problem:
        parser.error(str(problem))
    if not torch.cuda.is_available():
        parser.error("tilings are timed on a CUDA device, and there is none")
    found = {}
    make = partial(scans.case, device=torch.device("cuda"), layout=LAYOUTS[chosen.layout], peers=False)
    for name, shape in itertools.product(chosen.names, shapes):
        case = make(name, *shape)
        found[str(case)] = tune(case)
        show(str(case), found[str(case)], Console())
        del case
        torch.cuda.empty_cache()
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
