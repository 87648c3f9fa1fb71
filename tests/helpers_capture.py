"""What keeps work out of a CUDA graph, found without a CUDA device; and, where there is one, capture itself."""

from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from fusedrl import losses
from helpers_q import NoHostSync
from torch import Tensor
from torch.utils._pytree import tree_leaves

WARM_UPS = 3

# Their CUDA implementations read on the host whether probabilities, or standard deviations in a tensor, are valid.
_CHECKED_ON_THE_HOST = (torch.ops.aten.multinomial.default, torch.ops.aten.normal.Tensor_Tensor,
                        torch.ops.aten.normal.float_Tensor)  # fmt: skip


class Capturable(NoHostSync):
    """Refuses what can't be captured with all tensors on ``device``.

    That is, besides what waits for the device: every tensor that is on another device, since it is copied sooner or
    later and the host's memory isn't pinned, or is a number that the graph never reads again; and every tensor made of
    Python numbers, which is such a copy (``torch.tensor(2.0)``, ``torch.as_tensor``, an index that is a list).
    ``torch.full`` and its like write on the device, and so does a number that is put where a mask says.

    The device ``meta`` stands for one that isn't the host; but to make its tensors of numbers copies nothing, and
    doesn't show. That takes the device ``cpu``.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.of_numbers: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.lift_fresh.default:
            self.of_numbers.append(func(*args))
            return self.of_numbers[-1]
        for x in tree_leaves((args[:2] if _fills_where_a_mask_says(func, args) else args, kwargs)):
            if any(x is made for made in self.of_numbers):
                raise AssertionError(f"{func} reads a tensor made of Python numbers: that is a copy from the host")
        if func in _CHECKED_ON_THE_HOST:
            raise AssertionError(f"{func} waits for the device on CUDA")
        self._refuse_others(func, (args, kwargs))
        if func.namespace == "fusedrl":  # what stands behind the library's operators is one function on all devices
            with self:
                out = func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **(kwargs or {}))
        elif func._can_decompose():  # in there, an operator that is made of others arrives whole
            with self:
                out = func.decompose(*args, **(kwargs or {}))
        else:
            out = super().__torch_dispatch__(func, types, args, kwargs)
        self._refuse_others(func, out)
        return out

    def _refuse_others(self, func: Any, tensors: Any) -> None:
        for x in tree_leaves(tensors):
            if isinstance(x, Tensor) and x.device.type != self.device:
                raise AssertionError(f"{func} meets a tensor of shape {tuple(x.shape)} on {x.device}")


def _fills_where_a_mask_says(func: Any, args: Any) -> bool:
    if func is not torch.ops.aten.index_put_.default or args[2].numel() != 1:
        return False
    return all(index is None or index.dtype == torch.bool for index in args[1])


@contextmanager
def networks_on(device):
    """Networks that are made inside are on ``device``; what a loss makes by itself is where the loss puts it."""
    metaclass = type(losses.LossModule)
    make = metaclass.__call__

    def without_help(cls, *args, **kwargs):
        with torch.device("cpu"):
            return make(cls, *args, **kwargs)

    with mock.patch.object(metaclass, "__call__", without_help), torch.device(device):
        yield


def not_on(device, module):
    """The names of the parameters and buffers of ``module`` that are elsewhere."""
    named = (*module.named_parameters(), *module.named_buffers())
    return {name for name, x in named if x.device.type != torch.device(device).type}


def moved(data, device):
    """``data`` on ``device``, of tensors that can be changed in place; those that required grad do."""
    return data.apply(lambda x: x.detach().to(device, copy=True).requires_grad_(x.requires_grad))


def put(data, into):
    """Change the tensors ``into`` in place to the values of ``data``."""
    with torch.no_grad():
        for key, x in into.items(True, True):
            x.copy_(data.get(key))


def tensors_of(module):
    """Parameters and buffers, by name."""
    return dict((*module.named_parameters(), *module.named_buffers()))


class Graph(NamedTuple):
    """A captured function: ``replay`` computes ``outputs`` anew, in the same memory."""

    replay: Any
    outputs: Any


def capture(function) -> Graph:
    """``function`` as a CUDA graph, after WARM_UPS ordinary calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        outputs = function()
    return Graph(graph.replay, outputs)
