"""Policies, critics and collected data for the tests of the PPO family. Everything is float64 and seeded."""

import copy
from functools import partial

import torch
from tensordict import TensorDict
from tensordict.nn import (
    CompositeDistribution,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from torch import distributions as D
from torch import nn

OBSERVATION = 4
DOUBLE = {"dtype": torch.float64}
NESTED = {"steer": ("car", "steer"), "gear": ("car", "gear")}
FLAT = {"steer": "steer", "gear": "gear"}


class GaussianParameters(nn.Linear):
    """Mean and standard deviation of ``n`` action dimensions."""

    def __init__(self, n=2):
        super().__init__(OBSERVATION, 2 * n, **DOUBLE)

    def forward(self, x):
        loc, log_scale = super().forward(x).chunk(2, -1)
        return loc, log_scale.exp()


class TwoHeads(nn.Module):
    """Parameters of a categorical head and of a Gaussian one."""

    def __init__(self):
        super().__init__()
        self.gear = nn.Linear(OBSERVATION, 3, **DOUBLE)
        self.steer = GaussianParameters()

    def forward(self, x):
        return self.gear(x), *self.steer(x)


def diagonal_normal(loc, scale):
    return D.Independent(D.Normal(loc, scale), 1)


def squashed_normal(loc, scale):
    """An action in (−1, 1); its entropy has no closed form."""
    return D.TransformedDistribution(diagonal_normal(loc, scale), D.TanhTransform(cache_size=1))


def _actor(net, params, dist_keys, actions, distribution, reads="observation", trunk=None, **kwargs):
    layers = [] if trunk is None else [trunk]
    return ProbabilisticTensorDictSequential(
        *layers,
        TensorDictModule(net, in_keys=[reads], out_keys=params),
        ProbabilisticTensorDictModule(
            in_keys=dist_keys,
            out_keys=actions,
            distribution_class=distribution,
            distribution_kwargs=kwargs,
            return_log_prob=True,
            default_interaction_type="random",
        ),
    )


def discrete_actor(actions=3, **kwargs):
    net = nn.Linear(OBSERVATION, actions, **DOUBLE)
    return _actor(net, ["logits"], ["logits"], ["action"], D.Categorical, **kwargs)


def tabular_actor():
    """A policy that is uniform over two actions."""
    actor = discrete_actor(2)
    for p in actor.parameters():
        nn.init.zeros_(p)
    return actor


def gaussian_actor(distribution=diagonal_normal):
    return _actor(GaussianParameters(), ["loc", "scale"], ["loc", "scale"], ["action"], distribution)


def composite_actor(names=NESTED, steer=diagonal_normal):
    return _actor(
        TwoHeads(),
        [("params", "gear", "logits"), ("params", "steer", "loc"), ("params", "steer", "scale")],
        ["params"],
        [names["gear"], names["steer"]],
        CompositeDistribution,
        distribution_map={"gear": D.Categorical, "steer": steer},
        name_map=names,
    )


def team_actor(members):
    """One head whose action has a dimension for the members of a team, which the samples don't have."""
    net = nn.Sequential(nn.Linear(OBSERVATION, 3 * members, **DOUBLE), nn.Unflatten(-1, (members, 3)))
    return _actor(
        net,
        [("params", "gear", "logits")],
        ["params"],
        [NESTED["gear"]],
        CompositeDistribution,
        distribution_map={"gear": D.Categorical},
        name_map={"gear": NESTED["gear"]},
    )


def two_step_actor():
    """Two actions, each drawn by a module of its own."""
    second = ProbabilisticTensorDictModule(
        {"logits": "other_logits"}, ["other"], distribution_class=D.Categorical, return_log_prob=True
    )
    net = TensorDictModule(nn.Linear(OBSERVATION, 2, **DOUBLE), ["observation"], ["other_logits"])
    return ProbabilisticTensorDictSequential(*discrete_actor(), net, second, return_composite=True)


def critic():
    return TensorDictModule(nn.Linear(OBSERVATION, 1, **DOUBLE), ["observation"], ["state_value"])


def collect(actor, batch=(3, 5), *, estimated=True):
    """Data from a policy that is near ``actor``; with advantage, value target and old value if ``estimated``."""
    behaviour = copy.deepcopy(actor)
    with torch.no_grad():
        for p in behaviour.parameters():
            p.add_(0.3 * torch.randn_like(p))
    data = TensorDict({"observation": torch.randn(*batch, OBSERVATION, **DOUBLE)}, batch)
    data["next"] = TensorDict(
        {
            "observation": torch.randn(*batch, OBSERVATION, **DOUBLE),
            "reward": torch.randn(*batch, 1, **DOUBLE),
            "done": torch.rand(*batch, 1) < 0.2,
            "terminated": torch.zeros(*batch, 1, dtype=torch.bool),
        },
        batch,
    )
    with torch.no_grad():
        behaviour(data)
    if estimated:
        for key in ("advantage", "value_target", "state_value"):
            data[key] = torch.randn(*batch, 1, **DOUBLE)
    return data


ACTORS = {
    "discrete": discrete_actor,
    "gaussian": gaussian_actor,
    "nested_heads": composite_actor,
    "flat_heads": partial(composite_actor, FLAT),
}
