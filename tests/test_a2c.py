"""Advantage actor-critic: the equation, and what is promised beyond (or against) what TorchRL does."""

import pytest
import torch
from fusedrl.losses import A2CLoss, ReinforceLoss, ValueEstimators
from fusedrl.losses.functional import policy_gradient_objective
from helpers_estimators import no_host_sync
from helpers_losses import (
    ACTORS,
    FLAT,
    NESTED,
    OBSERVATION,
    collect,
    composite_actor,
    critic,
    discrete_actor,
    gaussian_actor,
    squashed_normal,
    tabular_actor,
)
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential, set_composite_lp_aggregate
from torch import nn

BATCH = (3, 5)
# Everything is computed in float64, some units in the last place.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
# Coefficients are float32 buffers: 0.01 is held to 6e-9, and 2 ** -n exactly.
HALF = 0.5


@pytest.fixture(autouse=True)
def _seed():
    torch.compiler.reset()
    torch.manual_seed(0)
    with set_composite_lp_aggregate(False):
        yield


def entries(tensordict):
    return dict(tensordict.items(True, True))


def assert_untouched(tensordict, before):
    after = entries(tensordict)
    assert list(after) == list(before)
    assert all(after[key] is before[key] for key in before)


# --- the equation -----------------------------------------------------------------------------------------------


def test_objective_weighs_log_probabilities_with_the_advantage():
    log_prob, advantage = torch.tensor([-0.5, -2.0, -1.0]), torch.tensor([2.0, -1.0, 0.0])
    assert policy_gradient_objective(log_prob, advantage).tolist() == [-1, 2, 0]


def test_terms_of_a_uniform_policy_over_two_actions():
    value = critic()
    for p in value.parameters():
        nn.init.zeros_(p)
    data = collect(tabular_actor(), BATCH)
    out = A2CLoss(tabular_actor(), value, loss_critic_type="l2", entropy_coeff=HALF, critic_coeff=0.25)(data)
    log2 = torch.tensor(2.0, dtype=torch.float64).log()
    expected = {
        "loss_objective": log2 * data["advantage"].mean(),
        "loss_entropy": -HALF * log2,
        "entropy": log2,
        "loss_critic": 0.25 * data["value_target"].square().mean(),
    }
    torch.testing.assert_close(out.to_dict(), expected, **CLOSE)


def test_gradient_of_the_objective_is_the_score_times_the_advantage():
    actor = tabular_actor()
    data = TensorDict(
        {
            "observation": torch.zeros(1, OBSERVATION, dtype=torch.float64),
            "action": torch.tensor([1]),
            "advantage": torch.full((1, 1), 3.0, dtype=torch.float64),
            "value_target": torch.zeros(1, 1, dtype=torch.float64),
        },
        [1],
    )
    A2CLoss(actor, critic())(data)["loss_objective"].backward()
    # ∇ log π(1) = onehot(1) − π
    torch.testing.assert_close(actor[0].module.bias.grad, torch.tensor([1.5, -1.5], dtype=torch.float64), **CLOSE)


def test_metrics_hold_no_gradient():
    actor = discrete_actor()
    out = A2CLoss(actor, critic(), clip_value=0.1)(collect(actor))
    for name, term in out.items():
        assert term.requires_grad is name.startswith("loss_")


def test_per_sample_losses_average_to_the_mean():
    actor, value = discrete_actor(), critic()
    data = collect(actor, BATCH)
    each = A2CLoss(actor, value, reduction="none")(data)
    mean = A2CLoss(actor, value)(data)
    for name in ("loss_objective", "loss_critic", "loss_entropy"):
        assert each[name].shape == BATCH
        torch.testing.assert_close(each[name].mean(), mean[name], **CLOSE)


def test_entropy_without_closed_form_is_drawn_and_differentiable():
    actor = gaussian_actor(squashed_normal)
    data = collect(actor)
    out = A2CLoss(actor, critic(), samples_mc_entropy=2000)(data)
    with torch.no_grad():
        dist = actor.get_dist(data.copy())
        expected = -dist.log_prob(dist.sample((2000,))).mean()
    # standard error of the mean of 2000 · 15 draws of a variable of a few units
    torch.testing.assert_close(out["entropy"], expected, rtol=0.05, atol=0.05)
    gradients = torch.autograd.grad(out["loss_entropy"], list(actor.parameters()))
    assert all(g.abs().sum() > 0 for g in gradients)


# --- several action heads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregate", [False, True])
@pytest.mark.parametrize("names", [NESTED, FLAT], ids=["nested", "flat"])
def test_heads_add_up(names, aggregate):
    with set_composite_lp_aggregate(aggregate):
        actor, value = composite_actor(names), critic()
        data = collect(actor, BATCH)
        loss = A2CLoss(actor, value, entropy_coeff=HALF, reduction="none")
        out = loss(data)
        heads = actor.get_dist(data.copy()).dists
    assert set(loss.tensor_keys.action) == set(names.values())
    log_prob = sum(head.log_prob(data[key]) for key, head in heads.items())
    entropy = sum(head.entropy() for head in heads.values())
    torch.testing.assert_close(out["loss_objective"], -log_prob * data["advantage"].squeeze(-1), **CLOSE)
    torch.testing.assert_close(out["loss_entropy"], -HALF * entropy, **CLOSE)
    torch.testing.assert_close(out["entropy"], entropy.mean(), **CLOSE)
    assert ("composite_entropy" in out.keys()) is not aggregate  # noqa: SIM118  a TensorDict's `in` raises


# --- advantage --------------------------------------------------------------------------------------------------


def test_missing_advantage_is_estimated_and_the_input_stays_as_it_is():
    actor, value = discrete_actor(), critic()
    data = collect(actor, estimated=False)
    before = entries(data)
    loss = A2CLoss(actor, value).make_value_estimator(ValueEstimators.TDLambda, gamma=0.9, lmbda=0.8)
    out = loss(data)
    assert_untouched(data, before)
    loss.value_estimator(data, params=loss.critic_network_params)
    torch.testing.assert_close(out.to_dict(), A2CLoss(actor, value)(data).to_dict(), **CLOSE)


@pytest.mark.parametrize("functional", [True, False])
def test_estimated_advantage_does_not_train_the_critic(functional):
    actor, value = discrete_actor(), critic()
    out = A2CLoss(actor, value, functional=functional)(collect(actor, estimated=False))
    parameters = list(value.parameters())
    unused = torch.autograd.grad(out["loss_objective"], parameters, allow_unused=True, retain_graph=True)
    assert unused == (None, None)
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(out["loss_critic"], parameters))


def test_estimator_calls_see_parameters_as_they_are_now():
    actor, value = discrete_actor(), critic()
    data = collect(actor, estimated=False)
    loss = A2CLoss(actor, value)
    before = loss(data)["loss_critic"]
    with torch.no_grad():
        value.module.bias.add_(1.0)
    after = loss(data)["loss_critic"]
    assert before != after
    torch.testing.assert_close(after, A2CLoss(actor, value)(data)["loss_critic"], **CLOSE)


# --- networks with a common trunk -------------------------------------------------------------------------------


@pytest.mark.parametrize("separate_losses", [False, True])
def test_critic_can_read_what_the_policys_layers_wrote(separate_losses):
    trunk = TensorDictModule(nn.Linear(OBSERVATION, OBSERVATION, dtype=torch.float64), ["observation"], ["hidden"])
    actor = discrete_actor(reads="hidden", trunk=trunk)
    head = TensorDictModule(nn.Linear(OBSERVATION, 1, dtype=torch.float64), ["hidden"], ["state_value"])
    loss = A2CLoss(actor, head, separate_losses=separate_losses)
    out = loss(collect(discrete_actor()))
    (gradient,) = torch.autograd.grad(out["loss_critic"], [trunk.module.weight], allow_unused=True, retain_graph=True)
    assert (gradient is None) is separate_losses
    assert torch.autograd.grad(out["loss_objective"], [trunk.module.weight])[0].abs().sum() > 0


@pytest.mark.parametrize("separate_losses", [False, True])
def test_a_trunk_in_both_networks_is_trained_by_the_policy_alone_if_losses_are_separate(separate_losses):
    trunk = TensorDictModule(nn.Linear(OBSERVATION, OBSERVATION, dtype=torch.float64), ["observation"], ["hidden"])
    actor = discrete_actor(reads="hidden", trunk=trunk)
    head = TensorDictModule(nn.Linear(OBSERVATION, 1, dtype=torch.float64), ["hidden"], ["state_value"])
    loss = A2CLoss(actor, TensorDictSequential(trunk, head), separate_losses=separate_losses)
    assert len(list(loss.parameters())) == 6
    out = loss(collect(discrete_actor()))
    (gradient,) = torch.autograd.grad(out["loss_critic"], [trunk.module.weight], allow_unused=True, retain_graph=True)
    assert (gradient is None) is separate_losses
    assert torch.autograd.grad(out["loss_objective"], [trunk.module.weight])[0].abs().sum() > 0


# --- masks, priorities ------------------------------------------------------------------------------------------


def test_a_mask_of_another_name_also_ends_the_trajectories_of_the_estimator():
    actor, value = discrete_actor(), critic()
    data = collect(actor, estimated=False)
    mask = torch.ones(data.shape, dtype=torch.bool)
    mask[:, 3:] = False
    known = data.clone()
    known["collector", "mask"], data["mine"] = mask, mask
    loss = A2CLoss(actor, value)
    wanted = loss(known)
    loss.loss_mask_key = "mine"
    torch.testing.assert_close(loss(data).to_dict(), wanted.to_dict())


def test_padded_steps_count_nowhere():
    actor, value = discrete_actor(), critic()
    data = collect(actor, BATCH)
    mask = torch.rand(BATCH) < 0.6
    expected = A2CLoss(actor, value, clip_value=0.1)(data[mask])
    data["collector", "mask"] = mask
    for key in ("advantage", "value_target", "state_value"):
        data[key][~mask] = torch.nan
    result = A2CLoss(actor, value, clip_value=0.1)(data)
    torch.testing.assert_close(result.to_dict(), expected.to_dict(), **CLOSE)
    result["loss_critic"].backward()
    assert value.module.weight.grad.isfinite().all()


@pytest.mark.parametrize("cls", [A2CLoss, ReinforceLoss])
@pytest.mark.parametrize("heads", ["discrete", "gaussian"])
@pytest.mark.parametrize("estimated", [True, False])
def test_padding_may_hold_nan_everywhere(cls, heads, estimated):
    actor, value = ACTORS[heads](), critic()
    data = collect(actor, (2, 6), estimated=estimated)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[:, 4:] = False
    data["next", "done"][:, 3] = True
    parameters = [*actor.parameters(), *value.parameters()]

    def gradients(data):
        out = cls(actor, value)(data)
        return torch.autograd.grad(sum(x for name, x in out.items() if name.startswith("loss_")), parameters)

    wanted = gradients(data[:, :4])
    data["collector", "mask"] = mask
    for key in data.keys(True, True):
        if data[key].is_floating_point():
            data[key][~mask] = torch.nan
    before = data.clone()
    torch.testing.assert_close(gradients(data), wanted, **CLOSE)
    torch.testing.assert_close(data.to_dict(), before.to_dict(), rtol=0, atol=0, equal_nan=True)


def test_priorities_weigh_the_samples():
    actor, value = discrete_actor(), critic()
    data = collect(actor, BATCH)
    each = A2CLoss(actor, value, reduction="none")(data)
    data["priority_weight"] = weights = torch.rand(BATCH, dtype=torch.float64)
    out = A2CLoss(actor, value)(data)
    torch.testing.assert_close(out["loss_objective"], (each["loss_objective"] * weights).sum() / weights.sum(), **CLOSE)


# --- options ----------------------------------------------------------------------------------------------------


def test_coefficients_follow_a_schedule():
    actor, value = discrete_actor(), critic()
    data = collect(actor)
    loss = A2CLoss(actor, value, entropy_coeff=1.0, critic_coeff=1.0)
    before = loss(data)
    loss.entropy_coeff, loss.critic_coeff = 0.25, HALF
    after = loss(data)
    torch.testing.assert_close(after["loss_entropy"], 0.25 * before["loss_entropy"], **CLOSE)
    torch.testing.assert_close(after["loss_critic"], HALF * before["loss_critic"], **CLOSE)


def test_loss_without_a_critic_takes_the_advantage_from_the_data():
    actor = discrete_actor()
    data = collect(actor)
    loss = A2CLoss(actor, critic_coeff=None)
    assert set(loss(data).keys()) == {"loss_objective", "loss_entropy", "entropy"}
    with pytest.raises(KeyError, match=r"'advantage'.*set_keys\(advantage=...\)"):
        loss(data.exclude("advantage"))


def test_renamed_entries_are_found():
    actor, value = discrete_actor(), critic()
    data = collect(actor)
    expected = A2CLoss(actor, value, clip_value=0.1)(data)
    loss = A2CLoss(actor, value, clip_value=0.1)
    names = {"advantage": ("mine", "advantage"), "value_target": "goal", "action": "move"}
    for name, key in names.items():
        data[key] = data.pop(name)
    loss.set_keys(**names)
    assert loss.value_estimator.tensor_keys.advantage == ("mine", "advantage")
    torch.testing.assert_close(loss(data).to_dict(), expected.to_dict(), **CLOSE)
    loss.set_keys(action=None)
    assert loss.tensor_keys.action == "action"


# --- faults -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "estimated", "hint"),
    [
        ("action", True, "set_keys(action=...)"),
        ("value_target", True, "set_keys(value_target=...)"),
        ("state_value", True, "set_keys(value=...)"),
        ("observation", True, "in_keys of actor_network"),
        (("next", "reward"), False, "set_keys(reward=...)"),
        (("next", "done"), False, "set_keys(done=...)"),
        (("next", "observation"), False, "value network"),
    ],
)
@pytest.mark.parametrize("cls", [A2CLoss, ReinforceLoss])
def test_missing_entry_is_named_and_nothing_is_written(cls, key, estimated, hint):
    actor = discrete_actor()
    data = collect(actor, estimated=estimated)
    if isinstance(key, tuple):
        data["next"] = data["next"].exclude(key[1])
    else:
        data = data.exclude(key)
    before = entries(data)
    with pytest.raises(KeyError) as error:
        cls(actor, critic(), clip_value=0.1)(data)
    for part in (repr(key), hint):
        assert part in str(error.value)
    assert_untouched(data, before)


@pytest.mark.parametrize(
    ("key", "shape", "other"),
    [
        ("advantage", (6, 3), "log-prob"),
        ("advantage", (6,), "log-prob"),
        ("value_target", (6,), "state_value"),
        ("value_target", (6, 2), "state_value"),
        ("state_value", (6,), "value_target"),
    ],
)
@pytest.mark.parametrize("cls", [A2CLoss, ReinforceLoss])
def test_shapes_that_would_broadcast_by_accident_are_refused(cls, key, shape, other):
    actor = discrete_actor()
    data = collect(actor, (6,))
    data[key] = torch.zeros(shape, dtype=torch.float64)
    before = entries(data)
    with pytest.raises(RuntimeError, match=rf"(?s)(?=.*{key})(?=.*{other})") as error:
        cls(actor, critic(), clip_value=0.1)(data)
    assert str(shape) in str(error.value)
    assert_untouched(data, before)


def test_action_that_requires_grad_is_refused():
    actor = gaussian_actor()
    data = collect(actor)
    data["action"] = data["action"].requires_grad_()
    with pytest.raises(RuntimeError, match="'action' requires grad"):
        A2CLoss(actor, critic())(data)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"reduction": "foo"}, ValueError, "'foo'"),
        ({"loss_critic_type": "foo"}, ValueError, "loss_critic_type is 'foo'"),
        ({"clip_value": True}, ValueError, "clip_value must be a number"),
        ({"entropy_coeff": "x"}, TypeError, "entropy_coeff"),
        ({"gamma": 0.9}, TypeError, "make_value_estimator"),
        ({"lmbda": 0.9}, TypeError, "make_value_estimator"),
        ({"functional": False, "separate_losses": True}, ValueError, "functional=True"),
        ({"critic_network": None}, TypeError, "critic"),
        ({"actor_network": None}, TypeError, "actor_network"),
    ],
)
def test_argument_that_cannot_be_used_is_named(options, error, message):
    with pytest.raises(error, match=message):
        A2CLoss(**{"actor_network": discrete_actor(), "critic_network": critic(), **options})


def test_unknown_key_is_refused():
    with pytest.raises(ValueError, match="foo is not a key of A2CLoss"):
        A2CLoss(discrete_actor(), critic()).set_keys(foo="bar")


# --- how it runs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "estimated", "options"),
    [
        ("discrete", False, {}),
        (
            "nested_heads",
            False,
            {"clip_value": 0.1, "reduction": "sum", "loss_critic_type": "l2", "separate_losses": True},
        ),
    ],
    ids=["estimated", "everything"],
)
def test_compiles_as_one_graph_with_the_numbers_of_eager(heads, estimated, options):
    actor, value = ACTORS[heads](), critic()
    data = collect(actor, estimated=estimated)
    data["collector", "mask"] = torch.rand(data.shape) < 0.8
    expected = A2CLoss(actor, value, **options)(data)
    compiled = torch.compile(A2CLoss(actor, value, **options), fullgraph=True, backend="aot_eager")
    out = compiled(data)
    torch.testing.assert_close(out.to_dict(), expected.to_dict(), **CLOSE)
    parameters = [*actor.parameters(), *value.parameters()]
    gradients = [
        torch.autograd.grad(
            sum(x for name, x in terms.items() if name.startswith("loss_")), parameters, materialize_grads=True
        )
        for terms in (out, expected)
    ]
    torch.testing.assert_close(*gradients, **CLOSE)


@pytest.mark.parametrize("estimated", [True, False])
@pytest.mark.parametrize("heads", ["discrete", "gaussian", "nested_heads"])
def test_nothing_waits_for_the_device(heads, estimated, monkeypatch):
    # The distributions' own checks of their arguments do.
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)
    actor = ACTORS[heads]()
    data = collect(actor, estimated=estimated)
    data["collector", "mask"] = torch.rand(data.shape) < 0.8
    data["priority_weight"] = torch.rand(data.shape, dtype=torch.float64)
    loss = A2CLoss(actor, critic(), clip_value=0.1)
    with no_host_sync():
        out = loss(data)
        (out["loss_objective"] + out["loss_critic"] + out["loss_entropy"]).backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_hyperparameters_keep_their_precision_in_a_cast(dtype):
    actor = discrete_actor()
    loss = A2CLoss(actor, critic())
    loss.make_value_estimator(gamma=0.99, lmbda=0.95)
    loss = loss.to(dtype)
    assert loss.value_estimator.gamma.item() == 0.99
    assert loss.value_estimator.lmbda.item() == 0.95
    assert loss.entropy_coeff.dtype == torch.float32
    data = collect(discrete_actor(), estimated=False)
    data = data.apply(lambda x: x.to(dtype) if x.is_floating_point() else x)
    out = loss(data)
    assert out["loss_critic"].dtype == dtype
    assert out["loss_objective"].isfinite()
