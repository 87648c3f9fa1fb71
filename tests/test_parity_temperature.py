"""Whatever learns a temperature keeps it under the names that TorchRL has for it."""

import pytest
import torch
from fusedrl import losses as ours
from helpers_losses import DOUBLE, squashed_normal
from helpers_q import StateAction, assert_states_are_exchanged, qvalue_network, stochastic_actor
from helpers_sac import discrete_sac, sac, sac_with_value
from tensordict.nn import TensorDictModule
from torch import nn

theirs = pytest.importorskip("torchrl.objectives")
from torchrl.data import Bounded  # noqa: E402  # after the check that it is there


def quantiles():
    network = StateAction()
    network.layers[-1] = nn.Linear(6, 4, **DOUBLE)
    return TensorDictModule(network, ["observation", "action"], ["state_action_value"])


def case(name, qvalue=qvalue_network, **fixed):
    def make(library, **options):
        return getattr(library, name)(stochastic_actor(), qvalue(), **fixed, **options)

    return make


def online_decision_transformer(library, **options):
    return library.OnlineDTLoss(stochastic_actor(squashed_normal), target_entropy=-2.0, **options)


LOSSES = {
    "SACLoss": lambda library, **options: sac(library.SACLoss, **options),
    "SACLoss with a value network": lambda library, **options: sac_with_value(library.SACLoss, **options),
    "DiscreteSACLoss": lambda library, **options: discrete_sac(library.DiscreteSACLoss, **options),
    "CQLLoss": case("CQLLoss", action_spec=Bounded(-1, 1, (2,))),
    "TQCLoss": case("TQCLoss", quantiles, target_entropy=-2.0),
    "CrossQLoss": case("CrossQLoss", target_entropy=-2.0),
    "REDQLoss": case("REDQLoss", target_entropy=-2.0),
    "OnlineDTLoss": online_decision_transformer,
}
every_loss = pytest.mark.parametrize("name", LOSSES)
BOUNDS = [{}, {"min_alpha": 0.2}, {"max_alpha": 3.0}, {"min_alpha": 0.2, "max_alpha": 3.0}]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pair(name, **options):
    mine, other = (LOSSES[name](library, **options) for library in (ours, theirs))
    assert other.target_entropy is not None  # TorchRL's REDQ makes that buffer when it's first asked for
    return mine, other


READ = ("alpha", "device", "fixed_alpha", "target_action_gap", "target_entropy", "target_entropy_buffer")


@pytest.mark.parametrize("fixed", [False, True])
@every_loss
def test_what_users_read_has_the_same_names(name, fixed):
    options = {"alpha_init": 0.3, "fixed_alpha": fixed}
    if name == "CQLLoss":
        options |= {"with_lagrange": True, "lagrange_thresh": 0.7}
    mine, other = pair(name, **options)
    there = [key for key in READ if hasattr(other, key)]
    assert {"fixed_alpha", "target_entropy"} <= set(there)
    for key in there:
        assert getattr(mine, key) == getattr(other, key), key


@every_loss
def test_alpha_is_read_between_its_bounds_and_left_as_it_is(name):
    loss = LOSSES[name](ours, min_alpha=0.2, max_alpha=3.0)
    for log_alpha, alpha in ((-9.0, 0.2), (0.5, torch.tensor(0.5).exp()), (9.0, 3.0)):
        with torch.no_grad():
            loss.log_alpha.fill_(log_alpha)
        assert loss.alpha.item() == pytest.approx(float(alpha))
        assert not loss.alpha.requires_grad
        assert loss.log_alpha.item() == log_alpha


@pytest.mark.parametrize("bounds", BOUNDS, ids=lambda o: " and ".join(o) or "no bound")
@every_loss
def test_checkpoints_are_exchanged_whichever_bounds_alpha_has(name, bounds):
    mine, other = pair(name, **bounds)
    assert_states_are_exchanged(mine, other)
    for bound in ("min_log_alpha", "max_log_alpha"):
        torch.testing.assert_close(getattr(mine, bound, None), getattr(other, bound, None))
