"""DreamerV3's losses against TorchRL: the same networks and data give the same outputs, gradients and states.

Where TorchRL is wrong the promise is tested in test_dreamer_v3.py instead: without a continuation model its λ-returns
look one step ahead, unless the estimator is told its time_dim; the balanced divergence doesn't mix its distributions
with a uniform one; integer ends of episodes are inverted bit by bit; and half-precision predictions decode to NaN.
"""

import pytest
import torch
from fusedrl.losses import dreamer_v3 as ours
from fusedrl.losses.functional import categorical_kl, discrete_regression
from helpers_dreamer import ACTION, BELIEF, STATE, actor_model, imagined
from helpers_dreamer_v3 import BINS, Env, continuation_model, critic, experience, world_model
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torch import distributions as D

pytest.importorskip("torchrl")
from torchrl import objectives as theirs
from torchrl.data import Composite, Unbounded
from torchrl.envs.model_based.dreamer import DreamerEnv
from torchrl.modules import DreamerActor, RSSMPriorV3, WorldModelWrapper

# Both compute in float64, but TorchRL keeps γ, λ, and both keep bins and the range of returns, in float32.
CLOSE = {"rtol": 1e-6, "atol": 1e-7}
FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}  # TorchRL's own modules: tens of operations at 1e-7 each

MODEL_OPTIONS = {
    "defaults": {},
    "average": {"global_average": True},
    "l1": {"reco_loss": "l1"},
    "no_symlog": {"reco_symlog": False},
    "coefficients": {"lambda_kl": 2.0, "lambda_reco": 3.0, "lambda_reward": 4.0},
    "separate": {"kl_mode": "separate", "unimix": 0.1, "lambda_dynamic": 2.0, "lambda_representation": 3.0},
    "separate_weighted": {"kl_mode": "separate", "lambda_kl": 2.0, "free_bits": 0.5},
    "balance": {"kl_alpha": 0.3, "free_bits": 0.01},
    "attached": {"detach_output": False},
}
ACTOR_OPTIONS = {
    "defaults": {},
    "no_discount": {"discount_loss": False},
    "no_entropy": {"entropy_bonus": 0.0},
    "reinforce": {"use_reinforce": True, "entropy_bonus": 0.5},
    "no_normalization": {"return_normalization": False},
    "narrow": {
        "return_normalization_rate": 0.5,
        "return_normalization_min_scale": 1e-3,
        "return_normalization_quantiles": (0.2, 0.7),
    },
    "reinforce_narrow": {
        "use_reinforce": True,
        "return_normalization_rate": 0.5,
        "return_normalization_min_scale": 1e-3,
    },
    "one_step": {"imagination_horizon": 1},
}
VALUE_OPTIONS = {
    "defaults": {},
    "gamma": {"gamma": 0.5},
    "no_discount": {"discount_loss": False},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "slow": {"slow_critic_regularization": 0.5},
    "slow_none": {"slow_critic_regularization": 0.5, "reduction": "none"},
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def gradients(losses, parameters):
    return {
        name: torch.autograd.grad(x.sum(), parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        for name, x in losses.items()
        if x.requires_grad
    }


def assert_same(a, b, data, parameters, tolerance=CLOSE):
    """The same outputs, gradients and states of both losses; neither changes its input."""
    found = []
    for loss in (a, b):
        seen = data.clone()
        torch.manual_seed(1)  # the imagination draws
        found.append(loss(seen))
        assert set(seen.keys(True, True)) == set(data.keys(True, True))
        assert all(torch.equal(seen[key], data[key]) for key in data.keys(True, True))
    a_out, b_out = found
    if isinstance(a_out, tuple):
        (a_out, a_data), (b_out, b_data) = found
        assert a_data.batch_size == b_data.batch_size
        torch.testing.assert_close(a_data.detach().to_dict(), b_data.detach().to_dict(), **tolerance)
        differentiable = [{k for k, x in d.items(True, True) if x.requires_grad} for d in (a_data, b_data)]
        assert differentiable[0] == differentiable[1]
    torch.testing.assert_close(a_out.detach().to_dict(), b_out.detach().to_dict(), check_dtype=False, **tolerance)
    assert set(a.out_keys) == set(a_out.keys())
    torch.testing.assert_close(gradients(a_out, parameters), gradients(b_out, parameters), **tolerance)
    assert_states_are_exchanged(a, b)


def assert_states_are_exchanged(a, b):
    state = {key: x.clone() for key, x in b.state_dict().items()}
    a.load_state_dict(state, strict=True)
    b.load_state_dict(a.state_dict(), strict=True)
    for key, x in a.state_dict().items():
        torch.testing.assert_close(x, state[key], check_dtype=False, **CLOSE)


# --- the utilities ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["symlog", "symexp"])
def test_symlog_and_symexp(name):
    x = torch.tensor([-30.0, -1.0, -1e-4, 0.0, 1e-4, 1.0, 30.0], dtype=torch.float64, requires_grad=True)
    a, b = (getattr(module, name)(x) for module in (discrete_regression, theirs))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in (a, b)), rtol=1e-12, atol=1e-12)


def test_two_hot():
    bins = discrete_regression.symexp_bins(BINS).double()
    x = torch.tensor([-1e12, -300.0, -1.0, 0.0, 0.5, 784.0, 1e6, 1e12], dtype=torch.float64)
    logits = torch.randn(len(x), BINS, dtype=torch.float64, requires_grad=True)
    for name, arguments in (
        ("two_hot_encode", (x, bins)),
        ("two_hot_decode", (logits, bins)),
        ("two_hot_cross_entropy", (logits, x, bins)),
        ("two_hot_cross_entropy", (logits, x.unsqueeze(-1), bins)),
    ):
        a, b = (getattr(module, name)(*arguments) for module in (discrete_regression, theirs))
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        if a.requires_grad:
            torch.testing.assert_close(*(torch.autograd.grad(y.sum(), logits)[0] for y in (a, b)), **CLOSE)


def test_divergences_of_discrete_latents():
    posterior, prior = (torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for name, arguments in (
        ("categorical_kl_balanced", ()),
        ("categorical_kl_balanced", (0.3, 0.2)),
        ("categorical_kl_terms", ()),
        ("categorical_kl_terms", (2.0, 0.2)),
    ):
        a, b = (getattr(module, name)(posterior, prior, *arguments) for module in (categorical_kl, theirs))
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        a, b = (sum(y) if isinstance(y, tuple) else y for y in (a, b))
        inputs = (posterior, prior)
        torch.testing.assert_close(torch.autograd.grad(a, inputs), torch.autograd.grad(b, inputs), **CLOSE)


# --- the losses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reward", ["reward_logits", "reward"])
@pytest.mark.parametrize("options", MODEL_OPTIONS.values(), ids=MODEL_OPTIONS)
def test_model_loss(options, reward):
    model = world_model(reward)
    options = {"reward_two_hot": reward == "reward_logits", "num_reward_bins": BINS, "free_bits": 0.1, **options}
    losses = (module.DreamerV3ModelLoss(model, **options) for module in (ours, theirs))
    assert_same(*losses, experience(), list(model.parameters()))


@pytest.mark.parametrize("without", [None, ("next", "terminated")])
def test_model_loss_of_going_on(without):
    model, data = world_model(), experience()
    options = {"num_reward_bins": BINS, "lambda_continue": 2.0, "continue_target_scale": 0.9}
    losses = (module.DreamerV3ModelLoss(model, **options) for module in (ours, theirs))
    # TorchRL casts this term to float32.
    assert_same(*losses, data if without is None else data.exclude(without), list(model.parameters()), FLOAT32)


@pytest.mark.parametrize("symlog", [True, [True, False], [False, True]])
def test_model_loss_of_several_observations(symlog):
    model = world_model()
    losses = [
        module.DreamerV3ModelLoss(model, num_reward_bins=BINS, reco_symlog=symlog, free_bits=0.1)
        for module in (ours, theirs)
    ]
    for loss in losses:
        loss.set_keys(pixels=["pixels", "vector"], reco_pixels=["reco_pixels", "reco_vector"])
    assert_same(*losses, experience(), list(model.parameters()))


@pytest.mark.parametrize("symlog", [True, False])
def test_model_loss_of_integer_images(symlog):
    model, data = world_model(), experience()
    data["next", "pixels"] = torch.randint(256, data["next", "pixels"].shape, dtype=torch.uint8)
    losses = (module.DreamerV3ModelLoss(model, num_reward_bins=BINS, reco_symlog=symlog) for module in (ours, theirs))
    assert_same(*losses, data, list(model.parameters()), FLOAT32)


def told_their_time(*losses, gamma=0.9, lmbda=0.8):
    """TorchRL takes the last dimension, of length 1, for time."""
    for loss, options in zip(losses, ({}, {"time_dim": -2}), strict=True):
        loss.make_value_estimator(theirs.ValueEstimators.TDLambda.name if not options else
                                  theirs.ValueEstimators.TDLambda, gamma=gamma, lmbda=lmbda, **options)  # fmt: skip
    return losses


def actor_losses(actor, value, env, **options):
    options = {"imagination_horizon": 4, **options}
    return told_their_time(*(module.DreamerV3ActorLoss(actor, value, env, **options) for module in (ours, theirs)))


@pytest.mark.parametrize("continues", [False, True])
@pytest.mark.parametrize("options", ACTOR_OPTIONS.values(), ids=ACTOR_OPTIONS)
def test_actor_loss(options, continues):
    actor, value, env = actor_model(), critic(), Env()
    model = continuation_model() if continues else None
    losses = actor_losses(actor, value, env, continuation_model=model, **options)
    start = experience().select("state", "belief")
    trained = [*actor.parameters(), *value.parameters(), *env.parameters(), *continuation_model().parameters()]
    for _ in range(2):  # the range of the returns moves
        assert_same(*losses, start, trained)
    torch.testing.assert_close(losses[0].return_high, losses[1].return_high, check_dtype=False, **CLOSE)


@pytest.mark.parametrize("reinforce", [False, True])
def test_actor_loss_of_a_policy_without_an_entropy_in_closed_form(reinforce):
    def squashed(loc, scale):
        return D.TransformedDistribution(D.Independent(D.Normal(loc, scale / 10), 1), D.TanhTransform(cache_size=1))

    actor = ProbabilisticTensorDictSequential(
        actor_model()[0],
        ProbabilisticTensorDictModule(["loc", "scale"], ["action"], distribution_class=squashed),
    )
    losses = actor_losses(actor, critic(), Env(), use_reinforce=reinforce, entropy_bonus=0.5)
    assert_same(*losses, experience().select("state", "belief"), list(actor.parameters()))


def test_how_returns_are_normalised_is_read_under_the_same_names():
    options = {"rate": 0.3, "quantiles": (0.1, 0.8), "min_scale": 0.5}
    options = {f"return_normalization_{name}": value for name, value in options.items()}
    for loss in actor_losses(actor_model(), critic(), Env(), **options):
        assert {name: getattr(loss, name) for name in options} == options


def test_actor_loss_doesnt_move_the_range_of_returns_when_it_is_evaluated():
    losses = actor_losses(actor_model(), critic(), Env(), return_normalization_rate=0.5)
    for loss in losses:
        loss.eval()
    assert_same(*losses, experience().select("state", "belief"), list(losses[0].parameters()))
    assert losses[0].return_high == losses[1].return_high == 0


def test_actor_loss_in_torchrls_own_environment():
    prior = RSSMPriorV3(
        Unbounded((ACTION,)),
        hidden_dim=4,
        rnn_hidden_dim=BELIEF,
        num_categoricals=1,
        num_classes=STATE,
        action_dim=ACTION,
        num_blocks=1,
    )
    reward = TensorDictModule(torch.nn.Linear(STATE, 1), ["state"], ["reward"])
    transition = TensorDictModule(prior, ["state", "belief", "action"], ["_", "state", "belief"])
    env = DreamerEnv(WorldModelWrapper(transition, reward), prior_shape=(STATE,), belief_shape=(BELIEF,))
    env.observation_spec = Composite(state=Unbounded(STATE), belief=Unbounded(BELIEF))
    env.state_spec = env.observation_spec.clone()
    env.action_spec, env.reward_spec = Unbounded((ACTION,)), Unbounded((1,))
    policy = TensorDictModule(DreamerActor(ACTION, depth=1, num_cells=4), ["state", "belief"], ["loc", "scale"])
    actor = ProbabilisticTensorDictSequential(
        policy,
        ProbabilisticTensorDictModule(
            ["loc", "scale"], ["action"], distribution_class=lambda loc, scale: D.Independent(D.Normal(loc, scale), 1),
            default_interaction_type="random",
        ),
    )  # fmt: skip
    start = TensorDict({"state": torch.randn(3, STATE), "belief": torch.randn(3, BELIEF)}, [3])
    actor(start.clone())
    assert_same(*actor_losses(actor, critic().float(), env), start, list(actor.parameters()), FLOAT32)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("options", VALUE_OPTIONS.values(), ids=VALUE_OPTIONS)
def test_value_loss(options, weighted):
    value, data = critic(), imagined((2, 3, 4))
    if weighted:
        data["discount_weight"] = torch.rand(2, 3, 4, 1, dtype=torch.float64)
    losses = value_losses(value, **options)
    assert_same(*losses, data, list(value.parameters()))
    assert_same(*losses, data.reshape(-1), list(value.parameters()))


def value_losses(value, **options):
    """Both losses, whose slow values differ from the value, but not from one another."""
    losses = [module.DreamerV3ValueLoss(value, **options) for module in (ours, theirs)]
    for loss in losses:
        torch.manual_seed(2)
        for name, x in sorted(loss.named_buffers()):
            if name.startswith("target_"):
                x.data.add_(0.1 * torch.randn_like(x))
    return losses


@pytest.mark.parametrize("key", ["state_value_logits", "state_value"])
def test_value_loss_of_logits(key):
    value = TensorDictModule(critic(logits=True).module, ["state", "belief"], [key])
    assert_same(
        *value_losses(value, value_loss="two_hot", num_value_bins=BINS), imagined((2, 3, 4)), list(value.parameters())
    )


def test_value_loss_follows_the_actors_discount():
    value = critic()
    actors = told_their_time(*(m.DreamerV3ActorLoss(actor_model(), value, Env()) for m in (ours, theirs)), gamma=0.7)
    losses = [m.DreamerV3ValueLoss(value, actor_loss=a) for m, a in zip((ours, theirs), actors, strict=True)]
    assert_same(*losses, imagined(), list(value.parameters()))
    assert losses[0].gamma == 0.7


def test_the_discount_of_the_value_loss_is_assigned_or_taken_from_an_actor_once():
    value = critic()
    actors = told_their_time(*(m.DreamerV3ActorLoss(actor_model(), value, Env()) for m in (ours, theirs)), gamma=0.75)
    losses = [m.DreamerV3ValueLoss(value, gamma=0.5) for m in (ours, theirs)]
    for loss, actor in zip(losses, actors, strict=True):
        loss.sync_gamma_with_actor_loss(actor)
    told_their_time(*actors, gamma=0.25)
    assert_same(*losses, imagined(), list(value.parameters()))
    assert losses[0].gamma == losses[1].gamma == 0.75
    for loss in losses:
        loss.gamma = 0.125
    assert_same(*losses, imagined(), list(value.parameters()))


@pytest.mark.parametrize("options", [{}, {"slow_critic_regularization": 0.5}, {"reduction": "none"}])
def test_replay_value_loss(options):
    value, data = critic(), experience((3, 6)).select("state", "belief", "next")
    data["bootstrap"] = torch.randn(3, 6, dtype=torch.float64)
    data["state"].requires_grad_()
    trained = [data["state"], *value.parameters()]
    a, b = (loss.replay_value_loss(data, horizon=20.0, lmbda=0.7) for loss in value_losses(value, **options))
    torch.testing.assert_close(a.detach().to_dict(), b.detach().to_dict(), **CLOSE)
    torch.testing.assert_close(gradients(a, trained), gradients(b, trained), **CLOSE)


def whole(module, model, actor, value, env, actor_options, value_options, **options):
    model_loss = module.DreamerV3ModelLoss(model, num_reward_bins=BINS, free_bits=0.1, detach_output=False)
    actor_loss = module.DreamerV3ActorLoss(
        actor, value, env, **{"imagination_horizon": 4, "entropy_bonus": 0.1, **actor_options}
    )
    value_loss = module.DreamerV3ValueLoss(value, actor_loss=actor_loss, **value_options)
    return module.DreamerV3Loss(model_loss, actor_loss, value_loss, **options)


WHOLE_OPTIONS = {
    "defaults": ({}, {}, {}),
    "reinforce": ({"use_reinforce": True}, {"slow_critic_regularization": 1.0}, {}),
    "replay": ({}, {}, {"replay_value_loss_weight": 2.0, "continuation_horizon": 10.0, "lmbda": 0.5}),
}


@pytest.mark.parametrize(("actor_options", "value_options", "options"), WHOLE_OPTIONS.values(), ids=WHOLE_OPTIONS)
@pytest.mark.parametrize("batch", [(3, 4), (5,)])
def test_the_losses_together(batch, actor_options, value_options, options):
    networks = [world_model(), actor_model(), critic(), Env()]
    losses = [whole(m, *networks, actor_options, value_options, **options) for m in (ours, theirs)]
    told_their_time(*(loss.actor_loss for loss in losses))
    trained = [p for network in networks for p in network.parameters()]
    assert_same(*losses, experience(batch), trained)
