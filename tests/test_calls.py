"""The shortcuts to a network's modules give what the network itself gives: whatever it is made of, whoever looks on."""

import pytest
import torch
from fusedrl.estimators.calls import call, distribution, written_by, written_in_turn
from helpers_losses import DOUBLE, OBSERVATION, GaussianParameters, diagonal_normal
from tensordict import TensorDict
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


# --- distributions that a policy makes in its own way -----------------------------------------------------------


def gaussian_policy(kind=ProbabilisticTensorDictModule, distribution_class=diagonal_normal):
    head = TensorDictModule(GaussianParameters(), ["observation"], ["loc", "scale"])
    return ProbabilisticTensorDictSequential(
        head, kind(["loc", "scale"], ["action"], distribution_class=distribution_class)
    )


class Tempered(ProbabilisticTensorDictModule):
    """Reads an entry that isn't among its in_keys."""

    def get_dist(self, tensordict):
        return self.distribution_class(tensordict["loc"], tensordict["scale"] * tensordict["temperature"])


def test_a_distribution_may_be_made_of_more_than_the_networks_say():
    data = observations(temperature=torch.full((5, 1), 2.0, **DOUBLE))
    assert_the_distribution_is_the_policys_own(gaussian_policy(Tempered), data)


def test_a_distribution_may_be_made_by_what_was_put_in_the_place_of_get_dist():
    policy = gaussian_policy()
    last = policy.module[-1]
    last.get_dist = lambda tensordict: last.distribution_class(2 * tensordict["loc"], tensordict["scale"])
    assert_the_distribution_is_the_policys_own(policy, observations())
