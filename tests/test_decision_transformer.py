"""Decision transformers: whose action is compared, and the entropy and temperature of the online form."""

import math

import pytest
import torch
from fusedrl.losses.decision_transformer import DTLoss, OnlineDTLoss
from helpers_imitation import demonstrations
from helpers_losses import DOUBLE, OBSERVATION, squashed_normal
from helpers_q import (
    ACTION,
    CLOSE,
    assert_compiles,
    assert_rejected,
    deterministic_actor,
    gradients,
    run,
    stochastic_actor,
)
from tensordict.nn import TensorDictModule
from torch import nn


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def online(actor=None, **options):
    return OnlineDTLoss(stochastic_actor() if actor is None else actor, **{"target_entropy": -2.0} | options)


class PreviousAction(nn.Module):
    """A policy over sequences that reads the actions before its own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(OBSERVATION + ACTION, ACTION, **DOUBLE)

    def forward(self, observation, action):
        return self.layer(torch.cat([observation, action.roll(1, -2)], -1))


def test_a_policy_can_read_the_actions_it_predicts():
    policy = TensorDictModule(PreviousAction(), ["observation", "action"], ["action"])
    data = demonstrations()
    wanted = (policy.module(data["observation"], data["action"]) - data["action"]).square().mean()
    torch.testing.assert_close(DTLoss(policy)(data)["loss"], wanted, **CLOSE)


@pytest.mark.parametrize("make", [lambda: DTLoss(deterministic_actor()), online], ids=["offline", "online"])
def test_actions_that_would_broadcast_are_refused(make):
    data = demonstrations()
    data["action"] = data["action"][..., :1]
    assert_rejected(make(), data, RuntimeError, r"'action' has shape \(3, 5")


def test_a_prediction_of_another_name_must_be_written():
    loss = DTLoss(deterministic_actor())
    loss.set_keys(action_pred="move")
    assert_rejected(loss, demonstrations(), KeyError, "doesn't write 'move'.*set_keys")


def test_an_unknown_distance_is_refused_when_the_loss_is_made():
    with pytest.raises(ValueError, match="loss_function is 'huber'"):
        DTLoss(deterministic_actor(), loss_function="huber")


# --- online -------------------------------------------------------------------------------------------------------


def test_the_three_losses_are_the_equations():
    loss, data = online(alpha_init=0.5, reduction="none"), demonstrations()
    dist = loss.get_stateful_net("actor_network").get_dist(data.clone())
    out = loss(data)
    torch.testing.assert_close(out["loss_log_likelihood"], -dist.log_prob(data["action"]), **CLOSE)
    torch.testing.assert_close(out["loss_entropy"], -0.5 * dist.entropy(), **CLOSE)
    torch.testing.assert_close(out["loss_alpha"], 0.5 * (dist.entropy() + 2), **CLOSE)
    assert out["alpha"] == 0.5
    torch.testing.assert_close(out["entropy"], dist.entropy().mean(), **CLOSE)


def test_each_loss_trains_its_own():
    loss = online()
    found = gradients(loss, loss(demonstrations()))
    for term, grads in found.items():
        trained = {name.split(".")[0] for name, g in grads.items() if g.any()}
        assert trained == ({"log_alpha"} if term == "loss_alpha" else {"actor_network_params"})


def test_the_temperature_grows_where_the_entropy_is_too_small():
    data = demonstrations()
    for target, sign in ((10.0, 1), (-10.0, -1)):
        loss = online(target_entropy=target)
        (gradient,) = torch.autograd.grad(loss(data)["loss_alpha"], loss.log_alpha)
        assert gradient.sign() == -sign


def test_the_bounds_of_the_temperature_hold():
    loss = online(min_alpha=0.5, max_alpha=2.0)
    for value, wanted in ((5.0, 2.0), (-5.0, 0.5), (0.0, 1.0)):
        loss.log_alpha.data.fill_(value)
        assert loss(demonstrations())["alpha"].item() == pytest.approx(wanted)
        assert loss.log_alpha.item() == pytest.approx(math.log(wanted))


def test_padding_does_not_count_in_the_metrics():
    loss, data = online(), demonstrations((4,))
    wanted = loss(data[:2])["entropy"]
    data["collector", "mask"] = torch.tensor([True, True, False, False])
    torch.testing.assert_close(loss(data)["entropy"], wanted, **CLOSE)


def test_metrics_can_be_left_out_of_losses_per_sample():
    loss, data = online(reduction="none", scalar_output_mode="exclude"), demonstrations()
    assert set(loss(data).keys()) == set(loss.out_keys) == {"loss_log_likelihood", "loss_entropy", "loss_alpha"}
    assert len(loss(observation=data["observation"], action=data["action"])) == len(loss.out_keys)
    assert {"alpha", "entropy"} < set(online(reduction="none")(demonstrations()).keys())
    with pytest.raises(ValueError, match="scalar_output_mode is 'mean'"):
        online(scalar_output_mode="mean")


def test_automatic_target_entropy_needs_a_spec():
    with pytest.raises(RuntimeError, match="target_entropy is 'auto'"):
        OnlineDTLoss(stochastic_actor())


def test_a_policy_without_distribution_is_refused():
    with pytest.raises(TypeError, match="distribution"):
        online(deterministic_actor())


def test_the_bounded_temperature_compiles():
    assert_compiles(lambda: online(min_alpha=0.5, max_alpha=2.0), demonstrations())


def test_an_entropy_without_a_closed_form_is_estimated_from_as_many_draws_as_wanted():
    loss, data = online(stochastic_actor(squashed_normal), samples_mc_entropy=4000), demonstrations()
    first, second = (run(loss, data, seed)[0]["entropy"] for seed in (1, 2))
    torch.testing.assert_close(first, second, rtol=0, atol=0.03)


def test_a_fixed_temperature_is_no_parameter():
    loss = online(fixed_alpha=True, alpha_init=0.5)
    assert "log_alpha" not in dict(loss.named_parameters())
    assert not loss(demonstrations())["loss_alpha"].requires_grad
