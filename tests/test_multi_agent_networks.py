"""Networks that keep parameters in one TensorDict, as TorchRL's multi-agent networks do: each loss can exchange them.

TorchRL's losses are what the numbers are compared with.
"""

import copy
import pickle

import pytest
import torch
from fusedrl import losses as ours
from tensordict import TensorDict, TensorDictParams
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch import nn

pytest.importorskip("torchrl")
from torchrl import objectives as theirs
from torchrl.modules import (
    MultiAgentMLP,
    ProbabilisticActor,
    QMixer,
    QValueActor,
    QValueModule,
    TanhNormal,
    ValueOperator,
)

# Both compute in float64; but TorchRL keeps γ and α in float32.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
AGENTS, OBSERVATION, ACTION, ACTIONS = 3, 4, 2, 3
shared = pytest.mark.parametrize("share", [True, False], ids=["shared", "unshared"])


@pytest.fixture(autouse=True)
def _seed(monkeypatch):
    monkeypatch.setenv("RL_WARNINGS", "False")
    torch.manual_seed(0)


def team(inputs, outputs, share, **options):
    """A network of all agents that reads each one's own observation."""
    options = {"centralized": False, "depth": 1, "num_cells": 5, **options}
    return MultiAgentMLP(inputs, outputs, AGENTS, share_params=share, **options).double()


class Judge(nn.Module):
    def __init__(self, share):
        super().__init__()
        self.net = team(OBSERVATION + ACTION, 1, share, centralized=True)

    def forward(self, observation, action):
        return self.net(torch.cat([observation, action], -1))


def qvalue(share):
    return ValueOperator(Judge(share), in_keys=["observation", "action"])


def deterministic(share):
    return TensorDictModule(nn.Sequential(team(OBSERVATION, ACTION, share), nn.Tanh()), ["observation"], ["action"])


def stochastic(share):
    net = nn.Sequential(team(OBSERVATION, 2 * ACTION, share), NormalParamExtractor())
    return ProbabilisticActor(
        TensorDictModule(net, ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        return_log_prob=True,
    )


def value_actor(net):
    return QValueActor(net, in_keys=["observation"], action_space="one_hot")


def mixing(share):
    read, written = ("agents", "observation"), [("agents", name) for name in ("action", "action_value", "chosen")]
    choose = QValueModule(action_value_key=written[1], out_keys=written, action_space="one_hot")
    net = TensorDictModule(team(OBSERVATION, ACTIONS, share), [read], [written[1]])
    mixer = QMixer(state_shape=(5,), mixing_embed_dim=4, n_agents=AGENTS, device="cpu").double()
    return TensorDictSequential(net, choose), TensorDictModule(mixer, [written[2], "state"], ["chosen_action_value"])


def dqn(library, share):
    return library.DQNLoss(value_actor(team(OBSERVATION, ACTIONS, share)), action_space="one_hot", delay_value=True)


def ddpg(library, share):
    return library.DDPGLoss(deterministic(share), qvalue(share), delay_actor=True, delay_value=True)


def td3(library, share):
    return library.TD3Loss(deterministic(share), qvalue(share), bounds=(-1.0, 1.0), policy_noise=0.0)


def sac(library, share, members=2):
    return library.SACLoss(stochastic(share), qvalue(share), num_qvalue_nets=members, target_entropy=-2.0)


def sac_of_many(library, share):
    return sac(library, share, members=6)


def qmixer(library, share):
    loss = library.QMixerLoss(*mixing(share), delay_value=True, action_space="one_hot")
    loss.set_keys(local_value=("agents", "chosen"))
    return loss


LOSSES = {f.__name__: f for f in (dqn, ddpg, td3, sac, sac_of_many, qmixer)}
every_loss = pytest.mark.parametrize("name", LOSSES)


def transitions(name, batch=(16,)):
    def observed():
        return torch.randn(*batch, AGENTS, OBSERVATION, dtype=torch.float64)

    rewarded = (*batch, 1) if name == "qmixer" else (*batch, AGENTS, 1)
    ends = torch.rand(rewarded) < 0.2
    following = {"reward": torch.randn(rewarded, dtype=torch.float64), "done": ends, "terminated": ends}
    action = torch.rand(*batch, AGENTS, ACTION, dtype=torch.float64) - 0.5
    if name in ("dqn", "qmixer"):
        action = torch.eye(ACTIONS, dtype=torch.long)[torch.randint(ACTIONS, (*batch, AGENTS))]
    if name == "qmixer":
        state, next_state = torch.randn(2, *batch, 5, dtype=torch.float64)
        data = {"agents": {"observation": observed(), "action": action}, "state": state}
        following |= {"agents": {"observation": observed()}, "state": next_state}
    else:
        data = {"observation": observed(), "action": action}
        following["observation"] = observed()
    return TensorDict({**data, "next": following}, batch)


def moved(loss):
    """``loss`` with targets that are not the parameters."""
    for key, x in loss.state_dict().items():
        if key.startswith("target_") and x.is_floating_point():
            x.copy_(torch.randn_like(x))
    return loss


def trained(loss, data, call=None):
    """The losses, and which parameters get what gradient from each."""
    torch.manual_seed(1)
    out = (loss if call is None else call)(data.clone())
    terms = {key: x for key, x in out.items() if key.startswith("loss")}
    gradients = {}
    for term, x in terms.items():
        loss.zero_grad()
        x.backward(retain_graph=True)
        found = {name: p.grad for name, p in loss.named_parameters() if p.grad is not None and p.grad.any()}
        gradients |= {f"{term} {name}": gradient.clone() for name, gradient in found.items()}
    loss.zero_grad()
    return {key: x.detach() for key, x in terms.items()}, gradients


@every_loss
@shared
def test_numbers_and_gradients_of_every_parameter_are_torchrls(name, share):
    a, b = moved(LOSSES[name](ours, share)), LOSSES[name](theirs, share)
    data = transitions(name)
    b.load_state_dict(a.state_dict(), strict=False)  # TorchRL's default estimator has no γ in its state
    torch.testing.assert_close(trained(a, data), trained(b, data), **CLOSE)


@every_loss
@shared
def test_states_are_exchanged(name, share):
    a, b = LOSSES[name](ours, share), moved(LOSSES[name](theirs, share))
    saved = {key: x.clone() for key, x in b.state_dict().items()}
    a.load_state_dict(saved)
    data = transitions(name)
    torch.testing.assert_close(trained(a, data), trained(b, data), **CLOSE)
    moved(b).load_state_dict(a.state_dict())  # strict: after a call, TorchRL's state has the estimator's γ, too
    found = b.state_dict()
    torch.testing.assert_close({key: found[key] for key in saved}, saved, rtol=0, atol=0)


# An ensemble that runs under vmap is no other where it's compiled: there every member has its turn.
@pytest.mark.parametrize("name", ["dqn", "ddpg", "td3", "sac", "qmixer"])
@shared
def test_compiled_whole_it_gives_the_eager_numbers(name, share):
    if share and torch.__version__.startswith("2.11."):
        pytest.skip("this PyTorch's compiler fails on TorchRL's network")
    loss = moved(LOSSES[name](ours, share))
    data = transitions(name)
    torch._dynamo.reset()
    found = trained(loss, data, torch.compile(loss, backend="eager", fullgraph=True))
    torch.testing.assert_close(found, trained(loss, data), rtol=1e-9, atol=1e-12)


@every_loss
@shared
def test_soft_updates_move_the_targets(name, share):
    a, b = moved(LOSSES[name](ours, share)), LOSSES[name](theirs, share)
    data = transitions(name)
    before = trained(a, data)
    b.load_state_dict(a.state_dict(), strict=False)
    for library, loss in ((ours, a), (theirs, b)):
        updater = library.SoftUpdate(loss, tau=0.3)
        if library is theirs:
            b.load_state_dict(a.state_dict(), strict=False)  # its updater starts with targets that are copies
        updater.step()
    after = trained(a, data)
    assert any(not torch.equal(after[0][key], before[0][key]) for key in before[0])
    torch.testing.assert_close(after, trained(b, data), **CLOSE)


@every_loss
@shared
@pytest.mark.parametrize("change", ["copy", "pickle", "cast"])
def test_copies_compute_the_same_and_hold_their_own_parameters(name, share, change):
    loss = moved(LOSSES[name](ours, share))
    data = transitions(name)
    wanted = trained(loss, data)
    copied = pickle.loads(pickle.dumps(loss)) if change == "pickle" else copy.deepcopy(loss)
    if change == "cast":
        copied.float().double().load_state_dict(loss.state_dict())
    torch.testing.assert_close(trained(copied, data), wanted, rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        for p in copied.parameters():
            p.zero_()
    torch.testing.assert_close(trained(loss, data), wanted, rtol=0, atol=0)
    assert trained(copied, data)[0] != wanted[0]


@shared
def test_the_network_trains_with_the_loss_and_is_left_as_it_was(share):
    network = value_actor(team(OBSERVATION, ACTIONS, share))
    before = dict(network.named_parameters())
    loss = moved(ours.DQNLoss(network, action_space="one_hot", delay_value=True))
    data = transitions("dqn")
    loss(data.clone())
    with pytest.raises(RuntimeError):
        loss(data.set(("next", "observation"), torch.zeros(16, AGENTS, 2, dtype=torch.float64)))
    after = dict(network.named_parameters())
    assert all(after[name] is p for name, p in before.items())
    assert {id(p) for p in before.values()} == {id(p) for p in loss.parameters()}


@shared
def test_parameters_of_a_common_trunk_are_trained_by_the_policy_alone(share):
    # TorchRL would train them not at all: what it holds constant for the value network it takes from the policy, too.
    trunk = TensorDictModule(team(OBSERVATION, 5, share), ["observation"], ["hidden"])
    act = TensorDictModule(nn.Linear(5, ACTION).double(), ["hidden"], ["action"])
    judge = ValueOperator(nn.Bilinear(5, ACTION, 1).double(), in_keys=["hidden", "action"])
    networks = TensorDictSequential(trunk, act), TensorDictSequential(trunk, judge)
    data = transitions("ddpg")
    together = trained(theirs.DDPGLoss(*copy.deepcopy(networks)), data)
    loss = ours.DDPGLoss(*networks, separate_losses=True)
    copied = copy.deepcopy(loss)
    apart = trained(loss, data)
    torch.testing.assert_close(apart[0], together[0], **CLOSE)
    wanted = {key: x for key, x in together[1].items() if not ("loss_value" in key and "params.module.0." in key)}
    assert len(wanted) == len(together[1]) - 4
    torch.testing.assert_close(apart[1], wanted, **CLOSE)
    held = [id(p) for network in (copied.actor_network, copied.value_network) for p in network.parameters()]
    assert set(held) == {id(p) for p in copied.parameters()}


@shared
def test_lists_of_networks_are_ensembles(share):
    # TorchRL can't call such a list if the agents don't share their parameters.
    actor, critics = deterministic(share), [qvalue(share), qvalue(share)]
    a = moved(ours.TD3Loss(actor, critics, bounds=(-1.0, 1.0), policy_noise=0.0))
    b = td3(ours, share)
    b.load_state_dict(a.state_dict())
    data = transitions("td3")
    torch.testing.assert_close(trained(a, data), trained(b, data), rtol=1e-9, atol=1e-12)


@shared
def test_a_stateful_network_has_the_parameters_of_the_loss(share):
    for name, network in (("dqn", "value_network"), ("sac", "qvalue_network")):
        loss = LOSSES[name](ours, share)
        own = {id(p) for p in getattr(loss, f"{network}_params").parameters()}
        net = loss.get_stateful_net(network)
        assert {id(p) for p in net.parameters()} == own
        loss.from_stateful_net(network, copy.deepcopy(net))
        assert {id(p) for p in getattr(loss, f"{network}_params").parameters()} == own


@shared
def test_estimating_leaves_the_targets_of_the_critic_alone(share):
    critic = TensorDictModule(team(OBSERVATION, 1, share), ["observation"], ["state_value"])
    loss = moved(ours.ReinforceLoss(stochastic(share), critic, delay_value=True))
    data = transitions("ddpg", (4, 6))
    before = [x.clone() for x in loss.target_critic_network_params.values(True, True)]
    kept = list(loss.target_critic_network_params.values(True, True))
    first = loss(data.clone())["loss_value"]
    after = list(loss.target_critic_network_params.values(True, True))
    assert all(a is b for a, b in zip(after, kept, strict=True))
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    torch.testing.assert_close(loss(data.clone())["loss_value"], first)


class Mean(nn.Module):
    """The mean of linear networks whose parameters are in one TensorDict, under vmap."""

    def __init__(self, lock):
        super().__init__()
        networks = [nn.Linear(OBSERVATION, ACTIONS, dtype=torch.float64) for _ in range(4)]
        self.params = TensorDictParams(TensorDict.from_modules(*networks), no_convert=True, lock=lock)
        self.__dict__["empty"] = nn.Linear(OBSERVATION, ACTIONS, device="meta")

    def forward(self, observation):
        def one(params, x):
            with params.to_module(self.empty):
                return self.empty(x)

        return torch.vmap(one, in_dims=(0, None))(self.params, observation).mean(0)


@pytest.mark.parametrize("lock", [True, False])
def test_ensembles_made_by_hand_have_targets(lock):
    network, data = value_actor(Mean(lock)), transitions("dqn")
    a, b = (
        library.DQNLoss(copy.deepcopy(network), action_space="one_hot", delay_value=True) for library in (ours, theirs)
    )
    b.load_state_dict(moved(a).state_dict(), strict=False)
    for _ in range(2):
        torch.testing.assert_close(trained(a, data), trained(b, data), **CLOSE)
        moved(a)
        b.load_state_dict(a.state_dict(), strict=False)


@shared
def test_a_plain_tensordict_of_parameters_is_refused_when_the_loss_is_made(share):
    network = value_actor(team(OBSERVATION, ACTIONS, share, use_td_params=False))
    with pytest.raises(RuntimeError, match=r"TensorDict 'params'.*TensorDictParams"):
        ours.DQNLoss(network, action_space="one_hot")
