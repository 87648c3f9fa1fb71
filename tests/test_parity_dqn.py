"""DQN and its distributional form give TorchRL's losses, gradients and priorities, and exchange checkpoints with it."""

import copy
import warnings

import pytest
import torch
from fusedrl.losses import ValueEstimators
from fusedrl.losses.distributional_dqn import DistributionalDQNLoss
from fusedrl.losses.dqn import DQNLoss
from helpers_losses import DOUBLE, OBSERVATION
from helpers_q import (
    ACTIONS,
    assert_parity,
    assert_states_are_exchanged,
    desynchronise_targets,
    transitions,
)
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

torchrl = pytest.importorskip("torchrl")
from torchrl import objectives  # noqa: E402
from torchrl.data import Binary, Categorical, Composite, MultiOneHot, OneHot  # noqa: E402
from torchrl.modules import DistributionalQValueActor, QValueActor, QValueModule  # noqa: E402

ATOMS = 7
# Where TorchRL runs in float32 only: a few roundings of losses of about 2.
SINGLE = {"rtol": 1e-5, "atol": 1e-6}
SPECS = {"one-hot": OneHot(ACTIONS), "categorical": Categorical(ACTIONS)}


@pytest.fixture(autouse=True)
def _quiet():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchRL warns of its own deprecations
        yield


def actor(action="one-hot", **options):
    net = nn.Linear(OBSERVATION, ACTIONS, **DOUBLE)
    return QValueActor(net, in_keys=["observation"], spec=SPECS[action], **options)


def both(network, **options):
    """The two losses, each of a network of its own, with the same parameters and other ones in the target network."""
    ours, theirs = DQNLoss(network, **options), objectives.DQNLoss(copy.deepcopy(network), **options)
    desynchronise_targets(ours, theirs)
    return ours, theirs


def single(data):
    return data.apply(lambda x: x.float() if x.is_floating_point() else x)


@pytest.mark.parametrize("action", SPECS)
@pytest.mark.parametrize("loss_function", ["l1", "l2", "smooth_l1"])
@pytest.mark.parametrize(
    ("delay_value", "double_dqn"), [(True, False), (True, True), (False, False)], ids=["delayed", "double", "current"]
)
def test_dqn(action, loss_function, delay_value, double_dqn):
    ours, theirs = both(actor(action), loss_function=loss_function, delay_value=delay_value, double_dqn=double_dqn)
    assert ours.action_space == theirs.action_space
    assert_parity(ours, theirs, transitions(action=action))


@pytest.mark.parametrize("reduction", [None, "mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True, "off"])
@pytest.mark.parametrize("masked", [False, True])
def test_dqn_reduction_with_importance_weights_and_padding(reduction, weighted, masked):
    ours, theirs = both(actor(), reduction=reduction, use_prioritized_weights="auto" if weighted != "off" else False)
    data = transitions(action="one-hot")
    if weighted:
        data["priority_weight"] = torch.rand(data.shape, **DOUBLE)
    if masked:
        data["collector", "mask"] = torch.arange(5).expand(3, 5) < 4
    assert_parity(ours, theirs, data, priority=None if masked else "td_error")


@pytest.mark.parametrize("estimator", ["TD0", "TD1", "TDLambda"])
@pytest.mark.parametrize("n_step", [False, True])
def test_dqn_value_estimators(estimator, n_step):
    ours, theirs = both(actor().float(), double_dqn=True)
    hyperparameters = {"gamma": 0.9, **({"lmbda": 0.8} if estimator == "TDLambda" else {})}
    ours.make_value_estimator(ValueEstimators[estimator], **hyperparameters)
    theirs.make_value_estimator(objectives.ValueEstimators[estimator], **hyperparameters)
    # TorchRL keeps γ in float32, and doesn't mix it with float64 where γⁿ differs from step to step.
    assert_parity(ours, theirs, single(transitions(action="one-hot", steps_to_next_obs=n_step)), **SINGLE)


@pytest.mark.parametrize("double_dqn", [False, True])
def test_dqn_of_several_heads_adds_their_values_up(double_dqn):
    heads = [1, 2]
    network = TensorDictSequential(
        TensorDictModule(nn.Linear(OBSERVATION, 3, **DOUBLE), ["observation"], ["action_value"]),
        QValueModule(spec=MultiOneHot(heads), var_nums=heads),
    )
    ours, theirs = both(network, action_space="mult_one_hot", double_dqn=double_dqn)
    data = transitions(action="one-hot")
    data["action"] = torch.cat([torch.ones(3, 5, 1), nn.functional.one_hot(torch.randint(2, (3, 5)), 2)], -1)
    assert_parity(ours, theirs, data)


@pytest.mark.parametrize("double_dqn", [False, True])
def test_dqn_leaves_masked_actions_out(double_dqn):
    ours, theirs = both(actor(action_mask_key="action_mask"), double_dqn=double_dqn)
    data = transitions(action="one-hot")
    data["action_mask"] = torch.ones(3, 5, ACTIONS, dtype=torch.bool)
    data["next", "action_mask"] = nn.functional.one_hot(torch.randint(ACTIONS, (3, 5)), ACTIONS).bool()
    assert_parity(ours, theirs, data)


@pytest.mark.parametrize("batch", [(), (1,), (4,), (2, 3)])
def test_dqn_of_a_plain_network(batch):
    network = nn.Linear(OBSERVATION, ACTIONS, **DOUBLE)
    ours, theirs = both(network, action_space="one-hot", reduction="none")
    assert_parity(ours, theirs, transitions(batch, action="one-hot"))
    assert_states_are_exchanged(ours, theirs)


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 1)])
def test_index_of_an_action_may_have_a_dimension_of_its_own(shape):
    data = transitions(action="categorical")
    data["action"] = data["action"].reshape(shape)
    assert_parity(*both(actor("categorical")), data)


@pytest.mark.parametrize(
    "spec",
    [OneHot(3), Categorical(3), Binary(3), MultiOneHot((1, 2)), Composite(action=OneHot(3)),
     Composite(agent=Composite(action=Categorical(3)))],
    ids=lambda spec: type(spec).__name__,
)  # fmt: skip
def test_specs_mean_the_same_action_spaces(spec):
    ours, theirs = both(actor(), action_space=spec)
    assert ours.action_space == theirs.action_space


@pytest.mark.parametrize("make", [lambda net: DQNLoss(net), lambda net: objectives.DQNLoss(net)])
def test_both_refuse_an_unknown_action_space(make):
    with pytest.raises(ValueError, match=r"action.space"):
        make(nn.Linear(OBSERVATION, ACTIONS))


@pytest.mark.parametrize("double_dqn", [False, True])
def test_dqn_checkpoints_are_exchanged(double_dqn):
    assert_states_are_exchanged(*both(actor(), double_dqn=double_dqn))


def test_keyword_tensors_and_renamed_entries():
    ours, theirs = both(actor())
    data = transitions((4,), action="one-hot")
    data.rename_key_("action", "act")
    data["next"].rename_key_("reward", "gain")
    for loss in (ours, theirs):
        loss.set_keys(action="act", reward="gain", priority="error")
    assert set(ours.in_keys) == set(theirs.in_keys)
    assert ours.out_keys == theirs.out_keys
    assert_parity(ours, theirs, data, priority="error")
    tensors = {"_".join(key) if isinstance(key, tuple) else key: x for key, x in data.items(True, True)}
    torch.testing.assert_close(ours(**tensors), theirs(**tensors).detach(), check_dtype=False, rtol=1e-6, atol=1e-7)


# --- distributional ---------------------------------------------------------------------------------------------


def distributional(action="one-hot"):
    net = nn.Sequential(nn.Linear(OBSERVATION, ATOMS * ACTIONS), nn.Unflatten(-1, (ATOMS, ACTIONS)))
    support = torch.linspace(-2.0, 3.0, ATOMS)
    return DistributionalQValueActor(net, support=support, in_keys=["observation"], spec=SPECS[action])


def both_distributional(network, **options):
    ours = DistributionalDQNLoss(network, gamma=0.9, **options)
    theirs = objectives.DistributionalDQNLoss(copy.deepcopy(network), gamma=0.9, **options)
    for loss in (ours, theirs):
        torch.manual_seed(7)
        for name, x in sorted(loss.named_buffers()):
            if name.startswith("target_") and "support" not in name:
                x.data.add_(0.5 * torch.randn_like(x))
    return ours, theirs


@pytest.mark.parametrize("action", SPECS)
@pytest.mark.parametrize("delay_value", [True, False])
@pytest.mark.parametrize("n_step", [False, True])
def test_distributional_dqn(action, delay_value, n_step):
    ours, theirs = both_distributional(distributional(action), delay_value=delay_value)
    assert_parity(ours, theirs, single(transitions((8,), action, n_step)), **SINGLE)


@pytest.mark.parametrize("reward", [-2.0, -1.5, 0.0, 3.0, 50.0, -50.0])
def test_distributional_dqn_where_the_mass_lands_on_atoms_and_outside(reward):
    ours, theirs = both_distributional(distributional())
    data = single(transitions((8,), "one-hot"))
    data["next", "reward"].fill_(reward)
    data["next", "done"][:4] = data["next", "terminated"][:4] = True
    assert_parity(ours, theirs, data, **SINGLE)


@pytest.mark.parametrize("reduction", [None, "mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True, "off"])
def test_distributional_dqn_reduction_with_importance_weights(reduction, weighted):
    weigh = "auto" if weighted != "off" else False
    ours, theirs = both_distributional(distributional(), reduction=reduction, use_prioritized_weights=weigh)
    data = single(transitions((8,), "one-hot"))
    if weighted:
        data["priority_weight"] = torch.rand(8)
    assert_parity(ours, theirs, data, **SINGLE)


def test_done_stands_in_for_a_missing_terminated():
    ours, theirs = both_distributional(distributional())
    assert_parity(ours, theirs, single(transitions((8,), "one-hot")).exclude(("next", "terminated")), **SINGLE)
    ours, theirs = both(actor())
    assert_parity(ours, theirs, transitions(action="one-hot").exclude(("next", "terminated")))


def test_distributional_checkpoints_are_exchanged():
    assert_states_are_exchanged(*both_distributional(distributional()))


def test_distributional_dqn_only_takes_one_step_estimates():
    for loss, estimators in zip(
        both_distributional(distributional()), (ValueEstimators, objectives.ValueEstimators), strict=True
    ):
        loss.make_value_estimator(estimators.TD0)
        with pytest.raises(NotImplementedError, match="TD0"):
            loss.make_value_estimator(estimators.TDLambda)
