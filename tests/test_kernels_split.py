"""Rows that are split over several programs: shares are composed from their ends, back to where every row ended."""

import math
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from fusedrl import kernels
from fusedrl.kernels import launching, scan_launch, vtrace_launch
from fusedrl.kernels.launching import Launch
from fusedrl.kernels.scan_launch import Tiling, tiling
from fusedrl.kernels.scan_tiles import STEPS_PER_LANE, share_of_program
from helpers_launches import plan_with
from torch import Tensor

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def _tiles_of_a_warp(monkeypatch):
    """Time-major, too; larger ones take the interpreter minutes."""
    plan_with(monkeypatch, scan_launch, _MOST_WARPS=1)


def td_lambda(gamma: float, x: Tensor, done: Tensor, **options) -> tuple[Tensor, ...]:
    return (kernels.td_lambda_return(gamma, gamma, x.cos(), x, done, **options),)


def gae(gamma: float, x: Tensor, done: Tensor, **options) -> tuple[Tensor, ...]:
    return kernels.gae(gamma, gamma, x.sin(), x.cos(), x, done, **options)


def vtrace(gamma: float, x: Tensor, done: Tensor, **options) -> tuple[Tensor, ...]:
    return kernels.vtrace(gamma, x.sin(), None, x.sin(), x.cos(), x, done, **options)


either_kernel = pytest.mark.parametrize("estimate", [gae, vtrace])
either_layout = pytest.mark.parametrize("time_dim", [0, 1], ids=["time-major", "contiguous time"])


def size(estimate: Callable, time_dim: int) -> tuple[int, int]:
    """Rows and steps, such that a few shares have a few tiles each, and some of them come after many others."""
    return (1, 1100) if time_dim == 1 else (3, 140) if estimate is vtrace else (17, 256)


def random(estimate: Callable, time_dim: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size(estimate, time_dim), dtype=torch.float64, generator=generator).to(device)
    return x.t().contiguous() if time_dim == 0 else x


def shares(
    estimate: Callable, time_dim: int, device: torch.device, *, adjoint: bool = False
) -> tuple[list[int], Tiling]:
    """How many steps each share and those before it have, in the order in which they are solved, and the tiling.

    The first share has several tiles. The last steps of a row, which the recurrence solves first, may not fill a tile.
    """
    rows, steps = size(estimate, time_dim)
    of_vtrace = vtrace_launch._ADJOINT_WARP_BYTES if adjoint else vtrace_launch._WARP_BYTES
    in_flight = {"warp_bytes": of_vtrace} if estimate is vtrace else {}
    processors = launching.processors(device)
    found = tiling(rows, steps, 8, time_is_contiguous=time_dim == 1, processors=processors, **in_flight)
    tile, split = found.lanes * STEPS_PER_LANE, found.split
    tiles = math.ceil(steps / tile)
    ends = [(i + 1) * tiles // split * tile for i in range(split)]
    assert tile < ends[0] < steps
    beyond = 0 if adjoint else tiles * tile - steps
    return [end - beyond for end in ends], found


def solved(
    estimate: Callable, gamma: float, x: Tensor, done: Tensor, time_dim: int, backend: str
) -> tuple[Tensor, ...]:
    """The outputs, and the gradient of x from that of the first."""
    leaf = x.clone().requires_grad_()
    outputs = estimate(gamma, leaf, done, time_dim=time_dim, backend=backend)
    return *outputs, *torch.autograd.grad(outputs[0], leaf, x.cos())


def test_a_share_comes_after_more_than_are_composed_at_once(device) -> None:
    ends, found = shares(gae, 0, device)
    assert len(ends) - 1 > max(4, found.lanes // 4)


@either_kernel
@pytest.mark.parametrize(
    ("time_dim", "gamma", "ends"),
    [(1, 0.99, False), (1, 0.99, True), (0, 0.99, True)],
    ids=["no row ends", "the row does", "one of several rows does"],
)
def test_what_enters_a_share_is_all_that_came_before(estimate, time_dim, gamma, ends, device) -> None:
    shares(estimate, time_dim, device)
    x = random(estimate, time_dim, device)
    done = torch.zeros_like(x, dtype=torch.bool)
    if ends:
        done.select(1 - time_dim, 0).copy_(x.select(1 - time_dim, 0) > 2)

    results = (solved(estimate, gamma, x, done, time_dim, backend) for backend in ("triton", "torch"))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@either_kernel
@pytest.mark.parametrize(
    ("rows", "steps", "warps", "time_dim"), [(3, 2049, 1, 1), (5, 1100, 4, 0)], ids=["contiguous time", "time-major"]
)
def test_shares_of_an_odd_number_of_tiles_are_composed_in_parts_of_these(
    monkeypatch, estimate, rows, steps, warps, time_dim, device
) -> None:
    """The last part lies beyond the last step."""
    plan_with(monkeypatch, scan_launch, _MOST_WARPS=warps)
    processors = launching.processors(device)
    if processors == 4:  # as in the interpreter
        found = tiling(rows, steps, 4, time_is_contiguous=time_dim == 1, processors=processors)
        tiles = math.ceil(steps / (found.lanes * STEPS_PER_LANE))
        assert found.lanes > found.last_lanes
        assert tiles % found.split
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, steps, generator=generator).to(device)
    x = x.t().contiguous() if time_dim == 0 else x
    done = x > 3

    result = solved(estimate, 0.99, x, done, time_dim, "triton")
    for found, wanted in zip(result, solved(estimate, 0.99, x.double(), done, time_dim, "torch"), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


def test_a_row_of_many_shares_composes_them_in_several_turns(monkeypatch, device) -> None:
    plan_with(monkeypatch, vtrace_launch, _WARP_BYTES=128)
    lanes = 128 // 8 // STEPS_PER_LANE
    x = random(vtrace, 1, device)[:, : 16 * lanes * STEPS_PER_LANE]  # 16 tiles, of which a share has 2
    done = torch.zeros_like(x, dtype=torch.bool)
    assert lanes < 16 // 2 - 1
    for found, wanted in zip(
        vtrace(0.99, x, done, backend="triton"), vtrace(0.99, x, done, backend="torch"), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


every_recurrence = pytest.mark.parametrize("estimate", [td_lambda, gae, vtrace])


@every_recurrence
@either_layout
def test_of_a_share_nothing_is_composed_but_the_tile_at_its_end_if_all_rows_end_there(
    estimate, time_dim, device
) -> None:
    """What isn't composed may be NaN, and the shares that follow are as the reference, which an end protects."""
    (first, *_), found = shares(estimate, time_dim, device)
    tile = found.last_lanes * STEPS_PER_LANE
    x = random(estimate, time_dim, device)
    steps = x.shape[time_dim]
    done = x > 0
    x.narrow(time_dim, steps - first + tile, first - tile).fill_(math.nan)
    assert_as_reference(estimate, 1.0, x, done, time_dim, steps=steps - first)


def test_compositions_before_those_in_which_all_rows_ended_are_not_looked_at(device) -> None:
    """Of rows with more shares than are composed at once, the first is NaN."""
    ends, _ = shares(gae, 0, device)
    x = random(gae, 0, device)
    x[-ends[0] :].fill_(math.nan)
    done = torch.zeros_like(x, dtype=torch.bool)
    done[-ends[3] - 1] = True  # in the fifth share, which begins the second turn
    assert_as_reference(gae, 1.0, x, done, 0, steps=len(x) - ends[4])


def assert_as_reference(estimate, gamma, x, done, time_dim, *, steps: int) -> None:
    """The first ``steps`` are finite, and what the reference gives."""
    results = (estimate(gamma, x, done, time_dim=time_dim, backend=name) for name in ("triton", "reference"))
    for found, wanted in zip(*results, strict=True):
        assert steps > 0
        assert wanted.narrow(time_dim, 0, steps).isfinite().all()
        torch.testing.assert_close(found.narrow(time_dim, 0, steps), wanted.narrow(time_dim, 0, steps))


@either_kernel
@either_layout
def test_nor_is_anything_else_in_the_adjoint(estimate, time_dim, device) -> None:
    (first, *_), found = shares(estimate, time_dim, device, adjoint=True)
    tile = found.last_lanes * STEPS_PER_LANE
    x = random(estimate, time_dim, device)
    done = x > 0

    def gradient(cotangent: Tensor, backend: str) -> Tensor:
        leaf = x.clone().requires_grad_()
        output = estimate(1.0, leaf, done, time_dim=time_dim, backend=backend)[-1]
        (found,) = torch.autograd.grad(output, leaf, cotangent)
        return found.narrow(time_dim, first, x.shape[time_dim] - first)

    poisoned = x.clone()  # the adjoint solves the first steps first
    poisoned.narrow(time_dim, 0, first - tile).fill_(math.nan)
    torch.testing.assert_close(gradient(poisoned, "triton"), gradient(x, "torch"))


@every_recurrence
@either_layout
@pytest.mark.parametrize("gamma", [0.0, 0.1])
def test_a_nan_that_no_end_stops_reaches_every_step_before_it(estimate, time_dim, gamma, device) -> None:
    """Whatever the discount has made of it: 0.1 to the power of a row's length is 0."""
    shares(estimate, time_dim, device)
    x = random(estimate, time_dim, device)
    x.select(time_dim, -1).fill_(math.nan)
    done = torch.zeros_like(x, dtype=torch.bool)
    for name in ("triton", "reference"):
        assert estimate(gamma, x, done, time_dim=time_dim, backend=name)[-1].isnan().all(), name


def test_few_long_rows_are_split_and_many_rows_are_not() -> None:
    def split(rows: int, steps: int) -> int:
        return tiling(rows, steps, 4, time_is_contiguous=True, processors=132).split

    assert split(1, 1_000_000) >= 132
    assert split(4096, 1_000_000) == 1
    assert split(1, 128) == 1


@triton.jit
def _shares(found, steps, TILE: tl.constexpr, PARTS: tl.constexpr, SPLIT: tl.constexpr):
    share, first, last, tiles = share_of_program(steps, TILE, PARTS, SPLIT)
    tl.store(found + 3 * share, first)
    tl.store(found + 3 * share + 1, last)
    tl.store(found + 3 * share + 2, tiles)


@pytest.mark.parametrize("steps", [1, 512, 513, 12_345, (1 << 31) - 1])
def test_shares_are_all_tiles_one_after_the_other(steps, device) -> None:
    tile, parts, split = 256, 2, 500
    found = torch.empty(split, 3, dtype=torch.int32, device=device)
    Launch(_shares, split, [found, steps], TILE=tile, PARTS=parts, SPLIT=split)(found.get_device(), [found])
    first, last, tiles = found.unbind(1)
    assert (tiles == -(-steps // (tile * parts)) * parts).all()
    assert (first[0], last[-1]) == (0, tiles[0])
    assert first[1:].equal(last[:-1])
    assert (last - first).unique().numel() <= 2


def test_numbers_of_tiles_and_shares_multiply_within_32_bits() -> None:
    """Which the kernel does to divide a row."""
    for steps in (1 << 20, (1 << 31) - 1):
        for contiguous in (True, False):
            found = tiling(1, steps, 4, time_is_contiguous=contiguous, processors=132)
            assert found.split > 1
            assert found.split * math.ceil(steps / (found.lanes * STEPS_PER_LANE)) < 1 << 31
