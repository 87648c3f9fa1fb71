"""PPO on CartPole-v1, in one file: rollouts with gymnasium, advantages and loss with fusedrl.

    python examples/ppo_cartpole.py [--seed N] [--backend auto|torch|triton|reference|verify] [--out DIR]

Trains until 20 evaluation episodes average 475 (the environment's own bar for "solved"; 500 is the longest
episode), writes the learning curve as a PNG and exits with 0, or with 1 if the step budget runs out first. With
a CUDA device, networks, rollouts and advantages live there, and the advantages come from the Triton kernels.

The algorithm: Schulman et al. 2017, Proximal policy optimization algorithms (arXiv:1707.06347).
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
from fusedrl.estimators import GAE
from fusedrl.kernels import BACKENDS, resolve_backend
from fusedrl.losses import ClipPPOLoss
from gymnasium.vector import AutoresetMode, VectorEnv
from tensordict import TensorDict
from tensordict.nn import (
    InteractionType,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    set_interaction_type,
)
from torch import nn
from tqdm import tqdm

matplotlib.use("Agg")  # before pyplot is imported: a PNG needs no display
import matplotlib.pyplot as plt

SOLVED_RETURN = 475.0
EVALUATION_EPISODES = 20
ROLLOUTS_PER_EVALUATION = 2
EVALUATION_SEED = 1_000_000  # away from the seeds that training starts its environments with

ENVIRONMENTS = 16
STEPS_PER_ROLLOUT = 64
EPOCHS = 10
MINIBATCH_SIZE = 256
LEARNING_RATE = 2.5e-3
GAMMA, LMBDA = 0.98, 0.95
CLIP_EPSILON = 0.2
ENTROPY_COEFF = 0.01
MAX_GRAD_NORM = 0.5

Curve = list[tuple[int, float]]  # environment steps taken, mean return


def make_environments(count: int) -> VectorEnv:
    # An environment that ends is reset in the same step, and the observation it ended with is handed over in
    # `info`. (Gymnasium's default spends an extra step on the reset: a transition whose action is ignored, and
    # that must be kept out of the batch.)
    return gymnasium.make_vec(
        "CartPole-v1",
        num_envs=count,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP},
    )


def mlp(outputs: int, output_gain: float) -> nn.Sequential:
    layers = [nn.Linear(4, 64), nn.Linear(64, 64), nn.Linear(64, outputs)]
    # Orthogonal weights, and a last layer small enough that the first policy is close to uniform.
    for layer, gain in zip(layers, (2**0.5, 2**0.5, output_gain), strict=True):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


def make_networks(device: torch.device) -> tuple[ProbabilisticTensorDictSequential, TensorDictModule]:
    policy = ProbabilisticTensorDictSequential(
        TensorDictModule(mlp(2, 0.01), in_keys=["observation"], out_keys=["logits"]),
        ProbabilisticTensorDictModule(
            in_keys=["logits"],
            out_keys=["action"],
            distribution_class=torch.distributions.Categorical,
            return_log_prob=True,  # written as "action_log_prob": the denominator of PPO's ratio
            default_interaction_type=InteractionType.RANDOM,
        ),
    )
    critic = TensorDictModule(mlp(1, 1.0), in_keys=["observation"], out_keys=["state_value"])
    return policy.to(device), critic.to(device)


def empty_rollout(device: torch.device) -> TensorDict:
    batch = (ENVIRONMENTS, STEPS_PER_ROLLOUT)  # the estimators take the last batch dimension for time
    column = (*batch, 1)  # and rewards and masks of the shape of the values
    rollout = {
        "observation": torch.zeros(*batch, 4),
        "logits": torch.zeros(*batch, 2),
        "action": torch.zeros(batch, dtype=torch.int64),
        "action_log_prob": torch.zeros(batch),
        "next": {
            "observation": torch.zeros(*batch, 4),
            "reward": torch.zeros(column),
            "done": torch.zeros(column, dtype=torch.bool),
            "terminated": torch.zeros(column, dtype=torch.bool),
        },
    }
    return TensorDict(rollout, batch, device=device)


class Collector:
    """Steps the environments with the policy and fills one preallocated rollout, batch size [N, T]."""

    def __init__(self, policy: ProbabilisticTensorDictSequential, seed: int, device: torch.device) -> None:
        self.policy, self.device = policy, device
        self.environments = make_environments(ENVIRONMENTS)
        observation, _ = self.environments.reset(seed=seed)
        self.observation = torch.from_numpy(observation)
        self.episode_return = np.zeros(ENVIRONMENTS)
        self.finished_returns: deque[float] = deque(maxlen=20)
        self.rollout = empty_rollout(device)

    @torch.no_grad()
    def collect(self) -> TensorDict:
        """The next STEPS_PER_ROLLOUT steps of every environment, in the memory of the previous ones."""
        for t in range(STEPS_PER_ROLLOUT):
            step = self.policy(TensorDict({"observation": self.observation}, [ENVIRONMENTS], device=self.device))
            observation, reward, terminated, truncated, info = self.environments.step(step["action"].cpu().numpy())
            done = terminated | truncated
            # Where an episode ended, `observation` already opens the next one. What this step led to is in
            # `final_obs`; its value is bootstrapped from if the episode was only cut off by the time limit.
            next_observation = observation.copy()
            if done.any():
                next_observation[done] = np.stack(info["final_obs"][done])
            self.episode_return += reward
            self.finished_returns.extend(self.episode_return[done])
            self.episode_return[done] = 0.0
            step["next"] = TensorDict(
                {
                    "observation": torch.from_numpy(next_observation),
                    "reward": torch.from_numpy(reward).float().unsqueeze(-1),
                    # Two masks: `done` stops the sum over time, `terminated` also says that no value follows.
                    "done": torch.from_numpy(done).unsqueeze(-1),
                    "terminated": torch.from_numpy(terminated).unsqueeze(-1),
                },
                [ENVIRONMENTS],
                device=self.device,
            )
            self.rollout[:, t] = step
            self.observation = torch.from_numpy(observation)
        return self.rollout


@torch.no_grad()
def evaluate(policy: ProbabilisticTensorDictSequential, seed: int, device: torch.device) -> float:
    """Mean return of one episode in each of EVALUATION_EPISODES environments, with the likeliest actions."""
    environments = make_environments(EVALUATION_EPISODES)
    observation, _ = environments.reset(seed=seed)
    returns, alive = np.zeros(EVALUATION_EPISODES), np.ones(EVALUATION_EPISODES, dtype=bool)
    with set_interaction_type(InteractionType.DETERMINISTIC):
        while alive.any():
            step = policy(TensorDict({"observation": torch.from_numpy(observation)}, [len(alive)], device=device))
            observation, reward, terminated, truncated, _ = environments.step(step["action"].cpu().numpy())
            returns += reward * alive  # what an environment earns after its first episode doesn't count
            alive &= ~(terminated | truncated)
    return float(returns.mean())


def update(loss: ClipPPOLoss, optimizer: torch.optim.Optimizer, rollout: TensorDict) -> None:
    """EPOCHS passes over the rollout's transitions, in minibatches drawn without replacement."""
    transitions = rollout.reshape(-1)
    for _ in range(EPOCHS):
        order = torch.randperm(len(transitions), device=rollout["action"].device)
        for minibatch in transitions[order].split(MINIBATCH_SIZE):
            losses = loss(minibatch)
            optimizer.zero_grad()
            (losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]).backward()
            nn.utils.clip_grad_norm_(loss.parameters(), MAX_GRAD_NORM)
            optimizer.step()


def train(seed: int, backend: str | None, budget: int) -> tuple[Curve, Curve]:
    """The curves of training and evaluation; they end when an evaluation solves the task, or with the budget."""
    torch.manual_seed(seed)  # weights, actions and minibatches; the environments get the seed at their reset
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy, critic = make_networks(device)
    advantages = GAE(gamma=GAMMA, lmbda=LMBDA, value_network=critic, backend=backend)
    # The loss trains the very parameters that the policy acts with.
    loss = ClipPPOLoss(policy, critic, clip_epsilon=CLIP_EPSILON, entropy_coeff=ENTROPY_COEFF, normalize_advantage=True)
    optimizer = torch.optim.Adam(loss.parameters(), lr=LEARNING_RATE, eps=1e-5)
    collector = Collector(policy, seed, device)

    training: Curve = []
    evaluation: Curve = [(0, evaluate(policy, EVALUATION_SEED + seed, device))]
    runs_on = resolve_backend(backend, torch.empty(0, device=device))
    with tqdm(total=budget, unit=" steps", desc=f"PPO, backend {runs_on}") as progress:
        while progress.n < budget and evaluation[-1][1] < SOLVED_RETURN:
            for _ in range(ROLLOUTS_PER_EVALUATION):
                rollout = collector.collect()
                with torch.no_grad():  # to the loss, advantages and value targets are constants
                    advantages(rollout)
                update(loss, optimizer, rollout)
                progress.update(rollout.numel())
                training.append((progress.n, float(np.mean(collector.finished_returns))))
            evaluation.append((progress.n, evaluate(policy, EVALUATION_SEED + seed, device)))
            progress.set_postfix_str(f"return {training[-1][1]:.0f}, evaluation {evaluation[-1][1]:.0f}")
    return training, evaluation


def plot(training: Curve, evaluation: Curve, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    # Sampled actions, and only episodes that have ended: the longest ones enter late.
    axes.plot(*zip(*training, strict=True), label="training, last 20 episodes")
    axes.plot(*zip(*evaluation, strict=True), "o-", label=f"evaluation, {EVALUATION_EPISODES} episodes")
    axes.axhline(SOLVED_RETURN, linestyle="--", color="grey", label=f"solved: {SOLVED_RETURN:g}")
    axes.set(xlabel="environment steps", ylabel="mean return", title="PPO on CartPole-v1", ylim=(0, 510))
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train PPO on CartPole-v1 with fusedrl.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", choices=BACKENDS, help="what computes the advantages (default: auto)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the learning curve")
    parser.add_argument("--steps", type=int, default=200_000, help="budget of environment steps")
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
    picture = arguments.out / f"ppo_cartpole_seed{arguments.seed}.png"
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
