"""Behaviour cloning: what is maximised for which policy, padded chunks, shapes."""

import pytest
import torch
from fusedrl.losses.behaviour_cloning import BCLoss
from fusedrl.losses.functional.imitation import classification_loss
from helpers_imitation import demonstrations
from helpers_losses import ACTORS, DOUBLE, OBSERVATION, collect, discrete_actor
from helpers_q import ACTIONS, CLOSE, assert_compiles, assert_rejected, deterministic_actor, gradients, stochastic_actor
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule
from torch import nn
from torch.nn import functional as F


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def logits():
    return TensorDictModule(nn.Linear(OBSERVATION, ACTIONS, **DOUBLE), ["observation"], ["action"])


def chunk_policy():
    net = nn.Sequential(nn.Linear(OBSERVATION, 8, **DOUBLE), nn.Unflatten(-1, (2, 4)))
    return TensorDictModule(net, ["observation"], [("vla_action", "chunk")])


def padded_chunks():
    observation, chunk = torch.randn(2, OBSERVATION, **DOUBLE), torch.randn(2, 2, 4, **DOUBLE)
    padding = torch.tensor([[False, False], [False, True]])
    return TensorDict({"observation": observation, ("vla_action", "chunk"): chunk, "pad": padding}, [2])


def test_what_is_allowed_stays_as_it_is_where_a_step_does_not_count():
    class Allowed(nn.Linear):
        def forward(self, observation, allowed):
            return super().forward(observation).masked_fill(~allowed, -torch.inf)

    net = TensorDictModule(Allowed(OBSERVATION, ACTIONS, **DOUBLE), ["observation", "allowed"], ["logits"])
    loss, data = BCLoss(ProbabilisticTensorDictSequential(net, discrete_actor()[-1])), collect(discrete_actor())
    data["allowed"] = F.one_hot(data["action"], ACTIONS).bool() | (torch.rand(*data.shape, ACTIONS) < 0.5)
    wanted = loss(data)["loss_bc"]
    data["collector", "mask"] = torch.ones(data.shape, dtype=torch.bool)
    torch.testing.assert_close(loss(data)["loss_bc"], wanted)


def test_an_action_with_a_dimension_too_many_is_refused():
    data = collect(discrete_actor(), (4,))
    data["action"] = data["action"].unsqueeze(-1)
    assert_rejected(BCLoss(discrete_actor()), data, RuntimeError, r"'action' has shape \(4, 1\).*of shape \(4,\)")


def test_a_hand_computed_cross_entropy():
    table = torch.tensor([[0.1, 0.9], [0.5, 0.5]], **DOUBLE).log()
    wanted = -torch.tensor([0.9, 0.5], **DOUBLE).log()
    for action in (torch.tensor([1, 0]), torch.tensor([[1], [0]]), torch.tensor([[0, 1], [1, 0]])):
        torch.testing.assert_close(classification_loss(table, action), wanted, **CLOSE)


@pytest.mark.parametrize("shape", [(1,), (1, 1), (4,), (2, 2), (3, 1, 1)], ids=str)
def test_actions_of_another_batch_than_the_logits_are_refused(shape):
    with pytest.raises(RuntimeError, match="one index for each sample"):
        classification_loss(torch.zeros(3, 4), torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_classes_are_the_last_dimension_whatever_the_batch(dtype):
    data, policy = demonstrations((3, 5), "categorical"), logits()
    wanted = F.cross_entropy(policy.module(data["observation"]).flatten(0, 1), data["action"].flatten())
    data["action"] = data["action"].to(dtype)
    torch.testing.assert_close(BCLoss(policy)(data)["loss_bc"], wanted, **CLOSE)
    assert BCLoss(policy, reduction="none")(data)["loss_bc"].shape == (3, 5)


def test_an_action_that_is_no_class_is_refused():
    data = demonstrations((3,), "categorical")
    data["action"] = data["action"].double()
    assert_rejected(BCLoss(logits(), loss_function="cross_entropy"), data, RuntimeError, "one index for each sample")


def test_a_categorical_policy_is_cloned_by_likelihood():
    policy, data = discrete_actor(), demonstrations((3, 5), "categorical")
    wanted = -policy.get_dist(data.clone()).log_prob(data["action"]).mean()
    torch.testing.assert_close(BCLoss(policy)(data)["loss_bc"], wanted, **CLOSE)


def test_the_heads_of_an_action_add_up():
    policy = ACTORS["nested_heads"]()
    data = collect(policy).select("observation", ("car", "gear"), ("car", "steer"))
    dist = policy.get_dist(data.clone())
    wanted = -sum(head.log_prob(data[key]).mean() for key, head in dist.dists.items())
    torch.testing.assert_close(BCLoss(policy)(data)["loss_bc"], wanted, **CLOSE)
    with pytest.raises(ValueError, match="several heads"):
        BCLoss(policy, loss_function="l1")


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_padded_actions_of_a_chunk_do_not_count_whatever_they_hold(reduction, value):
    data, policy = padded_chunks(), chunk_policy()
    chunk = ("vla_action", "chunk")
    data[chunk][1, 1] = value
    loss = BCLoss(policy, loss_function="l2", reduction=reduction)
    loss.set_keys(action=chunk, pad_mask="pad")
    error = (policy.module(data["observation"]) - data[chunk]).square()
    error[1, 1] = 0
    wanted = {"none": error, "sum": error.sum(), "mean": error.sum() / 12}[reduction]
    out = loss(data)
    torch.testing.assert_close(out["loss_bc"], wanted, **CLOSE)
    assert all(g.isfinite().all() for g in gradients(loss, out)["loss_bc"].values())


def test_a_pad_mask_and_padded_steps_both_leave_out():
    data, loss = demonstrations((4,)), BCLoss(stochastic_actor(), reduction="none")
    loss.set_keys(pad_mask="pad")
    data["pad"], data["collector", "mask"] = torch.tensor([0, 1, 0, 1]), torch.tensor([True, True, False, False])
    assert (loss(data)["loss_bc"] != 0).tolist() == [True, False, False, False]
    found = loss(observation=data["observation"], action=data["action"], pad=data["pad"])
    assert (found != 0).tolist() == [True, False, True, False]


def test_a_pad_mask_of_elements_does_not_fit_a_likelihood():
    data, loss = demonstrations((4,)), BCLoss(stochastic_actor())
    loss.set_keys(pad_mask="pad")
    data["pad"] = torch.zeros(4, 2, dtype=torch.bool)
    assert_rejected(loss, data, RuntimeError, "pad mask 'pad'")


@pytest.mark.parametrize("policy", [stochastic_actor, deterministic_actor])
def test_actions_that_would_broadcast_are_refused(policy):
    data = demonstrations()
    data["action"] = data["action"][..., :1]
    assert_rejected(BCLoss(policy()), data, RuntimeError, r"'action' has shape \(3, 5")


def test_a_distance_from_an_action_that_was_drawn_as_an_integer_is_refused():
    loss = BCLoss(discrete_actor(), loss_function="l1")
    assert_rejected(loss, demonstrations((3, 5), "categorical"), TypeError, r"writes 'action' as torch.int64")


def test_an_unknown_distance_is_refused_when_the_loss_is_made():
    with pytest.raises(ValueError, match="loss_function is 'huber'"):
        BCLoss(deterministic_actor(), loss_function="huber")


@pytest.mark.parametrize(
    ("make", "action"),
    [
        (lambda: BCLoss(logits()), "categorical"),
        (lambda: BCLoss(deterministic_actor(), loss_function="l1"), "continuous"),
    ],
    ids=["classes", "distance"],
)
def test_compiled_is_eager(make, action):
    assert_compiles(make, demonstrations(action=action))
