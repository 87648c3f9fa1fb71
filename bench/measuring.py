"""What the benchmarks share: taking turns with the clock, and where results are written."""

import datetime
import json
import math
import platform
import statistics
import subprocess
import timeit
from collections.abc import Callable, Iterable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import triton
from fusedrl import kernels
from torch.utils.benchmark import timer

RESULTS = Path(__file__).parent / "results"

ROW = 5e-3  # seconds of calls between two looks at the clock, for which the host waits for a GPU
SLOW = 2.0  # seconds of a call from which on there is only one
WARM_UPS = 3  # calls before a capture: they compile kernels and make an optimizer's state

Run = Callable[[], Any]


def seconds(arms: dict[str, Run], budget: float, rounds: int = 5) -> dict[str, float]:
    """Median wall seconds of a call in a row of them, a GPU's work included: what a user waits.

    Each arm has been called before. They take turns, so that a busy machine slows all of them; each gets ``budget``
    seconds in ``rounds``, or a single call if that takes more than `SLOW` seconds.
    """
    times = {arm: [timeit.timeit(run, timer=timer, number=1)] for arm, run in arms.items()}
    fast = {arm: run for arm, run in arms.items() if times[arm][0] <= SLOW}
    # The first call may have allocated, so that it tells nothing about how many make a row.
    once = {arm: min(timeit.repeat(run, timer=timer, repeat=3, number=1)) for arm, run in fast.items()}
    times |= {arm: [] for arm in fast}
    for _ in range(rounds):
        for arm, run in fast.items():
            times[arm] += _rows(run, math.ceil(ROW / once[arm]), budget / rounds)
    return {arm: statistics.median(found) for arm, found in times.items()}


def _rows(run: Run, calls: int, budget: float) -> list[float]:
    """Seconds of a call in each row of ``calls``: one row, and those that begin within ``budget`` seconds."""
    found: list[float] = []
    while not found or sum(found) * calls < budget:
        found.append(timeit.timeit(run, timer=timer, number=calls) / calls)
    return found


def device_seconds(run: Run) -> float:
    """Median seconds that a GPU takes for what ``run`` launches, its L2 cache flushed before.

    If the host launches more slowly than the GPU works, that's what is measured: see `captured`.
    """
    return triton.testing.do_bench(run, return_mode="median") / 1e3


def captured(run: Run) -> Run:
    """``run`` as one CUDA graph, whose memory is kept as long as what is returned."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph.replay


def peak_bytes(run: Run, device: torch.device) -> int:
    """The most memory that a call has allocated at once, counted from what there is before it.

    It has been called before, and what its first calls keep isn't counted.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    run()  # the profiler can't tell the size of what a call frees of the one before, unless that was like it
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
    """The machine and the versions that results were measured with, and of which state of the code they are."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "backend": kernels.resolve_backend(None, torch.empty(0, device=device)),
        "versions": {name: metadata.version(name) for name in ("torch", "triton", "torchrl") if find_spec(name)},
    }


def _commit() -> str | None:
    """The commit that is checked out; None where there is no history, as in a copy of the files."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, cwd=RESULTS, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


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
