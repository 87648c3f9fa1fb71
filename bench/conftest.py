"""``pytest bench`` times; the repository's own test run, and any other that only passes here, doesn't."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.cases import Case, WrongResult, refuse_if_wrong
from bench.measuring import peak_bytes

Time = Callable[[Case, str, str], None]
BACKWARD_SECONDS, BACKWARD_ROUNDS = 0.5, 200  # what the rounds of backward alone may take, and how many they may be


def pytest_configure(config: pytest.Config) -> None:
    """Undo ``--benchmark-skip`` of pyproject.toml. pytest reads this early only if it was asked for this folder."""
    config.option.benchmark_skip = False


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def time(benchmark: Any, device: torch.device) -> Time:
    """Time an arm of a case in one direction, after it was checked; skip one that can't run here."""

    def timed(case: Case, arm: str, direction: str) -> None:
        if arm in case.absent:
            pytest.skip(f"{arm}: {case.absent[arm]}")
        try:
            refuse_if_wrong(case, [arm])
        except WrongResult as error:
            pytest.fail(str(error), pytrace=False)
        measured = case.arms[arm]
        benchmark.group = f"{case}, {direction}"
        benchmark.extra_info |= {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "peak_mib": peak_bytes(measured.both if direction != "forward" else measured.forward, device) / 2**20,
            "bytes_moved": case.bytes_moved["both" if direction != "forward" else "forward"],
        }
        if direction != "backward":
            benchmark(_finished(measured.run(direction), device))
            return
        # A graph is spent by its backward, so every round gets one of its own, outside of its time.
        run = _finished(measured.backward, device)
        timer = benchmark._timer
        output = measured.recorded()[0]
        start = timer()
        run(output)
        rounds = max(5, min(BACKWARD_ROUNDS, int(BACKWARD_SECONDS / max(timer() - start, 1e-9))))
        benchmark.pedantic(
            run, setup=lambda: ((measured.recorded()[0],), {}), rounds=rounds, iterations=1, warmup_rounds=2
        )

    return timed


def _finished(run: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """``run``, and on a GPU the wait for what it launched."""
    if device.type != "cuda":
        return run

    def finished(*arguments: Any) -> None:
        run(*arguments)
        torch.cuda.synchronize()

    return finished
