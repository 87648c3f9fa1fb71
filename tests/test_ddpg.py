"""DDPG: the equations, and what is promised beyond (or against) what TorchRL does."""

import copy

import pytest
import torch
from fusedrl.losses.ddpg import DDPGLoss
from fusedrl.losses.targets import SoftUpdate
from helpers_losses import OBSERVATION
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
    padded,
    qvalue_network,
    run,
    transitions,
)
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(**options):
    return desynchronise_targets(DDPGLoss(deterministic_actor(), qvalue_network(), **options))


def with_trunk(**options):
    trunk = TensorDictModule(nn.Linear(OBSERVATION, OBSERVATION, **DOUBLE), ["observation"], ["hidden"])
    head = TensorDictModule(nn.Linear(OBSERVATION, ACTION, **DOUBLE), ["hidden"], ["action"])
    value = TensorDictModule(StateAction(), ["hidden", "action"], ["state_action_value"])
    return DDPGLoss(TensorDictSequential(trunk, head), TensorDictSequential(trunk, value), **options)


# --- the equations ----------------------------------------------------------------------------------------------


def test_the_losses_of_a_linear_case_are_those_found_by_hand():
    class Sum(nn.Module):  # Q(s, a) = w (s + a)
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(2.0))

        def forward(self, observation, action):
            return self.w * (observation + action)

    actor = TensorDictModule(nn.Linear(1, 1, bias=False), ["observation"], ["action"])
    nn.init.constant_(actor.module.weight, 3.0)
    loss = DDPGLoss(actor, TensorDictModule(Sum(), ["observation", "action"], ["state_action_value"]))
    loss.make_value_estimator(gamma=0.5)
    following = {
        "observation": torch.tensor([[1.0], [1.0]]),
        "reward": torch.tensor([[1.0], [1.0]]),
        "done": torch.tensor([[False], [True]]),
        "terminated": torch.tensor([[False], [True]]),
    }
    data = TensorDict({"observation": torch.ones(2, 1), "action": torch.tensor([[0.0], [4.0]]), "next": following}, [2])
    out = loss(data)
    # π(1) = 3 and Q(1, 3) = 8 everywhere; y = 1 + 0.5 · 8 and, after the terminal step, 1; Q(s, a) = 2 and 10.
    assert out["loss_actor"] == -8
    assert out["loss_value"] == ((2 - 5) ** 2 + (10 - 1) ** 2) / 2
    assert out["pred_value"].tolist() == [2, 10]
    assert out["target_value"].tolist() == [5, 1]
    assert (out["pred_value_max"], out["target_value_max"]) == (10, 5)
    assert data["td_error"].tolist() == out["td_error"].tolist() == [9, 81]
    (-out["loss_actor"]).backward()
    assert actor.module.weight.grad == 2  # dQ/da · dπ/dw = w · s


def test_either_loss_trains_its_own_network_alone():
    loss = make()
    found = gradients(loss, run(loss, transitions())[0])
    for term, network in (("loss_actor", "actor_network"), ("loss_value", "value_network")):
        for name, gradient in found[term].items():
            assert bool(gradient.any()) is name.startswith(network), (term, name)


def test_metrics_hold_no_gradient():
    out, seen = run(make(), transitions())
    assert {name for name, x in out.items() if x.requires_grad} == {"loss_actor", "loss_value"}
    assert not seen["td_error"].requires_grad


def test_losses_of_one_sum_and_of_one_backward_each_are_the_same():
    one = make()
    each = copy.deepcopy(one)
    data = transitions()
    out = one(data.clone())
    (out["loss_actor"] + out["loss_value"]).backward()
    out = each(data.clone())
    out["loss_value"].backward()
    out["loss_actor"].backward()
    for a, b in zip(one.parameters(), each.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, **CLOSE)


# --- networks ---------------------------------------------------------------------------------------------------


def test_the_target_of_a_trunk_in_both_networks_lags_behind():
    # TorchRL's first call puts the trained trunk in the place of the target's.
    loss = desynchronise_targets(with_trunk())
    key = ("module", "0", "module", "weight")
    before = loss.target_value_network_params[key].clone()
    loss(transitions())
    assert torch.equal(loss.target_value_network_params[key], before)
    assert not torch.equal(loss.value_network_params[key], before)


def test_separate_losses_leave_a_common_trunk_to_the_policy():
    trunk = "actor_network_params.module.0.module.weight"
    for separate in (False, True):
        loss = with_trunk(separate_losses=separate)
        found = gradients(loss, run(loss, transitions())[0])
        assert found["loss_actor"][trunk].any()
        assert bool(found["loss_value"][trunk].any()) is not separate


def test_the_action_that_was_taken_does_not_stand_in_for_the_policys_where_existing_entries_are_kept():
    assert_existing_entries_are_not_kept(make(), transitions())


class OfAgents(nn.Linear):
    """Q of the observations of several agents, in a TensorDict of their own, and of an action."""

    def __init__(self):
        super().__init__(OBSERVATION + ACTION, 1, **DOUBLE)

    def forward(self, agents, action):
        return super().forward(torch.cat([agents["observation"].mean(-2), action], -1))


def test_the_value_may_read_entries_as_one_tensordict():
    value = TensorDictModule(OfAgents(), ["agents", "action"], ["state_action_value"])
    loss, data = DDPGLoss(deterministic_actor(), value), transitions((6,))
    for entries in (data, data["next"]):
        entries["agents"] = TensorDict({"observation": torch.randn(6, 2, OBSERVATION, **DOUBLE)}, [6, 2])
    data["next", "terminated"][0] = data["next", "done"][0] = True
    wanted, _ = run(loss, data)
    data["next", "agents", "observation"][0] = torch.nan
    found, after = run(loss, data)
    torch.testing.assert_close(found.to_dict(), wanted.to_dict(), **CLOSE)
    assert after["next", "agents", "observation"][0].isnan().all()


def test_the_value_may_read_what_is_no_tensor():
    class Scaled(StateAction):
        def forward(self, observation, action, task):
            return {"b": 2.0}[task] * super().forward(observation, action)

    value = TensorDictModule(Scaled(), ["observation", "action", "task"], ["state_action_value"])
    data = transitions((6,))
    for entries in (data, data["next"]):
        entries.set_non_tensor("task", "b")
    found, _ = run(DDPGLoss(deterministic_actor(), value), data)
    assert all(x.isfinite().all() for x in found.values())


def test_targets_follow_an_updater():
    loss = make(delay_actor=True)
    updater = SoftUpdate(loss, tau=0.5)
    with torch.no_grad():
        for x in loss.parameters():
            x.add_(1)
    updater.step()
    for name in ("actor_network", "value_network"):
        current, target = getattr(loss, f"{name}_params"), getattr(loss, f"target_{name}_params")
        for key, x in target.items(True, True):
            torch.testing.assert_close(x.data, current[key].data - 0.5, **CLOSE)


# --- data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"delay_actor": True, "loss_function": "smooth_l1"}])
def test_nothing_after_a_terminal_step_matters(options):
    assert_terminal_observations_are_ignored(make(**options), transitions())


def test_a_step_that_terminates_without_being_done_is_terminal():
    data = transitions()
    data["next", "done"] = torch.zeros_like(data["next", "done"])
    assert_terminal_observations_are_ignored(make().make_value_estimator("TDLambda"), data)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_padding_does_not_count(reduction):
    assert_padding_is_ignored(make(reduction=reduction), transitions())


def test_the_greatest_values_are_those_of_samples_that_count():
    loss, data = make(), padded(transitions(), 100.0)
    data["next", "reward"] -= 50  # less than the target of a step that doesn't count, 0
    out = loss(data)
    for name in ("pred_value", "target_value"):
        assert out[f"{name}_max"] == out[name][data["collector", "mask"]].max()
    assert out["target_value_max"] < 0


def test_priorities_weigh_both_losses():
    loss, data = make(), transitions()
    weight = torch.rand(*data.shape, 1, **DOUBLE)
    out, _ = run(loss, data.clone().set("priority_weight", weight))
    loss.reduction = "none"
    each, _ = run(loss, data)
    weight = weight.squeeze(-1)
    for name in ("loss_actor", "loss_value"):
        torch.testing.assert_close(out[name], (each[name] * weight).sum() / weight.sum(), **CLOSE)


@pytest.mark.parametrize("estimator", ["TD0", "TD1", "TDLambda"])
def test_masks_of_numbers_and_integer_rewards_are_understood(estimator):
    loss, data = make().make_value_estimator(estimator), transitions()
    data["next", "reward"] = data["next", "reward"].round()
    numbers = data.clone()
    numbers["next", "reward"] = numbers["next", "reward"].long()
    numbers["next", "done"] = numbers["next", "done"].int()
    numbers["next", "terminated"] = numbers["next", "terminated"].float()
    assert torch.equal(run(loss, numbers)[0]["loss_value"], run(loss, data)[0]["loss_value"])


def test_done_stands_in_for_a_missing_terminated():
    loss, data = make(), transitions()
    data["next", "terminated"] = data["next", "done"]
    wanted = run(loss, data)[0]["loss_value"]
    assert torch.equal(run(loss, data.exclude(("next", "terminated")))[0]["loss_value"], wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_keeps_the_discount_and_computes(dtype):
    loss = make().make_value_estimator(gamma=0.999)
    loss.to(dtype)
    assert loss.value_estimator.gamma == 0.999
    data = transitions().apply(lambda x: x.to(dtype) if x.is_floating_point() else x)
    out, seen = run(loss, data)
    assert {x.dtype for x in (*out.values(), seen["td_error"])} == {dtype}
    assert all(x.isfinite().all() for x in out.values())


@pytest.mark.parametrize("weighted", [False, True])
def test_tensors_can_be_passed_instead_of_a_tensordict(weighted):
    loss, data = make(), transitions()
    if weighted:
        data["priority_weight"] = torch.rand(*data.shape, 1, **DOUBLE)
    tensors = {k if isinstance(k, str) else "_".join(k): v for k, v in data.items(True, True)}
    out = loss(data)
    for name, x in zip(loss.out_keys, loss(**tensors), strict=True):
        assert torch.equal(x, out[name])
    loss.select_out_keys("loss_value", "target_value")
    a, b = loss(**tensors)
    assert torch.equal(a, out["loss_value"])
    assert torch.equal(b, out["target_value"])


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
        ("action", "'action'.*value_network"),
        ("observation", "'observation'"),
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


@pytest.mark.parametrize(
    ("options", "error"),
    [({"reduction": "foo"}, ValueError), ({"loss_function": "foo"}, ValueError), ({"gamma": 0.9}, TypeError)],
)
def test_an_option_without_a_meaning_is_refused(options, error):
    with pytest.raises(error, match=r"foo|make_value_estimator"):
        make(**options)


def test_advantages_of_a_policy_are_no_target():
    with pytest.raises(NotImplementedError, match=r"TD0.*TD1.*TDLambda"):
        make().make_value_estimator("GAE")


# --- execution --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"delay_actor": True, "reduction": "none"}])
def test_compiled_is_eager(options):
    assert_compiles(lambda: make(**options), transitions(), backend="eager")


def test_nothing_waits_for_the_device(monkeypatch):
    data = transitions()
    data["collector", "mask"] = torch.rand(data.shape) < 0.8
    data["priority_weight"] = torch.rand(data.shape, **DOUBLE)
    assert_no_host_sync(make(delay_actor=True), data, monkeypatch)


@pytest.mark.parametrize("batch", [(0, 5), (3, 5)], ids=["empty", "padding alone"])
def test_of_no_samples_at_all_the_greatest_value_is_zero(batch):
    data = transitions(batch)
    data["collector", "mask"] = torch.zeros(batch, dtype=torch.bool)
    out = make()(data)
    assert out["pred_value_max"] == out["target_value_max"] == 0
