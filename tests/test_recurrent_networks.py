"""Recurrent networks of TorchRL start from zeros where the data holds no hidden states, which nothing asks for."""

import copy

import pytest
import torch
from fusedrl import losses as ours
from fusedrl.losses.utils import ValueEstimators
from helpers_q import assert_rejected
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch import nn

pytest.importorskip("torchrl")
from torchrl import objectives as theirs
from torchrl.modules import GRUModule, LSTMModule, ProbabilisticActor, QValueModule, TanhNormal, ValueOperator

# Both compute in float64; but TorchRL keeps γ, λ and coefficients in float32.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
OBSERVATION, HIDDEN, ACTION, ACTIONS, BATCH = 4, 6, 2, 3, (3, 7)


@pytest.fixture(autouse=True)
def _seed_without_warnings(monkeypatch):
    monkeypatch.setenv("RL_WARNINGS", "False")
    torch.manual_seed(0)


def memory(kind, out="embed"):
    states = ["c", "h"] if kind is LSTMModule else ["h"]
    read, written = [f"{out}_{x}" for x in states], [("next", f"{out}_{x}") for x in states]
    return kind(
        input_size=OBSERVATION, hidden_size=HIDDEN, in_keys=["observation", *read], out_keys=[out, *written]
    ).double()


def policy(kind):
    head = nn.Sequential(nn.Linear(HIDDEN, 2 * ACTION), NormalParamExtractor()).double()
    return ProbabilisticActor(
        TensorDictSequential(memory(kind), TensorDictModule(head, ["embed"], ["loc", "scale"])),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        return_log_prob=True,
    )


def value(kind):
    head = TensorDictModule(nn.Linear(HIDDEN, 1).double(), ["seen"], ["state_value"])
    return TensorDictSequential(memory(kind, "seen"), head)


def qvalue(kind):
    head = ValueOperator(nn.Bilinear(HIDDEN, ACTION, 1).double(), in_keys=["judged", "action"])
    return TensorDictSequential(memory(kind, "judged"), head)


def dqn(kind):
    head = TensorDictModule(nn.Linear(HIDDEN, ACTIONS).double(), ["embed"], ["action_value"])
    network = TensorDictSequential(memory(kind), head, QValueModule(action_space="one_hot"))
    return lambda library: library.DQNLoss(copy.deepcopy(network), action_space="one_hot", delay_value=True)


def sac(kind):
    networks = policy(kind), [qvalue(kind), qvalue(kind)]
    return lambda library: library.SACLoss(*copy.deepcopy(networks), target_entropy=-2.0, deactivate_vmap=True)


def ppo(kind):
    networks = policy(kind), value(kind)

    def make(library):
        loss = library.ClipPPOLoss(*copy.deepcopy(networks), entropy_bonus=False)
        estimators = ValueEstimators if library is ours else theirs.ValueEstimators
        loss.make_value_estimator(estimators.GAE, deactivate_vmap=True)
        return loss

    return make


def cloning(kind):
    network = policy(kind)
    return lambda library: library.BCLoss(copy.deepcopy(network))


LOSSES = {f.__name__: f for f in (dqn, sac, ppo, cloning)}
every_loss = pytest.mark.parametrize("name", LOSSES)


def transitions(name):
    def drawn(*features):
        return torch.randn(*BATCH, *features, dtype=torch.float64)

    ends = torch.rand(*BATCH, 1) < 0.2
    following = {"observation": drawn(OBSERVATION), "reward": drawn(1), "done": ends, "terminated": ends}
    data = {"observation": drawn(OBSERVATION), "action": drawn(ACTION).tanh(), "action_log_prob": drawn()}
    if name == "dqn":
        data["action"] = torch.eye(ACTIONS, dtype=torch.long)[torch.randint(ACTIONS, BATCH)]
    data = TensorDict({**data, "next": following}, BATCH)
    data["is_init"], data["next", "is_init"] = torch.rand(*BATCH, 1) < 0.2, torch.zeros(*BATCH, 1, dtype=torch.bool)
    return data


def hidden(data):
    for out in ("embed", "seen", "judged"):
        for part in ("c", "h"):
            data[f"{out}_{part}"] = torch.randn(*BATCH, 1, HIDDEN, dtype=torch.float64)
    return data


def trained(loss, data):
    torch.manual_seed(1)
    out = loss(data.clone())
    terms = {key: x for key, x in out.items() if key.startswith("loss")}
    sum(terms.values()).backward()
    return terms, {name: p.grad for name, p in loss.named_parameters() if p.grad is not None}


@every_loss
@pytest.mark.parametrize("kind", [LSTMModule, GRUModule])
@pytest.mark.parametrize("states", ["none", "current"])
def test_hidden_states_may_be_absent(name, kind, states):
    make, data = LOSSES[name](kind), transitions(name)
    if states == "current":
        data = hidden(data)
    if states == "current" and name == "ppo":  # where TorchRL can't stack what is now with what is next
        assert all(x.isfinite() for x in trained(make(ours), data)[0].values())
        return
    torch.testing.assert_close(trained(make(ours), data), trained(make(theirs), data), **CLOSE)


@every_loss
@pytest.mark.parametrize("key", ["observation", "is_init", ("next", "observation")])
def test_an_input_that_the_network_needs_is_named(name, key):
    if name == "cloning" and isinstance(key, tuple):
        pytest.skip("doesn't look at what is next")
    loss = LOSSES[name](LSTMModule)(ours)
    data = transitions(name)
    del data[key]
    named = r"\('next', 'observation'\)" if isinstance(key, tuple) else f"'{key}'"
    assert_rejected(loss, data, KeyError, f"{type(loss).__name__} needs the entry {named}")


def redq():
    return ours.REDQLoss(policy(GRUModule), qvalue(GRUModule), num_qvalue_nets=3, target_entropy=-2.0)


def test_redq_starts_from_zeros_as_well():  # TorchRL's runs the networks under vmap, which a GRU of PyTorch can't
    loss, data = redq(), transitions("redq")
    from_zeros, from_elsewhere = copy.deepcopy(loss), copy.deepcopy(loss)
    started = hidden(data.clone()).apply(torch.zeros_like).select("embed_h", "judged_h")
    started = data.clone().update(started).update({"next": started})
    terms, gradients = trained(loss, data)
    torch.testing.assert_close(trained(from_zeros, started), (terms, gradients), rtol=1e-9, atol=1e-12)
    assert not torch.equal(trained(from_elsewhere, hidden(started))[0]["loss_qvalue"], terms["loss_qvalue"])


def test_redq_names_a_hidden_state_that_is_there_for_one_of_the_two_observations():
    now = hidden(transitions("redq"))
    following = transitions("redq").update({"next": now.select("embed_h")})
    assert_rejected(redq(), now, KeyError, r"REDQLoss needs the entry \('next', 'embed_h'\)")
    assert_rejected(redq(), following, KeyError, "REDQLoss needs the entry 'embed_h'")


class Carried(nn.Linear):
    """A linear layer that adds a state if there is one."""

    def __init__(self):
        super().__init__(OBSERVATION, ACTIONS, dtype=torch.float64)

    def forward(self, observation, state=None):
        x = super().forward(observation)
        return x if state is None else x + state


def test_an_input_whose_default_is_none_may_be_absent():
    layer = Carried()
    with_state, without = (
        ours.DQNLoss(TensorDictModule(layer, read, ["action_value"]), action_space="one_hot")
        for read in (["observation", "state"], ["observation"])
    )
    data = transitions("dqn")
    assert torch.equal(with_state(data.clone())["loss"], without(data.clone())["loss"])
    data["state"] = torch.ones(*BATCH, ACTIONS, dtype=torch.float64)
    assert not torch.equal(with_state(data.clone())["loss"], without(data.clone())["loss"])


class Failing(nn.Module):
    def forward(self, *_):
        raise ValueError("the network's own affair")


@every_loss
def test_other_errors_of_a_network_are_left_as_they_are(name):
    loss = LOSSES[name](LSTMModule)(ours)
    network = loss.value_network if name == "dqn" else loss.actor_network
    (module,) = (m for m in network.modules() if isinstance(m, LSTMModule))
    module.lstm.forward = Failing().forward
    with pytest.raises(ValueError, match="own affair"):
        loss(transitions(name))
