"""What every loss gets from `LossModule`, shown on a small one: a value network trained on its one-step target."""

import inspect
import pickle
import warnings
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from fusedrl.estimators import GAE, TD0Estimator
from fusedrl.losses import LossModule, ValueEstimators
from fusedrl.losses.sac import SACLoss
from helpers_q import qvalue_network, stochastic_actor
from tensordict import NestedKey, TensorDict
from tensordict.nn import InteractionType, TensorDictModule, dispatch
from tensordict.nn.probabilistic import interaction_type
from torch import nn

BATCH = (4, 5)


class ValueLoss(LossModule):
    """(V − r − γV')², with everything a loss can have."""

    @dataclass
    class _AcceptedKeys:
        value: NestedKey = "state_value"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        priority_weight: NestedKey = "priority_weight"

    default_value_estimator = ValueEstimators.TD0
    SUPPORTED_VALUE_ESTIMATORS = (ValueEstimators.TD0, ValueEstimators.TD1)
    _schedulable_buffers = frozenset({"coeff", "bound"})
    out_keys = ("loss_value", "target")

    def __init__(self, network, *, delay_value=False, expand_dim=None, functional=True, reduction=None):
        super().__init__(reduction)
        if functional:
            self.convert_to_functional(network, "value_network", expand_dim, create_target_params=delay_value)
        else:
            self.value_network = network
        self.register_coeff_buffer("coeff", 0.5)
        self.register_coeff_buffer("bound", None)

    @dispatch
    def forward(self, tensordict):
        self._require(tensordict, "reward", "done", networks=["value_network"])
        params = self.target_value_network_params if self.functional else None
        target = self.value_estimator.value_estimate(tensordict, target_params=params)
        with self._parameters_in("value_network"):
            value = self.value_network(tensordict.copy()).get(self.tensor_keys.value)
        self._require_shape(value, self.tensor_keys.value, target, "the target")
        loss = self.coeff * (value - target).square()
        return TensorDict(
            {"loss_value": self._reduce_loss(loss, tensordict), "target": self._metric(target, tensordict)}
        )


@pytest.fixture
def network():
    torch.manual_seed(0)
    return TensorDictModule(
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), ["observation"], ["state_value"]
    )


@pytest.fixture
def data():
    torch.manual_seed(1)
    following = {
        "observation": torch.randn(*BATCH, 3),
        "reward": torch.randn(*BATCH, 1),
        "done": torch.rand(*BATCH, 1) < 0.2,
    }
    return TensorDict({"observation": torch.randn(*BATCH, 3), "next": following}, BATCH)


def as_keywords(data):
    return {
        "observation": data["observation"],
        "next_observation": data["next", "observation"],
        "next_reward": data["next", "reward"],
        "next_done": data["next", "done"],
    }


def expected_loss(network, data, gamma=0.99):
    """Per sample, written out."""
    value = network.module(data["observation"])
    with torch.no_grad():
        following = network.module(data["next", "observation"]).masked_fill(data["next", "done"], 0.0)
    return 0.5 * (value - data["next", "reward"] - gamma * following).square().squeeze(-1)


# --- calling ----------------------------------------------------------------------------------------------------


def test_loss_is_the_equation(network, data):
    torch.testing.assert_close(ValueLoss(network)(data)["loss_value"], expected_loss(network, data).mean())


def test_keyword_call_returns_a_tuple_in_out_keys_order(network, data):
    loss = ValueLoss(network)
    expected = loss(data)
    torch.testing.assert_close(loss(**as_keywords(data)), (expected["loss_value"], expected["target"]))


def test_selected_out_keys_are_all_that_comes_out(network, data):
    loss = ValueLoss(network).select_out_keys("target")
    for optional in (False, True):
        if optional:
            data["next", "terminated"] = data["next", "done"]
        assert list(loss(data).keys()) == ["target"]
    assert loss(**as_keywords(data)).ndim == 0
    assert len(loss.reset_out_keys()(data).keys()) == 2
    with pytest.raises(ValueError, match="foo"):
        loss.select_out_keys("foo")


def test_input_is_left_as_it_is(network, data):
    before = data.clone()
    ValueLoss(network)(data)
    assert set(data.keys(True, True)) == set(before.keys(True, True))
    assert (data == before).all()


def test_distributions_are_asked_for_their_deterministic_sample(network, data):
    seen = []
    network.module.register_forward_hook(lambda *_: seen.append(interaction_type()))
    ValueLoss(network, functional=False)(data)
    assert set(seen) == {InteractionType.DETERMINISTIC}


def test_constructor_signature_is_that_of_init():
    assert "delay_value" in inspect.signature(ValueLoss).parameters


def test_copies_and_pickles_compute_the_same(network, data):
    loss = ValueLoss(network, delay_value=True)
    expected = loss(data)["loss_value"]
    torch.testing.assert_close(deepcopy(loss)(data)["loss_value"], expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(loss))(data)["loss_value"], expected)


@pytest.mark.parametrize("delay_value", [False, True])
def test_compiles_as_one_graph_with_the_numbers_of_eager(network, data, delay_value):
    torch.compiler.reset()
    data["collector", "mask"] = torch.rand(BATCH) < 0.5
    eager, compiled = ValueLoss(network, delay_value=delay_value), ValueLoss(network, delay_value=delay_value)
    expected = eager(data)
    result = torch.compile(compiled, fullgraph=True, backend="aot_eager")(data)
    torch.testing.assert_close(result.to_dict(), expected.to_dict())
    gradients = [
        torch.autograd.grad(x["loss_value"], list(loss.parameters()))
        for loss, x in ((eager, expected), (compiled, result))
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("late", [("collector", "mask"), "priority_weight"], ids=str)
def test_compiled_for_any_size_takes_a_mask_that_was_not_there_before(network, data, late):
    torch.compiler.reset()
    loss = ValueLoss(network)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for size in (2, 3):
        compiled(data[:size])
    data[late] = torch.rand(BATCH) if late == "priority_weight" else torch.rand(BATCH) < 0.5
    torch.testing.assert_close(compiled(data)["loss_value"], loss(data)["loss_value"])


# --- keys -------------------------------------------------------------------------------------------------------


def test_renamed_entries_are_read_by_loss_and_estimator(network, data):
    expected = ValueLoss(network)(data)["loss_value"]
    data["next", "my_reward"] = data["next"].pop("reward")
    loss = ValueLoss(network)
    loss.set_keys(reward="my_reward")
    assert ("next", "my_reward") in loss.in_keys
    assert ("next", "reward") not in loss.in_keys
    torch.testing.assert_close(loss(data)["loss_value"], expected)
    loss.set_keys(reward=None)
    assert loss.tensor_keys.reward == "reward"


def test_names_chosen_before_the_estimator_reach_it(network):
    loss = ValueLoss(network)
    loss.set_keys(reward="my_reward")
    loss.make_value_estimator(ValueEstimators.TD1)
    assert loss.value_estimator.tensor_keys.reward == "my_reward"


def test_renaming_an_unknown_key_is_refused(network):
    with pytest.raises(ValueError, match=r"foo is not a key of ValueLoss; its keys are: value, reward"):
        ValueLoss(network).set_keys(foo="bar")


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        (("next", "reward"), "set_keys(reward=...)"),
        (("next", "done"), "set_keys(done=...)"),
        ("observation", "in_keys of value_network"),
    ],
)
def test_missing_entry_is_named_with_the_loss_and_the_remedy(network, data, key, hint):
    del data[key]
    before = set(data.keys(True, True))
    with pytest.raises(KeyError) as error:
        ValueLoss(network)(data)
    for part in ("ValueLoss", repr(key), hint):
        assert part in str(error.value)
    assert set(data.keys(True, True)) == before


class MayHaveState(nn.Linear):
    def forward(self, x, h=None):
        return super().forward(x)


def test_errors_about_something_else_are_not_taken_for_a_missing_entry(data):
    network = TensorDictModule(MayHaveState(3, 1), ["observation", "h"], ["state_value"])
    loss = ValueLoss(network)
    assert loss(data)["loss_value"].isfinite()
    for part in (data, data["next"]):
        part["observation"] = torch.randn(*BATCH, 2)  # "shapes" has an h in it, and TensorDictModule's message has it
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        loss(data)


def test_shapes_that_would_broadcast_are_refused(data):
    wide = TensorDictModule(nn.Linear(3, 3), ["observation"], ["state_value"])
    loss = ValueLoss(wide)
    with pytest.raises(RuntimeError, match=r"state_value"):
        loss(data)


def test_keys_that_a_network_makes_for_itself_are_not_asked_for():
    inner = TensorDictModule(nn.Linear(3, 2), ["observation"], [("params", "loc")])
    inner.in_keys = ["observation", "params"]
    loss = ValueLoss(inner)
    assert "observation" in loss.in_keys
    assert "params" not in loss.in_keys


# --- networks ---------------------------------------------------------------------------------------------------


def test_parameters_are_the_networks_own(network):
    loss = ValueLoss(network)
    assert {id(p) for p in loss.parameters()} == {id(p) for p in network.parameters()}
    assert next(name for name, _ in loss.named_parameters()) == "value_network_params.module.0.weight"


def test_network_is_the_users_own_and_not_a_part_of_the_loss(network):
    loss = ValueLoss(network)
    assert loss.value_network is network
    assert "value_network" not in dict(loss.named_modules())
    assert [name for name in loss.state_dict() if not name.startswith("value_network_params.")] == ["coeff"]


def test_network_of_an_ensemble_is_left_alone(network, data):
    before = deepcopy(network.state_dict())
    loss = ValueLoss(network, expand_dim=2)
    assert loss.value_network is network
    assert not {id(p) for p in loss.parameters()} & {id(p) for p in network.parameters()}
    with loss._parameters_in("value_network"):
        assert network.module[0].weight.shape == (2, 4, 3)
    torch.testing.assert_close(dict(network.state_dict()), dict(before))


@pytest.mark.parametrize("delay_value", [False, True])
def test_targets_are_never_parameters(network, delay_value):
    loss = ValueLoss(network, delay_value=delay_value)
    assert not [name for name, _ in loss.named_parameters() if "target" in name]
    assert not any(p.requires_grad for p in loss.target_value_network_params.values(True, True))


def test_delayed_targets_are_a_copy_and_others_follow(network):
    for delay_value in (False, True):
        loss = ValueLoss(network, delay_value=delay_value)
        with torch.no_grad():
            network.module[0].bias.add_(1.0)
        same = torch.equal(loss.target_value_network_params["module", "0", "bias"], network.module[0].bias)
        assert same is not delay_value
        assert any("target" in name for name in loss.state_dict()) is delay_value


def test_targets_follow_parameters_that_were_replaced(network):
    loss = ValueLoss(network).to(torch.float64)
    assert loss.target_value_network_params["module", "0", "bias"].dtype == torch.float64
    loss.load_state_dict({k: torch.zeros_like(x) for k, x in loss.state_dict().items()}, assign=True)
    assert not loss.target_value_network_params["module", "0", "bias"].any()


def test_ensemble_members_differ_and_keep_their_scale():
    torch.manual_seed(0)
    net = TensorDictModule(
        nn.Sequential(nn.Linear(3, 64), nn.LayerNorm(64), nn.BatchNorm1d(64)), ["observation"], ["state_value"]
    )
    loss = LossModule()
    loss.convert_to_functional(net, "qvalue_network", expand_dim=3, create_target_params=True)
    params, target = loss.qvalue_network_params, loss.target_qvalue_network_params
    weight = params["module", "0", "weight"]
    assert params.batch_size == torch.Size([3])
    assert weight.shape == (3, 64, 3)
    assert not torch.equal(weight[0], weight[1])
    own = net.module[0].weight
    assert own.min() <= weight.min()
    assert weight.max() <= own.max()
    assert weight.std() > own.std() / 2
    assert (params["module", "1", "weight"] == 1).all()
    names = [name for name, _ in loss.named_parameters()]
    assert len(names) == 6
    assert not [name for name in names if "running" in name]
    assert torch.equal(target["module", "0", "weight"], weight)
    assert target["module", "0", "weight"].data_ptr() != weight.data_ptr()


@pytest.mark.parametrize("members", [1, 2])
def test_what_a_user_froze_stays_frozen_in_an_ensemble(members):
    nets = [TensorDictModule(nn.Linear(3, 1), ["observation"], ["state_value"]) for _ in range(members)]
    for net in nets:
        net.module.weight.requires_grad_(False)
    loss = LossModule()
    loss.convert_to_functional(nets if members > 1 else nets[0], "qvalue_network", expand_dim=2)
    assert [name for name, p in loss.named_parameters() if p.requires_grad] == ["qvalue_network_params.module.bias"]


def test_each_member_has_statistics_of_its_own():
    net = TensorDictModule(nn.BatchNorm1d(3), ["observation"], ["state_value"])
    loss = LossModule()
    loss.convert_to_functional(net, "qvalue_network", expand_dim=2)
    mean = loss.qvalue_network_params["module", "running_mean"]
    mean[0] += 1
    assert not mean[1].any()
    assert not net.module.running_mean.any()


def test_list_of_networks_becomes_an_ensemble_as_it_is():
    nets = [TensorDictModule(nn.Linear(3, 1), ["observation"], ["state_value"]) for _ in range(2)]
    loss = LossModule()
    loss.convert_to_functional(nets, "qvalue_network")
    weight = loss.qvalue_network_params["module", "weight"]
    assert isinstance(weight, nn.Parameter)
    assert torch.equal(weight, torch.stack([net.module.weight for net in nets]))


def test_a_tuple_of_networks_is_a_list_of_them():
    first, second = (TensorDictModule(nn.Linear(3, 1), ["observation"], ["state_value"]) for _ in range(2))
    loss = LossModule()
    loss.convert_to_functional((first, second), "value_network")
    torch.testing.assert_close(loss.value_network_params["module", "weight"][1], second.module.weight)


def test_shared_parameters_are_trained_once(network):
    heads = [TensorDictModule(nn.Linear(4, 1), ["hidden"], ["q"]) for _ in range(2)]
    one, other = (nn.ModuleList([network, head]) for head in heads)
    for both, expand_dim in ((one, None), (one, 2), ([one, other], 2)):
        loss = LossModule()
        loss.convert_to_functional(
            both, "qvalue_network", expand_dim=expand_dim, compare_against=list(network.parameters())
        )
        trained = dict(loss.named_parameters())
        assert set(trained) == {"qvalue_network_params.1.module.weight", "qvalue_network_params.1.module.bias"}
        with torch.no_grad():
            network.module[0].bias.add_(1.0)
        followed = loss.qvalue_network_params["0", "module", "0", "bias"]
        assert torch.equal(followed, network.module[0].bias.expand_as(followed))


@pytest.mark.parametrize("change", [lambda x: x.double(), deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("kind", ["single", "ensemble", "list"])
def test_shared_parameters_stay_shared(network, change, kind):
    loss = LossModule()
    loss.convert_to_functional(network, "value_network")
    both = nn.ModuleList([network, TensorDictModule(nn.Linear(4, 1), ["hidden"], ["q"])])
    members, expand_dim = [both, both] if kind == "list" else both, None if kind == "single" else 2
    loss.convert_to_functional(members, "qvalue_network", expand_dim, compare_against=network.parameters())
    trained = {name for name, _ in loss.named_parameters()}
    loss = change(loss)
    assert {name for name, _ in loss.named_parameters()} == trained
    assert isinstance(loss.value_network.module[0].bias, nn.Parameter)
    with torch.no_grad():
        loss.value_network_params["module", "0", "bias"].fill_(7.0)
    for seen in (loss.qvalue_network_params["0", "module", "0", "bias"], loss.value_network.module[0].bias):
        assert (seen == 7).all()
        assert (change is not deepcopy) or (network.module[0].bias != 7).all()


def test_stateful_network_shares_parameters_with_the_loss(network, data):
    loss = ValueLoss(network)
    net = loss.get_stateful_net("value_network")
    assert {id(p) for p in net.parameters()} == {id(p) for p in loss.parameters()}
    torch.testing.assert_close(net(data.copy())["state_value"], network(data.copy())["state_value"])
    assert net is not network
    assert loss.get_stateful_net("value_network", copy=False) is network
    with pytest.raises(AttributeError):
        loss.get_stateful_net("foo")


def test_parameters_can_be_copied_from_a_stateful_network(network):
    loss = ValueLoss(network)
    other = deepcopy(network)
    with torch.no_grad():
        for p in other.parameters():
            p.fill_(2.0)
    loss.from_stateful_net("value_network", other)
    assert all((p == 2).all() for p in network.parameters())


@pytest.mark.parametrize("layer", [nn.Linear(4, 1, bias=False), nn.Linear(4, 2)], ids=str)
def test_another_network_is_not_copied_from(network, layer):
    loss, other = ValueLoss(network), deepcopy(network)
    other.module[2] = layer
    before = deepcopy(network.state_dict())
    with pytest.raises(RuntimeError, match=r"can't take the parameters of this network.*'module', '2', 'bias'"):
        loss.from_stateful_net("value_network", other)
    torch.testing.assert_close(dict(network.state_dict()), dict(before))


@pytest.mark.parametrize("expand_dim", [None, 2])
def test_reset_initialises_networks_anew_and_targets_with_them(network, expand_dim):
    loss = ValueLoss(network, delay_value=True, expand_dim=expand_dim)
    with torch.no_grad():
        for p in loss.parameters():
            p.fill_(2.0)
    loss.reset_parameters_recursive()
    assert not any((p == 2).any() for p in loss.parameters())
    weight = loss.value_network_params["module", "0", "weight"]
    assert torch.equal(weight, loss.target_value_network_params["module", "0", "weight"])
    assert expand_dim is None or not torch.equal(weight[0], weight[1])


def test_training_mode_reaches_the_networks(network):
    loss = ValueLoss(network)
    loss.eval()
    assert not loss.value_network.training
    loss.train()
    assert loss.value_network.training


def test_running_statistics_are_kept_up_to_date(data):
    net = TensorDictModule(
        nn.Sequential(nn.Flatten(0, 1), nn.BatchNorm1d(3), nn.Unflatten(0, BATCH), nn.Linear(3, 1)),
        ["observation"],
        ["state_value"],
    )
    loss = ValueLoss(net)
    loss(data)
    assert net.module[1].num_batches_tracked > 0
    assert net.module[1].running_mean.any()


@pytest.mark.parametrize("change", [lambda x: x.double(), deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_network_goes_on_holding_what_the_loss_holds(change):
    net = TensorDictModule(nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1)), ["observation"], ["state_value"])
    loss = change(ValueLoss(net))
    module, params = loss.value_network.module, loss.value_network_params["module"]
    for layer, name in (("0", "bias"), ("1", "running_mean")):
        with torch.no_grad():
            params[layer, name].add_(1.0)
        held = getattr(module[int(layer)], name)
        torch.testing.assert_close(held.detach(), params[layer, name].detach(), rtol=0, atol=0)
    assert isinstance(module[0].bias, nn.Parameter)
    assert "1.running_mean" in dict(module.named_buffers())


def test_networks_can_be_used_as_they_are(network, data):
    loss = ValueLoss(network, functional=False)
    assert not loss.functional
    assert loss.value_network is network
    assert next(iter(dict(loss.named_parameters()))) == "value_network.module.0.weight"
    torch.testing.assert_close(loss(data)["loss_value"], ValueLoss(network)(data)["loss_value"])


def test_vmap_randomness_follows_from_the_networks(network):
    loss = ValueLoss(network)
    assert loss.vmap_randomness == "error"
    dropout = TensorDictModule(nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.1)), ["observation"], ["state_value"])
    assert ValueLoss(dropout).vmap_randomness == "different"
    loss.set_vmap_randomness("same")
    assert loss.vmap_randomness == "same"
    with pytest.raises(ValueError, match="foo"):
        loss.set_vmap_randomness("foo")


def test_targets_without_an_updater_warn(network, data, monkeypatch):
    loss = ValueLoss(network, delay_value=True)
    monkeypatch.setenv("RL_WARNINGS", "True")
    with pytest.warns(UserWarning, match="no target network updater"):
        loss(data)
    monkeypatch.setenv("RL_WARNINGS", "False")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(data)


# --- value estimator --------------------------------------------------------------------------------------------


def test_discount_is_chosen_with_make_value_estimator(network, data):
    loss = ValueLoss(network)
    assert loss.make_value_estimator(gamma=0.5) is loss
    torch.testing.assert_close(loss(data)["loss_value"], expected_loss(network, data, gamma=0.5).mean())


@pytest.mark.parametrize("name", ["gamma", "lmbda"])
def test_discount_in_the_constructor_is_refused(network, name):
    with pytest.raises(TypeError, match="make_value_estimator"):
        ValueLoss(network, **{name: 0.9})


@pytest.mark.parametrize("value_type", [ValueEstimators.TD1, "TD1", "td1"])
def test_estimator_can_be_named(network, value_type):
    loss = ValueLoss(network).make_value_estimator(value_type, gamma=0.9)
    assert loss.value_type == ValueEstimators.TD1
    assert type(loss.value_estimator).__name__ == "TD1Estimator"


def test_estimator_can_be_a_class_or_an_instance(network):
    loss = ValueLoss(network).make_value_estimator(TD0Estimator, gamma=0.9, value_network=network)
    assert isinstance(loss.value_estimator, TD0Estimator)
    gae = GAE(gamma=0.9, lmbda=0.8, value_network=network)
    assert loss.make_value_estimator(gae).value_estimator is gae
    assert loss.value_type is GAE
    with pytest.raises(TypeError, match="also gamma"):
        loss.make_value_estimator(gae, gamma=0.9)


def test_unsupported_estimator_is_refused_with_those_supported(network):
    with pytest.raises(NotImplementedError, match="TD0, TD1"):
        ValueLoss(network).make_value_estimator(ValueEstimators.GAE)


def test_loss_without_a_default_estimator_says_so():
    with pytest.raises(NotImplementedError, match="make_value_estimator"):
        LossModule().value_estimator  # noqa: B018  # reading it raises


def test_estimator_is_saved_once_it_is_used(network, data):
    loss = ValueLoss(network)
    assert "_value_estimator.gamma" not in loss.state_dict()
    loss(data)
    assert "_value_estimator.gamma" in loss.state_dict()


def test_states_load_whether_or_not_the_estimator_was_used(network, data):
    fresh, used = ValueLoss(network), ValueLoss(network)
    used(data)
    used.value_estimator.gamma.fill_(0.5)
    ValueLoss(network).load_state_dict(fresh.state_dict())
    loaded = ValueLoss(network)
    loaded.load_state_dict(used.state_dict())
    assert loaded.value_estimator.gamma == 0.5
    holder = nn.ModuleDict({"loss": ValueLoss(network)})
    holder.load_state_dict(nn.ModuleDict({"loss": fresh}).state_dict())


# --- coefficients -----------------------------------------------------------------------------------------------


def test_coefficient_is_assigned_in_place(network):
    loss = ValueLoss(network)
    buffer = loss.coeff
    for value in (0.25, torch.tensor(0.125, dtype=torch.float64), 2):
        loss.coeff = value
        assert loss.coeff is buffer
        assert buffer == value
        assert buffer.dtype == torch.float32


def test_absent_coefficient_can_be_set_and_taken_away(network):
    loss = ValueLoss(network)
    assert loss.bound is None
    loss.bound = 0.5
    assert loss.state_dict()["bound"] == 0.5
    loss.bound = None
    assert "bound" not in loss.state_dict()


@pytest.mark.parametrize("value", ["x", torch.ones(2), True])
def test_coefficient_that_is_no_number_is_refused(value):
    with pytest.raises(ValueError, match="coeff must be a number"):
        LossModule().register_coeff_buffer("coeff", value)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_coefficient_is_a_number_of_the_losss_own(network, shape):
    given = torch.full(shape, 0.5)
    loss = ValueLoss(network)
    loss.register_coeff_buffer("coeff", given)
    loss.coeff = 0.25
    assert loss.coeff.shape == ()
    loss.load_state_dict(loss.state_dict() | {"coeff": torch.tensor(0.125)})
    assert loss.coeff == 0.125
    assert given == 0.5


def test_gamma_is_the_estimators_own(network):
    given = torch.tensor(0.9)
    estimator = TD0Estimator(gamma=given, value_network=network)
    estimator.load_state_dict({"gamma": torch.tensor(0.5)})
    assert estimator.gamma == 0.5
    assert given == torch.tensor(0.9)


def test_a_coefficient_that_requires_grad_is_held_itself(network, data):
    given = torch.tensor(0.5, requires_grad=True)
    loss = ValueLoss(network)
    loss.register_coeff_buffer("coeff", given)
    loss(data)["loss_value"].backward()
    assert given.grad is not None


def test_coefficients_of_base_classes_are_schedulable_too(network):
    class Another(ValueLoss):
        _schedulable_buffers = frozenset({"other"})

    loss = Another(network)
    buffer = loss.coeff
    loss.coeff = 0.25
    assert loss.coeff is buffer


@pytest.mark.parametrize("cast", [lambda x: x.half(), lambda x: x.to(torch.bfloat16), lambda x: x.double()])
def test_hyperparameters_keep_their_precision_in_a_cast(network, cast):
    loss = ValueLoss(network)
    gamma, coeff = loss.value_estimator.gamma.clone(), loss.coeff.clone()
    loss = cast(loss)
    torch.testing.assert_close(loss.value_estimator.gamma, gamma, rtol=0, atol=0)
    torch.testing.assert_close(loss.coeff, coeff, rtol=0, atol=0)
    assert next(loss.parameters()).dtype != torch.float32


def test_other_buffers_of_a_loss_are_cast(network):
    loss = ValueLoss(network)
    loss.register_buffer("scale", torch.ones(2))
    loss.register_buffer("nothing", None)
    assert loss.half().scale.dtype == torch.float16


# --- reduction --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", [None, "mean", "sum", "none"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_reduction_counts_masks_and_weights(network, data, reduction, masked, weighted):
    mask, weights = torch.ones(BATCH, dtype=torch.bool), torch.ones(BATCH)
    if masked:
        mask = torch.rand(BATCH) < 0.5
        data["collector", "mask"] = mask
    if weighted:
        weights = torch.rand(BATCH)
        data["priority_weight"] = weights
    each = expected_loss(network, data) * weights * mask
    expected = {"none": each, "sum": each.sum()}.get(reduction, each.sum() / (weights * mask).sum())
    torch.testing.assert_close(ValueLoss(network, reduction=reduction)(data)["loss_value"], expected)


def test_reduction_that_does_not_exist_is_refused(network):
    with pytest.raises(ValueError, match=r"'foo'.*'none', 'mean', 'sum'"):
        ValueLoss(network, reduction="foo")


@pytest.mark.parametrize("trailing", [(), (1,)])
def test_mask_can_be_found_named_or_ignored(network, data, trailing):
    unmasked = ValueLoss(network)(data)["loss_value"]
    mask = torch.rand(BATCH) < 0.5
    data["shifted_valid"] = mask.reshape(*BATCH, *trailing)
    expected = expected_loss(network, data)[mask].mean()
    loss = ValueLoss(network)
    torch.testing.assert_close(loss(data)["loss_value"], expected)
    loss.loss_mask_key = None
    torch.testing.assert_close(loss(data)["loss_value"], unmasked)
    data["mine"] = data.pop("shifted_valid")
    loss.loss_mask_key = "mine"
    torch.testing.assert_close(loss(data)["loss_value"], expected)


def test_a_mask_that_is_no_key_is_refused(network):
    with pytest.raises(ValueError, match="loss_mask_key must be a str or a tuple of str, but is 3"):
        ValueLoss(network).loss_mask_key = 3


def test_step_counts_if_all_masks_that_are_there_say_so(network, data):
    data["collector", "mask"], data["shifted_valid"] = torch.rand(2, *BATCH) < 0.5
    both = data["collector", "mask"] & data["shifted_valid"]
    torch.testing.assert_close(ValueLoss(network)(data)["loss_value"], expected_loss(network, data)[both].mean())


def test_metrics_leave_padding_out_and_hold_no_gradient(network, data):
    mask = torch.rand(BATCH) < 0.5
    data["collector", "mask"] = mask
    target = ValueLoss(network)(data)["target"]
    assert not target.requires_grad
    with torch.no_grad():
        following = network.module(data["next", "observation"]).masked_fill(data["next", "done"], 0.0)
    torch.testing.assert_close(target, (data["next", "reward"] + 0.99 * following)[mask].mean())


def test_loss_of_nothing_but_padding_is_zero(network, data):
    data["collector", "mask"] = torch.zeros(BATCH, dtype=torch.bool)
    assert ValueLoss(network)(data)["loss_value"] == 0


def test_padding_may_hold_nan(network, data):
    mask = torch.rand(BATCH) < 0.5
    data["collector", "mask"] = mask
    data["next", "reward"][~mask] = torch.nan
    assert ValueLoss(network)(data)["loss_value"].isfinite()


def test_mask_of_another_shape_is_refused(network, data):
    loss = ValueLoss(network)
    loss.loss_mask_key = "mine"
    data["mine"] = torch.ones(*BATCH, 3, dtype=torch.bool)
    with pytest.raises(RuntimeError, match=r"the mask 'mine' has shape \(4, 5, 3\)"):
        loss(data)


def test_priorities_can_be_ignored(network, data):
    expected = ValueLoss(network)(data)["loss_value"]
    data["priority_weight"] = torch.rand(BATCH)
    loss = ValueLoss(network)
    loss.use_prioritized_weights = False
    torch.testing.assert_close(loss(data)["loss_value"], expected)


def test_mean_of_a_large_float16_batch_does_not_overflow(network):
    loss = torch.full((300, 300), 2.0, dtype=torch.float16)
    mask = torch.ones(300, 300, dtype=torch.bool)
    mean = LossModule()._reduce_loss(loss, mask=mask)
    assert mean == 2
    assert mean.dtype == torch.float16


def test_a_coefficient_of_one_element_can_be_assigned_and_one_of_more_is_named():
    loss = ValueLoss(TensorDictModule(nn.Linear(3, 1), ["observation"], ["state_value"]))
    loss.coeff = torch.tensor([0.25])
    assert loss.coeff.shape == ()
    assert loss.coeff == 0.25
    loss.coeff = np.float32(0.5)
    assert loss.coeff == 0.5
    with pytest.raises(ValueError, match=r"coeff must be a number, but has shape \(2,\)"):
        loss.coeff = torch.ones(2)


def test_a_name_that_the_value_estimator_cannot_read_leaves_the_names_as_they_were():
    loss = SACLoss(stochastic_actor(), qvalue_network(), target_entropy=-2.0)
    in_keys = list(loss.in_keys)
    with pytest.raises((KeyError, ValueError)):
        loss.set_keys(priority="mine", reward=["a", "b"])
    assert (loss.tensor_keys.priority, loss.tensor_keys.reward) == ("td_error", "reward")
    assert list(loss.in_keys) == in_keys
