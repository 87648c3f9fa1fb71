"""TD3 on Pendulum-v1, in one file: transitions with gymnasium, losses and target networks with fusedrl.

    python examples/td3_pendulum.py [--seed N] [--steps N] [--out DIR]

Trains until 20 evaluation episodes average −200 (policies that don't swing the pendulum up earn less than −1000),
writes the learning curve as a PNG and exits with 0, or with 1 if the step budget runs out first. With a CUDA device,
networks and replay buffer live there.

The algorithm: Fujimoto et al. 2018, Addressing function approximation error in actor-critic methods (arXiv:1802.09477).
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
from fusedrl.losses import SoftUpdate, TD3Loss
from gymnasium.vector import AutoresetMode, VectorEnv
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from tqdm import tqdm

matplotlib.use("Agg")  # before pyplot is imported: a PNG needs no display
import matplotlib.pyplot as plt

SOLVED_RETURN = -200.0
EVALUATION_EPISODES = 20
STEPS_PER_EVALUATION = 2000
EVALUATION_SEED = 1_000_000  # away from the seeds that training starts its environments with

ENVIRONMENTS = 8
RANDOM_STEPS = 1600  # one episode in each environment, before there is anything to learn from
UPDATES_PER_STEP = 4  # of the Q networks, for one step in each environment
POLICY_DELAY = 2  # updates of the Q networks for each one of the policy and of the targets
BATCH_SIZE = 128
LEARNING_RATE = 1e-3
GAMMA = 0.98
TAU = 0.01
TORQUE = 2.0  # actions are in [−2, 2]
# In units of torque: the standard deviation of the noise on the actions that are taken, and, of that on the actions
# in the targets, standard deviation and bound.
EXPLORATION_NOISE = 0.2
POLICY_NOISE, NOISE_CLIP = 0.4, 1.0
REWARD_SCALE = 0.1  # rewards go down to −16, returns to −800: too large for the networks' first guesses

Curve = list[tuple[int, float]]  # environment steps taken, mean return


def make_environments(count: int) -> VectorEnv:
    # An environment that ends is reset in the same step, and the observation it ended with is handed over in `info`.
    return gymnasium.make_vec(
        "Pendulum-v1",
        num_envs=count,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP},
    )


class Policy(nn.Module):
    """Torque for an observation: cosine, sine and speed of the pendulum."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        """Shape ``[B, 3]`` to ``[B, 1]``."""
        return TORQUE * self.layers(observation).tanh()


class QValue(nn.Module):
    """Return that follows a torque."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, observation: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Shapes ``[B, 3]`` and ``[B, 1]`` to ``[B, 1]``."""
        return self.layers(torch.cat([observation, action], -1))


def make_loss(device: torch.device) -> tuple[TensorDictModule, TD3Loss]:
    """The policy, and the loss that trains it: it holds both Q networks, drawn anew, and all target networks."""
    policy = TensorDictModule(Policy(), in_keys=["observation"], out_keys=["action"]).to(device)
    qvalue = TensorDictModule(QValue(), in_keys=["observation", "action"], out_keys=["state_action_value"]).to(device)
    loss = TD3Loss(policy, qvalue, bounds=(-TORQUE, TORQUE), policy_noise=POLICY_NOISE, noise_clip=NOISE_CLIP)
    return policy, loss.make_value_estimator("TD0", gamma=GAMMA)


class ReplayBuffer:
    """The transitions of the last steps, in preallocated memory: batch size [capacity]."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        column = (capacity, 1)
        transitions = {
            "observation": torch.zeros(capacity, 3),
            "action": torch.zeros(column),
            "next": {
                "observation": torch.zeros(capacity, 3),
                "reward": torch.zeros(column),
                "done": torch.zeros(column, dtype=torch.bool),
                "terminated": torch.zeros(column, dtype=torch.bool),
            },
        }
        self.transitions = TensorDict(transitions, [capacity], device=device)
        self.added = 0

    def add(self, transitions: TensorDict) -> None:
        """Put ``transitions`` in the place of the oldest."""
        at = (self.added + torch.arange(len(transitions), device=transitions.device)) % len(self.transitions)
        self.transitions[at] = transitions
        self.added += len(transitions)

    def sample(self) -> TensorDict:
        """A minibatch, drawn with replacement."""
        index = torch.randint(min(self.added, len(self.transitions)), (BATCH_SIZE,), device=self.transitions.device)
        return self.transitions[index]


class Collector:
    """Steps the environments with the policy and exploration noise, at first with torques at random."""

    def __init__(self, policy: TensorDictModule, seed: int, device: torch.device) -> None:
        self.policy, self.device = policy, device
        self.environments = make_environments(ENVIRONMENTS)
        observation, _ = self.environments.reset(seed=seed)
        self.observation = torch.from_numpy(observation)
        self.episode_return = np.zeros(ENVIRONMENTS)
        self.finished_returns: deque[float] = deque(maxlen=20)

    @torch.no_grad()
    def step(self, explore: bool) -> TensorDict:
        """One step of every environment: transitions of batch size [ENVIRONMENTS]."""
        step = TensorDict({"observation": self.observation}, [ENVIRONMENTS], device=self.device)
        if explore:
            step["action"] = TORQUE * (2 * torch.rand(ENVIRONMENTS, 1, device=self.device) - 1)
        else:
            action = self.policy(step)["action"]
            step["action"] = (action + EXPLORATION_NOISE * torch.randn_like(action)).clamp(-TORQUE, TORQUE)
        observation, reward, terminated, truncated, info = self.environments.step(step["action"].cpu().numpy())
        done = terminated | truncated
        # Where an episode ended, `observation` already opens the next one. What this step led to is in `final_obs`;
        # a pendulum never terminates, it is only cut off by the time limit, and there its value goes on.
        next_observation = observation.copy()
        if done.any():
            next_observation[done] = np.stack(info["final_obs"][done])
        self.episode_return += reward
        self.finished_returns.extend(self.episode_return[done])
        self.episode_return[done] = 0.0
        step["next"] = TensorDict(
            {
                "observation": torch.from_numpy(next_observation),
                "reward": REWARD_SCALE * torch.from_numpy(reward).float().unsqueeze(-1),
                "done": torch.from_numpy(done).unsqueeze(-1),
                "terminated": torch.from_numpy(terminated).unsqueeze(-1),
            },
            [ENVIRONMENTS],
            device=self.device,
        )
        self.observation = torch.from_numpy(observation)
        return step


@torch.no_grad()
def evaluate(policy: TensorDictModule, seed: int, device: torch.device) -> float:
    """Mean return of one episode, without noise, in each of EVALUATION_EPISODES environments."""
    environments = make_environments(EVALUATION_EPISODES)
    observation, _ = environments.reset(seed=seed)
    returns, alive = np.zeros(EVALUATION_EPISODES), np.ones(EVALUATION_EPISODES, dtype=bool)
    while alive.any():
        step = policy(TensorDict({"observation": torch.from_numpy(observation)}, [len(alive)], device=device))
        observation, reward, terminated, truncated, _ = environments.step(step["action"].cpu().numpy())
        returns += reward * alive
        alive &= ~(terminated | truncated)
    return float(returns.mean())


class Learner:
    """Updates of the Q networks, and with every POLICY_DELAY-th of them one of the policy and of the targets."""

    def __init__(self, loss: TD3Loss) -> None:
        self.loss = loss
        self.targets = SoftUpdate(loss, tau=TAU)
        self.policy_optimizer = torch.optim.Adam(loss.actor_network_params.parameters(), lr=LEARNING_RATE)
        self.value_optimizer = torch.optim.Adam(loss.qvalue_network_params.parameters(), lr=LEARNING_RATE)
        self.updates = 0

    def update(self, transitions: TensorDict) -> None:
        """One update from a minibatch."""
        losses = self.loss(transitions)
        self.updates += 1
        delayed = self.updates % POLICY_DELAY == 0
        # Either loss has gradients for its own networks only. Both go back before a step changes what they go through.
        self.value_optimizer.zero_grad()
        losses["loss_qvalue"].backward()
        if delayed:
            self.policy_optimizer.zero_grad()
            losses["loss_actor"].backward()
            self.policy_optimizer.step()
        self.value_optimizer.step()
        if delayed:
            self.targets.step()


def train(seed: int, budget: int) -> tuple[Curve, Curve]:
    """The curves of training and evaluation; they end when an evaluation solves the task, or with the budget."""
    torch.manual_seed(seed)  # weights, noise and minibatches; the environments get the seed at their reset
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy, loss = make_loss(device)
    learner = Learner(loss)
    collector, replay = Collector(policy, seed, device), ReplayBuffer(budget + ENVIRONMENTS, device)

    training: Curve = []
    evaluation: Curve = [(0, evaluate(policy, EVALUATION_SEED + seed, device))]
    with tqdm(total=budget, unit=" steps", desc="TD3") as progress:
        while progress.n < budget and evaluation[-1][1] < SOLVED_RETURN:
            explore = progress.n < RANDOM_STEPS
            replay.add(collector.step(explore))
            progress.update(ENVIRONMENTS)
            for _ in range(0 if explore else UPDATES_PER_STEP):
                learner.update(replay.sample())
            if progress.n % STEPS_PER_EVALUATION == 0:
                training.append((progress.n, float(np.mean(collector.finished_returns))))
                evaluation.append((progress.n, evaluate(policy, EVALUATION_SEED + seed, device)))
                progress.set_postfix_str(f"return {training[-1][1]:.0f}, evaluation {evaluation[-1][1]:.0f}")
    return training, evaluation


def plot(training: Curve, evaluation: Curve, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    if training:
        axes.plot(*zip(*training, strict=True), label="training, last 20 episodes")
    axes.plot(*zip(*evaluation, strict=True), "o-", label=f"evaluation, {EVALUATION_EPISODES} episodes")
    axes.axhline(SOLVED_RETURN, linestyle="--", color="grey", label=f"solved: {SOLVED_RETURN:g}")
    axes.set(xlabel="environment steps", ylabel="mean return", title="TD3 on Pendulum-v1", ylim=(-1700, 0))
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train TD3 on Pendulum-v1 with fusedrl.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the learning curve")
    parser.add_argument("--steps", type=int, default=40_000, help="budget of environment steps")
    arguments = parser.parse_args(argv)
    if arguments.seed < 0 or arguments.steps < 1:
        parser.error("--seed must be at least 0, --steps at least 1")
    try:  # before the training, not after it
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out can't be made: {error}")

    start = time.perf_counter()
    training, evaluation = train(arguments.seed, arguments.steps)
    seconds = time.perf_counter() - start
    picture = arguments.out / f"td3_pendulum_seed{arguments.seed}.png"
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
