"""What the README says is true: its examples run, its figures are those of the results files."""

import doctest
import importlib.util
import json
import pkgutil
import re
import sys
from pathlib import Path
from types import ModuleType

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


def benchmark(name: str) -> ModuleType:
    pytest.importorskip("torchrl")
    specification = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / "bench" / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[f"bench_{name}"] = module
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("script", "results"), [("returns", "cpu.json"), ("categorical", "categorical_cpu.json")])
def test_the_cpu_tables_are_those_of_the_results_files(script, results) -> None:
    table = benchmark(script).markdown(json.loads((ROOT / "bench" / "results" / results).read_text()))
    assert f"<!-- bench/results/{results} -->\n{table}\n<!-- end -->" in README


def covered() -> dict[str, str]:
    """The names in the table of coverage, and the files they are linked to."""
    table = README.partition("<!-- coverage -->")[2].partition("<!-- end -->")[0]
    return dict(re.findall(r"\[`(\w+)`\]\(([\w/.]+)\)", table))


def test_every_name_that_torchrl_documents_is_in_the_table_of_coverage() -> None:
    theirs = pytest.importorskip("torchrl.objectives")
    from torchrl.objectives import value
    from torchrl.objectives.value import functional

    assert {*theirs.__all__, *value.__all__, *functional.__all__} <= set(covered())


def test_every_name_in_the_table_of_coverage_lives_where_its_link_says() -> None:
    for name, path in covered().items():
        assert re.search(rf"^(class |def |){name}\b", (ROOT / path).read_text(), re.MULTILINE), (name, path)
        spaces = (estimators.functional,) if path == "estimators/functional.py" else (losses, estimators)
        assert any(hasattr(space, name) for space in spaces), name


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
