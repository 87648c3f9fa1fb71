"""The Dreamer example trains, tells the truth about it, and hands its model transitions that are right."""

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLE = Path(__file__).parents[1] / "examples" / "dreamer_small.py"
DEPENDENCIES = {"fusedrl", "gymnasium", "matplotlib", "numpy", "tensordict", "torch", "tqdm"}
CPU = torch.device("cpu")


@pytest.fixture
def example(monkeypatch) -> ModuleType:
    for name in ("gymnasium", "matplotlib", "tqdm"):
        pytest.importorskip(name)
    spec = importlib.util.spec_from_file_location("dreamer_small", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in {"BATCH": 4, "LENGTH": 5, "HORIZON": 3, "UPDATES_PER_ROUND": 6, "WARM_UP": 4}.items():
        monkeypatch.setattr(module, name, value)
    return module


def collector(example, seed=0):
    torch.manual_seed(seed)
    model, policy = example.WorldModel(), example.make_policy()
    return example.Collector(model, policy, seed)


def test_a_few_updates_better_the_model(example, monkeypatch):
    monkeypatch.setattr(example, "UPDATES_PER_ROUND", 25)
    curves, returns = example.train(seed=0, budget=1)
    first, last = example.first_and_last(curves["model loss"])
    assert last < first / 2
    assert len(returns) == 1
    assert {name: len(curve) for name, curve in curves.items()} == {
        "model loss": 29,  # it alone is warmed up
        "actor loss": 25,
        "value loss": 25,
        example.RISING: 25,
    }


def test_the_same_seed_gives_the_same_curves_and_another_seed_does_not(example):
    curves = [example.train(seed=seed, budget=1) for seed in (1, 1, 2)]
    assert curves[0] == curves[1]
    assert curves[0] != curves[2]


@pytest.mark.parametrize("learnt", [True, False])
def test_the_exit_code_says_whether_the_curves_moved_as_claimed(example, learnt, tmp_path, monkeypatch, capsys):
    falling, rising = [2.0, 1.0], [1.0, 2.0]
    curves = {"model loss": falling, "actor loss": falling, "value loss": falling, example.RISING: rising}
    if not learnt:
        curves["value loss"] = rising
    monkeypatch.setattr(example, "train", lambda seed, budget: (curves, [-1000.0]))
    out = tmp_path / "new" / "folder"
    assert example.main(["--out", str(out)]) == (0 if learnt else 1)
    printed = capsys.readouterr().out
    (picture,) = out.iterdir()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in printed
    assert ("NOT learnt" in printed) is not learnt
    (line,) = (line for line in printed.splitlines() if line.startswith("value loss"))
    assert ("NOT as claimed" in line) is not learnt


def test_an_action_is_stored_with_what_it_led_to(example):
    episodes = collector(example).play(CPU)
    assert episodes.batch_size == (example.ENVIRONMENTS, example.EPISODE)
    cosine, sine, speed = episodes["next", "observation"].unbind(-1)
    torch.testing.assert_close(cosine**2 + sine**2, torch.ones_like(cosine))
    # Pendulum's dynamics: θ' is faster by (15 sin θ + 3 u) dt, for each of the environment steps of an action
    torque = 2 * episodes["action"][:, 1:, 0]
    angle, velocity = torch.atan2(sine, cosine)[:, :-1].double(), speed[:, :-1].double()
    for _ in range(example.REPEAT):
        velocity = (velocity + (15 * angle.sin() + 3 * torque) * 0.05).clamp(-8, 8)
        angle = angle + velocity * 0.05
    torch.testing.assert_close(velocity, speed[:, 1:].double(), rtol=1e-3, atol=1e-3)


def test_a_reward_is_what_the_cost_leaves_of_1(example):
    following = collector(example).play(CPU)
    cosine, sine, speed = following["next", "observation"].unbind(-1)
    torque = 2 * following["action"][:, 1:, 0]
    angle, velocity = torch.atan2(sine, cosine)[:, :-1], speed[:, :-1]
    cost = []
    for _ in range(example.REPEAT):
        cost.append(angle**2 + 0.1 * velocity**2 + 0.001 * torque**2)
        velocity = (velocity + (15 * angle.sin() + 3 * torque) * 0.05).clamp(-8, 8)
        angle = (angle + velocity * 0.05 + torch.pi) % (2 * torch.pi) - torch.pi
    expected = 1 - sum(cost) / len(cost) / example.HIGHEST_COST
    reward = following["next", "reward"][:, 1:, 0]
    # an angle within a rounding error of ±π may be taken for either
    assert ((reward - expected).abs() < 1e-3).float().mean() > 0.999
    assert reward.min() >= 0
    assert reward.max() <= 1


def test_a_batch_holds_sequences_of_one_episode_in_order(example):
    rounds = [collector(example, seed).play(CPU) for seed in (0, 1)]
    replay = torch.cat(rounds)
    replay["where"] = torch.arange(replay.numel()).view(replay.shape)
    where = example.sample(replay)["where"]
    assert where.shape == (example.BATCH, example.LENGTH)
    assert (where.diff() == 1).all()
    assert (where // example.EPISODE == where[:, :1] // example.EPISODE).all()


def test_the_posterior_knows_the_observation_and_the_prior_does_not(example):
    torch.manual_seed(0)
    model = example.WorldModel()
    data = example.sample(collector(example).play(CPU))
    torch.manual_seed(1)
    found = model(data.clone())
    other = data.clone()
    other["next", "observation"][:, -1] += 1
    torch.manual_seed(1)
    changed = model(other)
    assert torch.equal(found["next", "prior_mean"], changed["next", "prior_mean"])
    assert not torch.equal(found["next", "posterior_mean"][:, -1], changed["next", "posterior_mean"][:, -1])


def test_the_example_imports_only_the_examples_extra():
    imported = set()
    for node in ast.walk(ast.parse(EXAMPLE.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).split(".")[0])
    assert imported - set(sys.stdlib_module_names) <= DEPENDENCIES
