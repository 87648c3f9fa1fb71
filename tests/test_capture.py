"""Every loss, every value estimator and whole updates can be captured in a CUDA graph.

Without a CUDA device, what would keep them out of one is looked for on the device ``meta``.
"""

import pytest
import torch
from fusedrl import estimators, losses
from helpers_capture import WARM_UPS, Capturable, capture, moved, networks_on, not_on, put, tensors_of
from helpers_estimators import ESTIMATORS, estimator, policy, rollout
from helpers_losses import collect, critic, discrete_actor
from helpers_multi_agent import VALUE, collect_team, team_critic
from helpers_q import losses_of, qvalue_network, stochastic_actor, transitions
from tensordict.nn import set_composite_lp_aggregate
from test_every_loss import CASES
from torch import nn
from torch.distributions import Categorical, Normal

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="only a CUDA device has CUDA graphs")
every_loss = pytest.mark.parametrize("name", CASES)
# On `meta` a tensor that is left on the host, or moved from there, shows; on `cpu` one that is made of Python numbers.
either_device = pytest.mark.parametrize("where", ["meta", "cpu"])
# The same operations in the same dtype, but cuBLAS may choose other kernels during a capture: sums in another order.
TOLERANCE = {torch.float64: {"rtol": 1e-8, "atol": 1e-10}, torch.float32: {"rtol": 1e-4, "atol": 1e-5}}


def acted():
    return policy()(rollout())


def vtrace(**options):
    options = {"value_network": estimator("GAE").value_network, **options}
    return estimators.VTrace(gamma=0.9, actor_network=policy(), **options)


def multi_agent_gae(**options):
    options = {"value_network": team_critic(), **options}
    found = estimators.MultiAgentGAE(gamma=0.9, lmbda=0.8, **options)
    found.set_keys(**VALUE)
    return found


ESTIMATOR_CASES = {
    **{name: (lambda name=name, **options: estimator(name, **options), rollout) for name in ESTIMATORS},
    "VTrace": (vtrace, acted),
    "MultiAgentGAE": (multi_agent_gae, collect_team),
}
every_estimator = pytest.mark.parametrize("name", ESTIMATOR_CASES)


@pytest.fixture(autouse=True)
def _setting(monkeypatch):
    torch.manual_seed(0)
    # The distributions' own checks of their arguments wait for the device.
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)
    monkeypatch.setenv("RL_WARNINGS", "0")  # of targets that nobody updates
    with set_composite_lp_aggregate(False):
        yield


def results(loss, data):
    """What ``loss`` returns and writes for ``data``, which stays as it is, and the gradients, by name."""
    seen = data.copy()
    out = losses_of(loss(seen))
    found = {f"out {key}": x for key, x in out.items(True, True)}
    found |= {f"written {key}": x for key, x in seen.items(True, True) if data.get(key, None) is not x}
    leaves = {name: p for name, p in loss.named_parameters() if p.requires_grad}
    leaves |= {f"data {key}": x for key, x in data.items(True, True) if x.requires_grad}
    total = sum(term.sum() for name, term in out.items() if name.startswith("loss"))
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return found | {f"gradient {name}": x for name, x in zip(leaves, grads, strict=True)}


def assert_close(found, wanted):
    assert found.keys() == wanted.keys()
    for name, x in found.items():
        y = wanted[name]
        torch.testing.assert_close(
            x, y, **TOLERANCE.get(x.dtype, {}), equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


# --- without a CUDA device --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "offence",
    [
        lambda x: x + torch.tensor(2.0),
        lambda x: x + torch.as_tensor(2.0, device=x.device),
        lambda x: x + x.new_tensor([2.0]),
        lambda x: x + torch.ones(()),
        lambda x: x[[0, 1]],
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: x.sum().item(),
        lambda x: Normal(x, x.exp()).sample(),
        lambda x: Categorical(logits=x).sample(),
    ],
    ids=["tensor", "as_tensor", "new_tensor", "on-host", "list-index", "to-host", "mask-index", "item", "normal",
         "multinomial"],
)  # fmt: skip
def test_what_cannot_be_captured_is_seen_on_one_of_the_devices(offence):
    seen = 0
    for where in ("meta", "cpu"):
        try:
            with Capturable(where):
                offence(torch.ones(3, device=where))
        except (AssertionError, NotImplementedError):  # the latter: meta tensors can't be copied from
            seen += 1
    assert seen


@either_device
def test_what_can_be_captured_is_let_through(where):
    x = torch.ones(3, device=where)
    with Capturable(where):
        torch.where(x > 0, x, 0) + torch.full((), 2.0, device=x.device) + Normal(x, x.exp()).rsample()


def test_every_estimator_is_checked_here():
    registered = {estimators.get_value_estimator_entry(x).cls.__name__ for x in estimators.ValueEstimators}
    assert set(ESTIMATOR_CASES) == registered


@either_device
@every_loss
def test_nothing_in_a_loss_keeps_it_out_of_a_graph(name, where):
    case = CASES[name]
    with networks_on(where):
        loss = case.make()
    loss, data = loss.to(where), moved(case.data(), where)
    assert not not_on(where, loss)
    with Capturable(where):
        results(loss, data)


@every_loss
def test_a_loss_is_where_its_networks_are(name):
    with networks_on("meta"):
        loss = CASES[name].make()
    assert not not_on("meta", loss)


@either_device
@every_estimator
def test_nothing_in_an_estimator_keeps_it_out_of_a_graph(name, where):
    make, data = ESTIMATOR_CASES[name]
    with torch.device(where):
        estimate = make()
    data = moved(data(), where)
    with Capturable(where):
        estimate(data)
        estimate.value_estimate(data)


@every_estimator
def test_an_estimator_is_where_its_value_network_is(name):
    make, _ = ESTIMATOR_CASES[name]
    with torch.device("meta"):
        network = make().value_network
    assert not {key for key, x in make(value_network=network).named_buffers() if x.device.type != "meta"}


def test_nothing_in_an_update_of_the_targets_keeps_it_out_of_a_graph():
    with networks_on("meta"):
        loss = CASES["SACLoss"].make()
    targets = losses.SoftUpdate(loss, tau=0.1)
    with Capturable("meta"):
        targets.step()


# --- on a CUDA device -------------------------------------------------------------------------------------------------


@needs_cuda
@every_loss
def test_a_replayed_loss_gives_the_eager_numbers_for_new_data(name):
    case = CASES[name]
    with networks_on("cuda"):  # those of an imagined environment too, which the loss doesn't move
        loss = case.make()
    loss, static, new = loss.to("cuda"), moved(case.data(), "cuda"), moved(case.data(), "cuda")
    # What the loss adapts when it is called, such as a moving average, starts from the same in each call.
    start = {name: x.detach().clone() for name, x in tensors_of(loss).items()}

    def restart():
        with torch.no_grad():
            for name, x in tensors_of(loss).items():
                x.copy_(start[name])
        torch.cuda.manual_seed(1)  # a replay goes on from the generator's state, as an eager call does

    graph = capture(lambda: results(loss, static))

    def replay():
        restart()
        graph.replay()
        return {name: x.clone() for name, x in graph.outputs.items()}

    before = replay()
    put(new, into=static)
    after = replay()
    restart()
    assert_close(after, results(loss, new))
    assert any(not torch.equal(before[name], x) for name, x in after.items() if name.startswith("out loss"))


@needs_cuda
@every_estimator
def test_a_replayed_estimator_gives_the_eager_numbers_for_new_data(name, backend):
    make, data = ESTIMATOR_CASES[name]
    estimate = make(backend=backend)
    estimate.value_network.to("cuda")
    estimate.to("cuda")
    static = moved(data(), "cuda")
    new = static.apply(lambda x: x.flip(0))  # the masks too; log-probabilities stay such
    graph = capture(lambda: estimate(static.copy()))
    graph.replay()
    before = graph.outputs.clone()
    put(new, into=static)
    graph.replay()
    assert_close(dict(graph.outputs.items(True, True)), dict(estimate(new.copy()).items(True, True)))
    assert not torch.equal(before["advantage"], graph.outputs["advantage"])


def capturable_adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-2, capturable=True)


def sac():
    """A loss, and the update that trains it on transitions: losses, three optimizers, targets."""
    torch.manual_seed(0)
    loss = losses.SACLoss(stochastic_actor(), qvalue_network(), target_entropy=-2.0).to("cuda")
    optimizers = [
        capturable_adam(loss.actor_network_params.parameters()),
        capturable_adam(loss.qvalue_network_params.parameters()),
        capturable_adam([loss.log_alpha]),
    ]
    targets = losses.SoftUpdate(loss, tau=0.1)

    def update(data):
        out = loss(data.copy())
        (out["loss_actor"] + out["loss_qvalue"] + out["loss_alpha"]).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        targets.step()

    return loss, update


def ppo():
    """A loss, and the update that trains it on a rollout: advantages, minibatches at random, losses, clipped step."""
    torch.manual_seed(0)
    actor, value_network = discrete_actor().to("cuda"), critic().to("cuda")
    advantages = estimators.GAE(gamma=0.9, lmbda=0.8, value_network=value_network, device="cuda")
    loss = losses.ClipPPOLoss(actor, value_network, normalize_advantage=True).to("cuda")
    optimizer = capturable_adam(loss.parameters())

    def update(data):
        data = data.copy()
        with torch.no_grad():
            advantages(data)
        data = data.reshape(-1)
        order = torch.rand(len(data), device="cuda").argsort()
        for minibatch in data[order].chunk(3):
            out = loss(minibatch)
            (out["loss_objective"] + out["loss_critic"] + out["loss_entropy"]).backward()
            nn.utils.clip_grad_norm_(loss.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()

    return loss, update


@needs_cuda
@pytest.mark.parametrize(
    ("make", "data"),
    [(sac, transitions), (ppo, lambda: collect(discrete_actor(), estimated=False))],
    ids=["SAC", "PPO"],
)
def test_replayed_updates_leave_the_parameters_that_eager_ones_leave(make, data):
    batches = [moved(data(), "cuda") for _ in range(4)]
    (loss, update), (captured, captured_update) = make(), make()
    start = {name: x.detach().clone() for name, x in tensors_of(loss).items()}

    torch.cuda.manual_seed(0)
    for _ in range(WARM_UPS):
        update(batches[0])
    for seed, batch in enumerate(batches):
        torch.cuda.manual_seed(seed)
        update(batch)

    static = batches[0].clone()
    torch.cuda.manual_seed(0)
    graph = capture(lambda: captured_update(static))
    for seed, batch in enumerate(batches):
        put(batch, into=static)
        torch.cuda.manual_seed(seed)
        graph.replay()

    assert_close(tensors_of(captured), tensors_of(loss))
    moving = {name for name, x in loss.named_parameters() if x.requires_grad}
    assert not {name for name in moving if torch.equal(start[name], tensors_of(captured)[name])}
