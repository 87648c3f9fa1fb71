"""The table of kernel costs is current and within its budgets; it is compiled in a process without the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
STORED = json.loads((ROOT / "bench" / "results" / "static_kernels.json").read_text())


@pytest.fixture(scope="module")
def table() -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "bench" / "static_table.py"), "--json"]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def only(rows: list[dict], kernel: str, target: str) -> dict:
    (row,) = (r for r in rows if r["kernel"] == kernel and r["target"] == target)
    return row


@pytest.mark.skipif(triton.__version__ != STORED["triton"], reason="the table is of another Triton version")
def test_the_stored_table_is_what_the_kernels_compile_to(table) -> None:
    assert table == STORED["kernels"]


def test_no_kernel_spills_on_any_target(table) -> None:
    assert {row["target"] for row in table} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert [row for row in table if row["spill_bytes"]] == []


@pytest.mark.parametrize(("layout", "instructions", "shuffles"), [("contiguous time", 55, 4), ("time-major", 45, 3)])
def test_gae_forward_on_sm_90_stays_within_its_budget(table, layout, instructions, shuffles) -> None:
    row = only(table, f"gae, recurrence, {layout}, whole row, fp32", "sm_90")
    assert row["instructions_per_element"] <= instructions
    assert row["shuffles_per_element"] <= shuffles
    assert row["widest_load_bits"] == 128


@pytest.mark.parametrize(("kernel", "instructions"), [("loss", 15), ("projection", 7), ("gradient", 17)])
def test_categorical_kernels_on_sm_90_stay_within_their_budgets(table, kernel, instructions) -> None:
    """A hat function is 4 instructions. If every lane prepared all sources of a tile it would be 9 more."""
    row = only(table, f"categorical {kernel}, actions last, 51 atoms × 6 actions, fp32", "sm_90")
    assert row["instructions_per_element"] <= instructions


def test_what_a_categorical_kernel_costs_does_not_grow_with_atoms(table) -> None:
    few, many = (
        only(table, f"categorical loss, actions last, {atoms} atoms × 6 actions, fp32", "sm_90") for atoms in (51, 512)
    )
    assert many["registers"] <= few["registers"] + 8
    assert many["instructions_per_element"] <= few["instructions_per_element"] + 1
