"""The losses that learn from demonstrations against TorchRL: the same outputs, gradients and states.

Where TorchRL is wrong or noisier the promise is tested beside the loss: padded actions under ``reduction="none"``,
classes of 2-D batches, categorical and composite policies (behaviour cloning); an entropy that has a closed form
(online decision transformer); the points of the gradient penalty (GAIL).
"""

import pytest
import torch
from fusedrl.losses.act import ACTLoss
from fusedrl.losses.behaviour_cloning import BCLoss
from fusedrl.losses.decision_transformer import DTLoss, OnlineDTLoss
from fusedrl.losses.diffusion_bc import DiffusionBCLoss
from fusedrl.losses.discrete_cql import DiscreteCQLLoss
from fusedrl.losses.gail import GAILLoss
from helpers_imitation import chunk_actor, chunks, demonstrations, demonstrations_and_attempts, discriminator, single
from helpers_losses import DOUBLE, OBSERVATION, squashed_normal
from helpers_q import ACTIONS, assert_parity, assert_states_are_exchanged, deterministic_actor, stochastic_actor
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from torch import distributions as D
from torch import nn

pytest.importorskip("torchrl")
from torchrl import objectives as theirs
from torchrl.data import Bounded, Composite
from torchrl.modules import Actor, DiffusionActor, ProbabilisticActor, TanhDelta

REDUCTIONS = ["mean", "sum", "none"]

# GAIL's discriminator and the DDPM schedule are float32 in TorchRL.
SINGLE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def compare(name, ours, network, data, keys=None, tolerance=None, **options):
    """Both losses of one network."""
    pair = ours(network, **options), getattr(theirs, name)(network, **options)
    if keys:
        for loss in pair:
            loss.set_keys(**keys)
    assert_parity(*pair, data, priority=None, **(tolerance or {}))
    assert_states_are_exchanged(*pair)


# --- behaviour cloning --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss_function", [None, "l1", "l2", "mse", "smooth_l1"])
@pytest.mark.parametrize("actor", [stochastic_actor, deterministic_actor])
def test_behaviour_cloning(actor, loss_function, reduction):
    compare("BCLoss", BCLoss, actor(), demonstrations(), loss_function=loss_function, reduction=reduction)


@pytest.mark.parametrize("loss_function", [None, "l1"])
def test_behaviour_cloning_of_an_actor_whose_distribution_is_a_point(loss_function):
    actor = Actor(nn.Linear(OBSERVATION, 2, **DOUBLE))
    compare("BCLoss", BCLoss, actor, demonstrations(), loss_function=loss_function)


def test_behaviour_cloning_of_the_deterministic_action_of_a_squashed_policy():
    compare("BCLoss", BCLoss, stochastic_actor(squashed_normal), demonstrations())
    delta = ProbabilisticActor(
        TensorDictModule(nn.Linear(OBSERVATION, 2, **DOUBLE), ["observation"], ["param"]),
        in_keys=["param"],
        distribution_class=TanhDelta,
    )
    compare("BCLoss", BCLoss, delta, demonstrations(), loss_function="l2")


@pytest.mark.parametrize("loss_function", [nn.MSELoss(reduction="none"), nn.functional.l1_loss])
def test_behaviour_cloning_with_a_function_of_the_users(loss_function):
    compare("BCLoss", BCLoss, deterministic_actor(), demonstrations(), loss_function=loss_function)


@pytest.mark.parametrize("loss_function", [None, "cross_entropy"])
def test_behaviour_cloning_of_logits(loss_function):
    logits = TensorDictModule(nn.Linear(OBSERVATION, ACTIONS, **DOUBLE), ["observation"], ["action"])
    data = demonstrations((6,), "categorical")
    compare("BCLoss", BCLoss, logits, data, loss_function=loss_function)
    data["action"] = data["action"].unsqueeze(-1)
    compare("BCLoss", BCLoss, logits, data, loss_function=loss_function, reduction="none")


def test_behaviour_cloning_of_a_one_hot_policy():
    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(nn.Linear(OBSERVATION, ACTIONS, **DOUBLE), ["observation"], ["logits"]),
        ProbabilisticTensorDictModule(["logits"], ["action"], distribution_class=D.OneHotCategorical),
    )
    data = demonstrations(action="one-hot")
    data["action"] = data["action"].double()
    compare("BCLoss", BCLoss, actor, data)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 1), (3, 5, 2)])
def test_behaviour_cloning_with_a_pad_mask(shape, reduction):
    data = demonstrations()
    data["pad"] = torch.rand(shape) < 0.4
    options = {"loss_function": "l1", "reduction": reduction}
    compare("BCLoss", BCLoss, deterministic_actor(), data, keys={"pad_mask": "pad"}, **options)
    if shape == (3, 5):
        compare("BCLoss", BCLoss, stochastic_actor(), data, keys={"pad_mask": "pad"}, reduction=reduction)


# --- decision transformers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss_function", ["l1", "l2", "smooth_l1"])
def test_decision_transformer(loss_function, reduction):
    options = {"loss_function": loss_function, "reduction": reduction}
    compare("DTLoss", DTLoss, deterministic_actor(), demonstrations(), **options)
    compare("DTLoss", DTLoss, stochastic_actor(), demonstrations(), **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sum"},
        {"alpha_init": 0.3},
        {"min_alpha": 2.0, "max_alpha": 5.0},
        {"max_alpha": 0.5},
        {"fixed_alpha": True},
        {"target_entropy": -3.0},
        {"samples_mc_entropy": 4},
        {"reduction": "none", "scalar_output_mode": "exclude"},
    ],
    ids=str,
)
def test_online_decision_transformer(options):
    actor = stochastic_actor(squashed_normal)
    actor.spec = Composite(action=Bounded(-1, 1, (2,)))
    compare("OnlineDTLoss", OnlineDTLoss, actor, demonstrations(), **options)


def test_online_decision_transformer_estimates_the_same_entropy_with_less_noise():
    actor, data = stochastic_actor(), demonstrations()
    exact = OnlineDTLoss(actor, target_entropy=-2.0)(data)
    drawn = theirs.OnlineDTLoss(actor, target_entropy=-2.0, samples_mc_entropy=20_000)(data)
    # Standard deviation of −log p of a 2-D Gaussian is 1; over 15 · 20000 draws 0.002.
    torch.testing.assert_close(drawn["entropy"], exact["entropy"], atol=0.01, rtol=0)


# --- GAIL ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gail(reduction):
    network, data = discriminator().float(), single(demonstrations_and_attempts())
    pair = GAILLoss(network, reduction=reduction), theirs.GAILLoss(network, reduction=reduction)
    (a, b) = pair
    out, wanted = a(data.clone()), b(data.clone())
    torch.testing.assert_close(out["loss"], wanted["loss"].squeeze(-1) if reduction == "none" else wanted["loss"])
    assert_states_are_exchanged(*pair)


@pytest.mark.parametrize("options", [{}, {"gp_lambda": 2.0}, {"reduction": "sum"}])
def test_gail_with_a_gradient_penalty_where_all_points_between_are_one(options):
    network, data = discriminator().float(), single(demonstrations_and_attempts())
    data["collector_observation"], data["collector_action"] = data["observation"], data["action"]
    compare("GAILLoss", GAILLoss, network, data, use_grad_penalty=True, tolerance=SINGLE, **options)


# --- action chunks and diffusion ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("batch", [(6,), (2, 3)])
def test_action_chunks(batch, reduction):
    compare("ACTLoss", ACTLoss, chunk_actor(), chunks(batch), reduction=reduction, kl_weight=3.0)


def test_action_chunks_by_other_names():
    data = chunks()
    data["mine"], data["seen"] = data["vla_action", "chunk"], data.pop("observation")
    compare("ACTLoss", ACTLoss, chunk_actor(), data, keys={"action_chunk": "mine", "observation": "seen"})


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("batch", [(6,), (2, 3)])
def test_diffusion(batch, reduction):
    actor = DiffusionActor(action_dim=2, obs_dim=OBSERVATION, num_steps=10)
    compare("DiffusionBCLoss", DiffusionBCLoss, actor, single(demonstrations(batch)), reduction=reduction)


# --- calls --------------------------------------------------------------------------------------------------------


def discrete_cql(cls):
    return cls(nn.Linear(OBSERVATION, ACTIONS), action_space="categorical")


@pytest.mark.parametrize(
    ("ours", "make", "keys"),
    [
        (DTLoss, lambda cls: cls(deterministic_actor()), {}),  # TorchRL's keep their order when they are renamed
        (OnlineDTLoss, lambda cls: cls(stochastic_actor(), target_entropy=-2.0), {}),
        (GAILLoss, lambda cls: cls(discriminator()), {}),
        (GAILLoss, lambda cls: cls(discriminator()), {"collector_action": "z"}),
        (DiscreteCQLLoss, discrete_cql, {}),
        (DiscreteCQLLoss, discrete_cql, {"action": ("nested", "action")}),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_positional_tensors_are_taken_in_the_same_order(ours, make, keys):
    pair = [make(cls) for cls in (ours, getattr(theirs, ours.__name__))]
    for loss in pair:
        if keys:
            loss.set_keys(**keys)
    assert pair[0].in_keys == pair[1].in_keys
