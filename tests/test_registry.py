"""Losses find value estimators by enum member or name, with defaults, and hear clearly what can't be had."""

from enum import Enum
from functools import partial

import fusedrl.estimators as E
import pytest
from fusedrl.estimators import registry
from fusedrl.estimators.registry import ValueEstimators
from helpers_estimators import assert_close, critic, policy, rollout

EVERY = list(ValueEstimators)


class Loss:
    """What the registry needs of a loss."""

    def __init__(self, **attributes):
        self.actor_network = policy()
        vars(self).update(attributes)


@pytest.fixture
def clean_registry(monkeypatch):
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))


@pytest.mark.parametrize(
    ("value_type", "cls", "kwargs"),
    [
        (ValueEstimators.TD0, E.TD0Estimator, {"gamma": 0.99, "differentiable": True}),
        ("td1", E.TD1Estimator, {"gamma": 0.99, "differentiable": True}),
        ("TDLambda", E.TDLambdaEstimator, {"gamma": 0.99, "lmbda": 0.95, "differentiable": True}),
        ("Gae", E.GAE, {"gamma": 0.99, "lmbda": 0.95, "differentiable": True}),
        (ValueEstimators.MAGAE, E.MultiAgentGAE, {"gamma": 0.99, "lmbda": 0.95, "differentiable": True}),
        ("vtrace", E.VTrace, {"gamma": 0.99, "differentiable": True}),
    ],
)
def test_members_and_their_names_in_any_case_find_the_class_and_its_defaults(value_type, cls, kwargs):
    assert E.get_value_estimator_entry(value_type).cls is cls
    assert E.default_value_kwargs(value_type) == kwargs


def test_default_kwargs_are_the_callers_to_change():
    E.default_value_kwargs("gae")["gamma"] = 0.0
    assert E.default_value_kwargs("gae")["gamma"] == 0.99


@pytest.mark.usefixtures("clean_registry")
def test_default_kwargs_stay_as_they_were_registered():
    defaults = {"gamma": 0.3}
    E.register_value_estimator("mine", default_kwargs=defaults)(E.TD0Estimator)
    defaults["gamma"] = 0.0
    assert E.default_value_kwargs("mine") == {"gamma": 0.3}


def test_a_member_of_an_enum_that_nothing_is_registered_under_says_so():
    class Other(Enum):
        ESTIMATE = 1

    for call in (E.get_value_estimator_entry, E.default_value_kwargs, partial(E.build_value_estimator, Loss())):
        with pytest.raises(NotImplementedError, match=r"Other.ESTIMATE is not implemented"):
            call(Other.ESTIMATE)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(KeyError, match=r"'foo'.*td0.*gae"):
        E.get_value_estimator_entry("foo")
    with pytest.raises(TypeError, match="type"):
        E.get_value_estimator_entry(E.GAE)


@pytest.mark.parametrize("value_type", EVERY)
def test_built_estimators_use_the_losss_critic_and_the_given_hyperparameters(value_type):
    critic_network, value_network = critic(), critic()
    built = E.build_value_estimator(Loss(value_network=value_network), value_type, gamma=0.5)
    assert built.value_network is value_network
    assert built.gamma.item() == 0.5
    assert built.differentiable
    both = Loss(value_network=value_network, critic_network=critic_network)
    assert E.build_value_estimator(both, value_type).value_network is critic_network
    assert E.build_value_estimator(both, value_type, value_network=value_network).value_network is value_network
    assert E.build_value_estimator(Loss(), value_type).value_network is None


def test_dispatch_builds_sets_keys_and_keeps_the_estimator_on_the_loss():
    loss = Loss(value_network=critic())
    built = E.dispatch_value_estimator(loss, "gae", supported=EVERY, tensor_keys={"advantage": "adv"}, lmbda=0.5)
    assert loss._value_estimator is built
    assert loss.value_type is ValueEstimators.GAE
    assert built.tensor_keys.advantage == "adv"
    assert built.lmbda.item() == 0.5
    assert_close(built(rollout())["adv"], E.GAE(gamma=0.99, lmbda=0.5, value_network=critic())(rollout())["advantage"])


@pytest.mark.parametrize("gamma", [0.7, 0.0])
def test_dispatch_takes_gamma_from_the_loss_unless_it_is_given(gamma):
    loss = Loss(value_network=critic(), gamma=gamma)
    assert E.dispatch_value_estimator(loss, "td0", supported=EVERY).gamma.item() == gamma
    assert E.dispatch_value_estimator(loss, "td0", supported=EVERY, gamma=0.2).gamma.item() == 0.2


def test_an_estimator_that_the_loss_does_not_support_is_an_error_that_lists_those_it_does():
    loss = Loss(value_network=critic())
    with pytest.raises(NotImplementedError, match=r"Loss does not support.*GAE.*supports: TD0, TD1$"):
        E.dispatch_value_estimator(loss, "gae", supported=iter([ValueEstimators.TD0, ValueEstimators.TD1]))
    assert not hasattr(loss, "_value_estimator")


@pytest.mark.usefixtures("clean_registry")
def test_an_estimator_of_ones_own_can_be_registered_under_a_name_or_an_enum():
    class Mine(Enum):
        ESTIMATE = 1

    @E.register_value_estimator(Mine.ESTIMATE, default_kwargs={"gamma": 0.3})
    @E.register_value_estimator("mine")
    class Estimator(E.TD0Estimator):
        pass

    assert E.build_value_estimator(Loss(), Mine.ESTIMATE).gamma.item() == 0.3
    assert E.get_value_estimator_entry("estimate").cls is Estimator
    assert type(E.build_value_estimator(Loss(), "mine", gamma=0.1)) is Estimator
    with pytest.raises(KeyError, match=r"'yours'; there are: .*gae.*mine"):
        E.get_value_estimator_entry("yours")


def test_a_member_of_torchrls_enum_stands_for_ours_of_its_name():
    theirs = pytest.importorskip("torchrl.objectives").ValueEstimators
    for member in theirs:
        assert E.get_value_estimator_entry(member) is E.get_value_estimator_entry(member.name)
