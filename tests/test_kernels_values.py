"""Every fast backend gives the values of the reference loop in float64."""

import math
from collections.abc import Callable

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from fusedrl import kernels
from hypothesis import given, settings
from hypothesis.extra.numpy import array_shapes
from torch import Tensor

# Rounding of the computation, relative to the largest magnitude in a row: up to 1000 additions of one rounding each
# in float32 or float64; the half types add the rounding of the result to their own precision.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

ESTIMATORS: dict[str, Callable[..., object]] = {
    "gae": lambda g, lam, v, nv, r, d, t, **kw: kernels.gae(g, lam, v, nv, r, d, t, **kw),
    "td_lambda": lambda g, lam, v, nv, r, d, t, **kw: kernels.td_lambda_return(g, lam, nv, r, d, t, **kw),
    "td1": lambda g, lam, v, nv, r, d, t, **kw: kernels.td1_return(g, nv, r, d, t, **kw),
    "fixed": lambda g, lam, v, nv, r, d, t, **kw: kernels.fixed_discount_td_lambda_return(g, lam, nv, r, d, t, **kw),
    "reward_to_go": lambda g, lam, v, nv, r, d, t, **kw: kernels.reward_to_go(g, r, d, **kw),
    "reverse_scan": lambda g, lam, v, nv, r, d, t, **kw: kernels.reverse_scan(g, r, **kw),
}


def as_tuple(x: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


def assert_equal_in_scale(found: Tensor, expected: Tensor, dtype: torch.dtype, inputs: list[Tensor], dim: int) -> None:
    assert found.shape == expected.shape
    assert found.dtype == dtype
    if not expected.numel():
        return
    scale = sum(x.double().nan_to_num(0).abs().amax(dim, keepdim=True) for x in (*inputs, expected))
    error = (found.double() - expected).abs()
    worst = (error / scale).max().item()
    assert worst <= TOLERANCE[dtype], f"error {worst} of the row's scale"


def problem(shape: tuple[int, ...], dtype: torch.dtype, seed: int, device: torch.device, done_rate: float = 0.2):
    """Value, next value (NaN where it must not be read), reward, done and terminated."""
    generator = torch.Generator().manual_seed(seed)
    value, next_value, reward = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    done, terminated = (torch.rand(shape, generator=generator).to(device) < rate for rate in (done_rate, 0.1))
    next_value[terminated] = math.nan
    return value, next_value, reward, done, terminated


def scalar(kind: str, value: float, shape: tuple[int, ...], dtype: torch.dtype, seed: int, device: torch.device):
    """γ or λ as a number, a 0-d tensor, one value per step, or one value per leading index."""
    if kind == "number":
        return value
    if kind == "0-d":
        return torch.tensor(value, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(seed)
    if kind == "first axis":
        shape = (shape[0],) + (1,) * (len(shape) - 1)
    return torch.rand(shape, generator=generator).to(device, dtype)


def to_double(x: object) -> object:
    return x.double() if isinstance(x, Tensor) and x.dtype != torch.bool else x


@given(
    shape=array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=3).flatmap(
        lambda s: st.tuples(st.just(s), st.integers(0, len(s) - 1), st.sampled_from([1, 2, 5, 17, 130]))
    ),
    dtype=st.sampled_from(list(TOLERANCE)),
    estimator=st.sampled_from(sorted(ESTIMATORS)),
    gamma=st.tuples(st.sampled_from(["number", "0-d", "per step", "first axis"]), st.sampled_from([0.0, 0.9, 1.0])),
    lmbda=st.tuples(st.sampled_from(["number", "0-d", "per step", "first axis"]), st.sampled_from([0.0, 0.7, 1.0])),
    mask_dtype=st.sampled_from([torch.bool, torch.uint8, torch.int64, torch.float32]),
    with_terminated=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None, derandomize=True)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_values_agree_with_the_reference(
    backend, device, shape, dtype, estimator, gamma, lmbda, mask_dtype, with_terminated, seed
) -> None:
    small, time_dim, steps = shape
    if estimator == "fixed":
        steps = min(steps, 5)
    shape = (*small[:time_dim], steps, *small[time_dim + 1 :])
    value, next_value, reward, done, terminated = problem(shape, dtype, seed, device)
    gamma, lmbda = (scalar(*s, shape, dtype, seed + i, device) for i, s in enumerate((gamma, lmbda), start=1))
    if with_terminated:
        masks = (done.to(mask_dtype), terminated.to(mask_dtype))
    else:
        masks = ((done | terminated).to(mask_dtype), None)
    estimate = ESTIMATORS[estimator]
    found = as_tuple(estimate(gamma, lmbda, value, next_value, reward, *masks, time_dim=time_dim, backend=backend))
    expected = as_tuple(
        estimate(
            *(to_double(x) for x in (gamma, lmbda, value, next_value, reward)),
            *masks,
            time_dim=time_dim,
            backend="reference",
        )
    )
    for one, other in zip(found, expected, strict=True):
        assert_equal_in_scale(one, other, dtype, [value, next_value, reward], time_dim)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 4)])
def test_no_steps_or_no_rows_give_an_empty_result(backend, device, shape) -> None:
    empty = torch.zeros(shape, device=device, requires_grad=True)
    done = torch.zeros(shape, dtype=torch.bool, device=device)
    gamma = torch.tensor(0.9, device=device, requires_grad=True)
    advantage, target = kernels.gae(gamma, 0.9, empty, empty, empty, done, time_dim=0, backend=backend)
    assert advantage.shape == target.shape == shape
    (advantage.sum() + target.sum()).backward()
    assert gamma.grad == 0


@pytest.mark.parametrize("lmbda", [1.0, 0.95])
def test_a_long_row_without_discount_is_exact(device, backend, lmbda) -> None:
    steps = 20_000 if backend == "triton" and device.type == "cpu" else 100_000  # the interpreter is slow
    reward = torch.randn(steps, dtype=torch.float64, device=device)
    done = torch.zeros(steps, dtype=torch.bool, device=device)
    zero = torch.zeros_like(reward)
    advantage, _ = kernels.gae(1.0, lmbda, zero, zero, reward, done, backend=backend)
    expected = [0.0]
    for r in reversed(reward.tolist()):
        expected.append(r + lmbda * expected[-1])
    assert torch.allclose(advantage.cpu(), torch.tensor(expected[:0:-1], dtype=torch.float64), rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("make", [lambda s: s, torch.tensor], ids=["number", "0-d tensor"])
def test_gamma_keeps_float64_precision(backend, device, make) -> None:
    gamma = 1 - 2**-40  # rounds to 1 in float32
    reward = torch.ones(2, dtype=torch.float64, device=device)
    gamma_argument = (
        make(gamma) if make is not torch.tensor else torch.tensor(gamma, dtype=torch.float64, device=device)
    )
    returns = kernels.reward_to_go(gamma_argument, reward, torch.zeros_like(reward), backend=backend)
    assert returns[0].item() == 1 + gamma


@pytest.mark.parametrize("gamma", [0.0, 1e-9])
def test_a_vanishing_discount_is_exact(backend, device, gamma) -> None:
    value, next_value, reward, done, terminated = problem((3, 9), torch.float64, 0, device)
    advantage, _ = kernels.gae(gamma, 0.5, value, next_value, reward, done, terminated, backend=backend)
    one_step = reward + torch.where(terminated, 0, gamma * next_value) - value
    assert torch.allclose(advantage, one_step, rtol=0, atol=1e-8)


def test_integer_rewards_are_computed_in_floating_point(backend, device) -> None:
    reward = torch.tensor([1, 2, 3], device=device)
    returns = kernels.reward_to_go(0.5, reward, torch.tensor([0, 0, 1], device=device), backend=backend)
    assert returns.tolist() == [2.75, 3.5, 3.0]


def test_mixed_dtypes_promote(backend, device) -> None:
    value, next_value, reward, done, _ = problem((3, 9), torch.float32, 0, device)
    next_value = next_value.nan_to_num()
    advantage, target = kernels.gae(0.9, 0.9, value.bfloat16(), next_value.half(), reward, done, backend=backend)
    expected, _ = kernels.gae(
        0.9, 0.9, value.bfloat16().double(), next_value.half().double(), reward.double(), done, backend="reference"
    )
    assert advantage.dtype == target.dtype == torch.float32
    assert torch.allclose(advantage.double(), expected, atol=1e-5)


def test_results_are_bitwise_reproducible(backend, device) -> None:
    value, next_value, reward, done, terminated = problem((2, 3000), torch.float32, 0, device)
    runs = [kernels.gae(0.99, 0.95, value, next_value, reward, done, terminated, backend=backend) for _ in range(2)]
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(*runs, strict=True))


def test_hand_computed_advantages(backend, device) -> None:
    """δ = [1 − 1 + 0.5·2, 1 − 2 (terminated), 1 − 3 + 0.5·4], γλ = 1/4."""
    advantage, target = kernels.gae(
        0.5,
        0.5,
        torch.tensor([1.0, 2.0, 3.0], device=device),
        torch.tensor([2.0, math.nan, 4.0], device=device),
        torch.ones(3, device=device),
        torch.zeros(3, dtype=torch.bool, device=device),
        torch.tensor([False, True, False], device=device),
        backend=backend,
    )
    assert advantage.tolist() == [0.75, -1.0, 0.0]
    assert target.tolist() == [1.75, 1.0, 3.0]


def test_hand_computed_td_lambda_returns(backend, device) -> None:
    """G₂ = 1 + 4/2: the last step bootstraps although it isn't done. G₁ = 1. G₀ = 1 + ½(½·2 + ½·1)."""
    returns = kernels.td_lambda_return(
        0.5,
        0.5,
        torch.tensor([2.0, math.nan, 4.0], device=device),
        torch.ones(3, device=device),
        torch.zeros(3, dtype=torch.bool, device=device),
        torch.tensor([False, True, False], device=device),
        backend=backend,
    )
    assert returns.tolist() == [1.75, 1.0, 3.0]


@pytest.mark.parametrize("name", ["value", "next_value", "reward", "done", "terminated"])
def test_an_array_is_told_to_be_no_tensor(name):
    arguments = {x: torch.ones(3) for x in ("value", "next_value", "reward", "done", "terminated")}
    arguments[name] = np.ones(3)
    with pytest.raises(TypeError, match=f"{name} must be a real tensor"):
        kernels.gae(0.9, 0.9, **arguments)


@pytest.mark.parametrize("dim", [1.0, "time", None])
def test_a_time_dim_that_is_no_int_is_named(dim):
    with pytest.raises(TypeError, match=f"time_dim must be an int, but is {dim!r}"):
        kernels.reverse_scan(0.9, torch.ones(3, 2), time_dim=dim)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("number", [1.0, -1.0])
def test_a_step_that_is_done_or_terminal_alone_ends_the_trajectory(backend, device, number) -> None:
    def advantage(done: torch.Tensor, terminated: torch.Tensor) -> list[float]:
        one = torch.ones(3, device=device)
        return kernels.gae(0.5, 1.0, 0 * one, 0 * one, one, done, terminated, backend=backend)[0].tolist()

    ends, never = torch.tensor([[0.0, number, 0.0], [0.0, 0.0, 0.0]], device=device)
    assert advantage(never, never) == [1.75, 1.5, 1.0]
    assert advantage(ends, never) == advantage(never, ends) == [1.5, 1.0, 1.0]
