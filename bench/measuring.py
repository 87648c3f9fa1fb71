"""What the benchmarks share: taking turns with the clock, and where results are written."""

import json
import math
import platform
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torchrl
import triton
from fusedrl import kernels
from torch.utils.benchmark import Timer

RESULTS = Path(__file__).parent / "results"

Run = Callable[[], Any]


def seconds(arms: dict[str, Run], device: torch.device, budget: float, rounds: int = 5) -> dict[str, float]:
    """Median seconds of each arm, on a CPU those of a call, on a GPU those that the device takes.

    On a CPU the arms take turns, so that a busy machine slows all of them; each gets ``budget`` seconds in ``rounds``.
    """
    if device.type == "cuda":
        return {arm: triton.testing.do_bench(run, return_mode="median") / 1e3 for arm, run in arms.items()}
    return seconds_per_call(arms, budget, rounds)


def seconds_per_call(arms: dict[str, Run], budget: float, rounds: int = 5) -> dict[str, float]:
    """Median wall seconds of a call in a row of them, the device's work included; the arms take turns."""
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(rounds):
        for arm, run in arms.items():
            timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
            times[arm].append(timer.blocked_autorange(min_run_time=budget / rounds).median)
    return {arm: statistics.median(found) for arm, found in times.items()}


def peak_bytes(run: Run, device: torch.device) -> int:
    """The most memory that a call has allocated at once, counted from what there is before it."""
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    held = peak = 0
    for event in events:
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def describe(device: torch.device) -> dict[str, Any]:
    """The machine and the versions that results were measured with."""
    return {
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "backend": kernels.resolve_backend(None, torch.empty(0, device=device)),
        "versions": {m.__name__: m.__version__ for m in (torch, triton, torchrl)},
    }


def rounded(x: Any) -> Any:
    """A row whose floats have four decimals, those in its dictionaries too."""
    if isinstance(x, dict):
        return {k: rounded(value) for k, value in x.items()}
    return round(x, 4) if isinstance(x, float) else x


def write_results(results: dict[str, Any], device: torch.device, prefix: str = "") -> Path:
    """Write ``<prefix>cpu.json``, or the GPU's name for cpu, with a line for each of the ``rows``."""
    name = "cpu" if device.type == "cpu" else results["machine"].lower().replace(" ", "_")
    path = RESULTS / f"{prefix}{name}.json"
    rows = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in results["rows"])
    head = json.dumps({k: x for k, x in results.items() if k != "rows"}, ensure_ascii=False)
    path.write_text(f'{head[:-1]}, "rows": [\n{rows}\n]}}\n')
    print(f"wrote {path}")
    return path


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(x) for x in values]
    return math.exp(sum(logs) / len(logs))
