"""The distributional Q-learning (C51) loss: our module and our operator, TorchRL's module, a compiled textbook.

All get the same TensorDict or its tensors, and log-probabilities that are stored in the data, so that what is timed
begins where networks end. TorchRL's loss asks the device for `nonzero` and `any`, so that its times on a GPU
include waiting.
"""

from collections.abc import Iterator
from typing import ClassVar

import torch
from fusedrl.kernels import categorical_q_loss
from fusedrl.losses import DistributionalDQNLoss
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.modules import DistributionalQValueActor
from torchrl.objectives import DistributionalDQNLoss as PeerLoss

from bench.cases import Arm, Case, Gradients, Outputs, nbytes

BATCHES = (32, 256, 4096, 65536)
SUITE_BATCHES = (32, 4096)
ATOMS, ACTIONS = 51, 6
GAMMA = 0.99
V_MIN, V_MAX = -10.0, 10.0
CHECKED = 64  # samples whose gradient is compared with the loop over atoms


def transitions(batch: int, device: torch.device) -> TensorDict:
    """Transitions with the log-probabilities that a network would give; those at s_t want gradients."""
    generator = torch.Generator(device).manual_seed(0)

    def log_prob() -> Tensor:
        logits = torch.randn(batch, ATOMS, ACTIONS, generator=generator, device=device)
        return (2 * logits).log_softmax(1)

    def decided(x: Tensor) -> Tensor:
        """``x`` without near ties of the greedy action, in which rounding would choose."""
        support = torch.linspace(V_MIN, V_MAX, ATOMS, device=device, dtype=torch.float64)
        first, second = (x.double().exp() * support[:, None]).sum(1).topk(2).values.unbind(1)
        near = first - second < 1e-3
        return torch.where(near[:, None, None], x[near.int().argmin()], x)

    ended = torch.rand(batch, 1, generator=generator, device=device) < 0.05
    following = {
        "observation": decided(log_prob()),
        "reward": torch.randn(batch, 1, generator=generator, device=device),
        "done": ended,
        "terminated": ended,
    }
    action = torch.randint(ACTIONS, (batch,), generator=generator, device=device)
    current = {"observation": log_prob().requires_grad_(), "action": action}
    # The device, which the nested TensorDict inherits, is where TorchRL's loss moves its support.
    return TensorDict(current | {"next": following}, [batch], device=device)


class Stored(TensorDictModuleBase):
    """A network that returns what the data holds."""

    in_keys: ClassVar = ["observation"]
    out_keys: ClassVar = ["action_value"]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The entry ``observation`` as ``action_value``."""
        return tensordict.set("action_value", tensordict.get("observation"))


def case(batch: int, device: torch.device, *, peers: bool = True) -> Case:
    """The loss of ``batch`` transitions; without ``peers`` our operator alone."""
    data = transitions(batch, device)
    support = torch.linspace(V_MIN, V_MAX, ATOMS, device=device)
    leaf = data["observation"]
    arms = {"operator": lambda: (operator(data, support),)}
    absent = {}
    if peers:
        network = DistributionalQValueActor(Stored(), support, action_space="categorical", make_log_softmax=False)
        ours, theirs = DistributionalDQNLoss(network, gamma=GAMMA), PeerLoss(network, gamma=GAMMA)
        torch._dynamo.reset()  # what was compiled for other shapes counts towards the limit of recompilations
        compiled = torch.compile(textbook, dynamic=False, fullgraph=True)
        arms = {
            "fusedrl": lambda: (ours(data)["loss"],),
            **arms,
            "torchrl": lambda: (theirs(data)["loss"],),
            "compiled_textbook": lambda: (compiled(*tensors(data), support),),
        }
    else:
        absent["torchrl"] = "not asked for"
    log_prob, following = data["observation"], data["next"]
    small = nbytes((data["action"], following["reward"], following["terminated"], support))
    column = nbytes((log_prob,)) // ACTIONS
    # Forward reads the chosen columns of atoms and, to choose one of them, all that is said of s_{t+1}; it writes a
    # loss per sample. Backward reads the projection, which forward has to write, and writes a gradient per input.
    forward = nbytes((following["observation"],)) + column + small + 4 * batch
    return Case(
        "categorical",
        {"B": batch},
        {name: Arm(loss, loss, [leaf], torch.ones((), device=device)) for name, loss in arms.items()},
        shown=_shown,
        expected=lambda: _expected(data, support),
        bytes_moved={"forward": forward, "both": forward + 2 * column + nbytes((log_prob,)) + 4 * batch},
        absent=absent,
        tolerance=1e-4,
    )


def cases(device: torch.device) -> Iterator[Case]:
    """The grid of the published tables."""
    for batch in BATCHES:
        yield case(batch, device)


def tensors(data: TensorDictBase) -> tuple[Tensor, ...]:
    """Log-probabilities at s_t and s_{t+1}, action, reward and terminated."""
    following = data["next"]
    return (
        data["observation"],
        following["observation"],
        data["action"],
        following["reward"].squeeze(-1),
        following["terminated"].squeeze(-1),
    )


def operator(data: TensorDictBase, support: Tensor, backend: str | None = None) -> Tensor:
    """Our operator on the tensors."""
    log_prob, next_log_prob, action, reward, terminated = tensors(data)
    loss, _ = categorical_q_loss(
        log_prob,
        action,
        next_log_prob,
        support,
        reward,
        terminated,
        GAMMA,
        next_online_log_prob=next_log_prob,
        backend=backend,
    )
    return loss.mean()


def textbook(
    log_prob: Tensor, next_log_prob: Tensor, action: Tensor, reward: Tensor, terminated: Tensor, support: Tensor
) -> Tensor:
    """Bellemare, Dabney & Munos 2017 (arXiv:1707.06887), algorithm 1, as one writes it without a library."""
    with torch.no_grad():
        prob = next_log_prob.exp()
        best = (prob * support[:, None]).sum(1).argmax(1)
        chosen = prob.gather(2, best[:, None, None].expand(-1, ATOMS, 1)).squeeze(2)
        moved = (reward[:, None] + torch.where(terminated[:, None], 0, GAMMA * support)).clamp(V_MIN, V_MAX)
        position = ((moved - V_MIN) * ((ATOMS - 1) / (V_MAX - V_MIN))).clamp(0, ATOMS - 1)
        lower = position.floor()
        upper_share = position - lower
        lower = lower.long()
        projected = torch.zeros_like(chosen)
        projected.scatter_add_(1, lower, chosen * (1 - upper_share))
        projected.scatter_add_(1, (lower + 1).clamp(max=ATOMS - 1), chosen * upper_share)
    taken = log_prob.gather(2, action[:, None, None].expand(-1, ATOMS, 1)).squeeze(2)
    return -(projected * taken).sum(1).mean()


def _shown(outputs: Outputs, gradients: Gradients) -> dict[str, Tensor]:
    (gradient,) = gradients
    assert gradient is not None
    # That of the mean, times the batch, is that of each sample: minus the projected distribution.
    return {"the loss": outputs[0], "the gradient of each sample": gradient * len(gradient)}


def _expected(data: TensorDict, support: Tensor) -> dict[str, Tensor]:
    """Textbook mathematics in float64 for all samples, after the loop over atoms confirmed it on a few."""

    def precise(part: TensorDictBase) -> TensorDictBase:
        part = part.detach().apply(lambda x: x.double() if x.is_floating_point() else x)
        part["observation"].requires_grad_()
        return part

    def result(part: TensorDictBase, loss: Tensor) -> dict[str, Tensor]:
        return _shown((loss,), torch.autograd.grad(loss, part["observation"], retain_graph=True))

    few, everything = precise(data[:CHECKED]), precise(data)
    looped = result(few, operator(few, support.double(), "reference"))
    for key, x in result(few, textbook(*tensors(few), support.double())).items():
        # After a terminal step the loop puts a mass of 1 on the reward, the textbook the sum of float32 probabilities.
        torch.testing.assert_close(x, looped[key], rtol=1e-6, atol=1e-6)
    return result(everything, textbook(*tensors(everything), support.double()))
