"""Launches of a compiled kernel without Triton's dispatch, which takes several times as long as the launch itself.

Triton's dispatch looks at every argument of every call, to find the binary that was compiled for such arguments. A
`Launch` is for arguments of one form, so that there is nothing left to find but whether 16 divides the addresses. A
`Launcher` plans the launches of an operation for each form of its arguments that it meets, and keeps the plans.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import cache, reduce
from operator import or_
from typing import Any, ClassVar, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .recognition import Recognition, items

# What a compiled kernel's launcher takes was read from these versions. With any other, Triton dispatches.
_is_known = triton.__version__.split(".")[:2] in (["3", "6"], ["3", "7"], ["3", "8"], ["3", "9"])

# A product and a sum are one instruction: Triton's default up to 3.9, which warns that it won't be in 3.10.
OPTIONS = {"enable_fp_fusion": True}

current_device: Any = getattr(torch._C, "_cuda_getDevice", None)  # absent where PyTorch is without CUDA
current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)


class Number:
    """Stands for a floating-point number among a launch's arguments, of which each call brings another."""


class Launch:
    """A kernel, its grid and its arguments, but for the tensors and numbers, of which each call brings others.

    Args:
        kernel: a function under ``triton.jit``.
        grid: the number of programs.
        arguments: the kernel's positional arguments, with a `Workspace` or any tensor of the right dtype where there is
            a tensor, ``(tensor, *strides)`` for one with integers that are fixed, and a `Number` for a number. All
            others are fixed.
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
        self._options = OPTIONS | constants
        # All that the launcher takes: the kernel's constants, too, where Triton compiles it.
        self._arguments = [*arguments, *(constants[name] for name in kernel.arg_names[len(arguments) :])]
        self._tensors: list[int] = []
        self._integers: list[tuple[int, ...] | None] = []  # those of each tensor, if it is in a tuple
        self._numbers: list[int] = []
        self.taken: list[Any] = []  # what stands for the tensors, and then the numbers, of a call
        for i, x in enumerate(arguments):
            first = x[0] if isinstance(x, tuple) else x
            if isinstance(first, (Tensor, Workspace)):
                self._tensors.append(i)
                self._integers.append(x[1:] if isinstance(x, tuple) else None)
                self._arguments[i] = None  # not to keep the tensor
                self.taken.append(first)
        for i, x in enumerate(arguments):
            if isinstance(x, Number):
                self._numbers.append(i)
                self.taken.append(x)
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
        for i, integers, address in zip(self._tensors, self._integers, addresses, strict=True):
            arguments[i] = address if integers is None else (address,) + integers  # noqa: RUF005  # * takes longer
        for i, x in zip(self._numbers, numbers, strict=True):
            arguments[i] = x
        run, function, metadata = compiled
        # Grid, stream, binary, and the metadata and functions of hooks, of which there are none.
        run(self._grid, 1, 1, current_stream(device), function, metadata, None, None, None, *arguments)

    def _dispatch(self, device: int, tensors: Sequence[Tensor], numbers: Sequence[float], alignment: Any) -> None:
        """Leave the launch to Triton, and keep what it launched if it can be launched again."""
        arguments = self._arguments[: self._positional]
        for i, integers, x in zip(self._tensors, self._integers, tensors, strict=True):
            arguments[i] = x if integers is None else (x, *integers)
        for i, number in zip(self._numbers, numbers, strict=True):
            arguments[i] = number
        with torch.cuda.device(device):  # nothing on a CPU, whose tensors are on device −1
            compiled = self._kernel[self._grid,](*arguments, **self._options)
        if _is_known and compiled is not None and compiled.metadata.target.backend == "cuda":
            self._compiled[alignment] = compiled.run, compiled.function, compiled.packed_metadata


class Workspace:
    """Memory that the launches of one call share: zeros if they read it before they write it."""

    def __init__(self, elements: int, dtype: torch.dtype, *, zeros: bool = False) -> None:
        self._elements = elements
        self._dtype = dtype
        self._zeros = zeros

    def new(self, like: Tensor) -> Tensor:
        """The memory, on the device of ``like``."""
        return (like.new_zeros if self._zeros else like.new_empty)(self._elements, dtype=self._dtype)


class Plan(NamedTuple):
    """Launches, one after the other, and the workspaces that they take after the call's own tensors."""

    launches: Sequence[Launch]
    workspaces: Sequence[Workspace] = ()


class Launcher:
    """Plans the launches for arguments of one form, once, and makes them again for all others of that form.

    Args:
        plan: ``plan(settings, *arguments)`` gives the `Plan`, or None if there is none for arguments of this form. It
            may ask a tensor for all but what it holds; where the call has a number it gets a `Number`. Each launch
            must take all tensors and numbers, in the call's order.

    """

    _all: ClassVar[list["Launcher"]] = []

    def __init__(self, plan: Callable[..., Plan | None]) -> None:
        self._plan = plan
        self._recent = Recognition()  # found at once, but of the latest forms alone
        self._plans: dict[Hashable, Plan | None] = {}  # by form
        self._all.append(self)

    def __call__(self, settings: Hashable, *arguments: Any) -> bool:
        """Launch on ``arguments``, each a tensor, a float or None; False if there is no plan for their form.

        Raises:
            TypeError: an argument is something else.

        """
        tensors, found = self._recent(settings, arguments)
        plan, device, numbers = found or self._find(settings, arguments)
        if plan is None:
            return False
        launches, workspaces = plan
        if workspaces:
            tensors += tuple([x.new(tensors[0]) for x in workspaces])
        given = numbers(arguments)
        for launch in launches:
            launch(device, tensors, given)
        return True

    def _find(self, settings: Hashable, arguments: Sequence[Any]) -> tuple[Plan | None, int, Callable[..., Any]]:
        """The plan for arguments of this form, made now if there is none; the device; and what picks the numbers.

        Raises:
            TypeError: an argument is neither a tensor nor a float nor None.

        """
        for x in arguments:
            if not (x is None or type(x) is float or isinstance(x, Tensor)):
                raise TypeError(f"a launch takes tensors, floats and None, but got {type(x).__name__}")
        forms = [(x.dtype, x.shape, x.stride()) if isinstance(x, Tensor) else type(x) for x in arguments]
        device = next(x for x in arguments if isinstance(x, Tensor)).get_device()
        form = settings, device, *forms
        plan = self._plans.get(form, _UNKNOWN)
        if plan is _UNKNOWN:
            plan = self._new_plan(settings, arguments)
            if len(self._plans) >= _MOST_PLANS:
                self._forget()
            self._plans[form] = plan
        numbers = items([i for i, x in enumerate(arguments) if type(x) is float])
        found = plan, device, numbers
        self._recent.remember(settings, arguments, found)
        return found

    def _new_plan(self, settings: Hashable, arguments: Sequence[Any]) -> Plan | None:
        """Make the plan for arguments of a form.

        Raises:
            RuntimeError: the launches don't take what the call brings.

        """
        # A tensor of its own for each argument, even for one that is passed twice.
        standing = [None if x is None else Number() if type(x) is float else x.detach() for x in arguments]
        plan = self._plan(settings, *standing)
        if plan is not None:
            given: list[Any] = [x for x in standing if isinstance(x, Tensor)]
            given += [*plan.workspaces, *(x for x in standing if isinstance(x, Number))]
            for launch in plan.launches:
                if list(map(id, launch.taken)) != list(map(id, given)):
                    raise RuntimeError(f"the launches planned by {self._plan.__name__} don't take what the call brings")
                launch.taken.clear()
        return plan

    @classmethod
    def forget(cls) -> None:
        """Plan anew from here on: something changed that plans are made from."""
        for launcher in cls._all:
            launcher._forget()

    def _forget(self) -> None:
        self._recent = Recognition()
        self._plans.clear()


_UNKNOWN: Any = object()
_MOST_PLANS = 4096


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the device; under the interpreter few, so that short rows are split as well."""
    if device.type == "cpu":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}


def strided(x: Tensor | None) -> tuple[Any, ...] | None:
    """A tensor with its strides, as kernels take it."""
    return None if x is None else (x, *x.stride())


def scalar(x: float | Tensor | None, like: Tensor) -> float | Tensor | None:
    """A scalar as a `Launcher` takes it; a tensor of 0 dimensions may be on another device than ``like``."""
    if x is None or type(x) is float:
        return x
    if isinstance(x, Tensor):
        return x if x.device == like.device else x.to(like.device, non_blocking=True)
    return float(x)


def scalar_arguments(x: Any, *strides: int) -> tuple[Any, Any]:
    """The two arguments that a kernel has for a scalar, of which one counts; a tensor with ``strides`` if given."""
    if isinstance(x, Tensor):
        return 0.0, (x, *strides) if strides else x
    return 0.0 if x is None else x, None


_runtime = triton.knobs.runtime


def _hooks() -> bool:
    """Whether anyone asked Triton to be told of launches, such as a profiler."""
    enter, leave = _runtime.launch_enter_hook, _runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
