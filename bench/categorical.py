"""The distributional Q-learning loss side by side with TorchRL's, forward and backward, in one process.

    python bench/categorical.py                  measure on the CPU, or on the CUDA device if there is one
    python bench/categorical.py --write          ... and write bench/results/categorical_cpu.json, and from it the
                                                 README's table, or bench/results/categorical_<gpu>.json
    python bench/categorical.py --table FILE     print a results file as a Markdown table

Both losses get the same TensorDict and the same network, one that returns log-probabilities stored in the data, so that
what is timed begins where networks end. A second arm of ours is the operator alone, called on the tensors. On a GPU a
device-to-device copy runs too, whose bandwidth is the ceiling that the fraction of the operator refers to. A result is
compared with the reference and with TorchRL's before it is timed.

Memory is the most that one call, forward and backward, has allocated at once beyond its inputs: the allocator's own
count on a GPU, the profiler's record of every allocation on a CPU. TorchRL's loss asks the device for `nonzero` and
`any`, so that its times on a GPU include waiting.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

os.environ.setdefault("RL_WARNINGS", "False")
sys.path.insert(0, str(Path(__file__).parent))  # for those who load this file by its path, as the tests do

import torch
from fusedrl.kernels import categorical_q_loss
from fusedrl.losses.distributional_dqn import DistributionalDQNLoss
from measuring import describe, geometric_mean, peak_bytes, rounded, seconds, write_readme, write_results
from rich.console import Console
from rich.progress import track
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.modules import DistributionalQValueActor
from torchrl.objectives import DistributionalDQNLoss as PeerLoss

BATCHES = (32, 256, 4096, 65536)
ATOMS, ACTIONS = 51, 6
GAMMA = 0.99
# Read: the choosing network's log-probabilities and two columns of atoms; written: loss, projection and gradient;
# the projection is read again. Float32.
BYTES_PER_SAMPLE = 4 * (2 * ATOMS * ACTIONS + 4 * ATOMS + 1)


def data(batch: int, device: torch.device) -> TensorDict:
    """Transitions with the log-probabilities that a network would give; those at s_t want gradients."""
    generator = torch.Generator(device).manual_seed(0)

    def log_prob() -> Tensor:
        logits = torch.randn(batch, ATOMS, ACTIONS, generator=generator, device=device)
        return (2 * logits).log_softmax(1)

    ended = torch.rand(batch, 1, generator=generator, device=device) < 0.05
    following = {
        "observation": log_prob(),
        "reward": torch.randn(batch, 1, generator=generator, device=device),
        "done": ended,
        "terminated": ended,
    }
    action = torch.randint(ACTIONS, (batch,), generator=generator, device=device)
    return TensorDict({"observation": log_prob().requires_grad_(), "action": action, "next": following}, [batch])


class Stored(TensorDictModuleBase):
    """A network that returns what the data holds."""

    in_keys: ClassVar = ["observation"]
    out_keys: ClassVar = ["action_value"]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The entry ``observation`` as ``action_value``."""
        return tensordict.set("action_value", tensordict.get("observation"))


def network(device: torch.device) -> DistributionalQValueActor:
    """A value network of no cost of its own."""
    support = torch.linspace(-10, 10, ATOMS, device=device)
    return DistributionalQValueActor(Stored(), support, action_space="categorical", make_log_softmax=False)


def operator(transitions: TensorDict, support: Tensor) -> Tensor:
    """Our operator on the tensors."""
    following = transitions["next"]
    loss, _ = categorical_q_loss(
        transitions["observation"],
        transitions["action"],
        following["observation"],
        support,
        following["reward"].squeeze(-1),
        following["terminated"].squeeze(-1),
        GAMMA,
        next_online_log_prob=following["observation"],
    )
    return loss.mean()


def with_backward(loss: Callable[[], Tensor], transitions: TensorDict) -> Callable[[], Tensor]:
    """Forward, and backward to the log-probabilities; returns their gradient."""
    leaf = transitions["observation"]
    return lambda: torch.autograd.grad(loss(), leaf)[0]


def refuse_if_wrong(losses: dict[str, Callable[[], Tensor]], transitions: TensorDict, support: Tensor) -> None:
    """Compare loss and gradient of the arms with each other, and our operator with the reference on 64 samples."""
    few = transitions[:64].detach()
    precise = few.apply(lambda x: x.double() if x.is_floating_point() else x)
    found, _ = _per_sample(few, support, None)
    expected, _ = _per_sample(precise, support.double(), "reference")
    if not (found.double() - expected).abs().max() < 1e-4:
        sys.exit(f"the operator is wrong on {tuple(transitions.shape)}: not timed")
    values = {arm: (loss(), with_backward(loss, transitions)()) for arm, loss in losses.items()}
    wanted, wanted_gradient = values["torchrl"]
    for arm, (value, gradient) in values.items():
        error = (gradient - wanted_gradient).abs().max() / wanted_gradient.abs().max()
        if not ((value - wanted).abs() < 1e-4 * wanted.abs() and error < 1e-4):
            sys.exit(f"{arm} and TorchRL disagree on {tuple(transitions.shape)}: not timed")


def measure(device: torch.device, budget: float) -> list[dict[str, Any]]:
    """One row for each batch size."""
    rows = []
    model = network(device)
    support = model[-1].support
    ours, peer = DistributionalDQNLoss(model, gamma=GAMMA), PeerLoss(model, gamma=GAMMA)
    for batch in track(BATCHES, description="measuring", console=Console(stderr=True)):
        transitions = data(batch, device)
        losses: dict[str, Callable[[], Tensor]] = {
            "fusedrl": lambda transitions=transitions: ours(transitions)["loss"],
            "operator": partial(operator, transitions, support),
            "torchrl": lambda transitions=transitions: peer(transitions)["loss"],
        }
        refuse_if_wrong(losses, transitions, support)
        arms: dict[str, Callable[[], Any]] = {arm: with_backward(loss, transitions) for arm, loss in losses.items()}
        row: dict[str, Any] = {"B": batch, "atoms": ATOMS, "actions": ACTIONS}
        row |= {f"{arm}_mib": peak_bytes(run, device) / 2**20 for arm, run in arms.items()}
        if device.type == "cuda":
            source = torch.empty(batch * BYTES_PER_SAMPLE // 2, dtype=torch.uint8, device=device)
            arms["copy"] = partial(torch.empty_like(source).copy_, source)
        row |= {f"{arm}_ms": 1e3 * time for arm, time in seconds(arms, device, budget).items()}
        row |= {f"speedup_{arm}": row["torchrl_ms"] / row[f"{arm}_ms"] for arm in ("fusedrl", "operator")}
        if device.type == "cuda":
            row["bytes"] = batch * BYTES_PER_SAMPLE
            row["fraction_of_copy"] = row["copy_ms"] / row["operator_ms"]
        rows.append(rounded(row))
    return rows


def markdown(results: dict[str, Any]) -> str:
    """The results as the table of the README."""
    rows = results["rows"]
    lines = [
        "| B | loss module: ms, TorchRL ms, × | peak MiB, TorchRL MiB | operator alone: ms, × | peak MiB |",
        "|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['B']} | {r['fusedrl_ms']:.3g}, {r['torchrl_ms']:.3g}, **{r['speedup_fusedrl']:.1f}** "
            f"| {r['fusedrl_mib']:.3g}, {r['torchrl_mib']:.3g} "
            f"| {r['operator_ms']:.3g}, **{r['speedup_operator']:.1f}** | {r['operator_mib']:.3g} |"
        )
    module, alone = (geometric_mean(r[f"speedup_{arm}"] for r in rows) for arm in ("fusedrl", "operator"))
    lines.append(f"| geometric mean | **{module:.1f}** | | **{alone:.1f}** | |")
    return "\n".join(lines)


def _per_sample(transitions: TensorDict, support: Tensor, backend: str | None) -> tuple[Tensor, Tensor]:
    following = transitions["next"]
    return categorical_q_loss(
        transitions["observation"],
        transitions["action"],
        following["observation"],
        support,
        following["reward"].squeeze(-1),
        following["terminated"].squeeze(-1),
        GAMMA,
        backend=backend,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the results file")
    parser.add_argument("--table", type=Path, help="print this results file and measure nothing")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds per arm and batch size on a CPU")
    arguments = parser.parse_args()
    if arguments.table:
        print(markdown(json.loads(arguments.table.read_text())))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = describe(device) | {"rows": measure(device, arguments.budget)}
    print(markdown(results))
    if arguments.write:
        path = write_results(results, device, "categorical_")
        if device.type == "cpu":
            write_readme(path.name, markdown(results))


if __name__ == "__main__":
    main()
