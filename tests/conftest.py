"""Where the tests run: on the CUDA device if there is one, otherwise the Triton kernels run in the interpreter.

With ``FUSEDRL_EMULATE=1`` in the environment the kernels are compiled for a GPU, and an emulator runs that code.
"""

import importlib.util
import os
import sys
from collections.abc import Iterator

import pytest
import torch

EMULATED = os.environ.get("FUSEDRL_EMULATE", "0") != "0"
CUDA = not EMULATED and torch.cuda.is_available()  # which would load the driver of a device
if EMULATED:
    os.environ.setdefault("FUSEDRL_BACKEND", "triton")
    importlib.import_module("emulator").install()
elif not CUDA:
    # Before fusedrl imports Triton. With the interpreter on, `auto` would mean the (slow) interpreted kernels
    # everywhere, so the tests that don't name a backend get the one that `auto` means on a CPU.
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("FUSEDRL_BACKEND", "torch")
    if importlib.util.find_spec("triton"):
        importlib.import_module("helpers_interpreter").speed_up()
# The compiler turns this off for the process when it is first used, and can't trace distributions where it is on: a
# test that put back what it found would decide for those that follow.
torch.distributions.Distribution.set_default_validate_args(False)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if CUDA else "cpu")


@pytest.fixture(autouse=True)
def plans_are_forgotten() -> Iterator[None]:
    """Launches that a test had planned with constants of its own are planned anew in the next."""
    yield
    launching = sys.modules.get("fusedrl.kernels.launching")  # not without Triton, nor before its first launch
    if launching is not None:
        launching.Launcher.forget()


@pytest.fixture(params=["triton"] if EMULATED else ["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each fast backend in turn."""
    return request.param
