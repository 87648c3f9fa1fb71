"""Every loss of a policy whose actions are TorchRL's TanhNormal waits for nothing, though to build one waits.

Of Dreamer's losses that holds for what they compute themselves: the environment that they imagine in runs the policy's
own forward. The policy here then draws without a distribution.
"""

from functools import partial

import pytest
import torch
from fusedrl import losses
from helpers_dreamer import Gaussian, value_model
from helpers_dreamer_v3 import ACTION, BELIEF, STATE, Env
from helpers_losses import GaussianParameters, collect, critic
from helpers_multi_agent import VALUE, collect_team, team_critic
from helpers_q import assert_no_host_sync, qvalue_network, transitions, value_network
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    set_composite_lp_aggregate,
)
from test_every_loss import CASES, SOFT, case, quantiles, start

TanhNormal = pytest.importorskip("torchrl.modules").TanhNormal


def both(low, high):
    return {key: torch.tensor(x, dtype=torch.float64) for key, x in (("low", low), ("high", high))}


BOUNDS = {"default": {}, "numbers": {"low": -2, "high": 3.0}, "tensors": both([-1.0, -2.0], [1.0, 2.5])}


def squashed(bounds, kind=ProbabilisticTensorDictSequential, network=GaussianParameters, reads=("observation",),
             prefix=()):  # fmt: skip
    loc, scale, action = ((*prefix, name) if prefix else name for name in ("loc", "scale", "action"))
    draw = ProbabilisticTensorDictModule(
        {"loc": loc, "scale": scale},
        [action],
        distribution_class=TanhNormal,
        distribution_kwargs=BOUNDS[bounds],
        return_log_prob=True,
        default_interaction_type="random",
    )
    return kind(TensorDictModule(network(), [(*prefix, key) if prefix else key for key in reads], [loc, scale]), draw)


class WithoutDistribution(ProbabilisticTensorDictSequential):
    """A policy that draws its action by itself."""

    def forward(self, tensordict):
        loc, scale = self.module[0].module(tensordict["state"], tensordict["belief"])
        return tensordict.set("action", (loc + scale * torch.randn_like(loc)).tanh())


def team(name, actor):
    def make():
        loss = getattr(losses, name)(actor(), team_critic())
        loss.set_keys(**VALUE)
        return loss

    def data(batch=(2, 5)):
        return actor()(collect_team(batch).exclude(("agents", "action"), ("agents", "action_log_prob"))).detach()

    return make, data


def every_case(bounds):
    """By name: how to make a loss, and its data."""
    actor = partial(squashed, bounds)
    member = partial(actor, prefix=("agents",))
    dreamer = partial(actor, WithoutDistribution, lambda: Gaussian(STATE + BELIEF, ACTION), reads=("state", "belief"))

    def collected(batch=(3, 5)):
        return collect(actor(), batch, estimated=False)

    def simple(name, *networks, data=transitions, **options):
        found = case(name, actor, *networks, data=data, **options)
        return found.make, found.data

    return {
        **{name: simple(name, critic, data=collected)
           for name in ("A2CLoss", "ClipPPOLoss", "KLPENPPOLoss", "PPOLoss", "ReinforceLoss")},
        "KLPENPPOLoss, delayed": simple("KLPENPPOLoss", critic, data=collected, delay_actor=True),
        **{name: team(name, member) for name in ("IPPOLoss", "MAPPOLoss")},
        **{name: simple(name, qvalue_network, **SOFT) for name in ("SACLoss", "CrossQLoss", "REDQLoss")},
        "CQLLoss": simple("CQLLoss", qvalue_network, num_random=3, **SOFT),
        "CQLLoss, backed up": simple("CQLLoss", qvalue_network, num_random=3, max_q_backup=True, **SOFT),
        "TQCLoss": simple("TQCLoss", quantiles, num_qvalue_nets=2, **SOFT),
        "IQLLoss": simple("IQLLoss", qvalue_network, value_network),
        "BCLoss": simple("BCLoss", data=CASES["BCLoss"].data),
        "OnlineDTLoss": simple("OnlineDTLoss", data=CASES["OnlineDTLoss"].data, target_entropy=-2.0),
        **{f"DreamerV3ActorLoss, {kind}": (
            lambda options=options: losses.DreamerV3ActorLoss(
                dreamer(), value_model(), Env(), imagination_horizon=3, **options), start)
           for kind, options in (("through the model", {}), ("REINFORCE", {"use_reinforce": True}))},
    }  # fmt: skip


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    with set_composite_lp_aggregate(False):
        yield


def has_policy(loss):
    """Whether the loss itself asks a policy for its distribution."""
    return any(hasattr(getattr(loss, name, None), "get_dist") for name in ("actor_network", "actor_model"))


def test_every_loss_with_a_policy_is_checked_here():
    of_discrete_actions = {"DiscreteSACLoss", "DiscreteIQLLoss"}
    runs_the_policy_alone = {"DreamerActorLoss"}
    with_policy = {name for name, case in CASES.items() if has_policy(case.make())}
    checked = {name.partition(",")[0] for name in every_case("default")}
    assert checked == with_policy - of_discrete_actions - runs_the_policy_alone


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("name", every_case("default"))
def test_nothing_waits_for_the_device(name, bounds, monkeypatch):
    make, data = every_case(bounds)[name]
    assert_no_host_sync(make(), data(), monkeypatch)


@pytest.mark.parametrize("name", every_case("default"))
def test_an_empty_batch_is_no_error(name):
    make, data = every_case("default")[name]
    result = make()(data()[:0])
    out = result[0] if isinstance(result, tuple) else result  # Dreamer's come with their data
    found = [x for key, x in out.items() if key.startswith("loss")]
    assert found
    assert all(x.shape == () for x in found)
