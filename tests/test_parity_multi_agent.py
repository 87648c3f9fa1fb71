"""MAPPO, IPPO and their estimator against TorchRL: the same networks and data give the same outputs and gradients."""

import copy

import pytest
import torch
from fusedrl import estimators as our_estimators
from fusedrl.losses import multi_agent as ours
from fusedrl.losses.utils import ValueEstimators
from helpers_losses import OBSERVATION
from helpers_multi_agent import VALUE, collect_team, team_critic, team_policy
from tensordict.nn import TensorDictModule

pytest.importorskip("torchrl")
from torchrl import objectives as theirs
from torchrl.modules import MultiAgentMLP, PopArtValueNorm, RunningValueNorm, ValueNorm
from torchrl.objectives import value as their_estimators

# Both compute in float64; but TorchRL keeps γ, λ and coefficients in float32.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
CLASSES = ["MAPPOLoss", "IPPOLoss"]
OPTIONS = [
    {},
    {"clip_epsilon": 0.05, "entropy_coeff": 0.3},
    {"normalize_advantage": False, "loss_critic_type": "l2"},
    {"normalize_advantage_exclude_dims": ()},
    {"reduction": "none"},
    {"reduction": "sum", "critic_coeff": 0.5},
    {"entropy_bonus": False},
]
NORMS = {"popart": PopArtValueNorm, "running": RunningValueNorm}
every_class = pytest.mark.parametrize("name", CLASSES)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def build(name, networks=None, norm=None, **options):
    made = []
    networks = networks or (team_policy(), team_critic())
    for library in (ours, theirs):
        loss = getattr(library, name)(*networks, value_norm=copy.deepcopy(norm), **options)
        loss.set_keys(**VALUE)
        made.append(loss)
    return made, networks


def assert_same(losses, networks, data):
    results = []
    for loss in losses:
        out = loss(data.copy())
        total = sum(x.sum() for key, x in out.items() if key.startswith("loss_"))
        parameters = [p for network in networks for p in network.parameters()]
        results.append((out.to_dict(), torch.autograd.grad(total, parameters)))
    torch.testing.assert_close(*results, **CLOSE)


@pytest.mark.parametrize("own", [[], ["reward", "done", "terminated"]], ids=["team", "agents"])
@pytest.mark.parametrize("options", [{}, {"average_gae": True}, {"shifted": True, "shifted_budget": 4}], ids=str)
def test_estimators_agree(options, own):
    data, network = collect_team(), team_critic()
    if "shifted" in options:
        data["next", "agents", "observation"] = data["agents", "observation"].roll(-1, 1)
    for key in own:
        data["next", key] = data["next", key].unsqueeze(-2).expand(2, 5, 3, 1).clone()
    results = []
    for library in (our_estimators, their_estimators):
        e = library.MultiAgentGAE(gamma=0.9, lmbda=0.8, value_network=network, **options)
        e.set_keys(**VALUE)
        td = e(data.clone())
        results.append({key: td[key] for key in ("advantage", "value_target")})
    torch.testing.assert_close(*results, **CLOSE)


@every_class
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_outputs_and_gradients_agree(name, options):
    losses, networks = build(name, **options)
    assert_same(losses, networks, collect_team())


@pytest.mark.parametrize("value_type", ["MAGAE", "GAE", "TD0", "TDLambda"])
def test_other_estimators_agree_where_the_agents_have_their_own_rewards(value_type):
    losses, networks = build("MAPPOLoss")
    data = collect_team()
    for key in ("reward", "done", "terminated"):
        data["next", key] = data["next", key].unsqueeze(-2).expand(2, 5, 3, 1).clone()
    losses[0].make_value_estimator(ValueEstimators[value_type], gamma=0.8)
    losses[1].make_value_estimator(theirs.ValueEstimators[value_type], gamma=0.8)
    assert_same(losses, networks, data)


@pytest.mark.parametrize("clip_value", [None, 0.2])
@pytest.mark.parametrize("norm", NORMS)
def test_value_norms_of_torchrl_work_and_move_alike(norm, clip_value):
    losses, networks = build("MAPPOLoss", norm=NORMS[norm](shape=1), clip_value=clip_value)
    for _ in range(3):
        data = collect_team()
        for key in ("advantage", "value_target", ("agents", "state_value")):
            data[key] = 3 * torch.randn(2, 5, 3, 1, dtype=torch.float64) + 1
        assert_same(losses, networks, data)
    a, b = (dict(loss.value_norm.state_dict()) for loss in losses)
    torch.testing.assert_close(a, b, **CLOSE)
    assert isinstance(losses[0].value_norm, ValueNorm)


@every_class
@pytest.mark.parametrize("norm", [None, *NORMS])
def test_states_are_exchanged(name, norm):
    made = None if norm is None else NORMS[norm](shape=1)
    (a, b), _ = build(name, norm=made)
    (c, d), _ = build(name, norm=made)
    for loss in (a, b):
        loss(collect_team())
    assert set(a.state_dict()) == set(b.state_dict())
    c.load_state_dict(b.state_dict(), strict=True)
    d.value_estimator  # noqa: B018  # TorchRL makes it when it's read
    d.load_state_dict(a.state_dict(), strict=True)
    torch.testing.assert_close(dict(c.state_dict()), dict(b.state_dict()), check_dtype=False, **CLOSE)


@every_class
def test_keys_agree(name):
    (a, b), _ = build(name)
    assert a.out_keys == b.out_keys
    assert set(a.in_keys) == set(b.in_keys)
    for key, entry in vars(b.tensor_keys).items():
        assert getattr(a.tensor_keys, key) == entry


def test_networks_of_torchrl_work():
    net = MultiAgentMLP(OBSERVATION, 1, n_agents=3, centralized=True, share_params=True, depth=1, num_cells=4).double()
    critic = TensorDictModule(net, [("agents", "observation")], [("agents", "state_value")])
    losses, networks = build("MAPPOLoss", (team_policy(), critic))
    assert_same(losses, networks, collect_team())
