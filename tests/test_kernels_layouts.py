"""Any strides run without a copy, every element is written, and bad arguments are named before anything runs."""

import math

import pytest
import torch
from fusedrl import kernels
from fusedrl.kernels import launching
from fusedrl.kernels.scan_launch import lay_out, tiling
from helpers_launches import plan_with

LAYOUTS = {
    "[B, T]": (lambda: torch.randn(5, 9), 1),
    "[B, T, 1]": (lambda: torch.randn(5, 9, 1), 1),
    "[B, T, F]": (lambda: torch.randn(2, 9, 3), 1),
    "[B1, B2, T, F]": (lambda: torch.randn(2, 2, 9, 3), 2),
    "[T, N]": (lambda: torch.randn(9, 5), 0),
    "[T]": (lambda: torch.randn(9), 0),
    "transposed": (lambda: torch.randn(9, 5).t(), 1),
    "sliced": (lambda: torch.randn(10, 20)[::2, 1:19:2], 1),
    "expanded": (lambda: torch.randn(1, 9).expand(5, 9), 1),
    "permuted": (lambda: torch.randn(3, 9, 2).permute(2, 1, 0), 1),
    "slices that don't merge": (lambda: torch.randn(3, 3, 9, 4)[:2, :2, :, :3], 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mixed", [False, True], ids=["one layout", "mixed layouts"])
def test_any_strides_give_the_same_numbers(backend, device, layout, mixed) -> None:
    make, time_dim = LAYOUTS[layout]
    torch.manual_seed(0)
    value, next_value, reward = (make().to(device, torch.float64) for _ in range(3))
    if mixed:
        value, next_value = value.contiguous(), next_value.clone()
    done = reward > 0.5
    leaf = reward.detach().requires_grad_()

    def estimate(name: str) -> tuple[torch.Tensor, ...]:
        outputs = kernels.gae(0.9, 0.8, value, next_value, leaf, done, time_dim=time_dim, backend=name)
        return (*outputs, *torch.autograd.grad(outputs[0].square().sum(), leaf))

    for found, expected in zip(estimate(backend), estimate("reference"), strict=True):
        assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("time_dim", [0, 1])
def test_every_element_is_written(monkeypatch, backend, device, time_dim) -> None:
    """Buffers come filled with NaN."""
    originals = {name: getattr(torch, name) for name in ("empty_like", "empty")}
    for name, original in originals.items():
        monkeypatch.setattr(torch, name, lambda *a, original=original, **k: original(*a, **k).fill_(math.nan))
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(math.nan))
    shape = (700, 3) if time_dim == 0 else (3, 700)
    value, next_value, reward = (torch.randn(shape, device=device).requires_grad_() for _ in range(3))
    done = torch.rand(shape, device=device) < 0.05
    gamma = torch.full(shape, 0.9, device=device).requires_grad_()
    outputs = kernels.gae(gamma, 0.8, value, next_value, reward, done, time_dim=time_dim, backend=backend)
    gradients = torch.autograd.grad(sum(x.sum() for x in outputs), [gamma, value, next_value, reward])
    assert all(x.isfinite().all() for x in (*outputs, *gradients))


def test_the_result_is_laid_out_like_the_reward(backend, device) -> None:
    reward = torch.randn(9, 5, device=device).t()
    advantage, target = kernels.gae(0.9, 0.9, reward, reward, reward, reward > 1, backend=backend)
    assert advantage.stride() == target.stride() == reward.stride()


def test_inputs_are_not_written(backend, device) -> None:
    value, next_value, reward = torch.randn(3, 4, 9, device=device)
    copies = [x.clone() for x in (value, next_value, reward)]
    kernels.gae(0.9, 0.9, value, next_value, reward, reward > 1, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip((value, next_value, reward), copies, strict=True))


def test_layouts_of_two_row_dimensions_need_no_copy() -> None:
    """[B1, B2, T, F] and its time-major and transposed forms reach the kernel as they are."""
    shape = (4, 3, 50, 2)
    for x in (torch.empty(shape), torch.empty(50, 4, 3, 2).permute(1, 2, 0, 3), torch.empty(4, 3, 60, 2)[:, :, 5:55]):
        assert x.shape == shape
        assert lay_out(x.shape, 2, (x.stride(), None), 4, 132) is not None
    batch_major = torch.empty(4096, 128, 1)
    plan = lay_out(batch_major.shape, 1, (batch_major.stride(),), 4, 132)
    assert plan is not None
    assert plan.inner == 1
    assert plan.time_is_contiguous


def test_offsets_beyond_32_bits_are_computed_in_64() -> None:
    def index(strides: tuple[int, int]) -> str:
        plan = lay_out((1 << 16, 1 << 10), 1, (strides,), 4, 132)
        assert plan is not None
        return str(plan.index)

    assert index((1 << 10, 1)) == "int32"
    assert index((1 << 16, 1)) == "int64"
    assert index((1, 1 << 21)) == "int64"


def test_of_many_short_rows_a_program_has_several_blocks(device, monkeypatch) -> None:
    plan_with(monkeypatch, launching, processors=lambda device: 1)
    rows, steps = 266, 20
    assert tiling(rows, steps, 4, time_is_contiguous=True, processors=1).blocks > 1
    value, next_value, reward = torch.randn(3, rows, steps, device=device)
    done = reward > 1
    for fast, exact in zip(
        kernels.gae(0.9, 0.8, value, next_value, reward, done, backend="triton"),
        kernels.gae(0.9, 0.8, value, next_value, reward, done, backend="reference"),
        strict=True,
    ):
        assert torch.allclose(fast, exact, atol=1e-5)


def test_a_tensor_that_is_the_negative_of_its_memory_is_read_as_what_it_says(backend, device) -> None:
    """As the imaginary part of a conjugate is."""
    x = torch._neg_view(torch.rand(3, 4, device=device))
    value, plain, done = (
        torch.rand(3, 4, device=device),
        x.resolve_neg(),
        torch.zeros(3, 4, dtype=torch.bool, device=device),
    )
    options = {"backend": backend}
    for function in (
        lambda x: kernels.gae(0.9, 0.8, value, value, x, done, **options),
        lambda x: kernels.vtrace(0.9, value, None, value, value, x, done, **options),
        lambda x: kernels.value_target(value[None], x, done, 0.9, **options),
        lambda x: kernels.ensemble_loss(value[None], x, "l2", **options),
        lambda x: kernels.clip_ppo_loss(x, value, value, 0.2, 0.2, **options),
        lambda x: kernels.normal_log_prob(x, value, value, **options),
    ):
        torch.testing.assert_close(tuple(function(x)), tuple(function(plain)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": torch.zeros(3, 1)}, r"value has shape \(3, 1\).*reward has shape \(3, 4\)"),
        ({"next_value": torch.zeros(4)}, r"next_value has shape \(4,\)"),
        ({"done": torch.zeros(3, 4, 1)}, r"done has shape \(3, 4, 1\)"),
        ({"terminated": torch.zeros(1, 4)}, r"terminated has shape \(1, 4\)"),
        ({"gamma": torch.ones(5)}, r"gamma has shape \(5,\).*broadcast"),
        ({"lmbda": torch.ones(2, 1, 1)}, r"lmbda has shape \(2, 1, 1\)"),
        ({"value": torch.zeros(3, 4, device="meta")}, r"value has shape \(3, 4\) on meta"),
        ({"gamma": torch.zeros(3, 4, device="meta")}, r"gamma is on meta"),
    ],
)
def test_disagreeing_shapes_and_devices_are_named(change, message) -> None:
    arguments = dict.fromkeys(("value", "next_value", "reward", "done", "terminated"), torch.zeros(3, 4))
    with pytest.raises(RuntimeError, match=message):
        kernels.gae(**{"gamma": 0.9, "lmbda": 0.9, **arguments, **change})


def test_a_time_dim_out_of_range_is_named() -> None:
    x = torch.zeros(3)
    with pytest.raises(IndexError, match=r"time_dim is -2, but reward has shape \(3,\)"):
        kernels.gae(0.9, 0.9, x, x, x, x, time_dim=-2)
