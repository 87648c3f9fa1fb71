"""What SAC, its discrete form and REDQ promise alike: gradients, priorities, the temperature, data that is awkward."""

import copy
import math

import pytest
import torch
from fusedrl.losses.functional.soft_actor_critic import (
    categorical_entropy,
    expected_soft_value,
    soft_value,
    temperature_loss,
)
from fusedrl.losses.redq import REDQLoss
from fusedrl.losses.sac import SACLoss
from fusedrl.losses.targets import SoftUpdate
from fusedrl.losses.tqc import TQCLoss
from helpers_losses import DOUBLE, OBSERVATION, squashed_normal
from helpers_q import (
    ACTION,
    CLOSE,
    action_values,
    assert_compiles,
    assert_no_host_sync,
    assert_padding_is_ignored,
    assert_rejected,
    assert_terminal_observations_are_ignored,
    deterministic_actor,
    gradients,
    poisoned,
    qvalue_network,
    run,
    same_parameters,
    stochastic_actor,
    transitions,
)
from helpers_sac import (
    LOSSES,
    continuous,
    made,
    redq,
    sac,
    sac_with_value,
    two_headed_actor,
    two_headed_qvalue,
)
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

every_loss = pytest.mark.parametrize("name", LOSSES)
TERMS = {"loss_actor": "actor_network", "loss_qvalue": "qvalue_network", "loss_value": "value_network"}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def losses_of(out):
    return {name: x for name, x in out.items() if name.startswith("loss_")}


# --- the equations ----------------------------------------------------------------------------------------------


def test_soft_value_pays_for_an_action_that_was_unlikely():
    value = soft_value(torch.tensor([1.0, 1.0]), torch.tensor([-3.0, 0.5]), 0.5)
    assert value.tolist() == [2.5, 0.75]


def test_expected_soft_value_is_the_expectation_of_the_soft_value():
    values = torch.tensor([[4.0, 2.0, 1.0]])
    log_prob = torch.tensor([[0.5, 0.25, 0.25]]).log()
    expected = 0.5 * soft_value(values, log_prob, 0.3)[:, 0] + 0.25 * soft_value(values, log_prob, 0.3)[:, 1:].sum(-1)
    torch.testing.assert_close(expected_soft_value(values, log_prob, 0.3), expected)


def test_actions_that_cannot_be_taken_count_for_nothing():
    logits = torch.tensor([0.0, 0.0, -math.inf], requires_grad=True)
    log_prob = logits.log_softmax(-1)
    value = expected_soft_value(torch.tensor([1.0, 3.0, 100.0]), log_prob, 1.0)
    assert value.item() == pytest.approx(2 + math.log(2))
    assert categorical_entropy(log_prob).item() == pytest.approx(math.log(2))
    (gradient,) = torch.autograd.grad(value, logits)
    assert gradient.tolist() == [-0.5, 0.5, 0.0]


def test_the_temperature_rises_where_entropy_is_short_and_falls_where_it_abounds():
    log_alpha = torch.tensor(0.0, requires_grad=True)
    for entropy, direction in ((1.0, -1), (3.0, 1), (2.0, 0)):
        loss = temperature_loss(torch.tensor(entropy), log_alpha, 2.0)
        (gradient,) = torch.autograd.grad(loss, log_alpha)
        assert gradient.sign() == direction


# --- what each term trains --------------------------------------------------------------------------------------


@every_loss
def test_each_loss_trains_its_own_network_and_no_other(name):
    loss, data = made(name)
    out, _ = run(loss, data)
    trained = {
        term: {parameter.split(".")[0] for parameter, g in found.items() if g.any()}
        for term, found in gradients(loss, out).items()
    }
    assert trained.pop("loss_alpha") == {"log_alpha"}
    assert trained == {term: {f"{TERMS[term]}_params"} for term in trained}
    assert set(trained) == set(losses_of(out)) - {"loss_alpha"}


@every_loss
def test_one_backward_pass_of_the_sum_is_one_for_each_loss(name):
    loss, data = made(name)
    each = copy.deepcopy(loss)
    sum(losses_of(run(loss, data)[0]).values()).backward()
    for term in losses_of(run(each, data)[0]).values():
        term.backward()
    for (key, p), q in zip(loss.named_parameters(), each.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=key, **CLOSE)


@every_loss
def test_metrics_hold_no_gradient_and_only_the_priority_is_written(name):
    loss, data = made(name)
    out, seen = run(loss, data)
    for key, x in out.items():
        assert x.requires_grad is key.startswith("loss_"), key
    assert set(seen.keys(True, True)) == {*data.keys(True, True), "td_error"}
    assert not seen["td_error"].requires_grad
    assert seen["td_error"].shape == data.shape
    torch.testing.assert_close(seen.exclude("td_error").to_dict(), data.to_dict(), rtol=0, atol=0)


# --- reduction, weights, padding --------------------------------------------------------------------------------


@every_loss
def test_losses_per_sample_average_and_add_up_to_the_others(name):
    each, mean, total = (made(name, reduction=reduction) for reduction in ("none", "mean", "sum"))
    same_parameters(each[0], mean[0], total[0])
    a, b, c = (run(loss, each[1])[0] for loss, _ in (each, mean, total))
    for term in losses_of(a):
        assert a[term].shape[-2:] == each[1].shape
        torch.testing.assert_close(a[term].mean(), b[term], **CLOSE)
        torch.testing.assert_close(a[term].sum(), c[term], **CLOSE)
    torch.testing.assert_close(a["entropy"], b["entropy"], **CLOSE)


@pytest.mark.parametrize("mode", [None, "exclude", "non_tensor"])
@every_loss
def test_metrics_can_be_left_out_of_losses_per_sample(name, mode):
    loss, data = made(name, reduction="none", scalar_output_mode=mode)
    out, _ = run(loss, data)
    assert ("alpha" in out.keys()) is (mode != "exclude")  # noqa: SIM118  # a TensorDict is no dict
    assert set(loss.out_keys) == set(out.keys())
    assert "alpha" in made(name, scalar_output_mode=mode)[0].out_keys


@pytest.mark.parametrize("trailing", [(), (1,)], ids=["B", "B1"])
@every_loss
def test_importance_weights_weigh_every_loss(name, trailing):
    each, data = made(name, reduction="none")
    mean, _ = made(name)
    same_parameters(each, mean)
    unweighted, _ = run(each, data)
    weights = torch.rand(data.shape, dtype=torch.float64)
    data["priority_weight"] = weights.reshape(*data.shape, *trailing)
    weighted, _ = run(mean, data)
    for term, x in losses_of(unweighted).items():
        expected = (x * weights).sum() / weights.expand_as(x).sum()
        torch.testing.assert_close(weighted[term], expected, **CLOSE)
    mean.use_prioritized_weights = False
    torch.testing.assert_close(run(mean, data)[0]["loss_qvalue"], unweighted["loss_qvalue"].mean(), **CLOSE)


@every_loss
def test_padding_does_not_count(name):
    assert_padding_is_ignored(*made(name), random=True)


# --- where trajectories end -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sac", "sac_with_value", "discrete_sac"])
def test_nothing_after_a_terminal_step_matters(name):
    assert_terminal_observations_are_ignored(*made(name))


@every_loss
def test_a_policy_that_is_nan_after_a_terminal_step_does_not_matter(name):
    loss, data = made(name)
    data = poisoned(data)
    del data["observation"]  # then there is nothing to take in its place but 0
    data["observation"] = torch.zeros_like(data["next", "observation"])
    out, seen = run(loss, data)
    assert all(x.isfinite().all() for x in losses_of(out).values())
    assert all(g.isfinite().all() for found in gradients(loss, out).values() for g in found.values())
    assert seen["td_error"].isfinite().all()


@every_loss
def test_a_step_that_terminates_without_being_done_has_no_next_value(name):
    loss, data = made(name)
    data["next", "terminated"] = torch.ones_like(data["next", "done"])
    data["next", "done"] = torch.zeros_like(data["next", "done"])
    out, seen = run(loss, data)
    data["next", "done"] = torch.ones_like(data["next", "done"])
    expected, also_seen = run(loss, data)
    torch.testing.assert_close(out["loss_qvalue"], expected["loss_qvalue"], **CLOSE)
    torch.testing.assert_close(seen["td_error"], also_seen["td_error"], **CLOSE)


@every_loss
def test_done_stands_in_for_a_missing_terminated(name):
    loss, data = made(name)
    data["next", "terminated"] = data["next", "done"]
    expected, _ = run(loss, data)
    torch.testing.assert_close(run(loss, data.exclude(("next", "terminated")))[0].to_dict(), expected.to_dict())


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
@every_loss
def test_masks_of_numbers_and_integer_rewards_are_understood(name, dtype):
    loss, data = made(name)
    data["next", "reward"] = data["next", "reward"].round()
    expected, _ = run(loss, data)
    for key in ("done", "terminated"):
        data["next", key] = data["next", key].to(dtype) * 3
    data["next", "reward"] = data["next", "reward"].long()
    torch.testing.assert_close(run(loss, data)[0].to_dict(), expected.to_dict(), **CLOSE)


@every_loss
def test_skipping_done_states_leaves_the_value_after_a_truncation(name):
    if name == "redq":
        pytest.skip("has no such option")
    (loss, data), (skipping, _) = made(name), made(name, skip_done_states=True)
    same_parameters(loss, skipping)
    data["next", "done"][0], data["next", "terminated"][0] = True, False
    torch.testing.assert_close(run(skipping, data)[0].to_dict(), run(loss, data)[0].to_dict(), **CLOSE)


@pytest.mark.parametrize("batch", [(), (0,), (7,), (2, 3, 2)])
@every_loss
def test_any_batch_shape(name, batch, monkeypatch):
    if 0 in batch:
        if name != "discrete_sac":
            pytest.skip("torch.distributions.Independent can't be empty")
        monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)  # nor can what is validated
    loss, data = made(name, batch, reduction="none")
    out, seen = run(loss, data)
    assert seen["td_error"].shape == batch
    assert all(x.shape[x.ndim - len(batch) :] == batch for x in losses_of(out).values())


# --- the temperature --------------------------------------------------------------------------------------------


@every_loss
def test_alpha_starts_where_it_is_told(name):
    out, _ = run(*made(name, alpha_init=0.3))
    assert out["alpha"].item() == pytest.approx(0.3)


@pytest.mark.parametrize(("start", "bound"), [(9.0, 2.0), (-9.0, 0.5)])
@every_loss
def test_alpha_returns_between_its_bounds_and_goes_on_learning(name, start, bound):
    loss, data = made(name, min_alpha=0.5, max_alpha=2.0)
    with torch.no_grad():
        loss.log_alpha.fill_(start)
    out, _ = run(loss, data)
    assert out["alpha"].item() == pytest.approx(bound)
    assert loss.log_alpha.item() == pytest.approx(math.log(bound))
    assert torch.autograd.grad(out["loss_alpha"], loss.log_alpha)[0] != 0


@every_loss
def test_a_fixed_alpha_is_no_parameter_and_its_loss_trains_nothing(name):
    loss, data = made(name, fixed_alpha=True, alpha_init=0.5)
    assert "log_alpha" not in dict(loss.named_parameters())
    out, _ = run(loss, data)
    assert not out["loss_alpha"].requires_grad
    assert out["alpha"] == 0.5


@every_loss
def test_learning_moves_alpha_until_the_entropy_is_the_target(name):
    loss, data = made(name, target_entropy=100.0)  # more than there is
    optimizer = torch.optim.SGD([loss.log_alpha], lr=1e-2)
    before = run(loss, data)[0]
    before["loss_alpha"].backward()
    optimizer.step()
    assert run(loss, data)[0]["alpha"] > before["alpha"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_loss
def test_a_cast_keeps_discount_and_temperature(name, dtype):
    loss, data = made(name, alpha_init=0.3, min_alpha=0.1, max_alpha=3.0)
    loss.make_value_estimator(gamma=0.999)
    loss.log_alpha.grad = torch.full((), 1e-9)
    before = {key: x.clone() for key, x in loss.state_dict().items() if "_params" not in key}
    loss = loss.to(dtype)
    after = loss.state_dict()
    for key, x in before.items():
        torch.testing.assert_close(after[key], x, rtol=0, atol=0)
    assert (loss.log_alpha.grad.dtype, loss.log_alpha.grad.item()) == (torch.float32, pytest.approx(1e-9))
    data = data.apply(lambda x: x.to(dtype) if x.is_floating_point() else x)
    out, _ = run(loss, data)
    assert {x.dtype for key, x in out.items() if key != "loss_alpha" and key.startswith("loss_")} == {dtype}


# --- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry", ["action", "observation", ("next", "observation"), ("next", "reward"), ("next", "done")], ids=str
)
@every_loss
def test_a_missing_entry_is_named(name, entry):
    loss, data = made(name)
    last = entry if isinstance(entry, str) else entry[-1]
    assert_rejected(loss, data.exclude(entry, ("next", "terminated")), KeyError, f"{type(loss).__name__}.*'{last}'")


@every_loss
def test_a_reward_of_another_shape_is_refused(name):
    loss, data = made(name)
    data["next", "reward"] = data["next", "reward"].expand(3, 5, 2).clone()
    assert_rejected(loss, data, RuntimeError, r"\('next', 'reward'\) has shape \(3, 5, 2\)")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "foo"}, "reduction is 'foo'"),
        ({"loss_function": "foo"}, "loss_function is 'foo'"),
        ({"num_qvalue_nets": 0}, "num_qvalue_nets must be at least 1, but is 0"),
        ({"alpha_init": 0.0}, "alpha_init must be positive, but is 0.0"),
        ({"min_alpha": -1.0}, "min_alpha must be positive, but is -1.0"),
        ({"min_alpha": 3.0, "max_alpha": 2.0}, "min_alpha is 3.0, which is more than max_alpha, 2.0"),
        ({"target_entropy": "foo"}, "target_entropy must be a number or 'auto', but is 'foo'"),
        ({"scalar_output_mode": "foo"}, "scalar_output_mode is 'foo'"),
        ({"use_prioritized_weights": "foo"}, "use_prioritized_weights is 'foo'"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
@every_loss
def test_options_that_cannot_be_used_are_refused_when_the_loss_is_made(name, options, message):
    with pytest.raises(ValueError, match=message):
        made(name, **options)


@every_loss
def test_half_a_network_is_refused(name):
    with pytest.raises(TypeError, match="num_qvalue_nets must be an int, but is a float"):
        made(name, num_qvalue_nets=2.5)


@every_loss
def test_a_policy_without_a_distribution_is_refused(name):
    make, _ = LOSSES[name]
    cls = type(make())
    with pytest.raises(TypeError, match=r"needs an actor_network that has a distribution.*TensorDictModule"):
        cls(deterministic_actor(), qvalue_network(), target_entropy=-1.0)
    actor = deterministic_actor()
    actor.get_dist = lambda data: None  # as TorchRL's Actor has one
    with pytest.raises(TypeError, match="needs an actor_network that has a distribution"):
        cls(actor, qvalue_network(), target_entropy=-1.0)


def test_a_policy_of_the_other_kind_of_action_is_refused():
    loss, data = made("discrete_sac")
    for make in (sac, sac_with_value, redq):
        other = make()
        other.actor_network, other.actor_network_params = loss.actor_network, loss.actor_network_params
        assert_rejected(other, made("sac")[1], TypeError, "differentiable function.*DiscreteSACLoss")
    loss.actor_network, loss.actor_network_params = sac().actor_network, sac().actor_network_params
    assert_rejected(loss, data, TypeError, "distribution has logits.*SACLoss")


@every_loss
def test_a_list_of_networks_must_be_as_long_as_the_ensemble(name):
    cls = type(LOSSES[name][0]())
    network = action_values if name == "discrete_sac" else qvalue_network
    actor = made(name)[0].actor_network
    assert cls(actor, [network() for _ in range(3)], num_qvalue_nets=3, target_entropy=-1.0).num_qvalue_nets == 3
    with pytest.raises(ValueError, match="num_qvalue_nets is 2, but qvalue_network is a list of 3"):
        cls(actor, [network() for _ in range(3)], num_qvalue_nets=2, target_entropy=-1.0)


# --- running it -------------------------------------------------------------------------------------------------


@every_loss
def test_networks_called_one_by_one_give_the_numbers_of_the_ensemble(name):
    (loss, data), (in_turn, _) = made(name), made(name, deactivate_vmap=True)
    same_parameters(loss, in_turn)
    (a, _), (b, _) = run(loss, data), run(in_turn, data)
    torch.testing.assert_close(b.detach().to_dict(), a.detach().to_dict(), **CLOSE)
    torch.testing.assert_close(gradients(in_turn, b), gradients(loss, a), **CLOSE)


@every_loss
def test_compiled_is_eager(name):
    options = {"min_alpha": 1.5, "max_alpha": 2.0}  # so that the call moves log α
    if name != "discrete_sac":
        options["distribution"] = squashed_normal
    _, data = made(name)
    assert_compiles(lambda: made(name, **options)[0], data, backend="aot_eager" if name == "sac" else "eager")


@every_loss
def test_nothing_waits_for_the_device(name, monkeypatch):
    loss, data = made(name, min_alpha=0.5)
    assert_no_host_sync(loss, data, monkeypatch)


@every_loss
def test_tensors_can_be_passed_instead_of_a_tensordict(name):
    loss, data = made(name, (4,))
    flat = {"_".join((key,) if isinstance(key, str) else key): x for key, x in data.items(True, True)}
    torch.manual_seed(1)
    found = loss(**flat)
    out, _ = run(loss, data)
    torch.testing.assert_close(dict(zip(loss.out_keys, found, strict=True)), out.to_dict(), **CLOSE)
    loss.select_out_keys("loss_qvalue", "alpha")
    torch.manual_seed(1)
    torch.testing.assert_close(loss(**flat), (out["loss_qvalue"], out["alpha"]), **CLOSE)


@every_loss
def test_entries_can_have_other_names(name):
    loss, data = made(name)
    expected, seen = run(loss, data)
    data["next", "gain"] = data["next"].pop("reward")
    data["weight"] = torch.full(data.shape, 2.0, dtype=torch.float64)
    loss.set_keys(reward="gain", priority="surprise", priority_weight="weight")
    out, also_seen = run(loss, data)
    torch.testing.assert_close(out.to_dict(), expected.to_dict(), **CLOSE)
    torch.testing.assert_close(also_seen["surprise"], seen["td_error"], **CLOSE)


@pytest.mark.parametrize("estimator", ["TD1", "TDLambda"])
@every_loss
def test_other_estimators_see_the_loss_s_next_value(name, estimator):
    loss, data = made(name)
    loss.make_value_estimator(estimator, gamma=0.9)
    out, _ = run(loss, data)
    one_step, _ = run(loss.make_value_estimator("TD0", gamma=0.9), data)
    assert out["loss_qvalue"] != one_step["loss_qvalue"]
    torch.testing.assert_close(out["loss_actor"], one_step["loss_actor"], **CLOSE)
    data["next", "done"] = torch.ones_like(data["next", "done"])  # then there is but one step to sum over
    single, _ = run(loss.make_value_estimator(estimator, gamma=0.9), data)
    torch.testing.assert_close(single["loss_qvalue"], one_step["loss_qvalue"], **CLOSE)


@every_loss
def test_the_advantage_estimator_is_refused(name):
    with pytest.raises(NotImplementedError, match=r"TD0.*TD1.*TDLambda"):
        made(name)[0].make_value_estimator("GAE")


@every_loss
def test_next_values_of_n_step_data_are_discounted_n_times(name):
    loss, data = made(name)
    loss.make_value_estimator("TD0", gamma=0.5)
    data["steps_to_next_obs"] = torch.full((*data.shape, 1), 3)
    out, _ = run(loss, data)
    expected, _ = run(loss.make_value_estimator("TD0", gamma=0.125), data.exclude("steps_to_next_obs"))
    torch.testing.assert_close(out["loss_qvalue"], expected["loss_qvalue"], **CLOSE)


@every_loss
def test_the_q_networks_learn_a_batch_by_heart(name):
    loss, data = made(name, (8,))
    targets = SoftUpdate(loss, tau=0.005)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
    history = []
    for _ in range(60):
        out = loss(data)
        optimizer.zero_grad()
        sum(losses_of(out).values()).backward()
        optimizer.step()
        targets.step()
        history.append(out["loss_qvalue"].item())
    assert sum(history[-10:]) < 0.7 * sum(history[:10])


@pytest.mark.parametrize("cls", [SACLoss, REDQLoss])
def test_the_log_probabilities_of_several_heads_add_up(cls):
    loss = cls(two_headed_actor(), two_headed_qvalue(), target_entropy=-2.0)
    assert loss.tensor_keys.action == [("car", "steer"), ("car", "brake")]
    data = continuous()
    data["car"] = TensorDict({"steer": data["action"][..., :1], "brake": data.pop("action")[..., 1:]}, data.shape)
    out, _ = run(loss, data)
    for p in loss.actor_network_params.values(True, True):
        p.data.zero_()  # two standard normal variables
    many = data[:1, :1].expand(100, 100).clone()
    out, _ = run(loss, many)
    # The standard error of a mean over 10 000 draws of a variable whose standard deviation is 1.
    assert out["entropy"].item() == pytest.approx(math.log(2 * math.pi) + 1, abs=0.05)
    assert all(g.isfinite().all() for found in gradients(loss, out).values() for g in found.values())


@every_loss
def test_alpha_is_between_its_bounds_before_a_call_moves_it_there(name):
    loss, _ = made(name, min_alpha=0.5, max_alpha=2.0)
    for start, bound in ((9.0, 2.0), (-9.0, 0.5)):
        with torch.no_grad():
            loss.log_alpha.fill_(start)
        assert loss.alpha.item() == pytest.approx(bound)


@every_loss
def test_alpha_can_have_one_value_only(name):
    out, _ = run(*made(name, min_alpha=0.5, max_alpha=0.5))
    assert out["alpha"].item() == pytest.approx(0.5)


class OnTrunk(nn.Module):
    """A layer on ``trunk``, and what comes besides the observation."""

    def __init__(self, trunk, head):
        super().__init__()
        self.trunk, self.head = trunk, head

    def forward(self, observation, *rest):
        return self.head(torch.cat([self.trunk(observation), *rest], -1))


@pytest.mark.parametrize("cls", [REDQLoss, TQCLoss])
def test_a_trunk_in_common_is_trained_by_the_policys_loss_alone_where_losses_are_separate(cls):
    trunk, actor = nn.Linear(OBSERVATION, OBSERVATION, **DOUBLE), stochastic_actor()
    actor[0].module = OnTrunk(trunk, actor[0].module)
    judge = OnTrunk(trunk, nn.Linear(OBSERVATION + ACTION, 1 if cls is REDQLoss else 4, **DOUBLE))
    qvalue = TensorDictModule(judge, ["observation", "action"], ["state_action_value"])
    loss = cls(actor, qvalue, num_qvalue_nets=3, target_entropy=-2.0, separate_losses=True)
    found = gradients(loss, run(loss, transitions())[0])
    assert not any(g.any() for name, g in found["loss_qvalue"].items() if "trunk" in name)
    assert any(g.any() for name, g in found["loss_actor"].items() if "trunk" in name)
    assert not any(name.startswith("qvalue_network_params") and "trunk" in name for name, _ in loss.named_parameters())


@every_loss
def test_a_bound_from_above_alone_holds(name):
    loss, data = made(name, min_alpha=None, max_alpha=2.0)
    with torch.no_grad():
        loss.log_alpha.fill_(9.0)
    assert run(loss, data)[0]["alpha"].item() == pytest.approx(2.0)


@every_loss
def test_a_target_entropy_that_is_no_number_is_refused(name):
    with pytest.raises(ValueError, match="target_entropy must be a number or 'auto', but is True"):
        made(name, target_entropy=True)
