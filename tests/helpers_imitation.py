"""Networks, demonstrations and cases for the losses that fit networks to recorded data, and QMIX. All float64."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from fusedrl.losses.act import ACTLoss
from fusedrl.losses.behaviour_cloning import BCLoss
from fusedrl.losses.decision_transformer import DTLoss, OnlineDTLoss
from fusedrl.losses.diffusion_bc import DiffusionBCLoss
from fusedrl.losses.gail import GAILLoss
from fusedrl.losses.pilco import ExponentialQuadraticCost
from fusedrl.losses.qmixer import QMixerLoss
from fusedrl.losses.rnd import RNDLoss
from fusedrl.losses.world_model import WorldModelLoss
from helpers_losses import DOUBLE, OBSERVATION
from helpers_q import ACTION, ACTIONS, StateAction, deterministic_actor, stochastic_actor
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

CHUNK, LATENT, AGENTS, STATE = 6, 2, 3, 5


def demonstrations(batch=(3, 5), action="continuous"):
    """Observations and an expert's actions; ``action`` is "continuous", "one-hot" or "categorical"."""
    data = TensorDict({"observation": torch.randn(*batch, OBSERVATION, **DOUBLE)}, batch)
    index = torch.randint(ACTIONS, batch)
    data["action"] = {
        "continuous": torch.rand(*batch, ACTION, **DOUBLE) * 1.8 - 0.9,
        "one-hot": nn.functional.one_hot(index, ACTIONS),
        "categorical": index,
    }[action]
    return data


def single(data):
    """``data`` in float32, but for what isn't floating-point."""
    return data.apply(lambda x: x.float() if x.is_floating_point() else x)


# --- GAIL ---------------------------------------------------------------------------------------------------------


def discriminator():
    network = StateAction()
    network.layers.append(nn.Sigmoid())
    return TensorDictModule(network, ["observation", "action"], ["d_logits"])


def demonstrations_and_attempts(batch=(3, 5)):
    data, attempts = demonstrations(batch), demonstrations(batch)
    for key in ("observation", "action"):
        data[f"collector_{key}"] = attempts[key]
    return data


# --- random network distillation ----------------------------------------------------------------------------------


def features():
    return nn.Sequential(nn.Linear(OBSERVATION, 6, **DOUBLE), nn.Tanh(), nn.Linear(6, 3, **DOUBLE))


def next_observations(batch=(3, 5)):
    return TensorDict({"next": {"observation": torch.randn(*batch, OBSERVATION, **DOUBLE)}}, batch)


# --- action chunks ------------------------------------------------------------------------------------------------


class ChunkModel(nn.Module):
    def __init__(self):
        super().__init__()
        size = CHUNK * ACTION
        self.layer = nn.Linear(OBSERVATION + size, size + 2 * LATENT, **DOUBLE)

    def forward(self, observation, action_chunk):
        x = self.layer(torch.cat([observation, action_chunk.flatten(-2)], -1))
        prediction, mu, log_var = x.split([CHUNK * ACTION, LATENT, LATENT], -1)
        return prediction.unflatten(-1, (CHUNK, ACTION)), mu, log_var


def chunk_actor(chunk="action_chunk"):
    return TensorDictModule(ChunkModel(), ["observation", chunk], ["action_pred", "mu", "log_var"])


def chunks(batch=(3, 5)):
    data = demonstrations(batch).select("observation")
    data["vla_action", "chunk"] = torch.randn(*batch, CHUNK, ACTION, **DOUBLE)
    return data


# --- diffusion ----------------------------------------------------------------------------------------------------


class Denoiser(nn.Module):
    """Half of what is left of the action is replaced by noise in each step."""

    def __init__(self, num_steps=10):
        super().__init__()
        self.num_steps = num_steps
        self.register_buffer("kept", 0.5 ** torch.arange(1, num_steps + 1, **DOUBLE))
        self.score_network = nn.Linear(ACTION + OBSERVATION + 1, ACTION, **DOUBLE)

    def add_noise(self, action, step):
        kept, noise = self.kept[step].unsqueeze(-1), torch.randn_like(action)
        return kept.sqrt() * action + (1 - kept).sqrt() * noise, noise


def diffusion_actor(**kwargs):
    return TensorDictModule(Denoiser(**kwargs), ["observation"], ["action"])


# --- PILCO --------------------------------------------------------------------------------------------------------


def beliefs(batch=(3, 5)):
    root = torch.randn(*batch, 3, 3, **DOUBLE)
    belief = {"mean": torch.randn(*batch, 3, **DOUBLE), "var": root @ root.mT}
    return TensorDict({"observation": TensorDict(belief, batch)}, batch)


def moved_beliefs(batch=(3, 5)):
    """Beliefs that depend on something trained, so that the cost has a gradient."""
    data = beliefs(batch)
    data["observation", "mean"].requires_grad_()
    return data


# --- world model --------------------------------------------------------------------------------------------------


def world_model(*, done=("next", "done")):
    def linear(size_in, size_out, reads, writes):
        return TensorDictModule(nn.Linear(size_in, size_out, **DOUBLE), [reads], [writes])

    return TensorDictSequential(
        linear(OBSERVATION, LATENT, "observation", "latent"),
        TensorDictModule(LatentStep(), ["latent", "action"], [("next", "latent")]),
        linear(LATENT, 1, ("next", "latent"), ("next", "reward")),
        linear(LATENT, 1, ("next", "latent"), done),
        linear(LATENT, OBSERVATION, "latent", "reconstructed_observation"),
    )


class LatentStep(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(LATENT + ACTION, LATENT, **DOUBLE)

    def forward(self, latent, action):
        return self.layer(torch.cat([latent, action], -1))


def steps_of_a_world(batch=(3, 5)):
    data = demonstrations(batch)
    data["next"] = TensorDict(
        {
            "reward": torch.randn(*batch, 1, **DOUBLE),
            "done": torch.rand(*batch, 1) < 0.5,
            "terminated": torch.rand(*batch, 1) < 0.5,
        },
        batch,
    )
    for key in ("predicted_latent", "target_latent"):
        data[key] = torch.randn(*batch, LATENT, **DOUBLE)
    return data


# --- QMIX ---------------------------------------------------------------------------------------------------------


class Mixer(nn.Module):
    """A sum of the agents' values with positive weights that depend on the state."""

    def __init__(self):
        super().__init__()
        self.weights, self.bias = nn.Linear(STATE, AGENTS, **DOUBLE), nn.Linear(STATE, 1, **DOUBLE)

    def forward(self, values, state):
        return (self.weights(state).abs() * values.squeeze(-1)).sum(-1, keepdim=True) + self.bias(state)


def agents():
    return TensorDictModule(
        nn.Linear(OBSERVATION, ACTIONS, **DOUBLE), [("agents", "observation")], [("agents", "action_value")]
    )


def mixer():
    return TensorDictModule(Mixer(), [("agents", "chosen_action_value"), "state"], ["chosen_action_value"])


def team_transitions(batch=(3, 5), action="categorical"):
    def seen():
        observation = torch.randn(*batch, AGENTS, OBSERVATION, **DOUBLE)
        team = TensorDict({"observation": observation}, [*batch, AGENTS])
        return TensorDict({"agents": team, "state": torch.randn(*batch, STATE, **DOUBLE)}, batch)

    data, following = seen(), seen()
    index = torch.randint(ACTIONS, (*batch, AGENTS))
    data["agents", "action"] = index if action == "categorical" else nn.functional.one_hot(index, ACTIONS)
    following["reward"] = torch.randn(*batch, 1, **DOUBLE)
    following["done"] = torch.rand(*batch, 1) < 0.4
    following["terminated"] = following["done"] & (torch.rand(*batch, 1) < 0.7)
    return data.set("next", following)


# --- all ----------------------------------------------------------------------------------------------------------


class ImitationCase(NamedTuple):
    """How to make a loss and its data, and a key that it reads."""

    make: Callable[..., Any]
    data: Callable[..., TensorDict]
    reads: str


CASES = {
    "ACTLoss": ImitationCase(lambda **kw: ACTLoss(chunk_actor(), **kw), chunks, "action_chunk"),
    "BCLoss": ImitationCase(lambda **kw: BCLoss(stochastic_actor(), **kw), demonstrations, "action"),
    "DTLoss": ImitationCase(lambda **kw: DTLoss(deterministic_actor(), **kw), demonstrations, "action_target"),
    "DiffusionBCLoss": ImitationCase(lambda **kw: DiffusionBCLoss(diffusion_actor(), **kw), demonstrations, "action"),
    "ExponentialQuadraticCost": ImitationCase(
        lambda **kw: ExponentialQuadraticCost(torch.ones(3, **DOUBLE), 2 * torch.eye(3, **DOUBLE), **kw),
        moved_beliefs,
        "scale",
    ),
    "GAILLoss": ImitationCase(
        lambda **kw: GAILLoss(discriminator(), **kw), demonstrations_and_attempts, "collector_action"
    ),
    "OnlineDTLoss": ImitationCase(
        lambda **kw: OnlineDTLoss(stochastic_actor(), **{"target_entropy": -2.0} | kw), demonstrations, "action_target"
    ),
    "QMixerLoss": ImitationCase(
        lambda **kw: QMixerLoss(agents(), mixer(), **{"action_space": "categorical"} | kw), team_transitions, "action"
    ),
    "RNDLoss": ImitationCase(
        lambda **kw: RNDLoss(features(), features(), **{"update_fraction": 1.0} | kw), next_observations, "observation"
    ),
    "WorldModelLoss": ImitationCase(
        lambda **kw: WorldModelLoss(world_model(), **{"losses": ["reward", "done", "reconstruction"]} | kw),
        steps_of_a_world,
        "reward",
    ),
}
