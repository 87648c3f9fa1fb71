"""What a profile says of one call: host, launches, waits, device, bytes."""

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench.cases import Case
from bench.counting import count
from bench.measuring import seconds

CALLS = 20  # of which times and launches on a GPU are averages
TRACED_CALLS = 3


@dataclass(frozen=True)
class Measurement:
    """One call of a case in one direction.

    ``launches`` are kernels, copies and fills on a GPU; on a CPU, which launches nothing, the operators dispatched that
    aren't views. ``device_us`` is None on a CPU: there the host's time is all there is. ``copy_us`` is the time in
    which the same number of bytes is copied (half of them read, half written).
    """

    shape: str
    direction: str
    host_us: float
    launches: float
    waits: Counter[str]
    device_us: float | None
    bytes_moved: int
    copy_us: float

    @property
    def busy_us(self) -> float:
        """The time to be held against the copy's."""
        return self.host_us if self.device_us is None else self.device_us

    @property
    def gigabytes_per_second(self) -> float:
        """What is moved at least, per second."""
        return self.bytes_moved / self.busy_us / 1e3

    @property
    def copied_gigabytes_per_second(self) -> float:
        """What a copy of as many bytes moves per second."""
        return self.bytes_moved / self.copy_us / 1e3

    @property
    def fraction_of_copy(self) -> float:
        """The bandwidth as a fraction of the copy's."""
        return self.copy_us / self.busy_us


def measure(case: Case, arm: str, direction: str, device: torch.device, budget: float) -> Measurement:
    """Measure one arm of a case, whose result was checked, in one direction."""
    run = case.arms[arm].run(direction)
    moved = case.bytes_moved[direction]
    source = torch.empty(max(1, moved // 2), dtype=torch.uint8, device=device)
    copy = partial(torch.empty_like(source).copy_, source)
    counted = count(run)
    waits = counted.waits
    if device.type == "cuda":
        waits = waits | _waits_seen_by_cuda(run)
        host = _enqueued(run)
        busy, launches = _on_device(run)
        copied, _ = _on_device(copy)
    else:
        times = seconds({"run": run, "copy": copy}, budget)
        host, copied = times["run"], times["copy"]
        busy, launches = None, counted.operations.total()
    return Measurement(
        "x".join(map(str, case.shape.values())),
        direction,
        host * 1e6,
        launches,
        waits,
        None if busy is None else busy * 1e6,
        moved,
        copied * 1e6,
    )


def trace(case: Case, arm: str, direction: str, device: torch.device, path: Path) -> None:
    """Write a Chrome trace of a few calls (chrome://tracing, or ui.perfetto.dev)."""
    run = case.arms[arm].run(direction)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        for _ in range(TRACED_CALLS):
            with record_function(f"{case}, {direction}"):
                run()
        _finish(device)
    profiler.export_chrome_trace(str(path))


def _enqueued(run: Callable[[], Any]) -> float:
    """Seconds until a call returns, while the device still works."""
    times = []
    for _ in range(CALLS):
        torch.cuda.synchronize()
        start = perf_counter()
        run()
        times.append(perf_counter() - start)
    torch.cuda.synchronize()
    return sorted(times)[CALLS // 2]


def _on_device(run: Callable[[], Any]) -> tuple[float, float]:
    """Seconds that the device works for a call, and what is launched on it."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(CALLS):
            run()
        torch.cuda.synchronize()
    events = [
        e
        for e in profiler.events()
        if e.device_type == torch.autograd.DeviceType.CUDA and not getattr(e, "is_user_annotation", False)
    ]
    return sum(e.time_range.elapsed_us() for e in events) / CALLS / 1e6, len(events) / CALLS


def _waits_seen_by_cuda(run: Callable[[], Any]) -> Counter[str]:
    """Waits that PyTorch itself notices, those that aren't operators included."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    seen = sum("synchronizing" in str(w.message) for w in caught)
    return Counter({"synchronisation": seen}) if seen else Counter()


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
