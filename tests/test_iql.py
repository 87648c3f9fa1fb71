"""IQL: the equations, and what is promised beyond (or against) what TorchRL does."""

import copy

import pytest
import torch
from fusedrl.losses.functional.offline import advantage_weighted_objective, expectile_loss
from fusedrl.losses.iql import IQLLoss
from helpers_losses import composite_actor
from helpers_q import (
    CLOSE,
    DOUBLE,
    OBSERVATION,
    assert_compiles,
    assert_no_host_sync,
    assert_padding_is_ignored,
    assert_rejected,
    assert_terminal_observations_are_ignored,
    desynchronise_targets,
    deterministic_actor,
    gradients,
    padded,
    qvalue_network,
    run,
    same_parameters,
    stochastic_actor,
    transitions,
    value_network,
)
from tensordict.nn import TensorDictModule, set_composite_lp_aggregate
from torch import distributions as D
from torch import nn

NETWORKS = {"loss_actor": "actor_network", "loss_qvalue": "qvalue_network", "loss_value": "value_network"}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(actor=stochastic_actor, **options):
    return desynchronise_targets(IQLLoss(actor(), qvalue_network(), value_network(), **options))


# --- the mathematics --------------------------------------------------------------------------------------------


def test_the_expectile_is_where_the_loss_is_least():
    targets = torch.tensor([0.0, 0.0, 0.0, 1.0], **DOUBLE)
    v = torch.linspace(0, 1, 1001, **DOUBLE)
    least = v[expectile_loss(targets - v[:, None], 0.9).mean(1).argmin()]
    # The weights of the two sides balance: 0.9 · (1 − v) = 3 · 0.1 · v. To the grid's spacing.
    torch.testing.assert_close(least, torch.tensor(0.75, **DOUBLE), rtol=0, atol=1e-3)


def test_half_an_expectile_is_half_the_square():
    error = torch.randn(9)
    torch.testing.assert_close(expectile_loss(error, 0.5), error.square() / 2)


@pytest.mark.parametrize("expectile", [0.0, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int64])
def test_the_loss_of_an_expectile_is_the_weighed_square(expectile, dtype):
    error = torch.tensor([-30, -1, 0, 1, 30], dtype=dtype)
    expected = [(1 - expectile) * 900, 1 - expectile, 0.0, expectile, expectile * 900]
    found = expectile_loss(error, expectile)
    torch.testing.assert_close(found.double(), torch.tensor(expected, **DOUBLE), rtol=2e-3, atol=1e-6)


def test_the_weight_of_an_action_is_bounded_and_a_constant():
    advantage = torch.tensor([-1.0, 0.0, 1000.0], requires_grad=True)
    log_prob = torch.full((3,), -1.0, requires_grad=True)
    objective = advantage_weighted_objective(log_prob, advantage, 2.0)
    torch.testing.assert_close(objective.detach(), torch.tensor([-(torch.e**-2), -1, -100.0]))
    objective.sum().backward()
    assert advantage.grad is None
    assert log_prob.grad.isfinite().all()


def test_the_losses_are_the_equations():
    loss = make(temperature=3.0, expectile=0.8, num_qvalue_nets=3, loss_function="l2")
    loss.make_value_estimator(gamma=0.5)
    data = transitions(batch=(6,))

    def values(network, params, inputs, key):
        with params.to_module(network):
            return network(inputs.clone())[key].squeeze(-1)

    def ensemble(params):
        each = params.unbind(0)
        return torch.stack([values(loss.qvalue_network, one, data, "state_action_value") for one in each])

    value = values(loss.value_network, loss.value_network_params, data, "state_value")
    next_value = values(loss.value_network, loss.value_network_params, data["next"], "state_value")
    advantage = ensemble(loss.target_qvalue_network_params).min(0).values - value
    with loss.actor_network_params.to_module(loss.actor_network):
        log_prob = loss.actor_network.get_dist(data.clone()).log_prob(data["action"])
    target = data["next", "reward"].squeeze(-1) + 0.5 * next_value * ~data["next", "terminated"].squeeze(-1)
    squares = (ensemble(loss.qvalue_network_params) - target).square()
    wanted = {
        "loss_actor": -((3 * advantage).exp().clamp(max=100) * log_prob).mean(),
        "loss_qvalue": squares.sum(0).mean(),
        "loss_value": torch.where(advantage > 0, 0.8 * advantage**2, 0.2 * advantage**2).mean(),
        "entropy": -log_prob.mean(),
    }
    out, seen = run(loss, data)
    torch.testing.assert_close(out.detach().to_dict(), {k: x.detach() for k, x in wanted.items()}, **CLOSE)
    torch.testing.assert_close(seen["td_error"], squares.amax(0).detach(), **CLOSE)


@pytest.mark.parametrize("members", [1, 2])
def test_each_loss_trains_its_own_network_alone(members):
    loss = make(num_qvalue_nets=members)
    found = gradients(loss, run(loss, transitions())[0])
    for term, network in NETWORKS.items():
        for name, gradient in found[term].items():
            assert bool(gradient.any()) is name.startswith(network), (term, name)


def test_losses_of_one_sum_and_of_one_backward_each_are_the_same():
    one = make()
    each = copy.deepcopy(one)
    data = transitions()
    out, _ = run(one, data)
    sum(out[name] for name in NETWORKS).backward()
    out, _ = run(each, data)
    for name in NETWORKS:
        out[name].backward()
    for a, b in zip(one.parameters(), each.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, **CLOSE)


def test_networks_called_one_by_one_give_the_same():
    together, one_by_one, data = make(), make(deactivate_vmap=True), transitions()
    same_parameters(together, one_by_one)
    (a, seen_a), (b, seen_b) = run(together, data), run(one_by_one, data)
    torch.testing.assert_close(a.to_dict(), b.to_dict(), **CLOSE)
    torch.testing.assert_close(gradients(together, a), gradients(one_by_one, b), **CLOSE)
    torch.testing.assert_close(seen_a["td_error"], seen_b["td_error"], **CLOSE)


def test_no_network_is_called_twice_on_the_same():
    # TorchRL calls the value network and the target Q networks once for each loss that reads them.
    loss, calls = make(), []
    for name in ("qvalue_network", "value_network"):
        getattr(loss, name).module.register_forward_hook(lambda *_, name=name: calls.append(name))
    loss(transitions())
    # Q: two members, trained and target; V: of the observations and of the next ones.
    assert sorted(calls) == ["qvalue_network"] * 4 + ["value_network"] * 2


@pytest.mark.parametrize("aggregate", [False, True])
def test_several_action_heads_count_as_one_action(aggregate):
    class Value(nn.Linear):
        def forward(self, observation, steer, gear):
            return super().forward(torch.cat([observation, steer, gear.unsqueeze(-1)], -1))

    heads = [("car", "steer"), ("car", "gear")]
    with set_composite_lp_aggregate(aggregate):
        actor, data = composite_actor(), transitions(batch=(6,))
        qvalue = TensorDictModule(Value(OBSERVATION + 3, 1, **DOUBLE), ["observation", *heads], ["state_action_value"])
        data["car"] = actor(data.clone())["car"].detach()
        loss = IQLLoss(actor, qvalue, value_network())
        out, _ = run(loss, data)
        dists = actor.get_dist(data.clone()).dists
    log_prob = sum(dists[key].log_prob(data[key]) for key in heads)
    torch.testing.assert_close(out["entropy"], -log_prob.mean().detach(), **CLOSE)


# --- data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_qvalue_nets": 1}])
def test_nothing_after_a_terminal_step_matters(options):
    assert_terminal_observations_are_ignored(make(**options), transitions())


def test_a_step_that_terminates_without_being_done_is_terminal():
    data = transitions()
    data["next", "done"] = torch.zeros_like(data["next", "done"])
    assert_terminal_observations_are_ignored(make().make_value_estimator("TDLambda"), data)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_padding_does_not_count_in_any_loss(reduction):
    # TorchRL lets it count in that of the Q networks.
    assert_padding_is_ignored(make(reduction=reduction), transitions())


def test_padding_does_not_count_in_the_entropy():
    loss, data = make(), transitions()
    torch.testing.assert_close(loss(padded(data, 3.0))["entropy"], loss(data)["entropy"], **CLOSE)


def test_n_step_transitions_are_discounted_by_their_length():
    # TorchRL discounts them as if they had one step.
    data = transitions(batch=(6,))
    loss, other = make(), make()
    same_parameters(loss, other)
    loss.make_value_estimator(gamma=0.5)
    other.make_value_estimator(gamma=0.125)
    wanted = other(data.clone())["loss_qvalue"]
    data["steps_to_next_obs"] = torch.full((6, 1), 3)
    torch.testing.assert_close(loss(data)["loss_qvalue"], wanted, **CLOSE)


def test_priorities_weigh_all_losses_unless_they_are_not_to():
    # TorchRL writes priorities and ignores the weights that come back.
    loss, data = make(), transitions()
    weight = torch.rand(*data.shape, 1, **DOUBLE)
    plain, _ = run(loss, data)
    weighted = data.clone().set("priority_weight", weight)
    out, _ = run(loss, weighted)
    loss.reduction = "none"
    each, _ = run(loss, data)
    weight = weight.squeeze(-1)
    for name in NETWORKS:
        torch.testing.assert_close(out[name], (each[name] * weight).sum() / weight.sum(), **CLOSE)
    unweighted = make(use_prioritized_weights=False)
    same_parameters(loss, unweighted)
    torch.testing.assert_close(run(unweighted, weighted)[0].to_dict(), plain.to_dict(), **CLOSE)


def test_masks_of_numbers_and_integer_rewards_are_understood():
    loss, data = make(), transitions()
    data["next", "reward"] = data["next", "reward"].round()
    numbers = data.clone()
    numbers["next", "reward"] = numbers["next", "reward"].long()
    numbers["next", "done"] = numbers["next", "done"].int()
    numbers["next", "terminated"] = numbers["next", "terminated"].float()
    assert torch.equal(run(loss, numbers)[0]["loss_qvalue"], run(loss, data)[0]["loss_qvalue"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_keeps_the_discount_and_computes(dtype):
    loss = make(temperature=50.0).make_value_estimator(gamma=0.999)
    loss.to(dtype)
    assert loss.value_estimator.gamma == 0.999
    out, seen = run(loss, transitions().apply(lambda x: x.to(dtype) if x.is_floating_point() else x))
    assert {x.dtype for x in (*out.values(), seen["td_error"])} == {dtype}
    assert all(x.isfinite().all() for x in out.values())


def test_tensors_can_be_passed_instead_of_a_tensordict():
    loss, data = make(), transitions()
    tensors = {k if isinstance(k, str) else "_".join(k): v for k, v in data.items(True, True)}
    out = loss(data)
    for name, x in zip(loss.out_keys, loss(**tensors), strict=True):
        assert torch.equal(x, out[name])
    loss.select_out_keys("loss_qvalue", "loss_value")
    for name, x in zip(("loss_qvalue", "loss_value"), loss(**tensors), strict=True):
        assert torch.equal(x, out[name])


def test_only_the_priority_is_written():
    # TorchRL also writes the parameters of the distribution, and the log-probability.
    loss, data = make(), transitions()
    loss.set_keys(priority=("replay", "error"))
    _, seen = run(loss, data)
    assert set(seen.keys(True, True)) - set(data.keys(True, True)) == {("replay", "error")}
    assert seen["replay", "error"].shape == data.shape
    for key in data.keys(True, True):
        assert torch.equal(seen[key], data[key])


@pytest.mark.parametrize("mode", [None, "non_tensor", "exclude"])
def test_losses_per_sample_come_with_a_scalar_entropy_unless_it_is_excluded(mode):
    loss, data = make(reduction="none", scalar_output_mode=mode), transitions()
    out = loss(data)
    assert all(out[name].shape == data.shape for name in NETWORKS)
    assert set(out.keys()) - set(NETWORKS) == ({"entropy"} if mode != "exclude" else set())
    assert set(loss.out_keys) == set(out.keys())


# --- faults -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "match"),
    [
        ("action", r"'action'.*qvalue_network"),
        ("observation", r"'observation'"),
        (("next", "observation"), r"\('next', 'observation'\).*value_network"),
        (("next", "reward"), r"\('next', 'reward'\).*set_keys\(reward="),
    ],
)
def test_a_missing_entry_is_named(key, match):
    assert_rejected(make(), transitions().exclude(key), KeyError, match)


def test_rewards_that_would_broadcast_are_refused():
    data = transitions()
    data["next", "reward"] = data["next", "reward"].expand(*data.shape, 3)
    assert_rejected(make(), data, RuntimeError, r"\('next', 'reward'\)")


def test_a_log_probability_per_dimension_of_the_action_is_refused():
    loss = make(lambda: stochastic_actor(D.Normal))
    assert_rejected(loss, transitions(), RuntimeError, r"log-probability.*\(3, 5, 2\)")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"actor": deterministic_actor}, TypeError, r"actor_network.*distribution"),
        ({"expectile": 1.5}, ValueError, r"expectile"),
        ({"scalar_output_mode": "foo"}, ValueError, r"scalar_output_mode is 'foo'"),
        ({"num_qvalue_nets": 0}, ValueError, r"num_qvalue_nets"),
        ({"reduction": "foo"}, ValueError, r"foo"),
        ({"loss_function": "foo"}, ValueError, r"foo"),
        ({"gamma": 0.9}, TypeError, r"make_value_estimator"),
    ],
)
def test_an_option_without_a_meaning_is_refused(options, error, match):
    with pytest.raises(error, match=match):
        make(**options)


def test_a_missing_value_network_is_named():
    with pytest.raises(TypeError, match="value_network"):
        IQLLoss(stochastic_actor(), qvalue_network(), None)


# --- execution --------------------------------------------------------------------------------------------------


def test_compiled_is_eager():
    assert_compiles(lambda: make(expectile=0.8, temperature=3.0), transitions(), backend="eager")


def test_nothing_waits_for_the_device(monkeypatch):
    data = transitions()
    data["collector", "mask"] = torch.rand(data.shape) < 0.8
    data["priority_weight"] = torch.rand(data.shape, **DOUBLE)
    assert_no_host_sync(make(), data, monkeypatch)


def test_a_square_beyond_float16_is_finite_under_autocast():
    with torch.autocast("cpu", dtype=torch.float16):
        error = torch.full((4,), 300.0, dtype=torch.float16)
        assert expectile_loss(error, 0.5).allclose(torch.tensor(45000.0))
        assert expectile_loss(error.double(), 0.5).dtype == torch.float64
    assert expectile_loss(error / 300, 0.5).dtype == torch.float16


@pytest.mark.parametrize("expectile", [0.0, 1.0])
def test_an_expectile_at_the_end_of_its_range_is_refused(expectile):
    with pytest.raises(ValueError, match="expectile"):
        make(expectile=expectile)


def test_the_entropy_is_left_out_of_losses_per_sample_alone():
    assert "entropy" in make(scalar_output_mode="exclude")(transitions()).keys()  # noqa: SIM118  # a TensorDict is no dict
    assert "entropy" not in make(scalar_output_mode="exclude", reduction="none")(transitions()).keys()  # noqa: SIM118


def test_importance_weights_weigh_no_metric():
    loss, data = make(), transitions()
    wanted = run(loss, data)[0]["entropy"]
    data["priority_weight"] = torch.rand(data.shape, dtype=torch.float64)
    torch.testing.assert_close(run(loss, data)[0]["entropy"], wanted)
