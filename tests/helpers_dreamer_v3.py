"""A small world model with discrete latents, its imagination, and sequences to learn from. Seeded, float64."""

import torch
from helpers_dreamer import ACTION, BELIEF, STATE, Imagination, Joined, nexts, sequences, value_model
from helpers_losses import DOUBLE
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

BINS = 7
LATENTS = (2, 3)
FEATURES = STATE + BELIEF
VECTOR = 4


class Recognition(nn.Module):
    """Logits of prior and posterior, and the state and belief that a step leads to."""

    def __init__(self):
        super().__init__()
        inputs = FEATURES + ACTION
        self.logits = nn.ModuleList(nn.Linear(inputs, 6, **DOUBLE) for _ in range(2))
        self.features = nn.ModuleList(nn.Linear(inputs, n, **DOUBLE) for n in (STATE, BELIEF))

    def forward(self, state, belief, action):
        x = torch.cat([state, belief, action], -1)
        return *(layer(x).unflatten(-1, LATENTS) for layer in self.logits), *(layer(x) for layer in self.features)


def head(outputs, *names, shape=None):
    """A layer on the features of the step that is led to."""
    net = Joined(nn.Linear(FEATURES, outputs, **DOUBLE))
    if shape is not None:
        net.append(nn.Unflatten(-1, shape))
    return TensorDictModule(net, nexts("state", "belief"), nexts(*names))


def world_model(reward="reward_logits", bins=BINS, shape=None):
    """Sequences in; latents, reconstructions of ``pixels`` and ``vector``, reward and the logit of going on out."""
    recognition = TensorDictModule(
        Recognition(), ["state", "belief", "action"], nexts("prior_logits", "posterior_logits", "state", "belief")
    )
    return TensorDictSequential(
        recognition,
        head(18, "reco_pixels", shape=(2, 3, 3)),
        head(VECTOR, "reco_vector", shape=shape),
        head(bins if reward == "reward_logits" else 1, reward),
        head(1, "continue_pred"),
    )


def experience(batch=(3, 4)):
    """What a replay buffer holds."""
    data = sequences(batch)
    data["is_init"] = torch.zeros(*batch, 1, dtype=torch.bool)
    data["next", "vector"] = 3 * torch.randn(*batch, VECTOR, **DOUBLE)
    data["next", "done"] = torch.rand(*batch, 1) < 0.3
    data["next", "terminated"] = data["next", "done"] & (torch.rand(*batch, 1) < 0.7)
    return data


class Env(Imagination):
    """The imagination, as the losses of DreamerV3 call it."""

    def rollout(self, max_steps, policy, auto_reset, tensordict, break_when_any_done):
        assert not break_when_any_done
        return super().rollout(max_steps, policy, auto_reset, tensordict)


def continuation_model():
    net = Joined(nn.Linear(FEATURES, 1, **DOUBLE), nn.Sigmoid())
    return TensorDictModule(net, ["state", "belief"], ["continuation"])


def critic(logits=False):
    """A value, or its logits."""
    if not logits:
        return value_model()
    return TensorDictModule(Joined(nn.Linear(FEATURES, BINS, **DOUBLE)), ["state", "belief"], ["state_value_logits"])
