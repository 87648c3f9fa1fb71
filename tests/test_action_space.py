"""An action space says which values belong to an action, and refuses actions that aren't written that way."""

import pytest
import torch
from fusedrl.losses.action_space import ActionSpace, find_action_space
from torch import nn

Q = torch.tensor([[1.0, -2.0, 3.0, 0.5, 4.0], [0.0, 5.0, -1.0, 2.0, 1.0]])
MULTI = ActionSpace("mult_one_hot", (2, 3))


@pytest.mark.parametrize(
    ("space", "action", "value"),
    [
        (ActionSpace("one_hot"), [[0, 0, 1, 0, 0], [1, 0, 0, 0, 0]], [3.0, 0.0]),
        (ActionSpace("categorical"), [2, 0], [3.0, 0.0]),
        (ActionSpace("categorical"), [[2], [0]], [3.0, 0.0]),
        (MULTI, [[1, 0, 0, 1, 0], [0, 1, 0, 0, 1]], [1.5, 6.0]),
        (ActionSpace("binary"), [[1, 1, 0, 0, 1], [0, 0, 0, 0, 0]], [3.0, 0.0]),
    ],
)
def test_value_of_an_action(space, action, value):
    # Indices are integers; what says yes or no may be of any dtype.
    dtypes = (torch.int64, torch.uint8) if space.name == "categorical" else (torch.int64, torch.bool, torch.float32)
    for dtype in dtypes:
        assert space.value(Q, torch.tensor(action).to(dtype)).tolist() == value


@pytest.mark.parametrize(
    ("space", "alone", "chosen_by_the_negative"),
    [
        (ActionSpace("one_hot"), [4.0, 5.0], [-2.0, -1.0]),
        (ActionSpace("categorical"), [4.0, 5.0], [-2.0, -1.0]),
        (MULTI, [1 + 4.0, 5 + 2.0], [-2 + 0.5, 0 - 1.0]),
        (ActionSpace("binary"), [8.5, 8.0], [-2.0, -1.0]),
    ],
)
def test_greedy_value_is_that_of_the_action_which_another_network_may_choose(space, alone, chosen_by_the_negative):
    assert space.greedy_value(Q).tolist() == alone
    assert space.greedy_value(Q, -Q).tolist() == chosen_by_the_negative


def test_value_of_an_action_that_is_not_taken_is_never_read():
    q = torch.tensor([[float("nan"), 1.0, float("-inf")]], requires_grad=True)
    value = ActionSpace("one_hot").value(q, torch.tensor([[0, 1, 0]]))
    assert value.item() == 1
    (grad,) = torch.autograd.grad(value.sum(), q)
    assert grad.tolist() == [[0, 1, 0]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool])
def test_one_hot_action_has_an_index(dtype):
    action = torch.eye(5)[[3, 0]].to(dtype)
    assert ActionSpace("one_hot").index(Q, action).tolist() == [3, 0]


def test_action_of_several_choices_has_no_index():
    with pytest.raises(ValueError, match=r"mult_one_hot.*no index"):
        MULTI.index(Q, Q > 0)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("one_hot", (2,)), ("one_hot", (2, 4)), ("one_hot", (1, 5)), ("binary", (5,)), ("categorical", (2, 2)),
     ("categorical", (1,)), ("categorical", ()), ("categorical", (1, 2))],
)  # fmt: skip
def test_action_of_another_shape_is_refused(name, shape):
    with pytest.raises(RuntimeError, match=f"{name}.*{tuple(shape)}".replace("(", r"\(").replace(")", r"\)")):
        ActionSpace(name).value(Q, torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("name", ["one_hot", "one-hot", "binary", "categorical"])
def test_name_is_taken_with_hyphens_and_underscores(name):
    assert find_action_space(name) == ActionSpace(name.replace("-", "_"))


class TaggedNetwork(nn.Module):
    def __init__(self, **tags):
        super().__init__()
        vars(self).update(tags)


def test_network_says_the_action_space_and_the_argument_goes_first():
    network = nn.Sequential(nn.Linear(1, 1), TaggedNetwork(action_space="one_hot"))
    assert find_action_space(None, network) == ActionSpace("one_hot")
    assert find_action_space("categorical", network) == ActionSpace("categorical")


@pytest.mark.parametrize("name", ["mult-one-hot", "multi_one_hot", "mult_one_hot"])
def test_network_says_how_many_actions_each_head_has(name):
    assert find_action_space(name, TaggedNetwork(var_nums=[2, 3])) == MULTI
    with pytest.raises(ValueError, match="how many actions each head"):
        find_action_space(name, TaggedNetwork(var_nums=None))


@pytest.mark.parametrize("space", ["discrete", "onehot", 3, nn.Identity()])
def test_unknown_action_space_is_refused(space):
    with pytest.raises(ValueError, match=r"action_space is .*'one-hot'"):
        find_action_space(space)


def test_missing_action_space_is_refused():
    with pytest.raises(ValueError, match="not given, and the network doesn't say"):
        find_action_space(None, nn.Linear(1, 1))
