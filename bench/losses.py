"""Eight losses on networks so small that the libraries' own work is what takes the time: ours against TorchRL's.

Both are built from the same functions, hold the same parameters and see the same data, so that `case` can compare every
loss and every gradient. `operations` counts what each dispatches, networks and distributions excluded.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
import torchrl.objectives as theirs
from fusedrl import losses as ours
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import Tensor, distributions, nn
from torchrl.modules import MLP, DistributionalQValueActor, ProbabilisticActor, QValueActor, TanhNormal, ValueOperator

from bench import counting
from bench.cases import Arm, Case, Gradients, Outputs, nbytes

BATCH = 32
OBSERVATION, ACTION, ACTIONS, ATOMS, HIDDEN = 4, 2, 3, 51, 16


class Atoms(nn.Sequential):
    """Logits [*B, atoms, actions]."""

    def forward(self, observation: Tensor) -> Tensor:
        """The network's output, unflattened."""
        return super().forward(observation).unflatten(-1, (ATOMS, ACTIONS))


def layers(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Linear(inputs, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, outputs)


def policy() -> ProbabilisticActor:
    """A squashed Gaussian whose draws are actions, for PPO, A2C, SAC, REDQ and IQL."""
    return gaussian_policy(layers(OBSERVATION, 2 * ACTION), TanhNormal)


def gaussian_policy(network: Iterable[nn.Module], distribution: type) -> ProbabilisticActor:
    """A policy whose layers give two numbers for each dimension of the action."""
    return ProbabilisticActor(
        TensorDictModule(nn.Sequential(*network, NormalParamExtractor()), ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=distribution,
        return_log_prob=True,
        default_interaction_type="random",
    )


def deterministic_policy() -> TensorDictModule:
    return TensorDictModule(nn.Sequential(*layers(OBSERVATION, ACTION), nn.Tanh()), ["observation"], ["action"])


def state_value() -> ValueOperator:
    return ValueOperator(nn.Sequential(*layers(OBSERVATION, 1)), in_keys=["observation"])


def action_value() -> ValueOperator:
    network = MLP(OBSERVATION + ACTION, 1, num_cells=[HIDDEN], activation_class=nn.Tanh)
    return ValueOperator(network, in_keys=["observation", "action"])


def discrete_value() -> QValueActor:
    network = nn.Sequential(*layers(OBSERVATION, ACTIONS))
    return QValueActor(network, in_keys=["observation"], action_space="categorical")


def distributional_value() -> DistributionalQValueActor:
    network = TensorDictModule(Atoms(*layers(OBSERVATION, ATOMS * ACTIONS)), ["observation"], ["action_value"])
    return DistributionalQValueActor(network, support=torch.linspace(-10, 10, ATOMS), action_space="categorical")


def replayed(batch: int, action: Tensor) -> TensorDict:
    """Transitions from a replay buffer."""
    terminated = torch.rand(batch, 1) < 0.05
    following = {
        "observation": torch.randn(batch, OBSERVATION),
        "reward": torch.randn(batch, 1),
        "terminated": terminated,
        "done": terminated | (torch.rand(batch, 1) < 0.05),
    }
    return TensorDict({"observation": torch.randn(batch, OBSERVATION), "action": action, "next": following}, [batch])


def continuous(batch: int) -> TensorDict:
    return replayed(batch, torch.rand(batch, ACTION) * 1.6 - 0.8)


def discrete(batch: int) -> TensorDict:
    return replayed(batch, torch.randint(ACTIONS, (batch,)))


def collected(batch: int) -> TensorDict:
    """What a policy collected, with its advantages."""
    data = continuous(batch)
    with torch.no_grad():
        policy()(data)
    return data.update({key: torch.randn(batch, 1) for key in ("advantage", "value_target", "state_value")})


@dataclass(frozen=True)
class Loss:
    """How a loss is built, by the classes of either library, and the data that it learns from."""

    networks: Callable[[], tuple[nn.Module, ...]]
    data: Callable[[int], TensorDict]
    options: dict[str, Any] = field(default_factory=dict)


LOSSES = {
    "ClipPPOLoss": Loss(lambda: (policy(), state_value()), collected, {"normalize_advantage": True}),
    "A2CLoss": Loss(lambda: (policy(), state_value()), collected),
    "DQNLoss": Loss(lambda: (discrete_value(),), discrete, {"action_space": "categorical", "double_dqn": True}),
    "DistributionalDQNLoss": Loss(lambda: (distributional_value(),), discrete, {"gamma": 0.99}),
    "SACLoss": Loss(lambda: (policy(), action_value()), continuous, {"target_entropy": -2.0}),
    "TD3Loss": Loss(lambda: (deterministic_policy(), action_value()), continuous, {"bounds": (-1.0, 1.0)}),
    "REDQLoss": Loss(lambda: (policy(), action_value()), continuous, {"target_entropy": -2.0}),
    "IQLLoss": Loss(lambda: (policy(), action_value(), state_value()), continuous),
}
LIBRARIES: dict[str, ModuleType] = {"fusedrl": ours, "torchrl": theirs}


def build(name: str, library: str, device: torch.device) -> nn.Module:
    """The loss ``name`` of a library on networks that are the same at every call."""
    torch.manual_seed(0)
    recipe = LOSSES[name]
    loss = getattr(LIBRARIES[library], name)(*recipe.networks(), **recipe.options).to(device)
    if library == "fusedrl":
        return loss
    if name == "REDQLoss":
        assert loss.target_entropy is not None  # TorchRL makes that buffer when it is first asked for
    loss.load_state_dict(build(name, "fusedrl", device).state_dict())  # the members of ensembles are drawn otherwise
    return loss


def data(name: str, batch: int, device: torch.device) -> TensorDict:
    """What the loss ``name`` learns from, the same at every call."""
    torch.manual_seed(1)
    return LOSSES[name].data(batch).to(device)


def case(name: str, batch: int, device: torch.device, *, peers: bool = True) -> Case:
    """Forward and backward of a loss; without ``peers`` ours alone."""
    transitions = data(name, batch, device)
    modules = {library: build(name, library, device) for library in LIBRARIES if peers or library == "fusedrl"}
    trained = [key for key, x in modules["fusedrl"].named_parameters() if x.requires_grad]

    def arm(loss: nn.Module) -> Arm:
        parameters = dict(loss.named_parameters())
        leaves = [parameters[key] for key in trained]
        return Arm(
            lambda: total(loss(transitions)), lambda: total(loss(transitions)), leaves, torch.ones((), device=device)
        )

    def shown(outputs: Outputs, gradients: Gradients) -> dict[str, Tensor]:
        total_, *terms = outputs
        results = {"the sum": total_} | {f"loss {i}": x for i, x in enumerate(terms)}
        return results | {f"the gradient of {k}": g for k, g in zip(trained, gradients, strict=True) if g is not None}

    def expected() -> dict[str, Tensor]:
        peer = arms.get("torchrl") or arm(build(name, "torchrl", device))
        torch.manual_seed(0)
        outputs = peer.recorded()
        return shown(outputs, peer.backward(outputs[0]))

    arms = {library: arm(loss) for library, loss in modules.items()}
    everything = [*transitions.values(True, True), *modules["fusedrl"].state_dict().values()]
    forward = nbytes(x for x in everything if isinstance(x, Tensor))
    return Case(
        name,
        {"B": batch},
        arms,
        shown,
        expected,
        # Data and parameters are read, and gradients written.
        bytes_moved={"forward": forward, "both": forward + nbytes(arms["fusedrl"].leaves)},
        absent={} if peers else {"torchrl": "not asked for"},
        tolerance=1e-4,
    )


def cases(device: torch.device) -> Iterator[Case]:
    """The losses of the published table."""
    for name in LOSSES:
        # TorchRL draws the members of REDQ's ensemble on the CPU, so that on a GPU the two can't draw the same.
        if name != "REDQLoss" or device.type == "cpu":
            yield case(name, BATCH, device)


def total(found: TensorDictBase) -> Outputs:
    """The sum of a loss's terms, which is what is differentiated, and the terms in the order of their names."""
    terms = [found.get(key) for key in sorted(found.keys()) if key.startswith("loss")]
    return sum(terms[1:], terms[0]), *terms


def operations(name: str, library: str, *, everything: bool = False) -> counting.Dispatched:
    """What the loss's forward dispatches on the CPU; unless ``everything``, without networks and distributions."""
    loss, transitions = build(name, library, torch.device("cpu")), data(name, BATCH, torch.device("cpu"))
    return counting.count(lambda: loss(transitions), () if everything else hidden())


def hidden() -> list[tuple[Any, str]]:
    """The functions in which networks compute and distributions are built, drawn from and asked."""
    networks = [(c, "forward") for c in (nn.Linear, nn.Tanh, nn.Sequential, MLP, Atoms, NormalParamExtractor)]
    of_distributions = (
        "__init__", "update", "log_prob", "rsample", "sample", "rsample_and_log_prob", "sample_and_log_prob", "entropy",
        "mean", "mode", "deterministic_sample",
    )  # fmt: skip
    found = [(c, name) for c in _family(distributions.Distribution) for name in of_distributions if name in vars(c)]
    for module, owner, names in OUR_OWN:
        cls = getattr(import_module(module), owner, None) if find_spec(module) else None
        found += [(cls, name) for name in names if cls is not None]
    return networks + found


# Where our losses do the work of networks and distributions themselves.
OUR_OWN = (
    ("fusedrl.losses.ensemble", "Perceptron", ("__call__",)),
    ("fusedrl.estimators.heads", "DiagonalGaussian", ("log_prob", "draw")),
)


def _family(cls: type) -> set[type]:
    return {cls}.union(*(_family(c) for c in cls.__subclasses__()))
