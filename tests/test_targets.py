"""Target networks move as their formula says, all tensors at once, wherever the loss keeps them; misuse is refused."""

import copy

import pytest
import torch
from fusedrl.losses import LossModule
from fusedrl.losses.targets import HardUpdate, SoftUpdate, TargetNetUpdater
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

FLOAT32 = {"rtol": 1e-6, "atol": 1e-7}  # one multiplication and one addition


class Delayed(LossModule):
    """A loss with a delayed network (or an ensemble of them) and one without a target."""

    def __init__(self, network, delay=True, members=None):
        super().__init__()
        self.convert_to_functional(network, "value_network", create_target_params=delay, expand_dim=members)
        self.convert_to_functional(nn.Linear(2, 2), "actor_network")


def mlp(layers=2):
    return nn.Sequential(*[nn.Linear(3, 3) for _ in range(layers)])


def with_statistics():
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))


@torch.no_grad()
def train(loss):
    """Change everything that a step of training changes."""
    for x in loss.value_network_params.values(True, True):
        x.data += torch.randint(1, 9, x.shape).to(x)


def tensors(params):
    return {key: x.detach().clone() for key, x in params.items(True, True)}


def both(loss):
    return tensors(loss.target_value_network_params), tensors(loss.value_network_params)


class Operators(TorchDispatchMode):
    """The names of the operators that run inside the block."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# --- how targets move ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [{"tau": 0.25}, {"eps": 0.75}], ids=str)
@pytest.mark.parametrize("members", [None, 3])
def test_a_soft_step_renews_the_share_tau_of_every_parameter(share, members):
    loss = Delayed(mlp(), members=members)
    updater = SoftUpdate(loss, **share)
    train(loss)
    before, params = both(loss)
    updater.step()
    after, unchanged = both(loss)
    expected = {key: 0.75 * before[key] + 0.25 * params[key] for key in params}
    torch.testing.assert_close(after, expected, **FLOAT32)
    torch.testing.assert_close(unchanged, params, rtol=0, atol=0)


@pytest.mark.parametrize(("tau", "name"), [(0.0, "targets"), (1.0, "parameters")])
def test_the_ends_of_the_range_of_tau_are_exact(tau, name):
    loss = Delayed(mlp())
    updater = SoftUpdate(loss, tau=tau)
    train(loss)
    targets, params = both(loss)
    updater.step()
    expected = targets if name == "targets" else params
    torch.testing.assert_close(both(loss)[0], expected, rtol=0, atol=0)


def test_averaged_statistics_follow_and_counts_are_copied():
    loss = Delayed(with_statistics())
    updater = SoftUpdate(loss, tau=0.25)
    train(loss)
    before, params = both(loss)
    updater.step()
    after, _ = both(loss)
    for name in ("running_mean", "running_var"):
        key = ("1", name)
        torch.testing.assert_close(after[key], 0.75 * before[key] + 0.25 * params[key], **FLOAT32)
    assert before["1", "num_batches_tracked"] != params["1", "num_batches_tracked"]
    assert after["1", "num_batches_tracked"] == params["1", "num_batches_tracked"]


def test_a_hard_update_leaves_the_targets_for_the_interval_and_then_copies_everything():
    loss = Delayed(with_statistics())
    updater = HardUpdate(loss, value_network_update_interval=2)
    for _ in range(2):
        train(loss)
        start, _ = both(loss)
        for count in (1, 2):
            updater.step()
            assert updater.counter == count
            torch.testing.assert_close(both(loss)[0], start, rtol=0, atol=0)
        updater.step()
        assert updater.counter == 0
        targets, params = both(loss)
        torch.testing.assert_close(targets, params, rtol=0, atol=0)


def test_an_interval_of_0_copies_in_every_step():
    loss = Delayed(mlp())
    updater = HardUpdate(loss, value_network_update_interval=0)
    for _ in range(2):
        train(loss)
        updater.step()
        torch.testing.assert_close(*both(loss), rtol=0, atol=0)


def test_targets_start_as_copies_of_what_the_parameters_are_when_the_updater_is_made():
    loss = Delayed(with_statistics())
    train(loss)
    SoftUpdate(loss, tau=0.1)
    targets, params = both(loss)
    torch.testing.assert_close(targets, params, rtol=0, atol=0)


def test_targets_get_no_gradient_and_stay_out_of_the_parameters():
    loss = Delayed(mlp())
    SoftUpdate(loss, tau=0.5).step()
    assert not any(x.requires_grad for x in loss.target_value_network_params.values(True, True))
    assert all(x.requires_grad for x in loss.value_network_params.values(True, True))


def test_targets_of_shared_parameters_follow_the_network_that_trains_them():
    class Shared(LossModule):
        def __init__(self, trunk):
            super().__init__()
            self.convert_to_functional(trunk, "actor_network")
            self.convert_to_functional(
                nn.Sequential(trunk, nn.Linear(3, 1)),
                "value_network",
                create_target_params=True,
                compare_against=trunk.parameters(),
            )

    trunk = nn.Linear(3, 3)
    loss = Shared(trunk)
    updater = HardUpdate(loss, value_network_update_interval=0)
    with torch.no_grad():
        trunk.weight += 1
    updater.step()
    torch.testing.assert_close(loss.target_value_network_params["0", "weight"], trunk.weight.data, rtol=0, atol=0)


def test_networks_of_several_dtypes_move_together():
    loss = Delayed(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).double(), nn.Linear(3, 3).bfloat16()))
    updater = SoftUpdate(loss, tau=0.5)
    train(loss)
    before, params = both(loss)
    updater.step()
    expected = {key: (before[key] + params[key]) / 2 for key in params}
    # bfloat16 has 8 bits, and what is expected is itself rounded
    torch.testing.assert_close(both(loss)[0], expected, rtol=1e-2, atol=1e-2)


# --- what a step costs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "operators"),
    [
        (lambda loss: SoftUpdate(loss, tau=0.1), ["_foreach_lerp_", "_foreach_copy_"]),
        (lambda loss: HardUpdate(loss, value_network_update_interval=0), ["_foreach_copy_", "_foreach_copy_"]),
    ],
    ids=["soft", "hard"],
)
def test_a_step_takes_as_many_launches_for_35_tensors_as_for_5(make, operators):
    for layers in (1, 16):
        updater = make(Delayed(nn.Sequential(*mlp(layers), nn.BatchNorm1d(3, affine=False))))
        with Operators() as ran:
            updater.step()
        # one for the floating dtype, one for the integers; and nothing that asks the device for a value
        assert ran.names == operators


@pytest.mark.parametrize("make", [lambda loss: SoftUpdate(loss, tau=0.1), HardUpdate], ids=["soft", "hard"])
def test_a_step_compiles_without_a_graph_break(make):
    loss = Delayed(with_statistics())
    twin = copy.deepcopy(loss)
    updater, eager = make(loss), make(twin)
    step = torch.compile(updater.step, fullgraph=True, backend="eager")
    for _ in range(2):
        for x in (loss, twin):
            torch.manual_seed(1)
            train(x)
        step()
        eager.step()
        torch.testing.assert_close(both(loss)[0], both(twin)[0], **FLOAT32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_soft_step_can_be_captured_in_a_cuda_graph():
    loss = Delayed(with_statistics()).to("cuda")
    updater = SoftUpdate(loss, tau=0.25)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        updater.step()
    train(loss)
    before, params = both(loss)
    graph.replay()
    key = ("1", "running_mean")
    torch.testing.assert_close(both(loss)[0][key], 0.75 * before[key] + 0.25 * params[key], **FLOAT32)


# --- what a loss goes through meanwhile ---------------------------------------------------------------------------


def _cast(loss):
    loss.to(torch.float64)


def _cast_inside_a_module(loss):
    nn.ModuleList([loss]).to(torch.float64)


def _load(loss):
    loss.load_state_dict(Delayed(with_statistics()).state_dict())


def _load_by_assignment(loss):
    loss.load_state_dict(Delayed(with_statistics()).state_dict(), assign=True)


@pytest.mark.parametrize("change", [_cast, _cast_inside_a_module, _load, _load_by_assignment])
def test_a_step_moves_the_tensors_that_the_loss_has_now(change):
    loss = Delayed(with_statistics())
    updater = HardUpdate(loss, value_network_update_interval=0)
    updater.step()
    change(loss)
    train(loss)
    updater.step()
    targets, params = both(loss)
    torch.testing.assert_close(targets, params, rtol=0, atol=0)


def test_a_copied_updater_moves_the_targets_of_its_own_loss():
    updater = HardUpdate(Delayed(mlp()), value_network_update_interval=0)
    twin = copy.deepcopy(updater)
    train(twin.loss_module)
    start = both(updater.loss_module)[0]
    twin.step()
    torch.testing.assert_close(*both(twin.loss_module), rtol=0, atol=0)
    torch.testing.assert_close(both(updater.loss_module)[0], start, rtol=0, atol=0)


def test_targets_are_idle_until_there_is_an_updater():
    loss = Delayed(mlp())
    assert loss._has_update_associated == {"value_network": False}
    HardUpdate(loss)
    assert loss._has_update_associated == {"value_network": True}


# --- its own state ------------------------------------------------------------------------------------------------


def test_the_count_of_a_hard_update_is_saved_and_goes_on():
    updater = HardUpdate(Delayed(mlp()), value_network_update_interval=3)
    updater.step()
    assert updater.state_dict() == {"initialized": True, "counter": 1}
    other = HardUpdate(Delayed(mlp()), value_network_update_interval=3)
    other.load_state_dict(updater.state_dict())
    other.step()
    assert other.counter == 2


def test_a_soft_update_saves_only_that_it_is_initialized():
    assert SoftUpdate(Delayed(mlp()), tau=0.1).state_dict() == {"initialized": True}


def test_the_state_of_another_kind_of_updater_is_refused():
    soft, hard = SoftUpdate(Delayed(mlp()), tau=0.1), HardUpdate(Delayed(mlp()))
    with pytest.raises(KeyError, match=r"SoftUpdate.*counter"):
        soft.load_state_dict(hard.state_dict())
    with pytest.raises(KeyError, match=r"HardUpdate.*counter"):
        hard.load_state_dict(soft.state_dict())


# --- misuse -------------------------------------------------------------------------------------------------------


def test_a_loss_without_targets_is_refused():
    for make in (lambda loss: SoftUpdate(loss, tau=0.1), HardUpdate):
        with pytest.raises(RuntimeError, match=r"Delayed has no target parameters.*delay_"):
            make(Delayed(mlp(), delay=False))


def test_what_is_no_loss_is_refused():
    with pytest.raises(ValueError, match="must be a LossModule, but is a Linear"):
        SoftUpdate(nn.Linear(1, 1), tau=0.1)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({}, RuntimeError, "needs eps or tau"),
        ({"eps": 0.9, "tau": 0.1}, ValueError, "eps=0.9 and tau=0.1"),
        ({"eps": 1.5}, ValueError, "eps must be between 0 and 1, but is 1.5"),
        ({"tau": -0.5}, ValueError, "tau must be between 0 and 1, but is -0.5"),
        ({"tau": float("nan")}, ValueError, "tau must be between 0 and 1"),
    ],
)
def test_a_share_that_is_none_is_refused_and_the_loss_still_warns(arguments, error, says):
    loss = Delayed(mlp())
    with pytest.raises(error, match=says):
        SoftUpdate(loss, **arguments)
    assert not any(loss._has_update_associated.values())


def test_an_eps_that_looks_like_tau_warns():
    with pytest.warns(UserWarning, match=r"eps is 0\.005.*Is it tau"):
        SoftUpdate(Delayed(mlp()), eps=0.005)


def test_a_negative_interval_is_refused():
    with pytest.raises(ValueError, match="must not be negative, but is -1"):
        HardUpdate(Delayed(mlp()), value_network_update_interval=-1)


def test_a_second_init_warns_and_copies_again():
    loss = Delayed(mlp())
    updater = SoftUpdate(loss, tau=0.1)
    train(loss)
    with pytest.warns(UserWarning, match="SoftUpdate is initialized already"):
        updater.init_()
    torch.testing.assert_close(*both(loss), rtol=0, atol=0)


def test_a_step_before_init_is_refused():
    updater = SoftUpdate(Delayed(mlp()), tau=0.1)
    updater.load_state_dict({"initialized": False})
    with pytest.raises(RuntimeError, match=r"call init_\(\) before step\(\)"):
        updater.step()


def test_an_updater_of_ones_own_says_how_targets_move():
    with pytest.raises(NotImplementedError, match="TargetNetUpdater doesn't say how"):
        TargetNetUpdater(Delayed(mlp())).step()

    class Halfway(TargetNetUpdater):
        def _step(self, p_source, p_target):
            p_target.lerp_(p_source, 0.5)

    loss = Delayed(mlp())
    updater = Halfway(loss)
    train(loss)
    targets, params = both(loss)
    updater.step()
    torch.testing.assert_close(both(loss)[0], {key: (x + params[key]) / 2 for key, x in targets.items()})
    assert not any(x.requires_grad for x in loss.target_value_network_params.values(True, True))


def test_an_updater_says_in_its_name_what_it_updates():
    assert repr(SoftUpdate(Delayed(mlp()), tau=0.1)) == "SoftUpdate(Delayed: value_network)"
