"""Random network distillation, and PILCO's cost."""

import math

import pytest
import torch
from fusedrl.losses.functional.exploration import distillation_error
from fusedrl.losses.functional.policy_search import saturating_cost
from fusedrl.losses.pilco import ExponentialQuadraticCost
from fusedrl.losses.rnd import RNDLoss
from helpers_imitation import beliefs, features, next_observations
from helpers_losses import DOUBLE, OBSERVATION
from helpers_q import CLOSE, assert_compiles, assert_no_host_sync, assert_rejected
from tensordict import TensorDict
from torch import nn


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# --- random network distillation ----------------------------------------------------------------------------------


class Standardize(nn.Module):
    """Stands for the running statistics of an environment's transform."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.ones(OBSERVATION, **DOUBLE))

    def normalize(self, x):
        return (x - self.mean) / 2


def test_only_the_predictor_is_trained():
    predictor, target = features(), features()
    RNDLoss(predictor, target, update_fraction=1.0)(next_observations())["loss_predictor"].backward()
    assert all(p.grad is not None for p in predictor.parameters())
    assert not any(p.requires_grad for p in target.parameters())


def test_lazy_networks_are_initialised_by_the_first_call_and_the_target_stays_frozen():
    predictor, target = (nn.LazyLinear(3, **DOUBLE) for _ in range(2))
    RNDLoss(predictor, target, update_fraction=1.0)(next_observations())["loss_predictor"].backward()
    assert predictor.weight.grad.any()
    assert not any(p.requires_grad for p in target.parameters())


def test_the_distance_to_the_target_does_not_train_the_target():
    prediction, target = (torch.randn(4, 3, requires_grad=True) for _ in range(2))
    distillation_error(prediction, target).sum().backward()
    assert prediction.grad.any()
    assert target.grad is None


def test_observations_are_standardized_and_clipped():
    predictor, target, data = features(), features(), next_observations((50,))
    x = ((data["next", "observation"] - 1) / 2).clamp(-0.3, 0.3)
    wanted = (predictor(x) - target(x)).square().mean(-1)
    loss = RNDLoss(predictor, target, obs_rms=Standardize(), obs_clip=0.3, update_fraction=1.0, reduction="none")
    torch.testing.assert_close(loss(data)["loss_predictor"], wanted, **CLOSE)
    assert "obs_rms.mean" in loss.state_dict()


def test_the_share_of_the_samples_that_count_is_drawn():
    loss = RNDLoss(features(), features(), update_fraction=0.25, reduction="none")
    counted = loss(next_observations((4000,)))["loss_predictor"] != 0
    # The standard deviation of the share is 0.007.
    assert counted.double().mean().item() == pytest.approx(0.25, abs=0.03)
    assert RNDLoss(features(), features(), update_fraction=0.0)(next_observations())["loss_predictor"] == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_observations_of_another_dtype_are_cast(dtype):
    data = TensorDict({"next": {"observation": torch.arange(8).reshape(2, 4).to(dtype)}}, [2])
    double = TensorDict({"next": {"observation": torch.arange(8).reshape(2, 4).double()}}, [2])
    loss = RNDLoss(features(), features(), update_fraction=1.0)
    assert torch.equal(loss(data)["loss_predictor"], loss(double)["loss_predictor"])


def test_features_that_would_broadcast_are_refused():
    loss = RNDLoss(nn.Linear(OBSERVATION, 1, **DOUBLE), features())
    assert_rejected(loss, next_observations(), RuntimeError, "predictor's features")


def test_a_share_that_is_none_is_refused():
    with pytest.raises(ValueError, match="update_fraction must be between 0 and 1, but is 2"):
        RNDLoss(features(), features(), update_fraction=2)


def test_random_network_distillation_of_a_share_compiles_and_waits_for_nothing(monkeypatch):
    def make():
        return RNDLoss(features(), features(), obs_rms=Standardize(), update_fraction=0.5)

    assert_compiles(make, next_observations())
    assert_no_host_sync(make(), next_observations(), monkeypatch)


# --- PILCO --------------------------------------------------------------------------------------------------------


def test_a_certain_state_has_the_cost_itself():
    """Without variance: 1 − exp(−½ (1·1² + 4·½²)) = 1 − e⁻¹."""
    mean, target = torch.tensor([[1.0, 1.0]], **DOUBLE), torch.tensor([0.0, 0.5], **DOUBLE)
    weights = torch.diag(torch.tensor([1.0, 4.0], **DOUBLE))
    cost = saturating_cost(mean, torch.zeros(1, 2, 2, **DOUBLE), target, weights)
    assert cost.item() == pytest.approx(1 - math.exp(-1), rel=1e-12)


def test_autocast_does_not_round_the_cost():
    root = torch.randn(5, 3, 3)
    mean, covariance, weights = torch.randn(5, 3), root @ root.mT, 1.7891 * torch.eye(3)
    expected = saturating_cost(mean, covariance, None, weights)
    with torch.autocast("cpu", torch.bfloat16):
        found = saturating_cost(mean, covariance, None, weights)
    assert torch.equal(found, expected)


def test_the_expectation_is_that_of_the_cost():
    data = beliefs((2,))
    mean, covariance = data["observation", "mean"], data["observation", "var"]
    target, weights = torch.tensor([1.0, 0.0, -1.0], **DOUBLE), torch.diag(torch.tensor([2.0, 0.0, 0.5], **DOUBLE))
    x = mean + torch.randn(100_000, 2, 3, **DOUBLE) @ torch.linalg.cholesky(covariance).mT[0]
    x[:, 1] = mean[1] + torch.randn(100_000, 3, **DOUBLE) @ torch.linalg.cholesky(covariance)[1].mT
    distance = x - target
    drawn = (1 - torch.exp(-0.5 * ((distance @ weights) * distance).sum(-1))).mean(0)
    # The standard deviation of the mean is below 0.5 / sqrt(100000) = 0.0016.
    torch.testing.assert_close(saturating_cost(mean, covariance, target, weights), drawn, atol=0.008, rtol=0)


def test_the_gradients_of_mean_and_covariance_are_right():
    data = beliefs((2,))
    mean, covariance = data["observation", "mean"].requires_grad_(), data["observation", "var"].requires_grad_()
    target, weights = torch.ones(3, **DOUBLE), torch.eye(3, **DOUBLE) * 0.3
    assert torch.autograd.gradcheck(saturating_cost, (mean, covariance, target, weights))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_coefficients_meet_a_belief_of_another_dtype(dtype):
    cost = ExponentialQuadraticCost(torch.ones(3, **DOUBLE), torch.eye(3, **DOUBLE))
    data = beliefs((4,))
    wanted = cost(data)["loss_cost"]
    found = cost.to(dtype)(data.to(dtype))["loss_cost"]
    assert found.dtype == dtype
    assert cost.target.dtype == torch.float64
    # What the belief itself loses in this dtype, a few roundings.
    assert found.item() == pytest.approx(wanted.item(), abs=8 * torch.finfo(dtype).eps)


def test_the_name_of_the_cost_can_be_chosen():
    cost = ExponentialQuadraticCost()
    cost.set_keys(loss_cost="distance")
    assert cost.out_keys == ["distance"]
    assert list(cost(beliefs()).keys()) == ["distance"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"target": torch.zeros(2, **DOUBLE)}, r"'target' has shape \(2,\)"),
        ({"weights": torch.eye(2, **DOUBLE)}, r"'weights' has shape \(2, 2\)"),
    ],
)
def test_coefficients_of_another_state_are_refused(options, match):
    assert_rejected(ExponentialQuadraticCost(**options), beliefs(), RuntimeError, match)


def test_variances_are_no_covariance():
    data = beliefs()
    data["observation", "var"] = torch.ones(3, 5, 3, **DOUBLE)
    assert_rejected(ExponentialQuadraticCost(), data, RuntimeError, r"'var'\) has shape \(3, 5, 3\)")


def test_shapes_that_no_state_has_are_refused_when_the_cost_is_made():
    with pytest.raises(ValueError, match=r"weights must have shape \[F, F\]"):
        ExponentialQuadraticCost(weights=torch.ones(3))


def test_the_target_of_the_cost_is_its_own():
    target = torch.zeros(2)
    cost = ExponentialQuadraticCost(target=target)
    cost.target = torch.ones(2)
    assert not target.any()
    assert cost.target.all()
