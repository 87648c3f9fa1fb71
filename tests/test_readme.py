"""What the README says is true: its examples run, its figures are those of the results files."""

import doctest
import importlib
import pkgutil
import re
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


def test_what_the_readme_says_about_speed_is_what_the_results_files_say() -> None:
    pytest.importorskip("torchrl")
    from bench import readme

    assert readme.render(README) == README, "run: make readme"


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


PARTS = ("_problem", "_kernel", "_operators", "_launch", "_vectorized", "_reference", "_verify", "_composed",
         "_second_order", "_fixed_discount", "_batching")  # fmt: skip


def test_every_file_has_its_place_in_the_index() -> None:
    index = README.partition("## Where things are")[2]
    assert all(part in index for part in PARTS)
    linked = set(covered().values())
    for folder in ("kernels", "estimators", "losses", "bench"):
        for path in (ROOT / folder).glob("*.py"):
            in_pattern = path.stem.endswith(PARTS) if folder == "kernels" else path.stem.startswith("static_")
            is_of_pytest = path.name.startswith(("__", "test_", "conftest"))
            assert path.name in index or in_pattern or is_of_pytest or f"{folder}/{path.name}" in linked, path
