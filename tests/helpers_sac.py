"""The soft actor-critic losses on small networks, each with the data it learns from."""

import torch
from fusedrl.losses.discrete_sac import DiscreteSACLoss
from fusedrl.losses.redq import REDQLoss
from fusedrl.losses.sac import SACLoss
from helpers_losses import OBSERVATION, diagonal_normal
from helpers_q import (
    ACTIONS,
    DOUBLE,
    action_values,
    desynchronise_targets,
    qvalue_network,
    stochastic_actor,
    transitions,
    value_network,
)
from tensordict import TensorDict
from tensordict.nn import (
    CompositeDistribution,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from torch import distributions as D
from torch import nn


def categorical_actor(distribution=D.Categorical):
    return ProbabilisticTensorDictSequential(
        TensorDictModule(nn.Linear(OBSERVATION, ACTIONS, **DOUBLE), ["observation"], ["logits"]),
        ProbabilisticTensorDictModule(["logits"], ["action"], distribution_class=distribution, return_log_prob=True),
    )


class TwoHeads(nn.Module):
    """Parameters of two Gaussian heads of one dimension each."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(OBSERVATION, 4, **DOUBLE)

    def forward(self, observation):
        steer, log_steer, brake, log_brake = self.layer(observation).split(1, -1)
        return steer, log_steer.exp(), brake, log_brake.exp()


def two_headed_actor():
    names = {"steer": ("car", "steer"), "brake": ("car", "brake")}
    parameters = [("params", head, name) for head in names for name in ("loc", "scale")]
    return ProbabilisticTensorDictSequential(
        TensorDictModule(TwoHeads(), ["observation"], parameters),
        ProbabilisticTensorDictModule(
            ["params"],
            list(names.values()),
            distribution_class=CompositeDistribution,
            distribution_kwargs={"distribution_map": dict.fromkeys(names, diagonal_normal), "name_map": names},
            return_log_prob=True,
        ),
    )


def two_headed_qvalue():
    class Judge(nn.Linear):
        def forward(self, *inputs):
            return super().forward(torch.cat(inputs, -1))

    inputs = ["observation", ("car", "steer"), ("car", "brake")]
    return TensorDictModule(Judge(OBSERVATION + 2, 1, **DOUBLE), inputs, ["state_action_value"])


def sac(cls=SACLoss, *, distribution=diagonal_normal, **options):
    options = {"target_entropy": -2.0} | options
    return cls(stochastic_actor(distribution), qvalue_network(), **options)


def sac_with_value(cls=SACLoss, **options):
    return sac(cls, value_network=value_network(), **options)


def redq(cls=REDQLoss, *, distribution=diagonal_normal, **options):
    options = {"target_entropy": -2.0, "num_qvalue_nets": 4} | options
    return cls(stochastic_actor(distribution), qvalue_network(), **options)


def discrete_sac(cls=DiscreteSACLoss, *, distribution=D.Categorical, **options):
    options = {"action_space": "categorical", "num_actions": ACTIONS} | options
    return cls(categorical_actor(distribution), action_values(), **options)


def continuous(batch=(3, 5), **options):
    return transitions(batch, **options)


def discrete(batch=(3, 5), **options):
    return transitions(batch, "categorical", **options)


LOSSES = {
    "sac": (sac, continuous),
    "sac_with_value": (sac_with_value, continuous),
    "redq": (redq, continuous),
    "discrete_sac": (discrete_sac, discrete),
}


def made(name, batch=(3, 5), **options):
    """A loss whose target networks aren't the trained ones, and data."""
    make, data = LOSSES[name]
    return desynchronise_targets(make(**options)), data(batch)


def values_of(loss, params, observation, action=None):
    """Q_i of every member of an ensemble, called one by one."""
    entries = {"observation": observation} if action is None else {"observation": observation, "action": action}
    found = []
    for i in range(len(params)):
        with params.data[i].to_module(loss.qvalue_network):
            out = loss.qvalue_network(TensorDict(entries, observation.shape[:-1]))
        found.append(out[loss.qvalue_network.out_keys[0]])
    return torch.stack(found)


def policy_of(loss, params, observation):
    """The policy's distribution."""
    with params.data.to_module(loss.actor_network):
        return loss.actor_network.get_dist(TensorDict({"observation": observation}, observation.shape[:-1]))
