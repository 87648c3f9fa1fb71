"""A team of agents with a common policy and critic, and the data that they collect."""

import torch
from helpers_losses import DOUBLE, OBSERVATION
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torch import nn
from torch.distributions import Categorical

AGENTS = 3
VALUE = {"value": ("agents", "state_value")}


def team_policy():
    draw = ProbabilisticTensorDictModule(
        {"logits": ("agents", "logits")}, [("agents", "action")], distribution_class=Categorical, return_log_prob=True
    )
    net = TensorDictModule(nn.Linear(OBSERVATION, 3, **DOUBLE), [("agents", "observation")], [("agents", "logits")])
    return ProbabilisticTensorDictSequential(net, draw)


def team_critic():
    net = nn.Linear(OBSERVATION, 1, **DOUBLE)
    return TensorDictModule(net, [("agents", "observation")], [("agents", "state_value")])


def collect_team(batch=(2, 5)):
    """Data with one reward, done and terminated for the team."""
    terminated = torch.rand(*batch, 1) < 0.15
    observation, following = torch.randn(2, *batch, AGENTS, OBSERVATION, **DOUBLE)
    data = TensorDict(
        {
            "agents": {"observation": observation},
            "next": {
                "agents": {"observation": following},
                "reward": torch.randn(*batch, 1, **DOUBLE),
                "done": terminated | (torch.rand(*batch, 1) < 0.15),
                "terminated": terminated,
            },
        },
        batch,
    )
    with torch.no_grad():
        return team_policy()(data).exclude(("agents", "logits"))
