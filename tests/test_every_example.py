"""What every example refuses before it trains."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
BUDGET = {"ppo_gpu": "--iterations"}


@pytest.fixture(params=EXAMPLES, ids=lambda path: path.stem)
def example(request, monkeypatch):
    for name in ("gymnasium", "matplotlib", "tqdm"):
        pytest.importorskip(name)
    spec = importlib.util.spec_from_file_location(request.param.stem, request.param)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "train", lambda *_: pytest.fail("it trains"))
    return module


def refused(example, capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        example.main(arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_it_refuses_numbers_that_mean_nothing(example, capsys):
    budget = BUDGET.get(example.__name__, "--steps")
    assert "--seed must be at least 0" in refused(example, capsys, "--seed", "-1")
    assert budget in refused(example, capsys, budget, "0").splitlines()[-1]
    if example.__name__ == "ppo_gpu":
        assert "--envs" in refused(example, capsys, "--envs", "0").splitlines()[-1]


def test_it_refuses_a_backend_that_cannot_run(example, capsys, monkeypatch):
    if not hasattr(example, "resolve_backend"):
        pytest.skip("has no such option")

    def resolved(*_):
        raise RuntimeError("backend 'triton' can't run: of reasons")

    monkeypatch.setattr(example, "resolve_backend", resolved)
    assert "backend 'triton' can't run: of reasons" in refused(example, capsys, "--backend", "triton").splitlines()[-1]


def test_it_refuses_a_folder_that_cannot_be_made(example, capsys, tmp_path):
    (tmp_path / "file").touch()
    assert "--out can't be made" in refused(example, capsys, "--out", str(tmp_path / "file" / "out"))
