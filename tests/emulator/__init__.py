"""A GPU's threads on the CPU: runs the PTX that Triton compiles for sm_90, in the place of a device.

The interpreter of Triton runs a kernel as it is written. What the compiler makes of it (layouts, exchanges between
threads, accesses of 128 bits, barriers) runs here, and what a machine would leave undefined is a `Fault`: an address
outside of every tensor, or not aligned to what is accessed; an exchange that not all threads of a warp come to; a
barrier that not all warps come to; two threads that write different numbers to one address at once.

Programs run in groups of random size and in random order, and the warps of a program take turns in random order from
barrier to barrier. Not everything that a machine may do happens: a warp isn't interrupted between two barriers, and
approximate functions are exact.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from fusedrl.kernels import launching
from torch import Tensor

from bench import driver

from .code import Code
from .machine import run
from .memory import Fault, Traffic

__all__ = ["Code", "Fault", "Traffic", "counted", "install", "run"]

PROCESSORS = 4  # as in the interpreter: few, so that short rows are split as well


_traffic = Traffic()


@contextmanager
def counted() -> Iterator[Traffic]:
    """What is loaded and stored within the block."""
    global _traffic
    before, _traffic = _traffic, Traffic()
    try:
        yield _traffic
    finally:
        _traffic = before


def install() -> None:
    """From here on kernels are compiled, and their launches run here, on tensors on the CPU."""
    launched: list[driver.Launched] = []
    driver.pretend_that_there_is_a_gpu(launched.append)
    launching.processors = lambda device: PROCESSORS
    codes: dict[Any, Code] = {}
    random = np.random.default_rng(0)
    launch = launching.Launch.__call__

    def emulated(self: launching.Launch, device: int, tensors: list[Tensor], numbers: Any = ()) -> None:
        launched.clear()
        launch(self, device, tensors, numbers)
        for found in launched:
            compiled = found.compiled
            code = codes.get(compiled)
            if code is None:
                code = codes[compiled] = Code(compiled.asm["ptx"], found.shared_bytes)
            run(code, found.grid[0], found.parameters, {_memory(x) for x in tensors}, random, _traffic)

    launching.Launch.__call__ = emulated


def _memory(x: Tensor) -> tuple[int, int]:
    """Address and bytes of all the memory that the tensor is a part of."""
    storage = x.untyped_storage()
    return storage.data_ptr(), storage.nbytes()
