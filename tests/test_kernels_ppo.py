"""The fused clipped surrogate of PPO: hand-computed cases, backends against the reference, semantics, cost."""

import gc
import itertools
import math
import weakref
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from fusedrl.kernels import (
    ClipPPO,
    VerificationError,
    clip_ppo_loss,
    ppo_operators,
    ppo_problem,
    samples_launch,
    use_backend,
)
from fusedrl.kernels.backend import fastest_backend
from fusedrl.losses import functional
from fusedrl.losses.reduction import reduce_loss
from helpers_launches import launched, plan_with, planned_with
from helpers_samples import BACKENDS, LAYOUTS, Calls, close, in_float64
from hypothesis import given, settings
from hypothesis import strategies as st

INF, NAN = math.inf, math.nan
SAMPLES = ("log_prob", "old_log_prob", "advantage", "proximal_log_prob", "mask", "weights")


@pytest.fixture(params=BACKENDS)
def any_backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn, the reference included: it too must meet the hand-computed numbers."""
    return request.param


@pytest.fixture
def small_tiles(monkeypatch) -> None:
    """Tiles of 8 samples in float64, so that few samples take several programs and tiles."""
    plan_with(monkeypatch, samples_launch, TILE_BYTES=64, _TILES_OF_ONE_PROGRAM=2)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def problem(shape=(6, 5), *, full=False, dtype=torch.float64, device=None, seed=0) -> dict:
    """Log-probabilities whose ratios leave the clip range for about half of the samples; ``full`` has all options."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    log_prob = normal() - 1
    tensors = {"log_prob": log_prob, "old_log_prob": log_prob + 0.4 * normal(), "advantage": 1.5 * normal() + 0.5}
    if full:
        tensors["proximal_log_prob"] = log_prob + 0.3 * normal()
        tensors["weights"] = normal().abs() + 0.1
    tensors = {k: x.to(device, dtype) for k, x in tensors.items()}
    tensors["log_prob"].requires_grad_()
    if full:
        tensors["mask"] = (torch.rand(shape, generator=generator) < 0.7).to(device)
    return tensors | {"clip_low": 0.2, "clip_high": 0.3} | ({"max_ratio": 1.4, "normalize": True} if full else {})


def results(arguments: dict, backend: str, **change) -> list[torch.Tensor]:
    """Everything that is returned, and the gradient with respect to log_prob."""
    arguments = arguments | change
    found = clip_ppo_loss(**arguments, backend=backend)
    (gradient,) = torch.autograd.grad(found.loss.sum(), arguments["log_prob"])
    return [*(x.detach() for x in found), gradient]


# --- hand-computed ------------------------------------------------------------------------------------------------

RATIOS, ADVANTAGES = [0.5, 0.5, 1.0, 1.5, 1.5], [1.0, -1.0, 2.0, 1.0, -1.0]


def hand(backend, device, **options):
    log_prob = torch.tensor(RATIOS, dtype=torch.float64, device=device).log().requires_grad_()
    advantage = torch.tensor(ADVANTAGES, dtype=torch.float64, device=device)
    options = {"clip_low": 0.2, "clip_high": 0.3} | options
    found = clip_ppo_loss(log_prob, torch.zeros_like(log_prob), advantage, backend=backend, **options)
    (gradient,) = torch.autograd.grad(found.loss.sum(), log_prob)
    return found, gradient.tolist()


def test_hand_computed_losses_and_gradients(any_backend, device) -> None:
    """−min(½, 0.8), −min(−½, −0.8), −2, −min(1½, 1.3), −min(−1½, −1.3): the second and the fourth are clipped."""
    found, gradient = hand(any_backend, device, reduction="none")
    assert found.loss.tolist() == pytest.approx([-0.5, 0.8, -2.0, -1.3, 1.5])
    assert gradient == pytest.approx([-0.5, 0.0, -2.0, 0.0, 1.5])
    total, _ = hand(any_backend, device, reduction="sum")
    mean, gradient = hand(any_backend, device)
    assert total.loss.item() == pytest.approx(-1.5)
    assert mean.loss.item() == pytest.approx(-0.3)
    assert gradient == pytest.approx([-0.1, 0.0, -0.4, 0.0, 0.3])


def test_hand_computed_metrics(any_backend, device) -> None:
    found, _ = hand(any_backend, device)
    assert found.kl_approx.item() == pytest.approx(-(2 * math.log(0.5) + 2 * math.log(1.5)) / 5)
    assert found.clip_fraction.item() == pytest.approx(4 / 5)
    assert found.ess.item() == pytest.approx(5**2 / (5 * (2 * 0.25 + 1 + 2 * 2.25)))
    assert found.max_ratio.item() == pytest.approx(1.5)
    assert found.mean_ratio.item() == pytest.approx(1.0)


def test_a_ratio_on_a_bound_is_not_outside(any_backend, device) -> None:
    log_prob, advantage = torch.zeros(3, device=device), torch.tensor([-1.0, 0.0, 1.0], device=device)
    assert clip_ppo_loss(log_prob, log_prob, advantage, 0.0, 0.0, backend=any_backend).clip_fraction == 0


def test_an_action_that_was_impossible_has_an_infinite_ratio(any_backend, device) -> None:
    log_prob, old = torch.zeros(3, device=device), torch.tensor([0.0, -INF, 1.0], device=device)
    found = clip_ppo_loss(log_prob, old, torch.ones(3, device=device), 0.2, 0.2, backend=any_backend)
    assert (found.max_ratio, found.mean_ratio) == (INF, INF)


def test_hand_computed_normalisation(any_backend, device) -> None:
    """Mean 0.4 and squared deviations (0.36, 1.96, 2.56, 0.36, 1.96), of which 7.2 / 4 is the unbiased variance."""
    found, _ = hand(any_backend, device, reduction="none", normalize=True)
    expected = [-0.5 * 0.6, 0.8 * 1.4, -1.6, -1.3 * 0.6, 1.5 * 1.4]
    assert found.loss.tolist() == pytest.approx([x / math.sqrt(1.8) for x in expected])


def test_hand_computed_cap(any_backend, device) -> None:
    """r is capped to 1.2, p isn't: clip(1.5) · 1.2/1.5 = 1.04 is the lesser gain, the greater loss is 1.2 · 1."""
    found, gradient = hand(any_backend, device, reduction="none", max_ratio=1.2)
    assert found.loss.tolist() == pytest.approx([-0.5, 0.8, -2.0, -1.04, 1.2])
    assert gradient == pytest.approx([-0.5, 0.0, -2.0, 0.0, 1.2])
    assert found.max_ratio.item() == pytest.approx(1.2)
    assert found.mean_ratio.item() == pytest.approx(4.4 / 5)
    assert found.clip_fraction.item() == pytest.approx(4 / 5)


def test_hand_computed_proximal_policy(any_backend, device) -> None:
    """π_prox = ½ π_old: p = 2r = (1, 1, 2, 3, 3), so that clip(p)·r/p is (½, ½, 0.65, 0.65, 0.65)."""
    proximal = torch.full((5,), math.log(0.5), dtype=torch.float64, device=device)
    found, gradient = hand(any_backend, device, reduction="none", proximal_log_prob=proximal)
    assert found.loss.tolist() == pytest.approx([-0.5, 0.5, -1.3, -0.65, 1.5])
    assert gradient == pytest.approx([-0.5, 0.5, 0.0, 0.0, 1.5])
    assert found.clip_fraction.item() == pytest.approx(3 / 5)
    assert found.kl_approx.item() == pytest.approx(-sum(math.log(2 * r) for r in RATIOS) / 5)


def test_hand_computed_mask_and_weights(any_backend, device) -> None:
    mask = torch.tensor([True, True, False, True, False], device=device)
    weights = torch.tensor([1.0, 3.0, 5.0, 0.0, 5.0], dtype=torch.float64, device=device)
    found, gradient = hand(any_backend, device, mask=mask, weights=weights)
    assert found.loss.item() == pytest.approx((-0.5 + 3 * 0.8) / 4)
    assert gradient == pytest.approx([-0.5 / 4, 0.0, 0.0, 0.0, 0.0])
    assert found.clip_fraction.item() == pytest.approx(1.0)
    assert found.mean_ratio.item() == pytest.approx(2.5 / 3)


# --- against the reference, and the reference against what it replaces ----------------------------------------------


@pytest.mark.parametrize(("masked", "weighted"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("proximal", [False, True])
@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_reference_is_the_composition_of_the_functionals(masked, weighted, proximal, capped, reduction) -> None:
    arguments = problem((30, 1), full=True) | {"reduction": reduction}
    for name, there in (("mask", masked), ("weights", weighted), ("proximal_log_prob", proximal)):
        arguments |= {} if there else {name: None}
    arguments |= {"max_ratio": 1.4 if capped else None}
    log_prob, old, advantage, mask = (arguments[k] for k in ("log_prob", "old_log_prob", "advantage", "mask"))
    log_weight = log_prob - old
    if mask is not None:
        log_weight = torch.where(mask, log_weight, 0)
    center = log_weight
    if proximal:
        center = log_prob - arguments["proximal_log_prob"]
        center = center if mask is None else torch.where(mask, center, 0)
    if capped:
        log_weight = log_weight - functional.weight_excess(log_weight, torch.tensor(1.4, dtype=torch.float64))
    normalized = functional.normalize_advantage(advantage, mask=mask)
    gain = functional.clip_ppo_objective(log_weight, normalized, 0.2, 0.3, center)
    loss = reduce_loss(-gain, reduction, mask, arguments["weights"])
    logged = (
        functional.approximate_kl(center, mask),
        functional.clip_fraction(center, 0.2, 0.3, mask),
        functional.effective_sample_size(log_weight, mask).squeeze(-1),
        functional.largest_ratio(log_weight, mask),
        functional.masked_mean(log_weight.exp(), mask),
    )
    expected = [loss, *logged, *torch.autograd.grad(loss.sum(), log_prob)]
    for a, b in zip(results(arguments, "reference"), expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


@given(
    shape=st.sampled_from([(), (1,), (7,), (31,), (4, 1), (3, 5), (2, 3, 4)]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    options=st.sets(st.sampled_from(["proximal_log_prob", "mask", "weights", "max_ratio"])),
    normalize=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    scalars=st.sampled_from([None, torch.float64, torch.float32, torch.bfloat16]),
    few=st.booleans(),
    seed=st.integers(0, 100),
)
@settings(max_examples=60, deadline=None, derandomize=True)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_loss_metrics_and_gradient_agree_with_the_reference(
    backend, device, shape, dtype, options, normalize, reduction, scalars, few, seed
) -> None:
    arguments = problem(shape, full=True, dtype=dtype, device=device, seed=seed)
    arguments |= {"normalize": normalize, "reduction": reduction}
    arguments |= {k: None for k in ("proximal_log_prob", "mask", "weights", "max_ratio") if k not in options}
    for name in ("clip_low", "clip_high", "max_ratio"):
        if scalars is not None and arguments.get(name) is not None:
            arguments[name] = torch.tensor(arguments[name], dtype=scalars, device=device)
    with planned_with(samples_launch, TILE_BYTES=32, _TILES_OF_ONE_PROGRAM=1) if few else nullcontext():
        found = results(arguments, backend)
    expected = results(in_float64(arguments), "reference")
    for name, a, b in zip((*ClipPPO._fields, "gradient"), found, expected, strict=True):
        assert a.dtype == dtype
        assert a.shape == b.shape
        # A sum of 30 terms may be small by chance.
        assert close(a, b, dtype, factor=5 if name == "loss" else 1), name


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.bfloat16, torch.float32)])
def test_mixed_dtypes_promote(any_backend, device, dtypes) -> None:
    low, high = dtypes
    arguments = problem(dtype=low, device=device) | {"advantage": problem(dtype=high, device=device)["advantage"]}
    found = results(arguments, any_backend)
    expected = results(in_float64(arguments), "reference")
    assert [x.dtype for x in found] == [high] * 6 + [low]
    assert all(close(a, b, low) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mixed", [False, True], ids=["one layout", "mixed layouts"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_any_strides_give_the_same_numbers(backend, device, small_tiles, layout, mixed, reduction) -> None:
    arguments = problem((6, 5), full=True, device=device) | {"reduction": reduction}
    expected = results(arguments, backend)
    for name in SAMPLES:
        change = LAYOUTS["contiguous" if mixed and name in ("advantage", "mask") else layout]
        arguments[name] = change(arguments[name].detach())
    arguments["log_prob"].requires_grad_()
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(results(arguments, backend), expected, strict=True))


def test_an_expanded_tensor_is_read_as_it_is(backend, device) -> None:
    arguments = problem((6, 5), device=device)
    column = arguments["advantage"][:, :1].expand(6, 5)
    expected = results(arguments | {"advantage": column.contiguous()}, backend)
    found = results(arguments | {"advantage": column}, backend)
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(found, expected, strict=True))


def test_results_are_bitwise_reproducible(backend, device, small_tiles) -> None:
    arguments = problem((20, 7), full=True, dtype=torch.float32, device=device)
    first, second = results(arguments, backend), results(arguments, backend)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- the kernel's programs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("samples", [1, 8, 9, 16, 17, 33, 200])
def test_one_program_and_many_give_the_same_numbers(monkeypatch, device, small_tiles, samples, full) -> None:
    """One tile and one program, two tiles of one program, several programs, whose last has nothing in some tiles."""
    grids = launched(monkeypatch)
    arguments = problem((samples,), full=full, device=device)
    found = results(arguments, "triton")
    assert (grids[0][1] > 1) == (samples > 16)
    assert all(close(a, b, torch.float64) for a, b in zip(found, results(arguments, "reference"), strict=True))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("samples", [10, 300])
def test_there_are_at_most_two_launches(monkeypatch, device, small_tiles, samples, full) -> None:
    """Two only where the advantages' statistics take several programs; backward is a product."""
    grids = launched(monkeypatch)
    results(problem((samples,), full=full, device=device), "triton")
    assert len(grids) == (2 if full and samples == 300 else 1)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("full", [False, True])
def test_everything_is_written(monkeypatch, backend, device, small_tiles, reduction, full) -> None:
    """Buffers come filled with NaN."""

    def poisoned(allocate):
        def run(*args, **kwargs):
            x = allocate(*args, **kwargs)
            return x.fill_(NAN) if x.is_floating_point() else x

        return run

    for owner, name in ((torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    arguments = problem((9, 5), full=full, device=device) | {"reduction": reduction}
    assert all(x.isfinite().all() for x in results(arguments, backend))


def test_offsets_beyond_32_bits_are_computed_in_64() -> None:
    def index(samples: int, stride: int) -> str:
        x = torch.empty(0, device="meta").as_strided((samples,), (stride,))
        return str(samples_launch.index_type([x, None], samples_launch.division(samples, 512, 132)))

    assert index(1 << 20, 1) == "int32"
    assert index(1 << 31, 1) == "int64"
    assert index(1 << 20, 1 << 11) == "int64"


@pytest.mark.parametrize("processors", [1, 4, 132])
@pytest.mark.parametrize("samples", [1, 512, 513, 2048, 2049, 10**6, 10**9])
def test_every_sample_has_one_program(samples, processors) -> None:
    parts = samples_launch.division(samples, 512, processors)
    assert (parts.programs - 1) * parts.tiles * 512 < samples <= parts.programs * parts.tiles * 512
    assert parts.programs <= parts.power <= 1024


# --- semantics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_what_does_not_count_is_not_read(any_backend, device, small_tiles, poison, reduction) -> None:
    """The results are those of the samples that count alone."""
    arguments = problem((8, 5), full=True, device=device) | {"reduction": reduction}
    mask = arguments["mask"]
    alone = {k: x[mask] if k in SAMPLES else x for k, x in arguments.items()} | {"mask": None}
    expected = results(alone, any_backend)
    for name in SAMPLES:
        if name != "mask":
            arguments[name] = torch.where(mask, arguments[name].detach(), poison)
    arguments["log_prob"].requires_grad_()
    found = results(arguments, any_backend)
    for i in (0, -1) if reduction == "none" else (-1,):
        assert (found[i][~mask] == 0).all()
        found[i] = found[i][mask]
    assert all(close(a, b, torch.float64) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("shape", [(0,), (3, 0)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_an_empty_batch_gives_zeros(any_backend, device, shape, full, reduction) -> None:
    found = results(problem(shape, full=full, device=device) | {"reduction": reduction}, any_backend)
    assert found[0].shape == (shape if reduction == "none" else ())
    assert all((x == 0).all() for x in found)
    assert found[-1].shape == shape


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_where_no_sample_counts_all_is_zero(any_backend, device, small_tiles, reduction) -> None:
    arguments = problem((9, 5), full=True, device=device) | {"reduction": reduction}
    arguments["mask"] = torch.zeros_like(arguments["mask"])
    assert all((x == 0).all() for x in results(arguments, any_backend))


@pytest.mark.parametrize("masked", [False, True])
def test_a_single_advantage_is_not_normalised(any_backend, device, masked) -> None:
    arguments = problem((4 if masked else 1,), device=device) | {"normalize": True}
    if masked:
        arguments["mask"] = torch.tensor([False, False, True, False], device=device)
    expected = results(arguments | {"normalize": False}, any_backend)
    assert all(torch.equal(a, b) for a, b in zip(results(arguments, any_backend), expected, strict=True))


def test_equal_advantages_normalise_to_zero(any_backend, device, small_tiles) -> None:
    arguments = problem((40,), device=device) | {"normalize": True}
    arguments["advantage"] = torch.full_like(arguments["advantage"], 3.0)
    found = results(arguments, any_backend)
    assert found[0] == 0
    assert (found[-1] == 0).all()


def test_a_far_off_mean_costs_no_precision(backend, device, small_tiles) -> None:
    """1000 ± 1 in float32: the difference of sums of squares would have 2 digits left."""
    arguments = problem((300,), dtype=torch.float32, device=device) | {"normalize": True}
    arguments["advantage"] = arguments["advantage"] + 1000
    expected = results(in_float64(arguments), "reference")
    found = results(arguments, backend)
    # The mean itself is rounded to 1000 · 2⁻²⁴.
    assert all(close(a, b, torch.float32, factor=20) for a, b in zip(found, expected, strict=True))


def test_weights_that_sum_to_zero_give_zero(any_backend, device) -> None:
    arguments = problem((6,), device=device)
    found = results(arguments | {"weights": torch.zeros_like(arguments["advantage"])}, any_backend)
    assert found[0] == 0
    assert (found[-1] == 0).all()


def test_the_metrics_know_no_weights(any_backend, device) -> None:
    arguments = problem((6, 5), device=device)
    weighted = arguments | {"weights": arguments["advantage"].abs()}
    plain, found = results(arguments, any_backend), results(weighted, any_backend)
    assert all(torch.equal(a, b) for a, b in zip(plain[1:6], found[1:6], strict=True))


def test_the_effective_sample_size_does_not_overflow(any_backend, device, small_tiles) -> None:
    """Ratios of e^1000, e^999 and e^-1000, of which the first two count."""
    log_prob = torch.tensor([1000.0, 999.0, *[-1000.0] * 30], device=device)
    zero = torch.zeros_like(log_prob)
    found = clip_ppo_loss(log_prob, zero, zero + 1, 0.2, 0.2, backend=any_backend)
    share = math.exp(-1)
    assert found.ess.item() == pytest.approx((1 + share) ** 2 / (1 + share**2) / 32, rel=1e-5)
    assert found.max_ratio == found.mean_ratio == INF
    assert found.loss.item() == pytest.approx(-2 * 1.2 / 32)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("differentiable_advantage", [False, True])
@pytest.mark.parametrize("proximal", [False, True])
def test_no_gradient_comes_from_a_clipped_ratio_that_overflows(
    any_backend, device, create_graph, differentiable_advantage, proximal
) -> None:
    """Also where the fast backends leave the gradient to the reference's composition."""
    log_prob = torch.tensor([1000.0, 0.0], device=device, requires_grad=True)
    old, advantage = torch.zeros(2, device=device), torch.ones(2, device=device)
    options = {"proximal_log_prob": old.clone()} if proximal else {}
    advantage.requires_grad_(differentiable_advantage)
    found = clip_ppo_loss(log_prob, old, advantage, 0.2, 0.2, **options, backend=any_backend)
    (gradient,) = torch.autograd.grad(found.loss, log_prob, create_graph=create_graph)
    assert gradient.tolist() == [0.0, -0.5]


@pytest.mark.parametrize("where", ["log_prob", "advantage"])
def test_a_nan_that_counts_is_not_hidden(any_backend, device, small_tiles, where) -> None:
    arguments = problem((40,), device=device)
    x = arguments[where].detach().clone()
    x[23] = NAN
    arguments[where] = x
    arguments["log_prob"].requires_grad_()
    loss, *logged, gradient = results(arguments, any_backend)
    assert loss.isnan()
    assert gradient.isnan().nonzero().tolist() == [[23]]
    assert [x.isnan().item() for x in logged] == (
        [True, False, True, True, True] if where == "log_prob" else [False] * 5
    )


def test_an_impossible_action_counts_as_a_ratio_of_zero(any_backend, device, small_tiles) -> None:
    arguments = problem((40,), device=device)
    log_prob = arguments["log_prob"].detach().clone()
    log_prob[::7] = -INF
    log_prob[:8] = -INF  # all that a program's lanes see first
    arguments["log_prob"] = log_prob.requires_grad_()
    ratio = (log_prob - arguments["old_log_prob"]).exp()
    found = clip_ppo_loss(**arguments, backend=any_backend)
    assert found.mean_ratio.item() == pytest.approx(ratio.mean().item())
    assert found.max_ratio.item() == pytest.approx(ratio.max().item())
    assert found.ess.item() == pytest.approx((ratio.sum() ** 2 / ratio.square().sum() / 40).item())
    assert found.loss.isfinite()


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize(("ratio_of_constants", "max_ratio"), [(None, 1.4), (0.5, None), (0.5, 1.4)])
def test_an_impossible_action_is_clipped_around_the_proximal_policy_too(
    any_backend, device, ratio_of_constants, max_ratio, reduction
) -> None:
    """r/p is π_prox/π_old where r and p are 0: a gain of min(0, 0.8 · r/p · A), of which no gradient comes."""
    log_prob = torch.tensor([-INF, -INF, -INF, 0.0], dtype=torch.float64, device=device, requires_grad=True)
    old = torch.full_like(log_prob, -0.7, requires_grad=False)
    advantage = torch.tensor([1.0, -1.0, 0.0, 0.0], dtype=torch.float64, device=device)
    proximal = None if ratio_of_constants is None else old + math.log(ratio_of_constants)
    found = clip_ppo_loss(
        log_prob, old, advantage, 0.2, 0.2,
        proximal_log_prob=proximal, max_ratio=max_ratio, reduction=reduction, backend=any_backend,
    )  # fmt: skip
    losses = [0.0, 0.8 * (ratio_of_constants or 1), 0.0, 0.0]
    expected = losses if reduction == "none" else sum(losses)
    assert found.loss.tolist() == pytest.approx(expected)
    (gradient,) = torch.autograd.grad(found.loss.sum(), log_prob)
    assert gradient.tolist() == [0.0] * 4


def test_inputs_are_not_written(any_backend, device) -> None:
    arguments = problem(full=True, device=device)
    before = {k: x.detach().clone() for k, x in arguments.items() if isinstance(x, torch.Tensor)}
    results(arguments, any_backend)
    assert all(torch.equal(arguments[k].detach(), x) for k, x in before.items())


@pytest.mark.parametrize("make", [float, lambda x: torch.tensor(x, dtype=torch.float64)], ids=["number", "0-d"])
def test_the_clip_range_keeps_float64_precision(any_backend, device, make) -> None:
    """A range of 2⁻⁴⁰, which float32 knows nothing of."""
    log_prob = torch.ones(1, dtype=torch.float64, device=device)
    zero = torch.zeros_like(log_prob)
    found = clip_ppo_loss(log_prob, zero, zero + 1, make(2**-40), make(2**-40), backend=any_backend)
    assert found.loss.item() == -(1 + 2**-40)


# --- gradients ------------------------------------------------------------------------------------------------------


def loss_of(log_prob, arguments, backend, **change):
    return clip_ppo_loss(**arguments | {"log_prob": log_prob} | change, backend=backend).loss


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(any_backend, device, small_tiles, full, reduction) -> None:
    """Without a cap on the ratio, which is a constant to the gradient, but not to finite differences."""
    arguments = problem((12, 2), full=full, device=device) | {"reduction": reduction, "max_ratio": None}
    assert torch.autograd.gradcheck(lambda x: loss_of(x, arguments, any_backend), arguments["log_prob"], fast_mode=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("full", [False, True])
def test_gradgradcheck(any_backend, device, full, reduction) -> None:
    arguments = problem((4, 2), full=full, device=device) | {"reduction": reduction, "max_ratio": None}
    assert torch.autograd.gradgradcheck(
        lambda x: loss_of(x, arguments, any_backend), arguments["log_prob"], fast_mode=True
    )


@pytest.mark.parametrize("full", [False, True])
def test_gradients_made_to_be_differentiated_are_the_same_gradients(any_backend, device, full) -> None:
    """gradgradcheck compares these with themselves; here they meet the backends', the cap included."""
    arguments = problem(full=full, device=device)
    loss = loss_of(arguments["log_prob"], arguments, any_backend).square()
    plain, again = (
        torch.autograd.grad(loss, arguments["log_prob"], retain_graph=True, create_graph=create)[0]
        for create in (False, True)
    )
    assert torch.allclose(plain, again, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["old_log_prob", "advantage", "weights", "clip_low", "clip_high"])
def test_whatever_requires_grad_gets_one(any_backend, device, name) -> None:
    arguments = problem((12,), full=name != "old_log_prob", device=device) | {"max_ratio": None}
    if name.startswith("clip"):
        arguments["proximal_log_prob"] = None
        arguments[name] = torch.tensor(arguments[name], dtype=torch.float64, device=device)
    x = arguments[name].requires_grad_()
    arguments["log_prob"] = arguments["log_prob"].detach()
    assert torch.autograd.gradcheck(
        lambda x: clip_ppo_loss(**arguments | {name: x}, backend=any_backend).loss, x, fast_mode=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_of_the_old_policy_is_not_decided_by_rounding(any_backend, device, dtype) -> None:
    """−∂L/∂log π where π_prox, a constant, lies within the range everywhere."""
    log_prob, old, prox = (0.05 * torch.randn(3, 64, dtype=dtype, device=device)).unbind()
    leaves = [x.requires_grad_() for x in (log_prob, old, prox)]
    loss = clip_ppo_loss(
        log_prob, old, torch.ones_like(old), 0.9, 0.9, proximal_log_prob=prox, reduction="sum", backend=any_backend
    ).loss
    of_policy, of_old, of_prox = torch.autograd.grad(loss, leaves, materialize_grads=True)
    torch.testing.assert_close(of_old, -of_policy)
    assert not of_prox.any()


def test_what_is_logged_holds_no_gradient(any_backend, device) -> None:
    arguments = problem(full=True, device=device)
    for advantage in (arguments["advantage"], arguments["advantage"].clone().requires_grad_()):
        loss, *logged = clip_ppo_loss(**arguments | {"advantage": advantage}, backend=any_backend)
        assert loss.requires_grad
        assert not any(x.requires_grad for x in logged)


def test_without_gradients_there_is_no_slope(monkeypatch, device) -> None:
    kept = []
    module = ppo_operators.backend_module("triton")
    original = module.forward
    monkeypatch.setattr(module, "forward", lambda *a: kept.append(a[-1]) or original(*a))
    arguments = problem(device=device)
    clip_ppo_loss(**arguments, backend="triton")
    with torch.no_grad():
        clip_ppo_loss(**arguments, backend="triton")
    clip_ppo_loss(**arguments | {"log_prob": arguments["log_prob"].detach()}, backend="triton")
    assert kept == [True, False, False]


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_constants_changed_before_backward_change_nothing(backend, device, create_graph) -> None:
    """A clip range is scheduled in place, and a batch may be overwritten by the next one."""
    arguments = problem(full=True, device=device)
    for name in ("clip_low", "clip_high", "max_ratio"):
        arguments[name] = torch.tensor(arguments[name], dtype=torch.float64, device=device)
    expected = results(arguments, backend)[-1]
    loss = clip_ppo_loss(**arguments, backend=backend).loss
    for name, x in arguments.items():
        if isinstance(x, torch.Tensor) and name not in ("log_prob", "mask"):
            x.mul_(0.5)
    (gradient,) = torch.autograd.grad(loss, arguments["log_prob"], create_graph=create_graph)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_loss_that_is_kept_keeps_no_batch(backend, device) -> None:
    arguments = problem(full=True, device=device)
    batch = [weakref.ref(x) for name, x in arguments.items() if name in SAMPLES and name != "log_prob"]
    loss = clip_ppo_loss(**arguments, backend=backend).loss
    loss.backward()
    del arguments
    gc.collect()
    assert loss.requires_grad
    assert [x() for x in batch] == [None] * 5


@pytest.mark.parametrize("value", [-INF, NAN])
def test_a_gradient_to_be_differentiated_passes_over_impossible_actions_and_padding(any_backend, device, value) -> None:
    arguments = problem((8,), device=device)
    with torch.no_grad():
        arguments["log_prob"][3] = value
    arguments["mask"] = torch.arange(8, device=device) != 3 if math.isnan(value) else None
    x, direction = arguments["log_prob"], torch.linspace(-1, 1, 8, dtype=torch.float64, device=device)
    found = []
    for backend in (any_backend, "reference"):
        (gradient,) = torch.autograd.grad(loss_of(x, arguments, backend), x, create_graph=True)
        found.append((gradient.detach(), *torch.autograd.grad(gradient @ direction, x)))
    for a, b in zip(*found, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_transforms_of_functions_work(any_backend, device) -> None:
    """In reverse and in forward mode."""
    arguments = problem((9,), full=True, device=device)
    log_prob = arguments["log_prob"].detach()
    expected = results(arguments, "reference")[-1]
    found = torch.func.grad(lambda x: loss_of(x, arguments, any_backend))(log_prob)
    assert torch.allclose(found, expected, rtol=1e-12)
    direction = torch.linspace(-1, 1, 9, dtype=torch.float64, device=device)
    _, tangent = torch.func.jvp(lambda x: loss_of(x, arguments, any_backend), (log_prob,), (direction,))
    assert torch.allclose(tangent, expected @ direction, rtol=1e-12)


# --- compiled -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_equals_eager_and_a_new_clip_range_compiles_nothing(any_backend, device, full, reduction) -> None:
    arguments = problem((6, 5), full=full, device=device) | {"reduction": reduction}
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def scaled(log_prob, low, arguments):
        found = clip_ppo_loss(**arguments | {"log_prob": log_prob.sin(), "clip_low": low}, backend=any_backend)
        return found.loss.square().sum(), found.ess

    compiled = torch.compile(scaled, fullgraph=True, backend=graphs)
    counts = []
    for low in (0.2, 0.1):
        both = []
        for function in (scaled, compiled):
            loss, ess = function(
                arguments["log_prob"], torch.tensor(low, dtype=torch.float64, device=device), arguments
            )
            both.append((loss, ess, *torch.autograd.grad(loss, arguments["log_prob"])))
        assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(*both, strict=True))
        counts.append(graphs.frame_count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("full", [False, True])
def test_new_numbers_compile_once_more_at_most(any_backend, device, full) -> None:
    arguments = problem(full=full, device=device)
    names = ("clip_low", "clip_high", *(("max_ratio",) if full else ()))
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss(log_prob, x):
        return loss_of(log_prob, arguments, any_backend, **dict.fromkeys(names, x))

    compiled = torch.compile(loss, fullgraph=True, backend=graphs)
    for x in (0.2, 0.3, 0.1, 0.25):
        found, expected = (
            torch.autograd.grad(f(arguments["log_prob"], x), arguments["log_prob"]) for f in (compiled, loss)
        )
        assert torch.allclose(found[0], expected[0], rtol=1e-12, atol=1e-14)
    assert graphs.frame_count <= 2


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_inductor_gives_the_same_numbers(device, layout) -> None:
    arguments = problem((4, 3), full=True, device=device) | {"reduction": "none"}
    log_prob = LAYOUTS[layout](arguments["log_prob"].detach()).requires_grad_()

    def scaled(log_prob):
        return (3 * loss_of(log_prob * 2, arguments, "torch")).sum()

    expected = torch.autograd.grad(scaled(log_prob), log_prob)
    found = torch.autograd.grad(torch.compile(scaled, fullgraph=True)(log_prob), log_prob)
    assert torch.allclose(found[0], expected[0], rtol=1e-9, atol=1e-12)


def test_to_the_compiler_a_call_of_the_kernel_is_one_operator(device) -> None:
    calls = []

    def count(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        calls.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return graph

    arguments = problem(full=True, device=device)
    with use_backend("triton"), torch.no_grad():
        torch.compile(clip_ppo_loss, fullgraph=True, backend=count)(**arguments)
    (targets,) = calls
    assert sum("clip_ppo_loss" in t for t in targets) == 1
    assert not any(word in t for t in targets for word in ("exp", "clamp", "where"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_operator_keeps_its_contract(device, layout, reduction, dtype) -> None:
    """Schema, and fake results of the same dtypes, shapes and strides, as PyTorch checks them."""
    arguments = problem((4, 3), full=True, device=device, dtype=dtype)
    tensors = [LAYOUTS[layout](arguments[k].detach()) for k in SAMPLES]
    torch.library.opcheck(
        torch.ops.fusedrl.clip_ppo_loss.default,
        ("triton", True, *tensors, 0.2, None, None, torch.tensor(0.3, device=device), None, None, True, reduction),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_nothing_waits_on_the_host(backend) -> None:
    """Fake tensors have no data: reading any would raise."""
    with torch._subclasses.FakeTensorMode():
        arguments = {
            k: torch.empty_like(x) if isinstance(x, torch.Tensor) else x for k, x in problem(full=True).items()
        }
        arguments |= {"log_prob": torch.randn(6, 5).requires_grad_(), "clip_low": torch.tensor(0.2)}
        gradient = results(arguments, backend if backend == "torch" else fastest_backend(arguments["log_prob"]))[-1]
    assert gradient.shape == (6, 5)


@pytest.mark.parametrize("full", [False, True])
def test_the_torch_backend_itself_waits_on_nothing(full) -> None:
    """The operator is opaque to fake tensors, so what is inside of it meets them here."""
    from fusedrl.kernels import ppo_vectorized

    with torch._subclasses.FakeTensorMode():
        arguments = {
            k: torch.empty_like(x) if isinstance(x, torch.Tensor) else x for k, x in problem(full=full).items()
        }
        arguments |= {"clip_low": torch.tensor(0.2), "clip_high": torch.tensor(0.2)}
        arguments |= {"max_ratio": torch.tensor(2.0) if full else None}
        found = ppo_vectorized.forward(arguments["log_prob"], constants(arguments), True)
    assert found[-1].shape == (6, 5)


def constants(arguments: dict) -> ppo_problem.PPOConstants:
    defaults = dict.fromkeys(ppo_problem.PPOConstants._fields) | {"normalize": False, "reduction": "mean"}
    return ppo_problem.PPOConstants(**defaults | {k: x for k, x in arguments.items() if k != "log_prob"})


# --- cost -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [float, torch.tensor], ids=["number", "0-d"])
def test_the_torch_backend_makes_few_calls(make) -> None:
    """Of PyTorch, views included, for a normalised loss and everything that is logged."""
    arguments = problem((256, 1), dtype=torch.float32) | {"normalize": True}
    arguments |= {"clip_low": make(0.2), "clip_high": make(0.2)}
    with Calls() as calls:
        clip_ppo_loss(**arguments, backend="torch")
    assert 20 < len(calls.names) <= 30


def test_backward_of_the_kernel_is_one_product(device) -> None:
    arguments = problem((256, 1), dtype=torch.float32, device=device)
    loss = clip_ppo_loss(**arguments, backend="triton").loss
    one = torch.ones_like(loss)
    with Calls() as calls:
        torch.autograd.grad(loss, arguments["log_prob"], one)
    assert [name for name in calls.names if "detach" not in name] == ["aten.mul.Tensor"]


# --- verify ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_verify_accepts_what_is_right(device, small_tiles, dtype, full, reduction) -> None:
    arguments = problem((8, 5), full=full, dtype=dtype, device=device) | {"reduction": reduction}
    results(arguments, "verify")


def test_verify_accepts_either_side_of_a_kink(device) -> None:
    """The ratio is the end of the range but for rounding."""
    log_prob = torch.tensor([1.2, 0.8, 1.2, 0.8], device=device).log().requires_grad_()
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0], device=device)
    clip_ppo_loss(log_prob, torch.zeros_like(log_prob), advantage, 0.2, 0.2, backend="verify").loss.backward()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (0, "clipped PPO loss.* at index"),
        (1, "kl_approx"),
        (2, "clip_fraction"),
        (3, "ess"),
        (4, "max_ratio"),
        (5, "mean_ratio"),
        (6, r"slope of log_prob.* at index \(2,"),
    ],
)
def test_verify_names_what_is_wrong(monkeypatch, device, output, message) -> None:
    arguments = problem((6,), device=device) | {"reduction": "none"}
    module = ppo_operators.backend_module(fastest_backend(arguments["log_prob"]))
    right = module.forward

    def wrong(*inputs):
        found = right(*inputs)
        (found[output] if found[output].ndim == 0 else found[output][2]).add_(0.5)
        return found

    monkeypatch.setattr(module, "forward", wrong)
    with use_backend("verify"), pytest.raises(VerificationError, match=message):
        clip_ppo_loss(**arguments)


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"log_prob": [0.0]}, TypeError, r"log_prob must be a tensor, but is \[0.0\]"),
        ({"advantage": None}, TypeError, "advantage must be a tensor, but is None"),
        ({"weights": np.ones((60, 5))}, TypeError, r"weights must be a tensor, but is array.{,40}$"),
        ({"clip_low": None}, TypeError, "clip_low must be a number or a real tensor, but is None"),
        ({"max_ratio": "1"}, TypeError, "max_ratio must be a number"),
        ({"log_prob": torch.zeros(6, 5).long()}, TypeError, "log_prob has dtype torch.int64"),
        ({"old_log_prob": torch.zeros(6)}, RuntimeError, r"old_log_prob has shape \(6,\).*log_prob has shape \(6, 5\)"),
        ({"advantage": torch.zeros(6, 5, 1)}, RuntimeError, r"advantage has shape \(6, 5, 1\)"),
        ({"advantage": torch.zeros(6, 5, device="meta")}, RuntimeError, "advantage has .* on meta"),
        ({"advantage": torch.zeros(6, 5, dtype=torch.complex64)}, TypeError, "advantage has dtype torch.complex64"),
        ({"proximal_log_prob": torch.zeros(5)}, RuntimeError, r"proximal_log_prob has shape \(5,\)"),
        ({"weights": torch.zeros(6, 1)}, RuntimeError, r"weights has shape \(6, 1\)"),
        ({"mask": torch.ones(6, 1).bool()}, RuntimeError, r"mask has shape \(6, 1\)"),
        ({"mask": torch.ones(6, 5)}, TypeError, "mask has dtype torch.float32: torch.bool is wanted"),
        ({"clip_low": torch.zeros(1)}, RuntimeError, r"clip_low has shape \(1,\): a number or a 0-d tensor"),
        ({"clip_high": torch.zeros(1)}, RuntimeError, "clip_high has shape"),
        ({"clip_low": -0.2}, ValueError, "clip_low is -0.2, but must not be negative"),
        ({"clip_high": NAN}, ValueError, "clip_high is nan, but must not be negative"),
        ({"max_ratio": torch.zeros(1)}, RuntimeError, "max_ratio has shape"),
        ({"reduction": "avg"}, ValueError, "reduction is 'avg'; it can be 'none', 'mean', 'sum'"),
        ({"backend": "cuda"}, ValueError, "backend is 'cuda'"),
    ],
)
def test_a_bad_argument_is_named_before_anything_runs(monkeypatch, change, error, message) -> None:
    monkeypatch.setattr(ppo_operators, "backend_module", None)
    with pytest.raises(error, match=message):
        clip_ppo_loss(**problem() | change)


def test_a_cap_that_is_not_positive_is_refused() -> None:
    x = torch.zeros(3)
    for cap in (0, -1.0):
        with pytest.raises(ValueError, match=f"max_ratio is {cap}"):
            clip_ppo_loss(x, x, x, 0.2, 0.2, max_ratio=cap)
