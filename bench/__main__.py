"""Measure the suites against their peers, in turns, print their tables and write their results.

    python -m bench                          all suites, on the CUDA device if there is one, otherwise on the CPU
    python -m bench losses scans --write     two of them; writes bench/results/<suite>_<cpu or the GPU's name>.json

`python -m bench.readme` makes the README's tables from the results files.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from rich.console import Console

from bench import launches, losses, options, projection, scans, tables, updates
from bench.cases import Case, refuse_if_wrong
from bench.measuring import captured, describe, device_seconds, peak_bytes, rounded, seconds, write_results

PROGRESS = Console(stderr=True)
BUDGETS = {"cuda": 0.1, "cpu": 0.5}


def measure(case: Case, device: torch.device, budget: float, rounds: int = 5) -> dict[str, Any]:
    """A row of results: per arm the wall time forward, and forward and backward, and the peak memory of both.

    On a GPU also what `on_device` finds, but for losses on tiny networks, which move next to nothing.

    Raises:
        WrongResult: an arm is wrong, and nothing is timed.
        OutOfMemoryError: our own arm takes more memory than there is; a peer that does is left out.

    """
    for name in list(case.arms):
        try:
            refuse_if_wrong(case, [name])
        except torch.OutOfMemoryError as error:
            if name == next(iter(case.arms)):
                raise
            case.absent[name] = f"out of memory at {case}: {str(error).splitlines()[0]}"
            del case.arms[name]
    row: dict[str, Any] = {"case": case.name} | case.shape | ({"layout": case.layout} if case.layout else {})
    arms: dict[str, dict[str, float]] = {
        name: {"peak_mib": peak_bytes(arm.both, device) / 2**20} for name, arm in case.arms.items()
    }
    for direction in ("forward", "both"):
        runs = {name: arm.run(direction) for name, arm in case.arms.items()}
        for name, time in seconds(runs, budget, rounds).items():
            arms[name][f"{direction}_ms"] = time * 1e3
    row["arms"] = arms
    if case.name in losses.LOSSES:
        row |= operations(case.name)
    elif device.type == "cuda":
        row |= on_device(case, "forward") | on_device(case, "both")
    return rounded(row)


def on_device(case: Case, direction: str) -> dict[str, float]:
    """The time that the GPU takes for our own arm, in a CUDA graph, and a copy's of as many bytes as a share of it.

    The copy is the faster one of two: in a graph some large copies take half as long again as outside of one.
    """
    ours = next(iter(case.arms.values()))
    time = device_seconds(captured(ours.run(direction)))
    source = torch.empty(case.bytes_moved[direction] // 2, dtype=torch.uint8, device=ours.cotangent.device)
    copying = partial(torch.empty_like(source).copy_, source)
    copy = min(device_seconds(copying), device_seconds(captured(copying)))
    torch.cuda.empty_cache()  # the graph is gone, but its memory is still set apart
    return {f"{direction}_device_us": time * 1e6, f"fraction_of_copy_{direction}": copy / time}


def operations(name: str) -> dict[str, Any]:
    """What a loss dispatches and would launch, without networks and distributions, and what it waits for with them."""
    found = {}
    for library in losses.LIBRARIES:
        counted = losses.operations(name, library)
        waits = losses.operations(name, library, everything=True).waits
        found[library] = {
            "operations": counted.operations.total(),
            "launches": launches.counted().get(name, {}).get(library),
            "waits": waits.total(),
        }
    return {"dispatched": found}


class Suite(NamedTuple):
    """Its cases on a device, the rounds in which their arms take turns, the CPU threads, and what measures a case."""

    cases: Callable[[torch.device], Iterator[Any]]
    rounds: int = 5
    threads: int | None = None
    measure: Callable[[Any, torch.device, float, int], dict[str, Any]] = measure


SUITES = {
    "scans": Suite(scans.cases),
    "projection": Suite(projection.cases),
    # Microseconds of host work, which a busy machine disturbs most; no tensor is worth a second thread.
    "losses": Suite(losses.cases, rounds=15, threads=1),
    "updates": Suite(updates.cases, threads=1, measure=updates.measure),
}


def rows(suite: Suite, device: torch.device, budget: float) -> Iterator[dict[str, Any]]:
    absent: dict[str, None] = {}
    for case in suite.cases(device):
        PROGRESS.print(f"measuring {case}", style="dim")
        yield suite.measure(case, device, budget, suite.rounds)
        absent |= {f"{arm}: {reason}": None for arm, reason in case.absent.items()}
        del case
        torch.cuda.empty_cache()  # the next case has tensors of other sizes; does nothing without a GPU
    for line in absent:
        PROGRESS.print(f"not everywhere: {line}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"among {', '.join(SUITES)} (default: all)")
    parser.add_argument("--write", action="store_true", help="write the results files")
    defaults = ", ".join(f"{x} with {device}" for device, x in BUDGETS.items())
    parser.add_argument("--budget", type=options.seconds, help=f"seconds per arm and direction (default: {defaults})")
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.suites) - set(SUITES):
        parser.error(f"there is no suite {', '.join(sorted(unknown))}; there are {', '.join(SUITES)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    budget = BUDGETS[device.type] if chosen.budget is None else chosen.budget
    every_thread = torch.get_num_threads()
    for name in chosen.suites or SUITES:
        suite = SUITES[name]
        torch.set_num_threads(suite.threads or every_thread)
        results = describe(device) | {"rows": list(rows(suite, device, budget))}
        print(f"\n{tables.of(name, results)}", flush=True)
        if chosen.write:
            write_results(results, device, f"{name}_")


if __name__ == "__main__":
    main()
