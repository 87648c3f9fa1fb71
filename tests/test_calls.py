"""The shortcuts to a network's modules give what the network itself gives: whatever it is made of, whoever looks on."""

import pytest
import torch
from fusedrl.estimators.calls import call, distribution, distribution_from_parameters, written_by, written_in_turn
from helpers_losses import DOUBLE, OBSERVATION, GaussianParameters, diagonal_normal
from tensordict import NonTensorData, NonTensorStack, TensorDict
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
    set_interaction_type,
)
from tensordict.nn.probabilistic import InteractionType
from torch import nn


@pytest.fixture(autouse=True)
def _as_in_a_loss():
    torch.manual_seed(0)
    with set_interaction_type(InteractionType.RANDOM):  # else a policy is always left to itself
        yield


def observations(**entries):
    return TensorDict({"observation": torch.randn(5, OBSERVATION, **DOUBLE), **entries}, [5])


def linear(outputs=2, reads="observation", writes="action"):
    return TensorDictModule(nn.Linear(OBSERVATION, outputs, **DOUBLE), [reads], [writes])


def assert_as_the_network_itself(network, data, key="action"):
    """`call`, `written_by` and `written_in_turn` say what ``network(data)`` says."""
    wanted = network(data.copy()).get(key)
    torch.testing.assert_close(call(network, data.copy()).get(key), wanted)
    torch.testing.assert_close(written_by(network, data).get(key), wanted)
    torch.testing.assert_close(written_in_turn([network], data).get(key), wanted)


def assert_the_distribution_is_the_policys_own(policy, data):
    wanted = policy.get_dist(data.copy())
    action = wanted.sample()
    for write in (False, True):
        dist = distribution(policy, data.copy(), write=write)
        torch.testing.assert_close(dist.log_prob(action), wanted.log_prob(action))


# --- entries below one another ----------------------------------------------------------------------------------


class Hidden(nn.Linear):
    """Writes a TensorDict."""

    def __init__(self):
        super().__init__(OBSERVATION, OBSERVATION, **DOUBLE)

    def forward(self, x):
        return TensorDict({"x": super().forward(x)}, x.shape[:-1])


def test_an_entry_below_one_that_was_just_written_whole_is_the_new_one():
    whole = TensorDictModule(Hidden(), ["observation"], ["hidden"])
    network = TensorDictSequential(whole, linear(reads=("hidden", "x")))
    data = observations(hidden=TensorDict({"x": torch.randn(5, OBSERVATION, **DOUBLE)}, [5]))
    assert_as_the_network_itself(network, data)


def test_a_policy_is_trained_through_what_it_writes_whole_and_reads_below():
    whole = TensorDictModule(Hidden(), ["observation"], ["hidden"])
    head = TensorDictModule(GaussianParameters(), [("hidden", "x")], ["loc", "scale"])
    last = ProbabilisticTensorDictModule(["loc", "scale"], ["action"], distribution_class=diagonal_normal)
    policy = ProbabilisticTensorDictSequential(whole, head, last)
    data = observations(hidden=TensorDict({"x": torch.randn(5, OBSERVATION, **DOUBLE)}, [5]))
    assert_the_distribution_is_the_policys_own(policy, data)
    distribution(policy, data).mean.sum().backward()
    assert whole.module.weight.grad is not None


def test_an_entry_that_was_just_written_below_one_is_in_the_whole():
    below = linear(OBSERVATION, writes=("hidden", "x"))
    network = TensorDictSequential(below, TensorDictModule(lambda hidden: 2 * hidden["x"], ["hidden"], ["action"]))
    for entries in ({}, {"hidden": TensorDict({"x": torch.randn(5, OBSERVATION, **DOUBLE)}, [5])}):
        assert_as_the_network_itself(network, observations(**entries))


# --- entries that are no tensors --------------------------------------------------------------------------------


class OfTasks(nn.Linear):
    """Values that depend on the name of the task, or on the task of each sample."""

    def __init__(self):
        super().__init__(OBSERVATION, 2, **DOUBLE)

    def forward(self, x, tasks):
        tasks = [tasks] * len(x) if isinstance(tasks, str) else tasks
        factors = [[2.0 if task == "b" else 1.0] for task, _ in zip(tasks, x, strict=False)]
        return torch.tensor(factors, **DOUBLE) * super().forward(x)


@pytest.mark.parametrize("tasks", [NonTensorData("b", [5]), NonTensorStack(*"abbab")], ids=["one", "several"])
def test_a_module_gets_the_value_of_an_entry_that_is_no_tensor(tasks):
    network = TensorDictModule(OfTasks(), ["observation", "task"], ["action"])
    data = observations(task=tasks)
    assert_as_the_network_itself(network, data)
    copying = TensorDictModule(lambda x: x, ["task"], ["copied"])
    network = TensorDictSequential(copying, TensorDictModule(OfTasks(), ["observation", "copied"], ["action"]))
    assert_as_the_network_itself(network, data)


# --- distributions that a policy makes in its own way -----------------------------------------------------------


def gaussian_policy(kind=ProbabilisticTensorDictModule, distribution_class=diagonal_normal):
    head = TensorDictModule(GaussianParameters(), ["observation"], ["loc", "scale"])
    return ProbabilisticTensorDictSequential(
        head, kind(["loc", "scale"], ["action"], distribution_class=distribution_class)
    )


def test_a_policy_that_draws_twice_may_have_both_distributions():
    def drawn(head):
        parameters = [(head, "loc"), (head, "scale")]
        last = ProbabilisticTensorDictModule(
            dict(zip(("loc", "scale"), parameters, strict=True)), [(head, "action")], distribution_class=diagonal_normal
        )
        return TensorDictModule(GaussianParameters(), ["observation"], parameters), last

    policy = ProbabilisticTensorDictSequential(*drawn("steer"), *drawn("brake"))
    dist = distribution(policy, observations())
    assert set(dist.dists) == {("steer", "action"), ("brake", "action")}


class Tempered(ProbabilisticTensorDictModule):
    """Reads an entry that isn't among its in_keys."""

    def get_dist(self, tensordict):
        return self.distribution_class(tensordict["loc"], tensordict["scale"] * tensordict["temperature"])


def test_a_distribution_may_be_made_of_more_than_the_networks_say():
    data = observations(temperature=torch.full((5, 1), 2.0, **DOUBLE))
    assert_the_distribution_is_the_policys_own(gaussian_policy(Tempered), data)


def test_a_distribution_may_be_made_by_what_was_put_in_the_place_of_get_dist():
    kind = pytest.importorskip("torchrl.modules").IndependentNormal  # which is deferred, and not asked of `last`
    policy = gaussian_policy(distribution_class=kind)
    last = policy.module[-1]
    last.get_dist = lambda tensordict: last.distribution_class(2 * tensordict["loc"], tensordict["scale"])
    assert_the_distribution_is_the_policys_own(policy, observations())


# --- methods of their own ---------------------------------------------------------------------------------------


def halved(tensordict):
    return tensordict.set("action", tensordict["action"] / 2)


class OwnCall(TensorDictModule):
    def __call__(self, tensordict):
        return halved(super().__call__(tensordict))


class OwnModuleCall(TensorDictModule):
    def _call_module(self, tensors, **kwargs):
        return super()._call_module(tensors, **kwargs) / 2


class OwnWriting(TensorDictModule):
    def _write_to_tensordict(self, tensordict, tensors, *args, **kwargs):
        return super()._write_to_tensordict(tensordict, [x / 2 for x in tensors], *args, **kwargs)


class OwnSequenceCall(TensorDictSequential):
    def __call__(self, tensordict):
        return halved(super().__call__(tensordict))


class OwnRun(TensorDictSequential):
    def _run_module(self, module, tensordict, **kwargs):
        return halved(super()._run_module(module, tensordict, **kwargs))


@pytest.mark.parametrize("kind", [OwnCall, OwnModuleCall, OwnWriting])
def test_a_module_with_a_method_of_its_own_is_called_itself(kind):
    network = kind(nn.Linear(OBSERVATION, 2, **DOUBLE), ["observation"], ["action"])
    assert_as_the_network_itself(network, observations())
    assert_as_the_network_itself(TensorDictSequential(network), observations())


@pytest.mark.parametrize("kind", [OwnSequenceCall, OwnRun])
def test_a_sequence_with_a_method_of_its_own_is_called_itself(kind):
    assert_as_the_network_itself(kind(linear()), observations())
    assert_as_the_network_itself(TensorDictSequential(kind(linear())), observations())


@pytest.mark.parametrize("make", [linear, lambda: TensorDictSequential(linear())], ids=["module", "sequence"])
def test_what_was_put_in_the_place_of_a_networks_forward_is_called(make):
    network = make()
    forward = network.forward
    network.forward = lambda tensordict: halved(forward(tensordict))
    assert_as_the_network_itself(network, observations())


@pytest.mark.parametrize("name", ["get_dist", "build_dist_from_params"])
def test_what_was_put_in_the_place_of_a_policys_method_makes_its_distribution(name):
    policy = gaussian_policy()
    method = getattr(policy, name)

    def wider(tensordict, *_):
        dist = method(tensordict)
        return diagonal_normal(dist.mean, 2 * dist.stddev)

    setattr(policy, name, wider)
    data = observations()
    assert_the_distribution_is_the_policys_own(policy, data)
    data = policy.get_dist_params(data)
    found, wanted = distribution_from_parameters(policy, data), policy.build_dist_from_params(data)
    torch.testing.assert_close(found.stddev, wanted.stddev)


class OwnParameters(ProbabilisticTensorDictSequential):
    @property
    def det_part(self):
        return TensorDictSequential(super().det_part, TensorDictModule(lambda x: x / 2, ["loc"], ["loc"]))


def test_a_policy_is_asked_for_the_networks_that_make_its_parameters():
    policy = gaussian_policy()
    assert_the_distribution_is_the_policys_own(OwnParameters(*policy.module), observations())
    policy[0] = TensorDictModule(GaussianParameters(), ["observation"], ["loc", "scale"])  # the first may be kept
    assert_the_distribution_is_the_policys_own(policy, observations())


def test_a_module_may_write_nothing():
    looking = TensorDictModule(lambda x: None, ["observation"], [])
    assert_as_the_network_itself(TensorDictSequential(looking, linear()), observations())
    with pytest.raises(RuntimeError, match=r"writes \['action'\], but its module returned 0 tensors"):
        written_by(TensorDictModule(lambda x: None, ["observation"], ["action"]), observations())


# --- whoever looks on -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [linear, lambda: TensorDictSequential(linear())], ids=["module", "sequence"])
def test_hooks_of_all_modules_run(make):
    def hook(module, _, out):
        return halved(out) if isinstance(module, TensorDictModule) else None

    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        assert_as_the_network_itself(make(), observations())
    finally:
        handle.remove()


class Twice(nn.Linear):
    def twice(self, x):
        return 2 * self(x)

    def forward(self, x):
        return super().forward(x)


def test_a_method_that_stands_in_for_forward_is_called():
    network = TensorDictModule(Twice(OBSERVATION, 2, **DOUBLE), ["observation"], ["action"], method="twice")
    assert_as_the_network_itself(network, observations())


class ByName(nn.Linear):
    def forward(self, *, x):
        return super().forward(x)


def test_inputs_are_passed_by_name_where_the_network_says_so():
    network = TensorDictModule(ByName(OBSERVATION, 2, **DOUBLE), {"observation": "x"}, ["action"], out_to_in_map=False)
    assert_as_the_network_itself(network, observations())


def test_a_network_that_does_not_write_into_its_input_leaves_it_alone():
    network = TensorDictModule(nn.Linear(OBSERVATION, 2, **DOUBLE), ["observation"], ["action"], inplace=False)
    data = observations()
    assert call(network, data)["action"].shape == (5, 2)
    assert "action" not in data


def test_modules_without_input_are_left_out_where_that_is_tolerated():
    network = TensorDictSequential(linear(), linear(reads="absent", writes="other"), partial_tolerant=True)
    assert_as_the_network_itself(network, observations())


def test_entries_that_were_not_selected_are_left_out():
    network = TensorDictSequential(
        linear(OBSERVATION, writes="hidden"), linear(reads="hidden"), selected_out_keys=["action"]
    )
    data = observations()
    assert set(call(network, data.copy()).keys()) == set(network(data.copy()).keys())
