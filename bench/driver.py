"""Launches without a GPU: Triton compiles for sm_90 and launches as it does on one, but for the driver underneath.

The driver is `driver.c`, which loads and launches nothing. Tensors lie on the CPU, and the library is told that Triton
can run there: its calls do on the host what they do on a machine with a GPU, and nobody computes their results.
"""

import ctypes
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import triton
from fusedrl.kernels import backend, launching
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.compiler.compiler import CompiledKernel

_folder = tempfile.TemporaryDirectory()  # for as long as launches are compiled
DEVICE = -1  # what a tensor on the CPU says
STREAM = 7
PROCESSORS = 132
_BYTES = {"8": 1, "16": 2, "32": 4, "64": 8}
_Note = ctypes.CFUNCTYPE(
    None, ctypes.c_uint64, ctypes.c_uint64, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint, ctypes.c_uint,
    ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip


class Launched(NamedTuple):
    """What the driver was given."""

    compiled: CompiledKernel
    stream: int
    grid: tuple[int, ...]
    threads: int
    shared_bytes: int
    parameters: tuple[bytes, ...]


def pretend_that_there_is_a_gpu(told: Callable[[Launched], Any] | None = None) -> None:
    """Give Triton the driver, and the library the belief that its kernels run on CPU tensors, for the whole process.

    Args:
        told: called with every launch.

    Raises:
        FileNotFoundError: there is no C compiler, without which Triton launches nothing either.

    """
    library = _build(_folder.name)
    os.environ["TRITON_LIBCUDA_PATH"] = _folder.name
    triton.runtime.driver.set_active(_Driver())
    if told is not None:
        _tell(library, told)
    backend.triton_runs_on = lambda tensor: True
    launching.current_device = lambda: DEVICE
    launching.current_stream = lambda device: STREAM
    launching.processors = lambda device: PROCESSORS


class _Driver(nvidia.CudaDriver):
    """Triton's own, with a device that isn't there."""

    def __init__(self) -> None:
        super().__init__()
        self.get_current_device = lambda: DEVICE
        self.get_current_stream = lambda device: STREAM
        self.set_current_device = lambda device: None

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def _build(folder: str) -> ctypes.CDLL:
    """Compile the driver into ``folder``, and load it under the name by which others will ask for it."""
    library = f"{folder}/libcuda.so.1"
    include = Path(nvidia.__file__).parent / "include"
    source = Path(__file__).with_suffix(".c")
    command = [os.environ.get("CC", "cc"), "-O2", "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{include}"]
    subprocess.run([*command, source, "-o", library], check=True)
    return ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)


def _tell(library: ctypes.CDLL, told: Callable[[Launched], Any]) -> None:
    """Call ``told`` with every launch from here on."""
    kernels: dict[int, tuple[CompiledKernel, list[int]]] = {}  # and the bytes of the parameters, by handle
    load = CompiledKernel._init_handles

    def loading(kernel: CompiledKernel) -> None:
        load(kernel)
        signature = kernel.asm["ptx"].partition(".entry")[2].partition(")")[0]
        bits = re.findall(r"\.param \.[a-z](\d+)", signature)
        kernels[kernel.function] = kernel, [_BYTES[x] for x in bits]

    def note(function: int, stream: int, grid: Any, threads: int, shared_bytes: int, parameters: Any) -> None:
        kernel, sizes = kernels[function]
        given = tuple(ctypes.string_at(parameters[i], size) for i, size in enumerate(sizes))
        told(Launched(kernel, stream, tuple(grid[:3]), threads, shared_bytes, given))

    CompiledKernel._init_handles = loading
    _tell.callback = _Note(note)  # the driver keeps its address alone
    library.note_launches(_tell.callback)
