"""The discriminator's loss of GAIL, and its gradient penalty."""

import pytest
import torch
from fusedrl.losses.functional.imitation import gradient_penalty
from fusedrl.losses.gail import GAILLoss
from helpers_imitation import demonstrations_and_attempts, discriminator
from helpers_losses import DOUBLE
from helpers_q import CLOSE, assert_compiles, assert_no_host_sync, assert_padding_is_ignored, assert_rejected, gradients
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Plane(nn.Module):
    """Its slope is 5 everywhere; it records where it was asked."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(1.0, **DOUBLE))
        self.asked = []

    def forward(self, observation, action):
        self.asked.append((observation, action))
        return self.slope * (0.03 * observation + 0.04 * action) + 0.5


def plane():
    return TensorDictModule(Plane(), ["observation", "action"], ["d_logits"])


def pair(batch=(4,)):
    """An expert at (0, 0), a policy at (1, 2)."""
    zeros, ones = torch.zeros(*batch, 1, **DOUBLE), torch.ones(*batch, 1, **DOUBLE)
    data = {"observation": zeros, "action": zeros, "collector_observation": ones, "collector_action": 2 * ones}
    return TensorDict(data, batch)


def test_a_hand_computed_loss():
    wanted = -torch.tensor(0.5).log() - torch.tensor(1 - 0.61).log()
    assert GAILLoss(plane())(pair())["loss"].item() == pytest.approx(wanted.item())


def test_a_hand_computed_penalty():
    loss = GAILLoss(plane(), use_grad_penalty=True, gp_lambda=2.0)
    out = loss(pair())
    assert out["gp_loss"].item() == pytest.approx(2 * (0.05 - 1) ** 2)
    assert out["loss"].item() == pytest.approx(GAILLoss(plane())(pair())["loss"].item() + out["gp_loss"].item())
    of_penalty = out["loss"] - GAILLoss(loss.discriminator_network)(pair())["loss"]
    (slope,) = torch.autograd.grad(of_penalty, list(loss.parameters()))
    assert slope.item() == pytest.approx(2 * 2 * (0.05 - 1) * 0.05)


def test_the_penalty_is_taken_on_the_lines_between_expert_and_policy():
    network = plane()
    GAILLoss(network, use_grad_penalty=True)(pair((50,)))
    observation, action = network.module.asked[1]
    torch.testing.assert_close(action, 2 * observation)
    assert 0 <= observation.min() < 0.2
    assert 0.8 < observation.max() <= 1


def test_all_entries_count_in_one_slope():
    torch.testing.assert_close(gradient_penalty(torch.tensor([[0.6, 0.8]], **DOUBLE)), torch.zeros(1, 1, **DOUBLE))


def test_the_discriminator_is_called_once_for_both():
    network = plane()
    GAILLoss(network)(pair((3, 2)))
    assert [observation.shape for observation, _ in network.module.asked] == [(6, 2, 1)]


def test_a_certain_discriminator_has_a_finite_loss():
    network = TensorDictModule(lambda s, a: torch.zeros_like(s), ["observation", "action"], ["d_logits"])
    assert GAILLoss(network)(pair())["loss"] == 100


def test_a_penalty_per_sample_ignores_padding():
    loss = GAILLoss(plane(), use_grad_penalty=True, reduction="none")
    assert loss(pair())["loss"].shape == (4,)
    # All slopes of a plane are one, whatever is drawn.
    assert_padding_is_ignored(GAILLoss(plane(), use_grad_penalty=True), pair(), random=True)


def test_the_penalty_works_where_no_gradient_is_wanted():
    with torch.no_grad():
        out = GAILLoss(plane(), use_grad_penalty=True)(pair())
    assert not out["loss"].requires_grad
    assert out["gp_loss"] > 0


def test_entries_of_other_names_are_found():
    first = TensorDictModule(lambda s, a: torch.cat([s, a], -1), ["seen", "done"], ["both"])
    network = TensorDictSequential(
        first, TensorDictModule(nn.Sequential(nn.Linear(2, 1, **DOUBLE), nn.Sigmoid()), ["both"], ["d_logits"])
    )
    data = pair()
    assert_rejected(GAILLoss(network), data, KeyError, "seen.*set_keys")
    loss = GAILLoss(network)
    loss.set_keys(expert_observation="seen", expert_action="done")
    data["seen"], data["done"] = data.pop("observation"), data.pop("action")
    assert loss(data)["loss"].isfinite()


def test_shapes_that_would_broadcast_are_refused():
    data = pair()
    data["collector_action"] = data["collector_action"].expand(4, 3)
    assert_rejected(GAILLoss(plane()), data, RuntimeError, "'collector_action'.*'action'")


def test_a_penalty_of_integers_is_refused():
    data = pair()
    for key in ("action", "collector_action"):
        data[key] = data[key].long()
    assert_rejected(GAILLoss(plane(), use_grad_penalty=True), data, TypeError, "'action' holds integers")


def test_the_penalty_does_not_wait_for_the_device(monkeypatch):
    loss = GAILLoss(discriminator(), use_grad_penalty=True)
    assert_no_host_sync(loss, demonstrations_and_attempts(), monkeypatch)


def test_the_penalty_is_differentiated_twice():
    loss, data = GAILLoss(discriminator(), use_grad_penalty=True), demonstrations_and_attempts()
    torch.manual_seed(1)
    found = gradients(loss, loss(data))["loss"]
    name, parameter = next(iter(loss.named_parameters()))
    step, losses = 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            parameter.view(-1)[0] += sign * step
        torch.manual_seed(1)
        losses.append(loss(data)["loss"].item())
        with torch.no_grad():
            parameter.view(-1)[0] -= sign * step
    # Central differences: the error is of the order step² plus rounding / step.
    assert found[name].view(-1)[0].item() == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-5, abs=1e-8)


def test_the_penalty_compiles_as_one_graph():
    assert_compiles(lambda: GAILLoss(discriminator(), use_grad_penalty=True), demonstrations_and_attempts(), **CLOSE)


def test_the_penalty_of_a_discriminator_with_batch_normalisation_is_differentiated():
    class Normalised(nn.Sequential):
        def forward(self, observation, action):
            return super().forward(torch.cat([observation, action], -1))

    layers = nn.Linear(2, 3, **DOUBLE), nn.BatchNorm1d(3, **DOUBLE), nn.Linear(3, 1, **DOUBLE), nn.Sigmoid()
    network = TensorDictModule(Normalised(*layers), ["observation", "action"], ["d_logits"])
    loss = GAILLoss(network, use_grad_penalty=True)
    out = loss(pair((4,)).apply(lambda x: x + torch.randn_like(x)))
    slopes = torch.autograd.grad(out["loss"], list(loss.parameters()))
    assert all(g.isfinite().all() for g in slopes)
    assert slopes[0].any()


def test_padding_does_not_count_in_the_penalty_that_is_logged():
    data = demonstrations_and_attempts((6,))
    data["collector", "mask"] = mask = torch.tensor([True, True, False, True, False, False])
    network = discriminator()
    each, whole = (GAILLoss(network, use_grad_penalty=True, reduction=name) for name in ("none", "mean"))
    plain = GAILLoss(network, reduction="none")(data)["loss"]
    torch.manual_seed(1)
    penalty = (each(data)["loss"] - plain)[mask]
    torch.manual_seed(1)
    torch.testing.assert_close(whole(data)["gp_loss"], penalty.mean().detach(), **CLOSE)
