"""The environments are gymnasium's, an iteration waits for nothing, and the example trains and says so."""

import ast
import importlib.util
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers_capture import Capturable
from helpers_estimators import no_host_sync

EXAMPLE = Path(__file__).parents[1] / "examples" / "ppo_gpu.py"
DEPENDENCIES = {"fusedrl", "gymnasium", "matplotlib", "numpy", "tensordict", "torch", "tqdm"}
CPU = torch.device("cpu")


@pytest.fixture
def example(monkeypatch) -> Iterator[ModuleType]:
    for name in ("gymnasium", "matplotlib", "tqdm"):
        pytest.importorskip(name)
    spec = importlib.util.spec_from_file_location("ppo_gpu", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "EVALUATION_EPISODES", 4)
    # As when it is run: where other processes keep the cores busy, small operations wait for a second thread.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield module
    torch.set_num_threads(threads)


def learner(example: ModuleType, environments: int = 8, seed: int = 0):
    torch.manual_seed(seed)
    return example.Learner(environments, None, CPU)


def state_of(learner) -> list[torch.Tensor]:
    """All that an iteration changes, but for the optimizer."""
    environments = learner.environments
    return [x.clone() for x in (environments.state, environments.elapsed, *learner.loss.parameters())]


# --- environments -----------------------------------------------------------------------------------------------------


def gymnasium_steps(states: np.ndarray, actions: np.ndarray):
    """One step of gymnasium's CartPole from each state: next observation, reward and whether it terminated."""
    import gymnasium

    environment = gymnasium.make("CartPole-v1").unwrapped
    steps = []
    for state, action in zip(states, actions, strict=True):
        environment.reset()
        environment.state = state
        steps.append(environment.step(int(action))[:3])
    observation, reward, terminated = zip(*steps, strict=True)
    return np.stack(observation), np.array(reward), np.array(terminated)


def test_a_step_is_that_of_gymnasium_from_any_state(example):
    torch.manual_seed(0)
    poles = example.CartPole(500, CPU)
    # Some beyond each of the limits.
    poles.state.uniform_(-1.2, 1.2).mul_(torch.tensor([2.2, 3.0, 0.2, 3.0]))
    before, action = poles.state.clone(), torch.randint(2, (500,))
    observation, reward, terminated = gymnasium_steps(before.numpy(), action.numpy())
    assert 50 < terminated.sum() < 450
    seen, ours, truncated = poles.step(action)
    # One rounding of float32 where the sines differ in the last place of float64.
    np.testing.assert_allclose(seen.numpy(), observation, rtol=2e-7, atol=1e-9)
    assert np.array_equal(ours.numpy(), terminated)
    assert not truncated.any()
    assert (reward == 1).all()


@pytest.mark.parametrize("dimension", [0, 2])
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_limits_are_those_of_gymnasium_to_the_last_bit(example, dimension, sign):
    limit = (2.4, None, 12 * 2 * math.pi / 360)[dimension]
    states = np.zeros((3, 4))
    states[:, dimension] = sign * np.array([np.nextafter(limit, 0), limit, np.nextafter(limit, 9)])
    # Without a velocity the position and the angle stay as they are in the first step.
    poles = example.CartPole(3, CPU)
    poles.state.copy_(torch.from_numpy(states))
    action = torch.zeros(3, dtype=torch.int64)
    wanted = gymnasium_steps(states, action.numpy())[2]
    assert wanted.tolist() == [False, False, True]
    assert poles.step(action)[1].tolist() == wanted.tolist()


def test_an_episode_is_that_of_gymnasium_to_its_end(example):
    import gymnasium

    torch.manual_seed(0)
    poles = example.CartPole(4, CPU)
    environments = [gymnasium.make("CartPole-v1") for _ in range(4)]
    for environment, state in zip(environments, poles.state.numpy(), strict=True):
        environment.reset()
        environment.unwrapped.state = state.copy()
    going_on = torch.ones(4, dtype=torch.bool)
    for _ in range(200):
        action = torch.randint(2, (4,))
        observation, terminated, _ = poles.step(action)
        for i in going_on.nonzero().flatten().tolist():
            wanted, reward, ended, _, _ = environments[i].step(int(action[i]))
            np.testing.assert_allclose(observation[i].numpy(), wanted, rtol=1e-6, atol=1e-7)
            assert terminated[i].item() == ended
            assert reward == 1
        going_on &= ~terminated
    assert not going_on.any()


def test_the_time_limit_truncates_at_the_step_at_which_gymnasium_does(example, monkeypatch):
    import gymnasium

    limit = gymnasium.spec("CartPole-v1").max_episode_steps
    assert limit == example.CartPole.TIME_LIMIT
    poles = example.CartPole(2, CPU)
    monkeypatch.setattr(poles, "_moved", lambda action: torch.zeros(2, 4, dtype=torch.float64))  # they never fall
    poles.elapsed[1] = 7
    ends = [poles.step(torch.zeros(2, dtype=torch.int64))[1:] for _ in range(limit)]
    truncated = torch.stack([x for _, x in ends])
    assert truncated[:, 0].nonzero().flatten().tolist() == [limit - 1]
    assert truncated[:, 1].nonzero().flatten().tolist() == [limit - 8]
    assert not torch.stack([x for x, _ in ends]).any()


def test_those_that_end_start_again_and_the_others_go_on(example):
    torch.manual_seed(0)
    poles = example.CartPole(64, CPU)
    for _ in range(30):
        before = poles.elapsed.clone()
        observation, terminated, truncated = poles.step(torch.zeros(64, dtype=torch.int64))
        done = terminated | truncated
        assert torch.equal(poles.observation[~done], observation[~done])
        assert (poles.state[done].abs() <= 0.05).all()
        assert torch.equal(poles.elapsed, torch.where(done, 0, before + 1))
    assert poles.elapsed.max() < 30  # pushed to one side, every pole has fallen


def test_first_states_are_spread_evenly(example):
    torch.manual_seed(0)
    state = example.CartPole(10_000, CPU).state
    assert state.abs().max() <= 0.05
    torch.testing.assert_close(state.std(0), torch.full((4,), 0.1 / 12**0.5, dtype=torch.float64), rtol=0.02, atol=0)


# --- the policy's draws -----------------------------------------------------------------------------------------------


def test_actions_are_drawn_with_their_probabilities(example):
    torch.manual_seed(0)
    probabilities = torch.tensor([0.7, 0.0, 0.3])
    drawn = example.Categorical(logits=probabilities.log(), validate_args=False).sample((20_000,))
    shares = torch.stack([(drawn == i).float().mean() for i in range(3)])
    torch.testing.assert_close(shares, probabilities, rtol=0, atol=0.01)  # three standard errors
    assert shares[1] == 0


def test_the_evaluation_takes_the_likeliest_action(example):
    dist = example.Categorical(logits=torch.tensor([[0.0, 1.0], [1.0, 0.0]]), validate_args=False)
    assert dist.deterministic_sample.tolist() == [1, 0]


# --- the iteration ----------------------------------------------------------------------------------------------------


def test_an_iteration_waits_for_nothing_and_copies_nothing_from_the_host(example):
    learning = learner(example)
    before = state_of(learning)
    with no_host_sync(), Capturable("cpu"):
        learning.iterate()
    assert all(not torch.equal(a, b) for a, b in zip(before, state_of(learning), strict=True))


def test_an_iteration_changes_in_place_what_the_next_one_starts_from(example):
    learning = learner(example)

    def addresses():
        environments, optimizer = learning.environments, learning.optimizer
        lasting = [environments.state, environments.elapsed, learning.finished, *learning.loss.parameters()]
        lasting += [group["lr"] for group in optimizer.param_groups]
        lasting += [x for state in optimizer.state.values() for x in state.values()]
        return [x.data_ptr() for x in lasting]

    learning.iterate()
    before = addresses()
    learning.iterate()
    assert before == addresses()
    assert all(p.grad is None for p in learning.loss.parameters())


def test_a_step_leads_to_the_next_observation_of_its_own_episode(example):
    rollout = learner(example).collect()
    assert rollout.batch_size == (example.STEPS_PER_ROLLOUT, 8)
    done = rollout["next", "done"][:-1, :, 0]
    led_to, following = rollout["next", "observation"][:-1], rollout["observation"][1:]
    assert done.any()
    assert torch.equal(led_to[~done], following[~done])
    assert (following[done].abs() <= 0.05).all()
    assert (led_to[done][:, 2].abs() > 0.2).all()
    assert (rollout["next", "reward"] == 1).all()


def test_the_time_limit_ends_an_episode_without_terminating_it(example):
    learning = learner(example)
    learning.environments.elapsed.fill_(example.CartPole.TIME_LIMIT - 3)  # no pole falls within 3 steps
    following = learning.collect()["next"][:3]
    assert following["done"][:, :, 0].all(1).tolist() == [False, False, True]
    assert not following["terminated"].any()


def test_every_transition_is_in_one_minibatch_of_every_epoch(example, monkeypatch):
    learning = learner(example)
    rollout = learning.collect()
    rollout["advantage"] = torch.arange(rollout.numel(), dtype=torch.float32).view(*rollout.batch_size, 1)
    rollout["value_target"] = torch.zeros_like(rollout["advantage"])
    seen, loss = [], learning.loss.forward
    monkeypatch.setattr(learning.loss, "forward", lambda data: seen.append(data["advantage"].flatten()) or loss(data))
    learning.update(rollout)
    assert len(seen) == example.EPOCHS * example.MINIBATCHES
    epochs = torch.cat(seen).view(example.EPOCHS, -1)
    assert torch.equal(epochs.sort().values, rollout["advantage"].flatten().expand_as(epochs))
    assert not torch.equal(epochs[0], epochs[1])


def test_the_mean_return_counts_each_episode_once(example):
    learning = learner(example)
    lengths, running = [], torch.zeros(8)
    for _ in range(2):
        for done in learning.collect()["next", "done"][..., 0]:
            running += 1
            lengths += running[done].tolist()
            running[done] = 0
    assert learning.mean_return() == pytest.approx(np.mean(lengths))
    assert math.isnan(learning.mean_return())


def test_the_learning_rate_follows_the_policy(example, monkeypatch):
    for target, faster in ((1e-6, False), (10.0, True)):
        monkeypatch.setattr(example, "TARGET_KL", target)
        learning = learner(example)
        learning.iterate()
        rate = learning.optimizer.param_groups[0]["lr"]
        assert (rate > example.LEARNING_RATE) == faster
        assert rate != example.LEARNING_RATE


# --- the whole --------------------------------------------------------------------------------------------------------


def test_a_few_iterations_multiply_the_return(example):
    training, _, _ = example.train(seed=0, backend=None, environments=64, budget=20)
    first, last = training[0][1], training[-1][1]
    assert first < 40  # actions at random hold the pole up for about 22 steps
    assert last > 3 * first


def test_the_same_seed_gives_the_same_curves_and_another_seed_does_not(example):
    curves = [example.train(seed=seed, backend=None, environments=16, budget=5)[:2] for seed in (1, 1, 2)]
    assert curves[0] == curves[1]
    assert curves[0] != curves[2]


def test_running_out_of_budget_exits_with_1_and_still_draws_the_curve(example, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    assert example.main(["--iterations", "1", "--envs", "4", "--backend", "reference", "--out", str(out)]) == 1
    captured = capsys.readouterr()
    (picture,) = out.iterdir()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in captured.out
    assert "NOT solved" in captured.out
    assert "environment steps per second" in captured.out
    assert "reference" in captured.err  # the progress bar names the backend that ran


def test_reaching_the_return_exits_with_0(example, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(example, "SOLVED_RETURN", 1.0)
    assert example.main(["--envs", "4", "--out", str(tmp_path)]) == 0
    assert "\nsolved" in capsys.readouterr().out


@pytest.mark.parametrize("backend", ["nonsense", "verify"])
def test_a_backend_that_is_unknown_or_reads_on_the_host_is_refused(example, backend, capsys):
    with pytest.raises(SystemExit) as refusal:
        example.main(["--backend", backend])
    assert refusal.value.code == 2
    assert backend in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a CUDA device has CUDA graphs")
def test_a_replayed_iteration_goes_on_learning(example, capsys):
    torch.manual_seed(0)
    learning = example.Learner(64, None, torch.device("cuda"))
    replay = example.captured(learning)
    assert "captured" in capsys.readouterr().out
    for _ in range(2):
        before = state_of(learning)
        replay()
        assert all(not torch.equal(a, b) for a, b in zip(before, state_of(learning), strict=True))
    assert math.isfinite(learning.mean_return())


def test_the_example_imports_only_the_examples_extra():
    imported = set()
    for node in ast.walk(ast.parse(EXAMPLE.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).split(".")[0])
    assert imported - set(sys.stdlib_module_names) <= DEPENDENCIES
