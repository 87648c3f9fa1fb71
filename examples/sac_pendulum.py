"""SAC on Pendulum-v1, in one file: replay from several environments at once, losses and targets with fusedrl.

    python examples/sac_pendulum.py [--seed N] [--steps N] [--out DIR]

Swing a pendulum up and keep it there with a torque too weak to lift it at once. Trains until 20 evaluation episodes
average −200 (a return no lower than that means upright within about two swings; the best that can be had is around
−150), writes the learning curve as a PNG and exits with 0, or with 1 if the step budget runs out first.

The algorithm: Haarnoja et al. 2018, Soft actor-critic algorithms and applications (arXiv:1812.05905).
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import gymnasium
import matplotlib
import numpy as np
import torch
from fusedrl.losses import SACLoss, SoftUpdate
from gymnasium.vector import AutoresetMode, VectorEnv
from tensordict import TensorDict
from tensordict.nn import (
    InteractionType,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    set_interaction_type,
)
from torch import Tensor, nn
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution
from tqdm import tqdm

matplotlib.use("Agg")  # before pyplot is imported: a PNG needs no display
import matplotlib.pyplot as plt

SOLVED_RETURN = -200.0
EVALUATION_EPISODES = 20
STEPS_PER_EVALUATION = 1_600
EVALUATION_SEED = 1_000_000  # away from the seeds that training starts its environments with

OBSERVATION, ACTION = 3, 1  # cosine, sine and speed of the angle; torque
MAX_TORQUE = 2.0
REWARD_SCALE = 0.1  # rewards of up to −16 per step make values of −1000, too far from where networks start

ENVIRONMENTS = 8
RANDOM_STEPS = 800  # before the first update, actions are drawn at random
UPDATES_PER_STEP = 0.5
BATCH_SIZE = 256
LEARNING_RATE = 1e-3
GAMMA = 0.98
TAU = 0.01  # share of the target networks that is renewed at each update

Curve = list[tuple[int, float]]  # environment steps taken, mean return


def make_environments(count: int) -> VectorEnv:
    # An environment that ends is reset in the same step, and the observation it ended with is handed over in
    # `info`. (Gymnasium's default spends an extra step on the reset: a transition whose action is ignored, and
    # that must be kept out of the replay buffer.)
    return gymnasium.make_vec(
        "Pendulum-v1",
        num_envs=count,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP},
    )


class GaussianParameters(nn.Module):
    """Mean and standard deviation of the torque before it is squashed."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(OBSERVATION, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2 * ACTION)
        )

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Both, from the observation."""
        loc, log_scale = self.layers(observation).chunk(2, -1)
        return loc, log_scale.clamp(-5, 2).exp()


class SquashedNormal(TransformedDistribution):
    """tanh of a normal variable: an action between −1 and 1."""

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        # With the cache, the log-probability of a drawn action needs no inverse of tanh, which has none at ±1.
        super().__init__(Independent(Normal(loc, scale), 1), TanhTransform(cache_size=1))

    @property
    def deterministic_sample(self) -> Tensor:
        """The action that the evaluation takes."""
        return self.base_dist.mean.tanh()


class Judge(nn.Module):
    """Q(s, a)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(OBSERVATION + ACTION, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
        )

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        """Q, of shape [*B, 1]."""
        return self.layers(torch.cat([observation, action], -1))


def make_networks(device: torch.device) -> tuple[ProbabilisticTensorDictSequential, TensorDictModule]:
    policy = ProbabilisticTensorDictSequential(
        TensorDictModule(GaussianParameters(), in_keys=["observation"], out_keys=["loc", "scale"]),
        ProbabilisticTensorDictModule(
            in_keys=["loc", "scale"],
            out_keys=["action"],
            distribution_class=SquashedNormal,
            default_interaction_type=InteractionType.RANDOM,
        ),
    )
    qvalue = TensorDictModule(Judge(), in_keys=["observation", "action"], out_keys=["state_action_value"])
    return policy.to(device), qvalue.to(device)


class Replay:
    """All transitions so far, in memory that is there from the start."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        transition = {
            "observation": torch.zeros(capacity, OBSERVATION),
            "action": torch.zeros(capacity, ACTION),
            "next": {
                "observation": torch.zeros(capacity, OBSERVATION),
                "reward": torch.zeros(capacity, 1),
                "done": torch.zeros(capacity, 1, dtype=torch.bool),
                "terminated": torch.zeros(capacity, 1, dtype=torch.bool),
            },
        }
        self.memory = TensorDict(transition, [capacity], device=device)
        self.size = 0

    def extend(self, transitions: TensorDict) -> None:
        """Append them."""
        self.memory[self.size : self.size + len(transitions)] = transitions
        self.size += len(transitions)

    def sample(self) -> TensorDict:
        """BATCH_SIZE transitions, drawn uniformly with replacement."""
        return self.memory[torch.randint(self.size, (BATCH_SIZE,), device=self.memory.device)]


class Collector:
    """Steps the environments with the policy."""

    def __init__(self, policy: ProbabilisticTensorDictSequential, seed: int, device: torch.device) -> None:
        self.policy, self.device = policy, device
        self.environments = make_environments(ENVIRONMENTS)
        observation, _ = self.environments.reset(seed=seed)
        self.observation = torch.from_numpy(observation)
        self.episode_return = np.zeros(ENVIRONMENTS)
        self.last_returns: list[float] = []

    @torch.no_grad()
    def collect(self, *, at_random: bool) -> TensorDict:
        """One transition of every environment."""
        step = TensorDict({"observation": self.observation}, [ENVIRONMENTS], device=self.device)
        if at_random:
            step["action"] = torch.rand(ENVIRONMENTS, ACTION, device=self.device) * 2 - 1
        else:
            step["action"] = self.policy(step.copy())["action"]
        torque = MAX_TORQUE * step["action"].cpu().numpy()
        observation, reward, terminated, truncated, info = self.environments.step(torque)
        done = terminated | truncated
        # Where an episode ended, `observation` already opens the next one. What this step led to is in `final_obs`;
        # its value is bootstrapped from, as no pendulum terminates: time runs out, and that is truncation.
        next_observation = observation.copy()
        if done.any():
            next_observation[done] = np.stack(info["final_obs"][done])
        self.episode_return += reward
        if done.any():
            self.last_returns = self.episode_return[done].tolist()
            self.episode_return[done] = 0.0
        step["next"] = TensorDict(
            {
                "observation": torch.from_numpy(next_observation),
                "reward": torch.from_numpy(REWARD_SCALE * reward).float().unsqueeze(-1),
                "done": torch.from_numpy(done).unsqueeze(-1),
                "terminated": torch.from_numpy(terminated).unsqueeze(-1),
            },
            [ENVIRONMENTS],
            device=self.device,
        )
        self.observation = torch.from_numpy(observation)
        return step


@torch.no_grad()
def evaluate(policy: ProbabilisticTensorDictSequential, seed: int, device: torch.device) -> float:
    """Mean return of one episode in each of EVALUATION_EPISODES environments, without noise in the actions."""
    environments = make_environments(EVALUATION_EPISODES)
    observation, _ = environments.reset(seed=seed)
    returns, alive = np.zeros(EVALUATION_EPISODES), np.ones(EVALUATION_EPISODES, dtype=bool)
    with set_interaction_type(InteractionType.DETERMINISTIC):
        while alive.any():
            step = policy(TensorDict({"observation": torch.from_numpy(observation)}, [len(alive)], device=device))
            torque = MAX_TORQUE * step["action"].cpu().numpy()
            observation, reward, terminated, truncated, _ = environments.step(torque)
            returns += reward * alive  # what an environment earns after its first episode doesn't count
            alive &= ~(terminated | truncated)
    return float(returns.mean())


def train(seed: int, budget: int) -> tuple[Curve, Curve]:
    """The curves of training and evaluation; they end when an evaluation solves the task, or with the budget."""
    torch.manual_seed(seed)  # weights, actions and batches; the environments get the seed at their reset
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy, qvalue = make_networks(device)
    # The loss trains the very parameters that the policy acts with; of `qvalue` it makes two networks of its own.
    loss = SACLoss(policy, qvalue, loss_function="l2", target_entropy=-float(ACTION))
    loss.make_value_estimator("TD0", gamma=GAMMA)
    targets = SoftUpdate(loss, tau=TAU)
    optimizer = torch.optim.Adam(loss.parameters(), lr=LEARNING_RATE)
    collector = Collector(policy, seed, device)
    replay = Replay(budget + ENVIRONMENTS, device)

    training: Curve = []
    evaluation: Curve = [(0, evaluate(policy, EVALUATION_SEED + seed, device))]
    owed = 0.0  # updates that the steps taken so far call for
    with tqdm(total=budget, unit=" steps", desc="SAC") as progress:
        while progress.n < budget and evaluation[-1][1] < SOLVED_RETURN:
            replay.extend(collector.collect(at_random=progress.n < RANDOM_STEPS))
            progress.update(ENVIRONMENTS)
            if progress.n > RANDOM_STEPS:
                owed += ENVIRONMENTS * UPDATES_PER_STEP
            while owed >= 1:
                losses = loss(replay.sample())
                optimizer.zero_grad()
                (losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_alpha"]).backward()
                optimizer.step()
                targets.step()
                owed -= 1
            if progress.n % STEPS_PER_EVALUATION == 0:  # all environments have just finished an episode
                training.append((progress.n, float(np.mean(collector.last_returns))))
                evaluation.append((progress.n, evaluate(policy, EVALUATION_SEED + seed, device)))
                progress.set_postfix_str(f"return {training[-1][1]:.0f}, evaluation {evaluation[-1][1]:.0f}")
    return training, evaluation


def plot(training: Curve, evaluation: Curve, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    # Sampled actions.
    axes.plot(*zip(*training, strict=True), label=f"training, last {ENVIRONMENTS} episodes")
    axes.plot(*zip(*evaluation, strict=True), "o-", label=f"evaluation, {EVALUATION_EPISODES} episodes")
    axes.axhline(SOLVED_RETURN, linestyle="--", color="grey", label=f"solved: {SOLVED_RETURN:g}")
    axes.set(xlabel="environment steps", ylabel="mean return", title="SAC on Pendulum-v1")
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train SAC on Pendulum-v1 with fusedrl.")
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
    picture = arguments.out / f"sac_pendulum_seed{arguments.seed}.png"
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
