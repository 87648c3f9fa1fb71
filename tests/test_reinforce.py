"""REINFORCE: the equation, the delayed critic, and how it runs. Faults shared with A2C are in test_a2c.py."""

import pytest
import torch
from fusedrl.losses import ReinforceLoss
from helpers_estimators import no_host_sync
from helpers_losses import ACTORS, OBSERVATION, collect, critic, discrete_actor, tabular_actor
from tensordict import TensorDict

# Everything is computed in float64, some units in the last place.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture(autouse=True)
def _seed():
    torch.compiler.reset()
    torch.manual_seed(0)


def test_losses_of_a_uniform_policy_over_two_actions():
    data = collect(tabular_actor())
    value = critic()
    out = ReinforceLoss(tabular_actor(), value, loss_critic_type="l1")(data)
    expected = {
        "loss_actor": torch.tensor(2.0, dtype=torch.float64).log() * data["advantage"].mean(),
        "loss_value": (value.module(data["observation"]) - data["value_target"]).abs().mean(),
    }
    torch.testing.assert_close(out.to_dict(), expected, **CLOSE)


def test_a_policy_improves_on_the_action_that_pays():
    actor, value = tabular_actor(), critic()
    loss = ReinforceLoss(actor, value)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.5)
    observation = torch.ones(64, OBSERVATION, dtype=torch.float64)
    for _ in range(30):
        with torch.no_grad():
            data = actor(TensorDict({"observation": observation}, [64]))
        reward = (data["action"] == 1).double().unsqueeze(-1)
        data["advantage"], data["value_target"] = reward - reward.mean(), reward
        optimizer.zero_grad()
        loss(data).sum(reduce=True).backward()
        optimizer.step()
    assert actor.get_dist(TensorDict({"observation": observation[:1]}, [1])).probs[0, 1] > 0.9


def test_delayed_critic_values_the_next_observation():
    actor, value = discrete_actor(), critic()
    data = collect(actor, estimated=False)
    data["next", "done"] = torch.zeros_like(data["next", "done"])
    loss = ReinforceLoss(actor, value, delay_value=True).make_value_estimator("TD0", gamma=0.5)
    with torch.no_grad():
        loss.target_critic_network_params["module", "weight"].zero_()
        loss.target_critic_network_params["module", "bias"].fill_(2.0)
        now = value.module(data["observation"])
        target = data["next", "reward"] + 0.5 * 2.0
    out = loss(data)
    expected = torch.nn.functional.smooth_l1_loss(now, target)
    torch.testing.assert_close(out["loss_value"], expected, **CLOSE)
    out["loss_value"].backward()
    assert loss.target_critic_network_params["module", "bias"].grad is None


def test_delayed_critic_needs_functional_networks():
    with pytest.raises(ValueError, match="delay_value"):
        ReinforceLoss(discrete_actor(), critic(), delay_value=True, functional=False)


def test_both_networks_are_needed():
    with pytest.raises(TypeError, match="critic_network"):
        ReinforceLoss(discrete_actor(), None)
    with pytest.raises(TypeError, match="actor_network"):
        ReinforceLoss(None, critic())


def test_discount_in_the_constructor_is_refused():
    with pytest.raises(TypeError, match="make_value_estimator"):
        ReinforceLoss(discrete_actor(), critic(), gamma=0.9)


def test_padded_steps_count_nowhere():
    actor, value = discrete_actor(), critic()
    data = collect(actor)
    mask = torch.rand(data.shape) < 0.6
    expected = ReinforceLoss(actor, value, clip_value=0.1)(data[mask])
    data["shifted_valid"] = mask
    for key in ("advantage", "value_target", "state_value"):
        data[key][~mask] = torch.nan
    torch.testing.assert_close(ReinforceLoss(actor, value, clip_value=0.1)(data).to_dict(), expected.to_dict(), **CLOSE)


@pytest.mark.parametrize(
    ("heads", "estimated", "delay_value"), [("discrete", True, False), ("flat_heads", False, True)]
)
def test_compiles_as_one_graph_with_the_numbers_of_eager(heads, estimated, delay_value):
    actor, value = ACTORS[heads](), critic()
    data = collect(actor, estimated=estimated)
    losses = [ReinforceLoss(actor, value, delay_value=delay_value, clip_value=0.1) for _ in range(2)]
    expected = losses[0](data)
    out = torch.compile(losses[1], fullgraph=True, backend="aot_eager")(data)
    torch.testing.assert_close(out.to_dict(), expected.to_dict(), **CLOSE)
    parameters = [*actor.parameters(), *value.parameters()]
    gradients = [torch.autograd.grad(x["loss_actor"] + x["loss_value"], parameters) for x in (out, expected)]
    torch.testing.assert_close(*gradients, **CLOSE)


@pytest.mark.parametrize("estimated", [True, False])
def test_nothing_waits_for_the_device(estimated, monkeypatch):
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)
    actor = discrete_actor()
    data = collect(actor, estimated=estimated)
    data["collector", "mask"] = torch.rand(data.shape) < 0.8
    loss = ReinforceLoss(actor, critic(), delay_value=True, clip_value=0.1)
    with no_host_sync():
        out = loss(data)
        (out["loss_actor"] + out["loss_value"]).backward()
