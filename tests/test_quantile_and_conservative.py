"""TQC, CrossQ and discrete CQL: their equations by hand, what they promise, and TorchRL's numbers."""

from functools import partial

import pytest
import torch
from fusedrl.losses.cross_q import CrossQLoss
from fusedrl.losses.discrete_cql import DiscreteCQLLoss
from fusedrl.losses.functional.quantiles import quantile_huber_loss, truncated_mixture
from fusedrl.losses.tqc import TQCLoss
from helpers_losses import DOUBLE, OBSERVATION
from helpers_q import (
    ACTION,
    ACTIONS,
    CLOSE,
    action_values,
    assert_padding_is_ignored,
    assert_parity,
    assert_rejected,
    assert_states_are_exchanged,
    assert_terminal_observations_are_ignored,
    desynchronise_targets,
    qvalue_network,
    run,
    same_parameters,
    stochastic_actor,
    transitions,
)
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

ATOMS = 4


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Judge(nn.Module):
    """Q(s, a), with ``atoms`` values and, if ``normalized``, a normalisation over the batch."""

    def __init__(self, atoms=1, normalized=False):
        super().__init__()
        self.hidden = nn.Linear(OBSERVATION + ACTION, 6, **DOUBLE)
        self.norm = nn.BatchNorm1d(6, **DOUBLE) if normalized else nn.Identity()
        self.out = nn.Linear(6, atoms, **DOUBLE)

    def forward(self, observation, action):
        return self.out(torch.tanh(self.norm(self.hidden(torch.cat([observation, action], -1)))))


def judge(**options):
    return TensorDictModule(Judge(**options), ["observation", "action"], ["state_action_value"])


def tqc(cls=TQCLoss, actor=None, qvalue=None, **options):
    options = {"num_qvalue_nets": 3, "top_quantiles_to_drop_per_net": 1, "target_entropy": -2.0, **options}
    loss = cls(actor or stochastic_actor(), qvalue or judge(atoms=ATOMS), **options)
    loss.make_value_estimator()
    return loss


def cross_q(cls=CrossQLoss, actor=None, qvalue=None, **options):
    loss = cls(actor or stochastic_actor(), qvalue or qvalue_network(), **{"target_entropy": -2.0, **options})
    loss.make_value_estimator()
    return loss


def discrete_cql(cls=DiscreteCQLLoss, network=None, **options):
    loss = cls(network or action_values(), **{"action_space": "categorical", **options})
    loss.make_value_estimator()
    return loss


MAKE = {"tqc": (tqc, transitions), "cross_q": (cross_q, partial(transitions, (8,)))}
MAKE["discrete_cql"] = (discrete_cql, partial(transitions, action="categorical"))
every_loss = pytest.mark.parametrize("name", MAKE)


# --- the equations ----------------------------------------------------------------------------------------------


def test_the_highest_atoms_of_the_pool_are_left_out_whichever_critic_they_are_of():
    atoms = torch.tensor([[[1.0, 9.0, 3.0]], [[8.0, 7.0, 2.0]]])  # 2 critics, 1 sample, 3 atoms
    assert truncated_mixture(atoms, drop=1).tolist() == [[1.0, 2.0, 3.0, 7.0]]
    assert truncated_mixture(atoms, drop=0).shape == (1, 6)


def test_the_quantile_loss_of_one_pair_by_hand():
    atoms = torch.tensor([0.0, 0.0])  # quantiles 1/4 and 3/4
    assert quantile_huber_loss(atoms, torch.tensor([2.0])) == (0.25 + 0.75) * 1.5 / 2
    assert quantile_huber_loss(atoms, torch.tensor([-0.5])) == (0.75 + 0.25) * 0.125 / 2


def test_the_quantile_loss_is_least_at_the_quantiles():
    torch.manual_seed(0)
    target = 100 * torch.randn(4001, dtype=torch.float64)  # so wide that the Huber loss is all but the absolute one
    atoms = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([atoms], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = quantile_huber_loss(atoms, target)
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = target.quantile(torch.tensor([0.125, 0.375, 0.625, 0.875], dtype=torch.float64))
    assert torch.allclose(atoms, expected, atol=1.0)


def test_discrete_cql_by_hand():
    network = nn.Linear(1, 2, bias=False)
    nn.init.ones_(network.weight)
    loss = DiscreteCQLLoss(network, action_space="categorical").make_value_estimator(gamma=0.5)
    loss.target_value_network_params.data.mul_(3)
    state = torch.tensor([[2.0]])
    out = loss(
        observation=state,
        action=torch.tensor([1]),
        next_observation=state,
        next_reward=state,
        next_done=torch.tensor([[False]]),
        next_terminated=torch.tensor([[False]]),
    )
    value, target = 2.0, 2.0 + 0.5 * 6.0  # of the target network, whose weights are 3
    assert out[0].item() == (value - target) ** 2 / 2
    torch.testing.assert_close(out[1], torch.tensor(2.0).log())  # log(2 e²) − 2


def test_cross_q_normalises_both_ends_of_a_transition_together():
    loss = cross_q(qvalue=judge(normalized=True), num_qvalue_nets=1)
    loss.eval()
    seen = []
    loss.qvalue_network.module.norm.register_forward_hook(lambda m, x, _: seen.append((len(x[0]), m.training)))
    loss(transitions((8,)))
    assert seen == [(16, True), (8, False)]
    assert loss.qvalue_network_params["module", "norm", "num_batches_tracked"].tolist() == [1]
    assert not any(module.training for module in loss.qvalue_network.modules())


@pytest.mark.parametrize("batch", [(2, 4), (2, 6)])  # 6 is the number of features too
def test_cross_q_normalises_over_all_batch_dimensions(batch):
    loss, data = cross_q(qvalue=judge(normalized=True)), transitions(batch)
    flat = cross_q(qvalue=judge(normalized=True))
    same_parameters(loss, flat)
    a, b = run(loss, data)[0], run(flat, data.reshape(-1))[0]
    for key in ("loss_actor", "loss_qvalue", "loss_alpha"):
        torch.testing.assert_close(a[key], b[key], **CLOSE)


@pytest.mark.parametrize("key", [("next", "terminated"), "priority_weight"], ids=["terminated", "priority_weight"])
def test_cross_q_refuses_another_shape_before_the_statistics_move(key):
    loss, data = cross_q(qvalue=judge(normalized=True)), transitions((8,))
    data[key] = torch.zeros(8, 3)
    before = {name: x.clone() for name, x in loss.state_dict().items()}
    with pytest.raises(RuntimeError, match=key[-1] if isinstance(key, tuple) else key):
        loss(data)
    assert all(torch.equal(x, before[name]) for name, x in loss.state_dict().items())


def test_cross_q_stacks_actions_whose_entry_has_a_batch_size_of_its_own():
    data, action = transitions((8,)), ("agent", "action")
    actor, qvalue = stochastic_actor(action=action), qvalue_network()
    qvalue.in_keys = ["observation", action]
    nested = data.exclude("action").set("agent", TensorDict({"action": data["action"]}, data["action"].shape))
    out, _ = run(cross_q(actor=actor, qvalue=qvalue), nested)
    assert out["loss_qvalue"].isfinite()


def test_cross_q_has_no_target_networks():
    loss = cross_q()
    assert not [name for name in loss.state_dict() if name.startswith("target_")]
    assert not loss._has_update_associated


# --- promises ---------------------------------------------------------------------------------------------------


@every_loss
def test_nothing_after_a_terminal_step_matters(name):
    make, data = MAKE[name]
    assert_terminal_observations_are_ignored(make(), data())


@pytest.mark.parametrize("name", ["tqc", "discrete_cql"])  # CrossQ's statistics are of all of its input
def test_padding_does_not_count(name):
    make, data = MAKE[name]
    assert_padding_is_ignored(make(), data(), random=name == "tqc")


def test_an_action_of_padding_may_stand_for_none():
    data, loss = transitions(action="categorical"), discrete_cql()
    data["collector", "mask"] = mask = torch.rand(data.shape) < 0.5
    data["action"] = torch.where(mask, data["action"], -1)
    assert loss(data)["loss_qvalue"].isfinite()


def test_n_step_targets_of_atoms_are_discounted_by_their_length():
    data, loss = transitions(), tqc(reduction="none").make_value_estimator(gamma=0.5)
    other = tqc(reduction="none").make_value_estimator(gamma=0.25)
    other.load_state_dict({k: v for k, v in loss.state_dict().items() if "gamma" not in k}, strict=False)
    wanted = run(other, data)[0]["loss_qvalue"]
    data["steps_to_next_obs"] = torch.full((*data.shape, 1), 2)
    torch.testing.assert_close(run(loss, data)[0]["loss_qvalue"], wanted, **CLOSE)


@pytest.mark.parametrize("name", ["tqc", "cross_q"])
def test_ensembles_called_in_turn_give_the_same_numbers(name):
    make, data = MAKE[name]
    batched, in_turn, data = make(), make(deactivate_vmap=True), data()
    same_parameters(batched, in_turn)
    assert_parity(batched, in_turn, data, **CLOSE)


@every_loss
def test_unreduced_losses_have_one_value_per_sample(name):
    make, data = MAKE[name]
    loss, data = make(reduction="none"), data()
    mean = make()
    same_parameters(loss, mean)
    each, reduced = run(loss, data)[0], run(mean, data)[0]
    for key in (key for key in each.keys() if key.startswith("loss_")):  # noqa: SIM118  # a TensorDict is no dict
        assert each[key].shape == data.shape
        torch.testing.assert_close(each[key].mean(), reduced[key], **CLOSE)


def test_dropping_every_atom_is_refused():
    assert_rejected(tqc(top_quantiles_to_drop_per_net=ATOMS), transitions(), RuntimeError, "none is left")
    with pytest.raises(ValueError, match="top_quantiles_to_drop_per_net"):
        tqc(top_quantiles_to_drop_per_net=-1)


def test_estimators_of_several_steps_are_refused_by_tqc():
    with pytest.raises(NotImplementedError, match="TD0"):
        tqc().make_value_estimator("TDLambda")


@pytest.mark.parametrize("space", ["mult-one-hot", "binary"])
def test_several_choices_are_refused_by_discrete_cql(space):
    with pytest.raises(ValueError, match=f"{space.replace('-', '_')}.*one choice"):
        discrete_cql(action_space=space)


# --- TorchRL ----------------------------------------------------------------------------------------------------


def peers(name, **options):
    theirs = pytest.importorskip("torchrl.objectives")
    if name == "discrete_cql":
        from torchrl.modules import QValueActor

        net = nn.Linear(OBSERVATION, ACTIONS, **DOUBLE)
        network = QValueActor(net, in_keys=["observation"], action_space="categorical")
        pair = [discrete_cql(cls, network, **options) for cls in (DiscreteCQLLoss, theirs.DiscreteCQLLoss)]
    else:
        make, ours, peer, qvalue = {
            "tqc": (tqc, TQCLoss, theirs.TQCLoss, judge(atoms=ATOMS)),
            "cross_q": (cross_q, CrossQLoss, theirs.CrossQLoss, judge(normalized=True)),
        }[name]
        actor = stochastic_actor()
        pair = [make(cls, actor, qvalue, **options) for cls in (ours, peer)]
    same_parameters(*pair)
    desynchronise_targets(*pair)
    return pair


OPTIONS = {
    "tqc": [{}, {"reduction": "sum"}, {"fixed_alpha": True}, {"top_quantiles_to_drop_per_net": 2}, {"alpha_init": 0.3}],
    "cross_q": [{}, {"reduction": "sum"}, {"fixed_alpha": True}, {"loss_function": "l2"}, {"num_qvalue_nets": 3}],
    # TorchRL's reads the next value off the trained network, whatever delay_value says.
    "discrete_cql": [{"delay_value": False, **more} for more in ({}, {"reduction": "sum"}, {"loss_function": "l1"})],
}


@pytest.mark.parametrize(("name", "options"), [(n, o) for n, each in OPTIONS.items() for o in each])
def test_outputs_gradients_and_priorities_are_those_of_torchrl(name, options):
    data = MAKE[name][1]()
    keys = None if name != "discrete_cql" else ["loss_qvalue", "loss_cql", "pred_value", "target_value"]
    assert_parity(*peers(name, **options), data, keys=keys)


@every_loss
def test_states_are_exchanged_with_torchrl(name):
    assert_states_are_exchanged(*peers(name))


def test_no_atom_need_be_dropped():
    assert tqc(top_quantiles_to_drop_per_net=0)(transitions())["loss_qvalue"].isfinite()


class OfOneAgent(Judge):
    def forward(self, observation, action):
        return super().forward(observation, action).unsqueeze(-2)


def test_atoms_of_another_batch_shape_are_refused():
    qvalue = TensorDictModule(OfOneAgent(atoms=ATOMS), ["observation", "action"], ["state_action_value"])
    assert_rejected(
        tqc(qvalue=qvalue), transitions(), RuntimeError, r"\[\*batch, atoms\] and \[\*batch, 1\] are wanted"
    )


def test_tqc_without_a_delay_takes_its_targets_from_the_trained_networks():
    assert not tqc(delay_qvalue=False)._has_update_associated
    assert list(tqc()._has_update_associated) == ["qvalue_network"]


def test_cross_q_refuses_a_mask_of_another_shape_before_the_statistics_move():
    loss, data = cross_q(qvalue=judge(normalized=True)), transitions((8,))
    data["collector", "mask"] = torch.ones(8, 3, dtype=torch.bool)
    before = {name: x.clone() for name, x in loss.state_dict().items()}
    with pytest.raises(RuntimeError, match="mask"):
        loss(data)
    assert all(torch.equal(x, before[name]) for name, x in loss.state_dict().items())


def test_tqc_leaves_importance_weights_unread_where_it_is_told_to():
    loss, data = tqc(use_prioritized_weights=False), transitions()
    wanted = run(loss, data)[0]
    data["priority_weight"] = torch.rand(data.shape, dtype=torch.float64)
    torch.testing.assert_close(run(loss, data)[0].to_dict(), wanted.to_dict(), rtol=0, atol=0)


def test_cross_q_leaves_each_layer_in_its_own_mode():
    loss = cross_q(qvalue=judge(normalized=True))
    loss.qvalue_network.module.norm.eval()
    loss(transitions((8,)))
    assert loss.qvalue_network.training
    assert not loss.qvalue_network.module.norm.training


def test_what_cross_q_logs_holds_no_gradient():
    out = cross_q()(transitions((8,)))
    assert not [key for key, x in out.items() if x.requires_grad and not key.startswith("loss_")]
