"""V-trace against TorchRL's, where that is right.

TorchRL's estimator doesn't ask the policy about the action in the data but about one that it draws anew, by default the
most probable: here the data hold that one. Its functional is compared in test_parity_functional.py too.
"""

import pytest
import torch
from fusedrl import estimators as ours
from fusedrl import losses as our_losses
from helpers_losses import collect, critic, discrete_actor
from tensordict.nn import InteractionType, set_composite_lp_aggregate, set_interaction_type

pytest.importorskip("torchrl")
from torchrl import objectives as their_losses
from torchrl.objectives import value as theirs

# Both compute in float64; but TorchRL keeps γ, the thresholds and coefficients in float32.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
LOSSES = ["A2CLoss", "ReinforceLoss", "PPOLoss", "ClipPPOLoss", "KLPENPPOLoss"]
THRESHOLDS = [{}, {"rho_thresh": 0.7, "c_thresh": 1.3}]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    with set_composite_lp_aggregate(False):
        yield


def collect_modes(actor, batch=(3, 5)):
    """Data of another policy, whose action happens to be the most probable one of ``actor``."""
    data = collect(actor, batch, estimated=False)
    with torch.no_grad():
        data["action"] = actor.get_dist(data.copy()).mode
        data["action_log_prob"] = -2 * torch.rand(batch, dtype=torch.float64)
    return data


@pytest.mark.parametrize("thresholds", THRESHOLDS, ids=str)
def test_functionals_agree(thresholds):
    value, next_value, reward, log_pi, log_mu = torch.randn(5, 3, 7, 2, dtype=torch.float64)
    terminated = torch.rand(3, 7, 2) < 0.2
    done = terminated | (torch.rand(3, 7, 2) < 0.2)
    given = (0.9, log_pi, log_mu, value, next_value, reward, done, terminated)
    a, b = (f.vtrace_advantage_estimate(*given, **thresholds) for f in (ours.functional, theirs.functional))
    torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize(
    "options", [*THRESHOLDS, {"average_adv": True}, {"shifted": True, "shifted_budget": 4}, {"skip_existing": False}]
)
def test_estimators_agree(options):
    actor, value = discrete_actor(), critic()
    data = collect_modes(actor)
    if options.get("shifted"):
        data["next", "observation"] = data["observation"].roll(-1, 1)
    networks = {"actor_network": actor, "value_network": value}
    made = [library.VTrace(gamma=0.9, **networks, **options) for library in (ours, theirs)]
    with set_interaction_type(InteractionType.DETERMINISTIC):
        a, b = (e(data.copy()) for e in made)
    for key in ("advantage", "value_target"):
        torch.testing.assert_close(a[key], b[key], **CLOSE)
    assert set(a.keys(True, True)) - {("next", "state_value"), "state_value"} <= set(b.keys(True, True))
    ours_made, theirs_made = made
    assert dict(ours_made.named_parameters()).keys() == dict(theirs_made.named_parameters()).keys()
    assert vars(theirs_made.tensor_keys).items() <= vars(ours_made.tensor_keys).items()
    assert ours_made.out_keys == theirs_made.out_keys
    assert set(theirs_made.in_keys) <= set(ours_made.in_keys)


@pytest.mark.parametrize("thresholds", THRESHOLDS, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_their_gradients_agree(name, thresholds):
    actor, value = discrete_actor(), critic()
    data = collect_modes(actor)
    results = []
    # TorchRL's β changes before the backward pass that is to use it.
    constant_beta = {"increment": 1.0, "decrement": 1.0} if name == "KLPENPPOLoss" else {}
    for library in (our_losses, their_losses):
        loss = getattr(library, name)(actor, value, **constant_beta)
        loss.make_value_estimator(library.ValueEstimators.VTrace, gamma=0.9, **thresholds)
        out = loss(data.copy())
        total = sum(x for key, x in out.items() if key.startswith("loss_"))
        gradients = torch.autograd.grad(total, [*actor.parameters(), *value.parameters()])
        results.append((out.to_dict(), gradients))
    torch.testing.assert_close(*results, **CLOSE)


@pytest.mark.parametrize("name", LOSSES)
def test_states_are_exchanged(name):
    made = []
    for library in (our_losses, their_losses):
        loss = getattr(library, name)(discrete_actor(), critic())
        loss.make_value_estimator(library.ValueEstimators.VTrace, gamma=0.7, rho_thresh=1.5)
        made.append(loss)
    a, b = made
    assert set(a.state_dict()) == set(b.state_dict())
    assert [key for key, _ in a.named_parameters()] == [key for key, _ in b.named_parameters()]
    a.load_state_dict(b.state_dict(), strict=True)
    torch.testing.assert_close(dict(a.state_dict()), dict(b.state_dict()), check_dtype=False)
    other = getattr(our_losses, name)(discrete_actor(), critic()).make_value_estimator("vtrace")
    b.load_state_dict(other.state_dict(), strict=True)
    torch.testing.assert_close(dict(b.state_dict()), dict(other.state_dict()), check_dtype=False, **CLOSE)


@pytest.mark.parametrize("name", ["VTrace", "MAGAE"])
def test_the_defaults_of_a_loss_agree(name):
    a, b = (library.default_value_kwargs(library.ValueEstimators[name]) for library in (our_losses, their_losses))
    assert a == b
