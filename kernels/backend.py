"""Which implementation runs: the choice is made per call, per block or per process, and the nearest wins.

==============  ==========================================================================================
``auto``        ``triton`` where it can run, else ``torch``
``triton``      the kernels: CUDA and ROCm tensors; any tensor under Triton's interpreter
``torch``       vectorised PyTorch, on every device
``reference``   the equations, as a plain loop over time or over atoms
``verify``      what ``auto`` picks, compared with ``reference`` in forward and backward
==============  ==========================================================================================
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

BACKENDS = ("auto", "triton", "torch", "reference", "verify")
ENVIRONMENT_VARIABLE = "FUSEDRL_BACKEND"

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
# Read once: Triton decides at import time whether its functions are interpreted.
TRITON_INTERPRETED = TRITON_INSTALLED and os.environ.get("TRITON_INTERPRET", "0").lower() in (
    "1",
    "true",
    "on",
    "yes",
)

# Read once, too: to ask the operating system takes as long as to add two small tensors.
_process_backend: str | None = os.environ.get(ENVIRONMENT_VARIABLE) or None

# Of the process, not of the thread: a plain global is what the compiler can guard on, so that a compiled function
# called in another block is compiled for that block's backend.
_block_backend: str | None = None
_blocks: list[list[str]] = []  # those that are entered, in that order, each a list that is no other


def check_backend(name: str | None, source: str = "backend") -> str | None:
    """Return ``name`` if it names a backend (or is None), else raise ValueError naming its ``source``."""
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}; the backends are {', '.join(BACKENDS)}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run all estimators and losses inside the block on backend ``name``, except where a call names its own.

    The choice is the process's: where blocks of several threads overlap, the one that was entered last counts for all.

    Raises:
        ValueError: ``name`` is not a backend.

    Examples:
        >>> with use_backend("reference"):
        ...     current_backend()
        'reference'

    """
    global _block_backend, _blocks
    check_backend(name)
    block = [name]
    _blocks = [*_blocks, block]
    _block_backend = name
    try:
        yield
    finally:
        # Perhaps not the last: another thread may have entered a block since.
        _blocks = [other for other in _blocks if other is not block]
        _block_backend = _blocks[-1][0] if _blocks else None


def current_backend() -> str:
    """The backend of this block, else that of the environment variable FUSEDRL_BACKEND, else ``"auto"``.

    The variable is read when the library is imported.

    Raises:
        ValueError: the variable doesn't name a backend.

    """
    if _block_backend is not None:
        return _block_backend
    return check_backend(_process_backend, f"environment variable {ENVIRONMENT_VARIABLE}") or "auto"


def resolve_backend(backend: str | None, tensor: Tensor) -> str:
    """The backend that runs on ``tensor``: ``triton``, ``torch``, ``reference`` or ``verify``.

    Raises:
        ValueError: ``backend`` is not a backend.
        RuntimeError: ``triton`` was asked for where it can't run.

    """
    name = check_backend(backend) or current_backend()
    if name == "auto":
        return fastest_backend(tensor)
    if name == "triton" and not triton_runs_on(tensor):
        reason = (
            f"the tensors are on {tensor.device}: move them to a CUDA or ROCm device, or set TRITON_INTERPRET=1 "
            "before fusedrl is imported"
            if TRITON_INSTALLED
            else "Triton is not installed"
        )
        raise RuntimeError(f"backend 'triton' can't run: {reason}")
    return name


def fastest_backend(tensor: Tensor) -> str:
    """What ``auto`` means for ``tensor``."""
    return "triton" if triton_runs_on(tensor) else "torch"


def triton_runs_on(tensor: Tensor) -> bool:
    """Whether the Triton kernels can run on ``tensor``."""
    # What is no tensor is told so by the checks, which come after this.
    return TRITON_INSTALLED and (TRITON_INTERPRETED or (isinstance(tensor, Tensor) and tensor.is_cuda))
