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

EXAMPLE = Path(__file__).parents[1] / "examples" / "td3_pendulum.py"
DEPENDENCIES = {"fusedrl", "gymnasium", "matplotlib", "numpy", "tensordict", "torch", "tqdm"}
EPISODE = 200  # steps; nothing but the time limit ends one
CPU = torch.device("cpu")


@pytest.fixture
def example(monkeypatch) -> ModuleType:
    for name in ("gymnasium", "matplotlib", "tqdm"):
        pytest.importorskip(name)
    spec = importlib.util.spec_from_file_location("td3_pendulum", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # One evaluation after every episode, and a few updates in each.
    monkeypatch.setattr(module, "EVALUATION_EPISODES", 2)
    monkeypatch.setattr(module, "ENVIRONMENTS", 2)
    monkeypatch.setattr(module, "STEPS_PER_EVALUATION", 2 * EPISODE)
    monkeypatch.setattr(module, "RANDOM_STEPS", 2 * EPISODE - 20)
    monkeypatch.setattr(module, "UPDATES_PER_STEP", 1)
    return module


def collector(example: ModuleType, seed: int = 0):
    torch.manual_seed(seed)
    return example.Collector(example.make_loss(CPU)[0], seed, CPU)


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


def test_a_transition_leads_to_its_own_next_observation_also_when_the_episode_ends(example):
    collecting = collector(example)
    steps = [collecting.step(explore=True) for _ in range(EPISODE + 1)]
    for step, following in pairwise(steps):
        if not step["next", "done"].any():
            assert torch.equal(step["next", "observation"], following["observation"])
    last, first = steps[EPISODE - 1], steps[EPISODE]
    assert last["next", "done"].all()
    assert not last["next", "terminated"].any()  # time ran out: a value follows
    moved = (last["next", "observation"] - last["observation"]).abs()
    assert (moved[:, :2] < 0.45).all()  # 8 rad/s at most, for 0.05 s
    assert not torch.equal(last["next", "observation"], first["observation"])


def test_the_torque_stays_in_bounds_and_the_reward_is_rescaled(example, monkeypatch):
    monkeypatch.setattr(example, "EXPLORATION_NOISE", 10.0)
    collecting, seen = collector(example), []
    step = collecting.environments.step
    collecting.environments.step = lambda torque: seen.append((torque, step(torque))) or seen[-1][1]
    transition = collecting.step(explore=False)
    torque, (_, reward, *_) = seen[0]
    assert np.abs(torque).max() <= example.TORQUE
    assert np.array_equal(torque, transition["action"].numpy())
    assert np.allclose(example.REWARD_SCALE * reward, transition["next", "reward"].squeeze(-1))


def test_the_policy_and_the_targets_move_in_every_other_update(example):
    policy, loss = example.make_loss(CPU)
    learner, replay, collecting = example.Learner(loss), example.ReplayBuffer(8, CPU), collector(example)
    replay.add(collecting.step(explore=True))

    def moves(params):
        before = [x.clone() for x in params.values(True, True)]
        learner.update(replay.sample())
        return [not torch.equal(a, b) for a, b in zip(before, params.values(True, True), strict=True)]

    assert not any(moves(loss.actor_network_params))
    assert all(moves(loss.actor_network_params))
    assert not any(moves(loss.target_qvalue_network_params))
    assert all(moves(loss.target_qvalue_network_params))
    assert all(moves(loss.qvalue_network_params))
    # The policy that collects is the very one that is trained.
    assert {id(p) for p in policy.parameters()} == {id(p) for p in loss.actor_network_params.parameters()}


def test_the_replay_buffer_holds_the_latest_transitions(example):
    collecting, replay = collector(example), example.ReplayBuffer(5, CPU)
    steps = [collecting.step(explore=True) for _ in range(4)]
    replay.add(steps[0])
    assert set(replay.sample()["action"].flatten().tolist()) == set(steps[0]["action"].flatten().tolist())
    for step in steps[1:]:
        replay.add(step)
    latest = torch.cat(steps)["action"].flatten()[-5:]
    assert set(replay.sample()["action"].flatten().tolist()) == set(latest.tolist())


def test_the_example_imports_only_the_examples_extra():
    imported = set()
    for node in ast.walk(ast.parse(EXAMPLE.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).split(".")[0])
    assert imported - set(sys.stdlib_module_names) <= DEPENDENCIES
