"""The estimators agree with TorchRL's, where those are right: values, gradients, keys, options, state."""

import inspect

import fusedrl.estimators as ours
import pytest
import torch
from helpers_estimators import ESTIMATORS, HYPERPARAMETERS, as_keywords, critic, every_estimator, rollout
from tensordict import TensorDict, unravel_key_list
from tensordict.nn import TensorDictModule, TensorDictParams
from torch import nn

pytest.importorskip("torchrl")
import torchrl.objectives.utils as their_utils
import torchrl.objectives.value as theirs

# TorchRL keeps γ and λ in float32 whatever the dtype of the data: 0.9 is off by 3e-8, and sums of a dozen terms follow.
TOLERANCE = {"rtol": 5e-6, "atol": 5e-6}
MULTISTEP = ["GAE", "TD1Estimator", "TDLambdaEstimator"]
LEAVES = ["obs", ("next", "obs"), ("next", "reward")]


def pair(name, network=None, **options):
    """Their estimator and ours, with one value network."""
    options = {**HYPERPARAMETERS[name], "value_network": critic() if network is None else network, **options}
    return getattr(theirs, name)(**options), getattr(ours, name)(**options)


def differentiable_copy(data):
    copy = data.clone()
    for key in LEAVES:
        copy.set(key, copy.get(key).requires_grad_())
    return copy


def gradients(output, leaves):
    if not output.requires_grad:
        return [torch.zeros_like(x) for x in leaves]
    found = torch.autograd.grad(output.sum(), leaves, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def assert_parity(name, data, call=None, network=None, also_leaves=(), ignore=(), **options):
    """All entries written, and the gradients of each to observations, rewards and ``also_leaves``."""
    results = []
    for estimator in pair(name, network, **options):
        td = differentiable_copy(data)
        leaves = [td.get(key) for key in LEAVES] + list(also_leaves)
        estimator(td, **(call or {}))
        results.append(
            (td, {k: [x.detach().double(), *gradients(x, leaves)] for k, x in td.items(True, True) if k not in LEAVES})
        )
    (_, expected), (_, actual) = results
    assert set(actual) == set(expected)
    for key in set(expected) - set(ignore):
        for a, e in zip(actual[key], expected[key], strict=True):
            torch.testing.assert_close(a, e, **TOLERANCE, msg=lambda text, key=key: f"{key}: {text}")


@every_estimator
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"differentiable": True},
        {"deactivate_vmap": True},
        {"deactivate_vmap": True, "differentiable": True},
        {"value_chunk_size": 2},
        {"value_chunk_size": 2, "value_chunk_dim": 1, "differentiable": True},
        {"num_chunks": 2, "value_chunk_dim": -1},
        {"num_chunk": 3},
        {"skip_existing": True},
        {"skip_existing": False},
    ],
    ids=str,
)
def test_values_and_gradients_over_the_options(name, options):
    assert_parity(name, rollout((3, 7)), **options)


@pytest.mark.parametrize("name", MULTISTEP)
@pytest.mark.parametrize("options", [{"time_dim": 0}, {"time_dim": -2}, {"time_dim": 2}], ids=str)
def test_time_dim(name, options):
    assert_parity(name, rollout((4, 5, 6)), **options)


@pytest.mark.parametrize("name", MULTISTEP)
@pytest.mark.parametrize("names", [["time", None, None], ["env", "time", None], [None, None, "time"]], ids=str)
def test_the_dimension_named_time_is_time(name, names):
    data = rollout((4, 5, 6))
    data.names = names
    assert_parity(name, data)


@pytest.mark.parametrize("time_dim", [0, 1, -1])
def test_time_dim_of_a_call_wins(time_dim):
    assert_parity("GAE", rollout((4, 5, 6)), call={"time_dim": time_dim}, time_dim=2)


@pytest.mark.parametrize("name", ["GAE", "TDLambdaEstimator"])
@pytest.mark.parametrize("vectorized", [True, False])
def test_vectorized(name, vectorized):
    assert_parity(name, rollout(), vectorized=vectorized, differentiable=True)


@pytest.mark.parametrize("options", [{"average_gae": True}, {"auto_reset_env": True}], ids=str)
@pytest.mark.parametrize("differentiable", [True, False])
def test_options_of_gae(options, differentiable):
    data = rollout()
    # Without this entry, which ours doesn't read, theirs fails.
    data["next", "truncated"] = data["next", "done"] & ~data["next", "terminated"]
    assert_parity("GAE", data, differentiable=differentiable, **options)


@pytest.mark.parametrize("name", [x for x in ESTIMATORS if x != "GAE"])
def test_average_rewards(name):
    # Theirs also writes the standardised rewards over the caller's.
    assert_parity(name, rollout(), average_rewards=True)


@every_estimator
@pytest.mark.parametrize("budget", [4, 9])
def test_shifted_with_room_for_every_step(name, budget):
    data = rollout((1, 12), seed=5, consistent=True)
    truncated = data["next", "done"] & ~data["next", "terminated"]
    assert 0 < truncated[:, :-1].sum() < budget
    # A terminal step's next value is not read; theirs is that of another observation than ours there.
    assert_parity(name, data, shifted=True, shifted_budget=budget, ignore=[("next", "state_value")])


@every_estimator
def test_n_step_data_is_discounted_by_gamma_to_the_n(name):
    data = rollout(dtype=torch.float32)  # in float64 theirs fails
    data["steps_to_next_obs"] = torch.randint(1, 4, (2, 9, 1), generator=torch.Generator().manual_seed(0))
    assert_parity(name, data, network=critic(torch.float32))


@every_estimator
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensor_hyperparameters(name, dtype):
    assert_parity(name, rollout(), **{k: torch.tensor(x, dtype=dtype) for k, x in HYPERPARAMETERS[name].items()})


@every_estimator
def test_terminated_may_be_missing(name):
    data = rollout()
    data["next"].pop("terminated")
    assert_parity(name, data)


def test_td0_needs_no_done():
    data = rollout()
    data["next"].pop("done")
    assert_parity("TD0Estimator", data)


@every_estimator
def test_without_a_network_the_values_are_taken_from_the_tensordict(name):
    data = rollout()
    data["state_value"], data["next", "state_value"] = torch.randn(2, 2, 9, 1, dtype=torch.float64).unbind(0)
    options = {**HYPERPARAMETERS[name], "value_network": None}
    expected, actual = getattr(theirs, name)(**options)(data.clone()), getattr(ours, name)(**options)(data.clone())
    for key in ("advantage", "value_target", "state_value", ("next", "state_value")):
        torch.testing.assert_close(actual[key], expected[key], **TOLERANCE)


@every_estimator
@pytest.mark.parametrize("deactivate_vmap", [True, False])
@pytest.mark.parametrize("targets", ["none", "detached", "trained"])
@pytest.mark.parametrize("differentiable", [True, False])
def test_functional_parameters(name, deactivate_vmap, targets, differentiable):
    network = critic()
    params = TensorDictParams(TensorDict.from_module(network).data.clone())
    shifted = params.data.apply(lambda x: x + 0.1)
    target_params = {"none": None, "detached": shifted, "trained": TensorDictParams(shifted)}[targets]
    target_leaves = target_params.values(True, True) if targets == "trained" else ()
    assert_parity(
        name,
        rollout(),
        call={"params": params, "target_params": target_params},
        network=network,
        also_leaves=[*params.values(True, True), *target_leaves],
        deactivate_vmap=deactivate_vmap,
        differentiable=differentiable,
    )


@pytest.mark.parametrize("name", [x for x in ESTIMATORS if x != "GAE"])
@pytest.mark.parametrize("how", ["network", "target_params", "next_value"])
def test_value_estimate(name, how):
    network = critic()
    data = rollout()
    next_value = torch.randn(2, 9, 1, dtype=torch.float64, requires_grad=True)
    targets = TensorDictParams(TensorDict.from_module(network).data.apply(lambda x: x + 0.1))
    kwargs = {"network": {}, "target_params": {"target_params": targets}, "next_value": {"next_value": next_value}}[how]
    results = []
    for estimator in pair(name, network):
        td = differentiable_copy(data)
        output = estimator.value_estimate(td, **kwargs)
        leaves = [*(td.get(key) for key in LEAVES), next_value, *targets.values(True, True)]
        results.append([output, *gradients(output, leaves)])
    for e, a in zip(*results, strict=True):
        torch.testing.assert_close(a, e, **TOLERANCE)


@pytest.mark.parametrize("with_params", [True, False])
def test_value_estimate_of_gae(with_params):
    network = critic()
    params = TensorDict.from_module(network).data.clone() if with_params else None
    results = []
    for estimator in pair("GAE", network):
        td = differentiable_copy(rollout())
        output = estimator.value_estimate(td, params, params)
        results.append([output, *gradients(output, [td.get(key) for key in LEAVES])])
    for e, a in zip(*results, strict=True):
        torch.testing.assert_close(a, e, **TOLERANCE)


class Recurrent(nn.Module):
    """Sums observations since the last start of an episode, over dimension 1."""

    def forward(self, obs, is_init):
        state, states = 0, []
        for t in range(obs.shape[1]):
            state = torch.where(is_init[:, t], 0, state) + obs[:, t].sum(-1, keepdim=True)
            states.append(state)
        return torch.stack(states, 1)


@every_estimator
def test_recurrent_networks_see_the_same_episode_starts_now_and_next(name):
    network = TensorDictModule(Recurrent(), in_keys=["obs", "is_init"], out_keys=["state_value"])
    data = rollout()
    data["is_init"] = torch.rand(2, 9, 1, generator=torch.Generator().manual_seed(0)) < 0.3
    data["next", "is_init"] = ~data["is_init"]
    assert_parity(name, data, network=network, deactivate_vmap=True)


@every_estimator
def test_called_with_tensors_it_returns_the_out_keys(name):
    keywords = as_keywords(rollout())
    their, our = pair(name)
    expected, actual = their(**keywords), our(**keywords)
    assert isinstance(actual, tuple)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, **TOLERANCE)


@every_estimator
def test_keys_follow_set_keys(name):
    their, our = pair(name)
    assert vars(our.tensor_keys) == vars(their.tensor_keys)
    for estimator in (their, our):
        estimator.set_keys(advantage="a", value_target=("t", "v"), reward=("agents", "reward"), done="end")
    assert our.in_keys == unravel_key_list(their.in_keys)
    assert our.out_keys == their.out_keys
    assert vars(our.tensor_keys) == vars(their.tensor_keys)


@every_estimator
def test_state_dicts_can_be_exchanged(name):
    their, our = pair(name)
    getattr(ours, name)(**dict.fromkeys(HYPERPARAMETERS[name], 0.5), value_network=None).load_state_dict(
        their.state_dict(), strict=True
    )
    receiver = getattr(theirs, name)(**dict.fromkeys(HYPERPARAMETERS[name], 0.5), value_network=None)
    receiver.load_state_dict(our.state_dict(), strict=True)
    assert receiver.gamma == torch.tensor(HYPERPARAMETERS[name]["gamma"])
    assert list(our.parameters()) == list(their.parameters()) == []


@every_estimator
def test_the_constructor_takes_what_theirs_takes(name):
    """Same names and defaults, except grouped standardisation, which isn't here."""
    actual = {}
    for cls in reversed(getattr(ours, name).__mro__):
        if "__init__" in vars(cls) and cls.__module__.startswith("fusedrl"):
            actual.update(inspect.signature(cls.__init__).parameters)
    for key, parameter in inspect.signature(getattr(theirs, name).__init__).parameters.items():
        if key not in ("self", "group_key"):
            # vectorized: None and True are the same to both.
            allowed = {parameter.default, True, None} if key == "vectorized" else {parameter.default}
            assert actual[key].default in allowed, key


@pytest.mark.parametrize("alias", ["td0", "TD0", "td1", "TDLambda", "tdlambda", "gae", "GAE"])
def test_the_registry_knows_their_aliases_and_defaults(alias):
    assert ours.default_value_kwargs(alias) == their_utils.default_value_kwargs(alias)
    assert (
        ours.get_value_estimator_entry(alias).cls.__name__ == their_utils.get_value_estimator_entry(alias).cls.__name__
    )


def test_the_enum_has_their_members():
    assert [x.name for x in ours.ValueEstimators] == [x.name for x in their_utils.ValueEstimators]


@pytest.mark.parametrize("unknown", ["foo", 3])
def test_an_unknown_estimator_is_the_same_kind_of_error(unknown):
    with pytest.raises((KeyError, TypeError)) as expected:
        their_utils.get_value_estimator_entry(unknown)
    with pytest.raises(expected.type):
        ours.get_value_estimator_entry(unknown)
