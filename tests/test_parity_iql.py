"""IQL against TorchRL: the same outputs, gradients, priorities and states, over its options.

Where TorchRL is wrong the promise is tested in test_iql.py instead: in the loss of the Q networks it ignores masks and
the steps of n-step transitions, and in all losses priority weights.
"""

from inspect import signature

import pytest
import torch
from fusedrl.losses.iql import IQLLoss
from helpers_losses import OBSERVATION
from helpers_q import (
    DOUBLE,
    LocScale,
    StateAction,
    assert_parity,
    assert_states_are_exchanged,
    desynchronise_targets,
    qvalue_network,
    same_parameters,
    stochastic_actor,
    transitions,
    value_network,
)
from tensordict.nn import (
    NormalParamExtractor,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)
from torch import nn

pytest.importorskip("torchrl")
from torchrl import objectives as theirs
from torchrl.modules import IndependentNormal, ProbabilisticActor, TanhNormal, ValueOperator

OPTIONS = {
    "defaults": {},
    "l1": {"loss_function": "l1"},
    "l2": {"loss_function": "l2"},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none", "scalar_output_mode": "exclude"},
    "imitation": {"temperature": 0.0},
    "cold": {"temperature": 100.0},
    "expectile": {"expectile": 0.9},
    "low_expectile": {"expectile": 0.2},
    "separate": {"separate_losses": True},
    "one_network": {"num_qvalue_nets": 1},
    "three_networks": {"num_qvalue_nets": 3},
    "one_by_one": {"deactivate_vmap": True},
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pair(actor=stochastic_actor, qvalue=qvalue_network, value=value_network, **options):
    """Our loss and TorchRL's, with the same parameters, of which the targets differ."""
    ours, other = (cls(actor(), qvalue(), value(), **options) for cls in (IQLLoss, theirs.IQLLoss))
    desynchronise_targets(other)
    same_parameters(other, ours)
    return ours, other


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_outputs_gradients_and_priorities_agree(options):
    assert_parity(*pair(**options), transitions())


def state_values():
    return TensorDictModule(nn.Linear(OBSERVATION, 1, **DOUBLE), ["observation"], ["state_action_value"])


def test_an_action_that_no_network_reads_agrees():
    assert_parity(*pair(qvalue=state_values), transitions())


@pytest.mark.parametrize("estimator", ["TD0", "TD1", "TDLambda"])
def test_every_estimator_agrees(estimator):
    ours, other = pair()
    ours.make_value_estimator(estimator, gamma=0.9)
    other.make_value_estimator(theirs.ValueEstimators[estimator], gamma=0.9)
    assert_parity(ours, other, transitions())


def test_a_single_transition_agrees():
    assert_parity(*pair(), transitions()[0, 0])


@pytest.mark.parametrize("distribution", [IndependentNormal, TanhNormal])
def test_distributions_of_torchrl_agree(distribution):
    assert_parity(*pair(lambda: stochastic_actor(distribution)), transitions())


def test_modules_of_torchrl_agree():
    def actor():
        net = nn.Sequential(nn.Linear(OBSERVATION, 4, **DOUBLE), NormalParamExtractor())
        module = TensorDictModule(net, ["observation"], ["loc", "scale"])
        return ProbabilisticActor(module, in_keys=["loc", "scale"], distribution_class=TanhNormal)

    def qvalue():
        return ValueOperator(StateAction(), in_keys=["observation", "action"])

    def value():
        return ValueOperator(nn.Linear(OBSERVATION, 1, **DOUBLE), in_keys=["observation"])

    assert_parity(*pair(actor, qvalue, value), transitions())


def test_a_list_of_networks_agrees():
    assert_parity(*pair(qvalue=lambda: [qvalue_network() for _ in range(3)], num_qvalue_nets=3), transitions())


def test_renamed_entries_agree():
    names = {"reward": "r", "terminated": "over", "done": "end", "priority": "error", "value": "v", "log_prob": "lp"}
    data = transitions()
    for key in ("reward", "terminated", "done"):
        data["next"].rename_key_(key, names[key])
    losses = pair(value=lambda: TensorDictModule(value_network().module, ["observation"], ["v"]))
    for loss in losses:
        loss.set_keys(**names)
    assert_parity(*losses, data, priority="error")


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("members", ["actor_value", "qvalue_value", "all"])
def test_a_common_trunk_gets_the_same_gradients(members, separate):
    def networks():
        torch.manual_seed(3)
        trunks = [
            TensorDictModule(nn.Linear(OBSERVATION, OBSERVATION, **DOUBLE), ["observation"], ["hidden"])
            for _ in range(3)
        ]
        if members != "qvalue_value":
            trunks[2] = trunks[0]
        if members != "actor_value":
            trunks[1] = trunks[2]
        sampler = ProbabilisticTensorDictModule(["loc", "scale"], ["action"], distribution_class=IndependentNormal)
        heads = TensorDictModule(LocScale(), ["hidden"], ["loc", "scale"])
        qvalue = TensorDictModule(StateAction(), ["hidden", "action"], ["state_action_value"])
        value = TensorDictModule(nn.Linear(OBSERVATION, 1, **DOUBLE), ["hidden"], ["state_value"])
        return (
            ProbabilisticTensorDictSequential(trunks[0], heads, sampler),
            TensorDictSequential(trunks[1], qvalue),
            TensorDictSequential(trunks[2], value),
        )

    ours, other = (cls(*networks(), separate_losses=separate) for cls in (IQLLoss, theirs.IQLLoss))
    desynchronise_targets(other)
    with torch.no_grad():
        theirs_by_name = {**dict(other.named_parameters()), **dict(other.named_buffers())}
        for key, x in (*ours.named_parameters(), *ours.named_buffers()):
            if key in theirs_by_name and 0 not in x.stride():  # what an ensemble shares is a view of the others'
                x.copy_(theirs_by_name[key])
    assert_parity(ours, other, transitions())


@pytest.mark.parametrize("options", [{}, {"num_qvalue_nets": 1}, {"num_qvalue_nets": 3}])
def test_states_are_exchanged(options):
    ours, other = pair(**options)
    for loss in (ours, other):
        loss.make_value_estimator(gamma=0.9)
    assert_states_are_exchanged(ours, other)


def test_signature_and_output_are_those_of_torchrl():
    deprecated = {"gamma", "priority_key"}
    wanted = {n: p.default for n, p in signature(theirs.IQLLoss.__init__).parameters.items() if n not in deprecated}
    ours = {n: p.default for n, p in signature(IQLLoss.__init__).parameters.items()}
    assert ours == {**wanted, "use_prioritized_weights": "auto"}
    assert vars(IQLLoss.default_keys()) == {
        **vars(theirs.IQLLoss._AcceptedKeys()),
        "priority_weight": "priority_weight",
    }
    a, b = pair()
    assert a.out_keys == b.out_keys
