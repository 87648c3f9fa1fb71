"""Ways to run an ensemble: the same network with N sets of parameters, stacked along dimension 0.

* A multilayer perceptron is one batched matrix product for each of its layers (`Perceptron`).
* Any other network runs under `torch.vmap`, which costs the host several times what the operations of a small network
  do. Few members are therefore asked one after the other. In compiled code all are, however many: there a linear layer
  under `torch.vmap` would be good for one batch size alone. Only where members are to draw the same random numbers
  (`set_vmap_randomness`) it is `torch.vmap` always.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn

from ..estimators.calls import is_plain

MEMBERS_IN_TURN = 4
"""Up to so many members are asked one after the other outside of compiled code."""

# Functions of each element by itself, whatever dimensions there are in front, that hold no parameters.
_ELEMENTWISE = (nn.ReLU, nn.Tanh, nn.ELU, nn.SiLU, nn.GELU, nn.LeakyReLU, nn.Sigmoid, nn.Softplus, nn.Mish, nn.Identity)


class Perceptron(NamedTuple):
    """The layers of an ensemble of multilayer perceptrons."""

    in_keys: list[NestedKey]
    out_key: NestedKey
    layers: list["tuple[int, int | None] | Callable[[Tensor], Tensor]"]
    """Where an ensemble's tensors hold the weight and the bias of a linear layer; or an elementwise function."""
    network: Any
    module: nn.Module
    children: list[Any]
    """What the layers were found in, which may become another network later: see `_holds`."""

    @classmethod
    def of(cls, network: Any, params: TensorDictBase) -> "Perceptron | None":
        """``network`` as a perceptron, if it is known to be nothing else; ``params`` are those of the ensemble."""
        module = getattr(network, "module", None)
        if module is None or not (is_plain(network) and _is_sequence(module)):
            return None
        if len(network.out_keys) != 1 or (len(network.in_keys) > 1 and type(module) is nn.Sequential):
            return None
        places = {key: i for i, key in enumerate(params.keys(True, True))}
        layers: list[tuple[int, int | None] | Callable[[Tensor], Tensor]] = []
        children = module._modules  # not `named_children`, which leaves out a layer's second occurrence
        linear = [layer for layer in children.values() if type(layer) is nn.Linear]
        if len(set(linear)) < len(linear):  # one layer, of which the ensemble's tensors hold one
            return None
        for name, layer in children.items():
            weight = places.get(("module", name, "weight"))  # a parametrized one is elsewhere
            if type(layer) is nn.Linear and weight is not None:
                layers.append((weight, places.get(("module", name, "bias"))))
            elif type(layer) in _ELEMENTWISE:
                layers.append(layer)
            else:
                return None
        found = cls(list(network.in_keys), network.out_keys[0], layers, network, module, list(children.values()))
        return found if found._holds() else None

    def _holds(self) -> bool:
        """Whether a call of the network still is one of these layers, and nobody wants to be told of it.

        Layers may be exchanged, hooks and methods put in their place, at any time.
        """
        if list(self.module._modules.values()) != self.children:
            return False
        if torch.compiler.is_compiling():  # which guards what it finds in a network, and would guard this, too
            return not any(m._forward_hooks or m._forward_pre_hooks for m in (self.module, *self.children))
        for layer in (self.module, *self.children):  # without a function for each, which would take longer
            own = layer.__dict__
            if (
                own["_forward_hooks"]
                or own["_forward_pre_hooks"]
                or own["_backward_hooks"]
                or own["_backward_pre_hooks"]
                or "forward" in own
            ):
                return False
        network = self.network
        return (
            is_plain(network)
            and network.module is self.module
            and network.in_keys == self.in_keys
            and network.out_keys[0] == self.out_key
        )

    def __call__(self, data: TensorDictBase, tensors: Sequence[Tensor]) -> Tensor | None:
        """What every member says of ``data``, shape ``[N, *B, F]``.

        None if an input isn't there, or the network has become another.
        """
        if not self._holds():
            return None
        inputs = [data.get(key, None) for key in self.in_keys]
        if any(x is None for x in inputs):
            return None
        x = inputs[0] if len(inputs) == 1 else torch.cat(inputs, -1)
        members, batch = len(tensors[0]), x.shape[:-1]
        x = x.reshape(-1, x.shape[-1]).expand(members, -1, -1)
        for layer in self.layers:
            if not isinstance(layer, tuple):
                x = layer(x)
                continue
            weight, bias = layer
            transposed = tensors[weight].transpose(-1, -2)
            x = x.bmm(transposed) if bias is None else torch.baddbmm(tensors[bias].unsqueeze(1), x, transposed)
        return x if len(batch) == 1 else x.view(members, *batch, x.shape[-1])


def _is_sequence(module: nn.Module) -> bool:
    """Whether a module runs its children in turn: a plain sequence, or TorchRL's MLP, which joins its inputs first."""
    kind = type(module)
    is_mlp = kind.__name__ == "MLP" and kind.__module__.startswith("torchrl.")
    return kind is nn.Sequential or (is_mlp and not getattr(module, "_reshape_out", True))
