"""The base of the losses with Q networks, through the plainest of them: fitted Q evaluation with an ensemble."""

from dataclasses import dataclass

import pytest
import torch
from fusedrl.losses.action_value import ActionValueLoss
from helpers_q import (
    CLOSE,
    StateAction,
    assert_compiles,
    assert_no_host_sync,
    assert_padding_is_ignored,
    assert_rejected,
    assert_terminal_observations_are_ignored,
    deterministic_actor,
    gradients,
    poisoned,
    qvalue_network,
    run,
    transitions,
)
from tensordict import NestedKey, TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential, dispatch
from torch import nn


class FittedQ(ActionValueLoss):
    """Every member of the ensemble moves towards the least value of the target ensemble."""

    @dataclass
    class _AcceptedKeys:
        action: NestedKey = "action"
        state_action_value: NestedKey = "state_action_value"
        priority: NestedKey = "td_error"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        priority_weight: NestedKey = "priority_weight"

    def __init__(
        self, actor, qvalue, members=3, deactivate_vmap=False, delay=True, reduction=None, compare_against=None
    ):
        super().__init__(reduction)
        self.deactivate_vmap = deactivate_vmap
        self.convert_to_functional(actor, "actor_network", create_target_params=delay)
        self.convert_to_functional(
            qvalue, "qvalue_network", expand_dim=members, create_target_params=delay, compare_against=compare_against
        )
        self.out_keys = ["loss_qvalue"]

    @dispatch
    def forward(self, tensordict):
        data, following = self._transitions(tensordict, ["qvalue_network"], ["actor_network", "qvalue_network"])
        with torch.no_grad():
            with self._parameters_in("actor_network", target=True):
                following = self.actor_network(following)
            next_value = self._values(tensordict, following, target=True).min(0).values
        error = self._values(tensordict, data) - self._value_target(tensordict, next_value)
        out = TensorDict({"loss_qvalue": self._reduce_loss(error.square().sum(0), tensordict)})
        self._write_priority(tensordict, error.abs().amax(0))
        return out

    def _values(self, tensordict, data, *, target=False):
        key = self.tensor_keys.state_action_value
        return self._one_per_sample(self._ensemble("qvalue_network", data, key, target=target), key, tensordict)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(**options):
    return FittedQ(deterministic_actor(), qvalue_network(), **options)


def assert_same(a, b, data):
    (out_a, seen_a), (out_b, seen_b) = run(a, data), run(b, data)
    torch.testing.assert_close(out_a.to_dict(), out_b.to_dict(), **CLOSE)
    torch.testing.assert_close(gradients(a, out_a), gradients(b, out_b), **CLOSE)
    torch.testing.assert_close(seen_a["td_error"], seen_b["td_error"], **CLOSE)


def test_the_loss_is_the_equation():
    loss, data = make(), transitions(batch=(6,))
    loss.make_value_estimator("TD0", gamma=0.5)
    network, actor = loss.qvalue_network, loss.actor_network
    following, values, next_values = data["next"].clone(), [], []
    with loss.target_actor_network_params.to_module(actor):
        following = actor(following)
    for params, target in zip(
        loss.qvalue_network_params.unbind(0), loss.target_qvalue_network_params.unbind(0), strict=True
    ):
        with params.to_module(network):
            values.append(network(data.clone())["state_action_value"].squeeze(-1))
        with target.to_module(network):
            next_values.append(network(following.clone())["state_action_value"].squeeze(-1))
    next_value = torch.stack(next_values).min(0).values.masked_fill(data["next", "terminated"].squeeze(-1), 0)
    wanted = sum((v - data["next", "reward"].squeeze(-1) - 0.5 * next_value).square() for v in values).mean()
    torch.testing.assert_close(loss(data)["loss_qvalue"], wanted, **CLOSE)


@pytest.mark.parametrize("members", [3, 6])
def test_an_ensemble_called_in_turn_gives_the_numbers_of_the_batched_one(members):
    batched = make(members=members)
    in_turn = make(members=members, deactivate_vmap=True)
    in_turn.load_state_dict(batched.state_dict())
    assert_same(batched, in_turn, transitions())


@pytest.mark.parametrize(("members", "calls_for_each"), [(3, 3), (4, 4), (5, 1), (9, 1)])
def test_a_large_ensemble_is_called_once_and_a_few_members_in_turn(members, calls_for_each):
    calls = []
    network = qvalue_network()
    network.module.register_forward_hook(lambda *_: calls.append(1))
    loss = FittedQ(deterministic_actor(), network, members=members)
    loss(transitions())
    assert len(calls) == 2 * calls_for_each  # observations, next observations


def test_the_state_of_an_ensemble_that_shares_a_trunk_is_loaded():
    def shares_its_trunk():
        trunk = TensorDictModule(nn.Linear(4, 4, dtype=torch.float64), ["observation"], ["hidden"])
        actor, head = deterministic_actor(), qvalue_network()
        actor.in_keys, head.in_keys = ["hidden"], ["hidden", "action"]
        actor, qvalue = TensorDictSequential(trunk, actor), TensorDictSequential(trunk, head)
        return FittedQ(actor, qvalue, compare_against=list(actor.parameters()))

    saved, loss = shares_its_trunk(), shares_its_trunk()
    loss.load_state_dict(saved.state_dict())
    assert_same(saved, loss, transitions())
    key = ("module", "0", "module", "weight")
    trained, seen = loss.actor_network_params[key], loss.qvalue_network_params[key]
    assert torch.equal(trained, saved.actor_network_params[key])
    with torch.no_grad():
        trained.add_(1)
    assert all(torch.equal(member, trained) for member in seen)


class Branching(nn.Module):
    """Reads a number on the host, which torch.vmap refuses."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 1, dtype=torch.float64)

    def forward(self, observation, action):
        x = self.linear(torch.cat([observation, action], -1))
        return x * 2 if x.sum().item() > 0 else x


def test_networks_that_refuse_vmap_work_without_it():
    network = TensorDictModule(Branching(), ["observation", "action"], ["state_action_value"])
    with pytest.raises(RuntimeError, match="vmap"):
        FittedQ(deterministic_actor(), network, members=6)(transitions())
    out, _ = run(FittedQ(deterministic_actor(), network, members=6, deactivate_vmap=True), transitions())
    assert out["loss_qvalue"].isfinite()


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.memory = nn.GRU(6, 1, dtype=torch.float64)

    def forward(self, observation, action):
        return self.memory(torch.cat([observation, action], -1))[0]


def test_many_recurrent_networks_are_called_in_turn():
    network = TensorDictModule(Recurrent(), ["observation", "action"], ["state_action_value"])
    loss, data = FittedQ(deterministic_actor(), network, members=6), transitions()
    found = loss(data)["loss_qvalue"]
    loss.deactivate_vmap = True
    torch.testing.assert_close(loss(data)["loss_qvalue"], found, **CLOSE)


def test_members_start_from_different_parameters():
    weights = make().qvalue_network_params["module", "layers", "0", "weight"]
    assert not torch.equal(weights[0], weights[1])


def test_nothing_after_a_terminal_step_matters():
    assert_terminal_observations_are_ignored(make(), transitions())


def test_a_step_that_terminates_without_being_done_has_no_next_value():
    data = transitions()
    data["next", "done"] = torch.zeros_like(data["next", "done"])
    assert_terminal_observations_are_ignored(make(), data)


def test_done_stands_in_for_a_missing_terminated():
    data = transitions()
    wanted = data.clone()
    wanted["next", "terminated"] = wanted["next", "done"]
    del data["next", "terminated"]
    loss = make()
    assert torch.equal(loss(data)["loss_qvalue"], loss(wanted)["loss_qvalue"])


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_masks_of_numbers_and_integer_rewards_are_understood(dtype):
    data = transitions()
    data["next", "reward"] = data["next", "reward"].round()
    numbers = data.clone()
    numbers["next", "reward"] = numbers["next", "reward"].long()
    for key in ("done", "terminated"):
        numbers["next", key] = numbers["next", key].to(dtype)
    loss = make()
    assert torch.equal(loss(numbers)["loss_qvalue"], loss(data)["loss_qvalue"])


def test_padding_does_not_count():
    assert_padding_is_ignored(make(), transitions())


def test_padding_has_no_priority():
    data = transitions()
    data["collector", "mask"] = mask = torch.rand(data.shape) < 0.5
    make()(data)
    assert torch.equal(data["td_error"] > 0, mask)


class Mixing(nn.Module):
    """Q of a sample depends on all samples."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 1, dtype=torch.float64)

    def forward(self, observation, action):
        x = torch.cat([observation, action], -1)
        return self.linear(x - x.mean(0))


def test_what_follows_a_terminal_step_reaches_no_other_sample():
    loss = FittedQ(deterministic_actor(), TensorDictModule(Mixing(), ["observation", "action"], ["state_action_value"]))
    out, _ = run(loss, poisoned(transitions()))
    assert out["loss_qvalue"].isfinite()


@pytest.mark.parametrize("features", [(), (1,), (5,), (5, 2), (5, 5, 2)], ids=str)
def test_inputs_of_any_shape_are_made_finite_where_they_do_not_count(features):
    data = transitions()  # batch size [3, 5]: features that broadcast against it by accident show
    valid = data["collector", "mask"] = torch.rand(data.shape) < 0.7
    terminal = data["next", "terminated"].squeeze(-1)
    assert terminal.any()
    clean = {}
    for prefix, ignored in (((), ~valid), (("next",), ~valid | terminal)):
        x = torch.randn(*data.shape, *features)
        key = (*prefix, "observation")
        data[key] = x.clone()
        data[key][ignored] = torch.nan
        clean[key] = torch.where(ignored.view(*ignored.shape, *(1 for _ in features)), 0, x)
    found = make()._transitions(data, ["qvalue_network"], ["actor_network", "qvalue_network"])
    for part, wanted in zip(found, clean.values(), strict=True):
        assert torch.equal(part["observation"], wanted)


@pytest.mark.parametrize("stale", [torch.zeros(3, 5, 1), torch.zeros(3, 5).long(), torch.zeros(1).expand(3, 5)])
def test_a_stale_priority_of_any_form_is_replaced(stale):
    data, loss = transitions(), make()
    wanted = run(loss, data)[1]["td_error"]
    data["td_error"] = stale
    loss(data)
    assert torch.equal(data["td_error"], wanted)


def test_nan_weights_of_padding_reach_no_gradient():
    data, loss = transitions(), make()
    data["collector", "mask"] = mask = torch.rand(data.shape) < 0.5
    data["priority_weight"] = torch.where(mask, 1.0, torch.nan)
    out, _ = run(loss, data)
    assert all(gradient.isfinite().all() for gradient in gradients(loss, out)["loss_qvalue"].values())


def test_in_keys_are_the_entries_that_are_read():
    data, loss = transitions(), make()
    assert ("next", "action") not in loss.in_keys
    assert torch.equal(loss(data.select(*loss.in_keys))["loss_qvalue"], loss(data)["loss_qvalue"])


@pytest.mark.parametrize("estimator", ["TD0", "TDLambda"])
def test_a_mask_of_another_name_also_ends_the_trajectories_of_the_estimator(estimator):
    data = transitions()
    mask = torch.ones(data.shape, dtype=torch.bool)
    mask[:, 3:] = False
    loss, known = make().make_value_estimator(estimator), data.clone()
    known["collector", "mask"], data["mine"] = mask, mask
    wanted = loss(known)["loss_qvalue"]
    loss.loss_mask_key = "mine"
    data["next", "reward"][:, 3:] = torch.nan
    torch.testing.assert_close(loss(data)["loss_qvalue"], wanted)


def test_n_step_transitions_are_discounted_by_their_length():
    data = transitions(batch=(6,))
    loss = make().make_value_estimator("TD0", gamma=0.5)
    data["steps_to_next_obs"] = torch.full((6, 1), 3)
    other = make().make_value_estimator("TD0", gamma=0.125)
    other.load_state_dict({k: v for k, v in loss.state_dict().items() if "gamma" not in k}, strict=False)
    torch.testing.assert_close(loss(data)["loss_qvalue"], other(data.exclude("steps_to_next_obs"))["loss_qvalue"])


@pytest.mark.parametrize("estimator", ["TD0", "TD1", "TDLambda"])
def test_every_estimator_takes_the_next_values_of_the_loss(estimator):
    loss, data = make().make_value_estimator(estimator), transitions()
    out, _ = run(loss, data)
    constant = data.clone()
    constant["next", "state_value"] = torch.full_like(data["next", "reward"], 1e6)  # of no loss's concern
    assert torch.equal(run(loss, constant)[0]["loss_qvalue"], out["loss_qvalue"])


def test_priority_weights_weigh_the_samples():
    data, loss = transitions(batch=(6,)), make()
    data["priority_weight"] = torch.tensor([1.0, 0, 0, 0, 0, 0]).double()
    assert torch.allclose(loss(data)["loss_qvalue"], loss(data[:1])["loss_qvalue"])


@pytest.mark.parametrize("batch", [(1,), (4, 1)])
def test_an_unreduced_loss_keeps_a_batch_dimension_of_one(batch):
    assert make(reduction="none")(transitions(batch))["loss_qvalue"].shape == batch


def test_an_existing_priority_is_written_in_place():
    data, loss = transitions(), make()
    data["td_error"] = stored = torch.zeros(data.shape, dtype=torch.float64)
    loss(data.lock_())
    assert (stored > 0).all()


@pytest.mark.parametrize(
    ("key", "rename"),
    [
        ("action", "qvalue_network"),
        (("next", "observation"), "actor_network"),
        (("next", "reward"), r"set_keys\(reward="),
        (("next", "done"), r"set_keys\(done="),
    ],
)
def test_a_missing_entry_is_named(key, rename):
    data = transitions()
    data = data.exclude(key, *([("next", "terminated")] if "done" in key else []))
    assert_rejected(make(), data, KeyError, rename)


def test_values_that_would_broadcast_are_refused():
    data = transitions()
    data["next", "reward"] = data["next", "reward"].expand(*data.shape, 3)
    assert_rejected(make(), data, RuntimeError, r"'state_action_value'.*\('next', 'reward'\)")


def test_a_network_that_writes_another_value_is_told_so():
    network = TensorDictModule(qvalue_network().module, ["observation", "action"], ["q"])
    loss = FittedQ(deterministic_actor(), network)
    assert_rejected(loss, transitions(), KeyError, "'state_action_value'.*'q'.*set_keys")
    loss.set_keys(state_action_value="q")
    assert loss(transitions())["loss_qvalue"].isfinite()


def test_compiled_is_eager():
    assert_compiles(make, transitions())


@pytest.mark.parametrize("estimator", ["TD0", "TDLambda"])
def test_nothing_waits_for_the_device(estimator, monkeypatch):
    loss = make().make_value_estimator(estimator)
    data = transitions()
    data["collector", "mask"] = torch.rand(data.shape) < 0.8
    assert_no_host_sync(loss, data, monkeypatch)


def test_tensors_can_be_passed_instead_of_a_tensordict():
    data, loss = transitions(), make()
    tensors = {k if isinstance(k, str) else "_".join(k): v for k, v in data.items(True, True)}
    assert torch.equal(loss(**tensors), loss(data)["loss_qvalue"])


def test_a_next_observation_that_is_lacking_where_it_is_read_shows():
    data = transitions()
    data["next", "observation"][~data["next", "done"].squeeze(-1)] = torch.nan
    assert run(make(), data)[0]["loss_qvalue"].isnan()


class ActsOnNested(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, seen):
        return self.layers(seen["observation"])


def test_what_follows_a_terminal_step_is_made_finite_in_an_entry_of_several_too():
    actor = TensorDictModule(ActsOnNested(deterministic_actor().module), ["seen"], ["action"])
    data = transitions()
    for part in (data, data["next"]):
        part["seen"] = TensorDict({"observation": part.pop("observation")}, part.batch_size)
    data["next", "seen", "observation"][data["next", "terminated"].squeeze(-1)] = torch.nan
    _, following = FittedQ(actor, qvalue_network())._transitions(data, ["actor_network"], ["actor_network"])
    assert following["seen", "observation"].isfinite().all()


def test_what_follows_a_terminal_step_is_0_where_it_is_not_finite():
    data = transitions()
    ended = data["next", "terminated"].squeeze(-1)
    data["next", "observation"][ended] = torch.inf
    _, following = make()._transitions(data, ["qvalue_network"], ["actor_network"])
    assert (following["observation"][ended] == 0).all()


def test_few_members_draw_the_same_numbers_where_they_are_told_to():
    network = TensorDictModule(
        nn.Sequential(nn.Linear(4, 1, dtype=torch.float64), nn.Dropout()), ["observation"], ["state_action_value"]
    )
    loss, data = FittedQ(deterministic_actor(), network, members=3), transitions()
    for p in loss.qvalue_network_params.values(True, True):
        p.data[1:] = p.data[:1]
    loss.set_vmap_randomness("same")
    values = loss._values(data, data)
    assert torch.equal(values, values[:1].expand_as(values))
    loss.set_vmap_randomness("different")
    values = loss._values(data, data)
    assert not torch.equal(values, values[:1].expand_as(values))


def test_a_perceptron_that_writes_another_entry_is_named():
    network = TensorDictModule(nn.Sequential(nn.Linear(4, 1, dtype=torch.float64)), ["observation"], ["value"])
    with pytest.raises(KeyError, match="doesn't write 'state_action_value'"):
        FittedQ(deterministic_actor(), network)(transitions())


def test_a_network_that_is_its_own_target_is_a_constant_as_such():
    loss, data = make(delay=False), transitions()
    assert loss._values(data, data).requires_grad
    assert not loss._values(data, data, target=True).requires_grad


class Counting(StateAction):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, observation, action):
        self.calls = self.calls + 1
        return super().forward(observation, action)


def test_a_network_that_is_its_own_target_assigns_to_no_buffer_as_such():
    network = TensorDictModule(Counting(), ["observation", "action"], ["state_action_value"])
    loss, data = FittedQ(deterministic_actor(), network, members=None, delay=False), transitions()
    for target, calls in ((True, 0), (False, 1), (True, 1)):
        with torch.no_grad():
            loss._values(data, data, target=target)
        assert loss.qvalue_network_params["module", "calls"] == calls
