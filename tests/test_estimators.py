"""What the estimators promise about numbers: semantics, precision, gradients."""

import pytest
import torch
from fusedrl.estimators import functional as F
from fusedrl.estimators.steps import standardize
from helpers_estimators import (
    ESTIMATORS,
    HYPERPARAMETERS,
    WRITTEN,
    assert_close,
    assert_untouched,
    critic,
    estimator,
    every_backend,
    every_estimator,
    rollout,
    snapshot,
)
from tensordict import TensorDict
from tensordict.nn import TensorDictParams
from torch import nn


def expected_from_functional(name, td, **hyperparameters):
    """Advantage and value target from the plain functionals, given the values in ``td``."""
    h = {**HYPERPARAMETERS[name], **hyperparameters}
    value, next_value = td["state_value"], td["next", "state_value"]
    masks = td["next", "done"], td["next", "terminated"]
    reward = td["next", "reward"]
    if name == "GAE":
        return F.generalized_advantage_estimate(h["gamma"], h["lmbda"], value, next_value, reward, *masks)
    if name == "TD0Estimator":
        target = F.td0_return_estimate(h["gamma"], next_value, reward, masks[1])
    elif name == "TD1Estimator":
        target = F.td1_return_estimate(h["gamma"], next_value, reward, *masks)
    else:
        target = F.td_lambda_return_estimate(h["gamma"], h["lmbda"], next_value, reward, *masks)
    return target - value, target


@every_estimator
@every_backend
def test_estimates_are_the_functionals_of_the_networks_values(name, backend):
    network = critic()
    td = estimator(name, backend=backend, value_network=network)(rollout())
    assert_close(td["state_value"], network(rollout())["state_value"].detach())
    assert_close(td["next", "state_value"], network(rollout()["next"])["state_value"].detach())
    advantage, value_target = expected_from_functional(name, td)
    assert_close(td["advantage"], advantage)
    assert_close(td["value_target"], value_target)


@every_estimator
@every_backend
@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_next_observation_of_a_terminal_step_reaches_no_result_and_no_gradient(name, backend, garbage):
    def results(data):
        network = critic()
        leaves = [data["obs"].requires_grad_(), *network.parameters()]
        e = estimator(name, backend=backend, value_network=network, differentiable=True)
        out = e(data.copy())
        estimate = e.value_estimate(data, *([] if name == "GAE" else [TensorDict.from_module(network)]))
        total = out["advantage"].sum() + out["value_target"].sum() + out["state_value"].sum() + estimate.sum()
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
        return [out["advantage"], out["value_target"], estimate, *(g for g in grads if g is not None)]

    clean, dirty = rollout(), rollout()
    terminal = dirty["next", "terminated"].expand_as(dirty["next", "obs"])
    assert terminal.any()
    dirty["next", "obs"] = dirty["next", "obs"].masked_fill(terminal, garbage)
    for a, e in zip(results(dirty), results(clean), strict=True):
        assert_close(a, e)


@every_estimator
@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_next_value_of_a_terminal_step_that_is_given_reaches_no_result(name, garbage):
    def data():
        td = rollout()
        td["state_value"], td["next", "state_value"] = td["obs"][..., :1], td["next", "obs"][..., :1]
        return td

    dirty = data()
    dirty["next", "state_value"] = dirty["next", "state_value"].masked_fill(dirty["next", "terminated"], garbage)
    expected, actual = (estimator(name, value_network=None)(x) for x in (data(), dirty))
    for key in ("advantage", "value_target"):
        assert_close(actual[key], expected[key])


@every_estimator
def test_a_next_observation_that_was_not_stored_is_replaced_by_the_observation(name):
    data = rollout()
    data["next", "terminated"][0, 3], data["next", "done"][0, 3] = False, True
    data["next", "obs"][0, 3] = float("nan")
    td = estimator(name)(data)
    assert_close(td["next", "state_value"][0, 3], td["state_value"][0, 3])
    assert td["next", "obs"][0, 3].isnan().all()


@every_estimator
def test_a_value_target_takes_parameters_of_the_current_values_that_nothing_reads(name):
    if name == "GAE":
        pytest.skip("reads them")
    network, data = critic(), rollout()
    params, target_params = (TensorDict.from_module(network).data.clone() for _ in range(2))
    e = estimator(name, value_network=network)
    found = e.value_estimate(data, params=params, target_params=target_params)
    assert_close(found, e.value_estimate(data, target_params=target_params))


@every_estimator
def test_an_infinite_next_observation_is_not_taken_for_one_that_was_not_stored(name):
    data = rollout()
    data["next", "terminated"][0, 3] = False
    data["next", "obs"][0, 3] = float("inf")
    td = estimator(name)(data)
    assert not torch.equal(td["next", "state_value"][0, 3], td["state_value"][0, 3])


@every_estimator
@every_backend
def test_terminated_without_done_ends_the_trajectory(name, backend):
    data = rollout()
    data["next", "terminated"][:, 4] = True
    without = data.clone()
    without["next", "done"] &= ~without["next", "terminated"]
    data["next", "done"] |= data["next", "terminated"]
    for key in ("advantage", "value_target"):
        assert_close(*(estimator(name, backend=backend)(x)[key] for x in (without, data)))


@every_estimator
@every_backend
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_masks_of_any_dtype_are_true_where_not_zero(name, backend, dtype):
    data = rollout()
    expected = estimator(name, backend=backend)(data.clone())
    for key in ("done", "terminated"):
        data["next", key] = data["next", key].to(dtype) * 2
    assert_close(estimator(name, backend=backend)(data)["advantage"], expected["advantage"])


@every_estimator
@every_backend
def test_integer_rewards_are_computed_in_floating_point(name, backend):
    data = rollout()
    data["next", "reward"] = torch.arange(18).view(2, 9, 1) - 9
    td = estimator(name, backend=backend)(data)
    assert td["advantage"].dtype == torch.float64
    assert_close(
        td["value_target"], expected_from_functional(name, td.set(("next", "reward"), td["next", "reward"].double()))[1]
    )


@every_estimator
@every_backend
@pytest.mark.parametrize("batch", [(3, 1), (3, 0), (0, 4), (5,)], ids=str)
def test_degenerate_batches_give_the_shape_of_the_reward(name, backend, batch):
    td = estimator(name, backend=backend)(rollout(batch))
    for key in WRITTEN:
        assert td[key].shape == (*batch, 1)
        assert td[key].isfinite().all()


@every_estimator
@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_and_rounded_once(name, backend, dtype):
    td = estimator(name, backend=backend, value_network=critic(dtype))(rollout((2, 40), dtype=dtype))
    wide = td.apply(lambda x: x.float() if x.is_floating_point() else x)
    expected = estimator(name, backend=backend, value_network=None)(wide)
    for key in ("advantage", "value_target"):
        assert td[key].dtype == dtype
        assert torch.equal(td[key], expected[key].to(dtype))


@every_estimator
@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
def test_casting_a_module_leaves_gamma_and_lambda_alone(name, cast):
    parent = nn.ModuleList([estimator(name)])
    getattr(parent, cast)()
    for key, x in HYPERPARAMETERS[name].items():
        buffer = getattr(parent[0], key)
        assert buffer.dtype == torch.float64
        assert buffer.item() == x
    tensors = estimator(name, **{key: torch.tensor(x) for key, x in HYPERPARAMETERS[name].items()})
    getattr(tensors, cast)()
    assert tensors.gamma.dtype == torch.float32


@every_estimator
def test_a_cast_to_another_device_moves_what_keeps_its_precision(name):
    moved = estimator(name).to("meta", torch.bfloat16)
    for key in HYPERPARAMETERS[name]:
        assert (getattr(moved, key).device.type, getattr(moved, key).dtype) == ("meta", torch.float64)


@every_estimator
def test_moving_a_module_moves_gamma_and_lambda(name):
    e = estimator(name).to("meta").to(torch.bfloat16)
    assert all(x.device.type == "meta" and x.dtype == torch.float64 for x in e.buffers())


@every_estimator
@every_backend
def test_float64_data_is_discounted_in_float64(name, backend):
    td = estimator(name, backend=backend, gamma=0.99)(rollout((1, 30)))
    # 0.99 in float32 is off by 5e-10, thousands of times this tolerance.
    for key, expected in zip(
        ("advantage", "value_target"), expected_from_functional(name, td, gamma=0.99), strict=True
    ):
        torch.testing.assert_close(td[key], expected, rtol=1e-13, atol=1e-13)


@every_estimator
@every_backend
@pytest.mark.parametrize("shape", [(), (1,), (2, 1, 1), (2, 9, 1)], ids=str)
def test_gamma_and_lambda_of_any_broadcastable_shape(name, backend, shape):
    tensors = {key: torch.full(shape, x, dtype=torch.float64) for key, x in HYPERPARAMETERS[name].items()}
    expected = estimator(name, backend=backend)(rollout())
    actual = estimator(name, backend=backend, **tensors)(rollout())
    assert_close(actual["advantage"], expected["advantage"])


@every_estimator
def test_gradient_reaches_a_tensor_gamma(name):
    data = rollout()

    def target(gamma):
        return estimator(name, gamma=gamma, differentiable=True)(data.clone())["value_target"]

    gamma = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(target, (gamma,))


def test_average_gae_standardises_over_the_batch_in_float32_at_least():
    plain = estimator("GAE")(rollout())["advantage"]
    actual = estimator("GAE", average_gae=True)(rollout())["advantage"]
    assert_close(actual, (plain - plain.mean()) / plain.std())
    half = estimator("GAE", average_gae=True, value_network=critic(torch.float16))(rollout(dtype=torch.float16))
    torch.testing.assert_close(half["advantage"].double(), actual, rtol=0, atol=0.02)


def test_average_gae_of_a_single_step_is_zero():
    assert estimator("GAE", average_gae=True)(rollout((1, 1)))["advantage"].item() == 0


@pytest.mark.parametrize("name", [x for x in ESTIMATORS if x != "GAE"])
def test_average_rewards_leaves_the_callers_rewards_alone(name):
    data = rollout()
    reward = data["next", "reward"]
    td = estimator(name, average_rewards=True)(data)
    assert td["next", "reward"] is reward
    assert_close(td["value_target"], estimator(name, average_rewards=True).value_estimate(td))
    td["next", "reward"] = (reward - reward.mean()) / reward.std()
    assert_close(td["value_target"], expected_from_functional(name, td)[1])


def test_an_environment_that_resets_itself_bootstraps_from_the_steps_own_value():
    td = estimator("GAE", auto_reset_env=True)(rollout())
    td["next", "state_value"] = torch.where(td["next", "done"], td["state_value"], td["next", "state_value"])
    assert_close(td["advantage"], expected_from_functional("GAE", td)[0])


def padded(data, junk, steps=3):
    """``data`` ``[B, T]`` with ``steps`` more that ``("collector", "mask")`` calls padding, full of ``junk``."""
    padding = data[:, :1].expand(data.shape[0], steps).apply(lambda x: torch.full_like(x, junk))
    mask = torch.arange(data.shape[1] + steps) < data.shape[1]
    return torch.cat([data, padding], 1).set(("collector", "mask"), mask.expand(data.shape[0], -1))


@every_estimator
@every_backend
@pytest.mark.parametrize("junk", [0.0, 5.0, float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"shifted": True}, {"average_gae": True}, {"average_rewards": True}], ids=str)
def test_padded_steps_enter_no_estimate_no_gradient_and_no_statistic(name, backend, junk, options):
    if ("average_gae" if name != "GAE" else "average_rewards") in options:
        pytest.skip("no such option")
    data = rollout((3, 6), consistent=True)
    for key in ("done", "terminated"):
        data["next", key][:] = False
    network, results = critic(), []
    for td in (data.clone(), padded(data, junk)):
        e = estimator(name, backend=backend, value_network=network, differentiable=True, **options)
        obs = td["obs"].requires_grad_()
        out = e(td.copy())
        target = e.value_estimate(td, *([] if name == "GAE" else [TensorDict.from_module(network)]))
        inputs = [obs] if name == "GAE" else [obs, *network.parameters()]
        total = out["advantage"].sum() + target.square().sum()
        results.append([out["advantage"], out["value_target"], target, *torch.autograd.grad(total, inputs)])
    for plain, with_padding in zip(*results, strict=True):
        if plain.ndim == 3:
            assert (with_padding[:, 6:] == 0).all()
            with_padding = with_padding[:, :6]
        assert_close(with_padding, plain)


@every_estimator
def test_n_step_data_is_discounted_by_gamma_to_the_n(name):
    data = rollout()
    n = torch.randint(1, 4, (2, 9, 1), generator=torch.Generator().manual_seed(0))
    for steps in (n, n.squeeze(-1)):
        td = estimator(name)(data.clone().set("steps_to_next_obs", steps))
        assert_close(td["value_target"], expected_from_functional(name, td, gamma=0.9 ** n.double())[1])


@every_estimator
@pytest.mark.parametrize("time_dim", [0, 1, 2, -1, -3])
def test_time_dim_of_the_constructor_and_of_a_call(name, time_dim):
    data = rollout((3, 4, 5))
    moved = TensorDict({"obs": data["obs"], "next": data["next"]}, data.batch_size).apply(
        lambda x: x.movedim(time_dim % 3, 2), batch_size=torch.empty(data.batch_size).movedim(time_dim, -1).shape
    )
    expected = estimator(name)(moved)["value_target"].movedim(2, time_dim % 3)
    assert_close(estimator(name, time_dim=time_dim)(data.clone())["value_target"], expected)
    assert_close(estimator(name)(data.clone(), time_dim=time_dim)["value_target"], expected)
    assert_close(estimator(name).value_estimate(data, time_dim=time_dim), expected)


@every_estimator
def test_value_estimate_leaves_the_tensordict_as_it_is(name):
    data = rollout()
    before = snapshot(data)
    assert_close(estimator(name).value_estimate(data), estimator(name)(rollout())["value_target"])
    assert_untouched(data, before)


@pytest.mark.parametrize("name", [x for x in ESTIMATORS if x != "GAE"])
def test_value_estimate_needs_no_current_observation(name):
    data = rollout()
    expected = estimator(name).value_estimate(data)
    data.pop("obs")
    assert_close(estimator(name).value_estimate(data), expected)


@every_estimator
def test_without_differentiable_nothing_has_a_graph(name):
    data = rollout()
    data["obs"].requires_grad_()
    td = estimator(name)(data)
    assert not any(td[key].requires_grad for key in WRITTEN)


@every_estimator
def test_the_networks_parameters_are_constants(name):
    network = critic()
    data = rollout()
    data["obs"].requires_grad_()
    td = estimator(name, value_network=network, differentiable=True)(data)
    total = sum(td[key].sum() for key in WRITTEN)
    grads = torch.autograd.grad(total, list(network.parameters()), allow_unused=True)
    assert all(g is None for g in grads)
    assert all(p.requires_grad for p in network.parameters())


@every_estimator
def test_parameters_that_are_passed_are_constants_and_target_parameters_enter_no_estimate(name):
    network = critic()
    data = rollout()
    data["obs"].requires_grad_()
    params, target_params = (TensorDictParams(TensorDict.from_module(network).data.clone()) for _ in range(2))
    td = estimator(name, value_network=network, differentiable=True)(data, params=params, target_params=target_params)
    total = td["advantage"].sum() + td["value_target"].sum()
    leaves = [*params.values(True, True), *target_params.values(True, True)]
    assert all(g is None for g in torch.autograd.grad(total, leaves, allow_unused=True))


@every_estimator
def test_next_values_are_constants_in_forward_and_differentiable_in_value_estimate(name):
    data = rollout()
    for key in ("obs", ("next", "obs")):
        data[key].requires_grad_()
    e = estimator(name, differentiable=True, deactivate_vmap=True)
    td = e(data)
    inputs = data["obs"], data["next", "obs"]
    current, following = torch.autograd.grad(td["advantage"].sum(), inputs, allow_unused=True)
    assert current is not None
    assert following is None
    if name != "GAE":
        current, following = torch.autograd.grad(e.value_estimate(data).sum(), inputs, allow_unused=True)
        assert current is None
        assert following is not None


@pytest.mark.parametrize("name", ["GAE", "TD1Estimator", "TDLambdaEstimator"])
def test_the_dimension_named_time_is_time_else_the_last(name):
    data = rollout((4, 5))
    expected = [estimator(name, time_dim=d)(data.clone())["value_target"] for d in range(2)]
    assert torch.equal(estimator(name)(data.clone())["value_target"], expected[1])
    data.names = ["time", None]
    assert torch.equal(estimator(name)(data.clone())["value_target"], expected[0])
    assert torch.equal(estimator(name, time_dim=1)(data)["value_target"], expected[1])


@every_estimator
def test_the_next_tensordict_may_have_a_batch_size_of_its_own(name):
    data = rollout()
    expected = estimator(name)(data.clone())["advantage"]
    data["next"].batch_size = [2]
    assert torch.equal(estimator(name, value_chunk_size=4, value_chunk_dim=1)(data)["advantage"], expected)


def test_half_precision_is_standardised_in_float32():
    x = torch.tensor([60000.0, -60000.0, 30000.0, 0.0], dtype=torch.float16)
    found = standardize(x)
    assert found.dtype == torch.float16
    wanted = standardize(x.float())
    torch.testing.assert_close(found.float(), wanted, rtol=2e-3, atol=2e-3)


def test_noise_is_not_blown_up_to_size_1():
    x = torch.tensor([1e-5, -1e-5], dtype=torch.float64)
    torch.testing.assert_close(standardize(x), x / 1e-4)
