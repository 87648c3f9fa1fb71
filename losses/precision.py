"""Buffers that keep their precision."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class FullPrecisionBuffers(nn.Module):
    """A module whose own buffers are moved with it but keep their dtype when it is cast.

    Such as a support that reaches further than float16 can say, or a moving average whose steps bfloat16 rounds away.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            self._buffers[name] = buffer.to(getattr(self, name).device)
        return self
