"""The C51 loss against its peers: forward, backward and both."""

from functools import lru_cache

import pytest

from bench import projection
from bench.cases import DIRECTIONS

case = lru_cache(maxsize=1)(projection.case)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("arm", ["fusedrl", "operator", "torchrl", "compiled_textbook"])
@pytest.mark.parametrize("batch", projection.SUITE_BATCHES, ids="B={}".format)
def test_categorical(batch, arm, direction, time, device) -> None:
    time(case(batch, device), arm, direction)
