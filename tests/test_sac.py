"""SAC with a value network and without: the equations, and what is promised beyond (or against) what TorchRL does."""

import pytest
import torch
from fusedrl.losses.sac import SACLoss, own_share
from fusedrl.losses.temperature import continuous_target_entropy
from helpers_losses import OBSERVATION, squashed_normal
from helpers_q import (
    CLOSE,
    DOUBLE,
    LocScale,
    assert_rejected,
    desynchronise_targets,
    gradients,
    qvalue_network,
    run,
    stochastic_actor,
    transitions,
    value_network,
)
from helpers_sac import (
    continuous,
    made,
    policy_of,
    sac,
    sac_with_value,
    two_headed_actor,
    two_headed_qvalue,
    values_of,
)
from tensordict import TensorDict
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)
from torch import distributions as D
from torch import nn
from torch.nn import functional as F

ALPHA, GAMMA, TARGET_ENTROPY = 0.5, 0.5, -2.0


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def draw(loss, observation, params="actor_network_params"):
    """The next action of the policy, and its log-probability."""
    policy = policy_of(loss, getattr(loss, params), observation)
    action = policy.sample()
    return action, policy.log_prob(action)


def target_of(data, next_value):
    following = data["next"]
    next_value = torch.where(following["terminated"].squeeze(-1), 0, next_value)
    return following["reward"].squeeze(-1) + GAMMA * next_value


def prepared(make, batch=(3, 5), **options):
    loss = make(alpha_init=ALPHA, reduction="none", **options).make_value_estimator("TD0", gamma=GAMMA)
    return desynchronise_targets(loss), continuous(batch)


# --- the equations ----------------------------------------------------------------------------------------------


def test_losses_without_a_value_network_are_those_of_the_paper():
    loss, data = prepared(sac, loss_function="l2")
    out, seen = run(loss, data)

    torch.manual_seed(1)
    next_action, next_log_prob = draw(loss, data["next", "observation"])
    action, log_prob = draw(loss, data["observation"])
    next_values = values_of(loss, loss.target_qvalue_network_params, data["next", "observation"], next_action)
    target = target_of(data, next_values.min(0).values.squeeze(-1) - ALPHA * next_log_prob)
    values = values_of(loss, loss.qvalue_network_params, data["observation"], data["action"]).squeeze(-1)
    judged = values_of(loss, loss.qvalue_network_params, data["observation"], action).squeeze(-1)
    expected = {
        "loss_qvalue": (values - target).square().sum(0),
        "loss_actor": ALPHA * log_prob - judged.min(0).values,
        "loss_alpha": -loss.log_alpha.detach() * (log_prob + TARGET_ENTROPY),
        "alpha": torch.tensor(ALPHA),
        "entropy": -log_prob.mean(),
    }
    torch.testing.assert_close(out.detach().to_dict(), expected, **CLOSE)
    torch.testing.assert_close(seen["td_error"], (values - target).abs().max(0).values, **CLOSE)


def test_losses_with_a_value_network_are_those_of_the_paper():
    loss, data = prepared(sac_with_value, batch=(4, 5), loss_function="l2")
    out, seen = run(loss, data)

    def value(params, observation):
        with params.data.to_module(loss.value_network):
            return loss.value_network(TensorDict({"observation": observation}, observation.shape[:-1]))[
                "state_value"
            ].squeeze(-1)

    torch.manual_seed(1)
    action, log_prob = draw(loss, data["observation"])
    worth = values_of(loss, loss.target_qvalue_network_params, data["observation"], action).min(0).values.squeeze(-1)
    soft_value = worth - ALPHA * log_prob
    action, log_prob = draw(loss, data["observation"])
    judged = values_of(loss, loss.qvalue_network_params, data["observation"], action).min(0).values.squeeze(-1)
    target = target_of(data, value(loss.target_value_network_params, data["next", "observation"]))
    values = values_of(loss, loss.qvalue_network_params, data["observation"], data["action"]).squeeze(-1)
    own = torch.cat([values[0, :2], values[1, 2:]])  # each network learns from its half
    expected = {
        "loss_qvalue": (own - target).square(),
        "loss_actor": ALPHA * log_prob - judged,
        "loss_alpha": -loss.log_alpha.detach() * (log_prob + TARGET_ENTROPY),
        "loss_value": (value(loss.value_network_params, data["observation"]) - soft_value).square(),
        "alpha": torch.tensor(ALPHA),
        "entropy": -log_prob.mean(),
    }
    torch.testing.assert_close(out.detach().to_dict(), expected, **CLOSE)
    torch.testing.assert_close(seen["td_error"], (own - target).square(), **CLOSE)


def test_the_policy_s_gradient_passes_through_its_action_into_q():
    loss, data = prepared(sac)
    out, _ = run(loss, data)
    torch.manual_seed(1)
    draw(loss, data["next", "observation"])
    params = loss.actor_network_params.data.clone().requires_grad_()
    with params.to_module(loss.actor_network):
        policy = loss.actor_network.get_dist(TensorDict({"observation": data["observation"]}, data.shape))
    action = policy.rsample()
    judged = values_of(loss, loss.qvalue_network_params, data["observation"], action).min(0).values.squeeze(-1)
    (ALPHA * policy.log_prob(action) - judged).sum().backward()
    found = gradients(loss, out)["loss_actor"]
    for key, p in params.items(True, True):
        torch.testing.assert_close(found["actor_network_params." + ".".join(key)], p.grad, **CLOSE)


@pytest.mark.parametrize("loss_function", ["l1", "smooth_l1"])
def test_the_distance_of_value_and_target_can_be_another(loss_function):
    loss, data = prepared(sac, loss_function=loss_function, num_qvalue_nets=1)
    out, seen = run(loss, data)
    error = seen["td_error"]
    expected = error if loss_function == "l1" else F.smooth_l1_loss(error, torch.zeros_like(error), reduction="none")
    torch.testing.assert_close(out["loss_qvalue"], expected, **CLOSE)


# --- version 1: shares ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "owners"),
    [(4, [0, 0, 1, 1]), (5, [0, 0, 0, 1, 1]), (3, [0, 0, 1]), (1, [0]), (0, [])],
)
def test_shares_are_as_equal_as_can_be_whatever_the_batch(batch, owners):
    value = torch.stack([torch.zeros(batch), torch.ones(batch)])
    assert own_share(value).tolist() == owners


def test_all_networks_get_a_share():
    loss, data = prepared(sac_with_value, batch=(7,), num_qvalue_nets=3)
    out, _ = run(loss, data)
    found = {key: g for key, g in gradients(loss, out)["loss_qvalue"].items() if key.startswith("qvalue")}
    assert all(g.flatten(1).any(1).all() for g in found.values())


def test_the_two_actions_that_version_1_draws_take_one_call_of_the_policy():
    loss, data = prepared(sac_with_value)
    calls = []
    forward = LocScale.forward
    loss.actor_network[0].module.forward = lambda x: calls.append(x) or forward(loss.actor_network[0].module, x)
    run(loss, data)
    assert len(calls) == 1


# --- delayed networks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sac, sac_with_value])
def test_a_target_policy_draws_the_actions_that_are_learned_from(make):
    loss, data = prepared(make, delay_actor=True)
    before, _ = run(loss, data)
    for p in loss.target_actor_network_params.values(True, True):
        p.data.add_(1.0)
    after, _ = run(loss, data)
    learns = "loss_qvalue" if make is sac else "loss_value"
    changed = {name for name in before.keys() if not torch.equal(before[name], after[name])}  # noqa: SIM118
    assert changed == {learns}


@pytest.mark.parametrize("options", [{}, {"delay_qvalue": False}, {"delay_actor": True}, {"delay_value": False}])
def test_only_delayed_networks_have_targets_of_their_own(options):
    loss = sac_with_value(**options)
    delayed = {
        name
        for name, default in (("actor", False), ("qvalue", True), ("value", True))
        if options.get(f"delay_{name}", default)
    }
    found = {key.split("_")[1] for key, _ in loss.named_buffers() if key.startswith("target_")}
    assert found == delayed
    assert set(loss._has_update_associated) == {f"{name}_network" for name in delayed}


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("version", [1, 2])
def test_separate_losses_leave_a_common_trunk_to_the_policy(version, separate):
    trunk = TensorDictModule(nn.Linear(OBSERVATION, OBSERVATION, **DOUBLE), ["observation"], ["hidden"])
    actor = ProbabilisticTensorDictSequential(
        trunk,
        TensorDictModule(LocScale(), ["hidden"], ["loc", "scale"]),
        ProbabilisticTensorDictModule(["loc", "scale"], ["action"], distribution_class=squashed_normal),
    )
    value = TensorDictSequential(
        trunk, TensorDictModule(nn.Linear(OBSERVATION, 1, **DOUBLE), ["hidden"], ["state_value"])
    )
    head = qvalue_network()
    head.in_keys = ["hidden", "action"]
    loss = SACLoss(
        actor,
        TensorDictSequential(trunk, head),
        value if version == 1 else None,
        target_entropy=-2.0,
        separate_losses=separate,
    )
    found = gradients(loss, run(loss, transitions())[0])
    in_trunk = {
        term: {key for key, g in of.items() if "module.0.module" in key and g.any()} for term, of in found.items()
    }
    policy_s = {key for key in in_trunk["loss_actor"] if key.startswith("actor_network")}
    assert policy_s
    assert in_trunk["loss_actor"] == policy_s
    if separate:
        assert not in_trunk["loss_qvalue"]
        assert not in_trunk.get("loss_value")
    else:
        assert {key.split(".")[0] for key in in_trunk["loss_qvalue"]} == {"qvalue_network_params"}
        assert in_trunk.get("loss_value", policy_s) == policy_s  # one trunk, trained by both


def test_separate_losses_leave_what_q_and_the_value_share_to_the_value():
    trunk = TensorDictModule(nn.Linear(OBSERVATION, OBSERVATION, **DOUBLE), ["observation"], ["hidden"])
    head, value_head = qvalue_network(), value_network()
    head.in_keys, value_head.in_keys = ["hidden", "action"], ["hidden"]
    networks = TensorDictSequential(trunk, head), TensorDictSequential(trunk, value_head)
    loss = SACLoss(stochastic_actor(), *networks, target_entropy=-2.0, separate_losses=True)
    found = gradients(loss, run(loss, transitions())[0])
    assert found["loss_value"]["value_network_params.module.0.module.weight"].any()
    assert not any(g.any() for key, g in found["loss_qvalue"].items() if "module.0.module" in key)


def test_whatever_a_policy_draws_on_the_way_to_its_action_is_drawn():
    class Action(nn.Linear):
        def forward(self, intention):
            seen.append(intention)
            return super().forward(intention).chunk(2, -1)

    seen = []
    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(nn.Linear(OBSERVATION, 3, **DOUBLE), ["observation"], ["intended"]),
        ProbabilisticTensorDictModule(
            {"loc": "intended"}, ["intention"], distribution_class=lambda loc: D.Normal(loc, 1)
        ),
        TensorDictModule(Action(3, 4, **DOUBLE), ["intention"], ["loc", "log_scale"]),
        ProbabilisticTensorDictModule(
            {"loc": "loc", "scale": "log_scale"},
            ["action"],
            distribution_class=lambda loc, scale: D.Independent(D.Normal(loc, scale.exp()), 1),
        ),
    )
    loss = SACLoss(actor, qvalue_network(), target_entropy=-2.0)
    data = continuous()
    for seed in (1, 2):
        run(loss, data, seed)
    assert not torch.equal(seen[1], seen[3])


# --- the target entropy -----------------------------------------------------------------------------------------


class Spec:
    def __init__(self, *shape):
        self.shape = torch.Size(shape)


class Specs(dict):
    def __init__(self, shape, **leaves):
        super().__init__(leaves)
        self.shape = torch.Size(shape)


def test_each_agent_of_a_team_has_its_own_target_entropy():
    """Three agents with two dimensions each, in a nested spec whose own shape is that of the agents."""

    class Actor:
        dist_sample_keys = (("agents", "action"),)

    specs = Specs(())
    specs[("agents",)] = Specs((3,))
    specs[("agents", "action")] = Spec(3, 2)
    assert continuous_target_entropy("auto", specs, Actor()) == -2


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (Spec(2), -2),
        (Spec(3, 2), -6),
        (Spec(), -1),
        (Specs((), action=Spec(2)), -2),
        (Specs((4,), action=Spec(4, 2)), -2),
    ],
)
@pytest.mark.parametrize("where", ["argument", "actor"])
def test_the_automatic_target_entropy_is_minus_the_dimensions_of_an_action(spec, expected, where):
    actor = stochastic_actor()
    if where == "actor":
        actor.spec = spec
    loss = SACLoss(actor, qvalue_network(), action_spec=spec if where == "argument" else None)
    assert loss.target_entropy.item() == expected


def test_the_dimensions_of_all_heads_count():
    specs = Specs(())
    specs[("car", "steer")], specs[("car", "brake")] = Spec(1), Spec(1)
    assert SACLoss(two_headed_actor(), two_headed_qvalue(), action_spec=specs).target_entropy.item() == -2


@pytest.mark.parametrize("where", ["argument", "actor"])
@pytest.mark.parametrize(
    "spec", [None, Specs((), action=None), Specs((), other=Spec(2))], ids=["none", "empty", "other"]
)
def test_an_action_of_unknown_shape_has_no_automatic_target_entropy(spec, where):
    actor = stochastic_actor()
    if where == "actor":
        actor.spec = spec
    with pytest.raises(
        RuntimeError, match="target_entropy is 'auto', but nothing says how many dimensions 'action' has"
    ):
        SACLoss(actor, qvalue_network(), action_spec=spec if where == "argument" else None)


def test_an_actor_of_torchrl_without_a_spec_has_no_automatic_target_entropy():
    modules = pytest.importorskip("torchrl.modules")
    actor = modules.ProbabilisticActor(
        stochastic_actor()[0], in_keys=["loc", "scale"], distribution_class=modules.IndependentNormal
    )
    with pytest.raises(RuntimeError, match="nothing says how many dimensions 'action' has"):
        SACLoss(actor, qvalue_network())
    assert SACLoss(actor, qvalue_network(), action_spec=Spec(2)).target_entropy.item() == -2


def test_a_network_that_is_not_there_is_named():
    with pytest.raises(TypeError, match="SACLoss needs a module as qvalue_network, but it is None"):
        SACLoss(stochastic_actor(), None, target_entropy=-2.0)


# --- accidental broadcasting ------------------------------------------------------------------------------------


def test_a_policy_with_one_log_probability_per_dimension_is_refused():
    loss = sac(distribution=D.Normal)
    assert_rejected(loss, continuous(), RuntimeError, r"log-probability of the action.*\(3, 5, 2\).*\(3, 5, 1\)")


def test_a_q_network_with_several_values_is_refused():
    class Two(nn.Linear):
        def forward(self, observation, action):
            return super().forward(torch.cat([observation, action], -1))

    network = TensorDictModule(Two(OBSERVATION + 2, 2, **DOUBLE), ["observation", "action"], ["state_action_value"])
    loss = SACLoss(stochastic_actor(), network, target_entropy=-2.0)
    assert_rejected(loss, continuous(), RuntimeError, r"'state_action_value' has shape \(2, 3, 5, 2\)")


def test_a_value_network_with_several_values_is_refused():
    network = TensorDictModule(nn.Linear(OBSERVATION, 2, **DOUBLE), ["observation"], ["state_value"])
    loss = SACLoss(stochastic_actor(), qvalue_network(), network, target_entropy=-2.0)
    assert_rejected(loss, continuous(), RuntimeError, r"'state_value' has shape \(3, 5, 2\)")


def test_a_network_that_writes_another_value_is_told_so():
    network = qvalue_network()
    network.out_keys = ["q"]
    loss = SACLoss(stochastic_actor(), network, value_network(), target_entropy=-2.0)
    data = continuous()
    assert_rejected(loss, data, KeyError, r"doesn't write 'state_action_value' but \['q'\].*set_keys")
    loss.set_keys(state_action_value="q")
    assert run(loss, data)[0]["loss_qvalue"].isfinite()


# --- actions at the edge ----------------------------------------------------------------------------------------


def test_an_action_drawn_at_the_bound_has_a_finite_log_probability():
    loss, data = made("sac", distribution=squashed_normal)
    bias = loss.actor_network_params["module", "0", "module", "bias"]
    bias.data[:2] = 30.0  # tanh(30) is 1 in double precision
    out, _ = run(loss, data)
    assert all(x.isfinite().all() for x in out.values())
    assert all(g.isfinite().all() for of in gradients(loss, out).values() for g in of.values())
