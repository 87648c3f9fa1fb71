"""Bad input to an estimator is an error that says what is wrong, and changes nothing."""

import re

import fusedrl.estimators as E
import pytest
import torch
from helpers_estimators import HYPERPARAMETERS, assert_untouched, critic, estimator, every_estimator, rollout, snapshot
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn


def assert_rejected(estimator, data, error, match, **call):
    before = snapshot(data)
    with pytest.raises(error, match=match):
        estimator(data, **call)
    assert_untouched(data, before)
    with pytest.raises(error, match=match):
        estimator.value_estimate(data, **call)
    assert_untouched(data, before)


@every_estimator
@pytest.mark.parametrize("key", [("next", "reward"), ("next", "done")], ids=str)
def test_a_missing_key_is_named_with_the_estimator_and_how_to_rename_it(name, key):
    data = rollout()
    data.pop(key)
    if key[1] == "done":
        data.pop(("next", "terminated"))
    assert_rejected(
        estimator(name), data, KeyError, rf"{name} needs {re.escape(repr(key))}.*set_keys\({key[1]}=\.\.\.\)"
    )


@every_estimator
def test_a_missing_input_of_the_network_is_named(name):
    data = rollout()
    data.pop(("next", "obs"))
    assert_rejected(estimator(name), data, KeyError, rf"{name} needs {re.escape(repr(('next', 'obs')))}.*network")
    data = rollout()
    data.pop("obs")
    before = snapshot(data)
    with pytest.raises(KeyError, match=f"{name} needs 'obs'.*network"):
        estimator(name)(data)
    assert_untouched(data, before)


@every_estimator
def test_a_missing_value_is_named_where_there_is_no_network(name):
    data = rollout()
    data["state_value"] = torch.zeros(2, 9, 1)
    e = estimator(name, value_network=None)
    assert_rejected(e, data, KeyError, rf"{re.escape(repr(('next', 'state_value')))}.*set_keys\(value=\.\.\.\)")


@pytest.mark.parametrize("name", ["GAE", "TD1Estimator", "TDLambdaEstimator"])
def test_done_is_not_guessed_from_terminated(name):
    data = rollout()
    data.pop(("next", "done"))
    assert_rejected(estimator(name), data, KeyError, "done")


@every_estimator
@pytest.mark.parametrize("key", ["done", "terminated"])
@pytest.mark.parametrize("shape", [(2, 9), (2, 9, 3)], ids=str)
def test_a_mask_of_another_shape_is_named_with_both_shapes(name, key, shape):
    data = rollout()
    data["next", key] = torch.zeros(shape, dtype=torch.bool)
    match = re.escape(f"{('next', key)!r} has shape {shape}, but {('next', 'reward')!r} has shape (2, 9, 1)")
    assert_rejected(estimator(name), data, RuntimeError, match)


@every_estimator
def test_a_value_that_would_broadcast_by_accident_is_named_with_both_shapes(name):
    match = re.escape("state_value") + r".* has shape \(2, 9, 5\), but .*reward.* has shape \(2, 9, 1\)"
    assert_rejected(estimator(name, value_network=critic(out=5)), rollout(), RuntimeError, match)


@every_estimator
def test_a_next_value_of_another_shape_is_an_error(name):
    if name == "GAE":
        pytest.skip("takes no next_value")
    with pytest.raises(RuntimeError, match=r"state_value.*\(2, 9\).*\(2, 9, 1\)"):
        estimator(name).value_estimate(rollout(), next_value=torch.zeros(2, 9))


@every_estimator
def test_a_gamma_that_does_not_broadcast_is_an_error(name):
    assert_rejected(estimator(name, gamma=torch.full((3, 1, 1), 0.9)), rollout(), RuntimeError, "gamma")


@every_estimator
def test_a_tensordict_without_time_is_an_error(name):
    assert_rejected(estimator(name), rollout()[0, 0], RuntimeError, r"batch dimension.*\(\)")


@every_estimator
def test_a_time_dim_out_of_range_is_an_error(name):
    assert_rejected(estimator(name), rollout(), IndexError, r"time_dim is 2.*\(2, 9\)", time_dim=2)
    assert_rejected(estimator(name, time_dim=-3), rollout(), IndexError, r"time_dim is -3.*\(2, 9\)")


@every_estimator
def test_a_chunk_dim_out_of_range_is_an_error(name):
    e = estimator(name, value_chunk_size=1, value_chunk_dim=2)
    assert_rejected(e, rollout(), ValueError, r"value_chunk_dim is 2.*\(2, 9\)")


@every_estimator
def test_target_parameters_without_parameters_are_an_error(name):
    data = rollout()
    before = snapshot(data)
    with pytest.raises(ValueError, match="target_params"):
        estimator(name)(data, target_params=TensorDict.from_module(critic()))
    assert_untouched(data, before)


@every_estimator
def test_shifted_has_no_target_parameters_and_no_n_step_data(name):
    params = TensorDict.from_module(critic()).data
    data = rollout()
    before = snapshot(data)
    with pytest.raises(ValueError, match="shifted=True"):
        estimator(name, shifted=True)(data, params=params, target_params=params)
    assert_untouched(data, before)
    data["steps_to_next_obs"] = torch.ones(2, 9, 1, dtype=torch.int64)
    assert_rejected(estimator(name, shifted=True), data, ValueError, "steps_to_next_obs")


@every_estimator
@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"shifted": "legacy"}, ValueError, "shifted.*'legacy'"),
        ({"shifted_budget": 0}, ValueError, "shifted_budget.*0"),
        ({"value_chunk_size": 0}, ValueError, "value_chunk_size.*0"),
        ({"num_chunks": 2.5}, TypeError, "num_chunks.*float"),
        ({"num_chunks": True}, TypeError, "num_chunks.*bool"),
        ({"value_chunk_size": 1, "num_chunks": 2}, ValueError, "only one"),
        ({"num_chunks": 1, "num_chunk": 2}, ValueError, "num_chunk"),
        ({"value_chunk_dim": "a"}, TypeError, "value_chunk_dim.*str"),
        ({"gamma": "1e-3"}, TypeError, "gamma must be a number or a tensor, but is '1e-3'"),
        ({"time_dim": "time"}, TypeError, "time_dim must be an int, but is 'time'"),
        ({"time_dim": 1.0}, TypeError, "time_dim must be an int, but is 1.0"),
        ({"backend": "tritn"}, ValueError, "'tritn'.*reference"),
        ({"value_key": "other"}, KeyError, r"'other'.*\['state_value'\]"),
        ({"foo": 1}, TypeError, "foo"),
        ({"value_network": nn.Linear(3, 1)}, TypeError, "value_network.*in_keys.*Linear"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_an_option_that_can_not_be_used_is_an_error_at_construction(name, options, error, match):
    with pytest.raises(error, match=match):
        estimator(name, **options)


def test_an_estimator_that_does_not_say_what_its_value_target_is_says_so():
    class Mine(E.ValueEstimatorBase):
        pass

    mine, data = Mine(gamma=0.9, value_network=critic()), rollout((2, 5))
    for call in (mine, mine.value_estimate):
        with pytest.raises(NotImplementedError, match=r"Mine doesn't say .* value target .* _value_target"):
            call(data)


@pytest.mark.parametrize("name", ["GAE", "TDLambdaEstimator"])
@pytest.mark.parametrize("lmbda", [None, "0.9"])
def test_a_lambda_that_is_no_number_is_named(name, lmbda):
    with pytest.raises(TypeError, match=f"lmbda must be a number or a tensor, but is {lmbda!r}"):
        estimator(name, lmbda=lmbda)


@every_estimator
@pytest.mark.parametrize("missing", ["gamma", "lmbda", "value_network"])
def test_hyperparameters_and_network_must_be_given(name, missing):
    options = {**HYPERPARAMETERS[name], "value_network": critic()}
    if options.pop(missing, None) is None:
        pytest.skip("no such hyperparameter")
    with pytest.raises(TypeError, match=missing):
        getattr(E, name)(**options)


@pytest.mark.parametrize("name", ["GAE", "TDLambdaEstimator"])
def test_a_backend_contradicting_vectorized_is_an_error(name):
    with pytest.raises(ValueError, match="vectorized"):
        estimator(name, vectorized=False, backend="torch")


@every_estimator
@pytest.mark.parametrize(
    ("keys", "error", "match"),
    [
        ({"advantages": "a"}, KeyError, "'advantages'.*advantage, value_target"),
        ({"reward": None}, ValueError, "'reward'.*None"),
        ({"reward": 3}, ValueError, "'reward'.*3"),
        ({"reward": "r", "value": "not_written"}, KeyError, "'not_written'"),
    ],
    ids=str,
)
def test_set_keys_rejects_what_is_not_a_key_and_then_changes_none(name, keys, error, match):
    e = estimator(name)
    before = dict(vars(e.tensor_keys))
    with pytest.raises(error, match=match):
        e.set_keys(**keys)
    assert vars(e.tensor_keys) == before


@every_estimator
def test_an_error_inside_the_network_leaves_the_tensordict_and_the_network_as_they_were(name):
    class Failing(nn.Linear):
        def forward(self, x):
            super().forward(x)
            raise ArithmeticError("no value")

    network = TensorDictModule(Failing(3, 1).double(), in_keys=["obs"], out_keys=["state_value"])
    data = rollout()
    before, parameters = snapshot(data), list(network.parameters())
    with pytest.raises(ArithmeticError):
        estimator(name, value_network=network)(data, params=TensorDict.from_module(network).data.clone())
    assert_untouched(data, before)
    assert all(a is b for a, b in zip(network.parameters(), parameters, strict=True))


@every_estimator
@pytest.mark.parametrize("size", [1, 2])
def test_a_next_observation_of_another_shape_is_refused(name, size):
    data = rollout()
    data["next", "obs"] = data["next", "obs"][..., :size]
    assert_rejected(estimator(name), data, RuntimeError, re.escape("('next', 'obs') has shape"))


@every_estimator
@pytest.mark.parametrize("shape", [(2, 9, 3), (2, 9, 1, 1), (9, 1)])
def test_numbers_of_steps_of_another_shape_are_named(name, shape):
    data = rollout()
    data.batch_size = []
    data["steps_to_next_obs"] = torch.ones(shape)
    with pytest.raises(RuntimeError, match="steps_to_next_obs' has shape"):
        estimator(name)._discount(data, data["next", "reward"])


@every_estimator
@pytest.mark.parametrize("place", [(), ("next",)], ids=["locked", "next locked"])
def test_a_locked_tensordict_is_refused_before_anything_is_written(name, place):
    data = rollout()
    (data[place] if place else data).lock_()
    before = snapshot(data)
    with pytest.raises(RuntimeError, match=f"{name} writes the entry .*locked"):
        estimator(name)(data)
    assert_untouched(data, before)
