"""Losses under `torch.nn.parallel.DistributedDataParallel` with ``find_unused_parameters=True``.

The wrapper looks in the output of a forward pass for the parameters that the backward pass will reach, and reduces
their gradients over the ranks once it has reached them all. Two things stand in the way of a loss:

* it finds the tensors in a dict, but not those in a TensorDict, and takes every parameter for unused;
* it reckons with one backward pass. Of several, one for each loss, the first doesn't reach the parameters of the
  other losses, and the next reach some parameters once more.

So a loss hands its output over as a dict that becomes a TensorDict again, and has the wrapper look anew when a
backward pass begins, from the losses that take part in it. What was reduced before isn't changed by being averaged
again, so the sum over several passes is that of one.
"""

from functools import partial
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree


class _Findable(dict[str, Any]):
    """A loss's output on its way through the wrapper.

    The wrapper flattens and unflattens it, to put all tensors through one autograd node that passes undefined
    gradients on to the losses that a backward pass leaves out. It is left no tensors to do so: to a parameter's hook
    an undefined gradient is one that is ready to be reduced.
    """


def _flatten(output: _Findable) -> tuple[list[Any], _Findable]:
    return [], output


def _unflatten(_: Any, output: Any) -> TensorDictBase:
    return TensorDict(dict(output))


pytree.register_pytree_node(_Findable, _flatten, _unflatten)


def findable(output: Any, loss: nn.Module) -> Any:
    """``output``, in a form that works if ``loss`` is being called by a wrapper that looks for parameters."""
    ddp = DistributedDataParallel._get_active_ddp_module()
    looks = ddp is not None and ddp.module is loss and ddp.find_unused_parameters and not ddp.static_graph
    if not looks or not isinstance(output, TensorDictBase):
        return output
    result = _Findable(output.items())
    terms = {name: x for name, x in result.items() if isinstance(x, Tensor) and x.grad_fn is not None}
    if terms and ddp.require_backward_grad_sync:
        # The hook is on views, so that it can hold the terms without being held by them.
        views = {name: x.view_as(x) for name, x in terms.items()}
        look_anew = partial(_look_anew, ddp.reducer, list(terms.values()))
        register_multi_grad_hook(list(views.values()), look_anew, mode="any")
        result.update(views)
    return result


def _look_anew(reducer: Any, terms: list[Any], _: Tensor) -> None:
    """Tell the reducer which of the ``terms`` take part in the backward pass that begins."""
    reducer.prepare_for_backward([x for x in terms if torch._C._will_engine_execute_node(x.grad_fn)])
