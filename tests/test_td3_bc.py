"""TD3+BC: the equations, what is promised beyond (or against) what TorchRL does, and where both agree."""

import copy
from inspect import signature

import pytest
import torch
from fusedrl.losses.functional.deterministic import cloning_error, value_weight
from fusedrl.losses.td3_bc import TD3BCLoss
from helpers_losses import OBSERVATION
from helpers_q import (
    ACTION,
    CLOSE,
    DOUBLE,
    StateAction,
    assert_no_host_sync,
    assert_padding_is_ignored,
    assert_parity,
    assert_rejected,
    assert_states_are_exchanged,
    assert_terminal_observations_are_ignored,
    desynchronise_targets,
    deterministic_actor,
    gradients,
    padded,
    qvalue_network,
    run,
    same_parameters,
    transitions,
)
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(**options):
    return desynchronise_targets(TD3BCLoss(deterministic_actor(), qvalue_network(), bounds=(-1.0, 1.0), **options))


# --- the mathematics --------------------------------------------------------------------------------------------


def test_the_cloning_error_is_a_mean_over_all_dimensions_of_an_action():
    action, data_action = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[[1.0, 0.0], [0.0, 4.0]]])
    assert cloning_error(action, data_action, 1).tolist() == [(4 + 9) / 4]
    assert cloning_error(action, data_action, 2).tolist() == [[2, 4.5]]
    assert cloning_error(action, data_action, 3).tolist() == [[[0, 4], [9, 0]]]


def test_a_value_without_a_preference_weighs_nothing():
    assert value_weight(torch.tensor(4.0), 2.0) == 0.5
    assert value_weight(torch.tensor(0.0), 2.0) == 0


def test_the_losses_are_the_equations():
    loss = make(num_qvalue_nets=3, alpha=1.5, policy_noise=0.0).make_value_estimator(gamma=0.5)
    data = transitions(batch=(6,))

    def values(params, inputs):
        found = []
        for one in params.unbind(0):
            with one.to_module(loss.qvalue_network):
                found.append(loss.qvalue_network(inputs.clone())["state_action_value"].squeeze(-1))
        return torch.stack(found)

    def acted(params, inputs):
        with params.to_module(loss.actor_network):
            return loss.actor_network(inputs.clone())

    following = acted(loss.target_actor_network_params, data["next"])
    next_value = values(loss.target_qvalue_network_params, following).min(0).values
    target = data["next", "reward"].squeeze(-1) + 0.5 * next_value * ~data["next", "terminated"].squeeze(-1)
    predicted = values(loss.qvalue_network_params, data)
    chosen = acted(loss.actor_network_params, data)
    value = values(loss.qvalue_network_params, chosen)[0]
    lmbd = 1.5 / value.abs().mean()
    cloning = (chosen["action"] - data["action"]).square().mean()

    out, seen = run(loss, data)
    distance = nn.functional.smooth_l1_loss(predicted, target.expand_as(predicted), reduction="none")
    wanted = {
        "loss_actor": cloning - lmbd * value.mean(),
        "loss_qvalue": distance.sum(0).mean(),
        "bc_loss": cloning,
        "lmbd": lmbd,
        "pred_value": predicted,
        "state_action_value_actor": value,
        "next_state_value": next_value,
        "target_value": target,
    }
    assert set(out.keys()) == set(loss.out_keys) == set(wanted)
    torch.testing.assert_close(out.detach().to_dict(), {k: x.detach() for k, x in wanted.items()}, **CLOSE)
    torch.testing.assert_close(seen["td_error"], (predicted - target).square().amax(0).detach(), **CLOSE)


@pytest.mark.parametrize("alpha", [0.0, 2.5])
def test_the_weight_of_the_value_is_a_constant_to_the_policy(alpha):
    loss, data = make(alpha=alpha), transitions(batch=(6,))
    out, _ = run(loss, data)
    found = gradients(loss, out)["loss_actor"]
    with loss.actor_network_params.to_module(loss.actor_network):
        chosen = loss.actor_network(data.clone())
    with loss.qvalue_network_params[0].to_module(loss.qvalue_network):
        value = loss.qvalue_network(chosen.copy())["state_action_value"]
    objective = (chosen["action"] - data["action"]).square().mean() - out["lmbd"].detach() * value.mean()
    parameters = {name: p for name, p in loss.named_parameters() if name.startswith("actor_network")}
    for name, wanted in zip(parameters, torch.autograd.grad(objective, parameters.values()), strict=True):
        torch.testing.assert_close(found[name], wanted, **CLOSE)


def test_the_scale_of_the_rewards_does_not_move_the_balance():
    # Q a thousand times as great: the same policy gradient.
    loss, data = make(), transitions()
    before = gradients(loss, run(loss, data)[0])["loss_actor"]
    with torch.no_grad():
        for x in loss.qvalue_network_params["module", "layers", "2"].values():
            x *= 1000
    after = gradients(loss, run(loss, data)[0])["loss_actor"]
    torch.testing.assert_close(after, before, **CLOSE)


def test_a_value_of_zero_leaves_the_cloning_alone():
    # TorchRL's λ is infinite then, and its loss NaN: with a last layer that starts from zero the policy is lost.
    loss, data = make(), transitions()
    with torch.no_grad():
        for x in loss.qvalue_network_params["module", "layers", "2"].values():
            x.zero_()
    out, _ = run(loss, data)
    assert out["lmbd"] == 0
    torch.testing.assert_close(out["loss_actor"].detach(), out["bc_loss"], **CLOSE)
    assert all(g.isfinite().all() for g in gradients(loss, out)["loss_actor"].values())


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


def test_only_the_first_network_judges_the_policy():
    loss, batched = make(num_qvalue_nets=5), []
    loss.qvalue_network.module.register_forward_hook(
        lambda net, *_: batched.append(torch._C._functorch.is_batchedtensor(net.layers[0].weight))
    )
    loss(transitions())
    assert batched.count(True) == 2  # of the data, of the next observations
    assert batched.count(False) == 1


# --- data -------------------------------------------------------------------------------------------------------


def test_nothing_after_a_terminal_step_matters():
    assert_terminal_observations_are_ignored(make(), transitions())


def test_a_step_that_terminates_without_being_done_is_terminal():
    data = transitions()
    data["next", "done"] = torch.zeros_like(data["next", "done"])
    assert_terminal_observations_are_ignored(make().make_value_estimator("TDLambda"), data)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_padding_does_not_count_in_any_loss(reduction):
    # TorchRL lets it count in the cloning, and in λ.
    assert_padding_is_ignored(make(policy_noise=0.0, reduction=reduction), transitions())


def test_padding_does_not_count_in_the_metrics():
    loss, data = make(policy_noise=0.0), transitions()
    a, b = loss(padded(data, float("nan"))), loss(data)
    for name in ("bc_loss", "lmbd"):
        torch.testing.assert_close(a[name], b[name], **CLOSE)


def test_a_batch_of_padding_alone_trains_nothing():
    loss, data = make(), transitions()
    data["collector", "mask"] = torch.zeros(data.shape, dtype=torch.bool)
    out, _ = run(loss, data)
    assert out["loss_actor"] == 0
    assert not any(g.any() for g in gradients(loss, out)["loss_actor"].values())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_sample_of_weight_three_counts_as_three(reduction):
    # TorchRL weighs the value, and not the cloning that it is balanced with.
    loss, data = make(policy_noise=0.0, reduction=reduction), transitions(batch=(3,))
    repeated = data[torch.tensor([0, 1, 1, 2, 2, 2])]
    data["priority_weight"] = torch.tensor([1.0, 2.0, 3.0], **DOUBLE)
    (a, _), (b, _) = run(loss, data), run(loss, repeated)
    names = ("loss_actor", "loss_qvalue", "bc_loss", "lmbd")
    torch.testing.assert_close(a.select(*names).to_dict(), b.select(*names).to_dict(), **CLOSE)
    torch.testing.assert_close(gradients(loss, a), gradients(loss, b), **CLOSE)


def test_weights_can_be_left_unread():
    plain, loss, data = make(), make(use_prioritized_weights=False), transitions()
    same_parameters(plain, loss)
    weighted = data.clone().set("priority_weight", torch.rand(data.shape, **DOUBLE))
    torch.testing.assert_close(run(loss, weighted)[0].to_dict(), run(plain, data)[0].to_dict(), **CLOSE)


def test_losses_per_sample_average_to_the_loss():
    loss, data = make(reduction="none"), transitions()
    each, _ = run(loss, data)
    loss.reduction = "mean"
    mean, _ = run(loss, data)
    for name in ("loss_actor", "loss_qvalue"):
        assert each[name].shape == data.shape
        torch.testing.assert_close(each[name].mean(), mean[name], **CLOSE)
    assert each["bc_loss"].shape == each["lmbd"].shape == ()


def test_masks_of_numbers_and_integer_rewards_are_understood():
    loss, data = make(), transitions()
    data["next", "reward"] = data["next", "reward"].round()
    numbers = data.clone()
    numbers["next", "reward"] = numbers["next", "reward"].long()
    numbers["next", "done"] = numbers["next", "done"].int()
    numbers["next", "terminated"] = numbers["next", "terminated"].float()
    assert torch.equal(run(loss, numbers)[0]["loss_qvalue"], run(loss, data)[0]["loss_qvalue"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_keeps_the_coefficients_and_computes(dtype):
    loss = make(alpha=0.3).make_value_estimator(gamma=0.999)
    loss.to(dtype)
    assert loss.value_estimator.gamma == 0.999
    assert loss.alpha == 0.3
    out, seen = run(loss, transitions().apply(lambda x: x.to(dtype) if x.is_floating_point() else x))
    assert {x.dtype for x in (*out.values(), seen["td_error"])} == {dtype}
    assert all(x.isfinite().all() for x in out.values())


def test_tensors_can_be_passed_instead_of_a_tensordict():
    loss, data = make(policy_noise=0.0), transitions()
    tensors = {k if isinstance(k, str) else "_".join(k): v for k, v in data.items(True, True)}
    out = loss(data)
    for name, x in zip(loss.out_keys, loss(**tensors), strict=True):
        assert torch.equal(x, out[name])
    loss.select_out_keys("loss_actor", "bc_loss")
    assert [x.shape for x in loss(**tensors)] == [(), ()]


def test_only_the_priority_is_written():
    loss, data = make(), transitions()
    loss.set_keys(priority=("replay", "error"))
    _, seen = run(loss, data)
    assert set(seen.keys(True, True)) - set(data.keys(True, True)) == {("replay", "error")}
    assert seen["replay", "error"].shape == data.shape
    for key in data.keys(True, True):
        assert torch.equal(seen[key], data[key])


# --- faults -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "match"),
    [
        ("action", r"'action'.*qvalue_network"),
        (("next", "observation"), r"\('next', 'observation'\)"),
        (("next", "reward"), r"TD3BCLoss.*\('next', 'reward'\).*set_keys\(reward="),
    ],
)
def test_a_missing_entry_is_named(key, match):
    assert_rejected(make(), transitions().exclude(key), KeyError, match)


def test_rewards_that_would_broadcast_are_refused():
    data = transitions()
    data["next", "reward"] = data["next", "reward"].expand(*data.shape, 3)
    assert_rejected(make(), data, RuntimeError, r"'state_action_value'.*\('next', 'reward'\)")


def test_an_action_that_would_broadcast_to_the_policys_is_refused():
    class Lenient(StateAction):
        def forward(self, observation, action):
            return super().forward(observation, action.expand(*observation.shape[:-1], ACTION))

    value = TensorDictModule(Lenient(), ["observation", "action"], ["state_action_value"])
    loss, data = TD3BCLoss(deterministic_actor(), value, bounds=(-1.0, 1.0)), transitions()
    data["action"] = data["action"][..., :1]
    assert_rejected(loss, data, RuntimeError, r"policy's action.*\(3, 5, 2\).*'action'.*\(3, 5, 1\)")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"alpha": -1.0}, ValueError, r"alpha must not be negative, but is -1"),
        ({"action_spec": object()}, ValueError, r"TD3BCLoss needs either bounds or action_spec"),
        ({"num_qvalue_nets": 0}, ValueError, r"num_qvalue_nets"),
        ({"reduction": "foo"}, ValueError, r"foo"),
        ({"loss_function": "foo"}, ValueError, r"foo"),
        ({"gamma": 0.9}, TypeError, r"make_value_estimator"),
    ],
)
def test_an_option_without_a_meaning_is_refused(options, error, match):
    with pytest.raises(error, match=match):
        make(**options)


def test_nothing_waits_for_the_device(monkeypatch):
    data = transitions()
    data["collector", "mask"] = torch.rand(data.shape) < 0.8
    data["priority_weight"] = torch.rand(data.shape, **DOUBLE)
    assert_no_host_sync(make(), data, monkeypatch)


# --- parity with TorchRL ----------------------------------------------------------------------------------------

OPTIONS = {
    "defaults": {},
    "l1": {"loss_function": "l1"},
    "l2": {"loss_function": "l2"},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "separate": {"separate_losses": True},
    "only_imitation": {"alpha": 0.0},
    "much_value": {"alpha": 40.0},
    "current_actor": {"delay_actor": False},
    "current_values": {"delay_qvalue": False},
    "one_network": {"num_qvalue_nets": 1},
    "three_networks": {"num_qvalue_nets": 3},
    "one_by_one": {"deactivate_vmap": True},
    "much_noise": {"policy_noise": 2.0, "noise_clip": 0.3},
    "narrow_bounds": {"bounds": (-0.1, 0.2)},
}


def both():
    return TD3BCLoss, pytest.importorskip("torchrl.objectives").TD3BCLoss


def pair(actor=deterministic_actor, value=qvalue_network, **options):
    """Our loss and TorchRL's, with the same parameters, of which the targets differ."""
    options = {"bounds": (-1.0, 1.0), **options}
    ours, other = (cls(actor(), value(), **options) for cls in both())
    desynchronise_targets(other)
    same_parameters(other, ours)
    return ours, other


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_outputs_gradients_and_priorities_agree(options):
    assert_parity(*pair(**options), transitions())


@pytest.mark.parametrize("estimator", ["TD0", "TD1", "TDLambda"])
def test_every_estimator_agrees(estimator):
    ours, other = pair()
    kinds = pytest.importorskip("torchrl.objectives").ValueEstimators
    ours.make_value_estimator(estimator, gamma=0.9)
    other.make_value_estimator(kinds[estimator], gamma=0.9)
    assert_parity(ours, other, transitions())


@pytest.mark.parametrize("data", [
    lambda: transitions(steps_to_next_obs=True), lambda: transitions()[0, 0], lambda: transitions(batch=(1,)),
], ids=["n_step", "single", "one_row"])  # fmt: skip
def test_data_of_every_form_agrees(data):
    assert_parity(*pair(), data())


def test_a_list_of_networks_agrees():
    assert_parity(*pair(value=lambda: [qvalue_network() for _ in range(3)], num_qvalue_nets=3), transitions())


def test_renamed_entries_agree():
    names = {"reward": "r", "terminated": "over", "done": "end", "priority": "error", "state_action_value": "q"}
    data = transitions().rename_key_("action", "torque")
    for key in ("reward", "terminated", "done"):
        data["next"].rename_key_(key, names[key])
    losses = pair(
        lambda: TensorDictModule(deterministic_actor().module, ["observation"], ["torque"]),
        lambda: TensorDictModule(StateAction(), ["observation", "torque"], ["q"]),
    )
    for loss in losses:
        loss.set_keys(action="torque", **names)
    assert_parity(*losses, data, priority="error")


@pytest.mark.parametrize("separate", [False, True])
def test_a_trunk_in_both_networks_gets_the_same_gradients(separate):
    def networks():
        torch.manual_seed(3)
        trunk = TensorDictModule(nn.Linear(OBSERVATION, OBSERVATION, **DOUBLE), ["observation"], ["hidden"])
        head = TensorDictModule(nn.Linear(OBSERVATION, ACTION, **DOUBLE), ["hidden"], ["action"])
        value = TensorDictModule(StateAction(), ["hidden", "action"], ["state_action_value"])
        return TensorDictSequential(trunk, head), TensorDictSequential(trunk, value)

    ours, other = (cls(*networks(), separate_losses=separate, bounds=(-1.0, 1.0)) for cls in both())
    desynchronise_targets(other)
    with torch.no_grad():
        theirs_by_name = {**dict(other.named_parameters()), **dict(other.named_buffers())}
        for key, x in (*ours.named_parameters(), *ours.named_buffers()):
            if key in theirs_by_name and 0 not in x.stride():  # what an ensemble shares is a view of the policy's
                x.copy_(theirs_by_name[key])
    assert_parity(ours, other, transitions())


@pytest.mark.parametrize("options", [{}, {"delay_actor": False, "delay_qvalue": False}, {"num_qvalue_nets": 1}])
def test_states_are_exchanged(options):
    ours, other = pair(**options)
    for loss in (ours, other):
        loss.make_value_estimator(gamma=0.9)
    assert_states_are_exchanged(ours, other)


def test_signature_keys_and_output_are_those_of_torchrl():
    ours, other = pair()
    wanted = {n: p.default for n, p in signature(type(other).__init__).parameters.items() if n != "priority_key"}
    assert {n: p.default for n, p in signature(TD3BCLoss.__init__).parameters.items()} == wanted
    assert vars(ours.default_keys()) == vars(other._AcceptedKeys())
    assert ours.out_keys == other.out_keys
