"""Dreamer on Pendulum-v1, in one file: a world model learnt from experience, a policy learnt in its imagination.

    python examples/dreamer_small.py [--seed N] [--steps N] [--out DIR]

Swings up a pendulum that it sees as three numbers. Eight environments play an episode each; the world model (an RSSM:
a GRU with a Gaussian latent in each step) learns to predict what they saw; the policy and its value learn from
trajectories that the model imagines. Writes the curves of the three losses and of the returns, imagined and real, as a
PNG, and exits with 0 if from the first tenth of the updates to the last the losses fell and the imagined return rose,
otherwise with 1.

The algorithm: Hafner et al. 2020, Dream to control: learning behaviors by latent imagination (arXiv:1912.01603).
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import gymnasium
import matplotlib
import numpy as np
import torch
from fusedrl.losses import DreamerActorLoss, DreamerModelLoss, DreamerValueLoss
from gymnasium.vector import AutoresetMode
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import (
    InteractionType,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictModuleBase,
)
from torch import Tensor, nn
from torch import distributions as D
from tqdm import tqdm

matplotlib.use("Agg")  # before pyplot is imported: a PNG needs no display
import matplotlib.pyplot as plt

OBSERVATION, ACTION = 3, 1
STATE, BELIEF, HIDDEN = 6, 64, 64

ENVIRONMENTS = 8
HIGHEST_COST = 16.3  # of an environment step: rewards, −cost, are scaled to between 0 and 1
REPEAT = 2  # environment steps for which an action is held
EPISODE = 200 // REPEAT  # actions until the environment's own time limit; it never terminates
STEPS_PER_ROUND = ENVIRONMENTS * EPISODE * REPEAT
UPDATES_PER_ROUND = 50
WARM_UP = 100  # updates of the model alone, on the first round: an imagination that knows nothing teaches nothing
BATCH, LENGTH = 16, 20
HORIZON = 15
GAMMA, LMBDA = 0.95, 0.95
FREE_NATS = 0.5
MODEL_RATE, POLICY_RATE, VALUE_RATE = 2e-3, 8e-4, 2e-3
MAX_GRAD_NORM = 100.0

Curves = dict[str, list[float]]
RISING = "imagined return"


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, HIDDEN), nn.ELU(), nn.Linear(HIDDEN, HIDDEN), nn.ELU(), nn.Linear(HIDDEN, outputs)
    )


class Joined(nn.Module):
    """A network that reads several tensors side by side."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> Tensor:
        """What the network makes of ``inputs``, which differ in their last dimension alone."""
        return self.network(torch.cat(inputs, -1))


class Gaussian(Joined):
    """Mean and standard deviation of a latent."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(mlp(inputs, 2 * outputs))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Both, for what is known of it."""
        mean, std = super().forward(*inputs).chunk(2, -1)
        return mean, nn.functional.softplus(std) + 0.1


class WorldModel(TensorDictModuleBase):
    """A recurrent state-space model: a belief that remembers, and a state that is drawn anew in each step.

    The prior of the state follows from the belief; the posterior also knows the observation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.in_keys = ["action", ("next", "observation")]
        names = ("state", "belief", "prior_mean", "prior_std", "posterior_mean", "posterior_std")
        self.out_keys = [("next", name) for name in (*names, "reco_observation", "reward")]
        self.gru = nn.GRUCell(STATE + ACTION, BELIEF)
        self.prior = Gaussian(BELIEF, STATE)
        self.posterior = Gaussian(BELIEF + OBSERVATION, STATE)
        self.decoder = Joined(mlp(STATE + BELIEF, OBSERVATION))
        self.reward = Joined(mlp(STATE + BELIEF, 1))

    def remember(self, state: Tensor, belief: Tensor, action: Tensor) -> Tensor:
        """The belief after an action."""
        return self.gru(torch.cat([state, action], -1), belief)

    def observe(self, belief: Tensor, observation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A draw from the posterior of the state, and its mean and standard deviation."""
        mean, std = self.posterior(belief, observation)
        return mean + std * torch.randn_like(std), mean, std

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Infer the latents of sequences, batch size [B, L], which start from nothing known."""
        actions, observations = tensordict["action"], tensordict["next", "observation"]
        state, belief = initial_latents(len(actions), actions.device)
        steps = []
        for action, observation in zip(actions.unbind(1), observations.unbind(1), strict=True):
            belief = self.remember(state, belief, action)
            state, mean, std = self.observe(belief, observation)
            steps.append((state, belief, mean, std))
        state, belief, mean, std = (torch.stack(xs, 1) for xs in zip(*steps, strict=True))
        prior_mean, prior_std = self.prior(belief)
        found = (
            state,
            belief,
            prior_mean,
            prior_std,
            mean,
            std,
            self.decoder(state, belief),
            self.reward(state, belief),
        )
        for key, x in zip(self.out_keys, found, strict=True):
            tensordict.set(key, x)
        return tensordict


class Imagination(nn.Module):
    """The world model as an environment: states follow the prior, as nothing is observed."""

    def __init__(self, model: WorldModel) -> None:
        super().__init__()
        self.model = model

    def reset(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The imagination can start from any latents."""
        return tensordict

    def rollout(
        self,
        max_steps: int,
        policy: Callable[[TensorDictBase], TensorDictBase],
        auto_reset: bool,
        tensordict: TensorDictBase,
    ) -> TensorDictBase:
        """Follow the policy for ``max_steps`` steps; batch size [N, max_steps]."""
        steps = []
        for _ in range(max_steps):
            step = policy(tensordict.copy())
            belief = self.model.remember(step["state"], step["belief"], step["action"])
            mean, std = self.model.prior(belief)
            tensordict = TensorDict({"state": mean + std * torch.randn_like(std), "belief": belief}, step.batch_size)
            steps.append(step.set("next", tensordict.copy()))
        trajectory = torch.stack(steps, -1)
        following = trajectory["next"]
        following["reward"] = self.model.reward(following["state"], following["belief"])
        return trajectory


def initial_latents(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.zeros(count, STATE, device=device), torch.zeros(count, BELIEF, device=device)


def squashed_normal(loc: Tensor, scale: Tensor) -> D.Distribution:
    return D.TransformedDistribution(D.Independent(D.Normal(loc, scale), 1), D.TanhTransform())


def make_policy() -> ProbabilisticTensorDictSequential:
    return ProbabilisticTensorDictSequential(
        TensorDictModule(Gaussian(STATE + BELIEF, ACTION), ["state", "belief"], ["loc", "scale"]),
        ProbabilisticTensorDictModule(
            ["loc", "scale"],
            ["action"],
            distribution_class=squashed_normal,
            default_interaction_type=InteractionType.RANDOM,
        ),
    )


class Collector:
    """Plays whole episodes, with the latents that the world model infers on the way."""

    def __init__(self, model: WorldModel, policy: ProbabilisticTensorDictSequential, seed: int) -> None:
        self.model, self.policy = model, policy
        self.environments = gymnasium.make_vec(
            "Pendulum-v1",
            num_envs=ENVIRONMENTS,
            vectorization_mode="sync",
            vector_kwargs={"autoreset_mode": AutoresetMode.DISABLED},
        )
        self.seed: int | None = seed

    @torch.no_grad()
    def play(self, device: torch.device) -> TensorDict:
        """One episode of each environment, batch size [ENVIRONMENTS, EPISODE]."""
        observation, _ = self.environments.reset(seed=self.seed)
        self.seed = None  # the episodes after the first go on with the same generator
        state, belief = initial_latents(ENVIRONMENTS, device)
        action = torch.zeros(ENVIRONMENTS, ACTION, device=device)
        steps = []
        for _ in range(EPISODE):
            belief = self.model.remember(state, belief, action)
            state, _, _ = self.model.observe(belief, as_tensor(observation, device))
            step = TensorDict({"state": state, "belief": belief}, [ENVIRONMENTS], device=device)
            action = self.policy(step)["action"]
            torque = 2 * action.cpu().numpy()
            rewards = []
            for _ in range(REPEAT):
                observation, reward, *_ = self.environments.step(torque)
                rewards.append(reward)
            following = {
                "observation": as_tensor(observation, device),
                "reward": as_tensor(1 + np.mean(rewards, 0) / HIGHEST_COST, device).unsqueeze(-1),
            }
            steps.append(TensorDict({"action": action, "next": following}, [ENVIRONMENTS], device=device))
        return torch.stack(steps, 1)


def as_tensor(x: np.ndarray, device: torch.device) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float32, device=device)


def sample(episodes: TensorDict) -> TensorDict:
    """BATCH sequences of LENGTH steps, each from anywhere in an episode."""
    rows = torch.randint(len(episodes), (BATCH, 1))
    steps = torch.randint(EPISODE - LENGTH + 1, (BATCH, 1)) + torch.arange(LENGTH)
    return episodes[rows, steps]


class Learner:
    """The three losses and their optimizers."""

    def __init__(self, model: WorldModel, policy: ProbabilisticTensorDictSequential, device: torch.device) -> None:
        value = TensorDictModule(Joined(mlp(STATE + BELIEF, 1)), ["state", "belief"], ["state_value"]).to(device)
        self.model_loss = DreamerModelLoss(model, free_nats=FREE_NATS)
        self.model_loss.set_keys(pixels="observation", reco_pixels="reco_observation")
        self.actor_loss = DreamerActorLoss(policy, value, Imagination(model), imagination_horizon=HORIZON)
        self.actor_loss.make_value_estimator("TDLambda", gamma=GAMMA, lmbda=LMBDA)
        self.value_loss = DreamerValueLoss(value, gamma=GAMMA)
        self.model_optimizer = torch.optim.Adam(model.parameters(), lr=MODEL_RATE)
        self.policy_optimizer = torch.optim.Adam(policy.parameters(), lr=POLICY_RATE)
        self.value_optimizer = torch.optim.Adam(value.parameters(), lr=VALUE_RATE)

    def learn_model(self, batch: TensorDict) -> tuple[dict[str, float], TensorDict]:
        """Learn from what was seen; also returns the latents of the batch."""
        losses, data = self.model_loss(batch)
        loss = sum(losses.values())
        minimize(loss, self.model_optimizer)
        return {"model loss": loss.item()}, data["next"].select("state", "belief")

    def learn_behaviour(self, latents: TensorDict) -> dict[str, float]:
        """Learn policy and value from what is imagined from each of the ``latents`` on."""
        losses, imagined = self.actor_loss(latents.reshape(-1))
        minimize(losses["loss_actor"], self.policy_optimizer)
        value_losses, _ = self.value_loss(imagined)
        minimize(value_losses["loss_value"], self.value_optimizer)
        discount = GAMMA ** torch.arange(HORIZON, device=imagined.device)
        return {
            "actor loss": losses["loss_actor"].item(),
            "value loss": value_losses["loss_value"].item(),
            # Of the imagined steps alone: what the value expects beyond them is still being learnt.
            RISING: (imagined["next", "reward"].squeeze(-1) * discount).sum(-1).mean().item(),
        }


def minimize(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        nn.utils.clip_grad_norm_(group["params"], MAX_GRAD_NORM)
    optimizer.step()


def train(seed: int, budget: int) -> tuple[Curves, list[float]]:
    """The curves of the updates, and the mean return of each round of episodes; one round at least is played."""
    torch.manual_seed(seed)  # weights, draws and minibatches; the environments get the seed at their first reset
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, policy = WorldModel().to(device), make_policy().to(device)
    learner, collector = Learner(model, policy, device), Collector(model, policy, seed)
    curves: Curves = {name: [] for name in ("model loss", "actor loss", "value loss", RISING)}
    returns: list[float] = []
    rounds = max(1, budget // STEPS_PER_ROUND)
    episodes: list[TensorDict] = []
    for _ in tqdm(range(rounds), desc="Dreamer", unit=" rounds"):
        episodes.append(collector.play(device))
        returns.append(HIGHEST_COST * REPEAT * (episodes[-1]["next", "reward"].sum(1).mean().item() - EPISODE))
        replay = torch.cat(episodes)
        warm_up = WARM_UP if len(episodes) == 1 else 0
        for update in range(warm_up + UPDATES_PER_ROUND):
            logged, latents = learner.learn_model(sample(replay))
            if update >= warm_up:
                logged |= learner.learn_behaviour(latents)
            for name, value in logged.items():
                curves[name].append(value)
    return curves, returns


def first_and_last(curve: Sequence[float]) -> tuple[float, float]:
    """The averages over the first and the last tenth."""
    tenth = max(1, len(curve) // 10)
    return float(np.mean(curve[:tenth])), float(np.mean(curve[-tenth:]))


def plot(curves: Curves, returns: list[float], path: Path) -> None:
    figure, axes = plt.subplots(1, len(curves) + 1, figsize=(16, 3.2), layout="constrained")
    for (name, curve), axis in zip(curves.items(), axes[:-1], strict=True):
        window = max(1, len(curve) // 50)
        smooth = np.convolve(curve, np.ones(window) / window, "valid")
        axis.plot(np.arange(len(smooth)) + window, smooth)
        axis.set(xlabel="update", title=name)
    axes[0].set_yscale("log")
    axes[2].set_yscale("log")
    axes[-1].plot(np.arange(1, len(returns) + 1) * STEPS_PER_ROUND, returns, "o-")
    axes[-1].set(xlabel="environment steps", title="return of the episodes")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train Dreamer on Pendulum-v1 with fusedrl.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the curves")
    parser.add_argument("--steps", type=int, default=32_000, help=f"environment steps, in rounds of {STEPS_PER_ROUND}")
    arguments = parser.parse_args(argv)
    if arguments.seed < 0 or arguments.steps < 1:
        parser.error("--seed must be at least 0, --steps at least 1")
    try:  # before the training, not after it
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out can't be made: {error}")

    start = time.perf_counter()
    curves, returns = train(arguments.seed, arguments.steps)
    seconds = time.perf_counter() - start
    picture = arguments.out / f"dreamer_small_seed{arguments.seed}.png"
    plot(curves, returns, picture)
    print(f"curves: {picture.resolve()}")
    moved = []
    for name, curve in curves.items():
        first, last = first_and_last(curve)
        moved.append(last > first if name == RISING else last < first)
        print(f"{name:16} {first:9.3f} -> {last:9.3f}{'' if moved[-1] else '  NOT as claimed'}")
    print(f"{'episode return':16} {returns[0]:9.1f} -> {returns[-1]:9.1f}")
    print(f"{'learnt' if all(moved) else 'NOT learnt'}: {len(returns)} rounds, {seconds:.1f} s (seed {arguments.seed})")
    return 0 if all(moved) else 1


if __name__ == "__main__":
    # Networks this small lose more to waking a second thread than they gain from it.
    torch.set_num_threads(1)
    raise SystemExit(main())
