"""The small functions that losses share."""

import re

import pytest
import torch
from fusedrl import losses
from fusedrl.losses.reduction import align, reduce_loss
from fusedrl.losses.utils import check_distance
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

# --- distances --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"), [("l1", [0.0, 0.5, 3.0]), ("l2", [0.0, 0.25, 9.0]), ("smooth_l1", [0.0, 0.125, 2.5])]
)
def test_distance_is_taken_element_by_element(name, expected):
    distance = losses.distance_loss(torch.tensor([0.0, -0.5, 3.0]), torch.zeros(3), name)
    assert distance.tolist() == expected


def test_distance_of_tensordicts_is_taken_entry_by_entry():
    a, b = TensorDict(x=torch.ones(2), y=torch.zeros(2)), TensorDict(x=torch.zeros(2), y=torch.zeros(2))
    distance = losses.distance_loss(a, b, "l2")
    assert distance["x"].tolist() == [1, 1]
    assert distance["y"].tolist() == [0, 0]


def test_distance_refuses_to_broadcast_unless_told():
    a, b = torch.zeros(2, 1), torch.ones(3)
    with pytest.raises(RuntimeError, match=r"\(2, 1\) and \(3,\)"):
        losses.distance_loss(a, b, "l2")
    assert losses.distance_loss(a, b, "l2", strict_shape=False).shape == (2, 3)


def test_unknown_distance_is_named():
    with pytest.raises(ValueError, match="'foo'"):
        losses.distance_loss(torch.zeros(1), torch.zeros(1), "foo")
    with pytest.raises(ValueError, match="loss_critic_type is 'foo'"):
        check_distance("foo", "loss_critic_type")


# --- holding out ------------------------------------------------------------------------------------------------


def test_held_out_network_requires_no_grad_and_then_what_it_did():
    net = nn.Linear(2, 1)
    net.bias.requires_grad_(False)
    with losses.hold_out_net(net):
        assert not any(p.requires_grad for p in net.parameters())
    assert net.weight.requires_grad
    assert not net.bias.requires_grad


def test_a_network_can_be_held_out_again_and_inside_of_itself():
    net = nn.Linear(2, 1)
    held_out = losses.hold_out_net(net)
    for _ in range(2):
        with held_out:
            with held_out:
                assert not net.weight.requires_grad
            assert not net.weight.requires_grad
        assert net.weight.requires_grad


def test_held_out_parameters_are_detached():
    p = torch.ones(2, requires_grad=True)
    held_out = losses.hold_out_params([p])
    for _ in range(2):
        with held_out as (held,):
            assert not held.requires_grad
            assert held.data_ptr() == p.data_ptr()
    assert p.requires_grad


def test_parameters_in_a_tensordict_are_held_out_under_their_names():
    params = TensorDict.from_module(nn.Sequential(nn.Linear(2, 1)))
    with losses.hold_out_params(params) as held:
        assert set(held.keys(True, True)) == set(params.keys(True, True))
        assert not any(p.requires_grad for p in held.values(True, True))
    assert all(p.requires_grad for p in params.values(True, True))


# --- next_state_value -------------------------------------------------------------------------------------------


@pytest.fixture
def data():
    torch.manual_seed(0)
    following = {
        "observation": torch.randn(5, 3),
        "reward": torch.randn(5, 1),
        "done": torch.tensor([[False], [True], [True], [False], [False]]),
        "terminated": torch.tensor([[False], [True], [False], [False], [False]]),
    }
    return TensorDict({"next": following}, [5])


def test_next_state_value_is_the_one_step_target(data):
    value = torch.randn(5, 1)
    expected = data["next", "reward"] + 0.9 * value * ~data["next", "terminated"]
    for shaped in (value, value.squeeze(-1)):
        torch.testing.assert_close(losses.next_state_value(data, gamma=0.9, pred_next_val=shaped), expected.squeeze(-1))


def test_next_state_value_asks_the_operator_without_touching_the_data(data):
    operator = TensorDictModule(nn.Linear(3, 1), ["observation"], ["v"])
    before = set(data.keys(True, True))
    result = losses.next_state_value(data, operator, "v")
    expected = losses.next_state_value(data, pred_next_val=operator.module(data["next", "observation"]))
    torch.testing.assert_close(result, expected)
    assert not result.requires_grad
    assert set(data.keys(True, True)) == before


def test_next_state_value_discounts_n_steps(data):
    value = torch.ones(5, 1)
    data["steps_to_next_obs"] = torch.tensor([[1], [1], [2], [3], [1]])
    result = losses.next_state_value(data, gamma=0.5, pred_next_val=value)
    expected = data["next", "reward"].squeeze(-1) + torch.tensor([0.5, 0.0, 0.25, 0.125, 0.5])
    torch.testing.assert_close(result, expected)
    assert result.dtype == torch.float32
    steps = data["steps_to_next_obs"]
    data = data.apply(lambda x: x.double() if x.is_floating_point() else x)
    precise = losses.next_state_value(data, gamma=0.9, pred_next_val=value.double())
    of_last = 0.9 ** steps.double() * ~data["next", "terminated"]
    torch.testing.assert_close(precise, (data["next", "reward"] + of_last).squeeze(-1), rtol=1e-15, atol=1e-15)


def test_next_value_of_a_terminal_step_is_never_read(data):
    value = torch.ones(5, 1)
    value[1] = torch.nan
    assert losses.next_state_value(data, pred_next_val=value).isfinite().all()


def test_done_stands_in_for_terminated(data):
    del data["next", "terminated"]
    result = losses.next_state_value(data, gamma=0.5, pred_next_val=torch.ones(5, 1))
    assert (result - data["next", "reward"].squeeze(-1)).round(decimals=5).tolist() == [0.5, 0, 0, 0.5, 0.5]


def test_next_state_value_needs_one_source(data):
    with pytest.raises(ValueError, match="either operator or pred_next_val"):
        losses.next_state_value(data)


# --- optimizers -------------------------------------------------------------------------------------------------


def test_grouped_optimizers_step_together():
    nets = [nn.Linear(1, 1, bias=False) for _ in range(2)]
    optimizers = [torch.optim.SGD(net.parameters(), lr=lr) for net, lr in zip(nets, (0.25, 0.5), strict=True)]
    before = [net.weight.item() for net in nets]
    group = losses.group_optimizers(*optimizers)
    sum(net.weight.sum() for net in nets).backward()
    group.step()
    after = [net.weight.item() for net in nets]
    assert [round(a - b, 5) for a, b in zip(before, after, strict=True)] == [0.25, 0.5]


def test_grouped_optimizers_keep_their_state():
    net = nn.Linear(1, 1)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1)).sum().backward()
    optimizer.step()
    assert losses.group_optimizers(None, optimizer).state[net.weight]["step"] == 1


def test_optimizers_of_different_classes_are_not_grouped():
    p = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="Adam, SGD"):
        losses.group_optimizers(torch.optim.SGD([p]), torch.optim.Adam([p]))
    with pytest.raises(ValueError, match="none"):
        losses.group_optimizers()


# --- reduction --------------------------------------------------------------------------------------------------


def test_weighted_mean_is_divided_by_the_weights_that_count():
    loss, weights = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 3.0, 100.0])
    mask = torch.tensor([True, True, False])
    assert reduce_loss(loss, "mean", mask, weights) == 7 / 4
    assert reduce_loss(loss, "sum", mask, weights) == 7
    assert reduce_loss(loss, "none", mask, weights).tolist() == [1, 6, 0]


def test_what_is_masked_gets_no_gradient():
    loss = torch.tensor([1.0, torch.nan], requires_grad=True)
    reduce_loss(loss, "mean", torch.tensor([True, False])).backward()
    assert loss.grad.tolist() == [1, 0]


def test_a_weight_that_is_masked_may_be_nan():
    loss = torch.tensor([1.0, 2.0], requires_grad=True)
    reduce_loss(loss, "mean", torch.tensor([True, False]), torch.tensor([2.0, torch.nan])).backward()
    assert loss.grad.tolist() == [1, 0]


@pytest.mark.parametrize("shape", [(2,), (2, 1), (2, 3)])
def test_one_value_per_sample_is_spread_over_features(shape):
    x = torch.arange(2.0).reshape(2, *(1,) * (len(shape) - 1)).expand(shape)
    assert align(x, torch.zeros(2, 3), "x").tolist() == [[0, 0, 0], [1, 1, 1]]
    if shape != (2, 3):
        assert align(x, torch.zeros(2), "x").tolist() == [0, 1]


@pytest.mark.parametrize("shape", [(3,), (2, 2), (2, 3, 2)])
def test_values_that_are_not_one_per_sample_are_refused(shape):
    with pytest.raises(RuntimeError, match="the mask has shape"):
        align(torch.zeros(shape), torch.zeros(2, 3), "the mask")


# --- re-exports -------------------------------------------------------------------------------------------------


def test_everything_public_is_there():
    for name in losses.__all__:
        assert getattr(losses, name) is not None


@pytest.mark.parametrize("wrong", [("next", "terminated"), "steps_to_next_obs", "the next value"], ids=str)
def test_next_state_value_refuses_what_is_not_one_per_sample(data, wrong):
    value = torch.ones(5, 1)
    other = torch.ones(1, 5)
    if wrong != "the next value":
        data.batch_size = data["next"].batch_size = []
        data.set(wrong, other)
    with pytest.raises(RuntimeError, match=re.escape(f"{wrong} has shape (1, 5)")):
        losses.next_state_value(data, pred_next_val=other if wrong == "the next value" else value)


@pytest.mark.parametrize("absent", ["reward", "done"])
def test_next_state_value_names_what_is_missing(data, absent):
    for key in [absent] if absent == "reward" else ["done", "terminated"]:
        data["next"].pop(key, None)
    with pytest.raises(KeyError, match=absent):
        losses.next_state_value(data, pred_next_val=torch.ones(5, 1))
