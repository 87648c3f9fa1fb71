"""TD3: the equations, and what is promised beyond (or against) what TorchRL does."""

import copy
from types import SimpleNamespace

import pytest
import torch
from fusedrl.losses.functional.deterministic import smoothed_action
from fusedrl.losses.td3 import TD3Loss
from helpers_q import (
    ACTION,
    CLOSE,
    DOUBLE,
    StateAction,
    assert_compiles,
    assert_existing_entries_are_not_kept,
    assert_no_host_sync,
    assert_padding_is_ignored,
    assert_rejected,
    assert_terminal_observations_are_ignored,
    desynchronise_targets,
    deterministic_actor,
    gradients,
    qvalue_network,
    run,
    transitions,
)
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.utils.checkpoint import checkpoint


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(**options):
    if "action_spec" not in options:
        options.setdefault("bounds", (-1.0, 1.0))
    return desynchronise_targets(TD3Loss(deterministic_actor(), qvalue_network(), **options))


# --- the mathematics --------------------------------------------------------------------------------------------


def test_noise_is_clipped_before_the_action_is():
    low, high = torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 0.2])
    action, noise = torch.tensor([[0.9, 0.1], [-0.5, 0.1]]), torch.tensor([[0.05, 9.0], [-9.0, -9.0]])
    expected = torch.tensor([[0.95, 0.2], [-0.8, 0.0]])
    torch.testing.assert_close(smoothed_action(action, noise, 0.3, low, high), expected)


def test_the_action_that_was_taken_does_not_stand_in_for_the_policys_where_existing_entries_are_kept():
    assert_existing_entries_are_not_kept(make(), transitions())


def test_the_losses_are_the_equations():
    loss, data = make(num_qvalue_nets=3).make_value_estimator(gamma=0.5), transitions(batch=(6,))
    network, actor = loss.qvalue_network, loss.actor_network
    torch.manual_seed(1)  # as `run` does
    noise = (0.2 * torch.randn_like(data["action"])).clamp(-0.5, 0.5)

    def values(params, inputs):
        found = []
        for one in params.unbind(0):
            with one.to_module(network):
                found.append(network(inputs.clone())["state_action_value"].squeeze(-1))
        return torch.stack(found)

    with loss.target_actor_network_params.to_module(actor):
        following = actor(data["next"].clone())
    following["action"] = (following["action"] + noise).clamp(-1, 1)
    next_value = values(loss.target_qvalue_network_params, following).min(0).values
    mask = data["next", "terminated"].squeeze(-1)
    target = data["next", "reward"].squeeze(-1) + 0.5 * next_value.masked_fill(mask, 0)
    predicted = values(loss.qvalue_network_params, data)
    with loss.actor_network_params.to_module(actor):
        acted = actor(data.clone())

    out, seen = run(loss, data)
    wanted = {
        "loss_actor": -values(loss.qvalue_network_params, acted)[0].mean(),
        "loss_qvalue": torch.nn.functional.smooth_l1_loss(
            predicted, target.expand_as(predicted), reduction="none"
        ).sum(0).mean(),
        "pred_value": predicted,
        "state_action_value_actor": values(loss.qvalue_network_params, acted),
        "next_state_value": next_value,
        "target_value": target,
    }  # fmt: skip
    assert set(out.keys()) == set(loss.out_keys) == set(wanted)
    for name, x in wanted.items():
        torch.testing.assert_close(out[name].detach(), x.detach(), **CLOSE)
    torch.testing.assert_close(seen["td_error"], (predicted - target).square().amax(0).detach(), **CLOSE)


def test_either_loss_trains_its_own_networks_alone():
    loss = make()
    found = gradients(loss, run(loss, transitions())[0])
    for term, network in (("loss_actor", "actor_network"), ("loss_qvalue", "qvalue_network")):
        for name, gradient in found[term].items():
            assert bool(gradient.any()) is name.startswith(network), (term, name)


def test_metrics_hold_no_gradient():
    out, seen = run(make(), transitions())
    assert {name for name, x in out.items() if x.requires_grad} == {"loss_actor", "loss_qvalue"}
    assert not seen["td_error"].requires_grad


def test_losses_of_one_sum_and_of_one_backward_each_are_the_same():
    one = make()
    each = copy.deepcopy(one)
    data = transitions()
    out, _ = run(one, data)
    (out["loss_actor"] + out["loss_qvalue"]).backward()
    out, _ = run(each, data)
    out["loss_qvalue"].backward()
    out["loss_actor"].backward()
    for a, b in zip(one.parameters(), each.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, **CLOSE)


def test_networks_called_one_by_one_give_the_same():
    together = make()
    one_by_one = make(deactivate_vmap=True)
    one_by_one.load_state_dict(together.state_dict())
    data = transitions()
    (a, seen_a), (b, seen_b) = run(together, data), run(one_by_one, data)
    torch.testing.assert_close(a.to_dict(), b.to_dict(), **CLOSE)
    torch.testing.assert_close(gradients(together, a), gradients(one_by_one, b), **CLOSE)
    assert torch.allclose(seen_a["td_error"], seen_b["td_error"])


def test_the_ensemble_is_called_once_for_each_kind_of_action():
    calls = []
    loss = make(num_qvalue_nets=5)
    loss.qvalue_network.module.register_forward_hook(lambda *_: calls.append(1))
    loss(transitions())
    assert len(calls) == 3  # of the data, of the policy, of the next observations


# --- the bounds of the action -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bounds",
    [(-1, 1), [-1.0, 1.0], (torch.full((ACTION,), -1.0), 1), ([-1.0] * ACTION, torch.ones(1))],
    ids=["int", "list", "tensor", "mixed"],
)
def test_bounds_of_every_form_are_the_same(bounds):
    data, reference = transitions(), make(policy_noise=3.0)
    loss = make(policy_noise=3.0, bounds=bounds)
    state = {k: x for k, x in reference.state_dict().items() if k not in ("min_action", "max_action")}
    loss.load_state_dict(state, strict=False)
    assert torch.equal(run(loss, data)[0]["loss_qvalue"], run(reference, data)[0]["loss_qvalue"])


def test_any_object_with_a_space_is_a_spec():
    low, high = torch.full((ACTION,), -2.0), torch.full((ACTION,), 3.0)
    loss = make(action_spec=SimpleNamespace(space=SimpleNamespace(low=low, high=high)))
    assert torch.equal(loss.min_action, low)
    assert torch.equal(loss.max_action, high)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"bounds": None}, ValueError, r"either bounds or action_spec"),
        ({"bounds": (-1, 1), "action_spec": object()}, ValueError, r"not both"),
        ({"bounds": (1, -1)}, ValueError, r"above the greatest"),
        ({"bounds": (1,)}, ValueError, r"must be two"),
        ({"bounds": 3}, ValueError, r"must be two"),
        ({"action_spec": object()}, TypeError, r"space\.low"),
        ({"num_qvalue_nets": 0}, ValueError, r"num_qvalue_nets"),
        ({"reduction": "foo"}, ValueError, r"foo"),
        ({"loss_function": "foo"}, ValueError, r"foo"),
        ({"gamma": 0.9}, TypeError, r"make_value_estimator"),
    ],
)
def test_an_option_without_a_meaning_is_refused(options, error, match):
    with pytest.raises(error, match=match):
        make(**options)


def test_a_list_of_networks_must_have_the_number_that_is_said():
    with pytest.raises(ValueError, match="num_qvalue_nets is 2, but qvalue_network is a list of 3"):
        TD3Loss(deterministic_actor(), [qvalue_network() for _ in range(3)], bounds=(-1, 1))


@pytest.mark.parametrize("shape", [(3,), (5, 1), (7, 3, 5, ACTION)])
def test_bounds_that_would_broadcast_are_refused(shape):
    loss = make(bounds=(-torch.ones(shape), torch.ones(shape)))
    assert_rejected(loss, transitions(), RuntimeError, r"bounds of the action.*'action'")


def test_an_actor_that_writes_another_action_is_told_so():
    actor = TensorDictModule(deterministic_actor().module, ["observation"], ["torque"])
    loss = TD3Loss(actor, qvalue_network(), bounds=(-1, 1))
    data = transitions()
    data["next", "action"] = data["action"]
    assert_rejected(loss, data, KeyError, r"'action'.*'torque'.*set_keys\(action=")


# --- data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"deactivate_vmap": True}])
def test_nothing_after_a_terminal_step_matters(options):
    assert_terminal_observations_are_ignored(make(**options), transitions())


def test_a_step_that_terminates_without_being_done_is_terminal():
    data = transitions()
    data["next", "done"] = torch.zeros_like(data["next", "done"])
    assert_terminal_observations_are_ignored(make().make_value_estimator("TDLambda"), data)


def test_padding_does_not_count():
    assert_padding_is_ignored(make(), transitions(), random=True)


def test_priorities_weigh_both_losses():
    loss, data = make(), transitions()
    weight = torch.rand(*data.shape, 1, **DOUBLE)
    out, _ = run(loss, data.clone().set("priority_weight", weight))
    loss.reduction = "none"
    each, _ = run(loss, data)
    weight = weight.squeeze(-1)
    for name in ("loss_actor", "loss_qvalue"):
        torch.testing.assert_close(out[name], (each[name] * weight).sum() / weight.sum(), **CLOSE)


def test_masks_of_numbers_and_integer_rewards_are_understood():
    loss, data = make(), transitions()
    data["next", "reward"] = data["next", "reward"].round()
    numbers = data.clone()
    numbers["next", "reward"] = numbers["next", "reward"].long()
    numbers["next", "done"] = numbers["next", "done"].int()
    numbers["next", "terminated"] = numbers["next", "terminated"].float()
    assert torch.equal(run(loss, numbers)[0]["loss_qvalue"], run(loss, data)[0]["loss_qvalue"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_keeps_discount_and_bounds_and_computes(dtype):
    loss = make(bounds=(-0.7, 0.7)).make_value_estimator(gamma=0.999)
    loss.to(dtype)
    assert loss.value_estimator.gamma == 0.999
    assert loss.max_action == torch.tensor(0.7)
    out, seen = run(loss, transitions().apply(lambda x: x.to(dtype) if x.is_floating_point() else x))
    assert {x.dtype for x in (*out.values(), seen["td_error"])} == {dtype}
    assert all(x.isfinite().all() for x in out.values())


def test_tensors_can_be_passed_instead_of_a_tensordict():
    loss, data = make(policy_noise=0.0), transitions()
    tensors = {k if isinstance(k, str) else "_".join(k): v for k, v in data.items(True, True)}
    out = loss(data)
    for name, x in zip(loss.out_keys, loss(**tensors), strict=True):
        assert torch.equal(x, out[name])
    loss.select_out_keys("loss_qvalue", "target_value")
    assert [x.shape for x in loss(**tensors)] == [(), data.shape]


def test_only_the_priority_is_written():
    loss, data = make(), transitions()
    loss.set_keys(priority=("replay", "error"))
    _, seen = run(loss, data)
    assert set(seen.keys(True, True)) - set(data.keys(True, True)) == {("replay", "error")}
    assert seen["replay", "error"].shape == data.shape
    for key in data.keys(True, True):
        assert torch.equal(seen[key], data[key])


@pytest.mark.parametrize(
    ("key", "match"),
    [
        ("action", r"'action'.*qvalue_network"),
        (("next", "observation"), r"\('next', 'observation'\)"),
        (("next", "reward"), r"\('next', 'reward'\).*set_keys\(reward="),
    ],
)
def test_a_missing_entry_is_named(key, match):
    assert_rejected(make(), transitions().exclude(key), KeyError, match)


def test_rewards_that_would_broadcast_are_refused():
    data = transitions()
    data["next", "reward"] = data["next", "reward"].expand(*data.shape, 3)
    assert_rejected(make(), data, RuntimeError, r"'state_action_value'.*\('next', 'reward'\)")


# --- execution --------------------------------------------------------------------------------------------------


def test_compiled_is_eager():
    # The draws of compiled code aren't those of eager code.
    options = {"policy_noise": 0.0, "num_qvalue_nets": 3, "bounds": (-0.1, 0.1)}
    assert_compiles(lambda: make(**options), transitions(), backend="eager")


def test_nothing_waits_for_the_device(monkeypatch):
    data = transitions()
    data["collector", "mask"] = torch.rand(data.shape) < 0.8
    data["priority_weight"] = torch.rand(data.shape, **DOUBLE)
    assert_no_host_sync(make(), data, monkeypatch)


# --- gradient checkpointing -------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = StateAction()

    def forward(self, observation, action):
        return checkpoint(self.network, observation, action, use_reentrant=False)


def test_a_checkpoint_inside_of_an_ensemble_is_refused_as_its_parameters_would_be_another_members():
    network = TensorDictModule(Checkpointed(), ["observation", "action"], ["state_action_value"])
    loss, data = TD3Loss(deterministic_actor(), network, bounds=(-1.0, 1.0)), transitions()
    with pytest.raises(RuntimeError, match=r"qvalue_network is an ensemble.*checkpointing"):
        loss(data)
    with torch.no_grad():
        assert loss(data)["loss_qvalue"].isfinite()
    checkpoint(lambda: torch.ones(2, requires_grad=True).exp(), use_reentrant=False)  # is forbidden no longer


def test_a_checkpoint_around_the_loss_gives_the_same_gradients():
    network = TensorDictModule(Named(), ["observation", "action"], ["state_action_value"])
    loss, data = TD3Loss(deterministic_actor(), network, bounds=(-1.0, 1.0), policy_noise=0.0), transitions()

    def terms():
        out = loss(data.copy())
        return out["loss_actor"], out["loss_qvalue"]

    parameters = [p for p in loss.parameters() if p.requires_grad]
    plain = torch.autograd.grad(sum(terms()), parameters)
    kept = torch.autograd.grad(sum(checkpoint(terms, use_reentrant=False)), parameters)
    torch.testing.assert_close(plain, kept, **CLOSE)


class Named(StateAction):
    """No perceptron, whose members are called one by one."""

    def forward(self, observation, action):
        return super().forward(observation, action) * 1.0


# --- a TensorDict that can't be written -------------------------------------------------------------------------


def test_a_locked_tensordict_without_the_priority_is_refused_before_anything_is_computed():
    loss, data = make(), transitions().lock_()
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match=r"td_error.*locked"):
        loss(data)
    assert torch.equal(torch.get_rng_state(), state)
    data.unlock_().set("td_error", torch.zeros(data.shape, **DOUBLE)).lock_()
    loss(data)
    assert (data["td_error"] > 0).all()


def test_a_priority_below_a_locked_entry_is_refused_or_written_in_place():
    loss, data = make(), transitions()
    loss.set_keys(priority=("replay", "priority"))
    data["replay"] = TensorDict({}, data.batch_size).lock_()
    with pytest.raises(RuntimeError, match=r"'replay', 'priority'.*locked"):
        loss(data)
    data["replay"] = TensorDict({"priority": torch.zeros(data.shape, **DOUBLE)}, data.batch_size).lock_()
    loss(data)
    assert (data["replay", "priority"] > 0).all()


def test_a_discount_that_is_assigned_is_that_of_the_default_estimator():
    data = transitions()
    assigned, made = make(policy_noise=0.0), make(policy_noise=0.0)
    made.load_state_dict(assigned.state_dict())
    assigned.gamma = 0.5
    made.make_value_estimator(gamma=0.5)
    assert torch.equal(assigned(data)["loss_qvalue"], made(data)["loss_qvalue"])
