"""The loss of a world model: which prediction is compared with what."""

import pytest
import torch
from fusedrl.losses.world_model import WorldModelLoss
from helpers_imitation import LATENT, steps_of_a_world, world_model
from helpers_losses import DOUBLE, OBSERVATION
from helpers_q import CLOSE, assert_rejected
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_predictions_are_compared_with_the_data():
    model, data = world_model(), steps_of_a_world()
    found = model(data.clone())
    wanted = {
        "loss_reward": (found["next", "reward"] - data["next", "reward"]).square().mean(),
        "loss_done": 0.5 * (found["next", "done"] - data["next", "done"].double()).abs().mean(),
        "loss_reconstruction": (found["reconstructed_observation"] - data["observation"]).square().mean(),
        "loss_latent": (data["predicted_latent"] - data["target_latent"]).square().mean(),
    }
    losses = ["latent", "reconstruction", "reward", "done"]
    out = WorldModelLoss(model, losses=losses, done_loss="l1", done_weight=0.5)(data)
    torch.testing.assert_close(out.to_dict(), wanted, **CLOSE)


def test_the_model_finds_the_reward_of_the_data_where_it_is_in_nobodys_way():
    seen = []

    class Reads(nn.Module):
        def forward(self, observation, true_reward):
            seen.append(true_reward)
            return true_reward + 2

    model = TensorDictModule(Reads(), ["observation", ("next", "true_reward")], [("next", "reward")])
    data = steps_of_a_world()
    assert ("next", "true_reward") not in WorldModelLoss(model).in_keys
    assert WorldModelLoss(model)(data)["loss_reward"].item() == pytest.approx(4)
    assert torch.equal(seen[0], data["next", "reward"])


def test_a_reward_that_the_model_does_not_predict_is_not_compared_with_itself():
    model = TensorDictModule(nn.Linear(OBSERVATION, 1, **DOUBLE), ["observation"], [("next", "value")])
    loss, data = WorldModelLoss(model), steps_of_a_world()
    assert_rejected(loss, data, KeyError, r"doesn't write \('next', 'reward'\).*set_keys\(reward=")


def test_done_is_learned_without_terminated():
    data = steps_of_a_world()
    loss = WorldModelLoss(world_model(), losses=["done"])
    wanted = loss(data)["loss_done"]
    assert torch.equal(loss(data.exclude(("next", "terminated")))["loss_done"], wanted)
    data["next", "done"] = data["next", "done"].long()
    assert torch.equal(loss(data)["loss_done"], wanted)


def test_only_what_the_chosen_losses_need_must_be_there():
    data = steps_of_a_world().select("observation", "action")
    assert WorldModelLoss(world_model(), losses=["reconstruction"])(data)["loss_reconstruction"] > 0
    assert_rejected(WorldModelLoss(world_model(), losses=["done"]), data, KeyError, r"set_keys\(done=")
    assert_rejected(WorldModelLoss(world_model(), losses=["latent"]), data, KeyError, r"'predicted_latent'")


def test_latents_that_the_model_does_not_write_are_among_the_in_keys():
    loss, data = WorldModelLoss(world_model(), losses=["latent"]), steps_of_a_world()
    assert loss.in_keys == ["observation", "action", "predicted_latent", "target_latent"]
    assert torch.equal(loss(*(data[key] for key in loss.in_keys)), loss(data)["loss_latent"])
    loss.set_keys(predicted_latent=("next", "latent"), target_latent="latent")
    assert loss.in_keys == ["observation", "action"]


def test_a_latent_of_the_model_is_compared_by_its_name():
    loss, data = WorldModelLoss(world_model(), losses=["latent"]), steps_of_a_world()
    loss.set_keys(predicted_latent=("next", "latent"), target_latent="goal")
    assert_rejected(loss, data, KeyError, r"'goal'.*set_keys\(target_latent=")
    data["goal"] = torch.zeros(3, 5, LATENT, **DOUBLE)
    assert loss(data)["loss_latent"].requires_grad


def test_a_prediction_that_would_broadcast_is_refused():
    data = steps_of_a_world()
    data["next", "reward"] = data["next", "reward"].expand(3, 5, 2)
    assert_rejected(WorldModelLoss(world_model()), data, RuntimeError, r"\('next', 'reward'\) has shape \(3, 5, 1\)")


@pytest.mark.parametrize(
    ("options", "match"),
    [({"losses": ["value"]}, r"losses has \['value'\]"), ({"done_loss": "bce"}, "done_loss is 'bce'")],
)
def test_what_does_not_exist_is_refused_when_the_loss_is_made(options, match):
    with pytest.raises(ValueError, match=match):
        WorldModelLoss(world_model(), **options)


class WithNoise(nn.Module):
    def __init__(self, step):
        super().__init__()
        self.step = step

    def forward(self, latent, action, noise=None):
        return self.step(latent, action)


def test_a_world_model_may_do_without_some_of_its_inputs():
    model, data = world_model(), steps_of_a_world()
    expected = WorldModelLoss(model)(data.clone())
    optional = TensorDictModule(WithNoise(model[1].module), ["latent", "action", "noise"], [("next", "latent")])
    loss = WorldModelLoss(TensorDictSequential(model[0], optional, *list(model.module)[2:]))
    torch.testing.assert_close(loss(data.clone()).to_dict(), expected.to_dict())


def test_what_padding_holds_of_a_latent_reaches_no_gradient():
    loss, data = WorldModelLoss(world_model(), losses=["latent", "reconstruction"]), steps_of_a_world()
    loss.set_keys(predicted_latent=("next", "latent"))
    data["collector", "mask"] = mask = torch.rand(data.shape) < 0.5
    for key in ("target_latent", "observation", "action"):
        data[key][~mask] = torch.nan
    out = loss(data)
    sum(out.values()).backward()
    assert all(p.grad.isfinite().all() for p in loss.parameters() if p.grad is not None)


def test_the_model_finds_whether_the_data_terminates_where_it_is_in_nobodys_way():
    seen = []

    class Reads(nn.Module):
        def forward(self, observation, true_terminated):
            seen.append(true_terminated)
            return observation[..., :1]

    model = TensorDictModule(Reads(), ["observation", ("next", "true_terminated")], [("next", "reward")])
    data = steps_of_a_world()
    WorldModelLoss(model)(data)
    assert torch.equal(seen[0], data["next", "terminated"])
