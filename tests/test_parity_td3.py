"""DDPG and TD3 against TorchRL: the same outputs, gradients, priorities and states, over their options.

Where TorchRL is wrong the promise is tested in test_ddpg.py and test_td3.py instead.
"""

from inspect import signature

import pytest
import torch
from fusedrl.losses.ddpg import DDPGLoss
from fusedrl.losses.td3 import TD3Loss
from helpers_losses import OBSERVATION
from helpers_q import (
    ACTION,
    DOUBLE,
    StateAction,
    assert_parity,
    assert_states_are_exchanged,
    desynchronise_targets,
    deterministic_actor,
    qvalue_network,
    same_parameters,
    transitions,
)
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

pytest.importorskip("torchrl")
from torchrl import objectives as theirs
from torchrl.data import Bounded, Composite
from torchrl.modules import Actor, ValueOperator

COMMON = {
    "defaults": {},
    "l1": {"loss_function": "l1"},
    "l2": {"loss_function": "l2"},
    "smooth_l1": {"loss_function": "smooth_l1"},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "separate": {"separate_losses": True},
    "unweighted": {"use_prioritized_weights": False},
}
DDPG = {
    **COMMON,
    "delayed_actor": {"delay_actor": True},
    "current_value": {"delay_value": False},
    "nothing_delayed": {"delay_actor": False, "delay_value": False},
}
TD3 = {
    **COMMON,
    "current_actor": {"delay_actor": False},
    "current_values": {"delay_qvalue": False},
    "one_network": {"num_qvalue_nets": 1},
    "three_networks": {"num_qvalue_nets": 3},
    "one_by_one": {"deactivate_vmap": True},
    "no_noise": {"policy_noise": 0.0},
    "much_noise": {"policy_noise": 2.0, "noise_clip": 0.3},
    "narrow_bounds": {"bounds": (-0.1, 0.2)},
}
CASES = [("ddpg", options) for options in DDPG.values()] + [("td3", options) for options in TD3.values()]
IDS = [f"ddpg-{name}" for name in DDPG] + [f"td3-{name}" for name in TD3]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pair(name, actor=deterministic_actor, value=qvalue_network, **options):
    """Our loss and TorchRL's, with the same parameters, of which the targets differ."""
    if name == "td3" and "action_spec" not in options:
        options = {"bounds": (-1.0, 1.0), **options}
    ours, other = {"ddpg": (DDPGLoss, theirs.DDPGLoss), "td3": (TD3Loss, theirs.TD3Loss)}[name]
    losses = [cls(actor(), value(), **options) for cls in (ours, other)]
    desynchronise_targets(losses[1])
    same_parameters(losses[1], losses[0])
    return losses


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_outputs_gradients_and_priorities_agree(name, options):
    data = transitions()
    data["priority_weight"] = torch.rand(data.shape, **DOUBLE)
    assert_parity(*pair(name, **options), data)


@pytest.mark.parametrize("estimator", ["TD0", "TD1", "TDLambda"])
@pytest.mark.parametrize("name", ["ddpg", "td3"])
def test_every_estimator_agrees(name, estimator):
    ours, other = pair(name)
    ours.make_value_estimator(estimator, gamma=0.9)
    other.make_value_estimator(theirs.ValueEstimators[estimator], gamma=0.9)
    assert_parity(ours, other, transitions())


@pytest.mark.parametrize("name", ["ddpg", "td3"])
def test_n_step_transitions_agree(name):
    assert_parity(*pair(name), transitions(steps_to_next_obs=True))


@pytest.mark.parametrize("name", ["ddpg", "td3"])
def test_a_single_transition_agrees(name):
    ours, other = pair(name)
    assert_parity(ours, other, transitions()[0, 0])


@pytest.mark.parametrize("name", ["ddpg", "td3"])
def test_renamed_entries_agree(name):
    names = {"reward": "r", "terminated": "over", "done": "end", "priority": "error", "state_action_value": "q"}
    data = transitions()
    for key in ("reward", "terminated", "done"):
        data["next"].rename_key_(key, names[key])
    actor, value = deterministic_actor, qvalue_network
    if name == "td3":
        names["action"] = "torque"
        data.rename_key_("action", "torque")

    def renamed_actor():
        return TensorDictModule(actor().module, ["observation"], [names.get("action", "action")])

    def renamed_value():
        return TensorDictModule(value().module, ["observation", names.get("action", "action")], ["q"])

    losses = pair(name, renamed_actor, renamed_value)
    for loss in losses:
        loss.set_keys(**names)
    assert_parity(*losses, data, priority="error")


# That a loss is separate has no effect on a list in TorchRL: see test_loss_networks.py.
@pytest.mark.parametrize(
    ("name", "separate"),
    [("ddpg", False), ("ddpg", True), ("td3", False), ("td3", True), ("td3 with a list", False)],
)
def test_a_trunk_in_both_networks_gets_the_same_gradients(name, separate):
    def networks():
        torch.manual_seed(3)
        trunk = TensorDictModule(nn.Linear(OBSERVATION, OBSERVATION, **DOUBLE), ["observation"], ["hidden"])
        head = TensorDictModule(nn.Linear(OBSERVATION, ACTION, **DOUBLE), ["hidden"], ["action"])
        values = [
            TensorDictSequential(trunk, TensorDictModule(StateAction(), ["hidden", "action"], ["state_action_value"]))
            for _ in range(2)
        ]
        return TensorDictSequential(trunk, head), values if name == "td3 with a list" else values[0]

    # DDPG without target: TorchRL's first call puts the trained trunk in the place of the target's (see test_ddpg.py).
    options, classes = {"delay_value": False}, (DDPGLoss, theirs.DDPGLoss)
    if name != "ddpg":
        options, classes = {"bounds": (-1.0, 1.0)}, (TD3Loss, theirs.TD3Loss)
    ours, other = (cls(*networks(), separate_losses=separate, **options) for cls in classes)
    desynchronise_targets(other)
    with torch.no_grad():
        theirs_by_name = {**dict(other.named_parameters()), **dict(other.named_buffers())}
        for key, x in (*ours.named_parameters(), *ours.named_buffers()):
            if key in theirs_by_name and 0 not in x.stride():  # what an ensemble shares is a view of the policy's
                x.copy_(theirs_by_name[key])
    assert_parity(ours, other, transitions())


def test_a_list_of_networks_agrees():
    losses = pair("td3", value=lambda: [qvalue_network() for _ in range(3)], num_qvalue_nets=3)
    assert_parity(*losses, transitions())


def test_modules_of_torchrl_agree():
    def actor():
        spec = Bounded(-torch.ones(ACTION), torch.ones(ACTION))
        return Actor(nn.Sequential(nn.Linear(OBSERVATION, ACTION, **DOUBLE), nn.Tanh()), spec=spec)

    def value():
        return ValueOperator(StateAction(), in_keys=["observation", "action"])

    for name in ("ddpg", "td3"):
        assert_parity(*pair(name, actor, value), transitions())


LOW, HIGH = torch.tensor([-1.0, -0.2]), torch.tensor([0.1, 1.0])
SPECS = {
    "leaf": Bounded(LOW, HIGH),
    "numbers": Bounded(-0.1, 0.3, (ACTION,)),
    "composite": Composite(action=Bounded(LOW, HIGH), other=Bounded(-1, 1, (3,))),
    "batched": Composite(action=Bounded(LOW.expand(5, ACTION), HIGH.expand(5, ACTION)), shape=(5,)),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_bounds_of_a_spec_agree(spec):
    ours, other = pair("td3", action_spec=spec, policy_noise=1.0)
    assert torch.equal(ours.min_action, other.min_action)
    assert torch.equal(ours.max_action, other.max_action)
    assert_parity(ours, other, transitions())


@pytest.mark.parametrize("bounds", [(-1, 1), (LOW, HIGH), (LOW.tolist(), HIGH.tolist())], ids=["int", "tensor", "list"])
def test_bounds_of_every_form_agree(bounds):
    assert_parity(*pair("td3", bounds=bounds, policy_noise=1.0), transitions())


@pytest.mark.parametrize(("name", "options"), [
    ("ddpg", {}),
    ("ddpg", {"delay_actor": True}),
    ("ddpg", {"delay_value": False}),
    ("td3", {}),
    ("td3", {"delay_actor": False, "delay_qvalue": False}),
    ("td3", {"num_qvalue_nets": 1}),
])  # fmt: skip
def test_states_are_exchanged(name, options):
    ours, other = pair(name, **options)
    for loss in (ours, other):
        loss.make_value_estimator(gamma=0.9)
    assert_states_are_exchanged(ours, other)


@pytest.mark.parametrize("name", ["ddpg", "td3"])
def test_signature_and_output_are_those_of_torchrl(name):
    deprecated = {"gamma", "priority_key"}
    ours, other = pair(name)
    wanted = {n: p.default for n, p in signature(type(other).__init__).parameters.items() if n not in deprecated}
    assert {n: p.default for n, p in signature(type(ours).__init__).parameters.items()} == wanted
    assert vars(ours.default_keys()) == vars(other._AcceptedKeys())
    assert ours.out_keys == other.out_keys
