"""Ensembles of perceptrons as batched products: the numbers of the members, one by one; and which networks they are."""

import copy

import pytest
import torch
from fusedrl.losses.ensemble import Perceptron
from fusedrl.losses.parameters import parts_of, stacked
from helpers_q import CLOSE
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

DOUBLE = {"dtype": torch.float64}


def layers(bias=True):
    return nn.Linear(4, 6, bias=bias, **DOUBLE), nn.Tanh(), nn.Linear(6, 2, **DOUBLE), nn.ReLU()


def module(network, reads=("observation",)):
    return TensorDictModule(network, list(reads), ["value"])


def mlp():
    modules = pytest.importorskip("torchrl.modules")
    network = modules.MLP(in_features=7, out_features=1, num_cells=[5, 3]).double()
    return module(network, ("observation", "action"))


def with_one_activation():
    first, activation, second, _ = layers()
    return module(nn.Sequential(first, activation, second, activation))


NETWORKS = {
    "one_activation_twice": with_one_activation,
    "sequence": lambda: module(nn.Sequential(*layers())),
    "without_bias": lambda: module(nn.Sequential(*layers(bias=False))),
    "mlp_of_two_inputs": mlp,
}


def parameters_of(members):
    return stacked([TensorDict.from_module(member, as_module=True) for member in members], set())


def members_of(make, size=3):
    torch.manual_seed(0)
    members = [make() for _ in range(size)]
    return members, parameters_of(members)


@pytest.mark.parametrize("batch", [(), (5,), (3, 2), (0,)], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_perceptron_gives_the_values_and_the_gradients_of_its_members(name, batch):
    members, params = members_of(NETWORKS[name])
    width = 3 if name == "mlp_of_two_inputs" else 4
    data = TensorDict({"observation": torch.randn(*batch, width, **DOUBLE), "action": torch.randn(*batch, 4, **DOUBLE)})
    data["observation"].requires_grad_()
    perceptron = Perceptron.of(members[0], params)
    found = perceptron(data, parts_of(params, set()))
    expected = torch.stack([member(data.copy())["value"] for member in members])
    torch.testing.assert_close(found, expected, **CLOSE)
    weight = torch.randn_like(expected)
    leaves = [x for x in parts_of(params, set()) if x.requires_grad]
    of_params = torch.autograd.grad((found * weight).sum(), [data["observation"], *leaves])
    each = torch.autograd.grad(
        (expected * weight).sum(), [data["observation"], *(p for member in members for p in member.parameters())]
    )
    torch.testing.assert_close(of_params[0], each[0], **CLOSE)
    by_member = [each[1 + i :: len(leaves)] for i in range(len(leaves))]
    for gradient, parts in zip(of_params[1:], by_member, strict=True):
        torch.testing.assert_close(gradient, torch.stack(parts), **CLOSE)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Own(TensorDictModule):
    def forward(self, tensordict):
        return super().forward(tensordict)


def hooked():
    network = module(nn.Sequential(*layers()))
    network.module[0].register_forward_hook(lambda *_: None)
    return network


def with_one_linear():
    layer = nn.Linear(4, 4)
    return module(nn.Sequential(layer, nn.Tanh(), layer))


def with_a_fixed_weight():
    layer = nn.Linear(4, 2)
    del layer.weight
    layer.weight = torch.ones(2, 4)
    return module(nn.Sequential(layer))


def with_an_unflattened_output():
    modules = pytest.importorskip("torchrl.modules")
    return module(modules.MLP(in_features=4, out_features=(2, 3), num_cells=[5]))


OTHERS = {
    "fixed_weight": with_a_fixed_weight,
    "unflattened_output": with_an_unflattened_output,
    "one_linear_twice": with_one_linear,
    "own_linear": lambda: module(nn.Sequential(Doubled(4, 2))),
    "dropout": lambda: module(nn.Sequential(nn.Linear(4, 2), nn.Dropout())),
    "mixes_elements": lambda: module(nn.Sequential(nn.Linear(4, 2), nn.LayerNorm(2))),
    "nested": lambda: module(nn.Sequential(nn.Sequential(*layers()))),
    "own_forward": lambda: Own(nn.Sequential(*layers()), ["observation"], ["value"]),
    "hooked": hooked,
    "sequence_of_two_inputs": lambda: module(nn.Sequential(nn.Linear(4, 2)), ("observation", "action")),
    "not_a_sequence": lambda: module(nn.Linear(4, 2)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_network_is_not_taken_for_a_perceptron(name):
    network = OTHERS[name]()
    assert Perceptron.of(network, parameters_of([network, copy.deepcopy(network)])) is None


def add_hook(network):
    network.module[1].register_forward_hook(lambda *_: None)


def add_layer(network):
    network.module.append(nn.Tanh())


def add_backward_hook(network):
    network.module[0].register_full_backward_hook(lambda *_: None)


def patch_layer(network):
    network.module[0].forward = lambda x: x


def patch_network(network):
    network.forward = lambda data: data


def watch_network(network):
    network.register_forward_hook(lambda *_: None)


def exchange_module(network):
    network.module = nn.Sequential(*layers())


def read_another_entry(network):
    network.in_keys = ["state"]


def exchange_layer(network):
    network.module[1] = nn.Sigmoid()


def add_pre_hook(network):
    network.module[0].register_forward_pre_hook(lambda *_: None)


def add_backward_pre_hook(network):
    network.module[0].register_full_backward_pre_hook(lambda *_: None)


def write_another_entry(network):
    network.out_keys = ["other"]


CHANGES = [
    add_hook,
    add_pre_hook,
    add_backward_pre_hook,
    write_another_entry,
    add_layer,
    exchange_layer,
    add_backward_hook,
    patch_layer,
    patch_network,
    watch_network,
    exchange_module,
    read_another_entry,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_network_that_became_another_is_asked_itself(change):
    members, params = members_of(NETWORKS["sequence"])
    perceptron, data = Perceptron.of(members[0], params), TensorDict({"observation": torch.randn(2, 4, **DOUBLE)}, [2])
    assert perceptron(data, parts_of(params, set())) is not None
    change(members[0])
    assert perceptron(data, parts_of(params, set())) is None


def test_a_hook_for_all_modules_is_heard():
    members, params = members_of(NETWORKS["sequence"])
    perceptron, data = Perceptron.of(members[0], params), TensorDict({"observation": torch.randn(2, 4, **DOUBLE)}, [2])
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert perceptron(data, parts_of(params, set())) is None
    finally:
        handle.remove()
    assert perceptron(data, parts_of(params, set())) is not None


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_layers_that_compute_their_weight_are_not_taken_for_others(norm):
    def normed():
        network = module(nn.Sequential(*layers()))
        norm(network.module[0])
        return network

    members, params = members_of(normed)
    assert Perceptron.of(members[0], params) is None


def test_a_missing_input_is_left_to_the_network_to_complain_of():
    members, params = members_of(NETWORKS["sequence"])
    assert Perceptron.of(members[0], params)(TensorDict({}, [2]), parts_of(params, set())) is None


class Raised(nn.ReLU):
    def forward(self, x):
        return super().forward(x) + 1


def test_a_function_of_ones_own_is_not_taken_for_the_one_it_inherits_from():
    network = module(nn.Sequential(nn.Linear(4, 2), Raised()))
    assert Perceptron.of(network, parameters_of([network, copy.deepcopy(network)])) is None
