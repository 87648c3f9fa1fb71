"""C51 on CartPole-v1, in one file: double Q-learning of distributions from prioritised n-step replay, with fusedrl.

    python examples/dqn_cartpole.py [--seed N] [--backend auto|torch|triton|reference|verify] [--out DIR]

Trains until 20 evaluation episodes average 475 (the environment's own bar for "solved"; 500 is the longest
episode), writes the learning curve as a PNG and exits with 0, or with 1 if the step budget runs out first. With
a CUDA device, network and replay live there, and the loss is one Triton kernel forward and one backward.

The algorithms: Bellemare et al. 2017, A distributional perspective on reinforcement learning (arXiv:1707.06887);
van Hasselt et al. 2016, Deep reinforcement learning with double Q-learning (arXiv:1509.06461); Schaul et al. 2016,
Prioritized experience replay (arXiv:1511.05952).
"""

import argparse
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import gymnasium
import matplotlib
import numpy as np
import torch
from fusedrl.kernels import BACKENDS, resolve_backend
from fusedrl.losses import DistributionalDQNLoss, SoftUpdate
from gymnasium.vector import AutoresetMode, VectorEnv
from tensordict import TensorDict
from torch import Tensor, nn
from tqdm import tqdm

matplotlib.use("Agg")  # before pyplot is imported: a PNG needs no display
import matplotlib.pyplot as plt

SOLVED_RETURN = 475.0
EVALUATION_EPISODES = 20
STEPS_PER_EVALUATION = 2000
EVALUATION_SEED = 1_000_000  # away from the seeds that training starts its environments with

ENVIRONMENTS = 8
UPDATES_PER_STEP = 2  # of all environments together
STEPS_BEFORE_LEARNING = 1000
CAPACITY = 4096  # of the replay, in steps of all environments
BATCH_SIZE = 128
LEARNING_RATE = 5e-4
TAU = 0.01  # share of the target network that each update renews
MAX_GRAD_NORM = 10.0
# Every step is rewarded with 1, so no return exceeds 1 / (1 − γ): the support holds them all.
GAMMA = 0.99
V_MIN, V_MAX, ATOMS = 0.0, 100.0, 51
N_STEP = 3
EPSILON_FIRST, EPSILON_LAST, EPSILON_STEPS = 1.0, 0.02, 8000
PRIORITY_EXPONENT = 0.5  # 0 would sample uniformly
WEIGHT_EXPONENT_FIRST, WEIGHT_EXPONENT_LAST = 0.4, 1.0  # 1 corrects the sampling in full

Curve = list[tuple[int, float]]  # environment steps taken, mean return


def make_environments(count: int) -> VectorEnv:
    # An environment that ends is reset in the same step, and the observation it ended with is handed over in
    # `info`. (Gymnasium's default spends an extra step on the reset: a transition whose action is ignored, and
    # that must be kept out of the replay.)
    return gymnasium.make_vec(
        "CartPole-v1",
        num_envs=count,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP},
    )


class ReturnDistribution(nn.Module):
    """log p_i(s, a): of each atom i of the support and each action."""

    action_space = "categorical"  # the loss reads this, and the support, from the network

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("support", torch.linspace(V_MIN, V_MAX, ATOMS))
        self.layers = nn.Sequential(
            nn.Linear(4, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, ATOMS * 2)
        )

    def forward(self, observation: Tensor) -> Tensor:
        """The log-probabilities, shape [*batch, ATOMS, 2], of observations [*batch, 4]."""
        return self.layers(observation).unflatten(-1, (ATOMS, 2)).log_softmax(-2)

    @torch.no_grad()
    def greedy_action(self, observation: Tensor) -> Tensor:
        """The action of the highest mean return."""
        return (self.support @ self(observation).exp()).argmax(-1)


class Replay:
    """The last CAPACITY steps of every environment, in a ring, sampled in proportion to their priorities."""

    def __init__(self, device: torch.device) -> None:
        steps = (CAPACITY, ENVIRONMENTS)
        self.observation = torch.zeros(*steps, 4, device=device)
        self.next_observation = torch.zeros(*steps, 4, device=device)
        self.action = torch.zeros(steps, dtype=torch.int64, device=device)
        self.reward = torch.zeros(steps, device=device)
        self.done = torch.zeros(steps, dtype=torch.bool, device=device)
        self.terminated = torch.zeros(steps, dtype=torch.bool, device=device)
        self.priority = torch.zeros(steps, device=device)  # 0 where nothing is stored: never drawn
        self.highest = torch.ones((), device=device)
        self.written = 0

    def add(self, **step: Tensor) -> None:
        """Store a step of every environment, with a priority that has it drawn soon."""
        t = self.written % CAPACITY
        for name, x in step.items():
            getattr(self, name)[t] = x
        self.priority[t] = self.highest
        self.written += 1

    def sample(self, weight_exponent: float) -> tuple[Tensor, TensorDict]:
        """Places of BATCH_SIZE transitions of up to N_STEP steps, and the transitions."""
        probability = self.priority.flatten() / self.priority.sum()
        place = torch.multinomial(probability, BATCH_SIZE, replacement=True)
        t, environment = place // ENVIRONMENTS, place % ENVIRONMENTS
        # A transition ends with the episode, and at the newest step: it then has fewer than N_STEP steps.
        age = (self.written - 1 - t) % CAPACITY
        ahead = torch.arange(N_STEP, device=place.device)
        window = (t[:, None] + ahead) % CAPACITY, environment[:, None]
        ends = self.done[window] | (ahead >= age[:, None]) | (ahead == N_STEP - 1)
        last = ends.int().argmax(-1)
        reward = (self.reward[window] * GAMMA**ahead * (ahead <= last[:, None])).sum(-1)
        end = (t + last) % CAPACITY, environment
        stored = min(self.written, CAPACITY) * ENVIRONMENTS
        weight = (stored * probability[place]) ** -weight_exponent
        transitions = {
            "observation": self.observation[t, environment],
            "action": self.action[t, environment],
            "steps_to_next_obs": last[:, None] + 1,  # the loss discounts what follows by γ to this power
            "priority_weight": weight,  # the loss divides by their sum
            "next": {
                "observation": self.next_observation[end],
                "reward": reward[:, None],
                # Only what is terminated has no value afterwards; the time limit just cut it off.
                "terminated": self.terminated[end][:, None],
                "done": self.done[end][:, None],
            },
        }
        return place, TensorDict(transitions, [BATCH_SIZE])

    def update_priority(self, place: Tensor, td_error: Tensor) -> None:
        """Have the transitions at ``place`` drawn as often as their errors say."""
        priority = td_error.squeeze(-1) ** PRIORITY_EXPONENT
        self.priority.view(-1)[place] = priority
        self.highest = torch.maximum(self.highest, priority.max())


class Collector:
    """Steps the environments with the ε-greedy policy and fills the replay."""

    def __init__(self, network: ReturnDistribution, replay: Replay, seed: int) -> None:
        self.network, self.replay = network, replay
        self.device = replay.priority.device
        self.environments = make_environments(ENVIRONMENTS)
        observation, _ = self.environments.reset(seed=seed)
        self.observation = torch.from_numpy(observation).to(self.device)
        self.episode_return = np.zeros(ENVIRONMENTS)
        self.finished_returns: deque[float] = deque(maxlen=20)

    def step(self, epsilon: float) -> None:
        """One step of every environment, at random with probability ``epsilon``."""
        action = self.network.greedy_action(self.observation)
        explore = torch.rand(ENVIRONMENTS, device=self.device) < epsilon
        action = torch.where(explore, torch.randint_like(action, 2), action)
        observation, reward, terminated, truncated, info = self.environments.step(action.cpu().numpy())
        done = terminated | truncated
        # Where an episode ended, `observation` already opens the next one. What this step led to is in `final_obs`.
        next_observation = observation.copy()
        if done.any():
            next_observation[done] = np.stack(info["final_obs"][done])
        self.episode_return += reward
        self.finished_returns.extend(self.episode_return[done])
        self.episode_return[done] = 0.0
        self.replay.add(
            observation=self.observation,
            action=action,
            next_observation=torch.from_numpy(next_observation),
            reward=torch.from_numpy(reward),
            done=torch.from_numpy(done),
            terminated=torch.from_numpy(terminated),
        )
        self.observation = torch.from_numpy(observation).to(self.device)


def evaluate(network: ReturnDistribution, seed: int) -> float:
    """Mean return of one episode in each of EVALUATION_EPISODES environments, with the greedy actions."""
    environments = make_environments(EVALUATION_EPISODES)
    observation, _ = environments.reset(seed=seed)
    returns, alive = np.zeros(EVALUATION_EPISODES), np.ones(EVALUATION_EPISODES, dtype=bool)
    while alive.any():
        action = network.greedy_action(torch.from_numpy(observation).to(network.support.device))
        observation, reward, terminated, truncated, _ = environments.step(action.cpu().numpy())
        returns += reward * alive  # what an environment earns after its first episode doesn't count
        alive &= ~(terminated | truncated)
    return float(returns.mean())


def between(first: float, last: float, share: float) -> float:
    return first + (last - first) * min(share, 1.0)


def train(seed: int, backend: str | None, budget: int) -> tuple[Curve, Curve]:
    """The curves of training and evaluation; they end when an evaluation solves the task, or with the budget."""
    torch.manual_seed(seed)  # weights, exploration and samples; the environments get the seed at their reset
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = ReturnDistribution().to(device)
    # The loss trains the very parameters that the policy acts with, and keeps the target network.
    loss = DistributionalDQNLoss(network, gamma=GAMMA, backend=backend)
    target = SoftUpdate(loss, tau=TAU)
    optimizer = torch.optim.Adam(loss.parameters(), lr=LEARNING_RATE)
    replay = Replay(device)
    collector = Collector(network, replay, seed)

    training: Curve = []
    evaluation: Curve = [(0, evaluate(network, EVALUATION_SEED + seed))]
    runs_on = resolve_backend(backend, torch.empty(0, device=device))
    with tqdm(total=budget, unit=" steps", desc=f"C51, backend {runs_on}") as progress:
        while progress.n < budget and evaluation[-1][1] < SOLVED_RETURN:
            for _ in range(STEPS_PER_EVALUATION // ENVIRONMENTS):
                collector.step(between(EPSILON_FIRST, EPSILON_LAST, progress.n / EPSILON_STEPS))
                progress.update(ENVIRONMENTS)
                if progress.n < STEPS_BEFORE_LEARNING:
                    continue
                for _ in range(UPDATES_PER_STEP):
                    place, batch = replay.sample(
                        between(WEIGHT_EXPONENT_FIRST, WEIGHT_EXPONENT_LAST, progress.n / budget)
                    )
                    optimizer.zero_grad()
                    loss(batch)["loss"].backward()
                    nn.utils.clip_grad_norm_(loss.parameters(), MAX_GRAD_NORM)
                    optimizer.step()
                    target.step()
                    replay.update_priority(place, batch["td_error"])  # written by the loss
            training.append((progress.n, float(np.mean(collector.finished_returns))))
            evaluation.append((progress.n, evaluate(network, EVALUATION_SEED + seed)))
            progress.set_postfix_str(f"return {training[-1][1]:.0f}, evaluation {evaluation[-1][1]:.0f}")
    return training, evaluation


def plot(training: Curve, evaluation: Curve, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    # Exploring actions, and only episodes that have ended: the longest ones enter late.
    axes.plot(*zip(*training, strict=True), label="training, last 20 episodes")
    axes.plot(*zip(*evaluation, strict=True), "o-", label=f"evaluation, {EVALUATION_EPISODES} episodes")
    axes.axhline(SOLVED_RETURN, linestyle="--", color="grey", label=f"solved: {SOLVED_RETURN:g}")
    axes.set(xlabel="environment steps", ylabel="mean return", title="C51 on CartPole-v1", ylim=(0, 510))
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train C51 on CartPole-v1 with fusedrl.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", choices=BACKENDS, help="what computes the loss (default: auto)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the learning curve")
    parser.add_argument("--steps", type=int, default=80_000, help="budget of environment steps")
    arguments = parser.parse_args(argv)
    if arguments.seed < 0 or arguments.steps < 1:
        parser.error("--seed must be at least 0, --steps at least 1")
    try:
        resolve_backend(arguments.backend, torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        parser.error(f"--backend: {error}")
    try:  # before the training, not after it
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out can't be made: {error}")

    start = time.perf_counter()
    training, evaluation = train(arguments.seed, arguments.backend, arguments.steps)
    seconds = time.perf_counter() - start
    picture = arguments.out / f"dqn_cartpole_seed{arguments.seed}.png"
    plot(training, evaluation, picture)
    steps, score = evaluation[-1]
    solved = score >= SOLVED_RETURN
    print(f"learning curve: {picture.resolve()}")
    print(
        f"{'solved' if solved else 'NOT solved'}: mean return {score:.1f} over {EVALUATION_EPISODES} "
        f"evaluation episodes after {steps} steps in {seconds:.1f} s (seed {arguments.seed})"
    )
    return 0 if solved else 1


if __name__ == "__main__":
    # Networks this small lose more to waking a second thread than they gain from it.
    torch.set_num_threads(1)
    raise SystemExit(main())
