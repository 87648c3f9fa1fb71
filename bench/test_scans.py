"""Scans against their peers: forward, backward and both."""

from functools import lru_cache

import pytest

from bench import scans
from bench.cases import DIRECTIONS

ARMS = ("fusedrl", "torchrl", "compiled_loop", "accelerated_scan_scalar", "accelerated_scan_warp")
case = lru_cache(maxsize=1)(scans.case)  # built, compiled and checked once for the arms and directions of a shape


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("layout", scans.LAYOUTS, ids=["batch-major", "time-major"])
@pytest.mark.parametrize("shape", scans.SUITE_GRID, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("name", scans.OPERATORS)
def test_scan(name, shape, layout, arm, direction, time, device) -> None:
    if arm.startswith("accelerated") and name != "reverse_scan":
        pytest.skip("accelerated-scan solves the bare recurrence only")
    time(case(name, *shape, device, layout), arm, direction)
