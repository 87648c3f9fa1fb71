"""What all losses that fit networks to recorded data promise about reading, padding, reduction and keyword calls."""

import pytest
import torch
from helpers_imitation import CASES
from helpers_q import CLOSE, assert_padding_is_ignored, run
from torch import nn

# Their noise is drawn anew for other numbers of steps.
RANDOM = {"DiffusionBCLoss"}

every_loss = pytest.mark.parametrize("name", [name for name in CASES if name != "QMixerLoss"])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@every_loss
def test_padding_reaches_neither_the_loss_nor_its_gradients(name):
    case = CASES[name]
    assert_padding_is_ignored(case.make(), case.data().detach(), random=name in RANDOM)


@every_loss
def test_padding_everywhere_is_a_loss_of_zero(name):
    case = CASES[name]
    data = case.data()
    data["collector", "mask"] = torch.zeros(data.shape, dtype=torch.bool)
    out = case.make()(data)
    assert all(out[key] == 0 for key in out.keys() if key.startswith("loss"))  # noqa: SIM118  # a TensorDict is no dict


@every_loss
def test_the_input_is_left_as_it_is(name):
    case = CASES[name]
    data = case.data()
    before = data.clone()
    case.make()(data.lock_())
    assert set(data.keys(True, True)) == set(before.keys(True, True))
    assert (data == before).all()


@every_loss
def test_the_sum_and_the_mean_are_those_of_the_loss_per_sample(name):
    case = CASES[name]
    loss, data = case.make(), case.data()
    found = {}
    for loss.reduction in ("none", "sum", "mean"):
        found[loss.reduction] = run(loss, data)[0]
    for key in (key for key in found["none"].keys() if key.startswith("loss")):  # noqa: SIM118
        assert found["none"][key].shape[: data.ndim] == data.shape
        torch.testing.assert_close(found["none"][key].sum(), found["sum"][key], **CLOSE)
        torch.testing.assert_close(found["none"][key].mean(), found["mean"][key], **CLOSE)


@every_loss
def test_tensors_can_be_passed_instead_of_a_tensordict(name):
    case = CASES[name]
    loss, data = case.make(), case.data()
    wanted, _ = run(loss, data)
    key = next(iter(wanted.keys()))
    loss.select_out_keys(key)
    tensors = {k if isinstance(k, str) else "_".join(k): x for k, x in data.items(True, True)}
    torch.manual_seed(1)
    found = loss(**{k: x for k, x in tensors.items() if k in {_flat(key) for key in loss.in_keys}})
    torch.testing.assert_close(found, wanted[key])


def _flat(key):
    return key if isinstance(key, str) else "_".join(key)


@every_loss
def test_a_network_of_another_dtype_works_on_its_own_data(name):
    case = CASES[name]
    loss, data = case.make().to(torch.float32), case.data()
    data = data.detach().apply(lambda x: x.float() if x.is_floating_point() else x)
    out = loss(data)
    assert all(out[key].dtype == torch.float32 for key in out.keys())  # noqa: SIM118  # a TensorDict is no dict


def test_a_renamed_entry_is_read_by_its_new_name():
    case = CASES["DTLoss"]
    loss, data = case.make(), case.data()
    wanted = loss(data)["loss"]
    data["expert", "move"] = data.pop("action")
    loss.set_keys(action_target=("expert", "move"))
    assert torch.equal(loss(data)["loss"], wanted)


def test_a_prediction_that_the_network_does_not_write_is_not_taken_from_the_data():
    from fusedrl.losses.behaviour_cloning import BCLoss
    from tensordict.nn import TensorDictModule

    network = TensorDictModule(nn.Linear(4, 2, dtype=torch.float64), ["observation"], ["move"])
    loss, data = BCLoss(network), CASES["BCLoss"].data()
    with pytest.raises(KeyError, match=r"actor_network doesn't write 'action' but \['move'\].*set_keys\(action="):
        loss(data)
