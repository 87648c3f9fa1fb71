"""The pure mathematics of the PPO family against numbers worked out by hand, and against finite differences."""

import math
import os

import pytest
import torch
import torch.multiprocessing as mp
from fusedrl.losses import functional as F
from torch import distributed as dist
from torch import tensor
from torch._dynamo.testing import CompileCounterWithBackend

# A handful of float32 operations, each within an ulp of numbers of order one.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def log(*ratios):
    return tensor(ratios).log()


def test_ppo_objective_is_ratio_times_advantage():
    torch.testing.assert_close(F.ppo_objective(log(0.5, 2.0), tensor([4.0, -3.0])), tensor([2.0, -6.0]), **CLOSE)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.1, 2.0, 2.2),  # inside the range
        (1.5, 2.0, 2.6),  # above, gain bounded at 1 + 0.3
        (1.5, -2.0, -3.0),  # above, loss unbounded
        (0.5, 2.0, 1.0),  # below, loss unbounded
        (0.5, -2.0, -1.8),  # below, gain bounded at 1 − 0.1
    ],
)
def test_clip_objective_bounds_only_the_gain(ratio, advantage, expected):
    value = F.clip_ppo_objective(log(ratio), tensor([advantage]), 0.1, 0.3)
    torch.testing.assert_close(value, tensor([expected]), **CLOSE)


def test_clip_objective_has_no_gradient_where_the_gain_is_bounded():
    log_weight = log(1.5, 1.5, 0.5, 0.5, 1.0).requires_grad_()
    advantage = tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    F.clip_ppo_objective(log_weight, advantage, 0.2, 0.2).sum().backward()
    torch.testing.assert_close(log_weight.grad, tensor([0.0, -1.5, 0.5, 0.0, 1.0]), **CLOSE)
    log_weight.grad = None
    F.clip_ppo_objective(log_weight, advantage, 0.2, 0.2, log_weight.detach()).sum().backward()
    torch.testing.assert_close(log_weight.grad, tensor([0.0, -1.5, 0.5, 0.0, 1.0]), **CLOSE)


@pytest.mark.parametrize("proximal", [False, True])
def test_clip_objective_has_no_gradient_from_a_clipped_ratio_that_overflows(proximal):
    log_weight = tensor([100.0, 0.1], requires_grad=True)
    proximal_log_weight = log_weight * 1 if proximal else None
    found = F.clip_ppo_objective(log_weight, torch.ones(2), 0.2, 0.2, proximal_log_weight)
    torch.testing.assert_close(found, tensor([1.2, math.exp(0.1)]), **CLOSE)
    (gradient,) = torch.autograd.grad(found.sum(), log_weight)
    torch.testing.assert_close(gradient, tensor([0.0, math.exp(0.1)]), **CLOSE)


@pytest.mark.parametrize("number", [float, tensor])
@pytest.mark.parametrize("proximal", [False, True])
def test_a_ratio_on_the_bound_has_its_gradient(number, proximal):
    """Also where `torch.clamp` has none there, as in PyTorch 2.14."""
    log_weight = torch.zeros(2, requires_grad=True)
    proximal_log_weight = log_weight * 1 if proximal else None
    found = F.clip_ppo_objective(log_weight, tensor([2.0, -3.0]), number(0.0), number(0.0), proximal_log_weight)
    assert torch.autograd.grad(found.sum(), log_weight)[0].tolist() == [2.0, -3.0]


def test_clip_range_is_centred_on_the_proximal_policy():
    # π_θ/π_old = 3, π_θ/π_prox = 1.5: clipped to 1.2 · π_prox/π_old = 1.2 · 2
    value = F.clip_ppo_objective(log(3.0), tensor([1.0]), 0.2, 0.2, proximal_log_weight=log(1.5))
    torch.testing.assert_close(value, tensor([2.4]), **CLOSE)


def test_clip_objective_around_the_old_policy_is_the_plain_one():
    log_weight, advantage = torch.randn(50), torch.randn(50)
    torch.testing.assert_close(
        F.clip_ppo_objective(log_weight, advantage, 0.2, 0.3, proximal_log_weight=log_weight),
        F.clip_ppo_objective(log_weight, advantage, 0.2, 0.3),
        **CLOSE,
    )


def test_kl_penalty_is_subtracted():
    value = F.kl_penalty_objective(log(2.0), tensor([3.0]), tensor([0.5]), tensor(4.0))
    torch.testing.assert_close(value, tensor([4.0]), **CLOSE)


@pytest.mark.parametrize(("kl", "beta"), [(0.016, 3.0), (0.0149, 1.0), (0.01, 1.0), (0.0067, 1.0), (0.006, 0.25)])
def test_beta_changes_only_outside_a_factor_of_one_and_a_half(kl, beta):
    assert F.adapted_beta(tensor(1.0), tensor(kl), 0.01, 3.0, 0.25).item() == beta


def test_weight_excess_caps_the_ratio_and_keeps_the_gradient():
    log_weight = log(0.5, 8.0).requires_grad_()
    capped = log_weight - F.weight_excess(log_weight, 2.0)
    torch.testing.assert_close(capped.exp(), tensor([0.5, 2.0]), **CLOSE)
    capped.sum().backward()
    assert log_weight.grad.tolist() == [1.0, 1.0]


# --- normalize_advantage ----------------------------------------------------------------------------------------


def test_normalized_advantage_has_mean_zero_and_unbiased_std_one():
    normal = F.normalize_advantage(5 + 3 * torch.randn(7, 4, 1))
    assert abs(normal.mean()) < 1e-6
    assert abs(normal.std() - 1) < 1e-6


@pytest.mark.parametrize("exclude", [(1,), (-2,)])
def test_excluded_dimension_has_statistics_of_its_own(exclude):
    advantage = torch.randn(7, 3, 1) * tensor([1.0, 10.0, 100.0]).view(3, 1)
    normal = F.normalize_advantage(advantage, exclude)
    torch.testing.assert_close(normal.mean((0, 2)), torch.zeros(3), **CLOSE)
    torch.testing.assert_close(normal.std((0, 2)), torch.ones(3), **CLOSE)


def test_masked_steps_do_not_count_in_the_statistics_and_come_out_zero():
    advantage = tensor([1.0, math.nan, 2.0, 3.0, math.inf])
    mask = tensor([True, False, True, True, False])
    assert F.normalize_advantage(advantage, mask=mask).tolist() == [-1.0, 0.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("advantage", "exclude"),
    [(tensor([[3.0]]), ()), (tensor([[3.0], [4.0]]), (0,)), (tensor([[3.0], [4.0]]), (0, 1))],
)
def test_advantage_without_spread_to_measure_is_left_alone(advantage, exclude):
    torch.testing.assert_close(F.normalize_advantage(advantage, exclude), advantage)


def test_constant_advantage_normalizes_to_zero_with_finite_gradient():
    advantage = torch.full((5, 1), 3.0, requires_grad=True)
    normal = F.normalize_advantage(advantage)
    normal.square().sum().backward()
    assert normal.abs().max() == 0
    assert advantage.grad.isfinite().all()


def test_half_precision_advantages_are_measured_in_float32():
    advantage = torch.randn(4096, 1).to(torch.float16) * 100  # the sum of squares overflows float16
    normal = F.normalize_advantage(advantage)
    assert normal.dtype == torch.float16
    # float16 keeps 11 bits
    torch.testing.assert_close(normal.float(), F.normalize_advantage(advantage.float()), rtol=1e-3, atol=1e-3)


def test_gradient_through_the_statistics():
    advantage = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(6, 2) > 0.2
    assert torch.autograd.gradcheck(lambda x: F.normalize_advantage(x, (1,), mask), advantage)


def test_excluding_a_dimension_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match=r"normalize_advantage_exclude_dims is \(5,\).*3 dimensions"):
        F.normalize_advantage(torch.zeros(6, 2, 1), (5,))


def _normalize_on_rank(rank, store, queue):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    advantage = torch.arange(6.0).split([4, 2])[rank].unsqueeze(-1)
    mask = advantage != 5
    queue.put((rank, F.normalize_advantage(advantage, mask=mask, group=dist.group.WORLD).flatten().tolist()))
    dist.destroy_process_group()


def test_statistics_over_all_ranks_are_those_of_the_joint_batch(tmp_path):
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    mp.spawn(_normalize_on_rank, (str(tmp_path / "store"), queue), nprocs=2)
    halves = dict([queue.get(), queue.get()])
    joint = torch.arange(6.0)
    expected = F.normalize_advantage(joint, mask=joint != 5)
    torch.testing.assert_close(tensor(halves[0] + halves[1]), expected, **CLOSE)


# --- what is logged ---------------------------------------------------------------------------------------------

MASK = tensor([True, True, False])


def test_approximate_kl_is_the_mean_of_minus_the_log_ratio():
    assert F.approximate_kl(tensor([1.0, 2.0, 9.0])).item() == -4.0
    assert F.approximate_kl(tensor([1.0, 2.0, 9.0]), MASK).item() == -1.5


def test_clip_fraction_counts_both_sides():
    ratio = log(0.85, 1.0, 1.25, 1.5)
    assert F.clip_fraction(ratio, 0.1, 0.3).item() == 0.5
    assert F.clip_fraction(ratio, 0.1, 0.3, tensor([True, True, True, False])).item() == pytest.approx(1 / 3)


def test_a_ratio_on_the_bound_is_not_clipped():
    assert F.clip_fraction(torch.zeros(2), 0.0, 0.0) == 0


def test_effective_sample_size_by_hand():
    # (1 + 3)² / (1 + 9) / 2, and at any scale
    for shift in (0.0, 300.0, -300.0):
        # float32 keeps 5 decimals of a logarithm near 300
        assert F.effective_sample_size(log(1.0, 3.0) + shift).item() == pytest.approx(0.8, rel=1e-4)
    assert F.effective_sample_size(log(1.0, 3.0, 9.0), MASK).item() == pytest.approx(0.8)


def test_metrics_along_the_first_dimension_are_those_of_each_column():
    log_weight = torch.randn(5, 3) + tensor([0.0, 300.0, -300.0])
    value, target = torch.randn(2, 5, 3)
    for metric in (F.effective_sample_size(log_weight), F.explained_variance(value, target)):
        assert metric.shape == (3,)
    for i in range(3):
        alone = F.effective_sample_size(log_weight[:, i])
        torch.testing.assert_close(F.effective_sample_size(log_weight)[i], alone, **CLOSE)
        alone = F.explained_variance(value[:, i], target[:, i])
        torch.testing.assert_close(F.explained_variance(value, target)[i], alone, **CLOSE)


def test_explained_variance_by_hand():
    target = tensor([0.0, 2.0, 50.0])
    assert F.explained_variance(target, target).item() == 1
    assert F.explained_variance(tensor([0.0, 0.0, 9.0]), target, MASK).item() == 0
    assert F.explained_variance(tensor([0.0, 1.0, 9.0]), target, MASK).item() == 0.75


def test_metrics_of_an_empty_selection_are_finite():
    nothing, x = torch.zeros(3, dtype=torch.bool), torch.randn(3)
    metrics = (
        F.approximate_kl(x, nothing),
        F.clip_fraction(x, 0.2, 0.2, nothing),
        F.effective_sample_size(x, nothing),
        F.explained_variance(x, x, nothing),
        F.effective_sample_size(x[:0]),
    )
    assert all(metric.isfinite().all() for metric in metrics)


def test_masked_mean_of_a_large_float16_batch_does_not_overflow():
    ones = torch.ones(100_000, 1, dtype=torch.float16)
    mean = F.masked_mean(ones, ones == 1)
    assert mean.dtype == torch.float16
    assert mean == 1
    assert F.masked_mean(ones, ones == 1, dim=0) == 1


def test_largest_ratio_of_no_samples_is_zero():
    assert F.largest_ratio(torch.zeros(3, 0, 1)) == 0


def test_the_largest_ratio_is_of_a_sample_that_counts():
    assert F.largest_ratio(log(1.0, 2.0, 9.0)).item() == pytest.approx(9.0)
    assert F.largest_ratio(log(1.0, 2.0, 9.0), MASK).item() == pytest.approx(2.0)
    assert F.largest_ratio(log(1.0, 2.0, 9.0), MASK & False) == 0


def test_targets_of_integers_explain_a_variance():
    target, value = torch.tensor([0, 4, 2]), torch.tensor([0.0, 4.0, 2.0])
    assert F.explained_variance(value, target) == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda log_weight, x: F.weight_excess(log_weight, x),
        lambda log_weight, x: F.clip_ppo_objective(log_weight, torch.ones(4), x, 2 * x),
        lambda log_weight, x: F.clip_ppo_objective(log_weight, torch.ones(4), 1, x),
    ],
    ids=["cap", "range", "lower bound that is an int"],
)
def test_new_numbers_compile_once_more_at_most(function):
    log_weight = torch.linspace(-1, 1, 4)
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=graphs)
    for x in (0.2, 0.3, 0.1, 0.25):
        torch.testing.assert_close(compiled(log_weight, x), function(log_weight, x))
    assert graphs.frame_count <= 2
