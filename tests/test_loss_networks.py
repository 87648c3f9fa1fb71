"""What becomes of a loss's networks: copied where they have modules in common, or given other tensors from outside."""

import copy
import io

import pytest
import torch
from fusedrl import losses
from fusedrl.losses import A2CLoss, ClipPPOLoss, DiscreteSACLoss, DQNLoss, SoftUpdate, TD3Loss
from helpers_losses import DOUBLE, OBSERVATION, collect, discrete_actor
from helpers_q import action_values, deterministic_actor, gradients, qvalue_network, stochastic_actor, transitions
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def with_common_trunk(kind, **options):
    trunk = TensorDictModule(nn.Linear(OBSERVATION, OBSERVATION, **DOUBLE), ["observation"], ["hidden"])
    head = TensorDictModule(nn.Linear(OBSERVATION, 1, **DOUBLE), ["hidden"], ["state_value"])
    return kind(discrete_actor(reads="hidden", trunk=trunk), TensorDictSequential(trunk, head), **options)


def train(loss, data, call=None, updater=None):
    """Two steps, by way of ``call`` if it is given, and of the ``updater``."""
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    for step in range(2):
        torch.manual_seed(step)
        out = (loss if call is None else call)(data.clone())
        optimizer.zero_grad()
        sum(x for key, x in out.items() if key.startswith("loss")).backward()
        optimizer.step()
        if updater is not None:
            updater.step()


@pytest.mark.parametrize("kind", [A2CLoss, ClipPPOLoss])
def test_networks_with_a_common_trunk_have_it_in_common_in_a_copy(kind):
    loss, data = with_common_trunk(kind), collect(discrete_actor())
    copied = copy.deepcopy(loss)
    assert len(list(copied.parameters())) == len(list(loss.parameters()))
    train(loss, data)
    train(copied, data)
    assert all(p.grad is not None for p in copied.parameters())
    for name, x in copied.state_dict().items():
        torch.testing.assert_close(x, loss.state_dict()[name])
    for network in ("actor_network", "critic_network"):
        found = copied.get_stateful_net(network).state_dict()
        for name, x in loss.get_stateful_net(network).state_dict().items():
            torch.testing.assert_close(found[name], x)


def test_the_target_of_a_copy_is_the_target_of_what_is_trained():
    loss, data = copy.deepcopy(with_common_trunk(ClipPPOLoss, delay_actor=True)), collect(discrete_actor())
    updater = SoftUpdate(loss, tau=1.0)
    train(loss, data)
    updater.step()
    trained, target = loss.actor_network_params, loss.target_actor_network_params
    torch.testing.assert_close(target.data.to_dict(), trained.data.to_dict())
    with loss._parameters_in("actor_network"):
        wanted = loss.actor_network.get_dist(data.clone()).logits
    with loss._parameters_in("actor_network", target=True):
        torch.testing.assert_close(loss.actor_network.get_dist(data.clone()).logits, wanted)


def test_a_network_with_tied_weights_acts_in_a_copy_as_it_is_trained():
    layers = nn.Sequential(*(nn.Linear(OBSERVATION, OBSERVATION, **DOUBLE) for _ in range(2)))
    layers[1].weight = layers[0].weight
    trunk = TensorDictModule(layers, ["observation"], ["hidden"])
    loss = A2CLoss(discrete_actor(reads="hidden", trunk=trunk), entropy_bonus=False, critic_coeff=None)
    data = collect(discrete_actor())
    data["advantage"] = torch.ones(*data.shape, 1, **DOUBLE)
    copied = copy.deepcopy(loss)
    train(copied, data)
    with copied._parameters_in("actor_network"):
        trained = copied.actor_network.get_dist(data.clone()).logits
    torch.testing.assert_close(copied.actor_network.get_dist(data.clone()).logits, trained)
    acting = copied.actor_network.state_dict()
    torch.testing.assert_close(acting["module.0.module.0.weight"], acting["module.0.module.1.weight"])


# --- a list of Q networks on the policy's trunk -----------------------------------------------------------------


def on_the_policys_trunk(**options):
    torch.manual_seed(3)
    trunk = TensorDictModule(nn.Linear(OBSERVATION, OBSERVATION, **DOUBLE), ["observation"], ["hidden"])
    actor, heads = deterministic_actor(), [qvalue_network(), qvalue_network()]
    actor.in_keys = ["hidden"]
    for head in heads:
        head.in_keys = ["hidden", "action"]
    judges = [TensorDictSequential(trunk, head) for head in heads]
    return TD3Loss(TensorDictSequential(trunk, actor), judges, bounds=(-1.0, 1.0), **options)


TRUNK = ("module", "0", "module", "weight")


def trained(loss, data, call=None):
    """What is in ``loss`` after training it and its targets."""
    train(loss, data, call, SoftUpdate(loss, tau=0.3) if loss._has_update_associated else None)
    return loss.state_dict()


def saved_and_loaded(loss):
    buffer = io.BytesIO()
    torch.save(loss, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def given_the_state_of(loss):
    other = on_the_policys_trunk()
    with torch.no_grad():
        for x in other.parameters():
            x.add_(1)
    other.load_state_dict(loss.state_dict())
    return other


def with_its_own_network(loss):
    loss.from_stateful_net("qvalue_network", loss.get_stateful_net("qvalue_network"))
    return loss


def test_q_networks_on_the_policys_trunk_train_it_and_it_stays_one():
    loss, data = on_the_policys_trunk(), transitions((6,))
    own = loss.actor_network_params[TRUNK]
    out = loss(data)
    q, policy = (torch.autograd.grad(out[f"loss_{of}"], own, retain_graph=True)[0] for of in ("qvalue", "actor"))
    assert q.abs().sum() > 0
    assert policy.abs().sum() > 0
    assert not [name for name, _ in loss.named_parameters() if name.startswith("qvalue_network_params.module.0")]
    trained(loss, data)
    assert all(torch.equal(member, own) for member in loss.qvalue_network_params[TRUNK])
    assert not torch.equal(loss.target_qvalue_network_params[TRUNK][0], own)


def test_separate_losses_leave_the_trunk_of_a_list_to_the_policy():
    loss = on_the_policys_trunk(separate_losses=True)
    found = gradients(loss, loss(transitions((6,))))
    trunk = "actor_network_params." + ".".join(TRUNK)
    assert not found["loss_qvalue"][trunk].any()
    assert found["loss_actor"][trunk].any()


@pytest.mark.parametrize(
    "change", [copy.deepcopy, saved_and_loaded, given_the_state_of, with_its_own_network, lambda x: x.float().double()]
)
def test_a_trunk_of_q_networks_and_policy_stays_one_through_copies_states_and_casts(change):
    data, loss = transitions((6,)), on_the_policys_trunk().float().double()  # numbers that both dtypes have
    wanted = trained(copy.deepcopy(loss), data)
    found = trained(change(loss), data)
    torch.testing.assert_close(dict(found), dict(wanted))


@pytest.mark.parametrize("options", [{}, {"delay_qvalue": False}], ids=str)
@pytest.mark.parametrize("way", ["same random numbers", "compiled"])
def test_every_way_to_ask_q_networks_trains_the_policys_trunk_alike(way, options):
    data, loss, call = transitions((6,)), on_the_policys_trunk(**options), None
    wanted = trained(on_the_policys_trunk(**options), data)
    if way == "compiled":
        torch._dynamo.reset()
        call = torch.compile(loss, fullgraph=True, backend="aot_eager")
    else:
        loss.set_vmap_randomness("same")
    torch.testing.assert_close(dict(trained(loss, data, call)), dict(wanted))


def test_networks_that_are_initialised_anew_still_have_their_trunk_in_common_and_their_targets_equal():
    loss = on_the_policys_trunk(delay_actor=True)
    loss.reset_parameters_recursive()
    own = loss.actor_network_params[TRUNK]
    for params in (loss.qvalue_network_params, loss.target_qvalue_network_params):
        assert all(torch.equal(member, own) for member in params[TRUNK])
    assert torch.equal(loss.target_actor_network_params[TRUNK], own)


def given_its_own_state(network, _):
    network.load_state_dict({key: 2 * x for key, x in network.state_dict().items()}, assign=True)


def given_a_parameter(network, _):
    layer = next(m for m in network.modules() if isinstance(m, nn.Linear))
    layer.weight = nn.Parameter(torch.zeros_like(layer.weight))


def given_the_target(_, loss):
    loss.target_value_network_params.data.apply(lambda x: 3 * x).to_module(loss.value_network)


@pytest.mark.parametrize("change", [given_its_own_state, given_a_parameter, given_the_target])
def test_a_loss_goes_on_with_its_own_parameters_whatever_is_put_into_the_network(change):
    network, data = action_values(), transitions(action="categorical")
    loss = DQNLoss(network, action_space="categorical", delay_value=True)
    wanted = loss(data.clone())["loss"]
    change(network, loss)
    for _ in range(2):
        found = loss(data.clone())["loss"]
        torch.testing.assert_close(found, wanted)
        assert all(g is not None for g in torch.autograd.grad(found, list(loss.parameters())))


def test_a_loss_goes_on_after_its_targets_were_in_the_network():
    network, data = action_values(), transitions(action="categorical")
    loss = DQNLoss(network, action_space="categorical", delay_value=True)
    wanted = loss(data.clone())["loss"]
    with loss.target_value_network_params.to_module(network):
        torch.testing.assert_close(loss(data.clone())["loss"], wanted)
    torch.testing.assert_close(loss(data.clone())["loss"], wanted)
    assert network.module is loss.value_network.module
    assert all(a is b for a, b in zip(network.parameters(), loss.parameters(), strict=True))


# --- networks that do more than their layers --------------------------------------------------------------------


class Reaching(nn.Module):
    """Computes with a function that holds the module itself."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(OBSERVATION, 3, **DOUBLE)
        self.function = lambda x: self.layer(x)

    def forward(self, x):
        return self.function(x)


def test_members_of_a_network_whose_function_holds_it_differ_and_are_trained():
    network = TensorDictModule(Reaching(), ["observation"], ["action_value"])
    loss = DiscreteSACLoss(
        discrete_actor(), network, action_space="categorical", num_actions=3, target_entropy=1.0, num_qvalue_nets=2
    )
    data = transitions((6,))
    data["action"] = torch.randint(3, (6,))
    loss(data)["loss_qvalue"].backward()
    weight = loss.qvalue_network_params["module", "layer", "weight"]
    assert not torch.equal(weight[0], weight[1])
    assert (weight.grad.flatten(1).abs().sum(1) > 0).all()


def test_the_network_of_an_ensemble_takes_the_users_mode():
    network = TensorDictModule(nn.Linear(OBSERVATION, 3, **DOUBLE), ["observation"], ["action_value"])
    loss = DiscreteSACLoss(
        discrete_actor(), network, action_space="categorical", num_actions=3, target_entropy=1.0, num_qvalue_nets=2
    )
    network.eval()
    assert not loss.qvalue_network.training


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_layer_that_is_exchanged_computes_with_the_losss_parameters():
    value = action_values()
    loss, data = DQNLoss(value, action_space="one-hot", delay_value=False), transitions((6,), "one-hot")
    loss(data.clone())
    layer = loss.value_network.module
    exchanged = Doubled(layer.in_features, layer.out_features, **DOUBLE)
    loss.value_network.module = exchanged
    before = copy.deepcopy(exchanged.state_dict())
    with loss._parameters_in("value_network"):
        assert exchanged.weight is loss.value_network_params["module", "weight"]
    loss(data.clone())["loss"].backward()
    assert loss.value_network_params["module", "weight"].grad.any()
    torch.testing.assert_close(dict(exchanged.state_dict()), dict(before))


class Centred(nn.Module):
    """Subtracts the mean of all that it has seen, of which it makes new tensors."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(OBSERVATION, **DOUBLE))
        self.register_buffer("seen", torch.zeros((), **DOUBLE))

    def forward(self, x):
        self.seen = self.seen + 1
        self.mean = self.mean + (x.detach().mean(0) - self.mean) / self.seen
        return x - self.mean


def test_buffers_that_a_network_assigns_to_are_kept_by_the_loss():
    layers = nn.Sequential(Centred(), nn.Linear(OBSERVATION, OBSERVATION, **DOUBLE))
    trunk = TensorDictModule(layers, ["observation"], ["hidden"])
    loss = A2CLoss(discrete_actor(reads="hidden", trunk=trunk), entropy_bonus=False, critic_coeff=None)
    data = collect(discrete_actor())
    data["advantage"] = torch.ones(*data.shape, 1, **DOUBLE)
    for _ in range(3):
        loss(data.clone())
    kept = loss.actor_network_params["module", "0", "module", "0", "seen"]
    assert kept == 3
    assert loss.state_dict()["actor_network_params.module.0.module.0.seen"] == 3


def plain(*_):
    return nn.Linear(4, 1, dtype=torch.float64)


@pytest.mark.parametrize(
    ("argument", "make"),
    [
        ("critic_network", lambda: losses.A2CLoss(discrete_actor(), plain())),
        ("critic_network", lambda: losses.ClipPPOLoss(discrete_actor(), plain())),
        ("critic_network", lambda: losses.ClipPPOLoss(discrete_actor(), plain(), functional=False)),
        ("critic_network", lambda: losses.ReinforceLoss(discrete_actor(), plain())),
        ("qvalue_network", lambda: losses.SACLoss(stochastic_actor(), plain(), target_entropy=-1.0)),
        ("qvalue_network", lambda: losses.SACLoss(stochastic_actor(), [plain(), plain()], target_entropy=-1.0)),
        ("value_network", lambda: losses.SACLoss(stochastic_actor(), qvalue_network(), plain(), target_entropy=-1.0)),
        ("qvalue_network", lambda: losses.CQLLoss(stochastic_actor(), plain(), target_entropy=-1.0)),
        ("qvalue_network", lambda: losses.REDQLoss(stochastic_actor(), plain(), target_entropy=-1.0)),
        ("qvalue_network", lambda: losses.TQCLoss(stochastic_actor(), plain(), target_entropy=-1.0)),
        ("qvalue_network", lambda: losses.CrossQLoss(stochastic_actor(), plain(), target_entropy=-1.0)),
        ("value_network", lambda: losses.IQLLoss(stochastic_actor(), qvalue_network(), plain())),
        ("qvalue_network", lambda: losses.TD3Loss(deterministic_actor(), plain(), bounds=(-1, 1))),
        ("actor_network", lambda: losses.TD3Loss(plain(), qvalue_network(), bounds=(-1, 1))),
        ("actor_network", lambda: losses.DDPGLoss(plain(), qvalue_network())),
        ("value_network", lambda: losses.DDPGLoss(deterministic_actor(), plain())),
        ("actor_network", lambda: losses.BCLoss(plain())),
        ("actor_network", lambda: losses.ACTLoss(plain())),
        ("actor_network", lambda: losses.DTLoss(plain())),
        ("discriminator_network", lambda: losses.GAILLoss(plain())),
    ],
)
def test_a_network_that_does_not_say_what_it_reads_is_refused_when_the_loss_is_made(argument, make):
    with pytest.raises(TypeError, match=f"Loss needs {argument} to have in_keys and out_keys.*but it is a Linear"):
        make()
