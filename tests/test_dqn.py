"""DQN's loss is the Bellman error of Q-learning, in every action space."""

import pytest
import torch
from fusedrl.estimators import TDLambdaEstimator
from fusedrl.losses import ValueEstimators
from fusedrl.losses.discrete_cql import DiscreteCQLLoss
from fusedrl.losses.dqn import DQNLoss
from fusedrl.losses.targets import SoftUpdate
from helpers_losses import DOUBLE, OBSERVATION
from helpers_q import (
    ACTIONS,
    CLOSE,
    action_values,
    assert_compiles,
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
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

Q = torch.tensor([[1.0, 2.0, 3.0], [6.0, 5.0, 4.0]], **DOUBLE)  # of two states, and three actions or parts
TARGET_Q = torch.tensor([[0.0, 0.0, 0.0], [10.0, 20.0, -5.0]], **DOUBLE)
STATE = torch.eye(2, **DOUBLE)
GAMMA = 0.5


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Heads(nn.Linear):
    """Values of an action of two heads."""

    var_nums = (1, 2)


def table(action_space, *, layer=nn.Linear, **options):
    """The loss of a table of values, with another one for a target."""
    network = layer(2, 3, bias=False, **DOUBLE)
    network.weight.data.copy_(Q.T)
    loss = DQNLoss(network, action_space=action_space, reduction="none", **options)
    loss.make_value_estimator(gamma=GAMMA)
    if loss.delay_value:
        loss.target_value_network_params.data.apply_(lambda weight: weight.copy_(TARGET_Q.T))
    return loss


def step(action, *, reward=1.0, terminated=False, **entries):
    """From the first state to the second, batch size [1]."""
    after = {"observation": STATE[1:], "reward": torch.tensor([[reward]], **DOUBLE)}
    after |= {"done": torch.tensor([[terminated]]), "terminated": torch.tensor([[terminated]])}
    data = {"observation": STATE[:1], "action": torch.tensor([action]), "next": after, **entries}
    return TensorDict(data, [1])


def loss_of(loss, data):
    out, seen = run(loss, data)
    return out["loss"].item(), seen["td_error"]


@pytest.mark.parametrize(
    ("options", "target"),
    [
        ({}, 1 + 0.5 * 20),  # the target's best action is 1
        ({"double_dqn": True}, 1 + 0.5 * 10),  # the network's is 0
        ({"delay_value": False}, 1 + 0.5 * 6),
    ],
    ids=["target", "double", "current"],
)
@pytest.mark.parametrize(("action_space", "action"), [("one-hot", [0, 1, 0]), ("categorical", 1)])
def test_the_loss_is_the_bellman_error(options, target, action_space, action):
    loss, priority = loss_of(table(action_space, **options), step(action))
    assert loss == pytest.approx((2 - target) ** 2)
    torch.testing.assert_close(priority, torch.tensor([[loss]], **DOUBLE))


@pytest.mark.parametrize(
    ("action_space", "layer", "double", "value", "next_value"),
    [
        ("mult-one-hot", Heads, False, 1 + 3, 10 + 20),  # heads of one action and of two
        ("mult-one-hot", Heads, True, 1 + 3, 10 + 20),
        ("binary", nn.Linear, False, 1 + 3, 10 + 20),  # the target takes what is worth more than nothing
        ("binary", nn.Linear, True, 1 + 3, 10 + 20 - 5),  # the network takes all
    ],
)
def test_the_values_of_all_parts_of_an_action_add_up(action_space, layer, double, value, next_value):
    loss, _ = loss_of(table(action_space, layer=layer, double_dqn=double), step([1, 0, 1]))
    assert loss == pytest.approx((value - (1 + 0.5 * next_value)) ** 2)


@pytest.mark.parametrize(("loss_function", "distance"), [("l1", 9.0), ("l2", 81.0), ("smooth_l1", 8.5)])
def test_the_priority_is_the_squared_error_whatever_the_distance(loss_function, distance):
    loss, priority = loss_of(table("categorical", loss_function=loss_function), step(1))
    assert loss == pytest.approx(distance)
    torch.testing.assert_close(priority, torch.tensor([[81.0]], **DOUBLE))


@pytest.mark.parametrize("n", [1, 3])
def test_next_value_of_n_step_data_is_discounted_n_times(n):
    loss, _ = loss_of(table("categorical"), step(1, steps_to_next_obs=torch.tensor([[n]])))
    assert loss == pytest.approx((2 - (1 + 0.5**n * 20)) ** 2)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float64])
def test_nothing_follows_a_step_that_terminates_without_being_done(dtype):
    data = step(1)
    data["next", "terminated"] = torch.ones(1, 1, dtype=dtype)
    assert loss_of(table("categorical"), data)[0] == pytest.approx((2 - 1) ** 2)


def test_integer_rewards_are_computed_in_floating_point():
    data = step(1)
    data["next", "reward"] = torch.ones(1, 1, dtype=torch.int64)
    assert loss_of(table("categorical"), data)[0] == pytest.approx(81)


@pytest.mark.parametrize("options", [{}, {"double_dqn": True}, {"delay_value": False}])
def test_only_the_value_of_the_taken_action_is_trained(options):
    loss = table("categorical", **options)
    out, _ = run(loss, step(1))
    (gradient,) = gradients(loss, out)["loss"].values()
    error = 2 - (1 + 0.5 * {"double_dqn": 10.0, "delay_value": 6.0}.get(next(iter(options), ""), 20.0))
    torch.testing.assert_close(gradient, torch.tensor([[0, 0], [2 * error, 0], [0, 0]], **DOUBLE))


class Witness(nn.Linear):
    """Notes of each call whether autograd is watching."""

    def forward(self, observation):
        self.__dict__.setdefault("watched", []).append(torch.is_grad_enabled())
        return super().forward(observation)


def test_next_observations_are_seen_without_autograd_and_nothing_is_seen_of_bad_data():
    network = Witness(OBSERVATION, ACTIONS, **DOUBLE)
    loss = DQNLoss(network, action_space="one-hot", double_dqn=True)
    for missing in ("action", ("next", "reward"), ("next", "observation")):
        assert_rejected(loss, transitions(action="one-hot").exclude(missing), KeyError, "DQNLoss needs")
    assert not hasattr(network, "watched")
    loss(transitions(action="one-hot"))
    assert network.watched == [True, False, False]


class CheckedSequence(TensorDictSequential):
    """A sequence that does something of its own."""

    def forward(self, tensordict):
        return super().forward(tensordict)


@pytest.mark.parametrize(
    ("sequence", "masked", "subclassed", "hooked", "calls"),
    [
        (TensorDictSequential, False, False, False, 0),
        (TensorDictSequential, True, False, False, 2),
        (TensorDictSequential, False, True, False, 2),
        (TensorDictSequential, False, False, True, 2),
        (CheckedSequence, False, False, False, 2),
    ],
)
def test_a_last_module_that_only_chooses_an_action_is_left_out(
    sequence, masked, subclassed, hooked, calls, monkeypatch
):
    module = pytest.importorskip("torchrl.modules").QValueModule
    seen = []
    forward = module.forward
    monkeypatch.setattr(module, "forward", lambda *args, **kwargs: seen.append(1) or forward(*args, **kwargs))
    cls = type("Chooser", (module,), {}) if subclassed else module
    chooser = cls(action_space="categorical", action_mask_key="mask" if masked else None)
    if hooked:
        chooser.register_forward_hook(lambda *_: None)
    loss = DQNLoss(sequence(action_values(), chooser), action_space="categorical")
    data = transitions(action="categorical")
    if masked:
        data["mask"], data["next", "mask"] = torch.ones(2, 3, 5, ACTIONS, dtype=torch.bool)
    out, _ = run(loss, data)
    assert len(seen) == calls
    without = DQNLoss(action_values(), action_space="categorical")
    without.value_network_params.data.update_(loss.value_network_params.data["module", "0"])
    without.target_value_network_params.data.update_(loss.target_value_network_params.data["module", "0"])
    torch.testing.assert_close(out["loss"], run(without, data)[0]["loss"], **CLOSE)


def looked_on(network):
    network.register_forward_pre_hook(lambda _, given: (given[0].copy().apply(lambda x: 2 * x),))


def patched(network):
    forward = network.forward
    network.forward = lambda tensordict: forward(tensordict.apply(lambda x: 2 * x))


@pytest.mark.parametrize("change", [looked_on, patched])
@pytest.mark.parametrize("loss_class", [DQNLoss, DiscreteCQLLoss])
def test_what_is_done_to_the_whole_network_is_done_before_it_chooses(loss_class, change):
    modules = pytest.importorskip("torchrl.modules")
    network = modules.QValueActor(action_values(), action_space="categorical")
    loss = loss_class(network, action_space="categorical")
    data = transitions(action="categorical")
    doubled = data.clone()
    for entries in (doubled, doubled["next"]):
        entries["observation"] *= 2
    wanted, _ = run(loss, doubled)
    change(loss.value_network)
    torch.testing.assert_close(run(loss, data)[0].to_dict(), wanted.to_dict(), **CLOSE)


def random_loss(**options):
    options = {"action_space": "one-hot", "double_dqn": True} | options
    return desynchronise_targets(DQNLoss(action_values(), **options))


@pytest.mark.parametrize("double_dqn", [False, True])
@pytest.mark.parametrize("estimator", ["TD0", "TDLambda"])
def test_nothing_after_a_terminal_step_matters(double_dqn, estimator):
    loss = random_loss(double_dqn=double_dqn).make_value_estimator(ValueEstimators[estimator])
    assert_terminal_observations_are_ignored(loss, transitions(action="one-hot"))


def test_padding_does_not_count():
    assert_padding_is_ignored(random_loss(), transitions(action="one-hot"))


@pytest.mark.parametrize("batch", [(), (1,), (0,), (2, 0), (2, 1), (2, 3, 4)])
def test_any_batch_shape(batch):
    data = transitions(batch, action="one-hot")
    out, seen = run(random_loss(reduction="none"), data)
    assert out["loss"].shape == batch
    assert seen["td_error"].shape == (*batch, 1)


def test_a_batch_is_so_many_single_transitions():
    loss, data = random_loss(reduction="none"), transitions((3,), action="one-hot")
    torch.testing.assert_close(
        run(loss, data)[0]["loss"], torch.stack([run(loss, one)[0]["loss"] for one in data]), **CLOSE
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_keeps_the_discount(dtype):
    loss = random_loss().make_value_estimator(gamma=0.999).to(dtype)
    assert loss.value_estimator.gamma.item() == 0.999
    data = transitions(action="one-hot").apply(lambda x: x.to(dtype) if x.is_floating_point() else x)
    assert run(loss, data)[0]["loss"].dtype == dtype


@pytest.mark.parametrize(
    "entry", ["action", "observation", ("next", "observation"), ("next", "reward"), ("next", "done")], ids=str
)
def test_a_missing_entry_is_named(entry):
    data = transitions(action="one-hot").exclude(entry, ("next", "terminated"))
    name = entry if isinstance(entry, str) else entry[-1]
    assert_rejected(random_loss(), data, KeyError, f"DQNLoss needs the entry .*'{name}'")


@pytest.mark.parametrize(
    ("entry", "shape", "message"),
    [
        ("action", (3, 5, 1), r"action \(one_hot\) has shape \(3, 5, 1\)"),
        ("action", (3, 5), r"action \(one_hot\) has shape \(3, 5\)"),
        (("next", "reward"), (3, 5), r"'action_value' has shape \(3, 5, 3\), but \('next', 'reward'\) has .*\(3, 5\)"),
        (("next", "reward"), (3, 5, 3), r"'action_value' has shape .* \[\*batch, actions\] and \[\*batch, 1\]"),
        (("next", "terminated"), (3, 5, 3), "terminated"),
    ],
)
def test_what_would_broadcast_by_accident_is_refused(entry, shape, message):
    data = transitions(action="one-hot")
    data[entry] = torch.ones(shape, dtype=data[entry].dtype)
    assert_rejected(random_loss(), data, RuntimeError, message)


def test_options_that_cannot_be_used_are_refused_when_the_loss_is_made():
    with pytest.raises(ValueError, match="double_dqn=True needs delay_value=True"):
        random_loss(delay_value=False)
    with pytest.raises(ValueError, match="loss_function is 'l3'"):
        random_loss(loss_function="l3")
    with pytest.raises(ValueError, match="reduction is 'foo'"):
        random_loss(reduction="foo")
    with pytest.raises(TypeError, match="make_value_estimator"):
        random_loss(gamma=0.9)
    with pytest.raises(NotImplementedError, match=r"TD0.*TD1.*TDLambda"):
        random_loss().make_value_estimator(ValueEstimators.GAE)


@pytest.mark.parametrize(
    "estimator",
    [ValueEstimators.TDLambda, TDLambdaEstimator, TDLambdaEstimator(gamma=0.9, lmbda=0.8, value_network=None)],
)
def test_estimators_are_given_by_name_class_or_as_they_are(estimator):
    options = {} if isinstance(estimator, nn.Module) else {"gamma": 0.9, "lmbda": 0.8}
    loss, data = random_loss(), transitions(action="one-hot")
    one_step = run(loss, data)[0]["loss"]
    loss.make_value_estimator(estimator, **options)
    wanted = random_loss()
    wanted.load_state_dict(loss.state_dict(), strict=False)
    wanted.make_value_estimator(ValueEstimators.TDLambda, gamma=0.9, lmbda=0.8)
    found = run(loss, data)[0]["loss"]
    torch.testing.assert_close(found, run(wanted, data)[0]["loss"], **CLOSE)
    assert found != one_step


def test_a_network_that_writes_its_values_elsewhere():
    data = transitions(action="one-hot")
    loss = DQNLoss(action_values(key=("agent", "q")), action_space="one-hot")
    assert_rejected(loss, data, KeyError, r"action_value.*set_keys")
    loss.set_keys(action_value=("agent", "q"))
    loss(data)


def test_the_network_says_the_action_space():
    network = nn.Linear(OBSERVATION, ACTIONS, **DOUBLE)
    network.action_space = "categorical"
    assert DQNLoss(network).action_space == "categorical"
    assert DQNLoss(TensorDictModule(network, ["observation"], ["action_value"])).action_space == "categorical"
    assert DQNLoss(network, action_space="one-hot").action_space == "one_hot"


def test_trained_on_a_fixed_batch_the_loss_goes_to_zero():
    loss, data = random_loss(double_dqn=False), transitions((4,), action="one-hot")
    updater = SoftUpdate(loss, tau=0.2)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        out = loss(data)
        out["loss"].backward()
        optimizer.step()
        updater.step()
        losses.append(out["loss"].item())
    assert losses[-1] < 1e-2 * losses[0]


def test_tensors_can_be_passed_instead_of_a_tensordict():
    data = transitions((4,), action="one-hot")
    loss = random_loss()
    tensors = {"_".join(key) if isinstance(key, tuple) else key: x for key, x in data.items(True, True)}
    torch.testing.assert_close(loss(**tensors), loss(data)["loss"])


@pytest.mark.parametrize("estimator", ["TD0", "TDLambda"])
def test_nothing_waits_for_the_device(estimator, monkeypatch):
    loss = random_loss().make_value_estimator(ValueEstimators[estimator])
    data = transitions(action="one-hot", steps_to_next_obs=True)
    data["collector", "mask"] = torch.arange(5).expand(3, 5) < 4
    assert_no_host_sync(loss, data, monkeypatch)


# The one-hot form is compiled in test_every_loss.py.
def test_compiled_with_several_heads_is_eager():
    def make():
        network = Heads(OBSERVATION, ACTIONS, **DOUBLE)
        return desynchronise_targets(DQNLoss(network, action_space="mult-one-hot", double_dqn=True))

    assert_compiles(make, transitions(action="one-hot"), backend="eager")


def test_modules_of_a_tolerant_network_whose_inputs_are_absent_are_left_out():
    value = action_values()
    extra = TensorDictModule(nn.Identity(), ["extra"], ["action_value"])
    tolerant = TensorDictSequential(value, extra, partial_tolerant=True)
    data = transitions((6,), "one-hot")
    losses = (DQNLoss(network, action_space="one-hot", delay_value=False) for network in (tolerant, value))
    torch.testing.assert_close(*(loss(data.clone())["loss"] for loss in losses))
