"""What a call dispatches and whether it waits for the device, counted without one."""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Operators whose result the host must have before it can go on: a value, or a size that depends on values.
_WAITING = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "item", "bincount"}
_MASKS = (torch.bool, torch.uint8)


class Dispatched(TorchDispatchMode):
    """Counts the operators that PyTorch is asked for within the block.

    The inside of this library's opaque operators (``fusedrl::``) counts too. ``views`` change only shapes and strides,
    ``waits`` are operators for which the host waits when the tensors are on a GPU, ``operations`` is everything
    else: on a GPU about as many launches, but for those that allocate only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.views: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self._hidden = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._hidden:
            if func.namespace == "fusedrl":
                return self._inside(func, args, kwargs)
            if func.namespace != "profiler" and _is_about_tensors(func):
                self._count(func, args, kwargs)
        return func(*args, **kwargs)

    def _inside(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call the implementation behind ``func`` with this mode on, past the point where it would come here again."""
        device = next((x.device.type for x in _tensors(args)), "cpu")
        key = torch._C.DispatchKey.CUDA if device == "cuda" else torch._C.DispatchKey.CPU
        with self:
            return func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)

    def _count(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        name = func.overloadpacket.__name__
        if _is_view(func):
            self.views[name] += 1
            return
        self.operations[name] += 1
        if name in _WAITING or name.startswith(("unique", "_unique", "nonzero")):
            self.waits[name] += 1
        elif name.startswith(("index", "_index")) and any(x.dtype in _MASKS for x in _tensors(args[1:2])):
            self.waits[f"{name} with a mask"] += 1
        elif name in ("_to_copy", "copy_") and _leaves_the_device(name, args, kwargs):
            self.waits[f"{name} to the host"] += 1

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Within the block nothing is counted."""
        self._hidden += 1
        try:
            yield
        finally:
            self._hidden -= 1


def count(
    run: Callable[[], Any], hide: Iterable[tuple[Any, str]] = (), kernels: Iterable[tuple[Any, str]] = ()
) -> Dispatched:
    """What one call of ``run`` dispatches, but for what happens inside the functions to hide.

    Args:
        run: called twice, and counted the second time: what is set up once isn't the call's.
        hide: pairs of an owner (a class or a module) and the name of a function or property of its own.
        kernels: likewise, functions that count as one operation each, whatever happens inside of them.

    """
    run()
    counter = Dispatched()

    def hiding(member: Any) -> Any:
        if isinstance(member, property):
            return property(hiding(member.fget))

        @functools.wraps(member)
        def hidden(*args: Any, **kwargs: Any) -> Any:
            with counter.hidden():
                return member(*args, **kwargs)

        return hidden

    def launching(member: Any) -> Any:
        @functools.wraps(member)
        def launched(*args: Any, **kwargs: Any) -> Any:
            if not counter._hidden:
                counter.operations["kernel"] += 1
            with counter.hidden():
                return member(*args, **kwargs)

        return launched

    with ExitStack() as patches:
        for owner, name in hide:
            patches.enter_context(mock.patch.object(owner, name, hiding(vars(owner)[name])))
        for owner, name in kernels:
            patches.enter_context(mock.patch.object(owner, name, launching(vars(owner)[name])))
        with counter:
            run()
    return counter


def _is_about_tensors(func: Any) -> bool:
    """Whether tensors go in or come out; `promote_types`, for one, is about dtypes."""
    schema = func._schema
    return any("Tensor" in str(x.type) for x in (*schema.arguments, *schema.returns))


def _is_view(func: Any) -> bool:
    """Whether the result shares memory with an argument that isn't written; `_unsafe_view` doesn't say so."""
    returns = func._schema.returns
    shares = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return shares or func.overloadpacket.__name__ == "_unsafe_view"


def _tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    for x in arguments:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, list | tuple):
            yield from _tensors(x)


def _leaves_the_device(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a copy goes from a device to the host, which waits for it unless told not to."""
    target, source = (args[0], args[1]) if name == "copy_" else (kwargs.get("device"), args[0])
    device = target.device if isinstance(target, Tensor) else torch.device(target or source.device)
    return source.device.type != "cpu" and device.type == "cpu" and not kwargs.get("non_blocking", False)
