"""What every public loss promises, whichever it is: a loss that is added without an entry here is a failure."""

import copy
import inspect
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from fusedrl import losses
from fusedrl.estimators import ValueEstimatorBase
from fusedrl.losses import action_value
from helpers_compile import DECOMPOSED, assert_compiles_once_more_at_most, gradient, traced_once
from helpers_dreamer import Imagination, actor_model, imagined, sequences, value_model, world_model
from helpers_dreamer_v3 import BINS, Env, experience
from helpers_dreamer_v3 import world_model as discrete_world_model
from helpers_imitation import CASES as IMITATION
from helpers_losses import collect, critic, discrete_actor
from helpers_multi_agent import VALUE, collect_team, team_critic, team_policy
from helpers_q import (
    StateAction,
    action_values,
    assert_no_host_sync,
    assert_rejected,
    deterministic_actor,
    qvalue_network,
    run,
    stochastic_actor,
    transitions,
    value_network,
)
from helpers_sac import categorical_actor
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, set_composite_lp_aggregate
from torch import nn


@dataclass
class Case:
    """How to make a loss and data of a batch size, and a key that it reads and a user can rename (None: none)."""

    make: Callable[..., Any]
    data: Callable[..., TensorDictBase]
    reads: str | None = "reward"


def case(name, *networks, data=transitions, reads="reward", **options):
    """The networks are given as functions that make them."""

    def make(**more):
        return getattr(losses, name)(*(network() for network in networks), **options, **more)

    return Case(make, data, reads)


def team(name):
    def make(**more):
        loss = getattr(losses, name)(team_policy(), team_critic(), **more)
        loss.set_keys(**VALUE)
        return loss

    return Case(make, collect_team)


class Distribution(nn.Linear):
    """Log-probabilities of five atoms, for each of three actions."""

    def __init__(self):
        super().__init__(4, 15, dtype=torch.float64)

    def forward(self, observation):
        return super().forward(observation).unflatten(-1, (5, 3)).log_softmax(-2)


def atoms():
    network = TensorDictModule(Distribution(), ["observation"], ["action_value"])
    network.support, network.action_space = torch.linspace(-2, 2, 5, dtype=torch.float64), "categorical"
    return network


def quantiles():
    network = StateAction()
    network.layers[-1] = nn.Linear(6, 4, dtype=torch.float64)
    return TensorDictModule(network, ["observation", "action"], ["state_action_value"])


def discrete_qvalues():
    return action_values(key="state_action_value")


def discrete_data(batch=(3, 5)):
    return transitions(batch, action="categorical")


def discrete_model_loss(**options):
    loss = losses.DreamerV3ModelLoss(discrete_world_model(), num_reward_bins=BINS, detach_output=False, **options)
    loss.set_keys(pixels=["pixels", "vector"], reco_pixels=["reco_pixels", "reco_vector"])
    return loss


def dreamer_v3(**options):
    value = value_model()
    actor = losses.DreamerV3ActorLoss(actor_model(), value, Env(), imagination_horizon=3)
    return losses.DreamerV3Loss(discrete_model_loss(), actor, losses.DreamerV3ValueLoss(value), **options)


def start(batch=(5,)):
    return experience(batch).select("state", "belief")


def discrete_rollout(batch=(3, 5)):
    return collect(discrete_actor(), batch, estimated=False)


POLICY_GRADIENT = ("A2CLoss", "ClipPPOLoss", "KLPENPPOLoss", "PPOLoss", "ReinforceLoss")
SOFT = {"target_entropy": -2.0}
CASES = {
    **{name: case(name, discrete_actor, critic, data=discrete_rollout) for name in POLICY_GRADIENT},
    **{name: team(name) for name in ("IPPOLoss", "MAPPOLoss")},
    **{name: Case(*IMITATION[name]) for name in IMITATION},
    "DQNLoss": case("DQNLoss", action_values, data=discrete_data, action_space="categorical", double_dqn=True),
    "DistributionalDQNLoss": case("DistributionalDQNLoss", atoms, data=discrete_data, gamma=0.9),
    "DiscreteCQLLoss": case("DiscreteCQLLoss", action_values, data=discrete_data, action_space="categorical"),
    "DDPGLoss": case("DDPGLoss", deterministic_actor, qvalue_network),
    "TD3Loss": case("TD3Loss", deterministic_actor, qvalue_network, bounds=(-1.0, 1.0)),
    "TD3BCLoss": case("TD3BCLoss", deterministic_actor, qvalue_network, bounds=(-1.0, 1.0)),
    "SACLoss": case("SACLoss", stochastic_actor, qvalue_network, **SOFT),
    "REDQLoss": case("REDQLoss", stochastic_actor, qvalue_network, num_qvalue_nets=3, **SOFT),
    "CrossQLoss": case("CrossQLoss", stochastic_actor, qvalue_network, **SOFT),
    "CQLLoss": case("CQLLoss", stochastic_actor, qvalue_network, num_random=3, with_lagrange=True, **SOFT),
    "TQCLoss": case("TQCLoss", stochastic_actor, quantiles, num_qvalue_nets=2, **SOFT),
    "DiscreteSACLoss": case("DiscreteSACLoss", categorical_actor, action_values, data=discrete_data,
                            action_space="categorical", num_actions=3),
    "IQLLoss": case("IQLLoss", stochastic_actor, qvalue_network, value_network),
    "DiscreteIQLLoss": case("DiscreteIQLLoss", categorical_actor, discrete_qvalues, value_network, data=discrete_data,
                            action_space="categorical"),
    "DreamerModelLoss": case("DreamerModelLoss", world_model, data=sequences),
    "DreamerActorLoss": case("DreamerActorLoss", actor_model, value_model, Imagination, data=start, reads=None,
                             imagination_horizon=3),
    "DreamerValueLoss": case("DreamerValueLoss", value_model, data=imagined, reads=None),
    "DreamerV3ModelLoss": Case(discrete_model_loss, experience, None),
    "DreamerV3ActorLoss": case("DreamerV3ActorLoss", actor_model, value_model, Env, data=start, reads=None,
                               imagination_horizon=3),
    "DreamerV3ValueLoss": case("DreamerV3ValueLoss", value_model, data=imagined, reads=None),
    "DreamerV3Loss": Case(dreamer_v3, experience, None),
}  # fmt: skip

# Batch and time. All differ: the compiler takes two lengths that are equal for one. All have more than 32 steps: the
# compiler has another matrix product for less.
SIZES = [(5, 8), (6, 9), (7, 11)]
# Numbers that are no coefficients: other ones are other code.
COUNTS = {
    "imagination_horizon",
    "num_quantiles",
    "num_qvalue_nets",
    "num_random",
    "samples_mc_entropy",
    "samples_mc_kl",
    "sub_sample_len",
    "top_quantiles_to_drop_per_net",
}

every_loss = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    with set_composite_lp_aggregate(False):
        yield


def public_losses():
    found = {name: getattr(losses, name) for name in losses.__all__}
    return {n for n, x in found.items() if inspect.isclass(x) and issubclass(x, losses.LossModule)} - {"LossModule"}


def test_every_public_loss_is_checked_here():
    assert set(CASES) == public_losses()


@every_loss
def test_nothing_waits_for_the_device(name, monkeypatch):
    case = CASES[name]
    assert_no_host_sync(case.make(), case.data(), monkeypatch)


def outcome(call, loss, data):
    """All that comes out of a call of ``loss``: terms and metrics, what is written, and gradients."""
    out, written = run(call, data)
    inputs = [x for x in (*loss.parameters(), *data.values(True, True)) if x.requires_grad]
    terms = [x for name, x in out.items() if name.startswith("loss")]
    return out.detach().to_dict(), written.detach().to_dict(), gradient(terms, inputs)


@every_loss
def test_a_mask_of_any_name_leaves_padding_out(name):
    case = CASES[name]
    data = case.data()
    counts = torch.rand(data.shape) < 0.7
    held = data.data  # without gradients, in the same memory
    held[~counts] = held[~counts].apply(lambda x: torch.full_like(x, torch.nan) if x.is_floating_point() else x)
    found = []
    for key in (("collector", "mask"), "mine"):
        torch.manual_seed(1)
        loss = case.make()
        for part in loss.modules():
            if isinstance(part, losses.LossModule) and key == "mine":
                part.loss_mask_key = key
        terms, _, gradients = outcome(loss, loss, data.clone().set(key, counts))
        found.append((terms, gradients))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    terms, gradients = found[0]
    assert all(x.isfinite().all() for x in (*gradients, *(x for key, x in terms.items() if key.startswith("loss"))))


@every_loss
def test_without_a_mask_key_masks_are_not_looked_for(name):
    case = CASES[name]
    data = case.data()
    found = []
    for counts in (None, torch.rand(data.shape) < 0.5):
        torch.manual_seed(1)
        loss = case.make()
        for part in loss.modules():
            if isinstance(part, losses.LossModule):
                part.loss_mask_key = None
        given = data.clone() if counts is None else data.clone().set(("collector", "mask"), counts)
        terms, _, gradients = outcome(loss, loss, given)
        found.append((terms, gradients))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def change_coefficients(loss):
    """Give other values to what a schedule can assign, and to the hyperparameters of the value estimator; if any."""
    changed = False
    for part in loss.modules():
        if isinstance(part, ValueEstimatorBase):
            for hyperparameter in part.buffers():
                hyperparameter.mul_(0.9)
                changed = True
        for name in getattr(part, "_all_schedulable_buffers", ()):
            value = getattr(part, name, None)
            if isinstance(value, torch.Tensor):
                setattr(part, name, 0.9 * value if value.ndim else 0.9 * value.item())
                changed = True
    return changed


def change_numbers(loss):
    """Give other values to the coefficients that are Python numbers."""
    for part in loss.modules():
        for name, value in list(vars(part).items()) if isinstance(part, losses.LossModule) else ():
            if type(value) in (int, float) and name[0] != "_" and name not in COUNTS:
                setattr(part, name, 0.9 * value)


@every_loss
def test_compiled_whole_it_gives_the_eager_numbers_and_serves_every_coefficient_and_size(name):
    case = CASES[name]
    eager = traced_once(case.make())
    compiled = copy.deepcopy(eager)
    graph = torch.compile(compiled, fullgraph=True, backend=DECOMPOSED)
    both = (eager, compiled)
    dims = case.data().ndim
    assert_compiles_once_more_at_most(
        lambda data: outcome(eager, eager, data),
        lambda data: outcome(graph, compiled, data),
        *(case.data(size[:dims]) for size in SIZES),
        change=(lambda: [change_coefficients(loss) for loss in both]) if change_coefficients(case.make()) else None,
        prepare=lambda _: [change_numbers(loss) for loss in both],
    )


@every_loss
def test_an_unknown_reduction_is_refused_when_the_loss_is_made(name):
    case = CASES[name]
    if "reduction" not in inspect.signature(getattr(losses, name)).parameters:
        pytest.skip("takes no reduction")
    with pytest.raises(ValueError, match="reduction is 'foo'"):
        case.make(reduction="foo")


@every_loss
def test_unreduced_losses_keep_batch_dimensions_of_1(name):
    case = CASES[name]
    if "reduction" not in inspect.signature(getattr(losses, name)).parameters:
        pytest.skip("takes no reduction")
    dims = case.data().ndim
    shapes = []
    for batch in ((7, 11), (1, 11), (7, 1)):
        out, _ = run(case.make(reduction="none"), case.data(batch[:dims]))
        shapes.append([(key, tuple(x.shape)) for key, x in out.items() if key.startswith("loss")])
    many, *few = shapes
    assert any(7 in shape for _, shape in many)
    for size, found in zip((7, 11), few, strict=True):
        assert found == [(key, tuple(1 if n == size else n for n in shape)) for key, shape in many]


@every_loss
def test_an_unknown_use_of_priority_weights_is_refused_when_the_loss_is_made(name):
    if "use_prioritized_weights" not in inspect.signature(getattr(losses, name)).parameters:
        pytest.skip("has no such option")
    with pytest.raises(ValueError, match="use_prioritized_weights is 'foo'"):
        CASES[name].make(use_prioritized_weights="foo")


@every_loss
def test_a_discount_in_the_wrong_place_points_to_the_right_one(name):
    if "gamma" in inspect.signature(getattr(losses, name)).parameters:
        pytest.skip("takes gamma")
    with pytest.raises(TypeError, match="make_value_estimator"):
        CASES[name].make(gamma=0.9)


@every_loss
def test_a_missing_entry_is_named_and_nothing_is_changed(name):
    case = CASES[name]
    if case.reads is None:
        pytest.skip("reads what its networks read alone")
    loss, data = case.make(), case.data()
    key = getattr(loss.tensor_keys, case.reads)
    entry = key if data.get(key, None) is not None else ("next", key)
    assert_rejected(loss, data.exclude(entry), KeyError, f"{key}.*set_keys\\({case.reads}=")


@every_loss
def test_a_cast_keeps_the_discount_and_the_coefficients(name):
    loss = CASES[name].make()
    before = {k: b.clone() for k, b in loss.named_buffers() if "_params" not in k and b.is_floating_point()}
    after = dict(loss.to(torch.bfloat16).named_buffers())
    for key, value in before.items():
        assert after[key].dtype == value.dtype, key
        assert torch.equal(after[key], value), key


@every_loss
def test_it_can_be_pickled(name):
    case = CASES[name]
    loss, data = case.make(), case.data()
    again = pickle.loads(pickle.dumps(loss))
    torch.testing.assert_close(run(again, data)[0].to_dict(), run(loss, data)[0].to_dict())


@every_loss
def test_the_docstring_has_the_formula_and_the_paper(name):
    doc = inspect.getdoc(getattr(losses, name))
    assert ".. math::" in doc
    assert "arXiv:" in doc or "doi.org" in doc


@every_loss
def test_networks_called_one_by_one_are_not_called_under_vmap(name, monkeypatch):
    if "deactivate_vmap" not in inspect.signature(getattr(losses, name)).parameters:
        pytest.skip("has no such option")
    loss, data = CASES[name].make(deactivate_vmap=True), CASES[name].data()
    monkeypatch.setattr(action_value, "MEMBERS_IN_TURN", 0)
    monkeypatch.delattr("torch.vmap")
    loss(data)


@every_loss
def test_an_argument_that_may_be_left_out_means_what_it_does_in_torchrl(name):
    ours, theirs = (getattr(x, name, None) for x in (losses, pytest.importorskip("torchrl.objectives")))
    if theirs is None:
        pytest.skip("TorchRL has no such loss")
    ours, theirs = (inspect.signature(cls.__init__).parameters for cls in (ours, theirs))
    common = {key: x.default for key, x in ours.items() if key in theirs and x.default is not x.empty}
    assert common == {key: theirs[key].default for key in common}
