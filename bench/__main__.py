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

from bench import launches, losses, projection, scans, tables, updates
from bench.cases import Case, refuse_if_wrong
from bench.measuring import describe, peak_bytes, rounded, seconds, seconds_per_call, write_results

PROGRESS = Console(stderr=True)


def measure(case: Case, device: torch.device, budget: float, rounds: int = 5) -> dict[str, Any]:
    """A row of results: per arm the time forward, and forward and backward, and the peak memory of both.

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
        if device.type == "cuda":
            source = torch.empty(case.bytes_moved[direction] // 2, dtype=torch.uint8, device=device)
            runs["copy"] = partial(torch.empty_like(source).copy_, source)
        times = seconds(runs, device, budget, rounds)
        if device.type == "cuda":
            copy = times.pop("copy")
            row[f"fraction_of_copy_{direction}"] = copy / times[next(iter(case.arms))]
            for name, time in seconds_per_call(runs, budget, rounds).items():
                if name in arms:
                    arms[name][f"{direction}_call_us"] = time * 1e6
        for name, time in times.items():
            arms[name][f"{direction}_ms"] = time * 1e3
    row["arms"] = arms
    if case.name in losses.LOSSES:
        row |= operations(case.name)
    return rounded(row)


def operations(name: str) -> dict[str, Any]:
    """What a loss dispatches and would launch, without networks and distributions, and what it waits for with them."""
    found = {}
    for library in losses.LIBRARIES:
        counted = losses.operations(name, library)
        waits = losses.operations(name, library, everything=True).waits
        found[library] = {
            "operations": counted.operations.total(),
            "launches": launches.counted()[name][library],
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
    for line in absent:
        PROGRESS.print(f"not everywhere: {line}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"among {', '.join(SUITES)} (default: all)")
    parser.add_argument("--write", action="store_true", help="write the results files")
    parser.add_argument("--budget", type=float, default=0.5, help="seconds per arm and direction on a CPU")
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.suites) - set(SUITES):
        parser.error(f"there is no suite {', '.join(sorted(unknown))}; there are {', '.join(SUITES)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    every_thread = torch.get_num_threads()
    for name in chosen.suites or SUITES:
        suite = SUITES[name]
        torch.set_num_threads(suite.threads or every_thread)
        results = describe(device) | {"rows": list(rows(suite, device, chosen.budget))}
        print(f"\n{tables.of(name, results)}", flush=True)
        if chosen.write:
            write_results(results, device, f"{name}_")


if __name__ == "__main__":
    main()
