"""Conservative Q-learning: its conservative term by hand, what it promises, and TorchRL's numbers for the rest.

TorchRL's conservative term isn't compared: its 50 values per sample for a batch of 5 and 10 draws are those of other
samples too.
"""

import math

import pytest
import torch
from fusedrl.estimators import heads
from fusedrl.losses.cql import CQLLoss
from helpers_losses import DOUBLE, diagonal_normal, squashed_normal
from helpers_q import (
    ACTION,
    CLOSE,
    OBSERVATION,
    assert_padding_is_ignored,
    assert_parity,
    assert_states_are_exchanged,
    desynchronise_targets,
    gradients,
    poisoned,
    qvalue_network,
    run,
    same_parameters,
    stochastic_actor,
    transitions,
)
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Independent, Normal


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(cls=CQLLoss, actor=None, qvalue=None, **options):
    loss = cls(actor or stochastic_actor(), qvalue or qvalue_network(), target_entropy=-2.0, **options)
    loss.make_value_estimator()
    return loss


class Quadratic(nn.Module):
    """Q(s, a) = w · |a|²."""

    def __init__(self, weight=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), weight, **DOUBLE))

    def forward(self, observation, action):
        return self.weight * action.square().sum(-1, keepdim=True) + 0 * observation[..., :1]


def quadratic(weight):
    return TensorDictModule(Quadratic(weight), ["observation", "action"], ["state_action_value"])


def zeros(actor):
    for p in actor.parameters():
        nn.init.zeros_(p)
    return actor


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("weight", [0.0, 1.5])
def test_the_term_estimates_the_integral_over_the_actions(weight, temperature):
    draws = 5000
    # tanh of a standard normal, which has all of the square's actions
    loss = make(actor=zeros(stochastic_actor(squashed_normal)), qvalue=quadratic(weight), num_random=draws,
                temperature=temperature, reduction="none")  # fmt: skip
    data = transitions((2,))
    out, _ = run(loss, data)
    side = torch.linspace(-1, 1, 2001, **DOUBLE)
    integral = torch.trapezoid((weight * side.square() / temperature).exp(), side) ** ACTION
    softest = temperature * (3 * draws * integral).log()  # draws of three kinds
    expected = 2 * (softest - weight * data["action"].square().sum(-1))  # two networks
    torch.testing.assert_close(out["loss_cql"], expected, rtol=0.02, atol=0.05)


def test_the_weight_multiplies_the_term():
    loss, heavy, data = make(), make(min_q_weight=5.0), transitions()
    same_parameters(loss, heavy)
    torch.testing.assert_close(5 * run(loss, data)[0]["loss_cql"], run(heavy, data)[0]["loss_cql"], **CLOSE)


def test_the_multiplier_grows_where_the_term_is_above_its_threshold():
    data = transitions()
    for threshold, sign in ((-1e3, -1), (1e3, 1)):
        loss = make(with_lagrange=True, lagrange_thresh=threshold)
        out, _ = run(loss, data)
        (gradient,) = torch.autograd.grad(out["loss_alpha_prime"], [loss.log_alpha_prime])
        assert gradient.sign() == sign


def test_a_cast_keeps_the_multiplier():
    loss = make(with_lagrange=True)
    before = loss.log_alpha_prime.dtype
    assert loss.to(torch.bfloat16).log_alpha_prime.dtype == before


def test_the_conservative_term_trains_the_values_alone():
    loss = make(with_lagrange=True)
    out, _ = run(loss, transitions())
    reached = {name for name, gradient in gradients(loss, out)["loss_cql"].items() if gradient.any()}
    assert reached
    assert all(name.startswith("qvalue_network_params") for name in reached)


class OnTrunk(nn.Module):
    """A layer on ``trunk``, and what comes besides the observation."""

    def __init__(self, trunk, head):
        super().__init__()
        self.trunk, self.head = trunk, head

    def forward(self, observation, *rest):
        return self.head(torch.cat([self.trunk(observation), *rest], -1))


def make_with_trunk(cls=CQLLoss, *, members=None):
    trunk = nn.Linear(OBSERVATION, OBSERVATION, **DOUBLE)
    actor = stochastic_actor()
    actor[0].module = OnTrunk(trunk, actor[0].module)
    judges = [OnTrunk(trunk, nn.Linear(OBSERVATION + ACTION, 1, **DOUBLE)) for _ in range(members or 1)]
    qvalues = [TensorDictModule(judge, ["observation", "action"], ["state_action_value"]) for judge in judges]
    return make(cls, actor, qvalues if members else qvalues[0])


@pytest.mark.parametrize("members", [None, 2], ids=["network", "list"])
def test_what_the_values_share_with_the_policy_stays_the_policy_s(members):
    loss = make_with_trunk(members=members)
    own = loss.actor_network_params["module", "0", "module", "trunk", "weight"]
    seen = loss.qvalue_network_params["module", "trunk", "weight"]
    with torch.no_grad():
        own += 1.0
    assert torch.equal(seen, own.expand(2, *own.shape))
    out, _ = run(loss, transitions())
    found = gradients(loss, out)
    assert not any(gradient.any() for name, gradient in found["loss_qvalue"].items() if "trunk" in name)
    assert found["loss_actor"]["actor_network_params.module.0.module.trunk.weight"].any()


def test_the_greatest_of_several_actions_is_backed_up():
    data = transitions((4,))
    loss = make(
        qvalue=quadratic(1.0), max_q_backup=True, num_random=500, actor=zeros(stochastic_actor(squashed_normal))
    )
    loss.make_value_estimator(gamma=1.0)
    _, seen = run(loss, data)
    target = data["next", "reward"] + (~data["next", "terminated"]) * 2.0  # the corner of the square
    expected = (data["action"].square().sum(-1) - target.squeeze(-1)).square()
    torch.testing.assert_close(seen["td_error"], expected, rtol=0.2, atol=0.2)


def test_an_end_may_hold_anything():
    """What the conservative term takes of it, actions of the policy there, are those of an observation of 0."""
    loss, data = make(), transitions()
    clean, _ = run(loss, data)
    nan, seen = run(loss, poisoned(data))
    inf, _ = run(loss, poisoned(data, float("inf")))
    torch.testing.assert_close(nan.to_dict(), inf.to_dict(), **CLOSE)
    torch.testing.assert_close(nan["loss_qvalue"], clean["loss_qvalue"], **CLOSE)
    assert seen["td_error"].isfinite().all()
    for gradient in gradients(loss, nan)["loss_cql"].values():
        assert gradient.isfinite().all()


def test_a_delayed_policy_draws_the_next_action():
    loss, data = make(delay_actor=True), transitions()
    before, _ = run(loss, data)
    loss.target_actor_network_params.data.mul_(2)
    after, _ = run(loss, data)
    assert after["loss_qvalue"] != before["loss_qvalue"]
    assert after["loss_actor"] == before["loss_actor"]


def test_padding_does_not_count():
    assert_padding_is_ignored(make(), transitions(), random=True)


def test_networks_called_in_turn_give_the_same_numbers():
    batched, in_turn = make(), make(deactivate_vmap=True)
    same_parameters(batched, in_turn)
    assert_parity(batched, in_turn, transitions(), **CLOSE)


@pytest.mark.parametrize(("option", "value"), [("num_random", 0), ("temperature", 0.0)])
def test_options_that_make_no_sense_are_refused(option, value):
    with pytest.raises(ValueError, match=option):
        make(**{option: value})


# --- TorchRL ----------------------------------------------------------------------------------------------------


def peers(*, networks=lambda: (stochastic_actor(), qvalue_network()), **options):
    theirs = pytest.importorskip("torchrl.objectives")
    actor, qvalue = networks()
    pair = [make(cls, actor, qvalue, **options) for cls in (CQLLoss, theirs.CQLLoss)]
    same_parameters(*pair)
    desynchronise_targets(*pair)
    return pair


@pytest.fixture
def means_are_drawn(monkeypatch):
    """Draws come in another order than TorchRL's, so all are the mean."""
    for drawing in (torch.distributions.normal, heads):
        monkeypatch.setattr(drawing, "_standard_normal", lambda shape, dtype, device: torch.zeros(
            shape, dtype=dtype, device=device))  # fmt: skip
    monkeypatch.setattr(torch, "normal", lambda mean, std: mean.clone())


ALIKE = ["loss_actor", "loss_actor_bc", "loss_qvalue", "loss_alpha", "alpha", "entropy"]


@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "sum"}, {"loss_function": "l2"}, {"deterministic_backup": False}, {"max_q_backup": True},
     {"delay_qvalue": False}, {"fixed_alpha": True}, {"alpha_init": 0.3}],
    ids=str,
)  # fmt: skip
@pytest.mark.usefixtures("means_are_drawn")
def test_all_but_the_conservative_term_is_that_of_torchrl(options):
    """TorchRL's delay_actor has no effect: it isn't compared."""
    assert_parity(*peers(**options), transitions(), keys=ALIKE)


def policy_and_critic_on_one_trunk():
    modules = pytest.importorskip("torchrl.modules")
    parameters, critic = stochastic_actor()[0], qvalue_network()
    parameters.in_keys, critic.in_keys = ["hidden"], ["hidden", "action"]
    actor = modules.ProbabilisticActor(parameters, in_keys=["loc", "scale"], distribution_class=diagonal_normal)
    trunk = TensorDictModule(nn.Linear(OBSERVATION, OBSERVATION, **DOUBLE), ["observation"], ["hidden"])
    both = modules.ActorCriticOperator(trunk, actor, critic)
    return both.get_policy_operator(), both.get_critic_operator()


@pytest.mark.usefixtures("means_are_drawn")
def test_a_critic_that_asks_the_policy_for_its_action_does_not_hide_that_in_the_data():
    assert_parity(*peers(networks=policy_and_critic_on_one_trunk), transitions(), keys=ALIKE)


def test_states_are_exchanged_with_torchrl():
    assert_states_are_exchanged(*peers(with_lagrange=True))


@pytest.mark.parametrize("members", [None, 2], ids=["network", "list"])
def test_a_trunk_shared_with_the_policy_is_trained_as_by_torchrl(members):
    theirs = pytest.importorskip("torchrl.objectives")
    ours, other = (make_with_trunk(cls, members=members) for cls in (CQLLoss, theirs.CQLLoss))
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in other.named_parameters()]
    ours.load_state_dict(other.state_dict())  # there, what all members see as one can't be loaded


class Slope(nn.Module):
    """Q(s, a) = w · Σ a, which is greatest in one corner of the actions."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), weight, **DOUBLE))

    def forward(self, observation, action):
        return self.weight * action.sum(-1, keepdim=True) + 0 * observation[..., :1]


def slope(weight):
    return TensorDictModule(Slope(weight), ["observation", "action"], ["state_action_value"])


def test_the_term_takes_actions_from_the_whole_square():
    draws, weight = 5000, 1.5
    loss = make(
        actor=zeros(stochastic_actor(squashed_normal)), qvalue=slope(weight), num_random=draws, reduction="none"
    )
    data = transitions((2,))
    out, _ = run(loss, data)
    integral = 2 * torch.tensor(weight, **DOUBLE).sinh() / weight  # of exp(w a) over (−1, 1)
    softest = (3 * draws * integral**ACTION).log()
    expected = 2 * (softest - weight * data["action"].sum(-1))
    torch.testing.assert_close(out["loss_cql"], expected, rtol=0.02, atol=0.05)


def test_each_network_backs_up_the_action_that_is_best_to_itself():
    loss = make(
        qvalue=[slope(1.0), slope(-1.0)], max_q_backup=True, num_random=500,
        actor=zeros(stochastic_actor(squashed_normal)), loss_function="l2", reduction="none",
    )  # fmt: skip
    loss.make_value_estimator(gamma=1.0)
    data = transitions((4,))
    out, _ = run(loss, data)
    target = data["next", "reward"] + (~data["next", "terminated"]) * 2.0  # opposite corners
    action = data["action"].sum(-1, keepdim=True)
    expected = ((action - target).square() + (-action - target).square()).squeeze(-1)
    torch.testing.assert_close(out["loss_qvalue"], expected, rtol=0.2, atol=0.3)


class Grid(nn.Module):
    """A network whose actions are 2 by 1."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, observation, *action):
        out = self.network(observation, *(x.flatten(-2) for x in action))
        return out if action else tuple(x.unflatten(-1, (ACTION, 1)) for x in out)


def test_an_action_of_several_dimensions_counts_as_one_of_as_many_numbers():
    def on_grid(loc, scale):
        return Independent(Normal(loc, scale), 2)

    flat, data = make(), transitions()
    actor, qvalue = stochastic_actor(on_grid), qvalue_network()
    actor[0].module, qvalue.module = Grid(actor[0].module), Grid(qvalue.module)
    grid = make(actor=actor, qvalue=qvalue)
    values = dict(zip(grid.state_dict(), flat.state_dict().values(), strict=True))
    grid.load_state_dict(values)
    wanted, _ = run(flat, data)
    data["action"] = data["action"].unflatten(-1, (ACTION, 1))
    torch.testing.assert_close(run(grid, data)[0].to_dict(), wanted.to_dict(), **CLOSE)


def with_multiplier(log_alpha_prime=0.0, **options):
    loss = make(with_lagrange=True, **options)
    loss.log_alpha_prime.data.fill_(log_alpha_prime)
    return loss


def test_the_threshold_is_taken_off_each_networks_term():
    data, (plain, less) = transitions(), (with_multiplier(), with_multiplier(lagrange_thresh=5.0))
    same_parameters(plain, less)
    a, b = (run(loss, data)[0] for loss in (plain, less))
    torch.testing.assert_close(b["loss_cql"], a["loss_cql"] - 2 * 5.0)
    torch.testing.assert_close(b["loss_alpha_prime"], a["loss_alpha_prime"] + 5.0)


def test_the_multiplier_learns_from_the_mean_of_the_terms_and_they_do_not_learn_from_its_loss():
    loss = with_multiplier()  # which is 1
    out, _ = run(loss, transitions())
    torch.testing.assert_close(out["loss_alpha_prime"], -out["loss_cql"] / 2, check_dtype=False)
    reached = [name for name, gradient in gradients(loss, out)["loss_alpha_prime"].items() if gradient.any()]
    assert reached == ["log_alpha_prime"]


def test_the_multiplier_is_a_million_at_most():
    data, loss = transitions(), with_multiplier()
    wanted = run(loss, data)[0]["loss_cql"]
    for log_alpha_prime, factor in ((20.0, 1e6), (5.0, math.exp(5.0))):
        loss.log_alpha_prime.data.fill_(log_alpha_prime)
        torch.testing.assert_close(run(loss, data)[0]["loss_cql"], factor * wanted, rtol=1e-5, atol=0)


def test_a_third_of_the_actions_are_those_of_the_next_state():
    loss, data = make(), transitions()
    before = run(loss, data)[0]["loss_cql"]
    data["next", "observation"] = data["next", "observation"] + 1
    assert run(loss, data)[0]["loss_cql"] != before
