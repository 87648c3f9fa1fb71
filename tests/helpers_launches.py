"""What is launched, and launches that are planned with other constants than the library's."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
from fusedrl.kernels.launching import Launch, Launcher


def launched(patch: pytest.MonkeyPatch, *, run: bool = True) -> list[tuple[str, int]]:
    """The kernel and the number of programs of each launch from here on; without ``run`` nothing is launched."""
    seen: list[tuple[str, int]] = []
    launch = Launch.__call__

    def note(self: Launch, *arguments: Any) -> None:
        seen.append((self._kernel.__name__, self._grid))
        if run:
            launch(self, *arguments)

    patch.setattr(Launch, "__call__", note)
    return seen


@contextmanager
def planned_with(module: ModuleType, **constants: Any) -> Iterator[None]:
    """Within the block launches are planned with other ``constants`` of a module."""
    with pytest.MonkeyPatch.context() as patch:
        plan_with(patch, module, **constants)
        yield
    Launcher.forget()


def plan_with(patch: pytest.MonkeyPatch, module: ModuleType, **constants: Any) -> None:
    """Plan launches with other ``constants`` of a module; `conftest` forgets the plans after the test."""
    for name, value in constants.items():
        patch.setattr(module, name, value)
    Launcher.forget()
