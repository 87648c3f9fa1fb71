"""A small world model, the environment of its imagination, a policy, and sequences to learn from. Seeded, float64."""

import torch
from helpers_losses import DOUBLE, diagonal_normal
from tensordict import TensorDict
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)
from torch import nn

STATE, BELIEF, ACTION = 3, 4, 2
IMAGE = (2, 3, 3)
# What runs where the world model is, on the CPU: kernels in the interpreter, of which a CUDA machine makes no use.
BACKENDS = ["torch", "reference", "verify", *([] if torch.cuda.is_available() else ["triton"])]


class Gaussian(nn.Linear):
    """Mean and standard deviation."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, 2 * outputs, **DOUBLE)

    def forward(self, *inputs):
        mean, std = super().forward(torch.cat(inputs, -1)).chunk(2, -1)
        return mean, nn.functional.softplus(std) + 0.1


class Joined(nn.Sequential):
    """A network of several inputs."""

    def forward(self, *inputs):
        return super().forward(torch.cat(inputs, -1))


class Transition(nn.Module):
    """The deterministic half of a step, and a draw of the stochastic one."""

    def __init__(self):
        super().__init__()
        self.belief = nn.Linear(STATE + BELIEF + ACTION, BELIEF, **DOUBLE)
        self.prior = Gaussian(BELIEF, STATE)

    def forward(self, state, belief, action):
        belief = self.belief(torch.cat([state, belief, action], -1)).tanh()
        mean, std = self.prior(belief)
        return mean + std * torch.randn_like(std), belief


class Recognition(nn.Module):
    """Prior and posterior of the latents, given what came before and what is seen now."""

    def __init__(self):
        super().__init__()
        self.prior = Gaussian(STATE + BELIEF + ACTION, STATE)
        self.posterior = Gaussian(STATE + BELIEF + ACTION + torch.Size(IMAGE).numel(), STATE)

    def forward(self, state, belief, action, pixels):
        before = torch.cat([state, belief, action], -1)
        return *self.prior(before), *self.posterior(before, pixels.flatten(-len(IMAGE)))


def nexts(*names):
    return [("next", name) for name in names]


def world_model(image=IMAGE):
    """Sequences in, latents, reconstruction and reward out; nested as TorchRL wants it."""
    recognition = TensorDictModule(
        Recognition(),
        ["state", "belief", "action", ("next", "pixels")],
        nexts("prior_mean", "prior_std", "posterior_mean", "posterior_std"),
    )
    decoder = nn.Sequential(nn.Linear(STATE, torch.Size(image).numel(), **DOUBLE), nn.Unflatten(-1, image))
    decoder = TensorDictModule(decoder, nexts("posterior_mean"), nexts("reco_pixels"))
    reward = TensorDictModule(nn.Linear(STATE, 1, **DOUBLE), nexts("posterior_mean"), nexts("reward"))
    return TensorDictSequential(TensorDictSequential(recognition, decoder), reward)


def sequences(batch=(3, 4), dtype=torch.float64):
    """What a replay buffer holds, the latents of the model's last pass over it included."""
    real = {"dtype": dtype}
    following = {"pixels": torch.randn(*batch, *IMAGE, **real), "reward": torch.randn(*batch, 1, **real)}
    data = {
        "state": torch.randn(*batch, STATE, **real),
        "belief": torch.randn(*batch, BELIEF, **real),
        "action": torch.randn(*batch, ACTION, **real),
        "next": TensorDict(following, batch),
    }
    return TensorDict(data, batch)


class Imagination(nn.Module):
    """The environment of the actor loss: a transition, a reward, and an ``end`` of each trajectory after so many steps.

    What a trajectory holds after its end is ``afterwards``.
    """

    def __init__(self, end=None, afterwards=None):
        super().__init__()
        self.transition = Transition()
        self.reward = Joined(nn.Linear(STATE + BELIEF, 1, **DOUBLE))
        self.end, self.afterwards = end, afterwards

    def reset(self, tensordict):
        return tensordict

    def rollout(self, max_steps, policy, auto_reset, tensordict):
        assert not auto_reset
        steps = []
        for t in range(max_steps):
            step = policy(tensordict.copy())
            state, belief = self.transition(step["state"], step["belief"], step["action"])
            reward = self.reward(state, belief)
            tensordict = TensorDict({"state": state, "belief": belief}, step.batch_size)
            following = {"reward": reward, "state": state, "belief": belief}
            if self.end is not None:
                following["done"] = following["terminated"] = torch.full_like(reward, t == self.end).bool()
                if t == self.end and self.afterwards is not None:
                    following["state"] = torch.full_like(state, self.afterwards)
            steps.append(step.set("next", TensorDict(following, step.batch_size)))
        return torch.stack(steps, len(step.batch_size))


def actor_model(network=None):
    network = Gaussian(STATE + BELIEF, ACTION) if network is None else network
    return ProbabilisticTensorDictSequential(
        TensorDictModule(network, ["state", "belief"], ["loc", "scale"]),
        ProbabilisticTensorDictModule(
            ["loc", "scale"], ["action"], distribution_class=diagonal_normal, default_interaction_type="random"
        ),
    )


def value_model():
    net = Joined(nn.Linear(STATE + BELIEF, 5, **DOUBLE), nn.Tanh(), nn.Linear(5, 1, **DOUBLE))
    return TensorDictModule(net, ["state", "belief"], ["state_value"])


def imagined(batch=(3, 4)):
    """What the actor loss hands to the value loss."""
    data = {
        "state": torch.randn(*batch, STATE, **DOUBLE),
        "belief": torch.randn(*batch, BELIEF, **DOUBLE),
        "lambda_target": torch.randn(*batch, 1, **DOUBLE),
    }
    return TensorDict(data, batch)
