"""SAC for discrete actions: the equations, and what is promised beyond (or against) what TorchRL does."""

import math

import pytest
import torch
from fusedrl.losses.discrete_sac import DiscreteSACLoss
from helpers_losses import OBSERVATION
from helpers_q import (
    ACTIONS,
    CLOSE,
    DOUBLE,
    action_values,
    assert_rejected,
    desynchronise_targets,
    gradients,
    run,
    transitions,
)
from helpers_sac import categorical_actor, discrete, discrete_sac, made, policy_of, values_of
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torch import distributions as D
from torch import nn
from torch.nn import functional as F

ALPHA, GAMMA = 0.5, 0.5


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def prepared(**options):
    loss = discrete_sac(alpha_init=ALPHA, reduction="none", target_entropy=0.75, **options)
    return desynchronise_targets(loss.make_value_estimator("TD0", gamma=GAMMA)), discrete()


def test_losses_are_those_of_the_paper():
    loss, data = prepared(loss_function="l2")
    out, seen = run(loss, data)

    policy, next_policy = (policy_of(loss, loss.actor_network_params, x["observation"]) for x in (data, data["next"]))
    p, next_p = policy.probs, next_policy.probs
    values = values_of(loss, loss.qvalue_network_params, data["observation"])
    next_values = values_of(loss, loss.target_qvalue_network_params, data["next", "observation"]).min(0).values
    next_value = (next_p * (next_values - ALPHA * next_p.log())).sum(-1)
    next_value = torch.where(data["next", "terminated"].squeeze(-1), 0, next_value)
    target = data["next", "reward"].squeeze(-1) + GAMMA * next_value
    taken = (values * F.one_hot(data["action"], ACTIONS)).sum(-1)
    expected = {
        "loss_qvalue": (taken - target).square().sum(0),
        "loss_actor": (p * (ALPHA * p.log() - values.min(0).values)).sum(-1),
        "loss_alpha": math.log(ALPHA) * (policy.entropy() - 0.75),
        "alpha": torch.tensor(ALPHA),
        "entropy": policy.entropy().mean(),
    }
    # log α is held in float32.
    torch.testing.assert_close(out.detach().to_dict(), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(seen["td_error"], (taken - target).abs().max(0).values, **CLOSE)


@pytest.mark.parametrize("form", ["one-hot", "one_hot", None, "[B, 1]"])
def test_an_action_means_the_same_in_every_form(form):
    loss, data = prepared()
    expected, _ = run(loss, data)
    if form == "[B, 1]":
        other, _ = prepared()
        data["action"] = data["action"].unsqueeze(-1)
    else:
        other, _ = prepared(action_space=form)
        data["action"] = F.one_hot(data["action"], ACTIONS)
    other.load_state_dict(loss.state_dict())
    torch.testing.assert_close(run(other, data)[0].to_dict(), expected.to_dict(), **CLOSE)


@pytest.mark.parametrize(("space", "name"), [("categorical", "categorical"), ("one-hot", "one_hot"), (None, "one_hot")])
def test_the_action_space_is_a_string(space, name):
    loss, _ = prepared(action_space=space)
    assert loss.action_space == name


@pytest.mark.parametrize("distribution", [D.Categorical, D.OneHotCategorical])
def test_the_policy_can_draw_actions_in_either_form(distribution):
    loss, data = prepared()
    other, _ = prepared(distribution=distribution)
    other.load_state_dict(loss.state_dict())
    torch.testing.assert_close(run(other, data)[0].to_dict(), run(loss, data)[0].to_dict(), **CLOSE)


def test_nothing_is_drawn():
    loss, data = prepared()
    (a, _), (b, _) = run(loss, data, seed=1), run(loss, data, seed=2)
    torch.testing.assert_close(a.to_dict(), b.to_dict(), rtol=0, atol=0)


def test_a_forbidden_action_leaves_loss_and_gradients_finite():
    class Masked(nn.Linear):
        def forward(self, x):
            return super().forward(x).masked_fill(torch.arange(ACTIONS) == 1, -torch.inf)

    actor = categorical_actor(lambda logits: D.Categorical(logits=logits, validate_args=False))
    actor[0].module = Masked(OBSERVATION, ACTIONS, **DOUBLE)
    loss = DiscreteSACLoss(actor, action_values(), action_space="categorical", num_actions=2)
    out, _ = run(loss, discrete())
    assert all(x.isfinite() for x in out.values())
    found = gradients(loss, out)
    assert all(g.isfinite().all() for of in found.values() for g in of.values())
    weight = next(g for key, g in found["loss_actor"].items() if key.endswith("weight") and key.startswith("actor"))
    assert not weight[1].any()
    assert weight[0].any()


def test_the_values_of_the_observations_are_asked_for_once():
    loss, data = prepared()
    calls = []
    ask = loss._ensemble
    loss._ensemble = lambda *args, **options: calls.append(args) or ask(*args, **options)
    run(loss, data)
    assert len(calls) == 2  # the other is about the next observations


def test_an_observation_that_learns_gets_the_policy_s_gradient_through_the_values():
    loss, data = prepared()
    plain, _ = run(loss, data)
    data["observation"].requires_grad_()
    out, _ = run(loss, data)
    torch.testing.assert_close(gradients(loss, out), gradients(loss, plain), **CLOSE)
    (gradient,) = torch.autograd.grad(out["loss_actor"].sum(), data["observation"], retain_graph=True)

    observation = data["observation"].detach().requires_grad_()
    with loss.actor_network_params.data.to_module(loss.actor_network):
        p = loss.actor_network[0].module(observation).softmax(-1)
    values = values_of(loss, loss.qvalue_network_params, observation).min(0).values
    (p * (ALPHA * p.log() - values)).sum().backward()
    torch.testing.assert_close(gradient, observation.grad, **CLOSE)


@pytest.mark.parametrize(("options", "expected"), [({}, 0.98), ({"target_entropy_weight": 0.5}, 0.5)])
def test_the_automatic_target_entropy_is_a_share_of_the_greatest(options, expected):
    assert discrete_sac(**options).target_entropy.item() == pytest.approx(expected * math.log(ACTIONS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_actions": None}, "target_entropy is 'auto', which needs num_actions"),
        ({"action_space": "foo"}, "action_space is 'foo'"),
        ({"action_space": "binary"}, "action_space is 'binary', but an action must be one choice"),
    ],
)
def test_what_leaves_the_actions_open_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        discrete_sac(**options)


def test_values_of_other_actions_than_the_policy_s_are_refused():
    loss = DiscreteSACLoss(categorical_actor(), action_values(1), action_space="categorical", num_actions=ACTIONS)
    assert_rejected(loss, discrete(), RuntimeError, r"'action_value' has shape \(3, 5, 1\).*logits.*\(3, 5, 3\)")


def test_a_policy_that_has_no_distribution_for_each_sample_is_refused():
    loss, data = made("discrete_sac")
    data["observation"] = data["observation"].unsqueeze(-2)
    assert_rejected(loss, data, RuntimeError, r"logits of the policy.*\(3, 5, 1, 1\).*one value per sample")


def test_an_action_of_another_shape_is_refused():
    loss, data = made("discrete_sac")
    data["action"] = data["action"].unsqueeze(-1).expand(3, 5, 3).clone()
    assert_rejected(loss, data, RuntimeError, r"action \(categorical\) has shape")


def test_a_network_that_writes_another_value_is_told_so():
    network = TensorDictModule(nn.Linear(OBSERVATION, ACTIONS, **DOUBLE), ["observation"], ["q"])
    loss = DiscreteSACLoss(categorical_actor(), network, action_space="categorical", num_actions=ACTIONS)
    data = discrete()
    assert_rejected(loss, data, KeyError, r"doesn't write 'action_value' but \['q'\].*set_keys")
    loss.set_keys(action_value="q")
    assert run(loss, data)[0]["loss_qvalue"].isfinite()


def test_padding_where_no_action_is_allowed_reaches_no_gradient():
    modules = pytest.importorskip("torchrl.modules")
    policy = ProbabilisticTensorDictSequential(
        TensorDictModule(nn.Linear(OBSERVATION, ACTIONS, **DOUBLE), ["observation"], ["logits"]),
        ProbabilisticTensorDictModule(
            {"logits": "logits", "mask": "allowed"}, ["action"], distribution_class=modules.MaskedCategorical
        ),
    )
    loss = DiscreteSACLoss(policy, action_values(), action_space="categorical", num_actions=ACTIONS)
    data = transitions((5,), action="categorical")
    counts = torch.tensor([True, True, True, False, False])
    data["collector", "mask"] = counts
    data["allowed"] = data["next", "allowed"] = counts.unsqueeze(-1).expand(5, ACTIONS)
    out = loss(data)
    found = torch.autograd.grad(out["loss_alpha"] + out["loss_actor"] + out["loss_qvalue"], list(loss.parameters()))
    assert all(g.isfinite().all() for g in found)
