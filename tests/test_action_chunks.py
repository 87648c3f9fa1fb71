"""Action chunks through a latent variable (ACT), and behaviour cloning of a diffusion policy."""

import pytest
import torch
from fusedrl.losses.act import ACTLoss
from fusedrl.losses.diffusion_bc import DiffusionBCLoss
from fusedrl.losses.functional.imitation import standard_normal_divergence
from helpers_imitation import CHUNK, Denoiser, chunk_actor, chunks, demonstrations, diffusion_actor
from helpers_losses import DOUBLE, OBSERVATION
from helpers_q import ACTION, CLOSE, assert_rejected, deterministic_actor, gradients
from tensordict.nn import TensorDictModule
from torch import distributions as D
from torch import nn


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# --- ACT ----------------------------------------------------------------------------------------------------------


def test_the_divergence_is_that_of_the_distributions():
    mu, log_var = torch.randn(4, 3, **DOUBLE), torch.randn(4, 3, **DOUBLE)
    posterior, prior = D.Normal(mu, (0.5 * log_var).exp()), D.Normal(torch.zeros_like(mu), torch.ones_like(mu))
    wanted = D.kl_divergence(posterior, prior).sum(-1)
    torch.testing.assert_close(standard_normal_divergence(mu, log_var), wanted, **CLOSE)


def test_the_loss_is_reconstruction_and_weighted_divergence():
    actor, data = chunk_actor(), chunks((6,))
    chunk = data["vla_action", "chunk"]
    prediction, mu, log_var = actor.module(data["observation"], chunk)
    out = ACTLoss(actor, kl_weight=3.0, reduction="none")(data)
    torch.testing.assert_close(out["loss_reconstruction"], (prediction - chunk).abs().mean((1, 2)).detach(), **CLOSE)
    torch.testing.assert_close(out["loss_kl"], standard_normal_divergence(mu, log_var).detach(), **CLOSE)
    torch.testing.assert_close(out["loss_act"], out["loss_reconstruction"] + 3 * out["loss_kl"], **CLOSE)


def test_only_the_whole_loss_trains():
    loss = ACTLoss(chunk_actor())
    assert list(gradients(loss, loss(chunks()))) == ["loss_act"]


def test_a_model_can_read_the_chunk_by_the_name_it_has_in_the_data():
    own, data = chunk_actor(("vla_action", "chunk")), chunks()
    given = TensorDictModule(own.module, ["observation", "action_chunk"], own.out_keys)
    assert torch.equal(ACTLoss(own)(data)["loss_act"], ACTLoss(given)(data)["loss_act"])


def test_in_keys_are_the_names_in_the_data():
    loss, data = ACTLoss(chunk_actor()), chunks()
    assert loss.in_keys == ["observation", ("vla_action", "chunk")]
    assert torch.equal(loss(data["observation"], data["vla_action", "chunk"])[0], loss(data)["loss_act"])
    loss.set_keys(observation="seen")
    assert loss.in_keys == ["seen", ("vla_action", "chunk")]


def test_whatever_else_the_model_reads_must_be_there():
    actor = TensorDictModule(
        lambda s, a, gain: (gain * a, s, s), ["observation", "action_chunk", "gain"], ["action_pred", "mu", "log_var"]
    )
    data = chunks()
    assert_rejected(ACTLoss(actor), data, KeyError, "'gain'")
    data["gain"] = torch.ones(3, 5, 1, 1, **DOUBLE)
    assert ACTLoss(actor)(data)["loss_reconstruction"] == 0


def test_a_reconstruction_that_would_broadcast_is_refused():
    actor = TensorDictModule(
        lambda s, a: (a[..., :1], s, s), ["observation", "action_chunk"], ["action_pred", "mu", "log_var"]
    )
    assert_rejected(ACTLoss(actor), chunks(), RuntimeError, rf"'action_pred' has shape \(3, 5, {CHUNK}, 1\)")


# --- diffusion ----------------------------------------------------------------------------------------------------


class Recorder(nn.Linear):
    """A score network that keeps what it was given."""

    def __init__(self):
        super().__init__(ACTION + OBSERVATION + 1, ACTION, **DOUBLE)

    def forward(self, x):
        self.given = x
        return super().forward(x)


def recorded(num_steps=10):
    denoiser = Denoiser(num_steps)
    denoiser.score_network = Recorder()
    return TensorDictModule(denoiser, ["observation"], ["action"])


def test_the_network_is_asked_for_the_noise_in_the_action():
    actor, data = recorded(), demonstrations((6,))
    loss = DiffusionBCLoss(actor, reduction="none")
    found = loss(data)["loss_diffusion_bc"]
    given = actor.module.score_network.given
    noisy, observation, step = given.split([ACTION, OBSERVATION, 1], -1)
    kept = 0.5 ** (step + 1)
    noise = (noisy - kept.sqrt() * data["action"]) / (1 - kept).sqrt()
    assert torch.equal(observation, data["observation"])
    torch.testing.assert_close(found, (actor.module.score_network(given) - noise).square(), **CLOSE)


def test_all_diffusion_steps_are_drawn():
    actor = recorded(num_steps=4)
    DiffusionBCLoss(actor)(demonstrations((200,)))
    assert actor.module.score_network.given[:, -1].unique().tolist() == [0, 1, 2, 3]


def test_only_the_score_network_is_trained_and_the_schedule_is_saved():
    loss = DiffusionBCLoss(diffusion_actor())
    assert all("score_network" in name for name, _ in loss.named_parameters())
    assert "actor_network_params.module.kept" in loss.state_dict()


def test_a_policy_without_noise_is_refused():
    with pytest.raises(TypeError, match="num_steps, add_noise, score_network"):
        DiffusionBCLoss(deterministic_actor())


def test_noise_that_would_broadcast_is_refused():
    actor = diffusion_actor()
    actor.module.score_network = nn.Linear(ACTION + OBSERVATION + 1, 1, **DOUBLE)
    assert_rejected(DiffusionBCLoss(actor), demonstrations(), RuntimeError, "the predicted noise")
