"""QMIX: the mixed value, its target, and what the losses of Q networks promise."""

import pytest
import torch
from fusedrl.losses.qmixer import QMixerLoss
from fusedrl.losses.targets import SoftUpdate
from helpers_imitation import AGENTS, agents, mixer, single, team_transitions
from helpers_losses import DOUBLE, OBSERVATION
from helpers_q import (
    ACTIONS,
    CLOSE,
    assert_compiles,
    assert_padding_is_ignored,
    assert_rejected,
    desynchronise_targets,
    gradients,
    run,
)
from tensordict.nn import TensorDictModule
from torch import nn


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(**options):
    return desynchronise_targets(QMixerLoss(agents(), mixer(), **{"action_space": "categorical"} | options))


@pytest.mark.parametrize("action", ["categorical", "one-hot"])
def test_the_loss_is_the_equation(action):
    loss, data = make(action_space=action), team_transitions((6,), action)
    loss.make_value_estimator("TD0", gamma=0.5)
    data["next", "terminated"][0] = True

    def networks(prefix):
        local, mixing = (getattr(loss, f"{prefix}{name}_params") for name in loss.NETWORKS)
        with local.to_module(loss.local_value_network), mixing.to_module(loss.mixer_network):
            yield loss.local_value_network.module, loss.mixer_network.module

    index = data["agents", "action"] if action == "categorical" else data["agents", "action"].argmax(-1)
    for local, mixing in networks(""):
        chosen = local(data["agents", "observation"]).gather(-1, index.unsqueeze(-1))
        value = mixing(chosen, data["state"])
    following = data["next"]
    for local, mixing in networks("target_"):
        best = local(following["agents", "observation"]).max(-1, keepdim=True).values
        target = following["reward"] + 0.5 * ~following["terminated"] * mixing(best, following["state"])
    wanted = (value - target.detach()).square()
    out, seen = run(loss, data)
    torch.testing.assert_close(out["loss"], wanted.mean(), **CLOSE)
    torch.testing.assert_close(seen["td_error"], wanted.detach(), **CLOSE)


@pytest.mark.parametrize("action", ["categorical", "one-hot"])
def test_keywords_are_the_entries_of_a_tensordict(action):
    loss, data = make(action_space=action), team_transitions((6,), action)
    read = [key for key in loss.in_keys if data.get(key, None) is not None]
    found = loss(**{key if isinstance(key, str) else "_".join(key): data[key] for key in read})
    torch.testing.assert_close(found, loss(data)["loss"], **CLOSE)


def test_both_networks_are_trained_and_followed():
    loss = make()
    found = gradients(loss, loss(team_transitions()))["loss"]
    assert all(g.any() for g in found.values())
    SoftUpdate(loss, eps=0.0).step()
    for name in loss.NETWORKS:
        params, targets = getattr(loss, f"{name}_params"), getattr(loss, f"target_{name}_params")
        assert (params.data == targets.data).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_after_a_terminal_step_matters(value):
    loss, data = make(), team_transitions()
    terminated = data["next", "terminated"]
    assert terminated.any()
    wanted, seen = run(loss, data)
    for key in (("next", "agents", "observation"), ("next", "state")):
        ends = terminated.unsqueeze(-1) if "agents" in key else terminated
        data[key] = torch.where(ends, value, data[key])
    out, also_seen = run(loss, data)
    torch.testing.assert_close(out["loss"], wanted["loss"], **CLOSE)
    torch.testing.assert_close(gradients(loss, out), gradients(loss, wanted), **CLOSE)
    torch.testing.assert_close(also_seen["td_error"], seen["td_error"], **CLOSE)


def test_padding_does_not_count():
    assert_padding_is_ignored(make(), team_transitions())


def test_priority_weights_weigh_the_samples():
    data, loss = team_transitions((6,)), make()
    alone = loss(data[:1].clone())["loss"]
    data["priority_weight"] = torch.tensor([1.0, 0, 0, 0, 0, 0]).double()
    torch.testing.assert_close(loss(data)["loss"], alone, **CLOSE)
    assert not torch.equal(make(use_prioritized_weights=False)(data)["loss"], alone)


def test_the_losses_per_sample_have_the_batch_shape():
    loss, data = make(reduction="none"), team_transitions()
    out, seen = run(loss, data)
    assert out["loss"].shape == (3, 5)
    torch.testing.assert_close(out["loss"].detach().unsqueeze(-1), seen["td_error"], **CLOSE)


def test_a_target_over_time_compiles():
    assert_compiles(lambda: make().make_value_estimator("TDLambda"), team_transitions())


def test_estimators_that_make_no_sense_are_named():
    with pytest.raises(NotImplementedError, match="TD0"):
        make().make_value_estimator("GAE")


def test_entries_can_be_renamed():
    loss, data = make(), team_transitions()
    wanted, seen = run(loss, data)
    data["team", "move"], data["next", "gain"] = data["agents", "action"], data["next", "reward"]
    del data["agents", "action"], data["next", "reward"]
    loss.set_keys(action=("team", "move"), reward="gain", priority="urgency")
    out, also_seen = run(loss, data)
    assert torch.equal(out["loss"], wanted["loss"])
    assert torch.equal(also_seen["urgency"], seen["td_error"])


@pytest.mark.parametrize(
    ("key", "match"),
    [
        ("state", "mixer_network"),
        (("next", "state"), "mixer_network"),
        (("agents", "observation"), "local_value_network"),
        (("next", "reward"), r"set_keys\(reward="),
    ],
)
def test_a_missing_entry_is_named(key, match):
    assert_rejected(make(), team_transitions().exclude(key), KeyError, match)


def test_a_mixer_that_leaves_the_agents_apart_is_refused():
    apart = TensorDictModule(nn.Identity(), [("agents", "chosen_action_value")], ["chosen_action_value"])
    loss = QMixerLoss(agents(), apart, action_space="categorical")
    assert_rejected(loss, team_transitions(), RuntimeError, rf"'chosen_action_value' has shape \(3, 5, {AGENTS}, 1\)")


def test_one_action_for_all_agents_is_refused():
    data = team_transitions()
    data["agents", "action"] = (
        data["agents", "action"][..., :1].expand(3, 5, AGENTS).unsqueeze(-1).expand(3, 5, AGENTS, 2)
    )
    assert_rejected(make(), data, RuntimeError, "one index per sample")


def test_plain_modules_are_refused():
    with pytest.raises(TypeError, match="local_value_network must be a TensorDictModule"):
        QMixerLoss(nn.Linear(OBSERVATION, ACTIONS, **DOUBLE), mixer(), action_space="categorical")


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_masks_of_numbers_and_integer_rewards_are_understood(dtype):
    data, loss = team_transitions(), make()
    data["next", "reward"] = data["next", "reward"].round()
    wanted = run(loss, data)[0]["loss"]
    data["next", "reward"] = data["next", "reward"].long()
    for key in ("done", "terminated"):
        data["next", key] = data["next", key].to(dtype)
    assert torch.equal(run(loss, data)[0]["loss"], wanted)


def test_a_cast_keeps_the_discount():
    loss = make().make_value_estimator("TD0", gamma=0.999).float()
    assert loss.value_estimator.gamma.item() == 0.999
    assert loss(single(team_transitions()))["loss"].dtype == torch.float32
