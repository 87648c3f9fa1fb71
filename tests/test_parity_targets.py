"""The updaters against TorchRL's: the same networks and steps give the same targets.

Where TorchRL is wrong the promise is tested in test_targets.py instead: it never moves buffers, nor the targets of
parameters that another network trains, and it takes a tau above one half for a mistake.
"""

import copy

import pytest
import torch
from fusedrl import losses as ours
from fusedrl.losses import targets as our_targets
from tensordict import TensorDictParams
from torch import nn

pytest.importorskip("torchrl")
from torchrl import objectives as theirs

# Both compute in float64, but one as a(1−τ) + bτ and the other as a + τ(b − a).
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def delayed(base):
    class Delayed(base):
        network: nn.Module
        network_params: TensorDictParams
        target_network_params: TensorDictParams

        def __init__(self, network, **options):
            super().__init__()
            self.convert_to_functional(network, "network", create_target_params=True, **options)

    return Delayed


OURS, THEIRS = delayed(ours.LossModule), delayed(theirs.LossModule)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def train(loss, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for _, x in sorted(loss.named_parameters()):
            x.add_(torch.randn_like(x))


@pytest.mark.parametrize("options", [{}, {"expand_dim": 2}], ids=["one", "ensemble"])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("SoftUpdate", {"eps": 0.9}),
        ("SoftUpdate", {"tau": 0.005}),
        ("SoftUpdate", {"tau": 0.0}),
        ("SoftUpdate", {"tau": 1.0}),
        ("HardUpdate", {"value_network_update_interval": 0}),
        ("HardUpdate", {"value_network_update_interval": 1}),
        ("HardUpdate", {"value_network_update_interval": 3}),
        ("HardUpdate", {}),
    ],
)
@pytest.mark.filterwarnings("ignore:Found an eps value")
def test_targets_and_states_agree_step_by_step(name, arguments, options):
    losses = OURS(mlp(), **options), THEIRS(mlp(), **options)
    losses[0].load_state_dict(losses[1].state_dict())
    for loss in losses:
        train(loss, 0)
    updaters = [
        getattr(library, name)(loss, **arguments) for library, loss in zip((our_targets, theirs), losses, strict=True)
    ]
    for step in range(1, 8):
        for loss, updater in zip(losses, updaters, strict=True):
            train(loss, step)
            updater.step()
        torch.testing.assert_close(losses[0].state_dict(), losses[1].state_dict(), **CLOSE)
        assert updaters[0].state_dict() == updaters[1].state_dict()


def test_an_interval_that_is_left_out_is_torchrls():
    for library, kind in ((our_targets, OURS), (theirs, THEIRS)):
        assert library.HardUpdate(kind(mlp())).value_network_update_interval == 1000


def test_each_loads_the_state_of_the_other():
    updaters = [
        library.HardUpdate(kind(mlp()), value_network_update_interval=5)
        for library, kind in ((our_targets, OURS), (theirs, THEIRS))
    ]
    for steps, updater in enumerate(updaters, start=1):
        for _ in range(steps):
            updater.step()
    states = [copy.deepcopy(updater.state_dict()) for updater in updaters]
    for updater, state in zip(updaters, reversed(states), strict=True):
        updater.load_state_dict(state)
    assert [updater.counter for updater in updaters] == [2, 1]


@pytest.mark.parametrize("arguments", [{}, {"eps": 0.9, "tau": 0.1}, {"eps": 2}, {"tau": -1}])
def test_the_same_arguments_are_refused_with_the_same_error(arguments):
    refused = []
    for library, kind in ((our_targets, OURS), (theirs, THEIRS)):
        with pytest.raises((RuntimeError, ValueError)) as error:
            library.SoftUpdate(kind(mlp()), **arguments)
        refused.append(error.type)
    assert refused[0] is refused[1]
