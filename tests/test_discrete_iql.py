"""Discrete IQL: the equations, what is promised beyond (or against) what TorchRL does, and where both agree.

What all losses of IQL share is tested in test_iql.py. In parity tests there are no masks, priority weights and n-step
transitions: TorchRL ignores them in some or all of the losses, and they are tested against the equations instead.
"""

from inspect import signature

import pytest
import torch
from fusedrl.losses.discrete_iql import DiscreteIQLLoss
from helpers_losses import OBSERVATION
from helpers_q import (
    ACTIONS,
    CLOSE,
    DOUBLE,
    action_values,
    assert_no_host_sync,
    assert_padding_is_ignored,
    assert_parity,
    assert_rejected,
    assert_states_are_exchanged,
    assert_terminal_observations_are_ignored,
    desynchronise_targets,
    deterministic_actor,
    gradients,
    padded,
    run,
    same_parameters,
    transitions,
    value_network,
)
from helpers_sac import categorical_actor
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)
from torch import distributions as D
from torch import nn

NETWORKS = {"loss_actor": "actor_network", "loss_qvalue": "qvalue_network", "loss_value": "value_network"}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def qvalue_network():
    return action_values(key="state_action_value")


def make(actor=categorical_actor, **options):
    options = {"action_space": "categorical"} | options
    return desynchronise_targets(DiscreteIQLLoss(actor(), qvalue_network(), value_network(), **options))


def discrete(batch=(3, 5), **options):
    return transitions(batch, "categorical", **options)


# --- the mathematics --------------------------------------------------------------------------------------------


def test_the_losses_are_the_equations():
    loss = make(temperature=3.0, expectile=0.8, num_qvalue_nets=3, loss_function="l2")
    loss.make_value_estimator(gamma=0.5)
    data = discrete(batch=(6,))
    chosen = (torch.arange(6), data["action"])

    def values(network, params, inputs, key):
        with params.to_module(network):
            return network(inputs.clone())[key]

    def ensemble(params):
        each = [values(loss.qvalue_network, one, data, "state_action_value") for one in params.unbind(0)]
        return torch.stack([q[chosen] for q in each])

    value = values(loss.value_network, loss.value_network_params, data, "state_value").squeeze(-1)
    next_value = values(loss.value_network, loss.value_network_params, data["next"], "state_value").squeeze(-1)
    advantage = ensemble(loss.target_qvalue_network_params).min(0).values - value
    log_prob = values(loss.actor_network[0], loss.actor_network_params["module", "0"], data, "logits").log_softmax(-1)
    log_prob = log_prob[chosen]
    target = data["next", "reward"].squeeze(-1) + 0.5 * next_value * ~data["next", "terminated"].squeeze(-1)
    squares = (ensemble(loss.qvalue_network_params) - target).square()
    wanted = {
        "loss_actor": -((3 * advantage).exp().clamp(max=100) * log_prob).mean(),
        "loss_qvalue": squares.sum(0).mean(),
        "loss_value": torch.where(advantage > 0, 0.8 * advantage**2, 0.2 * advantage**2).mean(),
        "entropy": -log_prob.mean(),
    }
    out, seen = run(loss, data)
    torch.testing.assert_close(out.detach().to_dict(), {k: x.detach() for k, x in wanted.items()}, **CLOSE)
    torch.testing.assert_close(seen["td_error"], squares.amax(0).detach(), **CLOSE)


@pytest.mark.parametrize("members", [1, 2])
def test_each_loss_trains_its_own_network_alone(members):
    loss = make(num_qvalue_nets=members)
    found = gradients(loss, run(loss, discrete())[0])
    for term, network in NETWORKS.items():
        for name, gradient in found[term].items():
            assert bool(gradient.any()) is name.startswith(network), (term, name)


def test_the_values_of_other_actions_are_never_learned():
    loss, data = make(), discrete()
    data["action"] = torch.ones_like(data["action"])
    found = gradients(loss, run(loss, data)[0])["loss_qvalue"]["qvalue_network_params.module.bias"]
    assert found[:, 1].all()
    assert not found[:, [0, 2]].any()


def one_hot_actor():
    return categorical_actor(D.OneHotCategorical)


def test_all_ways_to_write_an_action_are_the_same():
    index = discrete()
    column = index.clone().set("action", index["action"].unsqueeze(-1))
    one_hot = index.clone().set("action", nn.functional.one_hot(index["action"], ACTIONS))
    flags = index.clone().set("action", one_hot["action"].bool())
    loss, hot = make(), make(one_hot_actor, action_space=None)
    same_parameters(loss, hot)
    (wanted, seen) = run(loss, index)
    for other, data in ((loss, column), (hot, one_hot), (hot, flags)):
        out, also_seen = run(other, data)
        torch.testing.assert_close(out.to_dict(), wanted.to_dict(), **CLOSE)
        torch.testing.assert_close(gradients(other, out), gradients(loss, wanted), **CLOSE)
        torch.testing.assert_close(also_seen["td_error"], seen["td_error"], **CLOSE)
        assert torch.equal(also_seen["action"], data["action"])


@pytest.mark.parametrize("members", [1, 2])
def test_no_network_is_called_twice_on_the_same(members):
    loss, calls = make(num_qvalue_nets=members), []
    for name in ("qvalue_network", "value_network"):
        getattr(loss, name).module.register_forward_hook(lambda *_, name=name: calls.append(name))
    loss(discrete())
    # Each member of Q: trained and target; V: of the observations and of the next ones.
    assert sorted(calls) == ["qvalue_network"] * 2 * members + ["value_network"] * 2


# --- data -------------------------------------------------------------------------------------------------------


def test_nothing_after_a_terminal_step_matters():
    assert_terminal_observations_are_ignored(make(), discrete())


def test_a_step_that_terminates_without_being_done_is_terminal():
    data = discrete()
    data["next", "done"] = torch.zeros_like(data["next", "done"])
    assert_terminal_observations_are_ignored(make().make_value_estimator("TDLambda"), data)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_padding_does_not_count_in_any_loss(reduction):
    # TorchRL lets it count in that of the Q networks.
    assert_padding_is_ignored(make(reduction=reduction), discrete())


def test_padding_that_is_no_one_hot_vector_does_not_count():
    # The distribution of PyTorch refuses such a vector.
    data = transitions(action="one-hot")
    data["action"] = data["action"].double()
    assert_padding_is_ignored(make(one_hot_actor, action_space="one_hot"), data)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_an_action_that_does_not_exist_can_stand_in_the_padding(shape):
    loss, data = make(), discrete()
    wanted, _ = run(loss, data)
    data = padded(data, float("nan"))
    data["action"] = torch.where(data["collector", "mask"], data["action"], -1).reshape(*data.shape, *shape)
    out, _ = run(loss, data)
    torch.testing.assert_close(out.to_dict(), wanted.to_dict(), **CLOSE)
    torch.testing.assert_close(gradients(loss, out), gradients(loss, wanted), **CLOSE)


def test_n_step_transitions_are_discounted_by_their_length():
    # TorchRL discounts them as if they had one step.
    data = discrete(batch=(6,))
    loss, other = make(), make()
    same_parameters(loss, other)
    loss.make_value_estimator(gamma=0.5)
    other.make_value_estimator(gamma=0.125)
    wanted = other(data.clone())["loss_qvalue"]
    data["steps_to_next_obs"] = torch.full((6, 1), 3)
    torch.testing.assert_close(loss(data)["loss_qvalue"], wanted, **CLOSE)


def test_priorities_weigh_all_losses_unless_they_are_not_to():
    # TorchRL writes priorities and ignores the weights that come back.
    loss, data = make(), discrete()
    weight = torch.rand(*data.shape, 1, **DOUBLE)
    plain, _ = run(loss, data)
    weighted = data.clone().set("priority_weight", weight)
    out, _ = run(loss, weighted)
    loss.reduction = "none"
    each, _ = run(loss, data)
    weight = weight.squeeze(-1)
    for name in NETWORKS:
        torch.testing.assert_close(out[name], (each[name] * weight).sum() / weight.sum(), **CLOSE)
    unweighted = make(use_prioritized_weights=False)
    same_parameters(loss, unweighted)
    torch.testing.assert_close(run(unweighted, weighted)[0].to_dict(), plain.to_dict(), **CLOSE)


def test_masks_of_numbers_and_integer_rewards_are_understood():
    loss, data = make(), discrete()
    data["next", "reward"] = data["next", "reward"].round()
    numbers = data.clone()
    numbers["next", "reward"] = numbers["next", "reward"].long()
    numbers["next", "done"] = numbers["next", "done"].int()
    numbers["next", "terminated"] = numbers["next", "terminated"].float()
    assert torch.equal(run(loss, numbers)[0]["loss_qvalue"], run(loss, data)[0]["loss_qvalue"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_keeps_the_discount_and_computes(dtype):
    loss = make(temperature=50.0).make_value_estimator(gamma=0.999)
    loss.to(dtype)
    assert loss.value_estimator.gamma == 0.999
    out, seen = run(loss, discrete().apply(lambda x: x.to(dtype) if x.is_floating_point() else x))
    assert {x.dtype for x in (*out.values(), seen["td_error"])} == {dtype}
    assert all(x.isfinite().all() for x in out.values())


def test_tensors_can_be_passed_instead_of_a_tensordict():
    loss, data = make(), discrete()
    tensors = {k if isinstance(k, str) else "_".join(k): v for k, v in data.items(True, True)}
    out = loss(data)
    for name, x in zip(loss.out_keys, loss(**tensors), strict=True):
        assert torch.equal(x, out[name])
    loss.select_out_keys("loss_qvalue", "loss_value")
    for name, x in zip(("loss_qvalue", "loss_value"), loss(**tensors), strict=True):
        assert torch.equal(x, out[name])


def test_only_the_priority_is_written():
    # TorchRL also writes the parameters of the distribution, and the log-probability.
    loss, data = make(), discrete()
    loss.set_keys(priority=("replay", "error"))
    _, seen = run(loss, data)
    assert set(seen.keys(True, True)) - set(data.keys(True, True)) == {("replay", "error")}
    assert seen["replay", "error"].shape == data.shape
    for key in data.keys(True, True):
        assert torch.equal(seen[key], data[key])


# --- faults -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "match"),
    [
        ("action", r"DiscreteIQLLoss.*'action'.*set_keys\(action="),
        ("observation", r"'observation'"),
        (("next", "observation"), r"\('next', 'observation'\).*value_network"),
        (("next", "reward"), r"\('next', 'reward'\).*set_keys\(reward="),
    ],
)
def test_a_missing_entry_is_named(key, match):
    assert_rejected(make(), discrete().exclude(key), KeyError, match)


def test_rewards_that_would_broadcast_are_refused():
    data = discrete()
    data["next", "reward"] = data["next", "reward"].expand(*data.shape, 3)
    assert_rejected(make(), data, RuntimeError, r"\('next', 'reward'\)")


@pytest.mark.parametrize(("space", "data"), [
    ("one_hot", discrete), ("categorical", lambda: transitions(action="one-hot")),
])  # fmt: skip
def test_an_action_written_in_another_way_is_refused(space, data):
    def actor():
        return categorical_actor(lambda logits: D.Categorical(logits=logits, validate_args=False))

    assert_rejected(make(actor, action_space=space), data(), RuntimeError, rf"'action' \({space}\).*per sample")


def test_values_of_another_number_of_actions_are_refused():
    qvalue = action_values(actions=5, key="state_action_value")
    loss = DiscreteIQLLoss(one_hot_actor(), qvalue, value_network(), action_space="one_hot")
    assert_rejected(loss, transitions(action="one-hot"), RuntimeError, r"one_hot.*\(2, 3, 5, 3\).*\(2, 3, 5, 5\)")


def test_a_q_network_that_writes_elsewhere_is_told_so():
    loss = DiscreteIQLLoss(categorical_actor(), action_values(), value_network(), action_space="categorical")
    assert_rejected(loss, discrete(), KeyError, r"'state_action_value'.*'action_value'.*set_keys")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"actor": deterministic_actor}, TypeError, r"DiscreteIQLLoss needs an actor_network.*distribution"),
        ({"action_space": "foo"}, ValueError, r"action_space is 'foo'"),
        ({"action_space": "binary"}, ValueError, r"action_space is 'binary'.*one choice"),
        ({"expectile": 1.5}, ValueError, r"expectile"),
        ({"scalar_output_mode": "foo"}, ValueError, r"scalar_output_mode is 'foo'"),
        ({"num_qvalue_nets": 0}, ValueError, r"num_qvalue_nets"),
        ({"reduction": "foo"}, ValueError, r"foo"),
        ({"loss_function": "foo"}, ValueError, r"foo"),
        ({"gamma": 0.9}, TypeError, r"make_value_estimator"),
    ],
)
def test_an_option_without_a_meaning_is_refused(options, error, match):
    with pytest.raises(error, match=match):
        make(**options)


def test_nothing_waits_for_the_device(monkeypatch):
    data = discrete()
    data["collector", "mask"] = torch.rand(data.shape) < 0.8
    data["priority_weight"] = torch.rand(data.shape, **DOUBLE)
    assert_no_host_sync(make(), data, monkeypatch)


# --- parity with TorchRL ----------------------------------------------------------------------------------------

OPTIONS = {
    "defaults": {},
    "l1": {"loss_function": "l1"},
    "l2": {"loss_function": "l2"},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none", "scalar_output_mode": "exclude"},
    "imitation": {"temperature": 0.0},
    "cold": {"temperature": 100.0},
    "expectile": {"expectile": 0.9},
    "separate": {"separate_losses": True},
    "one_network": {"num_qvalue_nets": 1},
    "three_networks": {"num_qvalue_nets": 3},
}


def both():
    return DiscreteIQLLoss, pytest.importorskip("torchrl.objectives").DiscreteIQLLoss


def pair(actor=categorical_actor, qvalue=qvalue_network, value=value_network, **options):
    """Our loss and TorchRL's, with the same parameters, of which the targets differ."""
    options = {"action_space": "categorical"} | options
    ours, other = (cls(actor(), qvalue(), value(), **options) for cls in both())
    desynchronise_targets(other)
    same_parameters(other, ours)
    return ours, other


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_outputs_gradients_and_priorities_agree(options):
    assert_parity(*pair(**options), discrete())


@pytest.mark.parametrize(("space", "distribution"), [
    ("categorical", D.Categorical), ("one-hot", D.OneHotCategorical),
    pytest.param(None, D.OneHotCategorical, marks=pytest.mark.filterwarnings("ignore:action_space was not specified")),
], ids=str)  # fmt: skip
def test_every_action_space_agrees(space, distribution):
    data = transitions(action="categorical" if space == "categorical" else "one-hot")
    losses = pair(lambda: categorical_actor(distribution), action_space=space)
    assert losses[0].action_space == losses[1].action_space
    assert_parity(*losses, data)


def test_specs_and_distributions_of_torchrl_agree():
    pytest.importorskip("torchrl")
    from torchrl.data import Categorical, OneHot
    from torchrl.modules import OneHotCategorical

    def hot():
        return categorical_actor(OneHotCategorical)

    assert_parity(*pair(hot, action_space=OneHot(ACTIONS)), transitions(action="one-hot"))
    assert_parity(*pair(action_space=Categorical(ACTIONS)), discrete())


@pytest.mark.parametrize("estimator", ["TD0", "TD1", "TDLambda"])
def test_every_estimator_agrees(estimator):
    ours, other = pair()
    kinds = pytest.importorskip("torchrl.objectives").ValueEstimators
    ours.make_value_estimator(estimator, gamma=0.9)
    other.make_value_estimator(kinds[estimator], gamma=0.9)
    assert_parity(ours, other, discrete())


def test_a_single_transition_agrees():
    assert_parity(*pair(), discrete()[0, 0])


def test_a_list_of_networks_agrees():
    assert_parity(*pair(qvalue=lambda: [qvalue_network() for _ in range(3)], num_qvalue_nets=3), discrete())


def test_renamed_entries_agree():
    names = {"reward": "r", "terminated": "over", "done": "end", "priority": "error", "value": "v"}
    names |= {"state_action_value": "q", "action": "move"}
    data = discrete().rename_key_("action", "move")
    for key in ("reward", "terminated", "done"):
        data["next"].rename_key_(key, names[key])

    def actor():
        sampler = ProbabilisticTensorDictModule(["logits"], ["move"], distribution_class=D.Categorical)
        return ProbabilisticTensorDictSequential(categorical_actor()[0], sampler)

    losses = pair(
        actor,
        lambda: action_values(key="q"),
        lambda: TensorDictModule(value_network().module, ["observation"], ["v"]),
    )
    for loss in losses:
        loss.set_keys(**names)
    assert_parity(*losses, data, priority="error")


@pytest.mark.parametrize("separate", [False, True])
def test_a_common_trunk_gets_the_same_gradients(separate):
    def networks():
        torch.manual_seed(3)
        trunk = TensorDictModule(nn.Linear(OBSERVATION, OBSERVATION, **DOUBLE), ["observation"], ["hidden"])
        logits, values, value = (
            TensorDictModule(nn.Linear(OBSERVATION, size, **DOUBLE), ["hidden"], [key])
            for key, size in (("logits", ACTIONS), ("state_action_value", ACTIONS), ("state_value", 1))
        )
        sampler = ProbabilisticTensorDictModule(["logits"], ["action"], distribution_class=D.Categorical)
        return (
            ProbabilisticTensorDictSequential(trunk, logits, sampler),
            TensorDictSequential(trunk, values),
            TensorDictSequential(trunk, value),
        )

    ours, other = (cls(*networks(), action_space="categorical", separate_losses=separate) for cls in both())
    desynchronise_targets(other)
    with torch.no_grad():
        theirs_by_name = {**dict(other.named_parameters()), **dict(other.named_buffers())}
        for key, x in (*ours.named_parameters(), *ours.named_buffers()):
            if key in theirs_by_name and 0 not in x.stride():  # what an ensemble shares is a view of the others'
                x.copy_(theirs_by_name[key])
    assert_parity(ours, other, discrete())


@pytest.mark.parametrize("options", [{}, {"num_qvalue_nets": 1}, {"num_qvalue_nets": 3}])
def test_states_are_exchanged(options):
    ours, other = pair(**options)
    for loss in (ours, other):
        loss.make_value_estimator(gamma=0.9)
    assert_states_are_exchanged(ours, other)


def test_signature_keys_and_output_are_those_of_torchrl():
    ours, other = pair()
    deprecated = {"gamma", "priority_key"}
    wanted = {n: p.default for n, p in signature(type(other).__init__).parameters.items() if n not in deprecated}
    assert {n: p.default for n, p in signature(DiscreteIQLLoss.__init__).parameters.items()} == {
        **wanted,
        "use_prioritized_weights": "auto",
    }
    assert vars(ours.default_keys()) == {**vars(other._AcceptedKeys()), "priority_weight": "priority_weight"}
    assert ours.out_keys == other.out_keys
