"""Losses on tiny networks against TorchRL's: forward, backward and both."""

from functools import lru_cache

import pytest

from bench import losses
from bench.cases import DIRECTIONS

case = lru_cache(maxsize=1)(losses.case)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("arm", losses.LIBRARIES)
@pytest.mark.parametrize("name", losses.LOSSES)
def test_loss(name, arm, direction, time, device) -> None:
    time(case(name, losses.BATCH, device), arm, direction)
