"""Triton's interpreter in a fraction of the time: two of its functions are replaced by others, and a check is left out.

Its associative scan visits one element after the other. Here all are visited at once, in as many rounds as their number
has bits; so are they on a device, which combines them in other groups than from the first to the last.

At every call of a function by a kernel it looks through all of Triton's language for what has yet to be made to run on
NumPy. That is the same for every call of a function.

It also repeats all arithmetic of integers in 64 bits, to see whether 32 were enough. Of the small tensors of tests they
are; what decides between the two has tests of its own.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from triton.runtime import interpreter

TRITONS = interpreter.ScanOps.generic_scan, interpreter.InterpretedFunction.__call__


def speed_up() -> None:
    """From here on, in this process."""
    interpreter.ScanOps.generic_scan = _scan
    interpreter.InterpretedFunction.__call__ = _call
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


def _scan(self: interpreter.ScanOps, arguments: Any) -> list[Any]:
    """Inclusive: in each round an element is combined with what ends a distance before it, which doubles."""
    shape = arguments[0].handle.data.shape
    place = np.arange(shape[self.axis]).reshape([-1 if axis == self.axis else 1 for axis in range(len(shape))])
    found = list(arguments)
    distance = 1
    while distance < shape[self.axis]:
        before = [self.to_tensor(np.roll(x.handle.data, distance, self.axis), x.dtype) for x in found]
        combined = self.combine_fn.fn(*before, *found)
        combined = combined if isinstance(combined, tuple) else (combined,)
        found = [
            self.to_tensor(np.where(place < distance, x.handle.data, y.handle.data), x.dtype)
            for x, y in zip(found, combined, strict=True)
        ]
        distance *= 2
    return found


_prepared: set[Callable[..., Any]] = set()


def _call(self: interpreter.InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
    """Of a function by a kernel: the language is prepared already, but for modules that this function alone sees."""
    if self.fn not in _prepared:
        _prepared.add(self.fn)
        interpreter._patch_lang(self.fn)
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as e:
        raise interpreter.InterpreterError(repr(e)) from e
