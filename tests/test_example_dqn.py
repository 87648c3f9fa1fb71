"""The DQN example trains, tells the truth about it, and hands the loss transitions that are right."""

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLE = Path(__file__).parents[1] / "examples" / "dqn_cartpole.py"
DEPENDENCIES = {"fusedrl", "gymnasium", "matplotlib", "numpy", "tensordict", "torch", "tqdm"}


@pytest.fixture(scope="module")
def example() -> ModuleType:
    for name in ("gymnasium", "matplotlib", "tqdm"):
        pytest.importorskip(name)
    spec = importlib.util.spec_from_file_location("dqn_cartpole", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def small(example, monkeypatch):
    """A few updates between evaluations that are soon over."""
    smaller = {"STEPS_BEFORE_LEARNING": 304, "STEPS_PER_EVALUATION": 320, "EVALUATION_EPISODES": 2, "BATCH_SIZE": 8}
    for name, value in smaller.items():
        monkeypatch.setattr(example, name, value)
    return example


def test_the_same_seed_gives_the_same_curves_and_another_seed_does_not(small):
    curves = [small.train(seed=seed, backend=None, budget=384) for seed in (1, 1, 2)]
    assert curves[0] == curves[1]
    assert curves[0] != curves[2]


def test_running_out_of_budget_exits_with_1_and_still_draws_the_curve(small, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    assert small.main(["--steps", "1", "--backend", "verify", "--out", str(out)]) == 1
    captured = capsys.readouterr()
    (picture,) = out.iterdir()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in captured.out
    assert "NOT solved" in captured.out
    assert "verify" in captured.err  # the progress bar names the backend that ran


def test_reaching_the_return_exits_with_0(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(small, "SOLVED_RETURN", 1.0)
    assert small.main(["--out", str(tmp_path)]) == 0
    assert "\nsolved" in capsys.readouterr().out


def test_an_unknown_backend_is_refused(example, capsys):
    with pytest.raises(SystemExit) as refusal:
        example.main(["--backend", "nonsense"])
    assert refusal.value.code == 2
    assert "nonsense" in capsys.readouterr().err


def test_updates_teach_the_network_what_a_fall_is_worth(example):
    torch.manual_seed(0)
    network, replay = example.ReturnDistribution(), example.Replay(torch.device("cpu"))
    collector = example.Collector(network, replay, seed=0)
    for _ in range(40):
        collector.step(epsilon=1.0)
    loss = example.DistributionalDQNLoss(network, gamma=example.GAMMA)
    optimizer = torch.optim.Adam(loss.parameters(), lr=example.LEARNING_RATE)
    errors = []
    for _ in range(60):
        place, batch = replay.sample(weight_exponent=1.0)
        optimizer.zero_grad()
        loss(batch)["loss"].backward()
        optimizer.step()
        replay.update_priority(place, batch["td_error"])
        errors.append(batch["td_error"][batch["next", "terminated"]].mean().item())
    assert errors[0] > 3.8  # of 51 atoms none stands out: log 51 is 3.93
    assert errors[-1] < 3


# --- the replay -------------------------------------------------------------------------------------------------


@pytest.fixture
def numbered(example, monkeypatch):
    """A replay that has gone round: step number i of environment e is observed as (i, e) and rewarded with i.

    Environment 0 terminates at step 10, environment 1 is truncated there.
    """
    monkeypatch.setattr(example, "CAPACITY", 8)
    monkeypatch.setattr(example, "ENVIRONMENTS", 2)
    replay = example.Replay(torch.device("cpu"))
    for i in range(13):
        here = torch.tensor([[i, e, 0, 0] for e in range(2)])
        replay.add(
            observation=here,
            action=torch.tensor([i % 2, 1]),
            next_observation=here + torch.tensor([1, 0, 0, 0]),
            reward=torch.full((2,), float(i)),
            done=torch.tensor([i == 10, i == 10]),
            terminated=torch.tensor([i == 10, False]),
        )
    return replay


def test_a_transition_sums_discounted_rewards_up_to_the_end_of_what_is_known(example, numbered):
    torch.manual_seed(0)
    _, batch = numbered.sample(weight_exponent=0.0)
    for sample in batch:
        i, environment = (int(x) for x in sample["observation"][:2])
        assert 5 <= i <= 12
        # The episode ends with step 10, and what is stored with step 12.
        last = min(i + example.N_STEP - 1, 10 if i <= 10 else 12)
        n = last - i + 1
        assert sample["steps_to_next_obs"].item() == n
        reward = sum(example.GAMMA**k * (i + k) for k in range(n))
        assert sample["next", "reward"].item() == pytest.approx(reward)
        assert sample["next", "observation"][:2].tolist() == [last + 1, environment]
        assert sample["next", "done"].item() == (last == 10)
        assert sample["next", "terminated"].item() == (last == 10 and environment == 0)
        assert sample["action"].item() == (i % 2 if environment == 0 else 1)
    assert {tuple(x[:2].int().tolist()) for x in batch["observation"]} == {(i, e) for i in range(5, 13) for e in (0, 1)}


def test_steps_are_drawn_in_proportion_to_their_priorities_and_weighed_by_the_inverse(example, numbered):
    torch.manual_seed(0)
    numbered.priority.zero_()
    numbered.update_priority(torch.tensor([3, 6]), torch.tensor([[9.0], [1.0]]))
    high, low = (p**example.PRIORITY_EXPONENT for p in (9.0, 1.0))
    place, batch = numbered.sample(weight_exponent=1.0)
    assert set(place.tolist()) == {3, 6}
    share = (place == 3).float().mean().item()
    assert share == pytest.approx(high / (high + low), abs=0.15)  # more than three standard deviations
    weight = {p: w.item() for p, w in zip(place.tolist(), batch["priority_weight"], strict=True)}
    assert weight[3] / weight[6] == pytest.approx(low / high)  # the loss divides by the weights' sum


def test_new_steps_get_the_highest_priority_so_far(example, numbered):
    numbered.update_priority(torch.tensor([0]), torch.tensor([[100.0]]))
    row = torch.zeros(2)
    zeros = torch.zeros(2, 4)
    numbered.add(
        observation=zeros, next_observation=zeros, action=row.long(), reward=row, done=row.bool(), terminated=row.bool()
    )
    newest = (numbered.written - 1) % example.CAPACITY
    assert numbered.priority[newest].tolist() == pytest.approx([100.0**example.PRIORITY_EXPONENT] * 2)


def test_the_end_of_an_episode_is_stored_with_the_observation_it_ended_with(example):
    torch.manual_seed(0)
    replay = example.Replay(torch.device("cpu"))
    collector = example.Collector(example.ReturnDistribution(), replay, seed=0)
    for _ in range(60):
        collector.step(epsilon=1.0)
    done = replay.done[:59]
    assert done.any()
    following = replay.observation[1:60]
    assert torch.equal(replay.next_observation[:59][~done], following[~done])
    assert not torch.equal(replay.next_observation[:59][done], following[done])
    # A pole that falls has tilted by more than 12 degrees, or the cart has left its track.
    fallen = replay.next_observation[:59][done & replay.terminated[:59]]
    assert ((fallen[:, 2].abs() > 0.2094) | (fallen[:, 0].abs() > 2.4)).all()
    assert len(collector.finished_returns) == min(20, int(replay.done.sum()))


def test_the_example_imports_only_the_examples_extra():
    imported = set()
    for node in ast.walk(ast.parse(EXAMPLE.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).split(".")[0])
    assert imported - set(sys.stdlib_module_names) <= DEPENDENCIES
