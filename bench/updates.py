"""A whole update of PPO and of SAC: ours, ours in one CUDA graph, and TorchRL's.

PPO: advantages, then epochs of minibatches in random order, each with losses, backward, gradient clipping and a step of
Adam. SAC: losses, backward, a step of Adam and of the target network. Both libraries train the same networks from the
same parameters on the same data with the same random numbers; nothing is timed before the parameters that an update
leaves were compared.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from fusedrl import estimators
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.modules import MLP, IndependentNormal, TanhNormal, ValueOperator
from torchrl.objectives import SoftUpdate as TheirSoftUpdate
from torchrl.objectives.value import GAE as THEIR_GAE

from bench.cases import WrongResult
from bench.losses import LIBRARIES, gaussian_policy
from bench.measuring import Run, captured, peak_bytes, rounded, seconds

OBSERVATION, ACTION, HIDDEN = 17, 6, (64, 64)  # those of HalfCheetah, and a small network
EPOCHS, MINIBATCHES = 4, 4
TOLERANCE = 0.02  # of the way that the parameters go

# Environments and steps of a rollout, and transitions of a batch.
SIZES = {"cuda": {"ppo": (4096, 32), "sac": (4096,)}, "cpu": {"ppo": (64, 16), "sac": (256,)}}


@dataclass
class Update:
    """An update bound to its data: ``run`` changes the loss's parameters and the optimizer's state in place."""

    run: Run
    loss: nn.Module
    optimizer: torch.optim.Optimizer

    def __post_init__(self) -> None:
        # By the names of a checkpoint, which both libraries share. What is changed in place stays the same tensor.
        self._kept = {k: x for k, x in self.loss.state_dict(keep_vars=True).items() if x.is_floating_point()}
        self._start = {name: x.detach().clone() for name, x in self._kept.items()}

    @torch.no_grad()
    def moved_by_one(self, run: Run) -> dict[str, Tensor]:
        """How far one ``run`` from the start moves each parameter, with the random numbers of a seed."""
        for name, x in self._kept.items():
            x.copy_(self._start[name])
        for state in self.optimizer.state.values():
            for x in state.values():
                x.zero_()
        torch.manual_seed(0)
        with torch.enable_grad():
            run()
        return {name: x - self._start[name] for name, x in self._kept.items()}


def network(inputs: int, outputs: int) -> MLP:
    return MLP(inputs, outputs, num_cells=HIDDEN, activation_class=nn.Tanh)


def adam(parameters: Iterator[nn.Parameter], device: torch.device) -> torch.optim.Adam:
    cuda = device.type == "cuda"
    return torch.optim.Adam(parameters, lr=3e-4, eps=1e-5, fused=True, capturable=cuda)


def steps(*batch: int, device: torch.device) -> TensorDict:
    """Transitions, an episode ending now and then."""
    terminated = torch.rand(*batch, 1, device=device) < 0.01
    following = {
        "observation": torch.randn(*batch, OBSERVATION, device=device),
        "reward": torch.randn(*batch, 1, device=device),
        "terminated": terminated,
        "done": terminated | (torch.rand(*batch, 1, device=device) < 0.01),
    }
    return TensorDict({"observation": torch.randn(*batch, OBSERVATION, device=device), "next": following}, batch)


def ppo(library: str, device: torch.device, environments: int, length: int) -> Update:
    """Train a Gaussian policy and a critic on a rollout."""
    torch.manual_seed(0)
    actor = gaussian_policy([network(OBSERVATION, 2 * ACTION)], IndependentNormal).to(device)
    critic = ValueOperator(network(OBSERVATION, 1), in_keys=["observation"]).to(device)
    kind = {"fusedrl": estimators.GAE, "torchrl": THEIR_GAE}[library]
    advantages = kind(gamma=0.99, lmbda=0.95, value_network=critic, device=device)
    loss = LIBRARIES[library].ClipPPOLoss(actor, critic, normalize_advantage=True).to(device)
    optimizer = adam(loss.parameters(), device)
    with torch.no_grad():
        rollout = actor(steps(environments, length, device=device))

    def run() -> None:
        data = rollout.copy()
        with torch.no_grad():
            advantages(data)
        data = data.reshape(-1)
        for _ in range(EPOCHS):
            # The order of random keys: `torch.randperm` can't be captured in every version of PyTorch.
            order = torch.rand(len(data), device=device).argsort()
            for minibatch in data[order].chunk(MINIBATCHES):
                out = loss(minibatch)
                (out["loss_objective"] + out["loss_critic"] + out["loss_entropy"]).backward()
                nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()  # a capture makes its own

    return Update(run, loss, optimizer)


def sac(library: str, device: torch.device, batch: int) -> Update:
    """Train a squashed Gaussian policy, two critics and the temperature on a batch of transitions."""
    torch.manual_seed(0)
    actor = gaussian_policy([network(OBSERVATION, 2 * ACTION)], TanhNormal).to(device)
    qvalue = ValueOperator(network(OBSERVATION + ACTION, 1), in_keys=["observation", "action"]).to(device)
    loss = LIBRARIES[library].SACLoss(actor, qvalue, target_entropy=-float(ACTION)).to(device)
    if library != "fusedrl":  # the members of the ensemble are drawn otherwise
        loss.load_state_dict(sac("fusedrl", device, batch).loss.state_dict())
    optimizer = adam(loss.parameters(), device)
    targets = {"fusedrl": LIBRARIES["fusedrl"].SoftUpdate, "torchrl": TheirSoftUpdate}[library](loss, tau=0.005)
    torch.manual_seed(1)
    data = steps(batch, device=device)
    data["action"] = torch.rand(batch, ACTION, device=device) * 1.8 - 0.9

    def run() -> None:
        out = loss(data.copy())
        (out["loss_actor"] + out["loss_qvalue"] + out["loss_alpha"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        targets.step()

    return Update(run, loss, optimizer)


UPDATES: dict[str, Callable[..., Update]] = {"ppo": ppo, "sac": sac}


class UpdateCase:
    """An update, by each arm in turn.

    Args:
        name: of `UPDATES`.
        device: where it runs.

    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name
        self.sizes = SIZES[device.type][name]
        self.arms: dict[str, tuple[Update, Run]] = {}
        for library in LIBRARIES:
            update = UPDATES[name](library, device, *self.sizes)
            self.arms[library] = update, update.run
        self.absent = {}
        if device.type == "cuda":
            update = UPDATES[name]("fusedrl", device, *self.sizes)
            self.arms["captured"] = update, captured(update.run)
        else:
            self.absent = {"captured": "only a CUDA device has CUDA graphs"}

    def __str__(self) -> str:
        return f"{self.name} {'×'.join(map(str, self.sizes))}"


def cases(device: torch.device) -> Iterator[UpdateCase]:
    """The updates of the published table."""
    for name in UPDATES:
        yield UpdateCase(name, device)


def refuse_if_wrong(case: UpdateCase) -> None:
    """Compare where one update of each arm leads with where TorchRL's does.

    Raises:
        WrongResult: it is elsewhere.

    """
    update, run = case.arms["torchrl"]
    wanted = update.moved_by_one(run)
    way = _length(wanted.values())
    for arm, (update, run) in case.arms.items():
        found = update.moved_by_one(run)
        if found.keys() != wanted.keys():
            raise WrongResult(f"{arm} of {case} has other parameters, {found.keys() ^ wanted.keys()}: not timed")
        off = _length(found[key] - x for key, x in wanted.items())
        if not off <= TOLERANCE * way:
            raise WrongResult(f"an update of {case} by {arm} is off by {off / way:.1%} of its way: not timed")


def _length(parts: Iterable[Tensor]) -> float:
    return torch.stack([x.norm() for x in parts]).norm().item()


def measure(case: UpdateCase, device: torch.device, budget: float, rounds: int = 5) -> dict[str, Any]:
    """A row of results: per arm the wall time of an update, and the peak memory of those that allocate.

    A CUDA graph allocates nothing when it is replayed: what it needs it holds since it was captured, and "captured" has
    no peak.

    Raises:
        WrongResult: an arm is wrong, and nothing is timed.

    """
    refuse_if_wrong(case)
    runs = {arm: run for arm, (_, run) in case.arms.items()}
    found = {arm: {"peak_mib": peak_bytes(run, device) / 2**20} for arm, run in runs.items() if arm != "captured"}
    for arm, time in seconds(runs, budget, rounds).items():
        found.setdefault(arm, {})["both_ms"] = time * 1e3
    sizes = dict(zip(("B", "T"), case.sizes, strict=False))
    return rounded({"case": case.name} | sizes | {"arms": found})
