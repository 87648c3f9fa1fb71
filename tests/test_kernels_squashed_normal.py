"""Gaussian log-probabilities and draws: hand-computed, backends against the reference, gradients, edges, errors."""

import math
from collections import Counter
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from fusedrl.kernels import (
    VerificationError,
    normal_log_prob,
    normal_sample,
    squashed_normal_operators,
    squashed_normal_verify,
    use_backend,
)
from fusedrl.kernels.backend import fastest_backend
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributions as D
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev
from torch.utils._python_dispatch import TorchDispatchMode

BACKENDS = ["torch", "triton", "reference"]
# Some ten roundings of the dtype that is computed in; the half types add the rounding of the result, twice since
# Triton's interpreter rounds it down.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
LOG_2PI = math.log(2 * math.pi)

SQUASHES = {
    "not squashed": lambda columns: None,
    "to ±1": lambda columns: (-1.0, 1.0),
    "numbers": lambda columns: (-0.5, 3.0),
    "0-d integers": lambda columns: (torch.tensor(-2), torch.tensor(3)),
    "per dimension": lambda columns: (-1 - torch.arange(columns) / 3, torch.linspace(0.5, 2, columns)),
    "mixed": lambda columns: (-0.5, torch.linspace(0.5, 2, columns, dtype=torch.float64)),
}


@pytest.fixture(params=BACKENDS)
def any_backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn, the reference included: it too must meet the hand-computed numbers."""
    return request.param


def squash_of(kind, columns, device):
    squash = SQUASHES[kind](columns)
    return squash and tuple(x.to(device) if isinstance(x, torch.Tensor) else x for x in squash)


def problem(shape=(4, 3), *, dtype=torch.float64, device=None, seed=0, spread=1.0):
    """Loc, scale and noise."""
    generator = torch.Generator().manual_seed(seed)
    loc, log_scale, noise = (torch.randn(3, *shape, generator=generator, dtype=torch.float64)).unbind(0)
    return [x.to(device, dtype) for x in (spread * loc, (log_scale / 2).exp(), noise)]


def leaves(tensors, dtype=None):
    return [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]


def assert_close(found, expected, dtype, scale=1.0):
    assert found.shape == expected.shape
    error = (found.double() - expected).abs() / (1 + expected.abs())
    assert error.max() <= scale * TOLERANCE[dtype], error.max()


# --- hand-computed ------------------------------------------------------------------------------------------------


def test_a_hand_computed_log_probability(any_backend, device) -> None:
    """−½·((1 − 0)/2)² − log 2 − ½·((3 − 1)/1)² − log 1 − log 2π."""
    loc, scale, action = (torch.tensor(x, device=device) for x in ([0.0, 1.0], [2.0, 1.0], [1.0, 3.0]))
    found = normal_log_prob(loc, scale, action, backend=any_backend)
    assert found.item() == pytest.approx(-0.125 - math.log(2) - 2 - LOG_2PI)


def test_a_hand_computed_log_probability_of_a_squashed_action(any_backend, device) -> None:
    """a = 1 + 2·tanh x with tanh x = ½: x = ½ log 3 and da/dx = 2·(1 − ¼)."""
    loc, scale, action = (torch.tensor([x], device=device) for x in (0.0, 1.0, 2.0))
    found = normal_log_prob(loc, scale, action, squash=(-1.0, 3.0), backend=any_backend)
    x = math.log(3) / 2
    assert found.item() == pytest.approx(-(x**2) / 2 - LOG_2PI / 2 - math.log(1.5))


def test_a_hand_computed_draw(any_backend, device) -> None:
    """x = ½ log 3 again, made of loc 0.1, scale 2 and the noise that leads there."""
    x = math.log(3) / 2
    loc, scale, noise = (torch.tensor([x], device=device) for x in (0.1, 2.0, (x - 0.1) / 2))
    action, log_prob = normal_sample(loc, scale, noise, squash=(-1.0, 3.0), backend=any_backend)
    assert action.item() == pytest.approx(2.0)
    assert log_prob.item() == pytest.approx(-(noise.item() ** 2) / 2 - LOG_2PI / 2 - math.log(2) - math.log(1.5))


def test_the_density_integrates_to_one(any_backend, device) -> None:
    """The trapezoidal rule over an interval whose ends the density vanishes at."""
    action = torch.linspace(-2, 3, 20001, dtype=torch.float64, device=device)[1:-1, None]
    loc, scale = torch.full_like(action, 0.3), torch.full_like(action, 0.5)
    log_prob = normal_log_prob(loc, scale, action, squash=(-2.0, 3.0), backend=any_backend)
    assert torch.trapezoid(log_prob.exp(), action[:, 0]).item() == pytest.approx(1, abs=1e-6)


# --- against the reference and torch.distributions --------------------------------------------------------------------


@given(
    batch=st.sampled_from([(), (1,), (3,), (2, 2), (700,)]),
    columns=st.integers(1, 5) | st.sampled_from([8, 17]),
    dtype=st.sampled_from(list(TOLERANCE)),
    kind=st.sampled_from(list(SQUASHES)),
    seed=st.integers(0, 100),
)
@settings(max_examples=30, deadline=None, derandomize=True)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_values_and_gradients_agree_with_the_reference(backend, device, batch, columns, dtype, kind, seed) -> None:
    """Of the same numbers in float64. Actions stay off the bounds, where float32 can't tell x apart."""
    squash = squash_of(kind, columns, device)
    loc, scale, noise = problem((*batch, columns), dtype=dtype, device=device, seed=seed, spread=0.5)
    noise = noise.clamp(-1, 1)
    grad = torch.Generator().manual_seed(seed)
    grad = [torch.randn(shape, generator=grad).to(device, dtype) for shape in (loc.shape, batch, batch)]
    margin = torch.finfo(dtype).resolution  # the reference sees float64
    results = []
    action = None
    for name, to in ((backend, dtype), ("reference", torch.float64)):
        inputs = leaves((loc, scale), to)
        drawn, log_prob = normal_sample(*inputs, noise.to(to), squash=squash, margin=margin, backend=name)
        gradients = torch.autograd.grad((drawn, log_prob), inputs, [g.to(to) for g in grad[:2]])
        if action is None:
            assert drawn.dtype == log_prob.dtype == dtype
            action = drawn.detach()
        inputs = leaves((loc, scale, action), to)
        again = normal_log_prob(*inputs, squash=squash, margin=margin, backend=name)
        more = torch.autograd.grad(again, inputs, grad[2].to(to))
        assert [g.dtype for g in (*gradients, *more)] == [to] * 5
        results.append((drawn.detach(), log_prob.detach(), *gradients, again.detach(), *more))
    for found, expected in zip(*results, strict=True):
        # A row's terms add up, and what is divided by the scale is larger than what it is computed from.
        assert_close(found, expected, dtype, scale=4 * columns * max(1, 1 / scale.min().item()) ** 2)


@pytest.mark.parametrize("columns", [512, 700])
def test_more_dimensions_than_a_tile_has(backend, device, columns) -> None:
    loc, scale, noise = problem((3, columns), device=device)
    squash = squash_of("per dimension", columns, device)
    results = []
    for name in (backend, "reference"):
        inputs = leaves((loc, scale))
        action, log_prob = normal_sample(*inputs, noise, squash=squash, backend=name)
        more = leaves((loc, scale, action))
        again = normal_log_prob(*more, squash=squash, backend=name)
        results.append((log_prob, *torch.autograd.grad((log_prob * log_prob).sum() + action.sum(), inputs),
                        again, *torch.autograd.grad(again.sum(), more[:2])))  # fmt: skip
    assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("squashed", [False, True])
def test_values_and_gradients_are_those_of_torch_distributions(any_backend, device, dtype, squashed) -> None:
    loc, scale, noise = problem((64, 3), dtype=dtype, device=device)
    inputs = leaves((loc, scale))
    dist = D.Independent(D.Normal(*inputs), 1)
    dist = D.TransformedDistribution(dist, D.TanhTransform()) if squashed else dist
    squash, margin = ((-1.0, 1.0), 0.0) if squashed else (None, None)
    action = torch.tanh(loc / 2 + noise / 2) if squashed else loc + 2 * noise
    results = []
    for log_prob_of in (
        lambda a: dist.log_prob(a),
        lambda a: normal_log_prob(*inputs, a, squash=squash, margin=margin, backend=any_backend),
    ):
        leaf = action.clone().requires_grad_()
        log_prob = log_prob_of(leaf)
        results.append((log_prob, *torch.autograd.grad(log_prob.square().sum(), (*inputs, leaf))))
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.parametrize("x", [1e-12, 1e-5, 1e-3, 0.1, 0.249, 0.251, 0.4, 1.0, 5.0])
@pytest.mark.parametrize("sign", [-1, 1])
def test_tanh_and_its_inverse_keep_their_relative_precision_near_zero(device, x, sign) -> None:
    """Where both are computed from exponentials and logarithms they would lose it."""
    for dtype, tolerance in ((torch.float32, 4e-7), (torch.float64, 1e-15)):
        noise = torch.full((1, 1), sign * x, dtype=dtype, device=device)
        zero, one = torch.zeros_like(noise), torch.ones_like(noise)
        action, _ = normal_sample(zero, one, noise, squash=(-1.0, 1.0), margin=0.0, backend="triton")
        assert action.item() == pytest.approx(math.tanh(noise.item()), rel=tolerance)
        # ∂ log π/∂loc is x where loc is 0 and the scale 1.
        loc = zero.requires_grad_()
        log_prob = normal_log_prob(loc, one, action, squash=(-1.0, 1.0), margin=0.0, backend="triton")
        (found,) = torch.autograd.grad(log_prob.sum(), loc)
        assert found.item() == pytest.approx(math.atanh(action.item()), rel=tolerance)


def test_numbers_of_several_dtypes_are_computed_in_the_widest(any_backend, device) -> None:
    loc, scale, noise = problem(device=device)
    action, log_prob = normal_sample(loc.float(), scale.bfloat16(), noise, squash=(-1.0, 1.0), backend=any_backend)
    assert action.dtype == log_prob.dtype == torch.float64
    expected = normal_sample(loc.float().double(), scale.bfloat16().double(), noise, squash=(-1.0, 1.0))
    torch.testing.assert_close((action, log_prob), expected, rtol=1e-12, atol=1e-12)


# --- layouts ------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": lambda x: x.repeat_interleave(2, -1).repeat_interleave(3, 0)[::3, ..., ::2],
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["not squashed", "per dimension"])
def test_any_strides_give_the_same_numbers(any_backend, device, layout, kind) -> None:
    change = LAYOUTS[layout]
    squash = squash_of(kind, 3, device)
    laid_out = [change(x) for x in problem((4, 2, 3), device=device)]
    results = []
    for tensors in (laid_out, [x.contiguous() for x in laid_out]):
        inputs = leaves(tensors[:2])
        action, log_prob = normal_sample(*inputs, tensors[2], squash=squash, backend=any_backend)
        found = torch.autograd.grad((change(action).sum() * log_prob.t().contiguous().t()).sum(), inputs)
        again = normal_log_prob(*inputs, change(action.detach()), squash=squash, backend=any_backend)
        more = torch.autograd.grad((again * again.detach()).sum(), inputs)
        results.append((action, log_prob, *found, again, *more))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_offsets_that_pass_two_to_the_31_are_long(monkeypatch, device) -> None:
    from fusedrl.kernels import squashed_normal_launch
    from fusedrl.kernels.launching import Launch

    seen = []
    monkeypatch.setattr(Launch, "__call__", lambda self, *_: seen.append(str(self._options["INDEX"])))
    for stride in (1 << 20, 1 << 30):
        x = torch.empty(1, device="meta").as_strided((3, 2), (stride, 1))
        squashed_normal_launch.log_prob(x, x, x, None)
    assert seen == ["int32", "int64"]


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_an_empty_batch_or_action_gives_an_empty_sum(any_backend, device, shape) -> None:
    inputs = leaves(torch.ones(3, *shape, device=device).unbind(0))
    action, log_prob = normal_sample(*inputs[:2], inputs[2].detach(), squash=(-1.0, 1.0), backend=any_backend)
    again = normal_log_prob(*inputs, squash=(-1.0, 1.0), backend=any_backend)
    found = torch.autograd.grad(action.sum() + log_prob.sum() + again.sum(), inputs)
    assert action.shape == shape
    assert log_prob.tolist() == again.tolist() == [0.0] * shape[0]
    assert [g.shape for g in found] == [shape] * 3


def test_inputs_are_not_written(any_backend, device) -> None:
    tensors = problem(device=device)
    tensors.append(torch.full_like(tensors[0], 1.0))
    low, high = squash = squash_of("per dimension", 3, device)
    before = [x.clone() for x in (*tensors, low, high)]
    for squash in (None, (-1.0, 1.0), (low, high)):
        inputs = leaves((tensors[0], tensors[1], tensors[3]))
        action, log_prob = normal_sample(*inputs[:2], tensors[2], squash=squash, backend=any_backend)
        again = normal_log_prob(*inputs, squash=squash, backend=any_backend)
        (action.sum() + log_prob.sum() + again.sum()).backward()
        normal_log_prob(tensors[0], tensors[1], tensors[3], squash=squash, backend=any_backend)
    assert all(torch.equal(a, b) for a, b in zip((*tensors, low, high), before, strict=True))


def test_results_are_bitwise_reproducible(backend, device) -> None:
    inputs = leaves(problem((64, 5), dtype=torch.float32, device=device))

    def run():
        action, log_prob = normal_sample(*inputs[:2], inputs[2].detach(), squash=(-1.0, 1.0), backend=backend)
        return action, log_prob, *torch.autograd.grad(log_prob.mean() + action.mean(), inputs[:2])

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


# --- the edges ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [int, np.float64])
def test_bounds_and_margin_may_be_numbers_of_any_type(any_backend, device, number) -> None:
    loc, scale, noise = torch.rand(3, 4, 2, device=device, dtype=torch.float64) + 0.1
    squash, margin = (number(-2), number(1)), number(0)
    action, log_prob = normal_sample(loc, scale, noise, squash=squash, margin=margin, backend=any_backend)
    expected = normal_sample(loc, scale, noise, squash=(-2.0, 1.0), margin=0.0, backend="reference")
    torch.testing.assert_close((action, log_prob), expected)
    again = normal_log_prob(loc, scale, action, squash=squash, margin=margin, backend=any_backend)
    torch.testing.assert_close(again, log_prob)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("margin", [None, 0.0, 1e-3])
def test_actions_at_and_beyond_the_bounds_are_taken_for_those_at_the_margin(any_backend, device, dtype, margin) -> None:
    computed = dtype if dtype == torch.float64 else torch.float32
    inner = 1 - (torch.finfo(dtype).resolution if margin is None else margin)
    inner = torch.tensor(inner, dtype=computed)
    if inner == 1:
        inner = torch.nextafter(inner, torch.zeros_like(inner))
    action = torch.tensor([1.0, -1.0, 1.25, -1.25], dtype=dtype, device=device)[:, None].requires_grad_()
    loc, scale = (torch.full_like(action, x) for x in (0.5, 2.0))
    found = normal_log_prob(loc, scale, action, squash=(-1.0, 1.0), margin=margin, backend=any_backend)
    (gradient,) = torch.autograd.grad(found.sum(), action)
    y = inner.double() * action.detach().double().sign()
    x = y.atanh()
    expected = -(((x - 0.5) / 2) ** 2) / 2 - math.log(2) - LOG_2PI / 2 - torch.log1p(-y * y)
    slope = 1 - y * y
    assert found.isfinite().all()
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-5, torch.float64: 1e-3}[dtype]
    # In float64 the action's distance from 1 has one digit or two; the expectation above loses it too.
    torch.testing.assert_close(found.double(), expected[:, 0], rtol=tolerance, atol=0)
    limit = ((2 * y - (x - 0.5) / 4) / slope).to(dtype).double()  # infinite in float16
    torch.testing.assert_close(gradient.double(), limit, rtol=0.3 if dtype == torch.float64 else 2e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [20.0, 300.0])
def test_draws_far_out_have_the_log_probability_of_x_itself(any_backend, device, dtype, size) -> None:
    """log |da/dx| → 2 log 2 − 2|x|, whose slope goes to ∓2; the action stays off the bound."""
    loc = torch.tensor([[size], [-size]], dtype=dtype, device=device).requires_grad_()
    scale, noise = torch.full_like(loc, 0.5).requires_grad_(), torch.full_like(loc, 0.1)
    action, log_prob = normal_sample(loc, scale, noise, squash=(-1.0, 1.0), backend=any_backend)
    x = loc.detach().double() + 0.05
    expected = -0.005 - LOG_2PI / 2 - math.log(0.5) - 2 * math.log(2) + 2 * x.abs()
    torch.testing.assert_close(log_prob.double(), expected[:, 0], rtol=1e-6, atol=0)
    resolution = torch.finfo(dtype).resolution
    assert action.abs().max() == torch.tensor(1 - resolution, dtype=dtype)
    by_loc, by_scale = torch.autograd.grad(log_prob.sum(), (loc, scale), retain_graph=True)
    torch.testing.assert_close(by_loc, 2 * loc.detach().sign(), rtol=1e-6, atol=0)
    torch.testing.assert_close(by_scale, 0.2 * loc.detach().sign() - 2, rtol=1e-6, atol=0)
    # The action's slope is that of tanh at the margin: 1 − y² = 2·resolution, in float64 to one digit.
    (by_loc,) = torch.autograd.grad(action.sum(), loc)
    torch.testing.assert_close(by_loc, torch.full_like(by_loc, 2 * resolution), rtol=0.2, atol=0)


def test_without_a_margin_a_draw_reaches_the_bound(any_backend, device) -> None:
    loc, scale = torch.full((1, 1), 20.0, device=device), torch.ones(1, 1, device=device)
    action, _ = normal_sample(loc, scale, scale, squash=(-1.0, 1.0), margin=0.0, backend=any_backend)
    assert action.item() == 1


def test_a_nan_is_not_hidden(any_backend, device) -> None:
    loc, scale, noise = problem(device=device)
    loc[0, 1] = math.nan
    action, log_prob = normal_sample(loc, scale, noise, squash=(-1.0, 1.0), backend=any_backend)
    assert log_prob.isnan().tolist() == [True, False, False, False]
    assert action.isnan().sum() == 1
    again = normal_log_prob(torch.zeros_like(loc), scale, action, squash=(-1.0, 1.0), backend=any_backend)
    assert again.isnan().tolist() == [True, False, False, False]


# --- gradients ----------------------------------------------------------------------------------------------------


def functions_of(kind, device, backend):
    squash = squash_of(kind, 3, device)
    noise = problem((2, 3), device=device)[2]
    return {
        "log_prob": lambda loc, scale, action: normal_log_prob(loc, scale, action, squash=squash, backend=backend),
        "sample": lambda loc, scale, _: normal_sample(loc, scale, noise, squash=squash, backend=backend),
    }


def points(kind, device):
    """Loc, scale and an action inside of the bounds of every kind."""
    loc, scale, noise = problem((2, 3), device=device)
    return leaves((loc, scale, 0.2 * noise.tanh()))


@pytest.mark.parametrize("kind", ["not squashed", "to ±1", "per dimension"])
@pytest.mark.parametrize("function", ["log_prob", "sample"])
def test_gradcheck_of_both_orders(any_backend, device, kind, function) -> None:
    call, inputs = functions_of(kind, device, any_backend)[function], points(kind, device)
    if function == "sample":
        inputs[2] = inputs[2].detach()
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("kind", ["not squashed", "to ±1", "per dimension"])
@pytest.mark.parametrize("function", ["log_prob", "sample"])
def test_gradients_made_to_be_differentiated_are_the_same_gradients(any_backend, device, kind, function) -> None:
    """gradgradcheck compares these with themselves; here they meet the kernels'."""
    inputs = points(kind, device)
    found = functions_of(kind, device, any_backend)[function](*inputs)
    total = found.square().sum() if function == "log_prob" else (found[0] * found[1][:, None]).sum()
    wanted = inputs if function == "log_prob" else inputs[:2]
    plain = torch.autograd.grad(total, wanted, retain_graph=True)
    again = torch.autograd.grad(total, wanted, create_graph=True)
    torch.testing.assert_close(again, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("function", ["log_prob", "sample"])
def test_a_bound_overwritten_before_backward_changes_no_gradient(any_backend, device, function, create_graph) -> None:
    """The kernels compute from the bounds again, so that autograd refuses, as for any tensor it needs."""
    loc, scale, third = points("per dimension", device)
    low, high = (x.clone() for x in squash_of("per dimension", 3, device))
    run = {"log_prob": normal_log_prob, "sample": lambda *x, **options: normal_sample(*x, **options)[1]}[function]

    def total() -> torch.Tensor:
        return run(loc, scale, third.detach(), squash=(low, high), backend=any_backend).sum()

    expected = torch.autograd.grad(total(), (loc, scale))
    loss = total()
    low.sub_(1)
    refused = pytest.raises(RuntimeError, match="modified by an inplace operation")
    with refused if any_backend == "triton" else nullcontext():
        found = torch.autograd.grad(loss, (loc, scale), create_graph=create_graph)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_an_action_computed_from_its_distribution_gives_it_its_gradient_once(any_backend, device) -> None:
    loc, scale, noise = points("not squashed", device)

    def total() -> torch.Tensor:
        return normal_log_prob(loc, scale, loc.square() + scale * noise.detach(), backend=any_backend).sum()

    plain = torch.autograd.grad(total(), (loc, scale))
    again = torch.autograd.grad(total(), (loc, scale), create_graph=True)
    torch.testing.assert_close(again, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("needs", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_only_what_is_needed_gets_a_gradient(any_backend, device, needs) -> None:
    inputs = points("to ±1", device)
    expected = torch.autograd.grad(normal_log_prob(*inputs, squash=(-1.0, 1.0), backend="reference").sum(), inputs)
    for i, x in enumerate(inputs):
        x.requires_grad_(i in needs)
    log_prob = normal_log_prob(*inputs, squash=(-1.0, 1.0), backend=any_backend)
    found = torch.autograd.grad(log_prob.sum(), [inputs[i] for i in needs])
    torch.testing.assert_close(found, tuple(expected[i] for i in needs), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["not squashed", "to ±1"])
@pytest.mark.parametrize("output", [0, 1])
@pytest.mark.parametrize("wanted", [0, 1])
def test_either_output_of_a_draw_has_its_own_gradient(any_backend, device, kind, output, wanted) -> None:
    inputs = points(kind, device)[:2]
    results = []
    for name in (any_backend, "reference"):
        leaf = leaves(inputs)
        leaf[1 - wanted].requires_grad_(False)
        out = functions_of(kind, device, name)["sample"](*leaf, None)[output]
        if not out.requires_grad:  # log π(a) of a plain Gaussian's draw doesn't depend on loc
            assert name != "triton"
            out = out + 0 * leaf[wanted].sum()
        results += torch.autograd.grad(out.square().sum(), leaf[wanted])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_noise_and_bounds_are_constants(any_backend, device) -> None:
    loc, scale, noise = leaves(problem(device=device))
    bounds = [x.requires_grad_() for x in (-torch.ones(3, device=device), torch.ones(3, device=device))]
    outputs = (
        *normal_sample(loc, scale, noise, squash=tuple(bounds), backend=any_backend),
        normal_log_prob(loc, scale, torch.zeros_like(loc), squash=tuple(bounds), backend=any_backend),
    )
    found = torch.autograd.grad(sum(x.sum() for x in outputs), (noise, *bounds), allow_unused=True)
    assert found == (None, None, None)


def test_forward_mode_goes_through_the_composition(any_backend, device) -> None:
    inputs = [x.detach() for x in points("to ±1", device)]
    tangents = tuple(torch.randn_like(x) for x in inputs)
    call = functions_of("to ±1", device, any_backend)["log_prob"]
    _, found = torch.func.jvp(call, tuple(inputs), tangents)
    gradients = torch.autograd.functional.jvp(call, tuple(inputs), tangents)[1]
    torch.testing.assert_close(found, gradients, rtol=1e-10, atol=1e-12)


def totals(backend, device):
    """By name, a sum of what is computed from x, some of which lies past the margin, and x."""
    loc, scale, x = problem((4, 2), device=device)
    x[0] = torch.tensor([30.0, -2.5])
    options = {"margin": 0.1, "backend": backend}

    def of_draw(x: torch.Tensor) -> torch.Tensor:
        action, log_prob = normal_sample(x, scale, loc, squash=(-1.0, 2.0), **options)
        return action.square().sum() + log_prob.square().sum()

    def of_action(squash):
        return lambda a: normal_log_prob(loc, scale, a, squash=squash, **options).square().sum()

    action = x.clamp(-1.5, 1.5)
    return {"draw": (of_draw, x), "action": (of_action((-1.1, 1.2)), action), "±1": (of_action((-1.0, 1.0)), action)}


REPEATED = {
    "grad(grad)": lambda f: grad(lambda x: grad(f)(x).sum()),
    "jacrev(jacrev)": lambda f: lambda x: jacrev(jacrev(f))(x).sum((0, 1)),
    "jacrev(grad)": lambda f: lambda x: jacrev(grad(f))(x).sum((0, 1)),
    "jacfwd(jacrev)": lambda f: lambda x: jacfwd(jacrev(f))(x).sum((0, 1)),
    "jacrev(jacfwd)": lambda f: lambda x: jacrev(jacfwd(f))(x).sum((0, 1)),
    "jacfwd(jacfwd)": lambda f: lambda x: jacfwd(jacfwd(f))(x).sum((0, 1)),
}


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("case", ["draw", "action", "±1"])
@pytest.mark.parametrize("repeated", REPEATED)
def test_transforms_differentiate_twice_as_autograd_does(device, backend, repeated, case) -> None:
    """At the margin as well, where the slope is that of the value that is kept, in forward mode too."""
    total, x = totals(backend, device)[case]
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total(leaf), leaf, create_graph=True)
    (expected,) = torch.autograd.grad(gradient.sum(), leaf)
    torch.testing.assert_close(REPEATED[repeated](total)(x), expected, rtol=1e-9, atol=1e-12)
    for once in (grad, jacfwd):
        torch.testing.assert_close(once(total)(x), gradient.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", ["draw", "action", "±1"])
def test_a_forward_gradient_is_that_of_the_value_that_is_kept(any_backend, device, case) -> None:
    """Without torch.func, too."""
    total, x = totals(any_backend, device)[case]
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total(leaf), leaf)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(total(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
    torch.testing.assert_close(found, gradient.sum(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("squash", [(-1.0, 1.0), (-1.1, 1.2)])
def test_an_action_past_the_margin_has_its_gradient_within_vmap(device, backend, squash) -> None:
    """A batched action doesn't say that its gradient is wanted."""
    loc, scale, action = leaves(problem((4, 2), device=device))

    def log_prob(*x: torch.Tensor) -> torch.Tensor:
        return normal_log_prob(*x, squash=squash, margin=0.1, backend=backend)

    assert (action.abs() > 1).any()
    (expected,) = torch.autograd.grad(log_prob(loc, scale, action).sum(), action)
    (found,) = torch.autograd.grad(torch.vmap(log_prob)(loc, scale, action).sum(), action)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("case", ["draw", "action", "±1"])
def test_a_transform_within_compiled_code_gives_the_same_gradient(device, backend, case) -> None:
    torch._dynamo.reset()
    total, x = totals(backend, device)[case]
    found = torch.compile(grad(total), fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, grad(total)(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_transforms_see_an_infinite_x_at_the_margin(device, backend) -> None:
    loc = torch.tensor([[math.inf, -math.inf, 0.0]], device=device)
    noise, scale = torch.zeros_like(loc), torch.ones_like(loc)
    found = torch.vmap(lambda x: normal_sample(x, scale[0], noise[0], squash=(-1.0, 1.0), backend=backend)[0])(loc)
    expected, _ = normal_sample(loc, scale, noise, squash=(-1.0, 1.0), backend=backend)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# --- compiled, counted, watched ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "compiler"),
    [("not squashed", "aot_eager"), ("to ±1", "aot_eager"), ("per dimension", "aot_eager"), ("to ±1", "inductor")],
)
def test_compiled_equals_eager(backend, device, kind, compiler) -> None:
    torch._dynamo.reset()
    loc, scale, noise = problem((4, 3), device=device)
    squash = squash_of(kind, 3, device)
    # Saturated as well: the slope at the margin must survive the compiler.
    loc[0] = 20

    def loss(loc, scale, noise):
        action, log_prob = normal_sample(loc * 1, scale * 1, noise, squash=squash, backend=backend)
        again = normal_log_prob(loc, scale, action.detach(), squash=squash, backend=backend)
        return (action * noise).sum() + 1e-3 * log_prob.square().sum() + 1e-9 * again.sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend=compiler)):
        inputs = leaves((loc, scale))
        value = function(*inputs, noise)
        results.append((value, *torch.autograd.grad(value, inputs)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)


class Count(TorchDispatchMode):
    """Counts operators that launch something: neither views nor allocations."""

    FREE = ("view", "expand", "unsqueeze", "detach", "squeeze", "alias", "empty", "t", "_unsafe_view")

    def __enter__(self):
        self.seen = Counter()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name.rstrip("_") not in self.FREE:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("kind", "function", "forward", "backward"),
    [
        ("not squashed", "log_prob", 6, 14),
        ("not squashed", "sample", 5, 5),
        ("to ±1", "log_prob", 11, 14),
        ("to ±1", "sample", 10, 12),
        ("numbers", "log_prob", 13, 14),
        ("numbers", "sample", 12, 13),
    ],
)
def test_the_torch_backend_makes_do_with_few_operations(device, kind, function, forward, backward) -> None:
    """Backward includes the sums of what a parameter gets from several places."""
    loc, scale, action = points(kind, device)
    call = functions_of(kind, device, "torch")[function]
    call(loc, scale, action)
    with Count() as counted:
        outputs = call(loc, scale, action.detach())
    assert counted.seen.total() == forward, counted.seen
    outputs = (outputs,) if function == "log_prob" else outputs
    grads = [torch.ones_like(x) for x in outputs]
    with Count() as counted:
        torch.autograd.grad(outputs, (loc, scale), grads)
    assert counted.seen.total() == backward, counted.seen


@pytest.mark.parametrize("function", ["log_prob", "sample"])
def test_the_kernels_are_one_launch_forward_and_one_backward(monkeypatch, device, function) -> None:
    from helpers_launches import launched

    launches = launched(monkeypatch)
    loc, scale, action = points("per dimension", device)
    call = functions_of("per dimension", device, "triton")[function]
    with Count() as counted:
        outputs = call(loc, scale, action)
        outputs = (outputs,) if function == "log_prob" else outputs
        grads = [torch.ones_like(x) for x in outputs]
        torch.autograd.grad(outputs, (loc, scale), grads)
    assert len(launches) == len(set(launches)) == 2
    del counted.seen["ones_like"]
    assert counted.seen == {f"normal_{function}": 1, f"normal_{function}_backward": 1}


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_nothing_waits_on_the_host(backend) -> None:
    """Fake tensors have no data: reading any would raise."""
    with torch._subclasses.FakeTensorMode():
        loc, scale, action = (torch.rand(4, 3).requires_grad_() for _ in range(3))
        squash = (torch.full((3,), -1.0), torch.ones(3))
        drawn, log_prob = normal_sample(loc, scale, action, squash=squash, backend=backend)
        again = normal_log_prob(loc, scale, action, squash=squash, backend=backend)
        found = torch.autograd.grad(drawn.sum() + log_prob.sum() + again.sum(), (loc, scale, action))
    assert [g.shape for g in found] == [(4, 3)] * 3


# --- verify -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", SQUASHES)
def test_verify_accepts_what_is_right(device, dtype, kind) -> None:
    """Saturated actions included."""
    squash = squash_of(kind, 3, device)
    inputs = leaves(problem((100, 3), dtype=dtype, device=device, spread=4.0))
    action, log_prob = normal_sample(*inputs[:2], inputs[2].detach(), squash=squash, backend="verify")
    (action.sum() + log_prob.sum()).backward()
    inputs[2] = action.detach().requires_grad_()
    normal_log_prob(*inputs, squash=squash, backend="verify").sum().backward()


def test_verify_gives_the_compiler_the_layouts_that_the_operators_promise(device, monkeypatch) -> None:
    monkeypatch.setattr(squashed_normal_verify, "fastest_backend", lambda _: "torch")  # whose results follow inputs

    def flat(loc, scale, noise):
        action, log_prob = normal_sample(loc, scale, noise, squash=(-1.0, 1.0), backend="verify")
        again = normal_log_prob(loc, scale, noise.tanh(), squash=(-1.0, 1.0), backend="verify")
        return torch.cat([x.mul(2).reshape(-1) for x in (action, log_prob, again)])

    loc, scale, noise = (x.permute(1, 2, 0) for x in problem((2, 4, 3), device=device))
    inputs = [loc.detach().requires_grad_(), scale.detach().requires_grad_()]
    expected = torch.autograd.grad(flat(*inputs, noise).square().sum(), inputs)
    found = torch.autograd.grad(torch.compile(flat, fullgraph=True)(*inputs, noise).square().sum(), inputs)
    for gradient, wanted in zip(found, expected, strict=True):
        assert_close(gradient, wanted, torch.float64)


@pytest.mark.parametrize("function", ["log_prob", "sample"])
@pytest.mark.parametrize("broken", ["forward", "backward"])
def test_verify_names_the_element_that_is_wrong(monkeypatch, device, function, broken) -> None:
    loc, scale, action = points("to ±1", device)
    module = squashed_normal_operators.backend_module("triton")
    if fastest_backend(loc) != "triton":
        pytest.skip("the kernels don't run here")
    name = function if broken == "forward" else f"{function}_backward"
    right = getattr(module, name)

    def wrong(*inputs):
        found = right(*inputs)
        (found if isinstance(found, torch.Tensor) else found[0])[1] += 0.5
        return found

    monkeypatch.setattr(module, name, wrong)

    def run() -> None:
        found = functions_of("to ±1", device, None)[function](loc, scale, action)
        (found if function == "log_prob" else found[1]).sum().backward()

    with use_backend("verify"), pytest.raises(VerificationError, match=r"at index \(1,"):
        run()


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"loc": torch.zeros(())}, RuntimeError, r"loc has no dimension"),
        ({"scale": torch.ones(3)}, RuntimeError, r"scale has shape \(3,\).*loc has shape \(4, 3\)"),
        ({"third": torch.zeros(4, 1)}, RuntimeError, r"(action|noise) has shape \(4, 1\)"),
        ({"scale": torch.ones(4, 3, device="meta")}, RuntimeError, "scale has .* on meta"),
        ({"loc": 0.0}, TypeError, "loc must be a tensor, but is 0.0"),
        ({"third": None}, TypeError, "(action|noise) must be a tensor, but is None"),
        ({"third": torch.zeros(4, 3).long()}, TypeError, r"(action|noise) torch.int64"),
        ({"squash": (1.0, 1.0)}, ValueError, r"squash is \(1.0, 1.0\)"),
        ({"squash": (torch.zeros(2), 1.0)}, RuntimeError, r"low of squash has shape \(2,\)"),
        ({"squash": (-1.0, torch.ones(4, 4, 3))}, RuntimeError, r"high of squash has shape \(4, 4, 3\)"),
        ({"squash": (torch.zeros(3, device="meta"), 1.0)}, RuntimeError, "low of squash is on meta"),
        ({"squash": 1.0}, TypeError, r"squash must be a pair \(low, high\), but is 1.0"),
        ({"squash": (-1.0, 0.0, 1.0)}, TypeError, r"squash must be a pair \(low, high\), but is \(-1.0, 0.0, 1.0\)"),
        ({"squash": ([-1.0] * 3, [1.0] * 3)}, TypeError, r"low of squash must be a number or a tensor, but is \["),
        ({"squash": (-1.0, None)}, TypeError, "high of squash must be a number or a tensor, but is None"),
        ({"squash": (-1.0, 1.0), "margin": 1.0}, ValueError, "margin is 1.0"),
        ({"squash": (-1.0, 1.0), "margin": -0.1}, ValueError, "margin is -0.1"),
        ({"backend": "cuda"}, ValueError, "backend is 'cuda'"),
    ],
)
@pytest.mark.parametrize("function", ["log_prob", "sample"])
def test_a_bad_argument_is_named_before_anything_runs(monkeypatch, function, change, error, message) -> None:
    monkeypatch.setattr(squashed_normal_operators, "_COMPOSITIONS", {})
    monkeypatch.setattr(squashed_normal_operators, "backend_module", None)
    arguments = {"loc": torch.zeros(4, 3), "scale": torch.ones(4, 3), "third": torch.zeros(4, 3), **change}
    arguments["action" if function == "log_prob" else "noise"] = arguments.pop("third")
    with pytest.raises(error, match=message):
        (normal_log_prob if function == "log_prob" else normal_sample)(**arguments)


def test_verify_allows_for_the_rounding_of_a_gradient_to_the_dtype_of_its_input(device) -> None:
    generator = torch.Generator().manual_seed(0)
    loc, scale, action = (torch.randn(4000, 3, generator=generator).to(device) for _ in range(3))
    loc = loc.bfloat16().requires_grad_()
    normal_log_prob(loc, scale.exp(), action.tanh(), squash=(-2.0, 2.0), backend="verify").sum().backward()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_transforms_see_through(device, backend) -> None:
    loc, scale, action = problem((4, 3), device=device)
    for squash in ((-1.0, 1.0), (-2.0, 2.0)):

        def log_prob(*x, squash=squash):
            return normal_log_prob(*x, squash=squash, backend=backend)

        torch.testing.assert_close(torch.vmap(log_prob)(loc, scale, action), log_prob(loc, scale, action))
        drawn, found = torch.vmap(lambda *x, s=squash: normal_sample(*x, squash=s, backend=backend))(loc, scale, action)
        torch.testing.assert_close((drawn, found), normal_sample(loc, scale, action, squash=squash, backend=backend))


def test_the_noise_is_a_constant_in_forward_mode_too(device) -> None:
    loc, scale, noise = problem((4, 3), device=device)
    _, along = torch.func.jvp(lambda x: normal_sample(loc, scale, x)[0], (noise,), (torch.ones_like(noise),))
    assert not along.any()
