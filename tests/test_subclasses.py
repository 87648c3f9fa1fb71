"""Losses, estimators and updaters of a user's own, written as for TorchRL's base classes."""

import abc
from dataclasses import dataclass

import pytest
import torch
from fusedrl.estimators import GAE, TD0Estimator, ValueEstimatorBase
from fusedrl.losses import LossModule, TargetNetUpdater, ValueEstimators
from tensordict import NestedKey, TensorDict
from tensordict.nn import TensorDictModule, dispatch
from torch import nn

BATCH = 6


def critic():
    torch.manual_seed(0)
    return TensorDictModule(nn.Linear(3, 1), ["observation"], ["state_value"])


def transitions():
    torch.manual_seed(1)
    done = torch.zeros(BATCH, 1, dtype=torch.bool)
    following = {"observation": torch.randn(BATCH, 3), "reward": torch.randn(BATCH, 1)}
    following.update(done=done, terminated=done)
    return TensorDict({"observation": torch.randn(BATCH, 3), "next": following}, [BATCH])


def one_step_target(network, gamma):
    following = transitions()["next"]
    return following["reward"] + gamma * network(following.copy())["state_value"]


# --- keys -------------------------------------------------------------------------------------------------------


class Regression(LossModule):
    @dataclass
    class _AcceptedKeys:
        target: NestedKey = "target"
        reward: NestedKey = "reward"
        priority: NestedKey = "td_error"

    out_keys = ("loss",)

    def __init__(self):
        super().__init__()
        self.convert_to_functional(critic(), "network")
        self.in_keys = ["observation", "target", ("next", "reward")]

    @dispatch
    def forward(self, tensordict):
        with self._parameters_in("network"):
            value = self.network(tensordict.copy())["state_value"]
        return TensorDict({"loss": (value - self._get(tensordict, "target")).square().mean()})


def test_in_keys_that_a_loss_assigned_stay_and_are_renamed_with_the_keys():
    loss = Regression()
    loss.set_keys(priority="p")
    assert loss.in_keys == ["observation", "target", ("next", "reward")]
    loss.set_keys(target="goal", reward="gain")
    assert loss.in_keys == ["observation", "goal", ("next", "gain")]
    goal = torch.ones(BATCH, 1)
    found = loss(observation=transitions()["observation"], goal=goal)
    expected = (critic()(transitions())["state_value"] - goal).square().mean()
    torch.testing.assert_close(found, expected)


def test_a_loss_that_sets_its_in_keys_is_told_when_they_are_renamed():
    class Told(Regression):
        def _set_in_keys(self):
            self.in_keys = ["observation", self.tensor_keys.target]

    loss = Told()
    loss.set_keys(target="goal")
    assert loss.in_keys == ["observation", "goal"]


def test_in_keys_can_be_those_of_the_class():
    class Listed(LossModule):
        in_keys = ("observation", ("car", "speed"))
        out_keys = ("loss",)

        @dispatch
        def forward(self, tensordict):
            return TensorDict({"loss": tensordict["observation"].sum() + tensordict["car", "speed"].sum()})

    class Inherits(Listed):
        pass

    for loss in (Listed(), Inherits()):
        assert loss.in_keys == ["observation", ("car", "speed")]
        assert loss(observation=torch.ones(2), car_speed=torch.ones(3)) == 5


def test_a_key_that_is_none_leaves_all_keys_as_they_were():
    loss = Regression()
    with pytest.raises(ValueError, match="reward must be a str or a tuple of str, but is 3"):
        loss.set_keys(target="goal", reward=3)
    assert (loss.tensor_keys.target, loss.tensor_keys.reward) == ("target", "reward")


@pytest.mark.parametrize("bases", [(abc.ABC, LossModule), (LossModule, abc.ABC)])
def test_losses_can_be_abstract(bases):
    class Abstract(*bases):
        @abc.abstractmethod
        def term(self): ...

        def forward(self, tensordict):
            return self.term()

    class Concrete(Abstract):
        def term(self):
            return 1

    with pytest.raises(TypeError, match="abstract"):
        Abstract()
    assert Concrete()(TensorDict()) == 1


# --- value estimators -------------------------------------------------------------------------------------------


class Valued(LossModule):
    default_value_estimator = ValueEstimators.TD0

    def __init__(self):
        super().__init__()
        self.convert_to_functional(critic(), "critic_network")

    def forward(self, tensordict):
        return self.value_estimator.value_estimate(tensordict)


class MakesIts(Valued):
    def make_value_estimator(self, value_type, **hyperparams):
        assert value_type == ValueEstimators.TD0
        self._value_estimator = TD0Estimator(**{"gamma": 0.5, **hyperparams}, value_network=self.critic_network)


class MakesItsDefault(Valued):
    default_value_estimator = None

    def _default_value_estimator(self):
        self._value_estimator = TD0Estimator(gamma=0.5, value_network=self.critic_network)


@pytest.mark.parametrize("cls", [MakesIts, MakesItsDefault])
def test_a_loss_can_make_its_value_estimator_in_its_own_way(cls):
    loss = cls()
    torch.testing.assert_close(loss(transitions()), one_step_target(critic(), 0.5))


def test_a_loss_that_never_uses_its_estimator_need_not_say_which_it_supports():
    class Unused(Valued):
        def forward(self, tensordict):
            return 1

    assert Unused()(transitions()) == 1
    with pytest.raises(NotImplementedError, match="Unused does not support"):
        _ = Unused().value_estimator


class RunningGAE(GAE):
    """Counts its calls in a buffer."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, tensordict, **kwargs):
        self.calls += 1
        return super().forward(tensordict, **kwargs)


@pytest.mark.parametrize("name", ["value_estimator", "_value_estimator"])
def test_an_estimator_that_a_loss_was_given_is_saved_with_it(name):
    class Given(LossModule):
        def __init__(self):
            super().__init__()
            self.convert_to_functional(critic(), "critic_network")
            setattr(self, name, RunningGAE(gamma=0.9, lmbda=0.8, value_network=self.critic_network))

        def forward(self, tensordict):
            return self._value_estimator(tensordict)["advantage"].mean()

    loss, other = Given(), Given()
    loss(transitions())
    assert "_value_estimator.gamma" in loss.state_dict()
    other.load_state_dict(loss.state_dict())
    assert other.value_estimator.calls == 1


def test_an_estimator_with_a_forward_of_its_own_needs_no_gamma():
    class Own(ValueEstimatorBase):
        def __init__(self, gamma):
            super().__init__(value_network=None, shifted=False, differentiable=False, skip_existing=None)
            self.register_buffer("gamma", torch.tensor(gamma))

        def forward(self, tensordict, *, params=None, target_params=None):
            return tensordict.set("value_target", self.gamma * tensordict["next", "reward"])

    data = transitions()
    torch.testing.assert_close(Own(0.5)(data)["value_target"], 0.5 * data["next", "reward"])


class OwnTarget(ValueEstimatorBase):
    def _value_target(self, steps, next_value, time_dim):
        return steps.reward


@pytest.mark.parametrize("cls", [GAE, TD0Estimator, OwnTarget])
def test_other_estimators_need_it(cls):
    options = {"lmbda": 0.9} if cls is GAE else {}
    with pytest.raises(TypeError, match="gamma"):
        cls(value_network=None, **options)


def test_a_rejected_estimator_does_not_replace_the_one_there_is():
    class Supporting(Valued):
        SUPPORTED_VALUE_ESTIMATORS = (ValueEstimators.TD0,)

        @dataclass
        class _AcceptedKeys:
            value: NestedKey = "state_value"

    loss = Supporting()
    before = loss.value_estimator
    other = TensorDictModule(nn.Linear(3, 1), ["observation"], ["another_value"])
    estimator = TD0Estimator(gamma=0.9, value_network=other, value_key="another_value")
    with pytest.raises(KeyError, match="state_value"):
        loss.make_value_estimator(estimator)
    assert loss.value_estimator is before
    assert loss.value_type is ValueEstimators.TD0


# --- updaters ---------------------------------------------------------------------------------------------------


def test_an_updater_can_say_how_one_target_moves():
    class Halfway(TargetNetUpdater):
        def _step(self, p_source, p_target):
            p_target.data.lerp_(p_source.data, 0.5)

    class Delayed(LossModule):
        def __init__(self):
            super().__init__()
            self.convert_to_functional(critic(), "network", create_target_params=True)

    loss = Delayed()
    updater, before = Halfway(loss), loss.target_network_params.clone()
    with torch.no_grad():
        loss.network_params.apply_(lambda x: x.add_(2.0))
    updater.step()
    after = loss.target_network_params
    for key, x in before.items(True, True):
        torch.testing.assert_close(after[key], x + 1.0)
