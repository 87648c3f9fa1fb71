"""The loss of distributional DQN is that of C51, for any batch, dtype and action space it takes."""

import copy
import math
import pickle
from enum import Enum

import pytest
import torch
from fusedrl.estimators import TD1Estimator
from fusedrl.kernels import VerificationError, categorical_q_loss, categorical_reference
from fusedrl.losses import ValueEstimators
from fusedrl.losses.distributional_dqn import DistributionalDQNLoss
from helpers_losses import DOUBLE, OBSERVATION
from helpers_q import (
    ACTIONS,
    CLOSE,
    PARITY,
    assert_no_host_sync,
    assert_padding_is_ignored,
    assert_rejected,
    assert_terminal_observations_are_ignored,
    desynchronise_targets,
    gradients,
    run,
    transitions,
)
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch._subclasses import FakeTensorMode

ATOMS = 5
GAMMA = 0.9
# A bfloat16 has 8 bits: log-probabilities of about −2 are off by 2⁻⁸ each, and so is their mean.
HALF = {"rtol": 0.02, "atol": 0.02}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class ReturnDistribution(nn.Module):
    """log p(s, ·) of returns between −2 and 3."""

    def __init__(self, action_space="one-hot"):
        super().__init__()
        self.action_space = action_space
        self.layer = nn.Linear(OBSERVATION, ATOMS * ACTIONS, **DOUBLE)
        self.register_buffer("support", torch.linspace(-2, 3, ATOMS, **DOUBLE))

    def forward(self, observation):
        return self.layer(observation).unflatten(-1, (ATOMS, ACTIONS)).log_softmax(-2)


def random_loss(action_space="one-hot", **options):
    return desynchronised(DistributionalDQNLoss(ReturnDistribution(action_space), **{"gamma": GAMMA, **options}))


def desynchronised(loss):
    support = loss.support.clone()
    desynchronise_targets(loss)
    if loss.delay_value:
        loss.target_value_network_params.get(("module", "0", "module", "support")).data.copy_(support)
    return loss


# --- the equation -----------------------------------------------------------------------------------------------

LOG_2, LOG_4 = math.log(2), math.log(4)
# Over the atoms 0, 1, 2 of two actions. The current state gives the taken action 1 equal mass on 0 and 1, and
# next to none on 2; of the next state the network prefers action 0, and the target network action 1.
NOW = [[0.25, 0.5, 0.25], [0.5, 0.5, 1e-9]]
NEXT = [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
NEXT_TARGET = [[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]]


class Table(nn.Module):
    """Distributions of two states, looked up."""

    action_space = "categorical"

    def __init__(self, *distributions):
        super().__init__()
        self.register_buffer("support", torch.tensor([0.0, 1.0, 2.0], **DOUBLE))
        self.log_prob = nn.Parameter(torch.tensor(distributions, **DOUBLE).log().transpose(-1, -2).contiguous())

    def forward(self, state):
        return self.log_prob[state.squeeze(-1)]


def table(**options):
    loss = DistributionalDQNLoss(Table(NOW, NEXT), **{"gamma": 0.5, "reduction": "none", **options})
    if loss.delay_value:
        target = loss.target_value_network_params.get(("module", "0", "module", "log_prob"))
        target.data[1] = torch.tensor(NEXT_TARGET, **DOUBLE).log().t()
    return loss


def step(reward, terminated=False, **entries):
    """Action 1 from the first state to the second, batch size [1]."""
    after = {"observation": torch.tensor([[1]]), "reward": torch.tensor([[reward]], **DOUBLE)}
    after |= {"done": torch.tensor([[terminated]]), "terminated": torch.tensor([[terminated]])}
    data = {"observation": torch.tensor([[0]]), "action": torch.tensor([1]), "next": after}
    return TensorDict(data | entries, [1])


NEARLY_NONE = -math.log(1e-9)


@pytest.mark.parametrize(
    ("options", "reward", "expected"),
    [
        # double: the network chooses action 0, of which the target says 0 for sure: all mass at r
        ({}, 0.0, LOG_2),
        ({}, 1.5, 0.5 * LOG_2 + 0.5 * NEARLY_NONE),
        ({}, 7.0, NEARLY_NONE),
        ({}, -7.0, LOG_2),
        # the target chooses action 1: half the mass at r + 0.5, half at r + 1
        ({"double_dqn": False}, 0.0, LOG_2),
        ({"double_dqn": False}, 1.0, 0.25 * LOG_2 + 0.75 * NEARLY_NONE),
        # the current network's own action 0: 2 for sure
        ({"delay_value": False}, 0.0, LOG_2),
        ({"delay_value": False}, 0.5, 0.5 * LOG_2 + 0.5 * NEARLY_NONE),
    ],
)
def test_the_loss_is_the_cross_entropy_with_the_projected_target(options, reward, expected):
    out, seen = run(table(**options), step(reward))
    assert out["loss"].item() == pytest.approx(expected)
    torch.testing.assert_close(seen["td_error"], torch.tensor([[expected]], **DOUBLE))


def test_after_a_terminal_step_all_mass_is_at_the_reward():
    out, _ = run(table(double_dqn=False), step(1.0, terminated=True))
    assert out["loss"].item() == pytest.approx(LOG_2)


@pytest.mark.parametrize("shape", [(1, 1), (1,)])
def test_next_distribution_of_n_step_data_is_discounted_n_times(shape):
    n = torch.full(shape, 2)
    out, _ = run(table(delay_value=False), step(1.0, steps_to_next_obs=n))  # 1 + 0.25 · 2
    assert out["loss"].item() == pytest.approx(0.5 * LOG_2 + 0.5 * NEARLY_NONE)


def test_the_gradient_moves_the_taken_actions_probabilities_towards_the_target():
    loss = table()
    out, _ = run(loss, step(0.5))
    (gradient,) = gradients(loss, out)["loss"].values()
    expected = torch.zeros(2, 3, 2, **DOUBLE)
    expected[0, :, 1] = torch.tensor([-0.5, -0.5, 0.0])
    torch.testing.assert_close(gradient, expected)


# --- batches, dtypes, action spaces -----------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (6,), (2, 3), (1, 3, 2), (0,), (2, 0)])
def test_a_batch_of_any_shape_is_its_samples_in_a_row(batch):
    loss, data = random_loss(reduction="none"), transitions(batch, action="one-hot", steps_to_next_obs=True)
    row = data.reshape(math.prod(batch))
    (out, seen), (flat, also_seen) = run(loss, data), run(loss, row)
    assert out["loss"].shape == batch
    assert seen["td_error"].shape == (*batch, 1)
    torch.testing.assert_close(out["loss"].reshape(-1), flat["loss"], **CLOSE)
    torch.testing.assert_close(seen["td_error"].reshape(-1, 1), also_seen["td_error"], **CLOSE)
    loss.reduction = "sum"
    (out, _), (flat, _) = run(loss, data), run(loss, row)
    torch.testing.assert_close(gradients(loss, out), gradients(loss, flat), **CLOSE)


def cast(data, dtype):
    return data.apply(lambda x: x.to(dtype) if x.is_floating_point() else x)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # float32: a few roundings of a loss of about 2
    [(torch.float32, {"rtol": 1e-5, "atol": 1e-6}), (torch.bfloat16, HALF), (torch.float16, HALF)],
    ids=str,
)
def test_networks_of_any_precision(dtype, tolerance):
    loss, data = random_loss(), transitions((8,), action="one-hot")
    wanted, _ = run(loss, data)
    loss.to(dtype)
    out, seen = run(loss, cast(data, dtype))
    assert out["loss"].dtype == dtype
    torch.testing.assert_close(out["loss"].double(), wanted["loss"], **tolerance)
    assert all(g.dtype == dtype and g.isfinite().all() for g in gradients(loss, out)["loss"].values())
    assert seen["td_error"].isfinite().all()


def test_a_cast_keeps_the_discount():
    loss = random_loss(gamma=0.999)
    assert loss.to(torch.bfloat16).gamma.item() == 0.999
    assert loss.half().gamma.item() == 0.999


def test_both_forms_of_an_action_give_the_same():
    one_hot, categorical = random_loss(), random_loss("categorical")
    categorical.load_state_dict(one_hot.state_dict())
    data = transitions(action="one-hot")
    wanted, _ = run(one_hot, data)
    index = data["action"].argmax(-1)
    for action in (index, index.unsqueeze(-1), index.int()):
        torch.testing.assert_close(
            run(categorical, data.clone().set("action", action))[0]["loss"], wanted["loss"], **CLOSE
        )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float64])
def test_masks_of_numbers_and_integer_rewards_are_understood(dtype):
    loss, data = random_loss(), transitions(action="one-hot")
    data["next", "reward"] = data["next", "reward"].round()
    numbers = data.clone()
    numbers["next", "terminated"] = data["next", "terminated"].to(dtype)
    numbers["next", "reward"] = data["next", "reward"].long()
    torch.testing.assert_close(run(loss, numbers)[0]["loss"], run(loss, data)[0]["loss"], **CLOSE)


@pytest.mark.parametrize("backend", ["torch", "reference", "verify"])
def test_every_backend_gives_the_same(backend):
    data = transitions((4,), action="one-hot")
    loss, wanted = random_loss(backend=backend), random_loss()
    wanted.load_state_dict(loss.state_dict())
    (out, _), (expected, _) = run(loss, data), run(wanted, data)
    torch.testing.assert_close(out["loss"], expected["loss"], **CLOSE)
    torch.testing.assert_close(gradients(loss, out), gradients(wanted, expected), **CLOSE)


def test_the_backend_asked_for_is_the_one_that_runs(monkeypatch):
    right = categorical_reference.forward
    monkeypatch.setattr(categorical_reference, "forward", lambda *args: [x + 1 for x in right(*args)])
    data = transitions((4,), action="one-hot")
    with pytest.raises(VerificationError):
        random_loss(backend="verify")(data)
    random_loss()(data)


# --- what doesn't count -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("double_dqn", [False, True])
def test_nothing_after_a_terminal_step_matters(double_dqn):
    assert_terminal_observations_are_ignored(random_loss(double_dqn=double_dqn), transitions(action="one-hot"))


def test_padding_does_not_count():
    assert_padding_is_ignored(random_loss(), transitions(action="one-hot"))


@pytest.mark.parametrize("weights", ["auto", False])
def test_importance_weights_weigh_the_samples_unless_they_are_turned_off(weights):
    loss = random_loss(use_prioritized_weights=weights, reduction="none")
    data = transitions(action="one-hot")
    plain, _ = run(loss, data)
    data["priority_weight"] = torch.rand(3, 5, **DOUBLE)
    weight = data["priority_weight"] if weights == "auto" else 1
    torch.testing.assert_close(run(loss, data)[0]["loss"], plain["loss"] * weight, **CLOSE)


# --- γ, the support, arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.3, torch.tensor(0.3), torch.tensor(0.3, dtype=torch.float64)], ids=repr)
def test_the_discount_can_be_chosen_anew(gamma):
    loss, data = random_loss(), transitions(action="one-hot")
    wanted = copy.deepcopy(loss)
    wanted.register_buffer("gamma", torch.as_tensor(gamma, dtype=torch.float64))
    before, expected = run(loss, data)[0]["loss"], run(wanted, data)[0]["loss"]
    assert before != expected
    loss.make_value_estimator(ValueEstimators.TD0, gamma=gamma)
    torch.testing.assert_close(run(loss, data)[0]["loss"], expected, **CLOSE)
    loss.make_value_estimator()
    torch.testing.assert_close(run(loss, data)[0]["loss"], expected, **CLOSE)
    loss.make_value_estimator(gamma=GAMMA)
    torch.testing.assert_close(run(loss, data)[0]["loss"], before, **CLOSE)
    loss.gamma = gamma
    torch.testing.assert_close(run(loss, data)[0]["loss"], expected, **PARITY)


def test_a_discount_is_required_and_the_only_hyperparameter():
    with pytest.raises(TypeError, match="gamma"):
        DistributionalDQNLoss(ReturnDistribution())
    with pytest.raises(TypeError, match="lmbda"):
        random_loss().make_value_estimator(ValueEstimators.TD0, lmbda=0.9)
    for estimator in (ValueEstimators.TD1, ValueEstimators.TDLambda, ValueEstimators.GAE):
        with pytest.raises(NotImplementedError, match=r"TD0"):
            random_loss().make_value_estimator(estimator)


class Others(Enum):
    """As TorchRL's."""

    TD0 = "one step"
    GAE = "many"


@pytest.mark.parametrize("name", ["TD0", "td0", Others.TD0, ValueEstimators.TD0])
def test_its_estimator_may_be_named_as_that_of_any_loss(name):
    assert random_loss().make_value_estimator(name, gamma=0.5).gamma == 0.5


@pytest.mark.parametrize("name", ["gae", Others.GAE, TD1Estimator])
def test_another_estimator_is_refused_however_it_is_named(name):
    with pytest.raises(NotImplementedError, match=r"only ValueEstimators\.TD0"):
        random_loss().make_value_estimator(name)


def test_the_support_is_found_where_the_network_has_it():
    for network in (
        ReturnDistribution(),
        nn.Sequential(nn.Identity(), ReturnDistribution()),
        TensorDictModule(ReturnDistribution(), ["observation"], ["action_value"]),
    ):
        loss = DistributionalDQNLoss(network, gamma=GAMMA)
        assert torch.equal(loss.support, torch.linspace(-2, 3, ATOMS, **DOUBLE))
        loss(transitions(action="one-hot"))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_a_copy_has_its_own_support(duplicate):
    loss, data = random_loss(), transitions(action="one-hot")
    again = duplicate(loss)
    torch.testing.assert_close(run(again, data)[0]["loss"], run(loss, data)[0]["loss"], **CLOSE)
    loss.support.mul_(2)
    assert again.support[-1] == 3
    again.load_state_dict(loss.state_dict())
    assert again.support[-1] == 6


def test_networks_that_cannot_be_used_are_refused():
    network = nn.Linear(OBSERVATION, ACTIONS)
    with pytest.raises(ValueError, match="action_space is not given"):
        DistributionalDQNLoss(network, gamma=GAMMA)
    network.action_space = "one-hot"
    with pytest.raises(ValueError, match="as an attribute 'support'"):
        DistributionalDQNLoss(network, gamma=GAMMA)
    network.action_space = "binary"
    with pytest.raises(ValueError, match="action_space is 'binary', but an action must be one choice"):
        DistributionalDQNLoss(network, gamma=GAMMA)
    with pytest.raises(ValueError, match="nonsense"):
        random_loss(backend="nonsense")


@pytest.mark.parametrize(
    "support", [[0, 1, 4], [2, 1, 0], [1, 1, 1], [0, 1, float("nan")], [1], [[0, 1]], [0.0, 1.0, 2.9]], ids=str
)
def test_a_support_that_is_not_increasing_and_even_is_refused(support):
    network = ReturnDistribution()
    network.support = torch.tensor(support)
    with pytest.raises(ValueError, match="increasing at equal distances"):
        DistributionalDQNLoss(network, gamma=GAMMA)


@pytest.mark.parametrize(
    "support",
    [
        torch.linspace(-10, 10, 51),
        torch.linspace(-100, 100, 511).bfloat16(),
        torch.linspace(0, 7, 601).half(),
        torch.linspace(-10, 10, 51).bfloat16().float(),
        torch.arange(-3, 4),
        torch.linspace(0, 1, 3, device="meta"),
        FakeTensorMode().from_tensor(torch.linspace(0, 1, 3)),
    ],
    ids=lambda x: f"{x.dtype} {len(x)} {x.device}",
)
def test_a_support_is_even_if_its_rounding_makes_it_less_so(support):
    network = ReturnDistribution()
    network.support = support
    assert DistributionalDQNLoss(network, gamma=GAMMA).support is support


# --- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry", ["action", "observation", ("next", "observation"), ("next", "reward"), ("next", "done")], ids=str
)
def test_a_missing_entry_is_named(entry):
    data = transitions(action="one-hot").exclude(entry, ("next", "terminated"))
    name = entry if isinstance(entry, str) else entry[-1]
    assert_rejected(random_loss(), data, KeyError, f"DistributionalDQNLoss needs the entry .*'{name}'")


@pytest.mark.parametrize(
    ("entry", "shape", "message"),
    [
        ("action", (3, 5, 1), r"action \(one_hot\) has shape \(3, 5, 1\)"),
        (("next", "reward"), (3, 5), r"'action_value' has shape .*\('next', 'reward'\) has shape \(3, 5\)"),
        (("next", "terminated"), (3, 5, 2), "terminated.* has shape"),
        ("steps_to_next_obs", (3, 5, 2), "steps_to_next_obs"),
    ],
)
def test_what_would_broadcast_by_accident_is_refused(entry, shape, message):
    data = transitions(action="one-hot", steps_to_next_obs=True)
    data[entry] = torch.ones(shape, dtype=data[entry].dtype)
    assert_rejected(random_loss(), data, RuntimeError, message)


# --- how it runs ------------------------------------------------------------------------------------------------


def test_tensors_can_be_passed_instead_of_a_tensordict():
    loss, data = random_loss(), transitions((4,), action="one-hot")
    tensors = {"_".join(key) if isinstance(key, tuple) else key: x for key, x in data.items(True, True)}
    torch.testing.assert_close(loss(**tensors), loss(data)["loss"])


def test_nothing_waits_for_the_device(monkeypatch):
    data = transitions(action="one-hot", steps_to_next_obs=True)
    data["collector", "mask"] = torch.arange(5).expand(3, 5) < 4
    data["priority_weight"] = torch.rand(3, 5, **DOUBLE)
    assert_no_host_sync(random_loss(), data, monkeypatch)


def test_compiled_the_loss_is_one_operator():
    torch._dynamo.reset()
    called = []

    def backend(graph, _):
        parts = [module for module in graph.modules() if isinstance(module, torch.fx.GraphModule)]
        called.extend(str(node.target) for part in parts for node in part.graph.nodes)
        return graph

    loss, data = random_loss(), transitions(action="one-hot", steps_to_next_obs=True)
    compiled = torch.compile(copy.deepcopy(loss), fullgraph=True, backend=backend)
    torch.testing.assert_close(run(compiled, data)[0]["loss"], run(loss, data)[0]["loss"], **CLOSE)
    assert sum("categorical_loss" in name and "backward" not in name for name in called) == 1


@pytest.mark.parametrize("double_dqn", [True, False])
def test_a_masked_action_is_never_the_greedy_one(double_dqn):
    """TorchRL's masking leaves it no mass at all, and with that the value 0: more than any negative return."""
    modules = pytest.importorskip("torchrl.modules")
    net = nn.Sequential(nn.Linear(4, 15, **DOUBLE), nn.Unflatten(-1, (5, 3)), nn.LogSoftmax(-2))
    support = torch.linspace(-10, -1, 5, **DOUBLE)
    options = {"action_space": "categorical", "make_log_softmax": False}
    masked = modules.DistributionalQValueActor(net, support, action_mask_key="mask", **options)
    data = TensorDict({"observation": torch.randn(6, 4, **DOUBLE), "action": torch.zeros(6, dtype=torch.int64)}, [6])
    data["next"] = TensorDict(
        {
            "observation": torch.randn(6, 4, **DOUBLE),
            "reward": torch.randn(6, 1, **DOUBLE),
            "done": torch.zeros(6, 1, dtype=torch.bool),
        },
        [6],
    )
    mask = torch.tensor([True, True, False]).expand(6, 1, 3)
    data["mask"], data["next", "mask"] = torch.ones_like(mask), mask
    loss = DistributionalDQNLoss(masked, gamma=0.9, double_dqn=double_dqn, reduction="none")
    with torch.no_grad():
        log_prob, next_log_prob = net(data["observation"]), net(data["next", "observation"])
    legal = next_log_prob.clone()
    legal[..., 2] = torch.nn.functional.one_hot(torch.tensor(0), 5).to(legal).log()  # the least return
    wanted, _ = categorical_q_loss(
        log_prob, data["action"], legal, support, data["next", "reward"].squeeze(-1), torch.zeros(6).bool(), 0.9
    )
    torch.testing.assert_close(loss(data)["loss"].detach(), wanted)
    assert (wanted > 0).all()


# --- TorchRL's networks ------------------------------------------------------------------------------------------


def torchrl_loss():
    modules = pytest.importorskip("torchrl.modules")
    layer = nn.Sequential(nn.Linear(OBSERVATION, ATOMS * ACTIONS, **DOUBLE), nn.Unflatten(-1, (ATOMS, ACTIONS)))
    network = TensorDictModule(layer, ["observation"], ["action_value"])
    actor = modules.DistributionalQValueActor(
        network, support=torch.linspace(-2, 3, ATOMS, **DOUBLE), action_space="categorical"
    )
    return DistributionalDQNLoss(actor, gamma=GAMMA)


def test_the_log_softmax_that_torchrl_adds_is_not_called_as_a_module_and_gives_the_same(monkeypatch):
    loss, data = torchrl_loss(), transitions(action="categorical")
    softmax = loss.value_network[1]
    called = []
    monkeypatch.setattr(type(softmax), "forward", lambda self, tensordict: called.append(self))
    found, _ = run(loss, data)
    assert not called
    monkeypatch.undo()
    monkeypatch.setattr("fusedrl.estimators.calls._is_log_softmax", lambda network: False)
    torch.testing.assert_close(found.to_dict(), run(loss, data)[0].to_dict(), rtol=0, atol=0)


def test_a_log_softmax_that_somebody_looks_at_is_called():
    loss, data = torchrl_loss(), transitions(action="categorical")
    seen = []
    loss.value_network[1].register_forward_hook(lambda *_: seen.append(1))
    run(loss, data)
    assert len(seen) == 3  # Q of the observations, of the next ones, and of the target network
