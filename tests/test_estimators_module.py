"""Estimators as modules: keys, dispatch, copies, state."""

import copy
import doctest
import importlib
import pickle

import fusedrl.estimators as E
import pytest
import torch
from helpers_estimators import HYPERPARAMETERS, as_keywords, estimator, every_estimator, rollout
from tensordict.nn import TensorDictModule
from torch import nn


@every_estimator
def test_called_with_tensors_it_returns_the_out_keys_in_order(name):
    e = estimator(name)
    td = e(rollout())
    advantage, value_target = e(**as_keywords(rollout()))
    assert torch.equal(advantage, td["advantage"])
    assert torch.equal(value_target, td["value_target"])


def test_select_out_keys_and_reset_out_keys():
    e = estimator("GAE")
    e.select_out_keys("value_target")
    assert e.out_keys == ["value_target"]
    assert torch.equal(e(**as_keywords(rollout())), estimator("GAE")(rollout())["value_target"])
    assert "advantage" not in e(rollout())
    e.reset_out_keys()
    e.set_keys(advantage="adv")
    assert e.out_keys == ["adv", "value_target"]


@every_estimator
def test_keys_can_be_renamed_in_the_constructor_and_by_set_keys(name):
    network = TensorDictModule(nn.Linear(3, 1).double(), in_keys=["obs"], out_keys=["v"])
    e = estimator(name, value_network=network, value_key="v", advantage_key="adv", value_target_key=("t", "v"))
    e.set_keys(reward=("agent", "reward"), done="end", terminated="dead")
    data = rollout()
    for old, new in (("reward", ("agent", "reward")), ("done", "end"), ("terminated", "dead")):
        data["next"].rename_key_(old, new)
    td = e(data)
    assert {"v", "adv", ("t", "v"), ("next", "v")} <= set(td.keys(True, True))
    assert "advantage" not in td
    assert (e.advantage_key, e.value_target_key, e.value_key) == ("adv", ("t", "v"), "v")
    assert (e.reward_key, e.done_key, e.terminated_key) == (("agent", "reward"), "end", "dead")
    assert e.steps_to_next_obs_key == "steps_to_next_obs"


@every_estimator
def test_estimators_can_be_copied_and_pickled(name):
    e = estimator(name)
    expected = e(rollout())["advantage"]
    for other in (copy.deepcopy(e), pickle.loads(pickle.dumps(e))):
        assert torch.equal(other(rollout())["advantage"], expected)


@every_estimator
def test_a_state_dict_restores_gamma_and_lambda(name):
    e = estimator(name, **dict.fromkeys(HYPERPARAMETERS[name], 0.5))
    e.load_state_dict(estimator(name).state_dict(), strict=True)
    assert {k: getattr(e, k).item() for k in HYPERPARAMETERS[name]} == HYPERPARAMETERS[name]
    assert list(e.parameters()) == []


def test_the_older_names_are_the_same_classes():
    assert (E.TD0Estimate, E.TD1Estimate, E.TDLambdaEstimate) == (E.TD0Estimator, E.TD1Estimator, E.TDLambdaEstimator)


@pytest.mark.parametrize("module", ["functional", "gae", "registry", "td"])
def test_the_examples_in_the_docstrings_run(module):
    result = doctest.testmod(importlib.import_module(f"fusedrl.estimators.{module}"))
    assert result.attempted > 0
    assert result.failed == 0
