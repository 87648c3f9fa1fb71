"""Dreamer's losses against TorchRL: the same networks and data give the same outputs, gradients and states.

Where TorchRL is wrong the promise is tested in test_dreamer.py instead: its λ-returns take the last dimension, of
length 1, for time and so look one step ahead, unless the estimator is told its time_dim; and observations that are
not images are summed over batch and time.
"""

import pytest
import torch
from fusedrl.losses import ValueEstimators
from fusedrl.losses import dreamer as ours
from helpers_dreamer import ACTION, BELIEF, STATE, actor_model, imagined, sequences, value_model, world_model
from tensordict import TensorDict
from tensordict.nn import TensorDictModule

pytest.importorskip("torchrl")
from torchrl import objectives as theirs
from torchrl.data import Composite, Unbounded
from torchrl.envs.model_based.dreamer import DreamerEnv
from torchrl.modules import DreamerActor, RSSMPrior, WorldModelWrapper

# Both compute in float64, but TorchRL keeps γ and λ in float32.
CLOSE = {"rtol": 1e-6, "atol": 1e-7}
FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}  # TorchRL's own modules: tens of operations at 1e-7 each

MODEL_OPTIONS = {
    "defaults": {},
    "free_nats": {"free_nats": 1.5},
    "no_free_nats": {"free_nats": 0},
    "delayed_clamp": {"free_nats": 1.5, "delayed_clamp": True},
    "average": {"global_average": True},
    "average_free_nats": {"global_average": True, "free_nats": 0.5},
    "average_delayed_clamp": {"global_average": True, "free_nats": 0.1, "delayed_clamp": True},
    "coefficients": {"lambda_kl": 0.5, "lambda_reco": 0.2, "lambda_reward": 0.1},
    "l1": {"reco_loss": "l1", "reward_loss": "l1"},
    "smooth_l1": {"reco_loss": "smooth_l1", "reward_loss": "smooth_l1"},
}
VALUE_OPTIONS = {
    "defaults": {},
    "l1": {"value_loss": "l1"},
    "smooth_l1": {"value_loss": "smooth_l1"},
    "gamma": {"gamma": 0.5},
    "no_discount": {"discount_loss": False},
}
ACTOR_OPTIONS = {
    "defaults": {},
    "horizon": {"imagination_horizon": 4},
    "one_step": {"imagination_horizon": 1},
    "no_discount": {"discount_loss": False, "imagination_horizon": 4},
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def outputs(loss, data):
    torch.manual_seed(1)  # the imagination draws
    return loss(data)


def gradients(losses, parameters):
    return {
        name: torch.autograd.grad(x.sum(), parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        for name, x in losses.items()
    }


def assert_same(a, b, data, parameters, tolerance):
    before = data.clone()
    (a, a_data), (b, b_data) = outputs(a, data), outputs(b, data)
    assert (data == before).all()
    torch.testing.assert_close(a.to_dict(), b.to_dict(), **tolerance)
    torch.testing.assert_close(gradients(a, parameters), gradients(b, parameters), **tolerance)
    assert a_data.batch_size == b_data.batch_size
    torch.testing.assert_close(a_data.to_dict(), b_data.to_dict(), **tolerance)
    assert not any(x.requires_grad for x in a_data.values(True, True))


@pytest.mark.parametrize("options", MODEL_OPTIONS.values(), ids=MODEL_OPTIONS)
def test_the_model_loss_agrees_under_every_option(options):
    model = world_model()
    losses = [library.DreamerModelLoss(model, **options) for library in (ours, theirs)]
    assert_same(*losses, sequences(), list(model.parameters()), CLOSE)


@pytest.mark.parametrize("options", VALUE_OPTIONS.values(), ids=VALUE_OPTIONS)
def test_the_value_loss_agrees_under_every_option(options):
    value = value_model()
    losses = [library.DreamerValueLoss(value, **options) for library in (ours, theirs)]
    assert_same(*losses, imagined(), list(value.parameters()), CLOSE)


def rssm():
    """Policy, value and environment of TorchRL's modules, all of whose layers have seen data, and states to start."""
    prior = RSSMPrior(Unbounded((ACTION,)), hidden_dim=BELIEF, rnn_hidden_dim=BELIEF, state_dim=STATE)
    value = value_model().float()
    reward = value_model().float()
    reward.out_keys = ["reward"]
    model = WorldModelWrapper(
        TensorDictModule(prior, ["state", "belief", "action"], ["_", "_", "state", "belief"]),
        TensorDictModule(reward.module, ["state", "belief"], ["reward"]),
    )
    env = DreamerEnv(model, prior_shape=torch.Size([STATE]), belief_shape=torch.Size([BELIEF]))
    env.action_spec = Unbounded((ACTION,))
    env.observation_spec = Composite(state=Unbounded((STATE,)), belief=Unbounded((BELIEF,)))
    env.reward_spec = Unbounded((1,))
    actor = actor_model(DreamerActor(ACTION, depth=1, num_cells=5))
    states = TensorDict({"state": torch.randn(6, STATE), "belief": torch.randn(6, BELIEF)}, [6])
    model(actor(states.clone()))
    return actor, value, env, states


@pytest.mark.parametrize("value_type", ["TD0", "TD1", "TDLambda"])
@pytest.mark.parametrize("options", ACTOR_OPTIONS.values(), ids=ACTOR_OPTIONS)
def test_the_actor_loss_agrees_under_every_option_and_estimator(options, value_type):
    actor, value, env, states = rssm()
    a, b = (library.DreamerActorLoss(actor, value, env, **options) for library in (ours, theirs))
    a.make_value_estimator(ValueEstimators[value_type], gamma=0.9)
    time = {} if value_type == "TD0" else {"time_dim": -2}
    b.make_value_estimator(theirs.ValueEstimators[value_type], gamma=0.9, **time)
    assert_same(a, b, states, list(actor.parameters()), FLOAT32)


def test_without_an_estimator_of_its_own_the_actor_loss_takes_the_same_discounts():
    actor, value, env, states = rssm()
    losses = [library.DreamerActorLoss(actor, value, env, imagination_horizon=1) for library in (ours, theirs)]
    assert_same(*losses, states, list(actor.parameters()), FLOAT32)


def test_model_and_value_get_no_gradient_from_the_actor_loss():
    actor, value, env, states = rssm()
    ours.DreamerActorLoss(actor, value, env, imagination_horizon=3)(states)[0]["loss_actor"].backward()
    assert all(p.grad is None and p.requires_grad for p in (*env.parameters(), *value.parameters()))
    assert all(p.grad is not None for p in actor.parameters())


def test_states_are_exchanged():
    actor, value, env, states = rssm()
    model = world_model()
    for name, arguments, data in (
        ("DreamerModelLoss", (model,), sequences()),
        ("DreamerActorLoss", (actor, value, env), states),
        ("DreamerValueLoss", (value_model(),), imagined()),
    ):
        a, b = (getattr(library, name)(*arguments) for library in (ours, theirs))
        outputs(a, data), outputs(b, data)  # the estimator is saved once it is used
        assert a.state_dict().keys() == b.state_dict().keys()
        a.load_state_dict(b.state_dict(), strict=True)
        b.load_state_dict(a.state_dict(), strict=True)


@pytest.mark.parametrize("name", ["DreamerModelLoss", "DreamerActorLoss", "DreamerValueLoss"])
def test_the_keys_are_the_same(name):
    a, b = (getattr(library, name).default_keys() for library in (ours, theirs))
    assert vars(a) == vars(b)


@pytest.mark.parametrize("name", ["gamma", "lmbda"])
def test_a_discount_is_refused_with_the_same_error(name):
    for library in (ours, theirs):
        with pytest.raises(TypeError, match="make_value_estimator"):
            library.DreamerActorLoss(actor_model(), value_model(), torch.nn.Identity(), **{name: 0.9})
