"""DreamerV3's losses: returns through the scan, padding and ends left out, calls with tensors, casts, refusals.

The values are those of test_parity_dreamer_v3.py, or computed here by the definition.
"""

import copy
import pickle

import pytest
import torch
from fusedrl.kernels import use_backend
from fusedrl.losses.dreamer_v3 import DreamerV3ActorLoss, DreamerV3Loss, DreamerV3ModelLoss, DreamerV3ValueLoss
from fusedrl.losses.functional.discrete_regression import symlog
from fusedrl.losses.functional.imagination import discount_weight, quantile
from fusedrl.losses.targets import SoftUpdate
from helpers_dreamer import ACTION, BACKENDS, STATE, Gaussian, actor_model, imagined
from helpers_dreamer_v3 import BINS, FEATURES, Env, continuation_model, critic, experience, world_model
from helpers_q import CLOSE, NoHostSync
from tensordict import TensorDict
from tensordict.nn import (
    CompositeDistribution,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from torch import distributions as D
from torch import nn

GAMMA, LMBDA, HORIZON = 0.9, 0.8, 4
DOUBLE = {"dtype": torch.float64}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def states(batch=(5,)):
    return experience(batch).select("state", "belief")


def model_loss(**options):
    defaults = {"num_reward_bins": BINS, "free_bits": 0.1, "lambda_continue": 1.0, "detach_output": False}
    loss = DreamerV3ModelLoss(world_model(), **{**defaults, **options})
    loss.set_keys(pixels=["pixels", "vector"], reco_pixels=["reco_pixels", "reco_vector"])
    return loss


def actor_loss(env=None, value_type="TDLambda", actor=None, value=None, **options):
    env, actor, value = env or Env(), actor or actor_model(), value or critic()
    options = {"imagination_horizon": HORIZON, "entropy_bonus": 0.1, **options}
    hyperparameters = {"gamma": GAMMA, "lmbda": LMBDA} if value_type == "TDLambda" else {"gamma": GAMMA}
    return DreamerV3ActorLoss(actor, value, env, **options).make_value_estimator(value_type, **hyperparameters)


def value_loss(**options):
    logits = options.get("value_loss") == "two_hot"
    return DreamerV3ValueLoss(critic(logits), **({"num_value_bins": BINS} if logits else {}), **options)


def whole_loss(**options):
    value = critic()
    actor = actor_loss(value=value, continuation_model=continuation_model())
    return DreamerV3Loss(
        model_loss(), actor, DreamerV3ValueLoss(value, actor_loss=actor, slow_critic_regularization=1.0), **options
    )


LOSSES = {
    "model": (model_loss, experience),
    "separate": (lambda **options: model_loss(kl_mode="separate", unimix=0.01, **options), experience),
    "actor": (actor_loss, states),
    "reinforce": (
        lambda **options: actor_loss(use_reinforce=True, continuation_model=continuation_model(), **options),
        states,
    ),
    "value": (lambda **options: value_loss(slow_critic_regularization=1.0, **options), imagined),
    "two_hot": (
        lambda **options: value_loss(value_loss="two_hot", slow_critic_regularization=1.0, **options),
        imagined,
    ),
    "whole": (whole_loss, experience),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def made(name, **options):
    make, data = LOSSES[name]
    return make(**options), data()


def run(loss, data):
    """The losses alone."""
    torch.manual_seed(1)  # the imagination draws
    out = loss(data)
    return out[0] if isinstance(out, tuple) else out


def gradients(loss, losses):
    """Of each loss with respect to each parameter of the module."""
    names, parameters = zip(*loss.named_parameters(), strict=True)
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    return {
        key: dict(zip(names, torch.autograd.grad(x.sum(), parameters, **options), strict=True))
        for key, x in losses.items()
        if key.startswith("loss") and x.requires_grad
    }


def assert_same(loss, losses, other, others):
    losses, others = (x.exclude("replay_context") for x in (losses, others))
    torch.testing.assert_close(losses.detach().to_dict(), others.detach().to_dict(), **CLOSE)
    torch.testing.assert_close(gradients(loss, losses), gradients(other, others), **CLOSE)


# --- λ-returns ----------------------------------------------------------------------------------------------------


def looped_returns(reward, next_value, next_continuation, lmbda):
    """The returns by the definition, last step first."""
    returns, after = [], next_value[:, -1]
    for t in reversed(range(reward.shape[1])):
        discount = GAMMA * next_continuation[:, t]
        after = reward[:, t] + discount * ((1 - lmbda) * next_value[:, t] + lmbda * after)
        returns.insert(0, after)
    return torch.stack(returns, 1)


def objective_by_loop(loss, start, lmbda):
    """The reparameterised objective by plain autograd through model, value, continuation and loop."""
    torch.manual_seed(1)
    steps = loss.model_based_env.rollout(HORIZON, loss.actor_model, False, start, False)
    features = [x.select("state", "belief") for x in (steps, steps["next"])]
    next_value = loss.value_model(features[1].clone())["state_value"]
    ones = [torch.ones_like(next_value)] * 2
    model = loss.continuation_model
    now, following = ones if model is None else [model(x.clone())["continuation"] for x in features]
    returns = looped_returns(steps["next", "reward"], next_value, following, lmbda)
    weight = (GAMMA ** torch.arange(HORIZON, **DOUBLE).unsqueeze(-1) * now.cumprod(1)).detach()
    value = -(weight * returns).mean()
    return value, returns, torch.autograd.grad(value, list(loss.actor_model.parameters()))


@pytest.mark.parametrize(
    ("value_type", "lmbda", "which"),
    [("TD0", 0.0, "torch"), ("TD1", 1.0, "torch")] + [("TDLambda", LMBDA, which) for which in BACKENDS],
)
@pytest.mark.parametrize("continues", [False, True])
def test_the_policy_gets_the_gradient_of_the_returns_through_the_scan(value_type, lmbda, continues, which):
    model = continuation_model() if continues else None
    loss = actor_loss(value_type=value_type, continuation_model=model, entropy_bonus=0.0, return_normalization=False)
    start = states()
    expected, returns, gradient = objective_by_loop(loss, start, lmbda)
    torch.manual_seed(1)
    with use_backend(which):
        losses, data = loss(start)
        found = torch.autograd.grad(losses["loss_actor"], list(loss.actor_model.parameters()))
    torch.testing.assert_close(data["lambda_target"], returns.detach(), **CLOSE)
    torch.testing.assert_close(losses["loss_actor"], expected, **CLOSE)
    torch.testing.assert_close(found, gradient, **CLOSE)
    assert all(p.grad is None for p in (*loss.model_based_env.parameters(), *loss.value_model.parameters()))


def test_reinforce_takes_no_gradient_through_the_model():
    loss = actor_loss(use_reinforce=True, entropy_bonus=0.0, return_normalization=False)
    torch.manual_seed(1)
    losses, data = loss(states())
    features = data.select("state", "belief")
    value = loss.value_model(features.clone())["state_value"]
    log_prob = loss.actor_model.get_dist(features).log_prob(data["action"])
    advantage = (data["lambda_target"] - value).squeeze(-1)
    expected = -(data["discount_weight"].squeeze(-1) * log_prob * advantage.detach()).mean()
    parameters = list(loss.actor_model.parameters())
    torch.testing.assert_close(losses["loss_actor"], expected, **CLOSE)
    torch.testing.assert_close(
        torch.autograd.grad(losses["loss_actor"], parameters), torch.autograd.grad(expected, parameters), **CLOSE
    )


@pytest.mark.parametrize("afterwards", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"use_reinforce": True}], ids=["reparameterised", "reinforce"])
def test_what_follows_the_end_of_an_imagined_trajectory_is_ignored(options, afterwards):
    torch.manual_seed(2)
    networks = {"actor": actor_model(), "value": critic(), "continuation_model": continuation_model()}
    found = []
    for after in (None, afterwards):
        torch.manual_seed(2)
        loss = actor_loss(Env(end=HORIZON - 1, afterwards=after), **networks, **options)
        losses = run(loss, states())
        found.append((losses.exclude("continuation_mean"), gradients(loss, losses)))
    torch.testing.assert_close(found[0][0].detach().to_dict(), found[1][0].detach().to_dict(), **CLOSE)
    torch.testing.assert_close(found[0][1], found[1][1], **CLOSE)


def test_the_weight_of_a_step_is_how_likely_it_is_reached():
    continuation = torch.tensor([0.5, 1.0, 0.1]).view(1, 3, 1)
    weight = discount_weight(continuation, 0.9, continuation)
    torch.testing.assert_close(weight.flatten(), torch.tensor([0.5, 0.45, 0.0405]))


# --- the range of returns -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("q", [0.0, 0.05, 0.5, 0.95, 1.0])
def test_quantile_is_that_of_the_elements_that_count(q):
    x = torch.randn(4, 7, **DOUBLE)
    mask = torch.rand(4, 7) < 0.6
    torch.testing.assert_close(quantile(x, q), torch.quantile(x, q))
    torch.testing.assert_close(quantile(torch.where(mask, x, torch.nan), q, mask), torch.quantile(x[mask], q))


@pytest.mark.parametrize("masked", [False, True])
def test_the_quantile_of_more_elements_than_float32_counts_is_among_them(masked):
    x = torch.cat([torch.zeros(2**24 + 3), torch.ones(1)])  # float32 takes the position of the last for the next one
    mask = torch.ones_like(x, dtype=torch.bool) if masked else None
    assert quantile(x, 1.0, mask) == 1


def test_nothing_has_no_quantile():
    assert quantile(torch.zeros(0, 3), 0.5).isnan()
    assert not quantile(torch.zeros(1), 1.0, torch.tensor([False])).isfinite()


def test_returns_that_are_not_finite_do_not_stay_in_their_range():
    loss = actor_loss(return_normalization_rate=0.5)
    loss.retnorm.move_to(*loss.retnorm.moved(torch.linspace(0, 100, 101)))
    assert (loss.return_low, loss.return_high) == (2.5, 47.5)
    assert loss.retnorm.moved(torch.full((3,), torch.nan)) == (2.5, 47.5)
    assert loss.retnorm.moved(torch.zeros(3), torch.zeros(3, dtype=torch.bool)) == (2.5, 47.5)


def test_a_call_that_fails_leaves_the_range_of_returns_as_it_was():
    def refuse(module, args):
        if args[0].ndim == 2:  # not a step that is imagined, but all of them
            raise RuntimeError("too late")

    loss, start = actor_loss(), states()
    loss(start)
    before = loss.return_low.clone(), loss.return_high.clone()
    hook = loss.actor_model[0].register_forward_pre_hook(refuse)
    with pytest.raises(RuntimeError, match="too late"):
        loss(start)
    assert (loss.return_low, loss.return_high) == before
    hook.remove()
    loss(start)
    assert (loss.return_low, loss.return_high) != before


def test_a_policy_on_separate_dimensions_has_their_sum_of_entropies_and_log_probabilities():
    networks = {"env": Env(), "value": critic(), "use_reinforce": True}
    trunk = TensorDictModule(Gaussian(FEATURES, ACTION), ["state", "belief"], ["loc", "scale"])

    def loss_of(distribution):
        draw = ProbabilisticTensorDictModule(["loc", "scale"], ["action"], distribution_class=distribution)
        return actor_loss(actor=ProbabilisticTensorDictSequential(trunk, draw), **networks)

    start = states()
    apart = loss_of(D.Normal)
    together = loss_of(lambda loc, scale: D.Independent(D.Normal(loc, scale), 1))
    assert_same(apart, run(apart, start), together, run(together, start))


def test_a_policy_with_several_heads_is_trained():
    class Heads(nn.Linear):
        def forward(self, state, belief):
            return super().forward(torch.cat([state, belief], -1)).split([ACTION, 2], -1)

    trunk = TensorDictModule(
        Heads(FEATURES, ACTION + 2, **DOUBLE),
        ["state", "belief"],
        [("params", "move", "loc"), ("params", "say", "logits")],
    )
    draw = ProbabilisticTensorDictModule(
        ["params"],
        ["action", "word"],
        distribution_class=CompositeDistribution,
        distribution_kwargs={
            "distribution_map": {"move": lambda loc: D.Independent(D.Normal(loc, 1.0), 1), "say": D.Categorical},
            "name_map": {"move": "action", "say": "word"},
        },
        default_interaction_type="random",
    )
    loss = actor_loss(actor=ProbabilisticTensorDictSequential(trunk, draw), use_reinforce=True)
    gradient = gradients(loss, run(loss, states()))["loss_actor"]["actor_model.module.0.module.weight"]
    assert (gradient.abs().sum(-1) > 0).all()


# --- the world model ----------------------------------------------------------------------------------------------


def test_both_divergences_are_of_the_mixed_distributions():
    data = experience()
    losses = [run(model_loss(unimix=share, free_bits=0.0), data) for share in (0.0, 1.0)]
    assert losses[0]["loss_model_kl"] > 0.01
    torch.testing.assert_close(losses[1]["loss_model_kl"], torch.zeros(1, **DOUBLE))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_ends_may_be_numbers(dtype):
    loss, data = made("whole")
    as_numbers = data.clone()
    for key in ("done", "terminated"):
        as_numbers["next", key] = data["next", key].to(dtype) * 2
    other = copy.deepcopy(loss)
    assert_same(loss, run(loss, data), other, run(other, as_numbers))


def test_integer_rewards_are_computed_in_floating_point():
    for options in ({}, {"reward_two_hot": False}):
        data = experience()
        data["next", "reward"] = torch.randint(-5, 5, (3, 4, 1))
        real = data.clone()
        real["next", "reward"] = real["next", "reward"].double()
        loss = DreamerV3ModelLoss(
            world_model(**({"reward": "reward"} if options else {})), num_reward_bins=BINS, **options
        )
        assert_same(loss, run(loss, data), loss, run(loss, real))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_keeps_bins_range_and_discount(dtype):
    loss = whole_loss()
    before = {k: x.clone() for k, x in loss.named_buffers() if "_params" not in k}
    loss.to(dtype)
    after = dict(loss.named_buffers())
    assert {"model_loss.reward_bins", "value_loss.value_bins", "actor_loss.retnorm.high"} <= before.keys()
    for key, x in before.items():
        assert after[key].dtype == x.dtype, key
        assert torch.equal(after[key], x), key
    assert all(p.dtype == dtype for p in loss.parameters())


@pytest.mark.parametrize("symlogs", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_losses_are_finite_and_near(dtype, symlogs):
    loss, data = made("model", reco_symlog=symlogs)
    data["next", "pixels"] *= 200  # whose squares float16 can't hold
    data["next", "reward"] *= 1000
    other, halved = copy.deepcopy(loss).to(dtype), data.apply(lambda x: x.to(dtype) if x.is_floating_point() else x)
    for name, x in run(other, halved).items():
        torch.testing.assert_close(x.double(), run(loss, data)[name], rtol=0.05, atol=0.05)


# --- replayed values ----------------------------------------------------------------------------------------------


def replayed(batch=(2, 5)):
    data = experience(batch).select("state", "belief", "next")
    data["bootstrap"] = torch.randn(*batch, **DOUBLE)
    return data


def test_an_unreduced_loss_of_replayed_sequences_keeps_batch_dimensions_of_1():
    for batch, shape in (((4, 3), (4, 2)), ((4, 2), (4, 1)), ((1, 3), (1, 2))):
        assert value_loss(reduction="none").replay_value_loss(replayed(batch))["loss_replay_value"].shape == shape


def test_a_replayed_return_ends_where_the_trajectory_does():
    loss, data = value_loss(), replayed((1, 4))
    data["next", "reward"] = torch.tensor([9.0, 1.0, 2.0, 3.0], **DOUBLE).view(1, 4, 1)
    data["bootstrap"] = torch.tensor([[9.0, 10.0, 20.0, 30.0]], **DOUBLE)
    data["next", "terminated"] = torch.tensor([0, 0, 1, 0]).view(1, 4, 1)
    data["next", "done"] = torch.zeros(1, 4, 1, dtype=torch.bool)  # terminated, but not done: it ends all the same
    target = torch.tensor([1 + 0.5 * (0.5 * 10 + 0.5 * 2), 2.0, 3 + 0.5 * 30], **DOUBLE)
    value = loss.value_model(data.clone())["state_value"].flatten()[:3]
    error = (symlog(value) - symlog(target)).square()
    expected = (error * torch.tensor([1, 1, 0])).mean()  # what follows the last state of a trajectory is another's
    found = loss.replay_value_loss(data, horizon=2.0, lmbda=0.5)["loss_replay_value"]
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("fill", [float("nan"), float("inf")])
def test_the_bootstrap_of_a_terminal_state_is_ignored(fill):
    loss, data = value_loss(), replayed()
    terminated = data["next", "terminated"].squeeze(-1)
    assert terminated[:, 1:].any()
    poisoned = data.clone()
    poisoned["bootstrap"] = torch.where(terminated, fill, data["bootstrap"])
    a, b = (loss.replay_value_loss(x) for x in (data, poisoned))
    assert_same(loss, a, loss, b)


def test_sequences_of_one_state_have_no_replayed_return():
    with pytest.raises(RuntimeError, match="at least 2 steps"):
        value_loss().replay_value_loss(replayed((3, 1)))


def test_without_a_weight_nothing_is_learnt_from_replay_and_the_model_may_be_detached():
    value = critic()
    losses = [model_loss(detach_output=True), actor_loss(value=value), DreamerV3ValueLoss(value)]
    loss = DreamerV3Loss(*losses, replay_value_loss_weight=0.0)
    out = run(loss, experience())
    assert out["loss_replay_value"] == out["replay_value"] == 0
    assert set(out.keys()) == set(loss.out_keys)
    with pytest.raises(ValueError, match="detach_output=False"):
        DreamerV3Loss(*losses)


def test_a_slow_value_beyond_float16_is_not_infinite():
    logits = torch.randn(4, BINS).half()  # on bins up to 5e8
    value = TensorDictModule(nn.Identity(), ["x"], ["state_value_logits"])
    loss = DreamerV3ValueLoss(value, "two_hot", num_value_bins=BINS, slow_critic_regularization=1.0)
    half, full = (loss(TensorDict({"x": x, "lambda_target": torch.zeros(4)}, [4]))[0] for x in (logits, logits.float()))
    torch.testing.assert_close(half["value_slow_loss"], full["value_slow_loss"])


def test_an_updater_moves_the_slow_value_halfway():
    loss = value_loss(slow_critic_regularization=1.0)
    updater = SoftUpdate(loss, tau=0.5)
    before = {key: x.clone() for key, x in loss.target_value_model_params.items(True, True)}
    with torch.no_grad():
        for p in loss.parameters():
            p.add_(1)
    updater.step()
    for key, x in loss.target_value_model_params.items(True, True):
        torch.testing.assert_close(x, before[key] + 0.5)


# --- what all promise -----------------------------------------------------------------------------------------------


def padded(data, fill):
    """``data`` (batch size [B, ...]) with two rows of padding that hold ``fill``, and a mask that says so."""
    rows = data[:2].clone()
    padding = rows.apply(lambda x: torch.full_like(x, fill) if x.is_floating_point() else x)
    result = torch.cat([data, padding])
    valid = torch.arange(len(result)) < len(data)
    result["collector", "mask"] = valid.view(-1, *[1] * (result.ndim - 1)).expand(result.shape).clone()
    return result


@every_loss
def test_padding_is_ignored(name):
    loss, data = made(name)
    # The imagination draws for padded starts too.
    losses = [copy.deepcopy(loss) for _ in range(2)]
    found = [run(a, padded(data, fill)) for a, fill in zip(losses, (float("nan"), 0.5), strict=True)]
    assert_same(losses[0], found[0], losses[1], found[1])
    if name in ("model", "separate", "value", "two_hot"):
        assert_same(losses[0], found[0], loss, run(loss, data))


class Certain(Gaussian):
    """Always the mean."""

    def forward(self, *inputs):
        mean, std = super().forward(*inputs)
        return mean, 1e-300 * std


def test_nothing_is_imagined_from_padding():
    env, value = Env(), critic()
    env.transition.prior = Certain(env.transition.prior.in_features, STATE)  # draws differ where there are more rows
    actor = actor_loss(env, actor=actor_model(Certain(FEATURES, ACTION)), value=value, entropy_bonus=0.0)
    loss = DreamerV3Loss(model_loss(), actor, DreamerV3ValueLoss(value, actor_loss=actor))
    data, other = experience(), copy.deepcopy(loss)
    wanted, found = run(loss, data), run(other, padded(data, float("nan")))
    assert_same(loss, wanted, other, found)


def test_a_discount_that_is_assigned_takes_the_place_of_the_actors():
    actor = actor_loss(Env())
    loss = DreamerV3ValueLoss(critic(), actor_loss=actor)
    assert loss.gamma == actor.value_estimator.gamma
    loss.gamma = 0.125
    assert loss.gamma == 0.125


def test_steps_of_padding_end_a_replayed_sequence():
    loss, data = value_loss(), replayed((2, 3))
    for end in ("done", "terminated"):
        data["next", end].zero_()
    padding = replayed((2, 2)).apply(lambda x: torch.full_like(x, torch.nan) if x.is_floating_point() else x)
    longer = torch.cat([data, padding], 1)
    longer["collector", "mask"] = (torch.arange(5) < 3).expand(2, 5).clone()
    assert_same(loss, loss.replay_value_loss(longer), loss, loss.replay_value_loss(data))


@every_loss
def test_nothing_waits_for_the_device(name, monkeypatch):
    # The distributions' own checks of their arguments do.
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)
    loss, data = made(name)
    with NoHostSync():
        out = run(loss, data)
        sum(x.sum() for key, x in out.items() if key.startswith("loss")).backward()


# One compilation takes seconds: two steps are imagined, and the larger graphs are only captured.
@pytest.mark.parametrize(
    ("name", "backend"),
    [("reinforce", "eager"), ("two_hot", "aot_eager")],  # the others in test_every_loss.py
)
def test_compiled_whole_it_gives_the_eager_numbers(name, backend):
    torch._dynamo.reset()
    loss, data = made(name)
    for module in loss.modules():
        if isinstance(module, DreamerV3ActorLoss):
            module.imagination_horizon = 2
    other = copy.deepcopy(loss)
    compiled = torch.compile(other, fullgraph=True, backend=backend)
    assert_same(loss, run(loss, data), other, run(compiled, data))


@every_loss
def test_a_copy_and_a_pickle_give_the_same(name):
    loss, data = made(name)
    others = [copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))]
    wanted = run(loss, data)
    for other in others:
        assert_same(loss, wanted, other, run(other, data))


@every_loss
def test_called_with_tensors_it_returns_the_tuple_of_its_outputs(name):
    loss, data = made(name)
    other = copy.deepcopy(loss)
    wanted = run(loss, data)
    torch.manual_seed(1)
    found = other(**{key if isinstance(key, str) else "_".join(key): data[key] for key in loss.in_keys})
    assert len(found) == len(loss.out_keys)
    for key, x in zip(loss.out_keys, found, strict=True):
        if key != "replay_context":
            torch.testing.assert_close(x, wanted[key], **CLOSE)


def test_called_with_tensors_the_end_of_an_episode_stands_in_for_its_termination():
    loss, data = model_loss(), experience().exclude(("next", "terminated"))
    wanted = loss(data)[0]["loss_model_continue"]
    found = loss(**{"_".join(k) if isinstance(k, tuple) else k: data[k] for k in loss.in_keys if k in data.keys(True)})
    torch.testing.assert_close(found[loss.out_keys.index("loss_model_continue")], wanted, **CLOSE)


@pytest.mark.parametrize("name", ["model", "actor", "value", "two_hot"])
def test_reductions(name):
    make, data = LOSSES[name]
    data = data()
    found = {}
    for reduction in ("none", "sum", "mean"):
        torch.manual_seed(5)
        found[reduction] = run(make(reduction=reduction), data)
    for key in (key for key in found["mean"].keys() if key.startswith("loss")):  # noqa: SIM118  # a TensorDict is no dict
        each = found["none"][key]
        assert each.shape == data.shape + ((HORIZON,) if name == "actor" else ())
        torch.testing.assert_close(found["sum"][key].squeeze(), each.sum(), **CLOSE)
        torch.testing.assert_close(found["mean"][key].squeeze(), each.mean(), **CLOSE)
    with pytest.raises(ValueError, match="reduction is 'foo'"):
        make(reduction="foo")


@pytest.mark.parametrize(
    ("name", "without", "match"),
    [
        ("model", ("next", "reward"), r"'next', 'reward'.*set_keys\(reward="),
        ("model", ("next", "pixels"), r"'next', 'pixels'.*set_keys\(pixels="),
        ("model", "belief", "belief.*in_keys of world_model"),
        ("actor", "state", r"'state'.*set_keys\(state="),
        ("actor", "belief", r"'belief'.*set_keys\(belief="),
        ("value", "lambda_target", "'lambda_target'"),
        ("value", "state", "'state'.*value_model"),
        ("whole", ("next", "done"), r"'next', 'done'.*set_keys\(done="),
    ],
)
def test_a_missing_entry_is_named_and_nothing_is_changed(name, without, match):
    loss, data = made(name)
    data = data.exclude(without)
    before = data.clone()
    with pytest.raises(KeyError, match=match):
        loss(data)
    assert set(data.keys(True, True)) == set(before.keys(True, True))


def test_what_the_world_model_does_not_write_is_named():
    loss = DreamerV3ModelLoss(world_model(), num_reward_bins=BINS, lambda_continue=1.0)
    loss.set_keys(continue_pred="elsewhere")
    with pytest.raises(KeyError, match=r"elsewhere.*set_keys\(continue_pred="):
        loss(experience())


@pytest.mark.parametrize(
    ("make", "data", "key", "match"),
    [
        (model_loss, experience, ("next", "pixels"), "'reco_pixels'.*'pixels'"),
        (model_loss, experience, ("next", "terminated"), "'continue_pred'.*'terminated'"),
        (model_loss, experience, ("next", "reward"), "'true_reward'.*one reward for each"),
        (value_loss, imagined, "lambda_target", "'lambda_target'.*one for each"),
    ],
)
def test_shapes_that_would_broadcast_by_accident_are_refused(make, data, key, match):
    data = data()
    data[key] = torch.cat([data[key]] * 3, -1)
    with pytest.raises(RuntimeError, match=match):
        make()(data)


def test_latents_of_different_shapes_are_refused():
    loss = model_loss()
    loss.set_keys(posterior_logits="reco_pixels")
    with pytest.raises(RuntimeError, match=r"'reco_pixels'.*'prior_logits'"):
        loss(experience())


@pytest.mark.parametrize(
    ("make", "options", "match"),
    [
        (model_loss, {"kl_mode": "foo"}, "kl_mode is 'foo'"),
        (model_loss, {"reco_loss": "foo"}, "reco_loss is 'foo'"),
        (model_loss, {"num_reward_bins": 1}, "at least 2"),
        (model_loss, {"unimix": 2.0}, "unimix"),
        (model_loss, {"kl_alpha": -1.0}, "kl_alpha"),
        (model_loss, {"continue_target_scale": 0.0}, "continue_target_scale"),
        (actor_loss, {"imagination_horizon": 0}, "imagination_horizon"),
        (actor_loss, {"entropy_bonus": -1.0}, "entropy_bonus"),
        (actor_loss, {"return_normalization_quantiles": (0.9, 0.1)}, "quantiles"),
        (actor_loss, {"return_normalization_rate": 2.0}, "rate"),
        (actor_loss, {"return_normalization_min_scale": 0.0}, "least scale"),
        (value_loss, {"value_loss": "foo"}, "value_loss is 'foo'"),
        (value_loss, {"slow_critic_regularization": -1.0}, "slow_critic_regularization"),
        (whole_loss, {"replay_value_loss_weight": -1.0}, "replay_value_loss_weight"),
        (whole_loss, {"continuation_horizon": 0.5}, "continuation_horizon"),
    ],
)
def test_arguments_without_a_meaning_are_refused(make, options, match):
    with pytest.raises(ValueError, match=match):
        make(**options)


def test_observations_must_be_as_many_as_their_reconstructions():
    loss = model_loss(reco_symlog=[True, False])
    loss.set_keys(pixels="pixels")
    with pytest.raises(ValueError, match="are 1, 2 and 2"):
        loss(experience())


@pytest.mark.parametrize("make", [actor_loss, model_loss])
def test_a_discount_in_the_wrong_place_points_to_the_right_one(make):
    with pytest.raises(TypeError, match="make_value_estimator"):
        make(gamma=0.9)


def test_estimators_that_a_world_model_has_no_use_for_are_refused():
    with pytest.raises(NotImplementedError, match="TD0, TD1, TDLambda"):
        actor_loss(value_type="GAE")


def test_entries_can_be_renamed():
    loss, data = made("whole")
    wanted = run(copy.deepcopy(loss), data)
    loss.set_keys(replay_context="context", is_init="first")
    loss.model_loss.set_keys(reward="gain", true_reward="seen_gain", done="over", terminated="dead")
    loss.value_loss.set_keys(bootstrap="first_return", discount_weight="reached")
    loss.actor_loss.set_keys(discount_weight="reached", continuation="alive")
    loss.actor_loss.continuation_model.out_keys = ["alive"]
    for old, new in (("reward", "gain"), ("done", "over"), ("terminated", "dead")):
        data.rename_key_(("next", old), ("next", new))
    data.rename_key_("is_init", "first")
    found = run(loss, data)
    assert {"first", ("next", "dead"), ("next", "gain")} <= set(loss.in_keys)
    assert loss.out_keys[-1] == "context"
    assert found["context"].batch_size == data.batch_size
    assert not found["context", "state"].requires_grad
    torch.testing.assert_close(
        found.exclude("context").detach().to_dict(), wanted.exclude("replay_context").detach().to_dict(), **CLOSE
    )


def test_the_summed_losses_train_every_part_once():
    loss, data = made("whole")
    out = run(loss, data)
    sum(x for key, x in out.items() if key.startswith("loss_")).backward()
    for part in (loss.model_loss.world_model, loss.actor_loss.actor_model, loss.value_loss.value_model):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in part.parameters())
    # Imagining trains neither the model nor what continues.
    assert all(p.grad is None for p in loss.actor_loss.model_based_env.parameters())
    assert all(p.grad is None for p in loss.actor_loss.continuation_model.parameters())
    assert out["replay_context", "state"].shape == (*data.shape, STATE)


def test_a_detached_model_loss_returns_no_graph():
    _, attached = model_loss(detach_output=False)(experience())
    _, detached = model_loss(detach_output=True)(experience())
    assert attached["next", "state"].requires_grad
    assert not any(x.requires_grad for x in detached.values(True, True))


def test_a_horizon_of_less_than_a_step_is_refused():
    with pytest.raises(ValueError, match=r"horizon must be at least 1, but is 0.5"):
        value_loss().replay_value_loss(replayed(), horizon=0.5)


@pytest.mark.parametrize("name", ["value", "two_hot"])
def test_the_slow_values_part_is_logged_without_gradient_and_weighed_as_it_is_told(name):
    loss, data = made(name)  # slow_critic_regularization=1.0
    for p in loss.target_value_model_params.values(True, True):
        p.data.add_(0.1)
    out = run(loss, data)
    assert not out["value_slow_loss"].requires_grad
    loss.slow_critic_regularization = 3.0
    more = run(loss, data)
    torch.testing.assert_close(more["loss_value"], out["loss_value"] + 2 * out["value_slow_loss"])


def test_where_nothing_is_said_of_termination_done_terminates():
    loss, data = value_loss(), replayed()
    data["next", "terminated"] = data["next", "done"]
    wanted = loss.replay_value_loss(data)["loss_replay_value"]
    del data["next", "terminated"]
    assert torch.equal(loss.replay_value_loss(data)["loss_replay_value"], wanted)


def test_returns_that_are_not_to_be_normalised_are_taken_as_they_are():
    loss = actor_loss(return_normalization=False, return_normalization_min_scale=4.0)
    assert run(loss, states())["return_scale"] == 1


def test_the_range_of_returns_that_is_logged_stays_when_it_moves_on():
    loss, data = actor_loss().eval(), states()
    low = run(loss, data)["return_low"]
    before = low.clone()
    run(loss.train(), data)
    assert torch.equal(low, before)


def test_a_reward_that_would_broadcast_is_refused():
    loss, data = DreamerV3ModelLoss(world_model("reward", bins=1), reward_two_hot=False), experience()
    loss.set_keys(pixels=["pixels", "vector"], reco_pixels=["reco_pixels", "reco_vector"])
    data["next", "reward"] = data["next", "reward"].expand(*data.shape, 2)
    with pytest.raises(RuntimeError, match=r"'reward'\) has shape"):
        loss(data)
