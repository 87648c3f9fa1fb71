"""The fused critic's loss: hand-computed cases, backends against the reference, semantics, gradients, cost."""

import gc
import itertools
import math
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch._dynamo.testing
from fusedrl.kernels import (
    VerificationError,
    samples_launch,
    use_backend,
    value_loss,
    value_loss_operators,
    value_loss_problem,
)
from fusedrl.kernels.backend import fastest_backend
from fusedrl.losses import functional
from fusedrl.losses.reduction import reduce_loss
from fusedrl.losses.utils import distance_loss
from helpers_launches import launched, plan_with, planned_with
from helpers_samples import BACKENDS, LAYOUTS, Calls, close, in_float64
from hypothesis import given, settings
from hypothesis import strategies as st

INF, NAN = math.inf, math.nan
SAMPLES = ("value", "value_target", "old_value", "mask", "weights")
KINDS = ("l1", "l2", "smooth_l1")


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


def problem(shape=(6, 5), *, kind="smooth_l1", full=False, dtype=torch.float64, device=None, seed=0) -> dict:
    """Values off by about one, whose step leaves the clip range for about half; ``full`` has all options."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    value = 2 * normal()
    tensors = {"value": value, "value_target": value + normal()}
    if full:
        tensors |= {"old_value": value + 0.3 * normal(), "weights": normal().abs() + 0.1}
    tensors = {k: x.to(device, dtype) for k, x in tensors.items()}
    tensors["value"].requires_grad_()
    if full:
        tensors |= {"mask": (torch.rand(shape, generator=generator) < 0.7).to(device), "clip": 0.2, "coefficient": 0.5}
    return tensors | {"loss_function": kind, "explained_variance": True}


def results(arguments: dict, backend: str) -> list[torch.Tensor]:
    """Everything that is returned, and the gradient with respect to the value."""
    found = value_loss(**arguments, backend=backend)
    (gradient,) = torch.autograd.grad(found.loss.sum(), arguments["value"])
    return [*(x.detach() for x in found if x is not None), gradient]


# --- hand-computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "losses", "slopes"),
    [
        ("l1", [0.5, 2.0, 0.0], [-1.0, 1.0, 0.0]),
        ("l2", [0.25, 4.0, 0.0], [-1.0, 4.0, 0.0]),
        ("smooth_l1", [0.125, 1.5, 0.0], [-0.5, 1.0, 0.0]),
    ],
)
def test_hand_computed_distances(any_backend, device, kind, losses, slopes) -> None:
    value = torch.tensor([0.5, 3.0, 2.0], dtype=torch.float64, device=device, requires_grad=True)
    target = torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64, device=device)
    for reduction, divisor in (("none", 1), ("sum", 1), ("mean", 3)):
        found = value_loss(value, target, kind, coefficient=2.0, reduction=reduction, backend=any_backend)
        expected = [2 * x for x in losses] if reduction == "none" else 2 * sum(losses) / divisor
        assert found.loss.tolist() == pytest.approx(expected)
        gradient = torch.autograd.grad(found.loss.sum(), value)[0].tolist()
        assert gradient == pytest.approx([2 * x / divisor for x in slopes])
        assert found[1:] == (None, None)


def test_a_hand_computed_clipped_step(any_backend, device) -> None:
    """Steps of 0.1 (inside), 1 away from the target, 1 towards it (which counts as 0.2), −1 towards it, likewise."""
    value = torch.tensor([0.1, 1.0, 1.0, -1.0], dtype=torch.float64, device=device, requires_grad=True)
    target = torch.tensor([1.0, -1.0, 2.0, -2.0], dtype=torch.float64, device=device)
    found = value_loss(
        value, target, "l2", old_value=torch.zeros_like(target), clip=0.2, reduction="none", backend=any_backend
    )
    assert found.loss.tolist() == pytest.approx([0.81, 4.0, 3.24, 3.24])
    assert torch.autograd.grad(found.loss.sum(), value)[0].tolist() == pytest.approx([-1.8, 4.0, 0.0, 0.0])
    assert found.clip_fraction.item() == pytest.approx(3 / 4)


def test_where_both_distances_are_the_same_half_of_the_gradient_passes(any_backend, device) -> None:
    """0.25 is as far from 0.625 as 1 is; both numbers are exact."""
    value = torch.ones(1, dtype=torch.float64, device=device, requires_grad=True)
    found = value_loss(
        value, value.detach() * 0.625, "l1", old_value=torch.zeros_like(value), clip=0.25, backend=any_backend
    )
    assert found.loss.item() == 0.375
    assert torch.autograd.grad(found.loss, value)[0].item() == 0.5


def test_a_step_to_the_bound_has_its_gradient(any_backend, device) -> None:
    """Also where `torch.clamp` has none there, as in PyTorch 2.14."""
    value = torch.tensor([0.25, -0.25, 0.0], dtype=torch.float64, device=device, requires_grad=True)
    target = torch.tensor([1.0, -2.0, 1.0], dtype=torch.float64, device=device)
    for clip in (0.25, torch.tensor(0.25, device=device)):
        arguments = {"old_value": torch.zeros_like(target), "clip": clip, "reduction": "sum"}
        loss = value_loss(value, target, "l1", **arguments, backend=any_backend).loss
        assert torch.autograd.grad(loss, value)[0].tolist() == [-1.0, 1.0, -1.0]


def test_hand_computed_explained_variance(any_backend, device) -> None:
    """Targets of variance ¼, errors (0.9, 1) of variance 0.05²."""
    value = torch.tensor([0.1, 1.0], dtype=torch.float64, device=device)
    target = torch.tensor([1.0, 2.0], dtype=torch.float64, device=device)
    found = value_loss(value, target, "l2", explained_variance=True, backend=any_backend)
    assert found.explained_variance.item() == pytest.approx(0.99)


def test_hand_computed_mask_and_weights(any_backend, device) -> None:
    value = torch.tensor([1.0, 2.0, 9.0, 3.0], dtype=torch.float64, device=device, requires_grad=True)
    target = torch.zeros_like(value)
    mask = torch.tensor([True, True, False, True], device=device)
    weights = torch.tensor([1.0, 3.0, 5.0, 0.0], dtype=torch.float64, device=device)
    found = value_loss(value, target, "l2", mask=mask, weights=weights, backend=any_backend)
    assert found.loss.item() == pytest.approx((1 + 3 * 4) / 4)
    assert torch.autograd.grad(found.loss, value)[0].tolist() == pytest.approx([0.5, 3.0, 0.0, 0.0])
    found = value_loss(value, target, "l2", mask=mask, backend=any_backend)
    assert found.loss.item() == pytest.approx(14 / 3)


# --- against the reference, and the reference against what it replaces ----------------------------------------------


def clipped_value_loss(old_value, value, value_target, clip, kind):
    """The worse of the value's distance and of that of a bounded step, and which steps are bounded, as 0 or 1."""
    step = value - old_value
    clipped = old_value + step.clamp(-clip, clip)
    loss = torch.max(*(distance_loss(x, value_target, kind) for x in (value, clipped)))
    return loss, (step.detach().abs() > clip).to(value.dtype)


@pytest.mark.parametrize(("masked", "weighted"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_reference_is_the_composition_of_the_losses(masked, weighted, clipped, kind, reduction) -> None:
    arguments = problem((30, 1), kind=kind, full=True) | {"reduction": reduction}
    arguments |= {} if masked else {"mask": None}
    arguments |= {} if weighted else {"weights": None}
    arguments |= {} if clipped else {"old_value": None, "clip": None}
    value, target, mask = arguments["value"], arguments["value_target"], arguments["mask"]
    if clipped:
        loss, outside = clipped_value_loss(arguments["old_value"], value, target, 0.2, kind)
        expected = [reduce_loss(outside, "mean", mask)]
    else:
        loss, expected = distance_loss(value, target, kind), []
    loss = reduce_loss(0.5 * loss, reduction, mask, arguments["weights"])
    variance = functional.explained_variance(value.detach(), target, mask).squeeze(-1)
    expected = [loss, *expected, variance, *torch.autograd.grad(loss.sum(), value)]
    for a, b in zip(results(arguments, "reference"), expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


@given(
    shape=st.sampled_from([(), (1,), (7,), (31,), (4, 1), (3, 5), (2, 3, 4)]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    kind=st.sampled_from(KINDS),
    options=st.sets(st.sampled_from(["old_value", "mask", "weights", "coefficient"])),
    explained_variance=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    scalars=st.sampled_from([None, torch.float64, torch.float32, torch.bfloat16]),
    few=st.booleans(),
    seed=st.integers(0, 100),
)
@settings(max_examples=60, deadline=None, derandomize=True)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_loss_metrics_and_gradient_agree_with_the_reference(
    backend, device, shape, dtype, kind, options, explained_variance, reduction, scalars, few, seed
) -> None:
    arguments = problem(shape, kind=kind, full=True, dtype=dtype, device=device, seed=seed)
    arguments |= {"explained_variance": explained_variance, "reduction": reduction}
    arguments |= {k: None for k in ("old_value", "mask", "weights", "coefficient") if k not in options}
    arguments |= {"clip": 0.2 if "old_value" in options else None}
    for name in ("clip", "coefficient"):
        if scalars is not None and arguments[name] is not None:
            arguments[name] = torch.tensor(arguments[name], dtype=scalars, device=device)
    # What a target of one value, which rounding may or may not tell from a constant, explains is anything.
    if explained_variance and math.prod(shape) < 4:
        arguments["explained_variance"] = False
    with planned_with(samples_launch, TILE_BYTES=32, _TILES_OF_ONE_PROGRAM=1) if few else nullcontext():
        found = results(arguments, backend)
    expected = results(in_float64(arguments), "reference")
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        assert a.shape == b.shape
        # Values of the order of 5, of which a sum has 30.
        assert close(a, b, dtype, factor=5)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.bfloat16, torch.float32)])
def test_mixed_dtypes_promote(any_backend, device, dtypes) -> None:
    low, high = dtypes
    arguments = problem(dtype=low, device=device) | {"value_target": problem(dtype=high, device=device)["value_target"]}
    found = results(arguments, any_backend)
    expected = results(in_float64(arguments), "reference")
    assert [x.dtype for x in found] == [high, high, low]
    assert all(close(a, b, low) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mixed", [False, True], ids=["one layout", "mixed layouts"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("full", [False, True])
def test_any_strides_give_the_same_numbers(backend, device, small_tiles, layout, mixed, reduction, full) -> None:
    arguments = problem((6, 5), full=full, device=device) | {"reduction": reduction}
    expected = results(arguments, backend)
    for name in SAMPLES:
        if name in arguments:
            change = LAYOUTS["contiguous" if mixed and name != "value" else layout]
            arguments[name] = change(arguments[name].detach())
    arguments["value"].requires_grad_()
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(results(arguments, backend), expected, strict=True))


def test_rounding_of_a_step_inside_of_the_range_takes_no_gradient_away(any_backend, device) -> None:
    generator = torch.Generator().manual_seed(0)
    value, target, old = torch.randn(3, 500, generator=generator).to(device).unbind(0)
    value = value.detach().requires_grad_()
    value_loss(value, target, "l2", old_value=old, clip=100.0, reduction="sum", backend=any_backend).loss.backward()
    torch.testing.assert_close(value.grad, 2 * (value.detach() - target))


def test_results_are_bitwise_reproducible(backend, device, small_tiles) -> None:
    arguments = problem((20, 7), full=True, dtype=torch.float32, device=device)
    first, second = results(arguments, backend), results(arguments, backend)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- the kernel's programs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("samples", [1, 8, 9, 16, 17, 33, 200])
def test_one_program_and_many_give_the_same_numbers(monkeypatch, device, small_tiles, samples, full) -> None:
    """Two launches only where the number of samples that count, or their weight, takes several programs."""
    grids = launched(monkeypatch)
    arguments = problem((samples,), full=full, device=device)
    found = results(arguments, "triton")
    assert (grids[0][1] > 1) == (samples > 16)
    assert len(grids) == (2 if full and samples > 16 else 1)
    expected = results(arguments, "reference")
    assert all(close(a, b, torch.float64, factor=5) for a, b in zip(found, expected, strict=True))


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


# --- semantics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("full", [False, True])
def test_what_does_not_count_is_not_read(any_backend, device, small_tiles, poison, reduction, full) -> None:
    """The results are those of the samples that count alone."""
    arguments = problem((8, 5), full=full, device=device) | {"reduction": reduction}
    mask = arguments.setdefault("mask", problem((8, 5), full=True, device=device)["mask"])
    alone = {k: x[mask] if k in SAMPLES else x for k, x in arguments.items()} | {"mask": None}
    expected = results(alone, any_backend)
    for name in SAMPLES:
        if name in arguments and name != "mask":
            arguments[name] = torch.where(mask, arguments[name].detach(), poison)
    arguments["value"].requires_grad_()
    found = results(arguments, any_backend)
    for i in (0, -1) if reduction == "none" else (-1,):
        assert (found[i][~mask] == 0).all()
        found[i] = found[i][mask]
    assert all(close(a, b, torch.float64, factor=5) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("shape", [(0,), (3, 0)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_an_empty_batch_gives_zeros(any_backend, device, shape, full, reduction) -> None:
    loss, *logged, gradient = results(problem(shape, full=full, device=device) | {"reduction": reduction}, any_backend)
    assert loss.shape == (shape if reduction == "none" else ())
    assert (loss == 0).all()
    assert [x.item() for x in logged] == ([0.0, 1.0] if full else [1.0])
    assert gradient.shape == shape


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_where_no_sample_counts_the_loss_is_zero(any_backend, device, small_tiles, reduction) -> None:
    arguments = problem((9, 5), full=True, device=device) | {"reduction": reduction}
    arguments["mask"] = torch.zeros_like(arguments["mask"])
    loss, clip_fraction, explained_variance, gradient = results(arguments, any_backend)
    assert (loss == 0).all()
    assert (gradient == 0).all()
    assert clip_fraction == 0
    assert explained_variance == 1


def test_a_constant_target_has_nothing_to_explain(any_backend, device, small_tiles) -> None:
    """The variance of the error is compared with the machine epsilon."""
    arguments = problem((40,), dtype=torch.float32, device=device)
    arguments["value_target"] = torch.zeros_like(arguments["value_target"])
    found = results(arguments, any_backend)[1]
    expected = 1 - arguments["value"].detach().var(correction=0) / torch.finfo(torch.float32).eps
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_far_off_mean_costs_no_precision(backend, device, small_tiles) -> None:
    """1000 ± 1 in float32: the difference of sums of squares would have 2 digits left."""
    arguments = problem((300,), dtype=torch.float32, device=device)
    arguments["value"] = (arguments["value"].detach() + 1000).requires_grad_()
    arguments["value_target"] = arguments["value_target"] + 1000
    found = results(arguments, backend)
    expected = results(in_float64(arguments), "reference")
    assert close(found[1], expected[1], torch.float32, factor=20)


@pytest.mark.parametrize("where", ["value", "value_target", "old_value"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_that_counts_is_not_hidden(any_backend, device, small_tiles, where, kind) -> None:
    arguments = problem((40,), kind=kind, full=True, device=device) | {"mask": None}
    x = arguments[where].detach().clone()
    x[23] = NAN
    arguments[where] = x
    arguments["value"].requires_grad_()
    loss, _, explained_variance, gradient = results(arguments, any_backend)
    assert loss.isnan()
    assert explained_variance.isnan() == (where != "old_value")
    if where != "old_value":  # the sign of a NaN is 0 to PyTorch
        assert gradient.isnan().nonzero().tolist() == ([] if kind == "l1" else [[23]])


def test_inputs_are_not_written(any_backend, device) -> None:
    arguments = problem(full=True, device=device)
    before = {k: x.detach().clone() for k, x in arguments.items() if isinstance(x, torch.Tensor)}
    results(arguments, any_backend)
    assert all(torch.equal(arguments[k].detach(), x) for k, x in before.items())


@pytest.mark.parametrize("make", [float, lambda x: torch.tensor(x, dtype=torch.float64)], ids=["number", "0-d"])
def test_scalars_keep_float64_precision(any_backend, device, make) -> None:
    value = torch.ones(1, dtype=torch.float64, device=device)
    zero = torch.zeros_like(value)
    arguments = {"old_value": zero, "clip": make(1 - 2**-40), "coefficient": make(1 + 2**-40), "reduction": "sum"}
    found = value_loss(value, value + 1, "l1", **arguments, backend=any_backend)
    assert found.loss.item() == (1 + 2**-40) * (1 + 2**-40)


# --- gradients ------------------------------------------------------------------------------------------------------


def loss_of(value, arguments, backend):
    return value_loss(**arguments | {"value": value}, backend=backend).loss


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(any_backend, device, small_tiles, kind, full, reduction) -> None:
    arguments = problem((12, 2), kind=kind, full=full, device=device) | {"reduction": reduction}
    assert torch.autograd.gradcheck(lambda x: loss_of(x, arguments, any_backend), arguments["value"], fast_mode=True)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("kind", ["l2", "smooth_l1"])
def test_gradgradcheck(any_backend, device, full, kind) -> None:
    arguments = problem((4, 2), kind=kind, full=full, device=device)
    assert torch.autograd.gradgradcheck(
        lambda x: loss_of(x, arguments, any_backend), arguments["value"], fast_mode=True
    )


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_made_to_be_differentiated_are_the_same_gradients(any_backend, device, kind) -> None:
    arguments = problem(full=True, kind=kind, device=device)
    loss = loss_of(arguments["value"], arguments, any_backend).square()
    plain, again = (
        torch.autograd.grad(loss, arguments["value"], retain_graph=True, create_graph=create)[0]
        for create in (False, True)
    )
    assert torch.allclose(plain, again, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["value_target", "weights", "coefficient", "clip"])
def test_whatever_requires_grad_gets_one(any_backend, device, name) -> None:
    arguments = problem((12,), full=True, device=device)
    if name in ("coefficient", "clip"):
        arguments[name] = torch.tensor(arguments[name], dtype=torch.float64, device=device)
    x = arguments[name].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: value_loss(**arguments | {name: x}, backend=any_backend).loss, x, fast_mode=True
    )


def test_the_old_value_is_a_constant_and_what_is_logged_holds_no_gradient(any_backend, device) -> None:
    arguments = problem((12,), full=True, device=device)
    arguments["old_value"].requires_grad_()
    for target in (arguments["value_target"], arguments["value_target"].clone().requires_grad_()):
        found = value_loss(**arguments | {"value_target": target}, backend=any_backend)
        assert torch.autograd.grad(found.loss, arguments["old_value"], allow_unused=True, retain_graph=True) == (None,)
        assert not found.clip_fraction.requires_grad
        assert not found.explained_variance.requires_grad


def test_without_gradients_there_is_no_slope(monkeypatch, device) -> None:
    kept = []
    module = value_loss_operators.backend_module("triton")
    original = module.forward
    monkeypatch.setattr(module, "forward", lambda *a: kept.append(a[-1]) or original(*a))
    arguments = problem(device=device)
    value_loss(**arguments, backend="triton")
    with torch.no_grad():
        value_loss(**arguments, backend="triton")
    value_loss(**arguments | {"value": arguments["value"].detach()}, backend="triton")
    assert kept == [True, False, False]


def test_a_coefficient_scheduled_before_backward_changes_nothing_in_the_kernel(device) -> None:
    arguments = problem(full=True, device=device)
    for name in ("coefficient", "clip"):
        arguments[name] = torch.tensor(arguments[name], dtype=torch.float64, device=device)
    expected = results(arguments, "triton")[-1]
    loss = value_loss(**arguments, backend="triton").loss
    arguments["coefficient"].mul_(0.1)
    arguments["clip"].mul_(0.1)
    (gradient,) = torch.autograd.grad(loss, arguments["value"], retain_graph=True)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)
    with pytest.raises(RuntimeError, match="a coefficient was changed in place"):
        torch.autograd.grad(loss, arguments["value"], create_graph=True)


@pytest.mark.parametrize("name", ["value_target", "old_value", "weights"])
def test_a_sample_overwritten_before_the_gradient_is_composed_is_refused(device, name) -> None:
    """By autograd, as where any tensor is overwritten that a gradient is computed from."""
    arguments = problem(full=True, device=device)
    loss = value_loss(**arguments, backend="triton").loss
    arguments[name].mul_(10)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, arguments["value"], create_graph=True)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_loss_that_is_kept_keeps_no_batch(backend, device) -> None:
    arguments = problem(full=True, device=device)
    batch = [weakref.ref(arguments[name]) for name in ("value_target", "old_value", "mask", "weights")]
    loss = value_loss(**arguments, backend=backend).loss
    loss.backward()
    del arguments
    gc.collect()
    assert loss.requires_grad
    assert [x() for x in batch] == [None] * 4


# --- compiled -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_equals_eager_and_a_new_coefficient_compiles_nothing(any_backend, device, full, reduction) -> None:
    arguments = problem((6, 5), full=full, device=device) | {"reduction": reduction}
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def scaled(value, coefficient, arguments):
        found = value_loss(**arguments | {"value": value.sin(), "coefficient": coefficient}, backend=any_backend)
        return found.loss.square().sum(), found.explained_variance

    compiled = torch.compile(scaled, fullgraph=True, backend=graphs)
    counts = []
    for coefficient in (0.2, 0.1):
        both = []
        for function in (scaled, compiled):
            c = torch.tensor(coefficient, dtype=torch.float64, device=device)
            loss, explained_variance = function(arguments["value"], c, arguments)
            both.append((loss, explained_variance, *torch.autograd.grad(loss, arguments["value"])))
        assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(*both, strict=True))
        counts.append(graphs.frame_count)
    assert counts[0] == counts[1]


def test_new_numbers_compile_once_more_at_most(any_backend, device) -> None:
    arguments = problem(full=True, device=device)
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss(value, x):
        changed = {"value": value, "clip": x, "coefficient": x}
        return value_loss(**arguments | changed, backend=any_backend).loss

    compiled = torch.compile(loss, fullgraph=True, backend=graphs)
    for x in (0.2, 0.3, 0.1, 0.25):
        found, expected = (torch.autograd.grad(f(arguments["value"], x), arguments["value"]) for f in (compiled, loss))
        assert torch.allclose(found[0], expected[0], rtol=1e-12, atol=1e-14)
    assert graphs.frame_count <= 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_operator_keeps_its_contract(device, layout, reduction, dtype) -> None:
    """Schema, and fake results of the same dtypes, shapes and strides, as PyTorch checks them."""
    arguments = problem((4, 3), full=True, device=device, dtype=dtype)
    tensors = [LAYOUTS[layout](arguments[k].detach()) for k in SAMPLES]
    scalars = (0.2, None, None, torch.tensor(0.5, device=device))
    torch.library.opcheck(
        torch.ops.fusedrl.value_loss.default,
        ("triton", True, *tensors, *scalars, "l2", True, reduction),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_torch_backend_waits_on_nothing(full, kind) -> None:
    """Fake tensors have no data: reading any would raise. The operator is opaque to them, its inside is not."""
    from fusedrl.kernels import value_loss_vectorized

    with torch._subclasses.FakeTensorMode():
        arguments = problem(full=full, kind=kind)
        arguments = {k: torch.empty_like(x) if isinstance(x, torch.Tensor) else x for k, x in arguments.items()}
        arguments |= {"coefficient": torch.tensor(0.5), "clip": torch.tensor(0.2) if full else None}
        gradient = results(arguments | {"value": arguments["value"].requires_grad_()}, "torch")[-1]
        found = value_loss_vectorized.forward(arguments["value"].detach(), constants(arguments), True)
    assert gradient.shape == found[-1].shape == (6, 5)


def constants(arguments: dict) -> value_loss_problem.ValueConstants:
    defaults = dict.fromkeys(value_loss_problem.ValueConstants._fields) | {"reduction": "mean"}
    return value_loss_problem.ValueConstants(**defaults | {k: x for k, x in arguments.items() if k != "value"})


# --- cost -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coefficient", [None, torch.tensor(0.5)], ids=["without coefficient", "0-d coefficient"])
@pytest.mark.parametrize("kind", ["l2", "smooth_l1"])
def test_the_torch_backend_makes_few_calls(kind, coefficient) -> None:
    """Of PyTorch, for the mean and the explained variance."""
    arguments = problem((256, 1), kind=kind, dtype=torch.float32) | {"coefficient": coefficient}
    with Calls() as calls:
        value_loss(**arguments, backend="torch")
    assert 5 < len(calls.names) <= 10


def test_backward_of_the_kernel_is_one_product(device) -> None:
    arguments = problem((256, 1), dtype=torch.float32, device=device)
    loss = value_loss(**arguments, backend="triton").loss
    one = torch.ones_like(loss)
    with Calls() as calls:
        torch.autograd.grad(loss, arguments["value"], one)
    assert [name for name in calls.names if "detach" not in name] == ["aten.mul.Tensor"]


# --- verify ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_verify_accepts_what_is_right(device, small_tiles, dtype, kind, full, reduction) -> None:
    arguments = problem((8, 5), kind=kind, full=full, dtype=dtype, device=device) | {"reduction": reduction}
    results(arguments, "verify")


def test_verify_accepts_either_side_of_a_kink(device) -> None:
    """A step that is ε but for rounding, and a value that is its target but for rounding."""
    value = torch.tensor([0.3, 1.3], device=device, requires_grad=True)
    old, target = torch.tensor([0.1, 1.1], device=device), torch.tensor([0.3, 0.1 + 0.2 + 1.0], device=device)
    value_loss(value, target, "l1", old_value=old, clip=0.2, backend="verify").loss.backward()


@pytest.mark.parametrize(
    ("output", "message"),
    [(0, "critic's loss.* at index"), (1, "clip_fraction"), (2, "explained_variance"), (3, r"slope .*at index \(2,")],
)
def test_verify_names_what_is_wrong(monkeypatch, device, output, message) -> None:
    arguments = problem((6,), full=True, device=device) | {"reduction": "none", "mask": None}
    module = value_loss_operators.backend_module(fastest_backend(arguments["value"]))
    right = module.forward

    def wrong(*inputs):
        found = right(*inputs)
        (found[output] if found[output].ndim == 0 else found[output][2]).add_(0.5)
        return found

    monkeypatch.setattr(module, "forward", wrong)
    with use_backend("verify"), pytest.raises(VerificationError, match=message):
        value_loss(**arguments)


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"value": 1.0}, TypeError, "value must be a tensor, but is 1.0"),
        ({"value_target": None}, TypeError, "value_target must be a tensor, but is None"),
        ({"coefficient": "1"}, TypeError, "coefficient must be a number"),
        ({"value": torch.zeros(6, 5).long()}, TypeError, "value has dtype torch.int64"),
        ({"value_target": torch.zeros(6)}, RuntimeError, r"value_target has shape \(6,\).*value has shape \(6, 5\)"),
        ({"value_target": torch.zeros(6, 5, device="meta")}, RuntimeError, "value_target has .* on meta"),
        ({"old_value": torch.zeros(6, 1)}, RuntimeError, r"old_value has shape \(6, 1\)"),
        ({"weights": torch.zeros(5)}, RuntimeError, r"weights has shape \(5,\)"),
        ({"mask": torch.ones(5).bool()}, RuntimeError, r"mask has shape \(5,\)"),
        ({"mask": torch.ones(6, 5)}, TypeError, "mask has dtype torch.float32: torch.bool is wanted"),
        ({"clip": torch.zeros(1)}, RuntimeError, r"clip has shape \(1,\): a number or a 0-d tensor"),
        ({"clip": -0.2}, ValueError, "clip is -0.2, but must not be negative"),
        ({"clip": NAN}, ValueError, "clip is nan, but must not be negative"),
        ({"coefficient": torch.zeros(1)}, RuntimeError, "coefficient has shape"),
        ({"clip": None}, ValueError, "old_value is given, but clip isn't"),
        ({"old_value": None}, ValueError, "clip is given, but old_value isn't"),
        ({"loss_function": "huber"}, ValueError, "loss_function is 'huber'; it can be 'l1', 'l2', 'smooth_l1'"),
        ({"reduction": "avg"}, ValueError, "reduction is 'avg'"),
        ({"backend": "cuda"}, ValueError, "backend is 'cuda'"),
    ],
)
def test_a_bad_argument_is_named_before_anything_runs(monkeypatch, change, error, message) -> None:
    monkeypatch.setattr(value_loss_operators, "backend_module", None)
    with pytest.raises(error, match=message):
        value_loss(**problem(full=True) | change)


def test_verify_accepts_a_target_that_has_nothing_to_explain(device) -> None:
    value = torch.randn(7, device=device)
    target = torch.full_like(value, 0.5)
    value_loss(value, target, "l2", explained_variance=True, backend="verify")
