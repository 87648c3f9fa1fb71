"""How estimators call their value network: at once, in turn, in chunks, shifted, not at all, with whose parameters."""

import pytest
import torch
from fusedrl import losses
from fusedrl.estimators import modules
from fusedrl.estimators.shifted import shifted_values
from fusedrl.estimators.steps import standardize
from helpers_estimators import HYPERPARAMETERS, assert_close, critic, every_estimator, policy, rollout
from helpers_estimators import estimator as build
from tensordict import NonTensorData, NonTensorStack, TensorDict
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential, set_skip_existing
from torch import nn


def estimator(name, **options):
    """With γ = 0.5 and λ = 1, which keep the estimates of whole numbers exact."""
    return build(name, **{**dict(zip(HYPERPARAMETERS[name], (0.5, 1.0), strict=False)), **options})


class Recording(nn.Module):
    """The sum over features; remembers the shapes and values it was called on (under vmap, the shapes alone)."""

    def __init__(self):
        super().__init__()
        self.shapes, self.seen = [], []

    def forward(self, obs):
        self.shapes.append(tuple(obs.shape))
        if not torch._C._functorch.is_batchedtensor(obs):
            self.seen.append(obs.flatten().tolist())
        return obs.sum(-1, keepdim=True)


def recording():
    module = Recording()
    return module, TensorDictModule(module, in_keys=["obs"], out_keys=["state_value"])


def trajectory(steps=6, truncated=(), terminated=()):
    """Observations 1, 2, 3 …; the next observation of a step t that ends a trajectory is 100 + t."""
    obs = torch.arange(1.0, steps + 1).view(1, steps, 1)
    next_obs = obs + 1
    done, term = torch.zeros(2, 1, steps, 1, dtype=torch.bool)
    for t in (*truncated, *terminated):
        done[:, t], next_obs[:, t] = True, 100 + t
    term[:, list(terminated)] = True
    entries = {"obs": next_obs, "reward": torch.ones(1, steps, 1), "done": done, "terminated": term}
    return TensorDict({"obs": obs, "next": entries}, [1, steps])


@every_estimator
def test_both_observations_go_through_the_network_in_one_call_under_vmap(name):
    module, network = recording()
    estimator(name, value_network=network)(rollout((2, 5)))
    assert module.shapes == [(2, 5, 3)]
    assert module.seen == []


@every_estimator
def test_without_vmap_the_network_is_called_twice(name):
    module, network = recording()
    estimator(name, value_network=network, deactivate_vmap=True)(rollout((2, 5)))
    assert module.shapes == [(2, 5, 3)] * 2
    assert len(module.seen) == 2


def test_a_compiled_call_follows_a_length_that_changes():
    torch._dynamo.reset()
    e = estimator("GAE", value_network=critic())
    compiled = torch.compile(e, fullgraph=True, backend="eager")
    for steps in (8, 9, 11):
        assert_close(compiled(rollout((4, steps)))["advantage"], e(rollout((4, steps)))["advantage"])


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ({"value_chunk_size": 2}, [(2, 4, 3), (1, 4, 3)] * 2),
        ({"num_chunks": 3}, [(1, 4, 3)] * 6),
        ({"num_chunk": 3}, [(1, 4, 3)] * 6),
        ({"value_chunk_size": 3, "value_chunk_dim": 1}, [(3, 3, 3), (3, 1, 3)] * 2),
        ({"num_chunks": 2, "value_chunk_dim": -1}, [(3, 2, 3)] * 4),
        ({"value_chunk_size": 100}, [(3, 4, 3)] * 2),
        ({"value_chunk_size": 3, "value_chunk_dim": 1, "shifted": True}, [(3, 3, 3), (3, 2, 3)]),
    ],
    ids=str,
)
def test_chunks_of_the_network_call(options, shapes):
    module, network = recording()
    estimator("GAE", value_network=network, **options)(rollout((3, 4)))
    assert module.shapes == shapes


@every_estimator
@pytest.mark.parametrize("targets", [False, True])
def test_parameters_are_those_that_are_passed(name, targets):
    network, other, third = critic(), critic(), critic()
    for i, module in enumerate((other, third), start=1):
        for p in module.parameters():
            p.data += 0.1 * i
    params = TensorDict.from_module(other).data
    target_params = TensorDict.from_module(third).data if targets else None
    td = estimator(name, value_network=network)(rollout(), params=params, target_params=target_params)
    assert_close(td["state_value"], other(rollout())["state_value"].detach())
    assert_close(td["next", "state_value"], (third if targets else other)(rollout()["next"])["state_value"].detach())
    assert_close(network(rollout())["state_value"], critic()(rollout())["state_value"])


@every_estimator
def test_without_a_network_the_values_of_the_tensordict_are_used_and_stay(name):
    data = rollout()
    data["state_value"], data["next", "state_value"] = data["obs"][..., :1], data["next", "obs"][..., :1]
    value, next_value = data["state_value"], data["next", "state_value"]
    td = estimator(name, value_network=None)(data)
    assert td["state_value"] is value
    assert td["next", "state_value"] is next_value
    identity = TensorDictModule(lambda obs: obs[..., :1], in_keys=["obs"], out_keys=["state_value"])
    assert_close(td["advantage"], estimator(name, value_network=identity)(rollout())["advantage"])


@every_estimator
@pytest.mark.parametrize(
    ("skip_existing", "globally", "skips"),
    [(True, False, True), (False, True, False), (None, True, True), (None, False, False)],
)
def test_values_that_exist_are_used_only_if_told(name, skip_existing, globally, skips):
    module, network = recording()
    data = rollout()
    data["state_value"], data["next", "state_value"] = torch.full((2, 2, 9, 1), 7.0).double().unbind(0)
    e = estimator(name, value_network=network, skip_existing=skip_existing)
    with set_skip_existing(globally):
        td = e(data)
    assert bool(module.shapes) != skips
    assert (td["state_value"] == 7).all() == skips
    assert (td["next", "state_value"] == 7).all() == skips


@every_estimator
def test_a_value_that_exists_for_one_of_the_observations_spares_half_of_the_call(name):
    module, network = recording()
    data = rollout()
    data["state_value"] = torch.full((2, 9, 1), 7.0).double()
    td = estimator(name, value_network=network, skip_existing=True)(data)
    assert module.shapes == [(2, 9, 3)]
    assert_close(td["next", "state_value"], data["next", "obs"].sum(-1, keepdim=True))


@pytest.mark.parametrize(
    ("truncated", "terminated", "budget", "sequence", "valid"),
    [
        ((), (), 1, [1, 2, 3, 4, 5, 6, 7], 6),
        ((5,), (), 1, [1, 2, 3, 4, 5, 6, 105], 6),
        ((2,), (), 1, [1, 2, 3, 102, 4, 5, 6], 5),
        ((2,), (), 2, [1, 2, 3, 102, 4, 5, 6, 7], 6),
        ((), (2,), 1, [1, 2, 3, 4, 5, 6, 7], 6),
        ((1, 3), (), 1, [1, 2, 101, 3, 4, 103, 5], 4),
        ((1, 3), (), 2, [1, 2, 101, 3, 4, 103, 5, 6], 5),
        ((0, 1), (3,), 1, [1, 100, 2, 101, 3, 4, 5], 4),
    ],
    ids=str,
)
def test_a_shifted_call_sees_each_observation_once_and_true_next_ones_after_truncations(
    truncated, terminated, budget, sequence, valid
):
    module, network = recording()
    td = estimator("GAE", value_network=network, shifted=True, shifted_budget=budget)(
        trajectory(truncated=truncated, terminated=terminated)
    )
    assert module.seen == [sequence]
    assert td["shifted_valid"].tolist() == [[t < valid for t in range(6)]]
    assert td["state_value"].flatten()[:valid].tolist() == list(range(1, valid + 1))
    for t in range(valid):
        if t not in terminated:
            assert td["next", "state_value"][0, t] == trajectory(truncated=truncated)["next", "obs"][0, t]


@every_estimator
@pytest.mark.parametrize(("truncated", "terminated"), [((2,), ()), ((1, 3), ()), ((0, 1), (3,)), ((1,), (4,))], ids=str)
def test_steps_that_do_not_fit_a_shifted_call_count_for_nothing(name, truncated, terminated):
    _, network = recording()
    td = estimator(name, value_network=network, shifted=True)(trajectory(truncated=truncated, terminated=terminated))
    valid = int(td["shifted_valid"].sum())
    assert 0 < valid < 6
    # The valid steps are estimated as though the trajectory had been truncated after the last of them.
    data = trajectory(truncated=truncated, terminated=terminated)[:, :valid]
    expected = estimator(name, value_network=network)(data)
    for key in ("advantage", "value_target"):
        assert_close(td[key][:, :valid], expected[key])
        assert (td[key][:, valid:] == 0).all()


@every_estimator
@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 8)], ids=str)
def test_a_shifted_call_with_enough_budget_equals_the_unshifted(name, shape):
    data = rollout(shape, seed=5, consistent=True)
    # A terminal step's next value is that of another observation, and not read.
    expected = estimator(name, value_network=critic())(data.clone())
    actual = estimator(name, value_network=critic(), shifted=True, shifted_budget=8)(data.clone())
    assert actual["shifted_valid"].all()
    for key in ("advantage", "value_target", "state_value"):
        assert_close(actual[key], expected[key])


@every_estimator
def test_a_shifted_call_without_next_observations_takes_the_observation_where_a_trajectory_ends(name):
    data = trajectory(truncated=(2,))
    expected = data.clone()
    for t in (2, 5):
        expected["next", "obs"][:, t] = data["obs"][:, t]
    data.pop(("next", "obs"))
    e = estimator(name, shifted=True, shifted_budget=2, value_network=recording()[1])
    for key in ("advantage", "value_target"):
        assert_close(e(data)[key], e(expected)[key])
    assert ("next", "obs") not in data.keys(True)


def test_average_gae_standardises_over_the_valid_steps():
    _, network = recording()
    data = trajectory(truncated=(2,))
    plain = estimator("GAE", value_network=network, shifted=True)(data.clone())["advantage"]
    actual = estimator("GAE", value_network=network, shifted=True, average_gae=True)(data)["advantage"]
    valid = plain[:, :5]
    assert_close(actual[:, :5], (valid - valid.mean()) / valid.std())
    assert actual[:, 5] == 0


@pytest.mark.parametrize("batch", [(2, 0), (0, 3), (2, 1)], ids=str)
def test_degenerate_batches_can_be_shifted(batch):
    td = estimator("GAE", value_network=critic(), shifted=True)(rollout(batch))
    assert td["advantage"].shape == (*batch, 1)


def test_shifted_time_can_be_any_dimension():
    data = rollout((3, 8), seed=5, consistent=True)
    truncated = (data["next", "done"] & ~data["next", "terminated"]).squeeze(-1)

    def network(x):
        return x["obs"].sum(-1, keepdim=True)

    expected = shifted_values(network, data.select("obs"), data["next"].select("obs"), truncated, 1, 2)
    flipped = [x.transpose(0, 1) for x in (data.select("obs"), data["next"].select("obs"), truncated)]
    actual = shifted_values(network, *flipped, 0, 2)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a.transpose(0, 1), e)


def test_an_input_of_a_shifted_call_may_be_one_number_for_each_step():
    columns, numbers = trajectory(truncated=[2]), trajectory(truncated=[2])
    for data in (numbers, numbers["next"]):
        data["obs"] = data["obs"].squeeze(-1)
    flat = TensorDictModule(lambda obs: obs.unsqueeze(-1), ["obs"], ["state_value"])
    found = estimator("GAE", value_network=flat, shifted=True)(numbers)
    wanted = estimator("GAE", value_network=recording()[1], shifted=True)(columns)
    assert torch.equal(found["advantage"], wanted["advantage"])


class Cumulative(nn.Module):
    """A recurrent network over dimension 1: observations summed since the last start of an episode."""

    def forward(self, obs, is_init):
        state, states = torch.zeros_like(obs[:, 0]), []
        for t in range(obs.shape[1]):
            state = torch.where(is_init[:, t], 0, state) + obs[:, t]
            states.append(state)
        return torch.stack(states, 1)


def test_recurrent_networks_continue_into_an_inserted_next_observation_and_start_afresh_after_it():
    network = TensorDictModule(Cumulative(), in_keys=["obs", "is_init"], out_keys=["state_value"])
    data = trajectory(truncated=(0, 2))
    data["is_init"] = torch.tensor([1, 1, 0, 1, 0, 0], dtype=torch.bool).view(1, 6, 1)
    td = estimator("TD0Estimator", value_network=network, shifted=True, shifted_budget=3)(data)
    assert td["state_value"].flatten().tolist() == [1, 2, 5, 4, 9, 15]
    assert td["next", "state_value"].flatten().tolist() == [101, 5, 107, 9, 15, 22]


def test_next_trajectories_start_where_the_trajectories_do():
    network = TensorDictModule(Cumulative(), in_keys=["obs", "is_init"], out_keys=["state_value"])
    data = trajectory(truncated=(2,))
    data["is_init"] = torch.tensor([1, 0, 0, 1, 0, 0], dtype=torch.bool).view(1, 6, 1)
    for is_init in (None, torch.zeros(1, 6, 1, dtype=torch.bool)):
        if is_init is not None:
            data["next", "is_init"] = is_init
        td = estimator("TD0Estimator", value_network=network, deactivate_vmap=True)(data.clone())
        assert td["next", "state_value"].flatten().tolist() == [2, 5, 107, 5, 11, 18]


class Starting(nn.Module):
    """A network with a state that it takes for zeros where there is none."""

    def forward(self, obs, state=None):
        return obs if state is None else obs + state


@every_estimator
@pytest.mark.parametrize("stored", [(), ("state",)], ids=str)
def test_an_input_that_the_network_can_do_without_may_be_missing(name, stored):
    network = TensorDictModule(Starting(), in_keys=["obs", "state"], out_keys=["state_value"])
    data = trajectory()
    for key in stored:
        data[key] = torch.zeros(1, 6, 1)
    td = estimator(name, value_network=network)(data)
    assert torch.equal(td["state_value"], data["obs"])
    assert torch.equal(td["next", "state_value"], data["next", "obs"])


@every_estimator
def test_an_input_that_the_network_can_do_without_is_not_the_one_that_an_error_names(name):
    starting = TensorDictModule(Starting(), in_keys={"state": "state", "obs": "start"}, out_keys=["began"])
    ending = TensorDictModule(nn.Linear(1, 1).double(), in_keys=["obs"], out_keys=["state_value"])
    network = TensorDictSequential(starting, ending)
    data = trajectory()
    data["start"], data["next", "start"] = data["obs"], data["next", "obs"]
    del data["obs"]
    with pytest.raises(KeyError, match="needs 'obs'"):
        estimator(name, value_network=network)(data)


def test_dropout_draws_differently_for_each_observation_unless_told():
    network = critic(module=nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 1).double()))
    assert estimator("GAE", value_network=critic()).vmap_randomness == "error"
    e = estimator("GAE", value_network=network)
    assert e.vmap_randomness == "different"
    data = rollout()
    data["next", "obs"] = data["obs"].clone()
    td = e(data.clone())
    assert not torch.equal(td["state_value"], td["next", "state_value"])
    e.set_vmap_randomness("same")
    td = e(data.clone())
    assert torch.equal(td["state_value"], td["next", "state_value"])
    with pytest.raises(ValueError, match="'sometimes'"):
        e.set_vmap_randomness("sometimes")


def test_another_network_is_called_as_the_estimator_was_told():
    e = estimator("GAE", value_network=critic())
    e.set_vmap_randomness("same")
    e.value_network = critic()
    assert e.vmap_randomness == "same"


def test_another_network_draws_as_its_own_modules_do_unless_told():
    e = estimator("GAE", value_network=critic())
    e.value_network = critic(module=nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 1).double()))
    assert e.vmap_randomness == "different"


def test_a_random_module_made_known_after_the_estimator_was_built_is_one(monkeypatch):
    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x)

    monkeypatch.setattr(modules, "_random_modules", list(modules._random_modules))
    e = estimator("GAE", value_network=critic(module=nn.Sequential(nn.Linear(3, 1).double(), Noise())))
    with pytest.raises(RuntimeError, match="randomness"):
        e(rollout())
    modules.add_random_module(Noise)
    td = e(rollout())
    assert td["advantage"].isfinite().all()


@every_estimator
def test_the_network_gets_the_keywords_of_value_estimate(name):
    class Scaled(nn.Module):
        def forward(self, obs, scale=1.0):
            return obs.sum(-1, keepdim=True) * scale

    network = TensorDictModule(Scaled(), in_keys=["obs"], out_keys=["state_value"])
    e = estimator(name, value_network=network, deactivate_vmap=True)
    assert not torch.equal(e.value_estimate(rollout(), scale=2.0), e.value_estimate(rollout()))


def test_standardising_ignores_what_is_not_valid_even_nan():
    x = torch.tensor([1.0, 2.0, 6.0, float("nan")])
    actual = standardize(x, torch.tensor([True, True, True, False]))
    assert_close(actual[:3], (x[:3] - x[:3].mean()) / x[:3].std())


@every_estimator
def test_a_shifted_estimate_of_values_in_the_data_is_the_unshifted(name):
    data = rollout((2, 5))
    network = critic()
    for part in (data, data["next"]):
        network(part)
    for options in ({"value_network": None}, {"value_network": network, "skip_existing": True}):
        plain, shifted = (estimator(name, **options, shifted=x)(data.copy()) for x in (False, True))
        assert "shifted_valid" not in shifted
        for key in ("advantage", "value_target"):
            assert_close(shifted[key], plain[key])


@every_estimator
def test_another_network_and_how_it_is_called_can_be_assigned(name):
    data = rollout((2, 5))
    module, network = recording()
    e = estimator(name, value_network=critic())
    e.value_network, e.deactivate_vmap = network, True
    assert e.value_network is network
    assert_close(e(data.copy())["advantage"], estimator(name, value_network=network)(data.copy())["advantage"])
    assert module.shapes[:2] == [(2, 5, 3)] * 2
    assert not list(e.parameters())
    before = len(module.shapes)
    e.skip_existing = True
    data["state_value"] = data["next", "state_value"] = torch.zeros(2, 5, 1, dtype=torch.float64)
    e(data)
    assert len(module.shapes) == before


def test_a_network_that_writes_another_value_is_refused_and_the_old_one_stays():
    network = critic()
    e = estimator("GAE", value_network=network)
    with pytest.raises(KeyError, match="'state_value' is not written by the value network"):
        e.value_network = TensorDictModule(nn.Linear(3, 1), ["obs"], ["other"])
    with pytest.raises(TypeError, match="value_network must be None or have in_keys"):
        e.value_network = nn.Linear(3, 1)
    assert e.value_network is network


def test_parameters_that_are_given_are_left_as_they_are_whatever_the_network_holds_them_in():
    multi_agent = pytest.importorskip("torchrl.modules").MultiAgentMLP
    module = multi_agent(3, 1, 2, centralized=False, share_params=True, depth=1, num_cells=4)
    network = TensorDictModule(module, ["obs"], ["state_value"])
    loss = losses.ReinforceLoss(policy(), network, delay_value=True)
    targets = loss.target_critic_network_params
    for x in targets.values(True, True):
        x.data.add_(1.0)
    before = [x.clone() for x in targets.values(True, True)]
    own = [x.clone() for x in network.parameters()]
    zero = torch.zeros(4, 2, 1)
    following = {"obs": torch.randn(4, 2, 3), "reward": zero, "done": zero.bool(), "terminated": zero.bool()}
    data = TensorDict({"obs": torch.randn(4, 2, 3), "next": following}, [4])
    build("TD0Estimator", value_network=network)(data, params=loss.critic_network_params, target_params=targets)
    assert all(map(torch.equal, targets.values(True, True), before))
    assert all(map(torch.equal, network.parameters(), own))


@every_estimator
def test_an_input_that_is_no_tensor_reaches_the_network(name):
    scaled = TensorDictModule(
        lambda obs, task: obs.sum(-1, keepdim=True) * (2 if task == "double" else 1), ["obs", "task"], ["state_value"]
    )
    data = rollout((2, 5))
    for entries in (data, data["next"]):
        entries.set_non_tensor("task", "double")
    found = estimator(name, value_network=scaled)(data.clone())
    wanted = estimator(name, value_network=scaled, deactivate_vmap=True)(data.clone())
    assert_close(found["value_target"], wanted["value_target"])


@every_estimator
def test_entries_that_the_network_reads_as_one_tensordict_reach_it_as_they_are(name):
    def team_value(team):
        return team["obs"].mean(team.batch_dims - 1).sum(-1, keepdim=True)

    network = TensorDictModule(team_value, ["team"], ["state_value"])
    data = rollout((2, 5))
    for entries in (data, data["next"]):
        entries["team"] = TensorDict({"obs": torch.randn(2, 5, 4, 3, dtype=torch.float64)}, [2, 5, 4])
    found = estimator(name, value_network=network)(data.clone())
    wanted = estimator(name, value_network=network, deactivate_vmap=True)(data.clone())
    assert_close(found["value_target"], wanted["value_target"])


@every_estimator
def test_what_the_network_writes_below_an_entry_that_it_reads_stays_out_of_the_data(name):
    def team_value(team):
        mean = team["obs"].mean(-2)
        return mean, mean.sum(-1, keepdim=True)

    network = TensorDictModule(team_value, ["team"], [("team", "mean"), "state_value"])
    data = rollout((2, 5))
    for entries in (data, data["next"]):
        entries["team"] = TensorDict({"obs": torch.randn(2, 5, 4, 3, dtype=torch.float64)}, [2, 5])
    estimator(name, value_network=network, deactivate_vmap=True)(data)
    for entries in (data, data["next"]):
        assert set(entries["team"].keys()) == {"obs"}


class Baseline(TensorDictModuleBase):
    """The same value everywhere."""

    in_keys, out_keys = (), ("state_value",)

    def forward(self, tensordict):
        return tensordict.set("state_value", torch.full((*tensordict.shape, 1), 2.0, dtype=torch.float64))


@every_estimator
def test_a_network_may_read_nothing(name):
    td = estimator(name, value_network=Baseline())(rollout((2, 5)))
    assert (td["state_value"] == 2).all()
    assert (td["next", "state_value"] == 2).all()


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3, dtype=torch.float64)

    def forward(self, obs):
        return self.norm(obs.flatten(0, -2)).view(obs.shape).sum(-1, keepdim=True)


@every_estimator
def test_a_network_that_keeps_statistics_is_called_in_turn_while_it_trains(name):
    network = TensorDictModule(Normalised(), ["obs"], ["state_value"])
    data = rollout((2, 5))
    found = estimator(name, value_network=network)(data.clone())
    wanted = estimator(name, value_network=network, deactivate_vmap=True)(data.clone())
    assert_close(found["value_target"], wanted["value_target"])
    network.eval()
    estimator(name, value_network=network)(data.clone())  # one call, under vmap


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer = kind(3, 1, batch_first=True, dtype=torch.float64)

    def forward(self, obs):
        return self.layer(obs)[0]


@every_estimator
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_a_recurrent_network_is_called_in_turn(name, kind):
    network = TensorDictModule(Recurrent(kind), ["obs"], ["state_value"])
    data = rollout((2, 5))
    found = estimator(name, value_network=network)(data.clone())
    wanted = estimator(name, value_network=network, deactivate_vmap=True)(data.clone())
    assert_close(found["value_target"], wanted["value_target"])


def with_tasks(tasks):
    data = rollout((2, 5))
    for entries in (data, data["next"]):
        entries["task"] = tasks
    return data


def test_an_input_that_is_no_tensor_is_in_a_shifted_call_too():
    scaled = TensorDictModule(
        lambda obs, task: obs.sum(-1, keepdim=True) * (2 if task == "double" else 1), ["obs", "task"], ["state_value"]
    )
    data = with_tasks(NonTensorData("double", batch_size=[2, 5]))
    doubled = TensorDictModule(lambda obs: obs.sum(-1, keepdim=True) * 2, ["obs"], ["state_value"])
    found, wanted = (estimator("GAE", value_network=x, shifted=True)(data.clone()) for x in (scaled, doubled))
    assert_close(found["value_target"], wanted["value_target"])
    each = with_tasks(NonTensorStack(*[NonTensorStack(*"abcde") for _ in range(2)]))
    with pytest.raises(RuntimeError, match="can't move 'task' from step to step"):
        estimator("GAE", value_network=scaled, shifted=True)(each)
