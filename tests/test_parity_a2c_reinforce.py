"""A2C and REINFORCE against TorchRL: the same networks and data give the same outputs, gradients and states.

Where TorchRL is wrong the promise is tested in test_a2c.py instead: A2C with several action heads, masks in the
metrics, and a critic that reads what the policy's layers wrote.
"""

import pytest
import torch
from fusedrl import losses as ours
from helpers_losses import ACTORS, OBSERVATION, collect, composite_actor, critic, discrete_actor, gaussian_actor
from tensordict import TensorDict
from tensordict.nn import (
    NormalParamExtractor,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
    set_composite_lp_aggregate,
)
from torch import nn

pytest.importorskip("torchrl")
from torchrl import objectives as theirs
from torchrl.data import Bounded
from torchrl.modules import (
    IndependentNormal,
    LSTMModule,
    ProbabilisticActor,
    TanhNormal,
    ValueOperator,
    set_recurrent_mode,
)

# Both compute in float64; but TorchRL keeps γ, λ and coefficients in float32.
CLOSE = {"rtol": 1e-6, "atol": 1e-7}

CLASSES = ["A2CLoss", "ReinforceLoss"]

OPTIONS = {
    "defaults": {},
    "l1": {"loss_critic_type": "l1"},
    "l2": {"loss_critic_type": "l2"},
    "clipped_value": {"clip_value": 0.3},
    "clipped_value_l2": {"clip_value": 0.3, "loss_critic_type": "l2"},
    "sum": {"reduction": "sum"},
    "mean": {"reduction": "mean"},
    "none": {"reduction": "none"},
    "none_clipped": {"reduction": "none", "clip_value": 0.3},
    "not_functional": {"functional": False},
    "separate": {"separate_losses": True},
}
A2C_OPTIONS = {
    "no_entropy": {"entropy_bonus": False},
    "entropy_coeff": {"entropy_coeff": 0.3},
    "critic_coeff": {"critic_coeff": 0.3},
    "critic_coeff_0": {"critic_coeff": 0.0},
    "no_critic_loss": {"critic_coeff": None},
    "objective_only": {"critic_coeff": None, "entropy_bonus": False},
}
GRID = [(name, options) for name in CLASSES for options in OPTIONS.values()]
GRID += [("A2CLoss", options) for options in A2C_OPTIONS.values()] + [("ReinforceLoss", {"delay_value": True})]


def grid_id(x):
    return x if isinstance(x, str) else "-".join(f"{k}={v}" for k, v in x.items()) or "defaults"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    with set_composite_lp_aggregate(False):
        yield


def outputs(loss, data):
    torch.manual_seed(1)  # an entropy without closed form is drawn
    return loss(data)


def gradients(out, networks):
    parameters = [p for network in networks for p in network.parameters()]
    return {
        name: torch.autograd.grad(term.sum(), parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        for name, term in out.items()
        if name.startswith("loss_")
    }


def build(name, actor, value, **options):
    return [getattr(library, name)(actor, value, **options) for library in (ours, theirs)]


def assert_same(losses, data, networks):
    a, b = (outputs(loss, data.copy()) for loss in losses)
    assert set(a.keys()) == set(b.keys())
    torch.testing.assert_close(a.to_dict(), b.to_dict(), **CLOSE)
    torch.testing.assert_close(gradients(a, networks), gradients(b, networks), **CLOSE)


@pytest.mark.parametrize(("name", "options"), GRID, ids=grid_id)
def test_outputs_and_gradients_agree_under_every_option(name, options):
    actor, value = discrete_actor(), critic()
    assert_same(build(name, actor, value, **options), collect(actor), [actor, value])


@pytest.mark.parametrize(("name", "options"), GRID, ids=grid_id)
def test_estimated_advantages_agree_under_every_option(name, options):
    actor, value = discrete_actor(), critic()
    data = collect(actor, estimated=False)
    before = data.clone()
    assert_same(build(name, actor, value, **options), data, [actor, value])
    assert set(data.keys(True, True)) == set(before.keys(True, True))


@pytest.mark.parametrize("value_type", ["TD0", "TD1", "TDLambda", "GAE"])
@pytest.mark.parametrize("name", CLASSES)
def test_every_estimator_agrees(name, value_type):
    actor, value = discrete_actor(), critic()
    a, b = build(name, actor, value)
    a.make_value_estimator(ours.ValueEstimators[value_type], gamma=0.9)
    b.make_value_estimator(theirs.ValueEstimators[value_type], gamma=0.9)
    assert_same((a, b), collect(actor, estimated=False), [actor, value])


@pytest.mark.parametrize("distribution", [IndependentNormal, TanhNormal], ids=lambda d: d.__name__)
@pytest.mark.parametrize("name", CLASSES)
def test_continuous_actions_agree(name, distribution):
    actor, value = gaussian_actor(distribution), critic()
    options = {"samples_mc_entropy": 3} if name == "A2CLoss" else {}
    assert_same(build(name, actor, value, **options), collect(actor), [actor, value])


@pytest.mark.parametrize("aggregate", [False, True])
@pytest.mark.parametrize("heads", ["nested_heads", "flat_heads"])
def test_several_heads_agree(heads, aggregate):
    with set_composite_lp_aggregate(aggregate):
        actor, value = ACTORS[heads](), critic()
        assert_same(build("ReinforceLoss", actor, value), collect(actor), [actor, value])


@pytest.mark.parametrize("aggregate", [False, True])
def test_several_heads_of_a2c_have_the_objective_of_reinforce_and_the_entropy_of_ppo(aggregate):
    with set_composite_lp_aggregate(aggregate):
        actor, value = composite_actor(), critic()
        data = collect(actor)
        a2c = ours.A2CLoss(actor, value, entropy_coeff=0.1)(data)
        reinforce = theirs.ReinforceLoss(actor, value)(data)
        torch.testing.assert_close(a2c["loss_objective"], reinforce["loss_actor"], **CLOSE)
        torch.testing.assert_close(a2c["loss_critic"], reinforce["loss_value"], **CLOSE)
        ppo = theirs.PPOLoss(actor, value, entropy_coeff=0.1, log_explained_variance=False)
        # With one log-probability for all heads TorchRL's own keys don't find it.
        ppo.set_keys(**({"action": "car", "sample_log_prob": "sample_log_prob"} if aggregate else {}))
        ppo = ppo(data)
        for key in ("loss_entropy", "entropy"):
            torch.testing.assert_close(a2c[key], ppo[key], **CLOSE)


@pytest.mark.parametrize("separate_losses", [False, True])
@pytest.mark.parametrize("name", CLASSES)
def test_a_common_trunk_is_trained_alike(name, separate_losses):
    double = {"dtype": torch.float64}
    trunk = TensorDictModule(nn.Linear(OBSERVATION, OBSERVATION, **double), ["observation"], ["hidden"])
    actor = discrete_actor(reads="hidden", trunk=trunk)
    value = TensorDictSequential(
        trunk, TensorDictModule(nn.Linear(OBSERVATION, 1, **double), ["hidden"], ["state_value"])
    )
    losses = build(name, actor, value, separate_losses=separate_losses)
    names = [{n for n, _ in loss.named_parameters()} for loss in losses]
    assert names[0] == names[1]
    assert_same(losses, collect(discrete_actor()), [actor, value])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("key", [("collector", "mask"), "shifted_valid"])
@pytest.mark.parametrize("name", CLASSES)
def test_masked_losses_agree(name, key, reduction):
    actor, value = discrete_actor(), critic()
    data = collect(actor)
    data[key] = torch.rand(data.shape) < 0.6
    a, b = (loss(data) for loss in build(name, actor, value, reduction=reduction))
    for name, term in a.items():
        if name.startswith("loss_"):
            torch.testing.assert_close(term, b[name], **CLOSE)


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize(("name", "options"), GRID, ids=grid_id)
def test_states_are_exchanged(name, options, used):
    losses = build(name, discrete_actor(), critic(), **options)
    others = build(name, discrete_actor(), critic(), **options)
    if used:
        data = collect(discrete_actor(), estimated=False)
        for loss in losses:
            loss(data.copy())
        others[1].value_estimator  # noqa: B018  # TorchRL makes it when it's read
    assert set(losses[0].state_dict()) == set(losses[1].state_dict())
    others[0].load_state_dict(losses[1].state_dict(), strict=True)
    others[1].load_state_dict(losses[0].state_dict(), strict=True)
    for a, b in zip(others, reversed(losses), strict=True):
        torch.testing.assert_close(dict(a.state_dict()), dict(b.state_dict()), check_dtype=False, **CLOSE)


@pytest.mark.parametrize(("name", "options"), GRID, ids=grid_id)
def test_keys_agree(name, options):
    a, b = build(name, discrete_actor(), critic(), **options)
    assert a.out_keys == b.out_keys
    assert set(a.in_keys) == set(b.in_keys)
    for key, entry in vars(b.tensor_keys).items():
        assert getattr(a.tensor_keys, key) == entry


@pytest.mark.parametrize("name", CLASSES)
def test_keyword_calls_agree(name):
    actor, value = discrete_actor(), critic()
    data = collect(actor, estimated=False)
    arguments = {
        "action": data["action"],
        "observation": data["observation"],
        **{f"next_{key}": x for key, x in data["next"].items()},
    }
    a, b = (loss(**arguments) for loss in build(name, actor, value))
    torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("name", CLASSES)
def test_modules_of_torchrl_work(name):
    bounds = Bounded(-torch.ones(2), torch.ones(2), (2,))
    parameters = TensorDictModule(
        nn.Sequential(nn.Linear(OBSERVATION, 4), NormalParamExtractor()), ["observation"], ["loc", "scale"]
    )
    actor = ProbabilisticActor(
        parameters, in_keys=["loc", "scale"], spec=bounds, distribution_class=TanhNormal, return_log_prob=True
    ).double()
    value = ValueOperator(nn.Linear(OBSERVATION, 1), in_keys=["observation"]).double()
    data = collect(gaussian_actor(TanhNormal), estimated=False)
    assert_same(build(name, actor, value), data, [actor, value])


@pytest.mark.parametrize("name", CLASSES)
def test_recurrent_networks_agree(name):
    memory = LSTMModule(input_size=OBSERVATION, hidden_size=3, in_key="observation", out_key="hidden")
    logits = TensorDictModule(nn.Linear(3, 3), ["hidden"], ["logits"])
    actor = ProbabilisticTensorDictSequential(memory, logits, discrete_actor()[-1]).double()
    value = TensorDictSequential(memory, TensorDictModule(nn.Linear(3, 1), ["hidden"], ["state_value"])).double()
    data = collect(discrete_actor())
    data["is_init"] = torch.rand(*data.shape, 1) < 0.3
    for part in ("h", "c"):
        data[f"recurrent_state_{part}"] = torch.zeros(*data.shape, 1, 3, dtype=torch.float64)
    with set_recurrent_mode(True):
        assert_same(build(name, actor, value), data, [actor, value])


@pytest.mark.parametrize("name", CLASSES)
def test_agents_with_their_own_rewards_agree(name):
    agents = {key: ("agents", key) for key in ("reward", "done", "terminated", "advantage", "value_target")}
    agents |= {"action": ("agents", "action"), "value": ("agents", "value"), "sample_log_prob": ("agents", "log_prob")}
    observation = [("agents", "observation")]
    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(nn.Linear(OBSERVATION, 3).double(), observation, [("agents", "logits")]),
        ProbabilisticTensorDictModule(
            {"logits": ("agents", "logits")}, [("agents", "action")], distribution_class=torch.distributions.Categorical
        ),
    )
    value = TensorDictModule(nn.Linear(OBSERVATION, 1).double(), observation, [("agents", "value")])
    each = collect(discrete_actor(), (3, 5, 4), estimated=False)
    each["next"] = each["next"].exclude("action")
    data = TensorDict({"agents": each.select("observation", "action"), "next": {"agents": each["next"]}}, (3, 5))
    losses = build(name, actor, value)
    for loss in losses:
        loss.set_keys(**agents)
    assert_same(losses, data, [actor, value])
