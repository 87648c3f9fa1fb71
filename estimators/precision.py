"""Buffers that keep their precision when the module around them is cast."""

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def dtypes_kept(*modules: nn.Module, names: Container[str] | None = None) -> Iterator[None]:
    """Inside the block the ``modules``' own buffers may be moved and cast; after it they are moved, and as precise.

    It is for an ``_apply``: 0.01 isn't a number of bfloat16, and γ^1000 in bfloat16 is another discount.

    Args:
        modules: whose buffers.
        names: of them only these.

    """
    kept = [
        (module, name, buffer)
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None and (names is None or name in names)
    ]
    yield
    for module, name, buffer in kept:
        moved: Any = module._buffers[name]
        if moved.dtype != buffer.dtype:
            module._buffers[name] = buffer.to(moved.device)


class FullPrecisionBuffers(nn.Module):
    """A module whose own buffers are moved with it but keep their dtype when it is cast.

    Such as a support that reaches further than float16 can say, or a moving average whose steps bfloat16 rounds away.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        with dtypes_kept(self):
            return super()._apply(fn, recurse)
