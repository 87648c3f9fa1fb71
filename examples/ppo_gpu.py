"""PPO on thousands of CartPoles at once, in one file: an iteration is one CUDA graph, and nothing waits on the host.

    python examples/ppo_gpu.py [--seed N] [--backend auto|torch|triton|reference] [--envs N] [--iterations N]
                               [--out DIR]

The environments are written in PyTorch and live where the networks do. Rollout, advantages, minibatches, losses,
gradient clipping, optimiser and learning rate are one function, which is captured once and then replayed: an iteration
costs the host one launch. Without a CUDA device the same function runs as it is, with fewer environments.

Trains until 20 evaluation episodes in gymnasium's own CartPole-v1 average 475 (the environment's bar for "solved"; 500
is the longest episode), writes the learning curve as a PNG and exits with 0, or with 1 if the iterations run out first.

The algorithm: Schulman et al. 2017, Proximal policy optimization algorithms (arXiv:1707.06347).
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import gymnasium
import matplotlib
import numpy as np
import torch
from fusedrl.estimators import GAE
from fusedrl.kernels import BACKENDS, resolve_backend
from fusedrl.losses import ClipPPOLoss, KLAdaptiveLR
from tensordict import TensorDict
from tensordict.nn import (
    InteractionType,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    set_interaction_type,
)
from torch import Tensor, nn
from tqdm import tqdm

matplotlib.use("Agg")  # before pyplot is imported: a PNG needs no display
import matplotlib.pyplot as plt

SOLVED_RETURN = 475.0
EVALUATION_EPISODES = 20
ITERATIONS_PER_EVALUATION = 5
EVALUATION_SEED = 1_000_000  # away from the seeds that training starts its environments with

ENVIRONMENTS_CUDA, ENVIRONMENTS_CPU = 4096, 64
STEPS_PER_ROLLOUT = 32
EPOCHS = 4
MINIBATCHES = 4
LEARNING_RATE = 2.5e-3
TARGET_KL = 0.01  # nats that the policy should move by in an iteration; the learning rate follows
GAMMA, LMBDA = 0.98, 0.95
CLIP_EPSILON = 0.2
ENTROPY_COEFF = 0.01
MAX_GRAD_NORM = 0.5

WARM_UPS = 3  # iterations before the capture
TIMED_ITERATIONS = 5  # of either way to run an iteration, when their times are compared

Curve = list[tuple[int, float]]  # environment steps taken, mean return


class CartPole:
    """CartPole-v1 (Barto, Sutton & Anderson 1983) for ``count`` poles at once; those that end start again at once.

    The state is (position, velocity, angle, angular velocity), shape ``[N, 4]``. Everything is changed in place: a CUDA
    graph reads and writes fixed addresses.
    """

    GRAVITY, FORCE, SECONDS_PER_STEP = 9.8, 10.0, 0.02
    POLE_MASS, TOTAL_MASS = 0.1, 1.1
    HALF_LENGTH = 0.5  # of the pole
    POSITION_LIMIT, ANGLE_LIMIT = 2.4, 12 * 2 * math.pi / 360
    START = 0.05  # every number of a first state is drawn from [−START, START)
    TIME_LIMIT = 500

    def __init__(self, count: int, device: torch.device) -> None:
        # As gymnasium does, in double precision; the networks read single precision.
        self.state = torch.empty(count, 4, dtype=torch.float64, device=device).uniform_(-self.START, self.START)
        self.elapsed = torch.zeros(count, dtype=torch.int64, device=device)

    @property
    def observation(self) -> Tensor:
        """What the policy sees, shape ``[N, 4]``."""
        return self.state.float()

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Push every cart to the left (0) or to the right (1); the reward is 1, always.

        Returns:
            The observation that the step led to (of the episode that it belongs to, also if that is over), whether the
            environment terminated, and whether the time limit truncated the episode.

        """
        state = self._moved(action)
        self.elapsed += 1
        terminated = (state[:, 0].abs() > self.POSITION_LIMIT) | (state[:, 2].abs() > self.ANGLE_LIMIT)
        truncated = self.elapsed >= self.TIME_LIMIT
        done = terminated | truncated
        # A first state is drawn for every environment and taken where it is needed: `state[done] = ...` would wait for
        # the number of environments that ended.
        first = torch.empty_like(state).uniform_(-self.START, self.START)
        self.state.copy_(torch.where(done.unsqueeze(-1), first, state))
        self.elapsed.masked_fill_(done, 0)
        return state.float(), terminated, truncated

    def _moved(self, action: Tensor) -> Tensor:
        _, velocity, angle, angular_velocity = self.state.unbind(-1)
        force = self.FORCE * (2 * action - 1)
        sine, cosine = angle.sin(), angle.cos()
        mass_length = self.POLE_MASS * self.HALF_LENGTH
        push = (force + mass_length * angular_velocity.square() * sine) / self.TOTAL_MASS
        inertia = self.HALF_LENGTH * (4 / 3 - self.POLE_MASS * cosine.square() / self.TOTAL_MASS)
        angular_acceleration = (self.GRAVITY * sine - cosine * push) / inertia
        acceleration = push - mass_length * angular_acceleration * cosine / self.TOTAL_MASS
        change = torch.stack([velocity, acceleration, angular_velocity, angular_acceleration], -1)
        return self.state + self.SECONDS_PER_STEP * change  # Euler's method: all from the state before


class Categorical(torch.distributions.Categorical):
    """`torch.distributions.Categorical` whose samples can be captured: those of `torch.multinomial` can't.

    That one reads on the host whether its probabilities are valid.
    """

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008  # as in the base class
        """The winner of a race of exponential clocks, whose rates are the probabilities."""
        shape = (*sample_shape, *self.logits.shape)
        clocks = torch.empty(shape, device=self.logits.device).exponential_()
        return (self.logits - clocks.log()).argmax(-1)

    @property
    def deterministic_sample(self) -> Tensor:
        """The likeliest action, for the evaluation."""
        return self.mode


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
            distribution_class=Categorical,
            distribution_kwargs={"validate_args": False},  # the check of the logits waits for its result
            return_log_prob=True,  # written as "action_log_prob": the denominator of PPO's ratio
            default_interaction_type=InteractionType.RANDOM,
        ),
    )
    critic = TensorDictModule(mlp(1, 1.0), in_keys=["observation"], out_keys=["state_value"])
    return policy.to(device), critic.to(device)


class Learner:
    """Environments, networks, loss and optimiser, and the iteration that changes them all in place."""

    def __init__(self, environments: int, backend: str | None, device: torch.device) -> None:
        self.environments = CartPole(environments, device)
        self.policy, critic = make_networks(device)
        # The device is that of γ and λ too: numbers that are copied there in every call can't be captured.
        self.advantages = GAE(
            gamma=GAMMA, lmbda=LMBDA, value_network=critic, time_dim=0, backend=backend, device=device
        )
        # The loss trains the very parameters that the policy acts with.
        self.loss = ClipPPOLoss(
            self.policy, critic, clip_epsilon=CLIP_EPSILON, entropy_coeff=ENTROPY_COEFF, normalize_advantage=True
        )
        # What would be a number in the graph, never to change again, is a tensor on the device: the learning rate, and
        # (capturable) the count of steps.
        self.optimizer = torch.optim.Adam(
            self.loss.parameters(),
            lr=torch.tensor(LEARNING_RATE, device=device),
            eps=1e-5,
            fused=True,
            capturable=device.type == "cuda",
        )
        self.schedule = KLAdaptiveLR(self.optimizer, TARGET_KL)
        # Episodes that ended and the steps that they lasted, which are their returns, since the last look.
        self.finished = torch.zeros(2, dtype=torch.float64, device=device)

    def iterate(self) -> None:
        """One iteration of PPO. Nothing here waits for the device, and all that lasts is changed in place."""
        rollout = self.collect()
        with torch.no_grad():  # to the loss, advantages and value targets are constants
            self.advantages(rollout)
        self.update(rollout)

    @torch.no_grad()
    def collect(self) -> TensorDict:
        """The next STEPS_PER_ROLLOUT steps of every environment, batch size [T, N]: a step's memory is contiguous."""
        steps = []
        for _ in range(STEPS_PER_ROLLOUT):
            step = self.policy(TensorDict({"observation": self.environments.observation}, [len(self)]))
            lasted = self.environments.elapsed + 1
            observation, terminated, truncated = self.environments.step(step["action"])
            done = terminated | truncated
            self.finished += torch.stack([done.sum(), (lasted * done).sum()])
            step["next"] = {
                "observation": observation,
                "reward": torch.ones_like(observation[:, :1]),
                # Two masks: `done` stops the sum over time, `terminated` also says that no value follows.
                "done": done.unsqueeze(-1),
                "terminated": terminated.unsqueeze(-1),
            }
            steps.append(step)
        return torch.stack(steps)

    def update(self, rollout: TensorDict) -> None:
        """EPOCHS passes over the rollout's transitions, in minibatches drawn without replacement."""
        keys = ("observation", "action", "action_log_prob", "advantage", "value_target")
        transitions = rollout.select(*keys).reshape(-1)
        for _ in range(EPOCHS):
            # The order of random keys: `torch.randperm` can't be captured in every version of PyTorch.
            order = torch.rand(len(transitions), device=rollout["action"].device).argsort()
            moved = []
            for minibatch in transitions[order].chunk(MINIBATCHES):
                losses = self.loss(minibatch)
                (losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]).backward()
                nn.utils.clip_grad_norm_(self.loss.parameters(), MAX_GRAD_NORM)
                self.optimizer.step()
                self.optimizer.zero_grad()  # none are left when the capture begins: the graph makes its own
                moved.append(losses["kl_approx"])
        self.schedule.step(torch.stack(moved).mean())  # how far the last epoch found the policy from the old one

    def mean_return(self) -> float:
        """Mean return of the episodes that ended since the last call, NaN if none did: this waits for the device."""
        episodes, steps = self.finished.tolist()
        self.finished.zero_()
        return steps / episodes if episodes else math.nan

    def __len__(self) -> int:
        return len(self.environments.state)


def captured(learner: Learner) -> Callable[[], None]:
    """``learner.iterate`` as one CUDA graph. On the way it is run, and timed in both ways."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # The first iterations compile kernels, choose algorithms and make the optimiser's state, none of which may
        # happen during the capture.
        for _ in range(WARM_UPS):
            learner.iterate()
        eager = seconds_per_iteration(learner.iterate)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):  # nothing runs here, it is recorded
        learner.iterate()
    replayed = seconds_per_iteration(graph.replay)
    print(
        f"an iteration: {1e3 * eager:.2f} ms eager, {1e3 * replayed:.2f} ms captured ({eager / replayed:.1f} times "
        f"as fast)"
    )
    return graph.replay


def seconds_per_iteration(iterate: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(TIMED_ITERATIONS):
        iterate()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / TIMED_ITERATIONS


@torch.no_grad()
def evaluate(policy: ProbabilisticTensorDictSequential, seed: int, device: torch.device) -> float:
    """Mean return of one episode in each of EVALUATION_EPISODES gymnasium environments, with the likeliest actions."""
    environments = gymnasium.make_vec("CartPole-v1", num_envs=EVALUATION_EPISODES, vectorization_mode="sync")
    observation, _ = environments.reset(seed=seed)
    returns, alive = np.zeros(EVALUATION_EPISODES), np.ones(EVALUATION_EPISODES, dtype=bool)
    with set_interaction_type(InteractionType.DETERMINISTIC):
        while alive.any():
            step = policy(TensorDict({"observation": torch.from_numpy(observation)}, [len(alive)], device=device))
            observation, reward, terminated, truncated, _ = environments.step(step["action"].cpu().numpy())
            returns += reward * alive  # what an environment earns after its first episode doesn't count
            alive &= ~(terminated | truncated)
    return float(returns.mean())


def train(seed: int, backend: str | None, environments: int | None, budget: int) -> tuple[Curve, Curve, float]:
    """The curves of training and evaluation, and the environment steps per second of training alone.

    They end when an evaluation solves the task, or with the ``budget`` of iterations.
    """
    torch.manual_seed(seed)  # weights, first states, actions and minibatches
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if environments is None:
        environments = ENVIRONMENTS_CUDA if device.type == "cuda" else ENVIRONMENTS_CPU
    learner = Learner(environments, backend, device)
    iterate, done = learner.iterate, 0
    if device.type == "cuda":
        iterate, done = captured(learner), WARM_UPS + 2 * TIMED_ITERATIONS

    training: Curve = []
    evaluation: Curve = [(0, evaluate(learner.policy, EVALUATION_SEED + seed, device))]
    runs_on = resolve_backend(backend, learner.environments.state)
    seconds = 0.0
    with tqdm(total=budget, initial=done, unit=" iterations", desc=f"PPO, backend {runs_on}") as progress:
        while progress.n < budget and evaluation[-1][1] < SOLVED_RETURN:
            start = time.perf_counter()
            count = min(ITERATIONS_PER_EVALUATION, budget - progress.n)
            for _ in range(count):
                iterate()
            score = learner.mean_return()  # waits for the device, so that the time is that of the work
            seconds += time.perf_counter() - start
            progress.update(count)
            steps = progress.n * STEPS_PER_ROLLOUT * environments
            training.append((steps, score))
            evaluation.append((steps, evaluate(learner.policy, EVALUATION_SEED + seed, device)))
            progress.set_postfix_str(f"return {score:.0f}, evaluation {evaluation[-1][1]:.0f}")
        steps_timed = (progress.n - done) * STEPS_PER_ROLLOUT * environments
    return training, evaluation, steps_timed / seconds if seconds else 0.0


def plot(training: Curve, evaluation: Curve, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    # Sampled actions, and only episodes that have ended: the longest ones enter late.
    if training:
        axes.plot(*zip(*training, strict=True), label="training, episodes that ended")
    axes.plot(*zip(*evaluation, strict=True), "o-", label=f"evaluation, {EVALUATION_EPISODES} episodes")
    axes.axhline(SOLVED_RETURN, linestyle="--", color="grey", label=f"solved: {SOLVED_RETURN:g}")
    axes.set(xlabel="environment steps", ylabel="mean return", title="PPO on CartPole-v1", ylim=(0, 510))
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train PPO on many CartPoles at once with fusedrl.")
    parser.add_argument("--seed", type=int, default=0)
    # `verify` compares results on the host, which can't be captured.
    backends = [name for name in BACKENDS if name != "verify"]
    parser.add_argument("--backend", choices=backends, help="what computes the advantages (default: auto)")
    parser.add_argument("--envs", type=int, help=f"default: {ENVIRONMENTS_CUDA} on CUDA, else {ENVIRONMENTS_CPU}")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the learning curve")
    parser.add_argument("--iterations", type=int, default=400, help="budget of rollouts")
    arguments = parser.parse_args(argv)
    if arguments.seed < 0 or arguments.iterations < 1 or (arguments.envs is not None and arguments.envs < 1):
        parser.error("--seed must be at least 0, --envs and --iterations at least 1")
    try:
        resolve_backend(arguments.backend, torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        parser.error(f"--backend: {error}")
    try:  # before the training, not after it
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out can't be made: {error}")

    start = time.perf_counter()
    training, evaluation, speed = train(arguments.seed, arguments.backend, arguments.envs, arguments.iterations)
    seconds = time.perf_counter() - start
    picture = arguments.out / f"ppo_gpu_seed{arguments.seed}.png"
    plot(training, evaluation, picture)
    steps, score = evaluation[-1]
    solved = score >= SOLVED_RETURN
    print(f"learning curve: {picture.resolve()}")
    print(f"{speed:,.0f} environment steps per second of training, evaluation not counted")
    print(
        f"{'solved' if solved else 'NOT solved'}: mean return {score:.1f} over {EVALUATION_EPISODES} "
        f"evaluation episodes after {steps} steps in {seconds:.1f} s (seed {arguments.seed})"
    )
    return 0 if solved else 1


if __name__ == "__main__":
    # Networks this small lose more to waking a second thread than they gain from it.
    torch.set_num_threads(1)
    raise SystemExit(main())
