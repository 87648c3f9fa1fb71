"""The example trains, tells the truth about it, and hands the estimator transitions that are right."""

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLE = Path(__file__).parents[1] / "examples" / "ppo_cartpole.py"
DEPENDENCIES = {"fusedrl", "gymnasium", "matplotlib", "numpy", "tensordict", "torch", "tqdm"}


@pytest.fixture(scope="module")
def example() -> ModuleType:
    for name in ("gymnasium", "matplotlib", "tqdm"):
        pytest.importorskip(name)
    spec = importlib.util.spec_from_file_location("ppo_cartpole", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def collector(example: ModuleType, seed: int = 0):
    torch.manual_seed(seed)
    device = torch.device("cpu")
    return example.Collector(example.make_networks(device)[0], seed, device)


def test_a_few_updates_multiply_the_return(example):
    training, _ = example.train(seed=0, backend=None, budget=6144)
    first, last = training[0][1], training[-1][1]
    assert first < 30  # actions at random hold the pole up for about 22 steps
    assert last > 3 * first


def test_the_same_seed_gives_the_same_curves_and_another_seed_does_not(example):
    curves = [example.train(seed=seed, backend=None, budget=2048) for seed in (1, 1, 2)]
    assert curves[0] == curves[1]
    assert curves[0] != curves[2]


def test_running_out_of_budget_exits_with_1_and_still_draws_the_curve(example, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    assert example.main(["--steps", "1", "--backend", "verify", "--out", str(out)]) == 1
    captured = capsys.readouterr()
    (picture,) = out.iterdir()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in captured.out
    assert "NOT solved" in captured.out
    assert "verify" in captured.err  # the progress bar names the backend that ran


def test_reaching_the_return_exits_with_0(example, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(example, "SOLVED_RETURN", 60.0)
    assert example.main(["--out", str(tmp_path)]) == 0
    assert "\nsolved" in capsys.readouterr().out


def test_verify_refuses_an_advantage_that_the_reference_does_not_give(example, monkeypatch):
    from fusedrl.kernels import VerificationError, reference

    right = reference.gae
    monkeypatch.setattr(reference, "gae", lambda *args, **kwargs: [x + 1 for x in right(*args, **kwargs)])
    with pytest.raises(VerificationError):
        example.train(seed=0, backend="verify", budget=1)


def test_an_unknown_backend_is_refused(example, capsys):
    with pytest.raises(SystemExit) as refusal:
        example.main(["--backend", "nonsense"])
    assert refusal.value.code == 2
    assert "nonsense" in capsys.readouterr().err


def test_a_step_leads_to_the_next_observation_of_its_own_episode(example):
    rollout = collector(example).collect()
    done = rollout["next", "done"][:, :-1, 0]
    led_to, following = rollout["next", "observation"][:, :-1], rollout["observation"][:, 1:]
    assert done.any()
    assert torch.equal(led_to[~done], following[~done])
    # An episode starts within 0.05 of the origin, and ends with the pole beyond 12 degrees.
    assert (following[done].abs() <= 0.05).all()
    assert (led_to[done][:, 2].abs() > 0.2).all()


def test_the_time_limit_ends_an_episode_without_terminating_it(example, monkeypatch):
    import gymnasium

    make_vec = gymnasium.make_vec
    monkeypatch.setattr(gymnasium, "make_vec", lambda *args, **kwargs: make_vec(*args, max_episode_steps=5, **kwargs))
    following = collector(example).collect()["next"]  # no pole falls within 5 steps
    assert following["done"][:, 4::5].all()
    assert following["done"].sum() == following["done"][:, 4::5].sum()
    assert not following["terminated"].any()


def test_a_rollout_continues_where_the_one_before_ended(example):
    collecting = collector(example)
    last = collecting.collect()[:, -1].clone()
    first = collecting.collect()[:, 0]
    going_on = ~last["next", "done"][:, 0]
    assert torch.equal(first["observation"][going_on], last["next", "observation"][going_on])


def test_the_example_imports_only_the_examples_extra():
    imported = set()
    for node in ast.walk(ast.parse(EXAMPLE.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).split(".")[0])
    assert imported - set(sys.stdlib_module_names) <= DEPENDENCIES
