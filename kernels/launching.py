"""Launches of a compiled kernel without Triton's dispatch, which takes several times as long as the launch itself.

Triton's dispatch looks at every argument of every call, to find the binary that was compiled for such arguments. A
`Launch` is for arguments of one kind, so that there is nothing left to find but whether 16 divides the addresses.
"""

from collections.abc import Iterable, Sequence
from functools import reduce
from operator import or_
from typing import Any

import torch
import triton
from torch import Tensor

# What stands for the arguments that each call brings along.
ADDRESS = object()
NUMBER = object()

# What a compiled kernel's launcher takes was read from these versions. With any other, Triton dispatches.
_is_known = triton.__version__.split(".")[:2] in (["3", "6"], ["3", "7"])

current_device: Any = getattr(torch._C, "_cuda_getDevice", None)  # absent where PyTorch is without CUDA
current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)


class Launch:
    """A kernel, its grid and its arguments, but for the tensors and numbers, of which each call brings others.

    Args:
        kernel: a function under ``triton.jit``.
        grid: the number of programs.
        arguments: the kernel's positional arguments, with ``ADDRESS`` for a tensor, ``(ADDRESS, *strides)`` for a
            tensor with integers that are fixed, and ``NUMBER`` for a floating-point number. All others are fixed.
        constants: the kernel's other arguments and Triton's options. They are fixed.

    The tensors of all calls must have the dtypes of those of the first, and be on its device. Triton decides what is
    launched in the first call, in the interpreter, on ROCm (where the size of a tensor's storage counts too), with
    hooks on launches, and in a version of Triton that this module doesn't know.
    """

    def __init__(self, kernel: Any, grid: int, arguments: Iterable[Any], **constants: Any) -> None:
        arguments = list(arguments)
        self._kernel = kernel
        self._grid = grid
        self._positional = len(arguments)
        self._options = constants
        # All that the launcher takes: the kernel's constants, too, where Triton compiles it.
        self._arguments = [*arguments, *(constants[name] for name in kernel.arg_names[len(arguments) :])]
        self._tensors: list[tuple[int, tuple[int, ...] | None]] = []  # where, and the integers with it if it has any
        self._numbers: list[int] = []
        for i, x in enumerate(arguments):
            if x is NUMBER:
                self._numbers.append(i)
            elif x is ADDRESS:
                self._tensors.append((i, None))
            elif isinstance(x, tuple) and x[0] is ADDRESS:
                self._tensors.append((i, x[1:]))
        self._compiled: dict[Any, tuple[Any, Any, Any]] = {}  # by the alignment of addresses, None if 16 divides all

    def __call__(self, device: int, tensors: Sequence[Tensor], numbers: Sequence[float] = ()) -> None:
        """Launch on ``device``, with tensors and numbers in the order of the arguments that they are."""
        addresses = list(map(Tensor.data_ptr, tensors))
        alignment = None
        if reduce(or_, addresses) & 15:
            alignment = tuple([address & 15 == 0 for address in addresses])
        compiled = self._compiled.get(alignment)
        if compiled is None or device != current_device() or _hooks() or self._kernel.pre_run_hooks:
            self._dispatch(device, tensors, numbers, alignment)
            return
        arguments = self._arguments.copy()
        for (i, integers), address in zip(self._tensors, addresses, strict=True):
            arguments[i] = address if integers is None else (address, *integers) if integers else (address,)
        for i, x in zip(self._numbers, numbers, strict=True):
            arguments[i] = x
        run, function, metadata = compiled
        # Grid, stream, binary, and the metadata and functions of hooks, of which there are none.
        run(self._grid, 1, 1, current_stream(device), function, metadata, None, None, None, *arguments)

    def _dispatch(self, device: int, tensors: Sequence[Tensor], numbers: Sequence[float], alignment: Any) -> None:
        """Leave the launch to Triton, and keep what it launched if it can be launched again."""
        arguments = self._arguments[: self._positional]
        for (i, integers), x in zip(self._tensors, tensors, strict=True):
            arguments[i] = x if integers is None else (x, *integers)
        for i, number in zip(self._numbers, numbers, strict=True):
            arguments[i] = number
        with torch.cuda.device(device):  # nothing on a CPU, whose tensors are on device −1
            compiled = self._kernel[self._grid,](*arguments, **self._options)
        if _is_known and compiled is not None and compiled.metadata.target.backend == "cuda":
            self._compiled[alignment] = compiled.run, compiled.function, compiled.packed_metadata


_launches: dict[tuple[Any, ...], Launch] = {}
_MOST_LAUNCHES = 4096


def launch(kernel: Any, grid: int, *arguments: Any, **constants: Any) -> None:
    """``kernel[grid,](*arguments, **constants)``, by a `Launch` that is kept for arguments of this form.

    Tensors, alone or in tuples (tensor, *integers), and numbers of type float may be others in the next call.
    """
    tensors: list[Tensor] = []
    numbers: list[float] = []
    form: list[Any] = []
    for x in arguments:
        if type(x) is tuple and isinstance(x[0], Tensor):
            tensors.append(x[0])
            form.append((x[0].dtype, *x[1:]))
        elif isinstance(x, Tensor):
            tensors.append(x)
            form.append(x.dtype)
        elif type(x) is float:
            numbers.append(x)
            form.append(NUMBER)
        else:
            form.append(x)
    device = tensors[0].get_device()
    key = (id(kernel), grid, device, *form, *constants.items())
    known = _launches.get(key)
    if known is None:
        if len(_launches) >= _MOST_LAUNCHES:
            _launches.clear()
        known = _launches[key] = Launch(kernel, grid, map(_fixed, arguments), **constants)
    known(device, tensors, numbers)


def _fixed(x: Any) -> Any:
    """An argument with ADDRESS and NUMBER for what isn't fixed."""
    if isinstance(x, Tensor):
        return ADDRESS
    if type(x) is tuple:
        return tuple(map(_fixed, x))
    return NUMBER if type(x) is float else x


def _hooks() -> bool:
    """Whether anyone asked Triton to be told of launches, such as a profiler."""
    enter, leave = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
