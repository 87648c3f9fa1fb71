"""What the README says is true: its examples run, its figures are those of the results files."""

import doctest
import importlib.util
import json
import pkgutil
import re
import sys
from pathlib import Path

import pytest
from fusedrl import estimators, kernels, losses

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_examples_run() -> None:
    result = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert result.attempted > 10
    assert result.failed == 0


@pytest.mark.parametrize(
    "name",
    [
        module.name
        for package in (kernels, estimators, losses)
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    ],
)
def test_the_examples_in_docstrings_run(name) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_the_cpu_table_is_that_of_the_results_file() -> None:
    pytest.importorskip("torchrl")
    specification = importlib.util.spec_from_file_location("bench_returns", ROOT / "bench" / "returns.py")
    assert specification is not None
    assert specification.loader is not None
    bench = importlib.util.module_from_spec(specification)
    sys.modules["bench_returns"] = bench
    specification.loader.exec_module(bench)
    table = bench.markdown(json.loads((ROOT / "bench" / "results" / "cpu.json").read_text()))
    assert f"<!-- bench/results/cpu.json -->\n{table}\n<!-- end -->" in README


def test_the_kernel_figures_are_those_of_the_static_table() -> None:
    rows = json.loads((ROOT / "bench" / "results" / "static_kernels.json").read_text())["kernels"]
    wanted = []
    for layout in ("contiguous time", "time-major"):
        name = f"gae, recurrence, {layout}, whole row, fp32"
        (row,) = (r for r in rows if r["kernel"] == name and r["target"] == "sm_90")
        wanted.append((row["instructions_per_element"], row["shuffles_per_element"]))
    found = re.search(
        r"takes ([\d.]+) instructions and ([\d.]+) shuffles .* contiguous time, ([\d.]+) and\s([\d.]+) time-major",
        README,
    )
    assert found is not None
    assert [float(x) for x in found.groups()] == [x for pair in wanted for x in pair]
