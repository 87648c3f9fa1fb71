"""Gradients of every backend, through the real kernels: first and second order, all inputs, all layouts of γ and λ."""

import math
from itertools import product

import pytest
import torch
from fusedrl import kernels
from fusedrl.kernels import scan_vectorized

CASES = {
    "gae": lambda g, lam, r, v, nv, d, t, **kw: kernels.gae(g, lam, v, nv, r, d, t, **kw),
    "td_lambda": lambda g, lam, r, v, nv, d, t, **kw: kernels.td_lambda_return(g, lam, nv, r, d, t, **kw),
    "fixed": lambda g, lam, r, v, nv, d, t, **kw: kernels.fixed_discount_td_lambda_return(g, lam, nv, r, d, t, **kw),
    "reward_to_go": lambda g, lam, r, v, nv, d, t, **kw: kernels.reward_to_go(g, r, d, **kw),
    "reverse_scan": lambda g, lam, r, v, nv, d, t, **kw: kernels.reverse_scan(g, r, **kw),
}
SHAPES = {"0-d": (), "per step": (2, 5, 2), "per row": (2, 1, 1)}


def inputs(scalar_shape: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    leaves = [
        torch.rand(shape, generator=generator, dtype=torch.float64).to(device).requires_grad_()
        for shape in (scalar_shape, scalar_shape, *[(2, 5, 2)] * 3)
    ]
    masks = [(torch.rand(2, 5, 2, generator=generator) < 0.3).to(device) for _ in range(2)]
    return (*leaves, *masks)


@pytest.mark.parametrize(
    ("backend", "estimator", "scalar_shape"),
    # At a fixed discount the backward pass is composed of scans: the interpreter takes half a minute for each shape.
    [
        (b, e, s)
        for b, e, s in product(("torch", "triton"), CASES, SHAPES)
        if (b, e) != ("triton", "fixed") or s == "per step"
    ],
)
def test_gradcheck(backend, device, estimator, scalar_shape) -> None:
    *leaves, done, terminated = inputs(SHAPES[scalar_shape], device)
    assert torch.autograd.gradcheck(
        lambda *x: CASES[estimator](*x, done, terminated, time_dim=1, backend=backend), leaves, fast_mode=True
    )


@pytest.mark.parametrize(
    ("backend", "estimator"),
    # Second order is composed of scans, so two estimators reach all of it; the interpreter takes seconds for each.
    [("triton", "reverse_scan"), ("triton", "gae"), *((b, e) for b in ("torch", "reference") for e in CASES)],
)
def test_gradgradcheck(backend, device, estimator) -> None:
    *leaves, done, terminated = inputs((), device)
    assert torch.autograd.gradgradcheck(
        lambda *x: CASES[estimator](*x, done, terminated, time_dim=1, backend=backend), leaves, fast_mode=True
    )


@pytest.mark.parametrize("estimator", CASES)
def test_gradients_made_to_be_differentiated_are_the_same_gradients(backend, device, estimator) -> None:
    """gradgradcheck compares these with themselves; here they meet the kernels'."""
    *leaves, done, terminated = inputs((), device)
    outputs = CASES[estimator](*leaves, done, terminated, time_dim=1, backend=backend)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum((i + 1) * x.square().sum() for i, x in enumerate(outputs))
    plain, again = (
        torch.autograd.grad(loss, leaves, retain_graph=True, create_graph=create, allow_unused=True)
        for create in (False, True)
    )
    for one, other in zip(plain, again, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("estimator", ["gae", "td_lambda", "fixed"])
def test_an_input_computed_from_another_gives_that_one_its_gradient_once(backend, device, estimator) -> None:
    gamma, _, reward, value, _, done, terminated = inputs((), device)

    def total() -> torch.Tensor:
        found = CASES[estimator](
            gamma, gamma, reward, value, value.roll(-1, 1), done, terminated, time_dim=1, backend=backend
        )
        return torch.stack(found if isinstance(found, tuple) else (found,)).square().sum()

    plain = torch.autograd.grad(total(), (gamma, value))
    again = torch.autograd.grad(total(), (gamma, value), create_graph=True)
    torch.testing.assert_close(again, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("needs", range(1, 32))
def test_every_subset_of_inputs_gets_its_gradients(backend, device, needs) -> None:
    *leaves, done, terminated = inputs((), device)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(bool(needs >> i & 1))
    wanted = [leaf for leaf in leaves if leaf.requires_grad]

    def gradients(name: str) -> tuple[torch.Tensor, ...]:
        advantage, target = CASES["gae"](*leaves, done, terminated, time_dim=1, backend=name)
        return torch.autograd.grad((advantage**2).sum() + 3 * target.sum(), wanted)

    for found, expected in zip(gradients(backend), gradients("reference"), strict=True):
        assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("use", ["advantage", "target"])
def test_one_output_may_be_used_alone(backend, device, use) -> None:
    *leaves, done, terminated = inputs((), device)

    def gradients(name: str) -> tuple[torch.Tensor, ...]:
        outputs = CASES["gae"](*leaves, done, terminated, time_dim=1, backend=name)
        return torch.autograd.grad((outputs[use == "target"] ** 2).sum(), leaves, allow_unused=True)

    for found, expected in zip(gradients(backend), gradients("reference"), strict=True):
        assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_a_nan_next_value_of_a_terminal_step_reaches_no_gradient(backend, device) -> None:
    gamma, lmbda, reward, value, next_value, done, terminated = inputs((), device)
    poisoned = torch.where(terminated, math.nan, next_value.detach()).requires_grad_()
    advantage, target = kernels.gae(
        gamma, lmbda, value, poisoned, reward, done, terminated, time_dim=1, backend=backend
    )
    gradients = torch.autograd.grad((advantage * target).sum(), [gamma, lmbda, reward, value, poisoned])
    assert all(g.isfinite().all() for g in gradients)
    assert (gradients[-1][terminated] == 0).all()


def test_forward_mode_is_refused_rather_than_wrong(backend, device) -> None:
    *leaves, done, terminated = inputs((), device)
    gamma, lmbda, reward, value, next_value = (x.detach() for x in leaves)

    def advantage(reward: torch.Tensor) -> torch.Tensor:
        return kernels.gae(gamma, lmbda, value, next_value, reward, done, terminated, time_dim=1, backend=backend)[0]

    with pytest.raises((NotImplementedError, RuntimeError), match="jvp"):
        torch.func.jvp(advantage, (reward,), (torch.ones_like(reward),))


@pytest.mark.parametrize("time_dim", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_long_rows(monkeypatch, backend, device, time_dim, dtype) -> None:
    """Rows longer than a tile: the torch backend carries from tile to tile, the Triton kernel splits them."""
    monkeypatch.setattr(scan_vectorized, "_TILE", 500)
    shape = (1300, 2) if time_dim == 0 else (2, 1300)
    generator = torch.Generator().manual_seed(0)
    reward, value, next_value = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    done = (torch.rand(shape, generator=generator) < 0.01).to(device)
    gamma = torch.tensor(0.99, device=device)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2  # sums of 2600 terms; two roundings of bfloat16

    def gradients(name: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        # γ stays as it is: rounding it to bfloat16 would make another problem.
        leaves = [
            x.detach().clone().requires_grad_() for x in (gamma, *(x.to(dtype) for x in (reward, value, next_value)))
        ]
        g, r, v, nv = leaves
        advantage, target = kernels.gae(g, 0.95, v, nv, r, done, time_dim=time_dim, backend=name)
        return torch.autograd.grad(advantage.double().square().mean() + target.double().mean(), leaves)

    for found, expected in zip(gradients(backend, dtype), gradients("reference", torch.float64), strict=True):
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def differentiable_and_not(function, leaves):
    """The gradients of the sum of ``function`` of the leaves, made with a graph of their own and without."""
    return [torch.autograd.grad(function(*leaves).sum(), leaves, create_graph=graph) for graph in (True, False)]


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16], ids=str)
@pytest.mark.parametrize("estimator", ["fixed", "reward_to_go", "td_lambda"])
def test_gradients_with_a_graph_are_as_precise_and_of_rewards_of_any_dtype(backend, device, estimator, dtype) -> None:
    gamma = torch.tensor([[0.9, 0.7, 0.8]], device=device).requires_grad_()
    reward = torch.tensor([[1, 2, 3]], dtype=dtype, device=device)
    done, next_value = torch.zeros(1, 3, dtype=torch.bool, device=device), torch.ones(1, 3, device=device)

    def function(gamma):
        return CASES[estimator](gamma, 0.5, reward, next_value, next_value, done, done, backend=backend)

    with_graph, plain = differentiable_and_not(function, [gamma])
    # Without a graph, what a backward pass reads of a half-precision result was rounded.
    tolerance = 2e-3 if dtype == torch.float16 else 1e-6
    torch.testing.assert_close(with_graph, plain, rtol=tolerance, atol=tolerance)
    assert plain[0].abs().max() > 1


@pytest.mark.parametrize("estimator", ["gae", "td_lambda", "fixed"])
def test_a_terminal_nan_stays_out_of_gradients_with_a_graph(backend, device, estimator) -> None:
    gamma = torch.tensor([[0.9]], device=device).expand(1, 3).clone().requires_grad_()
    next_value = torch.tensor([[1.0, torch.nan, 2.0]], device=device)
    ended = torch.tensor([[False, True, False]], device=device)
    one = torch.ones(1, 3, device=device)
    with_graph, plain = differentiable_and_not(
        lambda g: _first(CASES[estimator](g, 0.5, one, one, next_value, ended, ended, backend=backend)), [gamma]
    )
    assert plain[0].isfinite().all()
    torch.testing.assert_close(with_graph, plain)


def _first(outputs):
    return outputs if isinstance(outputs, torch.Tensor) else outputs[0]


def test_gradients_with_a_graph_keep_the_precision_of_float64_where_lambda_is_a_number(device) -> None:
    next_value = torch.randn(1, 4, dtype=torch.float64, device=device).requires_grad_()
    zero, done = torch.zeros_like(next_value), torch.zeros(1, 4, dtype=torch.bool, device=device)
    with_graph, plain = differentiable_and_not(
        lambda nv: kernels.td_lambda_return(0.9, 0.7, nv, zero.detach(), done, backend="torch"), [next_value]
    )
    torch.testing.assert_close(with_graph, plain, rtol=1e-14, atol=0)


@pytest.mark.parametrize("estimator", CASES)
def test_gradients_with_a_graph_of_no_steps_are_zero(backend, device, estimator) -> None:
    gamma = torch.rand(2, 1, device=device).requires_grad_()
    empty, done = torch.ones(2, 0, device=device), torch.zeros(2, 0, dtype=torch.bool, device=device)
    for (gradient,) in differentiable_and_not(
        lambda g: _first(CASES[estimator](g, 0.5, empty, empty, empty, done, done, backend=backend)), [gamma]
    ):
        assert gradient.shape == (2, 1)
        assert not gradient.any()
