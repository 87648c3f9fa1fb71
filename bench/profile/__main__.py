"""Profile one operator or loss: host time, launches, host syncs, device time, bytes, a trace and a roofline.

    python -m bench.profile gae --shape 4096x128 65536x32
    python -m bench.profile SACLoss --shape 256
    python -m bench.profile --list

A result is compared with a reference before it is profiled. There is a table on the terminal; a Chrome trace per shape
and direction, and the roofline as a PNG, go to out/profile/.
"""

# This folder has no __init__.py: were it a package, the scripts of bench/, whose folder Python searches first, would
# import it where the standard library asks for its own `profile`.

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from fusedrl.kernels import BACKENDS, resolve_backend, use_backend
from rich.console import Console

from bench import losses, options, projection, scans
from bench.cases import Case, WrongResult, refuse_if_wrong
from bench.measuring import describe
from bench.profile.measures import measure, trace
from bench.profile.report import roofline, show

LAYOUTS = {"batch-major": scans.BATCH_MAJOR, "time-major": scans.TIME_MAJOR}
DTYPES = {str(x).removeprefix("torch."): x for x in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
CATEGORICAL = "categorical"
NAMES = {
    **dict.fromkeys(scans.OPERATORS, "BxT"),
    CATEGORICAL: "B",
    **dict.fromkeys(losses.LOSSES, "B"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 if a result is wrong."""
    parser = argparse.ArgumentParser(
        "python -m bench.profile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", help="an operator or a loss, see --list")
    parser.add_argument("--shape", nargs="+", default=[], metavar="BxT", help="BxT, or B where there is no time")
    parser.add_argument("--list", action="store_true", help="print the names and the shapes that they take")
    over_time = "of an operator over time (default: %s)"
    parser.add_argument("--layout", choices=LAYOUTS, help="what is contiguous in memory, " + over_time % "batch-major")
    parser.add_argument("--dtype", choices=DTYPES, help=over_time % "float32")
    parser.add_argument("--backend", choices=BACKENDS, help="which implementation runs")
    parser.add_argument("--device", type=options.device, help="default: the CUDA device if there is one")
    parser.add_argument("--budget", type=options.seconds, default=0.5, help="seconds per direction on a CPU")
    parser.add_argument("--output", type=Path, default=Path("out/profile"), help="where the trace and the PNG go")
    chosen = parser.parse_args(arguments)
    console = Console()
    if chosen.list:
        for name, shape in NAMES.items():
            console.print(f"{name} --shape {shape}", highlight=False)
        return 0
    if chosen.name is None:
        parser.error(f"say what to profile: {', '.join(NAMES)}")
    if chosen.name not in NAMES:
        parser.error(f"there is nothing named {chosen.name!r} to profile; there are {', '.join(NAMES)}")
    if not chosen.shape:
        parser.error(f"{chosen.name} needs --shape {NAMES[chosen.name]}")
    try:
        shapes = [parsed(shape, NAMES[chosen.name]) for shape in chosen.shape]
    except ValueError as error:
        parser.error(f"{chosen.name}: {error}")
    for option in ("layout", "dtype"):
        if getattr(chosen, option) is not None and chosen.name not in scans.OPERATORS:
            parser.error(f"{chosen.name} has no --{option}: only operators over time have")
    device = chosen.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolve_backend(chosen.backend, torch.empty(0, device=device))
        chosen.output.mkdir(parents=True, exist_ok=True)
    except (RuntimeError, OSError) as error:
        parser.error(str(error))
    layout, dtype = LAYOUTS[chosen.layout or "batch-major"], DTYPES[chosen.dtype or "float32"]
    build = builder(chosen.name, device, layout, dtype)
    name = "-".join(filter(None, (chosen.name, chosen.layout, chosen.dtype, chosen.backend)))
    with use_backend(chosen.backend) if chosen.backend else nullcontext():
        return profile(name, [build(*shape) for shape in shapes], device, chosen.budget, chosen.output, console)


def profile(
    name: str, cases: Sequence[Case], device: torch.device, budget: float, output: Path, console: Console
) -> int:
    """Check, measure, trace and report all cases; ``name`` is what is profiled, and with which options."""
    found = []
    written: list[Path] = []
    for case in cases:
        arm = next(iter(case.arms))
        try:
            refuse_if_wrong(case)
        except WrongResult as error:
            console.print(f"[red]{error}")
            return 1
        for direction in ("forward", "both"):
            found.append(measure(case, arm, direction, device, budget))
            shape = "x".join(map(str, case.shape.values()))
            written.append(output / f"{name}-{shape}-{direction}.trace.json")
            trace(case, arm, direction, device, written[-1])
    machine = describe(device)
    title = f"{name}, backend {machine['backend']}, {machine['machine']}"
    show(title, found, console)
    png = output / f"{name}.png"
    if not roofline(title, found, png):
        console.print("No roofline was drawn: matplotlib isn't installed.")
    else:
        written.append(png)
    console.print(f"written to {output}: {', '.join(path.name for path in written)}")
    return 0


def parsed(shape: str, wanted: str) -> tuple[int, ...]:
    """The sizes in ``shape``.

    Raises:
        ValueError: they aren't as many positive numbers as wanted.

    """
    parts = shape.lower().replace("×", "x").split("x")
    if len(parts) != len(wanted.split("x")) or not all(re.fullmatch(r"[1-9]\d*", part) for part in parts):
        raise ValueError(f"a shape is {wanted}, positive numbers such as {wanted.translate(_EXAMPLE)}, not {shape!r}")
    return tuple(map(int, parts))


_EXAMPLE = str.maketrans({"B": "4096", "T": "128"})


def builder(name: str, device: torch.device, layout: str, dtype: torch.dtype) -> Callable[..., Case]:
    """What makes the case of a shape, without peers."""
    if name in scans.OPERATORS:
        return lambda b, t: scans.case(name, b, t, device, layout, dtype, peers=False)
    if name == CATEGORICAL:
        return lambda b: projection.case(b, device, peers=False)
    return lambda b: losses.case(name, b, device, peers=False)


if __name__ == "__main__":
    sys.exit(main())
