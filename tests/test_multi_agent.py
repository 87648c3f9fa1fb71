"""Teams: estimates for each agent from what the team shares, and PPO on them."""

import re

import fusedrl.estimators as E
import pytest
import torch
from fusedrl.losses.functional.policy_gradient import fill_padding
from fusedrl.losses.multi_agent import IPPOLoss, MAPPOLoss
from fusedrl.losses.ppo import ClipPPOLoss
from fusedrl.losses.utils import ValueEstimators
from helpers_estimators import assert_close, assert_untouched, no_host_sync, snapshot
from helpers_multi_agent import AGENTS, VALUE, collect_team, team_critic, team_policy
from torch import nn

SHARED = [("next", "reward"), ("next", "done"), ("next", "terminated")]
every_loss = pytest.mark.parametrize("cls", [MAPPOLoss, IPPOLoss], ids=lambda cls: cls.__name__)
every_backend = pytest.mark.parametrize("backend", ["reference", "torch"])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def estimator(cls=E.MultiAgentGAE, **options):
    given = {"gamma": 0.9, "lmbda": 0.8, "value_network": team_critic(), "backend": "torch", **options}
    e = cls(**given)
    e.set_keys(**VALUE)
    return e


def of_each(data, *keys):
    """``data`` in which the team's entries ``keys`` are written out for each agent."""
    data = data.copy()
    for key in keys or SHARED:
        data[key] = data[key].unsqueeze(-2).expand(*data.shape, AGENTS, 1).clone()
    return data


# --- the estimator ------------------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("own", [SHARED[:n] for n in range(4)] + [SHARED[1:2], SHARED[1:], SHARED[2:]], ids=str)
def test_what_the_team_shares_is_that_of_each_agent(own, backend):
    data = collect_team()
    network = team_critic()
    expected = estimator(E.GAE, value_network=network, backend=backend)(of_each(data))
    actual = estimator(value_network=network, backend=backend)(of_each(data, *own) if own else data)
    for key in ("advantage", "value_target"):
        assert actual[key].shape == (2, 5, AGENTS, 1)
        assert_close(actual[key], expected[key])
    for key in SHARED:
        assert actual[key].shape == ((2, 5, AGENTS, 1) if key in own else (2, 5, 1))


@pytest.mark.parametrize(
    "options",
    [
        {"auto_reset_env": True},
        {"shifted": True, "shifted_budget": 2},
        {"value_chunk_size": 1},
        {"lmbda": torch.rand(2, 1, 1), "gamma": torch.rand(2, 5, 1)},
    ],
    ids=lambda options: "-".join(options),
)
def test_the_options_of_gae_mean_the_same(options):
    data, network = collect_team(), team_critic()
    alone = {key: x.unsqueeze(-2) if isinstance(x, torch.Tensor) and x.ndim else x for key, x in options.items()}
    expected = estimator(E.GAE, value_network=network, **alone)(of_each(data))
    actual = estimator(value_network=network, **options)(data)
    for key in ("advantage", "value_target"):
        assert_close(actual[key], expected[key])


@every_backend
@pytest.mark.parametrize("agents", [2, 5])  # 5 is the number of steps, too
@pytest.mark.parametrize("shape", [(5, 1), (1, 1), (1,), (2, 5, 1), (2, 1, 1)], ids=str)
def test_discount_and_decay_that_broadcast_to_the_team_s_reward_are_the_team_s(shape, agents, backend):
    data = collect_team()
    value = torch.randn(2, 5, agents, 1, dtype=torch.float64)
    data["agents"] = data["next", "agents"] = {"state_value": value}
    gamma, lmbda = torch.rand(2, *shape, dtype=torch.float64)
    given = {"value_network": None, "backend": backend}
    actual = estimator(gamma=gamma, lmbda=lmbda, **given)(data.copy())
    gamma, lmbda = (x.expand(2, 5, 1).unsqueeze(-2).expand(2, 5, agents, 1).clone() for x in (gamma, lmbda))
    expected = estimator(gamma=gamma, lmbda=lmbda, **given)(data.copy())
    for key in ("advantage", "value_target"):
        assert_close(actual[key], expected[key])


def test_a_discount_of_each_agent_is_no_discount_of_the_team():
    data = collect_team()
    gamma = torch.rand(AGENTS, 1)
    network = team_critic()
    actual = estimator(gamma=gamma, value_network=network)(data.copy())["advantage"]
    for agent, one in enumerate(gamma.flatten()):
        expected = estimator(gamma=one, value_network=network)(data.copy())["advantage"]
        assert_close(actual[..., agent, :], expected[..., agent, :])


@pytest.mark.parametrize("padded", [False, True])
def test_average_gae_standardises_the_advantages_of_each_agent(padded):
    data, network = collect_team(), team_critic()
    if padded:
        data["collector", "mask"] = torch.arange(5).expand(2, 5) < 4
    plain = estimator(value_network=network)(data.copy())["advantage"][:, : 4 if padded else 5]
    averaged = estimator(value_network=network, average_gae=True)(data.copy())["advantage"]
    for agent in range(AGENTS):
        x = plain[:, :, agent]
        assert_close(averaged[:, : x.shape[1], agent], (x - x.mean()) / x.std())


def test_n_step_data_of_a_team_is_discounted_by_gamma_to_the_n():
    data = collect_team()
    data["steps_to_next_obs"] = torch.full((2, 5, 1), 2)
    network = team_critic()
    expected = estimator(value_network=network, gamma=0.81)(data.exclude("steps_to_next_obs"))
    assert_close(estimator(value_network=network)(data)["advantage"], expected["advantage"])


def test_a_terminal_step_of_the_team_without_done_ends_it_and_its_next_observations_are_ignored():
    results = []
    for garbage in (0.0, torch.nan, torch.inf):
        torch.manual_seed(0)
        data = collect_team()
        data["next", "terminated"][0, 2] = True
        data["next", "done"][0, 2] = garbage == 0
        data["next", "agents", "observation"][data["next", "terminated"].squeeze(-1)] = garbage
        network = team_critic()
        td = estimator(value_network=network, differentiable=True)(data)
        results.append((td["advantage"], td["value_target"]))
    for dirty in results[1:]:
        for x, clean in zip(dirty, results[0], strict=True):
            assert_close(x, clean)


def test_padded_steps_of_a_team_enter_no_estimate():
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 3:] = False
    results = []
    for garbage in (0.0, torch.nan):
        torch.manual_seed(0)
        data = collect_team()
        data["collector", "mask"] = mask
        data["next", "reward"][~mask] = garbage
        data["agents", "observation"][~mask] = garbage
        td = estimator()(data)
        results.append(td["value_target"])
        assert (td["advantage"][~mask] == 0).all()
    assert_close(results[1], results[0])


@pytest.mark.parametrize("batch", [(3, 1), (3, 0), (0, 4)], ids=str)
def test_degenerate_batches_give_the_shape_of_the_value(batch):
    assert estimator()(collect_team((2, 4)).expand(5, 2, 4)[: batch[0], 0, : batch[1]])["advantage"].shape == (
        *batch,
        AGENTS,
        1,
    )


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (
            lambda d: d["next"].set("reward", torch.zeros(2, 5)),
            r"\('next', 'reward'\) has shape \(2, 5\)|reward.*\(2, 5\)",
        ),
        (lambda d: d["next"].set("reward", torch.zeros(2, 5, 2, 1)), r"\(2, 5, 2, 1\)"),
        (lambda d: d["next"].set("done", torch.zeros(2, 5, 2, 1)), r"\(2, 5, 2, 1\)"),
    ],
    ids=["reward_flat", "reward_of_two", "done_of_two"],
)
def test_shapes_that_do_not_fit_are_named_and_nothing_is_changed(spoil, match):
    data = collect_team()
    spoil(data)
    before = snapshot(data)
    with pytest.raises(RuntimeError, match=match):
        estimator()(data)
    assert_untouched(data, before)


def test_a_dimension_of_agents_that_the_value_lacks_is_not_another_one():
    with pytest.raises(RuntimeError, match="shape"):
        estimator(agent_dim=6)(collect_team())  # of 4


# --- the losses ---------------------------------------------------------------------------------------------------


class Statistics(nn.Module):
    """Mean and standard deviation of the last batch of value targets."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, dtype=torch.float64))
        self.register_buffer("std", torch.ones(1, dtype=torch.float64))

    def update(self, value_target):
        self.mean.copy_(value_target.mean())
        self.std.copy_(value_target.std(correction=0))

    def normalize(self, value):
        return (value - self.mean) / self.std


def loss_of(cls=MAPPOLoss, networks=None, **options):
    actor, critic = networks or (team_policy(), team_critic())
    loss = cls(actor, critic, **options)
    loss.set_keys(**VALUE)
    return loss


@every_loss
def test_it_is_ppo_on_the_agents_own_estimates(cls):
    networks, data = (team_policy(), team_critic()), collect_team()
    given = of_each(data)
    ppo = ClipPPOLoss(*networks, normalize_advantage=True, normalize_advantage_exclude_dims=(-2,))
    ppo.set_keys(**VALUE)
    out, expected = loss_of(cls, networks)(data), ppo(given)
    assert set(out.keys()) == set(expected.keys())
    for key, x in expected.items():
        assert_close(out[key], x)
    assert cls.default_value_estimator is ValueEstimators.MAGAE


def test_advantages_are_normalised_for_each_agent():
    data = collect_team()
    data["advantage"] = torch.randn(2, 5, AGENTS, 1, dtype=torch.float64)
    data["value_target"] = torch.zeros(2, 5, AGENTS, 1, dtype=torch.float64)
    networks = team_policy(), team_critic()
    expected = loss_of(networks=networks)(data)["loss_objective"]
    data["advantage"] = data["advantage"] * torch.tensor([1.0, 10.0, 100.0]).view(3, 1) + 5
    assert_close(loss_of(networks=networks)(data)["loss_objective"], expected)
    plain = loss_of(networks=networks, normalize_advantage=False)(data)["loss_objective"]
    assert (plain - expected).abs() > 1


@pytest.mark.parametrize("clip_value", [None, 0.3])
def test_a_value_norm_makes_value_and_target_comparable(clip_value):
    networks, data = (team_policy(), team_critic()), collect_team()
    data = E.MultiAgentGAE(gamma=0.9, lmbda=0.9, value_network=None)(
        data.set("state_value", torch.randn(2, 5, AGENTS, 1).double()).set(
            ("next", "state_value"), torch.randn(2, 5, AGENTS, 1).double()
        )
    )
    data["agents", "state_value"] = data.pop("state_value")
    norm = Statistics()
    loss = loss_of(networks=networks, value_norm=norm, clip_value=clip_value, loss_critic_type="l2")
    out = loss(data)
    target = data["value_target"]
    assert_close(norm.mean, target.mean().view(1))
    scaled = data.copy()
    scaled["value_target"] = (target - target.mean()) / target.std(correction=0)
    scaled["agents", "state_value"] = norm.normalize(data["agents", "state_value"])
    with torch.no_grad():
        networks[1].module.weight.div_(norm.std)
        networks[1].module.bias.sub_(norm.mean).div_(norm.std)
    expected = loss_of(networks=networks, clip_value=clip_value, loss_critic_type="l2")(scaled)
    assert_close(out["loss_critic"], expected["loss_critic"])
    assert_close(out["explained_variance"], expected["explained_variance"])


def test_padded_steps_do_not_move_a_value_norm():
    results = []
    for steps in (5, 7):
        torch.manual_seed(0)
        data = collect_team((2, 7))
        data["collector", "mask"] = torch.arange(7).expand(2, 7) < 5
        data["next", "reward"][:, 5:] = 1e3
        norm = Statistics()
        loss_of(value_norm=norm)(data[:, :steps])
        results.append((norm.mean, norm.std))
    for padded, alone in zip(*results, strict=True):
        assert_close(padded, alone)


@pytest.mark.parametrize("rows", [1, 3, 4])
@pytest.mark.parametrize("valid", [1, 3, 4])  # of 6: also an odd number of padded steps
def test_filled_padding_keeps_mean_and_variance_for_each_index(rows, valid):
    x = torch.randn(rows, 6, 3, 1, dtype=torch.float64)
    mask = (torch.arange(6) < valid).view(6, 1, 1).expand_as(x)
    filled = fill_padding(x, mask, 2)
    assert_close(filled[:, :valid], x[:, :valid])
    assert_close(filled.mean((0, 1)), x[:, :valid].mean((0, 1)))
    assert_close(filled.var((0, 1), correction=0), x[:, :valid].var((0, 1), correction=0))
    assert_close(fill_padding(x, torch.zeros_like(mask), 2), torch.zeros_like(x))


def test_a_single_padded_step_is_filled_with_the_mean():
    x = torch.tensor([1.0, 5.0, 99.0])
    assert fill_padding(x, torch.tensor([True, True, False]), 1).tolist() == [1.0, 5.0, 3.0]


def test_a_cast_keeps_the_statistics():
    norm = Statistics()
    norm.mean.fill_(0.1)
    norm.register_buffer("count", None)
    loss = loss_of(value_norm=norm).to(torch.bfloat16)
    assert norm.mean.dtype == torch.float64
    assert norm.mean == 0.1
    assert "value_norm.mean" in loss.state_dict()
    assert next(loss.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"value_norm": nn.BatchNorm1d(1)}, "value_norm .* BatchNorm1d"),
        ({"value_norm": object()}, "value_norm .* object"),
    ],
    ids=["no_norm", "no_module"],
)
def test_a_value_norm_that_cannot_normalise_is_refused(options, match):
    with pytest.raises(TypeError, match=match):
        loss_of(**options)
    with pytest.raises(TypeError, match="no critic_network"):
        MAPPOLoss(team_policy(), value_norm=Statistics())


@every_loss
def test_bad_input_changes_neither_the_data_nor_the_statistics(cls):
    norm = Statistics()
    loss = loss_of(cls, value_norm=norm, clip_value=0.2)
    data = collect_team()
    for key in ("advantage", "value_target"):
        data[key] = torch.zeros(2, 5, AGENTS, 1, dtype=torch.float64)
    data["agents", "state_value"] = torch.zeros(2, 5, 1, 1)
    before = snapshot(data)
    with pytest.raises(RuntimeError, match=re.escape("('agents', 'state_value')")):
        loss(data)
    assert_untouched(data, before)
    assert norm.std == 1
    with pytest.raises(KeyError, match=r"'action'.*set_keys\(action="):
        loss(data.exclude(("agents", "action")))


@every_loss
def test_a_call_leaves_the_data_as_it_is_and_trains_both_networks(cls):
    networks, data = (team_policy(), team_critic()), collect_team()
    before = snapshot(data)
    out = loss_of(cls, networks)(data)
    assert_untouched(data, before)
    sum(x for key, x in out.items() if key.startswith("loss_")).backward()
    assert all(p.grad.abs().sum() > 0 for network in networks for p in network.parameters())


@every_loss
def test_called_with_tensors_it_returns_the_out_keys(cls):
    loss, data = loss_of(cls), collect_team()
    given = {"_".join(key) if isinstance(key, tuple) else key: data[key] for key in loss.in_keys}
    out = loss(data)
    for x, key in zip(loss(**given), loss.out_keys, strict=True):
        assert_close(x, out[key])


def test_nothing_waits_on_the_host(monkeypatch):
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)
    loss, data = loss_of(value_norm=Statistics()), collect_team()
    data["collector", "mask"] = torch.ones(2, 5, dtype=torch.bool)
    with no_host_sync():
        out = loss(data)
        sum(x for key, x in out.items() if key.startswith("loss_")).backward()


def test_compiled_whole_it_gives_the_eager_numbers():
    torch._dynamo.reset()
    networks, data = (team_policy(), team_critic()), collect_team()
    eager, compiled = (loss_of(networks=networks, value_norm=Statistics()) for _ in range(2))
    expected, actual = eager(data), torch.compile(compiled, fullgraph=True, backend="eager")(data)
    for key in eager.out_keys:
        assert_close(actual[key], expected[key])
    assert_close(compiled.value_norm.mean, eager.value_norm.mean)
