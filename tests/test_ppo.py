"""What PPOLoss, ClipPPOLoss and KLPENPPOLoss promise beyond, or other than, TorchRL: see test_parity_ppo.py."""

import math

import pytest
import torch
from fusedrl.losses import ClipPPOLoss, KLPENPPOLoss, PPOLoss
from fusedrl.losses.functional import effective_sample_size
from fusedrl.losses.policy import entropy
from helpers_losses import (
    ACTORS,
    DOUBLE,
    OBSERVATION,
    collect,
    composite_actor,
    critic,
    discrete_actor,
    gaussian_actor,
    tabular_actor,
    team_actor,
    two_step_actor,
)
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential, set_composite_lp_aggregate
from torch import distributions as D
from torch import nn

# Sums of a few dozen float64 numbers of order one, against coefficients that are float32.
CLOSE = {"rtol": 1e-6, "atol": 1e-9}

CLASSES = [PPOLoss, ClipPPOLoss, KLPENPPOLoss]
every_loss = pytest.mark.parametrize("cls", CLASSES)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    with set_composite_lp_aggregate(False):
        yield


def snapshot(tensordict):
    return {key: tensordict.get(key) for key in tensordict.keys(True, True)}


def same_objects(tensordict, before):
    after = snapshot(tensordict)
    return after.keys() == before.keys() and all(after[key] is before[key] for key in before)


# --- the equations, by hand -------------------------------------------------------------------------------------


def hand_made():
    """Two states with one-hot observations; the policy is uniform over two actions, the critic says 0."""
    actor, value = tabular_actor(), critic()
    nn.init.zeros_(value.module.weight)
    nn.init.zeros_(value.module.bias)
    data = TensorDict(
        {
            "observation": torch.eye(2, OBSERVATION, **DOUBLE),
            "logits": torch.zeros(2, 2, **DOUBLE),
            "action": torch.tensor([0, 1]),
            "action_log_prob": torch.tensor([0.25, 0.5], **DOUBLE).log(),  # ratios 2 and 1
            "advantage": torch.tensor([[3.0], [-1.0]], **DOUBLE),
            "value_target": torch.tensor([[0.5], [2.0]], **DOUBLE),
        },
        [2],
    )
    return actor, value, data


@pytest.mark.parametrize(
    ("cls", "objective"),
    [
        (PPOLoss, -(2 * 3 - 1) / 2),
        (ClipPPOLoss, -(1.2 * 3 - 1) / 2),
        (KLPENPPOLoss, -(2 * 3 - 1) / 2),  # old and new parameters agree: KL = 0
    ],
)
def test_losses_by_hand(cls, objective):
    actor, value, data = hand_made()
    out = cls(actor, value)(data)
    assert out["loss_objective"].item() == pytest.approx(objective)
    assert out["loss_critic"].item() == pytest.approx((0.5**2 / 2 + (2 - 0.5)) / 2)
    assert out["loss_entropy"].item() == pytest.approx(-0.01 * math.log(2))
    assert out["entropy"].item() == pytest.approx(math.log(2))
    assert out["kl_approx"].item() == pytest.approx(-math.log(2) / 2)


def test_clip_metrics_by_hand():
    actor, value, data = hand_made()
    out = ClipPPOLoss(actor, value)(data)
    assert out["clip_fraction"].item() == 0.5
    assert out["max_ratio"].item() == pytest.approx(2)
    assert out["mean_ratio"].item() == pytest.approx(1.5)
    assert out["ESS"].item() == pytest.approx(3**2 / 5 / 2)


def test_kl_penalty_by_hand():
    actor, value, data = hand_made()
    data["logits"] = torch.tensor([0.75, 0.25], **DOUBLE).log().expand(2, 2)
    kl = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    loss = KLPENPPOLoss(actor, value, beta=3.0, dtarg=kl)
    out = loss(data)
    assert out["loss_objective"].item() == pytest.approx(-2.5 + 3 * kl)
    assert out["kl"].flatten().tolist() == pytest.approx([kl, kl])


# --- β ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("factor", "beta"), [(1.6, 3.0), (1.4, 1.0), (0.7, 1.0), (0.6, 0.25)])
def test_beta_adapts_to_the_mean_divergence(factor, beta):
    actor, value = discrete_actor(), critic()
    data = collect(actor)
    kl = KLPENPPOLoss(actor, value)(data)["kl"].mean().item()
    loss = KLPENPPOLoss(actor, value, dtarg=kl / factor, increment=3.0, decrement=0.25)
    loss(data)
    assert loss.beta.item() == beta
    assert not loss.beta.requires_grad


def test_gradient_of_the_penalty_uses_the_beta_of_the_loss_not_the_adapted_one():
    actor, value = discrete_actor(), critic()
    data = collect(actor)
    data["advantage"] = torch.zeros_like(data["advantage"])
    grads = []
    for increment in (1.0, 100.0):
        loss = KLPENPPOLoss(actor, value, dtarg=1e-6, increment=increment)
        grads.append(torch.autograd.grad(loss(data)["loss_objective"], list(actor.parameters())))
    torch.testing.assert_close(*grads)


def test_padding_does_not_count_for_beta():
    actor, value = discrete_actor(), critic()
    data = collect(actor, (6,))
    valid = KLPENPPOLoss(actor, value)(data[:3])["kl"].mean().item()
    data["logits"][3:] = actor.get_dist(data[3:].copy()).logits.detach()  # KL = 0, but padding
    data["collector", "mask"] = torch.arange(6) < 3
    loss = KLPENPPOLoss(actor, value, dtarg=valid)
    loss(data)
    assert loss.beta.item() == 1


def test_policy_whose_old_distribution_is_not_in_the_data_needs_a_delayed_actor():
    actor, value = two_step_actor(), critic()
    data = collect(actor)
    with pytest.raises(NotImplementedError, match="delay_actor=True"):
        KLPENPPOLoss(actor, value)
    assert KLPENPPOLoss(actor, value, delay_actor=True)(data)["kl"].abs().max() < 1e-12


def test_refused_input_does_not_change_beta():
    actor, value = discrete_actor(), critic()
    data = collect(actor, (6,))
    data["value_target"] = data["value_target"].squeeze(-1)
    loss = KLPENPPOLoss(actor, value, dtarg=1e-6)
    with pytest.raises(RuntimeError, match="value_target"):
        loss(data)
    assert loss.beta.item() == 1


def test_reset_puts_beta_back():
    actor, value = discrete_actor(), critic()
    loss = KLPENPPOLoss(actor, value, beta=0.75)
    loss.beta = 9.0
    loss.reset()
    assert loss.beta.item() == 0.75


# --- padding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"normalize_advantage": True, "clip_value": 0.2}])
@every_loss
def test_padded_data_gives_what_the_data_without_padding_gives(cls, options):
    actor, value = discrete_actor(), critic()
    data = collect(actor, (7,))
    padded = torch.cat([data, collect(actor, (5,))])
    padded["collector", "mask"] = torch.arange(12) < 7
    loss = (
        cls(actor, value, increment=1.0, decrement=1.0, **options)
        if cls is KLPENPPOLoss
        else cls(actor, value, **options)
    )
    plain, masked = loss(data), loss(padded)
    for key, expected in plain.items():
        if key == "kl":
            expected = torch.cat([expected, torch.zeros(5, 1, **DOUBLE)])
        torch.testing.assert_close(masked[key], expected, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("make", [gaussian_actor, composite_actor])
@pytest.mark.parametrize("normalize", [False, True])
@every_loss
def test_nan_in_padding_reaches_neither_the_loss_nor_the_gradient(cls, normalize, make):
    actor, value = make(), critic()
    parameters = [*actor.parameters(), *value.parameters()]
    data = collect(actor, (7,))
    wanted = cls(actor, value, clip_value=0.1, normalize_advantage=normalize)(data[:4].clone())
    data["collector", "mask"] = torch.arange(7) < 4
    for key in data.keys(True, True):
        if data[key].is_floating_point():
            data[key][4:] = math.nan
    out = cls(actor, value, clip_value=0.1, normalize_advantage=normalize)(data)
    assert all(entry.isfinite().all() for entry in out.values(True, True))
    found, expected = (
        torch.autograd.grad(sum(x for name, x in terms.items() if name.startswith("loss_")), parameters)
        for terms in (out, wanted)
    )
    torch.testing.assert_close(found, expected)


# --- per-sample losses ------------------------------------------------------------------------------------------


@every_loss
def test_unreduced_losses_average_to_the_mean_loss(cls):
    actor, value = discrete_actor(), critic()
    data = collect(actor)
    mean, each = cls(actor, value)(data), cls(actor, value, reduction="none")(data)
    for key in ("loss_objective", "loss_critic", "loss_entropy"):
        assert each[key].shape == data.shape
        torch.testing.assert_close(each[key].mean(), mean[key], **CLOSE)


# --- entropy ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", "_log_prob", "_entropy"])
def test_entropy_coefficient_of_a_head_can_be_named_by_any_of_its_entries(suffix):
    actor, value = composite_actor(), critic()
    data = collect(actor)
    coefficients = {("car", "gear" + suffix): 0.1, ("car", "steer" + suffix): 0.5}
    out = PPOLoss(actor, value, entropy_coeff=coefficients)(data)
    by_head = {key: h.mean() for key, h in out["composite_entropy"].items(True, True)}
    expected = -0.1 * by_head["car", "gear_entropy"] - 0.5 * by_head["car", "steer_entropy"]
    torch.testing.assert_close(out["loss_entropy"].detach(), expected, **CLOSE)


def test_entropy_coefficient_by_head_works_for_a_single_head():
    actor, value = discrete_actor(), critic()
    out = PPOLoss(actor, value, entropy_coeff={"action": 0.5})(collect(actor))
    torch.testing.assert_close(out["loss_entropy"].detach(), -0.5 * out["entropy"], **CLOSE)


def test_entropy_coefficients_by_head_are_not_replaced_by_one_number():
    actor, value = discrete_actor(), critic()
    loss = PPOLoss(actor, value, entropy_coeff={"action": 0.5})
    with pytest.raises(AttributeError, match="a coefficient for each head"):
        loss.entropy_coeff = 0.0


@pytest.mark.parametrize("coefficients", [{"gear": 0.1}, {"gear": 0.1, "steer": 0.1, "brake": 0.1}])
def test_entropy_coefficients_must_name_the_policys_heads(coefficients):
    with pytest.raises(KeyError, match=r"entropy_coeff has the heads .*gear.*policy's are .*steer"):
        PPOLoss(ACTORS["flat_heads"](), critic(), entropy_coeff=coefficients)


class Opaque(D.Categorical):
    """A distribution that has neither an entropy nor reparametrised samples."""

    def entropy(self):
        raise NotImplementedError


def test_gradient_of_a_sampled_entropy_is_that_of_the_entropy():
    logits = torch.tensor([0.5, -0.3, 0.1], **DOUBLE, requires_grad=True)
    exact = D.Categorical(logits=logits).entropy()
    sampled = entropy(Opaque(logits=logits), 200_000)
    # 200 000 draws of numbers of order one: a standard error of 0.002
    assert sampled.item() == pytest.approx(exact.item(), abs=0.01)
    torch.testing.assert_close(
        torch.autograd.grad(sampled, logits), torch.autograd.grad(exact, logits), rtol=0, atol=0.01
    )


# --- several heads ----------------------------------------------------------------------------------------------


@every_loss
def test_result_does_not_depend_on_how_log_probs_are_aggregated(cls):
    results = []
    for aggregate in (False, True):
        torch.manual_seed(0)
        with set_composite_lp_aggregate(aggregate):
            actor, value = composite_actor(), critic()
            results.append(cls(actor, value)(collect(actor)).exclude("composite_entropy").to_dict())
    torch.testing.assert_close(*results)


def test_dimensions_of_a_head_that_the_samples_do_not_have_act_jointly():
    # Three drivers share an observation and one reward: their log-probabilities and entropies add up.
    actor, value = team_actor(3), critic()
    data = collect(actor, (5,))
    out = PPOLoss(actor, value)(data)
    heads = actor.get_dist(data.copy()).dists[("car", "gear")]
    log_weight = (heads.log_prob(data["car", "gear"]) - data["car", "gear_log_prob"]).sum(-1, keepdim=True)
    expected = -(log_weight.exp() * data["advantage"]).mean()
    torch.testing.assert_close(out["loss_objective"], expected)
    torch.testing.assert_close(out["entropy"], heads.entropy().sum(-1).mean().detach())


# --- networks ---------------------------------------------------------------------------------------------------


def test_separate_losses_keep_the_critics_gradient_off_the_shared_trunk():
    trunk = nn.Linear(OBSERVATION, OBSERVATION, **DOUBLE)
    actor = discrete_actor()
    actor[0].module = nn.Sequential(trunk, actor[0].module)
    value = TensorDictModule(
        nn.Sequential(trunk, nn.Linear(OBSERVATION, 1, **DOUBLE)), ["observation"], ["state_value"]
    )
    data = collect(actor)
    for separate in (False, True):
        out = PPOLoss(actor, value, separate_losses=separate)(data)
        (grad,) = torch.autograd.grad(out["loss_critic"], [trunk.weight], allow_unused=True, retain_graph=True)
        assert (grad is None) == separate
        (grad,) = torch.autograd.grad(out["loss_objective"], [trunk.weight])
        assert grad.abs().sum() > 0


def test_critic_can_read_what_the_policys_trunk_writes():
    trunk = TensorDictModule(nn.Linear(OBSERVATION, OBSERVATION, **DOUBLE), ["observation"], ["hidden"])
    actor = discrete_actor(reads="hidden", trunk=trunk)
    head = TensorDictModule(nn.Linear(OBSERVATION, 1, **DOUBLE), ["hidden"], ["state_value"])
    data = collect(actor)
    del data["hidden"]
    out = PPOLoss(actor, head)(data)
    whole = PPOLoss(actor, TensorDictSequential(trunk, head))(data)
    torch.testing.assert_close(out["loss_critic"], whole["loss_critic"])
    assert torch.autograd.grad(out["loss_critic"], [trunk.module.weight])[0].abs().sum() > 0


@every_loss
def test_without_a_critic_only_the_policy_is_trained(cls):
    actor = discrete_actor()
    loss = cls(actor)
    data = collect(actor)
    del data["value_target"]
    out = loss(data)
    assert "loss_critic" not in loss.out_keys
    assert not {"loss_critic", "explained_variance"} & set(out.keys())
    assert {name.split(".")[0] for name, _ in loss.named_parameters()} == {"actor_network_params"}


@every_loss
def test_delayed_actor_moves_only_when_it_is_updated(cls):
    actor, value = discrete_actor(), critic()
    data = collect(actor)
    loss = cls(actor, value, delay_actor=True)
    assert loss(data)["kl_approx"].item() == pytest.approx(0, abs=1e-12)
    with torch.no_grad():
        actor[0].module.bias[0] += 1
    assert abs(loss(data)["kl_approx"].item()) > 1e-3
    names = {name.split(".")[0] for name, _ in loss.named_parameters()}
    assert names == {"actor_network_params", "critic_network_params"}


# --- the advantage ----------------------------------------------------------------------------------------------


@every_loss
def test_missing_advantage_is_estimated_and_the_input_stays_as_it_is(cls):
    actor, value = discrete_actor(), critic()
    data = collect(actor, estimated=False)
    before = snapshot(data)
    loss = cls(actor, value).make_value_estimator(gamma=0.9, lmbda=0.8)
    out = loss(data)
    assert same_objects(data, before)
    estimated = data.copy()
    loss.value_estimator(estimated, params=loss.critic_network_params)
    torch.testing.assert_close(out.to_dict(), cls(actor, value)(estimated).to_dict())


@every_loss
def test_estimated_advantage_trains_the_critic_through_its_value_alone(cls):
    actor, value = discrete_actor(), critic()
    for functional in (True, False):
        out = cls(actor, value, functional=functional)(collect(actor, estimated=False))
        unused = torch.autograd.grad(
            out["loss_objective"], list(value.parameters()), allow_unused=True, retain_graph=True
        )
        assert unused == (None, None)
        assert torch.autograd.grad(out["loss_critic"], [value.module.bias])[0].abs() > 0


@every_loss
def test_input_with_an_advantage_stays_as_it_is(cls):
    actor, value = composite_actor(), critic()
    data = collect(actor)
    before = snapshot(data)
    cls(actor, value, normalize_advantage=True, clip_value=0.1)(data)
    assert same_objects(data, before)


@every_loss
@pytest.mark.parametrize("fill", [0.0, 5.0, math.nan])
def test_padding_does_not_change_the_advantage_that_the_loss_estimates(cls, fill):
    actor, value = gaussian_actor(), critic()
    data = collect(actor, (1, 5), estimated=False)
    data["next", "done"] = torch.zeros(1, 5, 1, dtype=torch.bool)
    padded = torch.cat([data, data[:, :3]], 1).clone()
    padded["observation"][:, 5:] = fill
    for key in ("observation", "reward"):
        padded["next", key][:, 5:] = fill
    padded["collector", "mask"] = torch.arange(8).lt(5)[None]
    for key in ("loss_objective", "loss_critic"):
        torch.testing.assert_close(cls(actor, value)(padded)[key], cls(actor, value)(data)[key])


# --- coefficients -----------------------------------------------------------------------------------------------


def test_coefficients_are_scheduled_by_assignment():
    actor, value = discrete_actor(), critic()
    data = collect(actor)
    loss = ClipPPOLoss(actor, value, clip_value=0.1, max_importance_ratio=9.0)
    new = {
        "entropy_coeff": 0.5,
        "critic_coeff": 0.25,
        "clip_epsilon": 0.05,
        "clip_value": 0.3,
        "max_importance_ratio": 1.1,
    }
    for name, coefficient in new.items():
        setattr(loss, name, coefficient)
    torch.testing.assert_close(loss(data).to_dict(), ClipPPOLoss(actor, value, **new)(data).to_dict())


def test_pair_of_clip_bounds_is_scheduled_one_by_one():
    loss = ClipPPOLoss(discrete_actor(), critic(), clip_epsilon=(0.1, 0.3))
    loss.clip_epsilon_high = 0.5
    assert [bound.item() for bound in loss.clip_bounds] == pytest.approx([0.1, 0.5])
    with pytest.raises(AttributeError, match=r"clip_epsilon_low.* not in clip_epsilon"):
        loss.clip_epsilon = 0.2


# --- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["action", "action_log_prob", "observation", "value_target", "state_value"])
@every_loss
def test_missing_entry_is_named_and_the_input_stays_as_it_is(cls, key):
    actor, value = discrete_actor(), critic()
    data = collect(actor).exclude(key)
    before = snapshot(data)
    with pytest.raises(KeyError, match=f"{cls.__name__}.*'{key}'"):
        cls(actor, value, clip_value=0.1)(data)
    assert same_objects(data, before)


def test_missing_parameters_of_the_old_policy_are_named():
    actor, value = discrete_actor(), critic()
    with pytest.raises(KeyError, match=r"KLPENPPOLoss.*'logits'"):
        KLPENPPOLoss(actor, value)(collect(actor).exclude("logits"))


@pytest.mark.parametrize(
    ("make", "parameters"), [(discrete_actor, ["logits"]), (gaussian_actor, ["loc", "scale"])], ids=["logits", "normal"]
)
def test_parameters_of_another_old_policy_are_refused_and_beta_stays(make, parameters):
    actor = make()
    data = collect(actor)
    for key in parameters:
        data[key] = data[key][..., :1]
    loss = KLPENPPOLoss(actor, critic())
    with pytest.raises(RuntimeError, match="old policy's distribution has shape"):
        loss(data)
    assert loss.beta == 1


def test_missing_advantage_without_a_critic_is_named():
    actor = discrete_actor()
    with pytest.raises(KeyError, match=r"PPOLoss.*'advantage'.*set_keys\(advantage=...\)"):
        PPOLoss(actor)(collect(actor).exclude("advantage"))


@pytest.mark.parametrize(
    ("key", "shape", "other"),
    [
        ("advantage", (6, 3), "log-prob"),
        ("advantage", (6,), "log-prob"),
        ("action_log_prob", (6, 1, 1), "advantage"),
        ("action_log_prob", (6, 4), "advantage"),
        ("value_target", (6,), "state_value"),
        ("value_target", (6, 2), "state_value"),
        ("state_value", (6,), "value_target"),
    ],
)
@every_loss
def test_shapes_that_would_broadcast_by_accident_are_refused(cls, key, shape, other):
    actor, value = discrete_actor(), critic()
    data = collect(actor, (6,))
    data[key] = torch.zeros(shape, **DOUBLE)
    before = snapshot(data)
    with pytest.raises(RuntimeError, match=rf"(?s)(?=.*{key})(?=.*{other})") as error:
        cls(actor, value, clip_value=0.1)(data)
    assert str(shape) in str(error.value)
    assert same_objects(data, before)


@pytest.mark.parametrize("key", ["action", "action_log_prob"])
def test_collected_data_that_requires_grad_is_refused(key):
    actor, value = gaussian_actor(), critic()
    data = collect(actor)
    data[key] = data[key].requires_grad_()
    with pytest.raises(RuntimeError, match=f"'{key}' requires grad"):
        PPOLoss(actor, value)(data)


@pytest.mark.parametrize(
    ("cls", "options", "error", "message"),
    [
        (PPOLoss, {"reduction": "foo"}, ValueError, "reduction is 'foo'"),
        (PPOLoss, {"loss_critic_type": "foo"}, ValueError, "loss_critic_type is 'foo'"),
        (PPOLoss, {"gamma": 0.9}, TypeError, "make_value_estimator"),
        (ClipPPOLoss, {"gamma": 0.9}, TypeError, "make_value_estimator"),
        (PPOLoss, {"foo": 1}, TypeError, "foo"),
        (ClipPPOLoss, {"foo": 1}, TypeError, "foo"),
        (PPOLoss, {"entropy_coeff": "a"}, TypeError, "entropy_coeff .* 'a'"),
        (PPOLoss, {"clip_value": True}, ValueError, "clip_value .* True"),
        (PPOLoss, {"clip_value": -0.1}, ValueError, "clip_value is -0.1, but must not be negative"),
        (PPOLoss, {"max_importance_ratio": 0.0}, ValueError, "max_importance_ratio is 0.0"),
        (PPOLoss, {"functional": False, "delay_actor": True}, ValueError, "functional=True"),
        (PPOLoss, {"functional": False, "separate_losses": True}, ValueError, "functional=True"),
        (PPOLoss, {"critic_network": None, "critic_coeff": 0.5}, TypeError, "critic_network"),
        (PPOLoss, {"actor_network": None}, TypeError, "actor_network"),
        (ClipPPOLoss, {"clip_epsilon": -0.1}, ValueError, "clip_epsilon is -0.1"),
        (ClipPPOLoss, {"clip_epsilon": (1.5, 0.2)}, ValueError, r"clip_epsilon is \(1.5, 0.2\)"),
        (ClipPPOLoss, {"clip_epsilon": (0.1, 0.2, 0.3)}, ValueError, "clip_epsilon"),
        (ClipPPOLoss, {"clip_epsilon": (0.1, 0.2), "clip_value": True}, ValueError, "clip_value=True"),
        (KLPENPPOLoss, {"increment": 0.5}, ValueError, "increment is 0.5"),
        (KLPENPPOLoss, {"decrement": 2.0}, ValueError, "decrement is 2.0"),
        (KLPENPPOLoss, {"decrement": -1.0}, ValueError, "decrement is -1.0"),
        (ClipPPOLoss, {"clip_epsilon": float("nan")}, ValueError, "clip_epsilon is nan"),
    ],
)
def test_bad_argument_is_refused_at_construction(cls, options, error, message):
    with pytest.raises(error, match=message):
        cls(**{"actor_network": discrete_actor(), "critic_network": critic(), **options})


@every_loss
def test_unknown_key_is_refused(cls):
    with pytest.raises(ValueError, match="foo is not a key"):
        cls(discrete_actor(), critic()).set_keys(foo="bar")


def test_key_set_to_none_is_the_policys_again():
    loss = PPOLoss(composite_actor(), critic())
    loss.set_keys(sample_log_prob="other", action="something", advantage="gain")
    loss.set_keys(sample_log_prob=None, action=None, advantage=None)
    assert loss.tensor_keys == PPOLoss(composite_actor(), critic()).tensor_keys


@every_loss
def test_renamed_entries_are_read(cls):
    actor, value = discrete_actor(), critic()
    data = collect(actor)
    expected = cls(actor, value)(data)
    names = {
        "advantage": "gain",
        "value_target": ("value", "target"),
        "sample_log_prob": "old",
        "action": ("a", "b"),
    }
    for name, key in names.items():
        old = {"sample_log_prob": "action_log_prob"}.get(name, name)
        data[key] = data.pop(old)
    loss = cls(actor, value)
    loss.set_keys(**names)
    torch.testing.assert_close(loss(data).to_dict(), expected.to_dict())


def test_refused_key_leaves_all_keys_as_they_were():
    loss = ClipPPOLoss(discrete_actor(), critic())
    with pytest.raises(KeyError, match="foo"):
        loss.set_keys(value="foo", advantage="mine")
    assert (loss.tensor_keys.value, loss.tensor_keys.advantage) == ("state_value", "advantage")
    assert loss.value_estimator.tensor_keys.advantage == "advantage"


def test_error_in_the_delayed_actor_leaves_the_policy_its_parameters():
    actor = discrete_actor()
    loss = ClipPPOLoss(actor, critic(), delay_actor=True)
    before = list(actor.parameters())
    data = collect(actor)
    data["observation"] = torch.randn(3, 5, OBSERVATION + 1, **DOUBLE)
    with pytest.raises(RuntimeError):
        loss(data)
    assert all(p is q for p, q in zip(actor.parameters(), before, strict=True))


@every_loss
def test_priorities_weigh_the_objective(cls):
    actor, value = discrete_actor(), critic()
    data = collect(actor)
    each = cls(actor, value, reduction="none")(data.clone())["loss_objective"]
    data["priority_weight"] = weights = torch.rand(data.shape, dtype=torch.float64)
    out = cls(actor, value)(data)
    torch.testing.assert_close(out["loss_objective"], (each * weights).sum() / weights.sum(), **CLOSE)


@pytest.mark.parametrize("largest", [None, 1.0])
def test_the_effective_sample_size_of_each_column_is_of_the_capped_weights_that_count(largest):
    actor, value = discrete_actor(), critic()
    data = collect(actor)  # batch size [3, 5]
    data["action_log_prob"] = data["action_log_prob"] + torch.randn(data.shape, dtype=torch.float64)
    data["collector", "mask"] = mask = torch.rand(data.shape) < 0.7
    loss = ClipPPOLoss(actor, value, max_importance_ratio=largest)
    log_weight = actor.get_dist(data.clone()).log_prob(data["action"]).detach() - data["action_log_prob"]
    wanted = effective_sample_size(log_weight if largest is None else log_weight.clamp_max(0.0), mask)
    torch.testing.assert_close(loss(data)["ESS"], wanted, **CLOSE)


@every_loss
def test_a_critic_that_does_not_count_has_no_loss(cls):
    actor, value = discrete_actor(), critic()
    out = cls(actor, value, critic_coeff=0.0)(collect(actor))
    assert "loss_critic" not in out.keys()  # noqa: SIM118  # a TensorDict is no dict


@every_loss
def test_a_coefficient_of_0_needs_no_critic(cls):
    actor = discrete_actor()
    data = collect(actor)
    with_critic = cls(actor, critic(), critic_coeff=0.0)(data.clone())
    alone = cls(actor, critic_coeff=0.0)(data)
    assert torch.equal(alone["loss_objective"], with_critic["loss_objective"])


def test_the_lower_of_two_clip_bounds_is_below_1():
    with pytest.raises(ValueError, match="its first below 1"):
        ClipPPOLoss(discrete_actor(), critic(), clip_epsilon=(1.0, 0.2))


def test_a_value_is_not_clipped_where_that_is_false():
    assert ClipPPOLoss(discrete_actor(), critic(), clip_value=False).clip_value is None


def test_the_clip_range_is_put_where_it_is_told():
    loss = ClipPPOLoss(discrete_actor(), critic(), device="meta")
    assert loss.clip_epsilon.device.type == "meta"


def heavy_tails(loc, scale):
    """Neither its entropy nor its divergences are known to PyTorch in closed form, as of version 2.11."""
    return D.Independent(D.StudentT(5.0, loc, scale), 1)


def test_the_divergence_is_estimated_from_as_many_draws_as_wanted():
    actor, value = gaussian_actor(heavy_tails), critic()
    data = collect(actor)
    data["loc"] = data["loc"] + 0.5
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(KLPENPPOLoss(actor, value, samples_mc_kl=4000)(data.clone())["kl"].mean())
    torch.testing.assert_close(*found, rtol=0, atol=0.03)


def test_a_delayed_policy_needs_no_parameters_in_the_data():
    actor, value = discrete_actor(), critic()
    assert "logits" in KLPENPPOLoss(actor, value).in_keys
    assert "logits" not in KLPENPPOLoss(actor, value, delay_actor=True).in_keys
