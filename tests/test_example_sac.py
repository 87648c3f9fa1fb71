"""The example trains, tells the truth about it, and stores transitions that are right."""

import ast
import importlib.util
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

EXAMPLE = Path(__file__).parents[1] / "examples" / "sac_pendulum.py"
DEPENDENCIES = {"fusedrl", "gymnasium", "matplotlib", "numpy", "tensordict", "torch", "tqdm"}
EPISODE = 200  # steps; nothing but the time limit ends one


@pytest.fixture
def example(monkeypatch) -> ModuleType:
    for name in ("gymnasium", "matplotlib", "tqdm"):
        pytest.importorskip(name)
    spec = importlib.util.spec_from_file_location("sac_pendulum", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # One evaluation after every episode, and a few updates in each.
    monkeypatch.setattr(module, "EVALUATION_EPISODES", 2)
    monkeypatch.setattr(module, "ENVIRONMENTS", 2)
    monkeypatch.setattr(module, "STEPS_PER_EVALUATION", 2 * EPISODE)
    monkeypatch.setattr(module, "RANDOM_STEPS", 200)
    monkeypatch.setattr(module, "UPDATES_PER_STEP", 0.1)
    return module


def collector(example: ModuleType, seed: int = 0):
    torch.manual_seed(seed)
    device = torch.device("cpu")
    return example.Collector(example.make_networks(device)[0], seed, device)


def test_a_few_updates_change_what_the_policy_does(example):
    _, evaluation = example.train(seed=0, budget=2 * EPISODE)
    (_, before), (steps, after) = evaluation
    assert steps == 2 * EPISODE
    assert before != after


def test_the_same_seed_gives_the_same_curves_and_another_seed_does_not(example):
    curves = [example.train(seed=seed, budget=2 * EPISODE) for seed in (1, 1, 2)]
    assert curves[0] == curves[1]
    assert curves[0] != curves[2]


def test_running_out_of_budget_exits_with_1_and_still_draws_the_curve(example, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    assert example.main(["--steps", "2", "--out", str(out)]) == 1
    captured = capsys.readouterr()
    (picture,) = out.iterdir()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in captured.out
    assert "NOT solved" in captured.out


def test_reaching_the_return_exits_with_0(example, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(example, "SOLVED_RETURN", -4000.0)  # no policy falls short of it
    assert example.main(["--out", str(tmp_path)]) == 0
    assert "\nsolved" in capsys.readouterr().out


def test_a_step_s_next_observation_is_the_one_it_led_to_also_when_the_episode_ends(example):
    collecting = collector(example)
    steps = [collecting.collect(at_random=True) for _ in range(EPISODE + 1)]
    for step, following in pairwise(steps):
        if not step["next", "done"].any():
            assert torch.equal(step["next", "observation"], following["observation"])
    last, first = steps[EPISODE - 1], steps[EPISODE]
    assert last["next", "done"].all()
    assert not last["next", "terminated"].any()  # time ran out: a value follows
    moved = (last["next", "observation"] - last["observation"]).abs()
    assert (moved[:, :2] < 0.45).all()  # 8 rad/s at most, for 0.05 s
    assert not torch.equal(last["next", "observation"], first["observation"])


def test_the_torque_and_the_reward_are_rescaled(example):
    collecting = collector(example)
    seen = []
    step = collecting.environments.step
    collecting.environments.step = lambda torque: seen.append((torque, step(torque))) or seen[-1][1]
    transition = collecting.collect(at_random=False)
    torque, (_, reward, *_) = seen[0]
    assert np.allclose(torque, 2 * transition["action"])
    assert np.allclose(example.REWARD_SCALE * reward, transition["next", "reward"].squeeze(-1))


def test_the_replay_holds_what_was_put_in_and_nothing_else(example, monkeypatch):
    monkeypatch.setattr(example, "BATCH_SIZE", 64)
    collecting, replay = collector(example), example.Replay(100, torch.device("cpu"))
    steps = [collecting.collect(at_random=True) for _ in range(3)]
    for step in steps:
        replay.extend(step)
    assert replay.size == 6
    assert torch.equal(replay.memory["action"][:6], torch.cat(steps)["action"])
    assert set(replay.sample()["action"].flatten().tolist()) == set(torch.cat(steps)["action"].flatten().tolist())


def test_the_squashed_action_has_the_density_of_its_transformation(example):
    loc, scale = torch.tensor([[0.3], [30.0]]), torch.tensor([[0.5], [1.0]])
    policy = example.SquashedNormal(loc, scale)
    action = policy.rsample()
    assert policy.log_prob(action).isfinite().all()  # also where it is rounded to 1
    raw = action[0].double().atanh()
    normal = torch.distributions.Normal(loc[0].double(), scale[0].double())
    expected = normal.log_prob(raw) - torch.log(1 - action[0].double() ** 2)
    torch.testing.assert_close(policy.log_prob(action)[0], expected[0].float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(policy.deterministic_sample, loc.tanh())


def test_the_example_imports_only_the_examples_extra():
    imported = set()
    for node in ast.walk(ast.parse(EXAMPLE.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).split(".")[0])
    assert imported - set(sys.stdlib_module_names) <= DEPENDENCIES
