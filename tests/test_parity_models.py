"""Random network distillation, PILCO's cost, world models and QMIX against TorchRL."""

import pytest
import torch
from fusedrl.losses.pilco import ExponentialQuadraticCost
from fusedrl.losses.qmixer import QMixerLoss
from fusedrl.losses.rnd import RNDLoss
from fusedrl.losses.world_model import WorldModelLoss
from helpers_imitation import (
    AGENTS,
    STATE,
    beliefs,
    features,
    next_observations,
    single,
    steps_of_a_world,
    team_transitions,
)
from helpers_imitation import world_model as chained_model
from helpers_losses import DOUBLE, OBSERVATION
from helpers_q import ACTIONS, PARITY, assert_parity, assert_states_are_exchanged, desynchronise_targets
from tensordict.nn import TensorDictModule
from torch import nn

pytest.importorskip("torchrl")
from torchrl import objectives as theirs
from torchrl.envs.transforms.rnd import RunningMeanStd
from torchrl.modules import QMixer, QValueModule, SafeSequential, VDNMixer, WorldModel
from torchrl.objectives.multiagent import QMixerLoss as TheirQMixerLoss

REDUCTIONS = ["mean", "sum", "none"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# --- random network distillation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("update_fraction", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("normalized", [False, True])
def test_random_network_distillation(normalized, update_fraction, reduction):
    data = single(next_observations())
    statistics = None
    if normalized:
        statistics = RunningMeanStd((OBSERVATION,))
        statistics.update(3 * data["next", "observation"].flatten(0, 1) + 1)
    networks = features().float(), features().float()
    options = {"obs_rms": statistics, "obs_clip": 1.0, "reduction": reduction, "update_fraction": update_fraction}
    pair = RNDLoss(*networks, **options), theirs.RNDLoss(*networks, **options)
    assert_parity(*pair, data, priority=None)
    assert_states_are_exchanged(*pair)
    assert not any(p.requires_grad for p in networks[1].parameters())


# --- PILCO --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target": torch.tensor([0.5, -0.3, 1.0], **DOUBLE)},
        {"weights": torch.diag(torch.tensor([1.0, 2.0, 0.0], **DOUBLE))},
        {"target": torch.ones(3, **DOUBLE), "weights": torch.tensor([[2.0, 1, 0], [1, 2, 0], [0, 0, 1]], **DOUBLE)},
    ],
    ids=["defaults", "target", "singular weights", "both"],
)
def test_expected_saturating_cost(options, reduction):
    pair = (
        ExponentialQuadraticCost(**options, reduction=reduction),
        theirs.ExponentialQuadraticCost(**options, reduction=reduction),
    )
    data, found = beliefs(), []
    for loss in pair:
        inputs = data.clone()
        mean, covariance = (inputs["observation", key].requires_grad_() for key in ("mean", "var"))
        out = loss(inputs)["loss_cost"]
        found.append((out.detach(), *torch.autograd.grad(out.sum(), (mean, covariance))))
    # The gradient of a symmetric matrix can be spread over its two halves in any way.
    found = [(cost, mean, covariance + covariance.mT) for cost, mean, covariance in found]
    # TorchRL adds some 1e-6 to the diagonal of what it inverts.
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert set(pair[0].state_dict()) == set(pair[1].state_dict())


# --- world models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"losses": ["done", "reward"]},
        {"losses": ["reconstruction"]},
        {"losses": ["latent"], "latent_loss": "smooth_l1"},
        {"losses": ["reward", "done", "reconstruction", "latent"], "done_loss": "l1", "done_weight": 0.5},
        {"reward_loss": "smooth_l1", "reward_weight": 3.0},
        {"losses": []},
    ],
    ids=str,
)
def test_world_model(options):
    encoder, dynamics, reward, done, decoder = chained_model()
    model = WorldModel(encoder, dynamics, reward, done_head=done, decoder=decoder)
    pair = WorldModelLoss(model, **options), theirs.WorldModelLoss(model, **options)
    for loss in pair:
        loss.set_keys(target_latent=("next", "latent"))  # of the model itself, so that it has a gradient
    data = steps_of_a_world()
    # TorchRL computes the loss of done in float32.
    tolerance = {"rtol": 1e-5, "atol": 1e-6, "check_dtype": False} if "done" in options.get("losses", ()) else PARITY
    assert_parity(*pair, data, priority=None, **tolerance)
    assert_states_are_exchanged(*pair)


# --- QMIX ---------------------------------------------------------------------------------------------------------


def team(action_space, mixer):
    values = TensorDictModule(
        nn.Linear(OBSERVATION, ACTIONS), [("agents", "observation")], [("agents", "action_value")]
    )
    chosen = ("agents", "chosen_action_value")
    out_keys = [("agents", "action"), ("agents", "action_value"), chosen]
    greedy = QValueModule(action_value_key=("agents", "action_value"), out_keys=out_keys, action_space=action_space)
    if mixer == "vdn":
        mixing = TensorDictModule(VDNMixer(n_agents=AGENTS, device="cpu"), [chosen], ["chosen_action_value"])
    else:
        network = QMixer(state_shape=(STATE,), mixing_embed_dim=4, n_agents=AGENTS, device="cpu")
        mixing = TensorDictModule(network, [chosen, "state"], ["chosen_action_value"])
    return SafeSequential(values, greedy), mixing


@pytest.mark.parametrize("mixer", ["qmix", "vdn"])
@pytest.mark.parametrize("action_space", ["categorical", "one-hot"])
@pytest.mark.parametrize(
    ("options", "estimator"),
    [
        ({}, "TD0"),
        ({"delay_value": False}, "TD0"),
        ({"loss_function": "l1"}, "TD0"),
        ({"loss_function": "smooth_l1"}, "TDLambda"),
        ({}, "TD1"),
    ],
    ids=str,
)
def test_qmix(options, estimator, action_space, mixer):
    networks = team(action_space, mixer)
    data = single(team_transitions(action=action_space))
    pair = [cls(*networks, action_space=action_space, **options) for cls in (QMixerLoss, TheirQMixerLoss)]
    for loss in pair:
        loss.make_value_estimator(theirs.ValueEstimators[estimator] if loss is pair[1] else estimator, gamma=0.9)
    desynchronise_targets(*pair)
    # TorchRL and ours multiply in float32, in another order.
    assert_parity(*pair, data, rtol=1e-4, atol=1e-5)
    assert_states_are_exchanged(*pair)
