"""A learning rate that follows the KL, and modules that are known to be random."""

import math

import pytest
import torch
from fusedrl.estimators.modules import add_random_module, is_random
from fusedrl.losses.schedule import KLAdaptiveLR
from helpers_estimators import no_host_sync
from torch import nn

KLS = [0.05, 0.0200001, 0.02, 0.01, 0.005, 0.0049, 1e-9, 0.0, -0.3]


def schedule_of(lr, groups=1, **options):
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(groups)]
    optimizer = torch.optim.Adam([{"params": p, "lr": (i + 1) * lr} for i, p in enumerate(parameters)], lr=lr)
    return KLAdaptiveLR(optimizer, 0.01, **options)


@pytest.mark.parametrize(
    ("kl", "times"),
    [(0.05, 0.5), (0.0201, 0.5), (0.02, 1), (0.01, 1), (0.005, 1), (0.0049, 2), (0.0, 1), (-0.1, 1)],
)
@pytest.mark.parametrize("tensor_kl", [False, True])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_the_rate_falls_above_twice_the_target_and_rises_below_half_of_it(kl, times, tensor_kl, tensor_lr):
    double = {"dtype": torch.float64}
    schedule = schedule_of(torch.tensor(1e-3, **double) if tensor_lr else 1e-3, groups=2, factor=2.0)
    schedule.step(torch.tensor([kl], **double) if tensor_kl else kl)
    assert schedule.get_last_lr() == pytest.approx([1e-3 * times, 2e-3 * times])
    assert schedule.last_kl == pytest.approx(kl)


@pytest.mark.parametrize("tensor", [False, True])
def test_the_rate_stays_within_its_bounds(tensor):
    schedule = schedule_of(torch.tensor(1e-3) if tensor else 1e-3, min_lr=5e-4, max_lr=2e-3, factor=4.0)
    schedule.step(1.0)
    assert schedule.get_last_lr() == pytest.approx([5e-4])
    for _ in range(2):
        schedule.step(1e-4)
    assert schedule.get_last_lr() == pytest.approx([2e-3])


def test_a_rate_that_is_a_tensor_is_changed_in_place_without_waiting_for_the_device():
    schedule = schedule_of(torch.tensor(1e-3), factor=2.0)
    rate = schedule.optimizer.param_groups[0]["lr"]
    kl = torch.tensor(0.5)
    with no_host_sync():
        schedule.step(kl)
    assert schedule.optimizer.param_groups[0]["lr"] is rate
    assert rate == pytest.approx(5e-4)


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_a_kl_that_is_not_finite_changes_nothing(kl):
    number, tensor = schedule_of(1e-3), schedule_of(torch.tensor(1e-3))
    for given in (kl, torch.tensor(kl)):
        with pytest.raises(ValueError, match="kl must be finite"):
            number.step(given)
    tensor.step(torch.tensor(kl))
    assert number.get_last_lr() == [1e-3]
    assert tensor.get_last_lr() == pytest.approx([1e-3])


def test_a_kl_per_sample_is_refused():
    with pytest.raises(ValueError, match=r"one element.*\(2,\)"):
        schedule_of(1e-3).step(torch.zeros(2))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"target_kl": 0.0}, "target_kl is 0.0"),
        ({"target_kl": math.nan}, "target_kl is nan"),
        ({"factor": 1.0}, "factor is 1.0"),
        ({"factor": math.inf}, "factor is inf"),
        ({"min_lr": 0.0}, "min_lr is 0.0"),
        ({"min_lr": 1.0, "max_lr": 0.1}, "min_lr is 1.0 and max_lr 0.1"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(options, match):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    with pytest.raises(ValueError, match=match):
        KLAdaptiveLR(optimizer, **{"target_kl": 0.01, **options})


def test_bounds_that_are_one_number_are_the_rate():
    schedule = schedule_of(1e-3, min_lr=0.5, max_lr=0.5)
    schedule.step(0.0)
    assert schedule.get_last_lr() == [0.5]


def test_the_state_restores_the_settings():
    a, b = schedule_of(1e-3, factor=3.0), schedule_of(torch.tensor(1e-3))
    a.step(0.5)
    b.load_state_dict(a.state_dict())
    assert b.state_dict() == a.state_dict()
    assert b.factor == 3.0
    b.step(torch.tensor(0.25))
    assert b.state_dict()["last_kl"] == 0.25
    with pytest.raises(KeyError, match="last_kl"):
        b.load_state_dict({"target_kl": 1.0, "factor": 2.0, "min_lr": 0.1, "max_lr": 1.0})


def test_rates_and_state_are_those_of_torchrl():
    theirs = pytest.importorskip("torchrl.objectives").KLAdaptiveLR
    schedule = schedule_of(1e-3, groups=2)
    twin = theirs(
        torch.optim.Adam([{"params": torch.zeros(1), "lr": 1e-3}, {"params": torch.ones(1), "lr": 2e-3}]), 0.01
    )
    for kl in KLS * 3:
        schedule.step(kl)
        twin.step(kl)
        assert schedule.get_last_lr() == twin.get_last_lr()
    assert schedule.state_dict() == twin.state_dict()
    twin.load_state_dict(schedule.state_dict())


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


def test_a_random_module_of_ones_own_can_be_made_known(monkeypatch):
    from fusedrl.estimators import modules, value_network

    monkeypatch.setattr(modules, "_random_modules", list(modules._random_modules))
    network = nn.Sequential(nn.Linear(2, 2), Noise())
    assert not is_random(network)
    assert value_network._default_randomness(network) == "error"
    for _ in range(2):
        add_random_module(Noise)
    assert is_random(network)
    assert value_network._default_randomness(network) == "different"
    assert not is_random(nn.Linear(2, 2))
    assert modules._random_modules.count(Noise) == 1


@pytest.mark.parametrize("module", ["Noise", Noise(), int], ids=str)
def test_only_classes_of_modules_can_be_made_known(module):
    with pytest.raises(TypeError, match=r"subclass of torch\.nn\.Module"):
        add_random_module(module)


def test_the_last_kl_holds_no_graph():
    schedule = schedule_of(torch.tensor(1e-3))
    schedule.step(torch.tensor(0.05, requires_grad=True) * 1)
    assert not schedule.last_kl.requires_grad
