"""The tool that times other tilings: what it tries, and that it doesn't time what is wrong."""

import itertools

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("torchrl", reason="the benchmarks compare with it")

from fusedrl import kernels
from fusedrl.kernels import scan_launch
from fusedrl.kernels.scan_launch import tiling
from rich.console import Console

from bench import scans, tune


def chosen(rows: int, steps: int, *, contiguous: bool):
    return tiling(rows, steps, 4, time_is_contiguous=contiguous, processors=132)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("shape", [(64, 1 << 18), (1 << 16, 256)])
def test_neighbours_are_the_chosen_tiling_and_others_that_a_program_can_have(shape, contiguous) -> None:
    first, *others = tune.neighbours(tile := chosen(*shape, contiguous=contiguous), time_is_contiguous=contiguous)
    assert first == tile
    assert others
    assert len({first, *others}) == 1 + len(others)
    for x in others:
        assert 4 <= x.rows * x.lanes * 4 / (32 * x.warps) <= 16
        assert x.last_lanes <= x.lanes
        assert x.last_rows <= x.rows
        assert (x.split > 1) == (tile.split > 1)
        if contiguous:
            assert (x.rows, x.warps) == (tile.rows, 1)


@pytest.fixture
def case(monkeypatch, device):
    """A scan with a row that is split; who is timed later is said to be faster."""
    times = itertools.count(1000, -1)
    monkeypatch.setattr(
        tune, "on_device", lambda _, way: {f"{way}_device_us": next(times), f"fraction_of_copy_{way}": 0.5}
    )
    with kernels.use_backend("triton"):
        yield scans.case("gae", 1, 3000, device, peers=False)


def test_every_tiling_is_planned_and_after_the_chosen_one_come_the_fastest(case, monkeypatch) -> None:
    planned, plan = [], scan_launch.Layout.plan

    def note(self, *arguments, **options):
        planned.append(self.tiling)
        return plan(self, *arguments, **options)

    monkeypatch.setattr(scan_launch.Layout, "plan", note)
    rows = tune.tune(case)
    assert len(rows) > 2
    assert all("failed" not in row for row in rows)
    assert {row["tiling"] for row in rows} == set(planned)
    assert len(set(planned)) == len(rows)
    chosen, *times = [row["both_device_us"] for row in rows]
    assert chosen > times[-1] > times[0]
    assert times == sorted(times)


def test_what_is_wrong_is_not_timed(case, monkeypatch) -> None:
    results, calls = tune.results, []

    def wrong(arm):
        calls.append(arm)
        return [x + (len(calls) == 3) for x in results(arm)]

    monkeypatch.setattr(tune, "results", wrong)
    rows = tune.tune(case)
    (failed,) = (row for row in rows if "failed" in row)
    assert failed["failed"].startswith("off by")
    assert rows[-1] is failed
    assert "both_device_us" not in failed


def test_without_a_gpu_there_is_an_error(capsys) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        tune.main(["gae", "--shape", "4x8"])
    assert "CUDA device" in capsys.readouterr().err


def test_the_table_shows_what_failed_too(case, capsys) -> None:
    good, bad, *_ = tune.tune(case)
    tune.show("gae", [good, {"tiling": bad["tiling"], "failed": "off by 1.0e+00"}], Console(width=200))
    shown = capsys.readouterr().out
    assert "999.0" in shown
    assert "50.0%" in shown
    assert "off by 1.0e+00" in shown
