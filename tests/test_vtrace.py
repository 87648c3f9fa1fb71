"""V-trace: the sums of the paper, weights that are clipped and constant, and the policy that they compare."""

import copy
import re

import fusedrl.estimators as E
import pytest
import torch
from fusedrl.kernels import VerificationError, vtrace_verify
from fusedrl.kernels.vtrace import vtrace
from fusedrl.losses import A2CLoss, ClipPPOLoss, KLPENPPOLoss, PPOLoss, ReinforceLoss
from helpers_estimators import (
    WRITTEN,
    as_keywords,
    assert_close,
    assert_untouched,
    critic,
    no_host_sync,
    policy,
    rollout,
    signals,
    snapshot,
)
from helpers_losses import ACTORS, collect
from helpers_losses import critic as loss_critic
from tensordict.nn import set_composite_lp_aggregate

GAMMA = 0.9
BACKENDS = ("reference", "torch", "triton", "verify")
LOSSES = (A2CLoss, ClipPPOLoss, KLPENPPOLoss, PPOLoss, ReinforceLoss)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_loss = pytest.mark.parametrize("cls", LOSSES, ids=lambda cls: cls.__name__)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    with set_composite_lp_aggregate(False):
        yield


def weighted(shape=(2, 9, 1), seed=0, device="cpu"):
    """The arguments of the kernel function, by name."""
    x = {key: x.to(device) for key, x in signals(shape, seed).items()}
    return {
        "log_pi": 2 * (x["log_pi"] - x["log_mu"]),
        "log_mu": None,
        "value": x["state_value"],
        "next_value": x["next_state_value"],
        "reward": x["reward"],
        "done": x["done"],
        "terminated": x["terminated"],
    }


def steps(batch=(2, 9), **options):
    """A rollout with actions, and the log-probabilities that another policy gave them."""
    data = rollout(batch, **options)
    generator = torch.Generator().manual_seed(5)
    data["action"] = torch.randint(2, batch, generator=generator)
    data["action_log_prob"] = -2 * torch.rand(batch, generator=generator, dtype=torch.float64)
    return data


def estimator(**options):
    given = {"gamma": GAMMA, "actor_network": policy(), "value_network": critic(), "backend": "torch"}
    return E.VTrace(**{**given, **options})


def by_sums(gamma, log_pi, log_mu, value, next_value, reward, done, terminated, rho_thresh, c_thresh):
    """Equations 1 and 4 of the paper for one trajectory after the other, each sum from its start: no recurrence."""
    weight, ends = log_pi.exp(), done | terminated
    rho, c = weight.clamp_max(rho_thresh), weight.clamp_max(c_thresh)
    bootstrap = torch.where(terminated, 0, next_value)
    delta = rho * (reward + gamma * bootstrap - value)
    target, advantage = value.clone(), torch.empty_like(value)
    for b, s in torch.cartesian_prod(torch.arange(value.shape[0]), torch.arange(value.shape[1])).tolist():
        factor = 1.0
        for t in range(s, value.shape[1]):
            target[b, s] += factor * delta[b, t]
            factor = factor * gamma * c[b, t]
            if ends[b, t]:
                break
    for b, s in torch.cartesian_prod(torch.arange(value.shape[0]), torch.arange(value.shape[1])).tolist():
        last = ends[b, s] or s == value.shape[1] - 1
        following = bootstrap[b, s] if last else target[b, s + 1]
        advantage[b, s] = rho[b, s] * (reward[b, s] + gamma * following - value[b, s])
    return advantage, target


# --- on tensors ---------------------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize(("rho_thresh", "c_thresh"), [(1.0, 1.0), (2.0, 0.7), (0.5, 3.0), (0.0, 1.0)])
def test_value_target_and_advantage_are_the_sums_of_the_paper(backend, device, rho_thresh, c_thresh):
    inputs = weighted(device=device)
    assert (inputs["done"] & ~inputs["terminated"]).any()
    expected = by_sums(GAMMA, **inputs, rho_thresh=rho_thresh, c_thresh=c_thresh)
    for convert in (float, torch.tensor, lambda x: torch.full((2, 1, 1), x, device=device)):
        thresholds = {"rho_thresh": convert(rho_thresh), "c_thresh": convert(c_thresh)}
        for a, e in zip(vtrace(GAMMA, **inputs, **thresholds, time_dim=1, backend=backend), expected, strict=True):
            assert_close(a, e, rtol=1e-7, atol=1e-7)  # log 0.7 and 0.7 in float32


def test_on_policy_the_value_target_is_that_of_td1():
    inputs = weighted()
    inputs["next_value"] = torch.where(inputs["done"], inputs["next_value"], inputs["value"].roll(-1, 1))
    inputs["log_pi"] = torch.zeros_like(inputs["reward"])
    _, value_target = vtrace(GAMMA, **inputs, time_dim=1)
    rest = (inputs[key] for key in ("next_value", "reward", "done", "terminated"))
    assert_close(value_target, E.vec_td1_return_estimate(GAMMA, *rest))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradients_of_all_inputs_agree_with_finite_differences(backend):
    inputs = weighted((1, 5, 1), seed=3)
    names = ["log_pi", "value", "next_value", "reward"]
    gamma, rho, c = (torch.tensor(x, dtype=torch.float64) for x in (0.9, 1.3, 0.8))

    def outputs(gamma, rho, c, *leaves):
        given = {**inputs, **dict(zip(names, leaves, strict=True))}
        return vtrace(gamma, **given, rho_thresh=rho, c_thresh=c, time_dim=1, backend=backend)

    leaves = [x.requires_grad_() for x in (gamma, rho, c, *(inputs[name].clone() for name in names))]
    assert torch.autograd.gradcheck(outputs, leaves)


@every_backend
def test_a_weight_that_overflows_is_clipped_and_has_a_gradient_of_zero(backend, device):
    inputs = weighted(device=device)
    inputs["log_pi"][0, 3] = 1e4
    inputs["log_pi"][1, 2] = -torch.inf
    inputs["log_pi"].requires_grad_()
    outputs = vtrace(GAMMA, **inputs, time_dim=1, backend=backend)
    (gradient,) = torch.autograd.grad(sum(x.sum() for x in outputs), inputs["log_pi"])
    assert all(x.isfinite().all() for x in (*outputs, gradient))
    assert gradient[0, 3] == gradient[1, 2] == 0


def test_verify_names_what_is_wrong_where_no_kernel_solves_it(device, monkeypatch):
    inputs = weighted(device=device)
    gamma = torch.full((2, 1, 1), GAMMA, dtype=torch.float64, device=device, requires_grad=True)
    found = [vtrace(gamma, **inputs, time_dim=1, backend=backend) for backend in ("verify", "torch")]
    gradients = [torch.autograd.grad(sum(x.sum() for x in results), gamma) for results in found]
    for x, wanted in zip(found[0] + gradients[0], found[1] + gradients[1], strict=True):
        assert_close(x, wanted)

    composed = vtrace_verify.composed
    twice = lambda x: 2 * x - x.detach()  # noqa: E731  # the same number, of which the gradient is twice as large
    monkeypatch.setattr(vtrace_verify, "composed", lambda p, *x: composed(p._replace(gamma=twice(p.gamma)), *x))
    results = vtrace(gamma, **inputs, time_dim=1, backend="verify")
    with pytest.raises(VerificationError, match="V-trace gradient of gamma"):
        sum(x.sum() for x in results).backward()
    monkeypatch.setattr(vtrace_verify, "composed", lambda p, *x: composed(p._replace(reward=p.reward + 1), *x))
    with pytest.raises(VerificationError, match=r"V-trace advantage.*index \(\d, \d, 0\)"):
        vtrace(gamma, **inputs, time_dim=1, backend="verify")


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        ({"rho_thresh": -1.0}, ValueError, "rho_thresh is -1.0"),
        ({"c_thresh": float("nan")}, ValueError, "c_thresh is nan"),
        ({"rho_thresh": None}, TypeError, "rho_thresh must be a number or a real tensor, but is None"),
        ({"c_thresh": "1"}, TypeError, "c_thresh must be a number or a real tensor, but is '1'"),
        ({"c_thresh": torch.ones(3)}, RuntimeError, r"c_thresh has shape \(3,\).*\(2, 9, 1\)"),
        ({"log_pi": torch.zeros(2, 9)}, RuntimeError, r"log_pi has shape \(2, 9\).*\(2, 9, 1\)"),
        ({"value": torch.zeros(2, 9)}, RuntimeError, r"value has shape \(2, 9\)"),
        ({"log_pi": None}, TypeError, "log_pi must be a real tensor, but is None"),
        ({"log_mu": torch.zeros(2, 9, 1) + 1j}, TypeError, "log_mu must be a real tensor, but is a tensor of"),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_named(wrong, error, match):
    with pytest.raises(error, match=match):
        vtrace(GAMMA, **{**weighted(), **wrong}, time_dim=1)


@pytest.mark.parametrize("dim", [1.0, "time", None])
def test_a_time_dim_that_is_no_int_is_named(dim):
    with pytest.raises(TypeError, match=f"time_dim must be an int, but is {dim!r}"):
        vtrace(GAMMA, **weighted(), time_dim=dim)


# --- the estimator ------------------------------------------------------------------------------------------------


def expected(data, actor, log_mu, **thresholds):
    """Advantage and value target from the functional, given the values in ``data``."""
    log_pi = actor.get_dist(data.copy()).log_prob(data["action"]).detach()
    return E.vtrace_advantage_estimate(
        GAMMA,
        log_pi.unsqueeze(-1),
        log_mu.unsqueeze(-1),
        data["state_value"],
        data["next", "state_value"],
        *(data["next", key] for key in ("reward", "done", "terminated")),
        **thresholds,
    )


@pytest.mark.parametrize("backend", ["reference", "torch", "verify"])
@pytest.mark.parametrize("thresholds", [{}, {"rho_thresh": 1.5, "c_thresh": 0.5}], ids=str)
def test_the_policy_is_asked_about_the_action_in_the_data(backend, thresholds):
    actor, data = policy(), steps()
    log_mu = data["action_log_prob"]
    td = estimator(actor_network=actor, backend=backend, **thresholds)(data)
    wanted = expected(td, actor, log_mu, **thresholds)
    assert_close(td["advantage"], wanted[0])
    assert_close(td["value_target"], wanted[1])
    assert td["action_log_prob"] is log_mu
    assert set(td.keys(True, True)) == {*steps().keys(True, True), *WRITTEN}


def test_the_weights_are_constants_and_so_are_next_values():
    actor, network, data = policy(), critic(), steps()
    data["action_log_prob"].requires_grad_()
    data["next", "reward"].requires_grad_()
    td = estimator(actor_network=actor, value_network=network, differentiable=True)(data)
    leaves = [data["next", "reward"], data["action_log_prob"], *actor.parameters(), *network.parameters()]
    reward, *others = torch.autograd.grad(td["advantage"].sum() + td["value_target"].sum(), leaves, allow_unused=True)
    assert reward.abs().sum() > 0
    assert all(x is None for x in others)
    assert not estimator()(data)["advantage"].requires_grad


@pytest.mark.parametrize("aggregate", [False, True])
@pytest.mark.parametrize("name", ["gaussian", "nested_heads", "flat_heads"])
def test_log_probabilities_of_several_heads_add_up(name, aggregate):
    with set_composite_lp_aggregate(aggregate):
        actor = ACTORS[name]()
        data = collect(actor, estimated=False)
        e = E.VTrace(gamma=GAMMA, actor_network=actor, value_network=loss_critic())
        keys = e.tensor_keys.sample_log_prob
        log_mu = sum(data[key] for key in (keys if isinstance(keys, list) else [keys]))
        with torch.no_grad():
            dist = actor.get_dist(data.copy())
            parts = dist.dists.items() if hasattr(dist, "dists") else [("action", dist)]
            log_pi = sum(part.log_prob(data[key]) for key, part in parts)
        td = e(data)
        wanted, _ = E.vtrace_advantage_estimate(
            GAMMA,
            log_pi.unsqueeze(-1),
            log_mu.unsqueeze(-1),
            td["state_value"],
            td["next", "state_value"],
            *(td["next", key] for key in ("reward", "done", "terminated")),
        )
        assert_close(td["advantage"], wanted)


def test_a_log_probability_may_have_the_shape_of_the_reward():
    data = steps()
    flat = estimator()(data.copy())
    data["action_log_prob"] = data["action_log_prob"].unsqueeze(-1)
    assert_close(estimator()(data)["advantage"], flat["advantage"])


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_next_observation_of_a_terminal_step_is_ignored_and_ends_the_trajectory_without_done(garbage):
    results = []
    for x in (0.0, garbage):
        data = steps()
        data["next", "terminated"][0, 3] = True
        data["next", "done"][0, 3] = bool(x == 0)
        data["next", "obs"][data["next", "terminated"].squeeze(-1)] = x
        data["next", "reward"].requires_grad_()
        td = estimator(differentiable=True)(data)
        (gradient,) = torch.autograd.grad(td["advantage"].sum() + td["value_target"].sum(), data["next", "reward"])
        results.append((td["advantage"], td["value_target"], gradient))
    for clean, dirty in zip(*results, strict=True):
        assert_close(dirty, clean)


def test_padded_steps_enter_no_estimate_no_gradient_and_no_statistic():
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 6:] = False
    results = []
    for garbage in (0.0, torch.nan):
        data = steps()
        data["collector", "mask"] = mask
        for key in ("obs", "action_log_prob", ("next", "obs"), ("next", "reward")):
            data[key][~mask] = garbage
        data["next", "reward"].requires_grad_()
        td = estimator(differentiable=True, average_adv=True)(data)
        (gradient,) = torch.autograd.grad(td["advantage"].square().sum(), data["next", "reward"])
        results.append((td["advantage"], td["value_target"], gradient))
        assert (td["advantage"][~mask] == 0).all()
    for clean, dirty in zip(*results, strict=True):
        assert_close(dirty, clean)
    alone = estimator()(steps()[:1, :6])
    assert_close(results[0][1][:1, :6], alone["value_target"])


def test_a_policy_that_checks_its_parameters_is_not_shown_what_padding_holds(monkeypatch):
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)
    data = steps()
    data["collector", "mask"] = mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 6:] = False
    wanted = estimator()(data.clone())["value_target"]
    data["obs"][~mask] = torch.nan
    assert_close(estimator()(data)["value_target"], wanted)


@pytest.mark.parametrize("batch", [(3, 1), (3, 0), (0, 4)], ids=str)
def test_degenerate_batches_give_the_shape_of_the_reward(batch, monkeypatch):
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)  # can't check an empty batch
    td = estimator()(steps(batch))
    assert td["advantage"].shape == td["value_target"].shape == (*batch, 1)


def test_average_adv_standardises_the_advantage_alone():
    plain, averaged = estimator()(steps()), estimator(average_adv=True)(steps())
    advantage = plain["advantage"]
    assert_close(averaged["advantage"], (advantage - advantage.mean()) / advantage.std())
    assert_close(averaged["value_target"], plain["value_target"])


def test_value_estimate_is_the_value_target_and_leaves_the_data_as_it_is():
    data = steps()
    before = snapshot(data)
    target = estimator().value_estimate(data)
    assert_untouched(data, before)
    assert_close(target, estimator()(data)["value_target"])


def test_called_with_tensors_it_returns_the_out_keys():
    data = steps()
    advantage, value_target = estimator()(**as_keywords(data))
    td = estimator()(data)
    assert_close(advantage, td["advantage"])
    assert_close(value_target, td["value_target"])


def test_entries_can_have_other_names():
    data, e = steps(), estimator()
    wanted = estimator()(data.copy())["advantage"]
    e.set_keys(action="move", sample_log_prob=("old", "log_prob"))
    data.rename_key_("action", "move")
    data["old", "log_prob"] = data.pop("action_log_prob")
    assert {"move", ("old", "log_prob")} <= set(e.in_keys)
    assert_close(e(data)["advantage"], wanted)


@pytest.mark.parametrize(
    ("spoil", "error", "match"),
    [
        (lambda d: d.pop("action"), KeyError, r"VTrace needs 'action'.*set_keys\(action="),
        (lambda d: d.pop("action_log_prob"), KeyError, r"VTrace needs 'action_log_prob'.*set_keys\(sample_log_prob="),
        (lambda d: d.pop("obs"), KeyError, "VTrace needs 'obs'.*the actor network reads it"),
        (
            lambda d: d.set("action_log_prob", torch.zeros(2, 9, 3)),
            RuntimeError,
            re.escape("log-probability of 'action_log_prob' has shape (2, 9, 3), but 'reward' has shape (2, 9, 1)"),
        ),
        (lambda d: d["next"].set("reward", torch.zeros(2, 9, 3)), RuntimeError, r"\(2, 9, 3\)"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(spoil, error, match):
    data = steps()
    spoil(data)
    before = snapshot(data)
    with pytest.raises(error, match=match):
        estimator()(data)
    assert_untouched(data, before)


@pytest.mark.parametrize("actor", [None, torch.nn.Linear(1, 1)], ids=["none", "module"])
def test_a_policy_without_a_distribution_is_refused(actor):
    with pytest.raises(TypeError, match="VTrace needs an actor_network that has a distribution"):
        estimator(actor_network=actor)


@pytest.mark.parametrize("name", ["rho_thresh", "c_thresh"])
def test_a_negative_threshold_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} is -1"):
        estimator(**{name: -1})


def test_a_cast_keeps_discount_and_thresholds():
    e = estimator(rho_thresh=1.1, c_thresh=torch.tensor(0.9, dtype=torch.float64)).to(torch.bfloat16)
    assert [x.dtype for x in e.buffers()] == [torch.float64] * 3


def test_nothing_waits_on_the_host(monkeypatch):
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)
    e, data = estimator(differentiable=True, average_adv=True), steps()
    data["next", "reward"].requires_grad_()
    with no_host_sync():
        e(data)["advantage"].square().sum().backward()
        e.value_estimate(data)


def test_compiled_as_one_graph_equals_eager():
    torch._dynamo.reset()
    e, data = estimator(average_adv=True), steps()
    actual, wanted = (f(data.copy()) for f in (torch.compile(e, fullgraph=True, backend="eager"), e))
    for key in WRITTEN:
        assert_close(actual[key], wanted[key])


# --- in a loss ----------------------------------------------------------------------------------------------------


def loss_of(cls, name="discrete", **hyperparameters):
    return cls(ACTORS[name](), loss_critic()).make_value_estimator("vtrace", gamma=GAMMA, **hyperparameters)


@every_loss
@pytest.mark.parametrize("name", ["discrete", "nested_heads"])
def test_a_loss_estimates_with_its_own_policy_as_it_is_now(cls, name):
    if cls is KLPENPPOLoss and name == "nested_heads":
        pytest.skip("its data are the parameters of one distribution more")
    loss = loss_of(cls, name)
    data = collect(loss.actor_network, estimated=False)
    before = snapshot(data)
    for _ in range(2):
        with torch.no_grad():
            wanted = E.VTrace(gamma=GAMMA, actor_network=loss.actor_network, value_network=loss.critic_network)(
                data.clone()
            )
        loss.reset()  # the coefficient that the KL-penalised loss adapts
        out = loss(data)
        loss.reset()
        for key, x in loss(wanted.exclude("state_value", ("next", "state_value"))).items():
            assert_close(out[key], x)
        assert_untouched(data, before)
        sum(x for key, x in out.items() if key.startswith("loss_")).backward()
        with torch.no_grad():
            for p in loss.parameters():
                p.add_(torch.randn_like(p))


@every_loss
def test_a_loss_trains_each_parameter_once_and_copies_follow_the_copy(cls):
    loss = loss_of(cls)
    assert not any("_value_estimator" in name for name, _ in loss.named_parameters())
    again = copy.deepcopy(loss)
    own = {id(p) for p in again.parameters()}
    assert {id(p) for p in again.value_estimator.actor_network.parameters()} <= own
    loss.to(torch.float32)
    assert {x.dtype for x in loss.value_estimator.actor_network.parameters()} == {torch.float32}


@every_loss
def test_a_loss_says_that_it_reads_the_log_probability(cls):
    loss = loss_of(cls)
    data = collect(loss.actor_network, estimated=False)
    assert "action_log_prob" in loss.in_keys
    keywords = {"_".join(key) if isinstance(key, tuple) else key: data[key] for key in loss.in_keys}
    first = loss.out_keys[0]
    wanted = loss(data)[first]
    loss.reset()
    assert_close(loss(**keywords)[0], wanted)
    loss.set_keys(sample_log_prob="mu")
    loss.reset()
    assert loss.value_estimator.tensor_keys.sample_log_prob == "mu"
    assert_close(loss(data.rename_key_("action_log_prob", "mu"))[first], wanted)


def test_a_loss_of_several_heads_hands_their_names_on():
    loss = loss_of(ClipPPOLoss, "nested_heads")
    assert loss.value_estimator.tensor_keys.sample_log_prob == [("car", "gear_log_prob"), ("car", "steer_log_prob")]
    assert loss.value_estimator.tensor_keys.action == [("car", "gear"), ("car", "steer")]


def test_a_loss_compiled_whole_gives_the_eager_numbers():
    torch._dynamo.reset()
    loss = loss_of(A2CLoss)
    data = collect(loss.actor_network, estimated=False)
    results = []
    for f in (loss, torch.compile(loss, fullgraph=True, backend="eager")):
        out = f(data.copy())
        total = sum(x for key, x in out.items() if key.startswith("loss_"))
        results.append([*(out[key] for key in loss.out_keys), *torch.autograd.grad(total, list(loss.parameters()))])
    for actual, wanted in zip(*results, strict=True):
        assert_close(actual, wanted)


def test_state_is_saved_with_the_thresholds():
    state = loss_of(A2CLoss, rho_thresh=2.0).state_dict()
    other = loss_of(A2CLoss)
    other.load_state_dict(state, strict=True)
    assert other.value_estimator.rho_thresh == 2.0


@every_backend
def test_a_weight_that_is_its_threshold_has_the_same_gradient_for_a_number_and_a_tensor(backend, device):
    found = []
    for threshold in (1.0, torch.tensor(1.0, device=device), torch.ones(2, 1, 1, device=device)):
        inputs = weighted(device=device)
        inputs["log_pi"] = torch.zeros_like(inputs["log_pi"]).requires_grad_()  # on-policy
        thresholds = {"rho_thresh": threshold, "c_thresh": threshold}
        results = vtrace(GAMMA, **inputs, **thresholds, time_dim=1, backend=backend)
        found += torch.autograd.grad(sum(x.sum() for x in results), inputs["log_pi"])
    assert found[0].abs().min() > 0
    for x in found[1:]:
        assert_close(x, found[0])


@pytest.mark.parametrize("backend", ["reference", "torch", "verify"])
def test_a_threshold_of_zero_has_a_gradient(backend, device):
    inputs = weighted(device=device)
    rho = torch.zeros((), dtype=torch.float64, device=device, requires_grad=True)
    advantage, _ = vtrace(GAMMA, **inputs, rho_thresh=rho, time_dim=1, backend=backend)
    (gradient,) = torch.autograd.grad(advantage.sum(), rho)
    h = 1e-7
    moved, _ = vtrace(GAMMA, **inputs, rho_thresh=h, time_dim=1, backend=backend)
    assert gradient.item() == pytest.approx((moved.sum() / h).item(), rel=1e-4)


def test_padding_does_not_count_where_advantages_are_standardised():
    data = steps()
    data["collector", "mask"] = mask = torch.rand(data.shape) < 0.6
    advantage = estimator(average_adv=True)(data)["advantage"][mask]
    torch.testing.assert_close(advantage.mean(), torch.zeros_like(advantage.mean()))
    torch.testing.assert_close(advantage.std(), torch.ones_like(advantage.std()))


@every_backend
def test_thresholds_of_0_leave_the_value_as_it_is(backend, device):
    given = weighted(device=device)
    advantage, value_target = vtrace(0.9, **given, rho_thresh=0.0, c_thresh=0.0, backend=backend)
    torch.testing.assert_close(value_target, given["value"])
    assert not advantage.any()
