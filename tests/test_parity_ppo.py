"""The PPO family against TorchRL: the same networks and data give the same outputs and gradients.

Where TorchRL is wrong the promise is tested in test_ppo.py instead: masks in the metrics, and the gradient of the
KL penalty at a step that changes β.
"""

import pytest
import torch
from fusedrl import losses as ours
from helpers_losses import ACTORS, collect, composite_actor, critic, discrete_actor, gaussian_actor, two_step_actor
from tensordict.nn import set_composite_lp_aggregate

torchrl = pytest.importorskip("torchrl")
from torchrl import objectives as theirs  # noqa: E402  torchrl may be absent
from torchrl.modules import IndependentNormal, TanhNormal  # noqa: E402

# Both compute in float64; but coefficients are float32, and log(1 + ε) rounds where 1 + ε doesn't.
CLOSE = {"rtol": 1e-6, "atol": 1e-9}

CLASSES = ["PPOLoss", "ClipPPOLoss", "KLPENPPOLoss"]

OPTIONS = {
    "defaults": {},
    "no_entropy": {"entropy_bonus": False},
    "entropy_coeff": {"entropy_coeff": 0.3},
    "critic_coeff": {"critic_coeff": 0.3},
    "no_critic_loss": {"critic_coeff": 0.0},
    "l1": {"loss_critic_type": "l1"},
    "l2": {"loss_critic_type": "l2"},
    "normalized": {"normalize_advantage": True},
    "normalized_per_column": {"normalize_advantage": True, "normalize_advantage_exclude_dims": (1,)},
    "clipped_value": {"clip_value": 0.3},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "no_explained_variance": {"log_explained_variance": False},
    "capped_ratio": {"max_importance_ratio": 1.1},
    "not_functional": {"functional": False},
    "separate": {"separate_losses": True},
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    with set_composite_lp_aggregate(False):
        yield


def build(name, actor, value, **options):
    """The loss of both libraries on the same networks; β doesn't adapt at the KL of the tests' data."""
    if name == "KLPENPPOLoss":
        options = {"increment": 1.0, "decrement": 1.0, **options}
    return [getattr(library, name)(actor, value, **options) for library in (ours, theirs)]


def outputs(loss, data):
    torch.manual_seed(1)  # an entropy without closed form is drawn
    return loss(data)


def gradients(out, networks):
    parameters = [p for network in networks for p in network.parameters()]
    result = {}
    for name, term in out.items():
        if name.startswith("loss_"):
            result[name] = torch.autograd.grad(
                term.sum(), parameters, retain_graph=True, allow_unused=True, materialize_grads=True
            )
    return result


def assert_same(name, actor, value, data, **options):
    a, b = (outputs(loss, data) for loss in build(name, actor, value, **options))
    assert set(a.keys(True, True)) == set(b.keys(True, True))
    for key in a.keys(True, True):
        torch.testing.assert_close(a[key], b[key], **CLOSE, msg=lambda m, key=key: f"{key}: {m}")
        if not str(key).startswith("loss_"):
            assert not a[key].requires_grad
    torch.testing.assert_close(gradients(a, [actor, value]), gradients(b, [actor, value]), **CLOSE)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", CLASSES)
def test_outputs_and_gradients_agree_under_every_option(name, options):
    actor, value = discrete_actor(), critic()
    assert_same(name, actor, value, collect(actor), **options)


@pytest.mark.parametrize("distribution", [IndependentNormal, TanhNormal], ids=lambda d: d.__name__)
@pytest.mark.parametrize("name", CLASSES)
def test_continuous_actions_agree(name, distribution):
    actor, value = gaussian_actor(distribution), critic()
    assert_same(name, actor, value, collect(actor), samples_mc_entropy=3)


@pytest.mark.parametrize("steer", [IndependentNormal, TanhNormal], ids=lambda d: d.__name__)
@pytest.mark.parametrize("heads", ["nested_heads", "flat_heads"])
@pytest.mark.parametrize("name", ["PPOLoss", "ClipPPOLoss"])
def test_several_heads_agree(name, heads, steer):
    actor, value = ACTORS[heads](steer=steer), critic()
    assert_same(name, actor, value, collect(actor))


@pytest.mark.parametrize("name", ["PPOLoss", "ClipPPOLoss"])
def test_heads_in_modules_of_their_own_agree(name):
    actor, value = two_step_actor(), critic()
    assert_same(name, actor, value, collect(actor))


def test_exact_divergence_of_several_heads_is_what_torchrl_estimates():
    actor, value = composite_actor(), critic()
    data = collect(actor)
    a, b = (outputs(loss, data) for loss in build("KLPENPPOLoss", actor, value, samples_mc_kl=10_000))
    # 10 000 draws of a log-ratio whose standard deviation is a few units
    torch.testing.assert_close(a["kl"], b["kl"], rtol=0.05, atol=0.05)
    assert set(a.keys(True, True)) == set(b.keys(True, True))


@pytest.mark.parametrize("name", ["PPOLoss", "ClipPPOLoss"])
def test_several_heads_agree_when_their_log_probs_are_aggregated(name):
    with set_composite_lp_aggregate(True):
        actor, value = composite_actor(), critic()
        data = collect(actor)
        a, b = build(name, actor, value)
        # TorchRL takes an action's key for that of the log-probability here, unless it's told.
        b.set_keys(action=a.tensor_keys.action, sample_log_prob="sample_log_prob")
        a, b = outputs(a, data), outputs(b, data)
        torch.testing.assert_close(a.to_dict(), b.to_dict(), **CLOSE)


@pytest.mark.parametrize("name", ["PPOLoss", "ClipPPOLoss"])
def test_entropy_coefficients_of_heads_agree(name):
    actor, value = composite_actor(), critic()
    coefficients = {("car", "gear_entropy"): 0.1, ("car", "steer_entropy"): 0.5}
    assert_same(name, actor, value, collect(actor), entropy_coeff=coefficients)


@pytest.mark.parametrize("clip_epsilon", [0.05, (0.1, 0.3)])
@pytest.mark.parametrize("clip_value", [None, 0.1])
def test_clip_ranges_agree(clip_epsilon, clip_value):
    actor, value = discrete_actor(), critic()
    assert_same("ClipPPOLoss", actor, value, collect(actor), clip_epsilon=clip_epsilon, clip_value=clip_value)


def test_clip_value_true_means_clip_epsilon():
    actor, value = discrete_actor(), critic()
    assert_same("ClipPPOLoss", actor, value, collect(actor), clip_epsilon=0.1, clip_value=True)


@pytest.mark.parametrize("options", [{}, {"max_importance_ratio": 1.1}], ids=["uncapped", "capped"])
@pytest.mark.parametrize("name", CLASSES)
def test_delayed_actors_agree(name, options):
    actor, value = discrete_actor(), critic()
    data = collect(actor)
    a, b = build(name, actor, value, delay_actor=True, **options)
    for mine, yours in zip(
        a.target_actor_network_params.values(True, True),
        b.target_actor_network_params.values(True, True),
        strict=True,
    ):
        mine.data.add_(0.3 * torch.randn_like(mine))
        yours.data.copy_(mine)
    a, b = outputs(a, data), outputs(b, data)
    torch.testing.assert_close(a.to_dict(), b.to_dict(), **CLOSE)
    torch.testing.assert_close(gradients(a, [actor]), gradients(b, [actor]), **CLOSE)


@pytest.mark.parametrize("kl_factor", [0.5, 1.0, 2.0])
def test_beta_adapts_alike_over_several_calls(kl_factor):
    actor, value = discrete_actor(), critic()
    data = collect(actor)
    (probe, _) = build("KLPENPPOLoss", actor, value)
    target = probe(data)["kl"].mean().item() / kl_factor
    a, b = build("KLPENPPOLoss", actor, value, dtarg=target, beta=0.7, increment=3.0, decrement=0.25)
    for _ in range(3):
        torch.testing.assert_close(a(data)["loss_objective"], b(data)["loss_objective"], **CLOSE)
        torch.testing.assert_close(a.beta, b.beta)
    for loss in (a, b):
        loss.reset()
    torch.testing.assert_close(a.beta, b.beta)


@pytest.mark.parametrize("name", CLASSES)
def test_missing_advantage_is_estimated_alike(name):
    actor, value = discrete_actor(), critic()
    data = collect(actor, estimated=False)
    a, b = build(name, actor, value)
    for loss in (a, b):
        loss.make_value_estimator(gamma=0.9, lmbda=0.8)
    a, b = outputs(a, data), outputs(b, data)
    # TorchRL keeps γ and λ in float32.
    torch.testing.assert_close(a.to_dict(), b.to_dict(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(a, [actor, value]), gradients(b, [actor, value]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mask_key", [("collector", "mask"), "shifted_valid"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", CLASSES)
def test_masked_losses_agree(name, reduction, mask_key):
    actor, value = discrete_actor(), critic()
    data = collect(actor)
    data[mask_key] = torch.rand(data.shape) < 0.7
    a, b = (outputs(loss, data) for loss in build(name, actor, value, reduction=reduction))
    for key in ("loss_objective", "loss_critic", "loss_entropy"):
        torch.testing.assert_close(a[key], b[key], **CLOSE)
    torch.testing.assert_close(gradients(a, [actor, value]), gradients(b, [actor, value]), **CLOSE)


@pytest.mark.parametrize("options", [{}, {"clip_value": 0.1}, {"entropy_bonus": False}])
@pytest.mark.parametrize("heads", ACTORS)
@pytest.mark.parametrize("name", CLASSES)
def test_keys_agree(name, heads, options):
    a, b = build(name, ACTORS[heads](), critic(), **options)
    # TorchRL also lists the parameters of several heads, which the policy itself writes.
    written = set() if name == "KLPENPPOLoss" else {"params"}
    assert set(a.in_keys) == set(b.in_keys) - written - {("next", "params")}
    assert a.out_keys == b.out_keys
    names = [field for field in vars(b.tensor_keys) if hasattr(a.tensor_keys, field)]
    assert {n: getattr(a.tensor_keys, n) for n in names} == vars(b.tensor_keys)


@pytest.mark.parametrize("name", CLASSES)
def test_keyword_calls_agree(name):
    actor, value = discrete_actor(), critic()
    a, b = build(name, actor, value)
    data = collect(actor, estimated=False)
    arguments = {key if isinstance(key, str) else "_".join(key): data[key] for key in a.in_keys}
    torch.testing.assert_close(a(**arguments), b(**arguments), rtol=1e-5, atol=1e-6)


STATES = {
    "PPOLoss": {"max_importance_ratio": 4.0, "clip_value": 0.1},
    "ClipPPOLoss": {"clip_epsilon": 0.3, "delay_actor": True},
    "KLPENPPOLoss": {"beta": 0.4},
}


@pytest.mark.parametrize("estimator", [False, True], ids=["plain", "with_estimator"])
@pytest.mark.parametrize("name", CLASSES)
def test_checkpoints_are_exchanged_both_ways(name, estimator):
    trained = build(name, discrete_actor(), critic(), **STATES[name])
    for source, target in zip(trained, [getattr(lib, name) for lib in (theirs, ours)], strict=True):
        target = target(discrete_actor(), critic(), **STATES[name])
        if estimator:
            source.make_value_estimator(gamma=0.5, lmbda=0.25)
            target.make_value_estimator()
        target.load_state_dict(source.state_dict(), strict=True)
        for key, entry in target.state_dict().items():
            torch.testing.assert_close(entry, source.state_dict()[key], check_dtype=False)


def test_pair_of_clip_bounds_is_exchanged():
    a, b = build("ClipPPOLoss", discrete_actor(), critic(), clip_epsilon=(0.1, 0.4))
    assert a.state_dict().keys() == b.state_dict().keys()
    a.load_state_dict(b.state_dict(), strict=True)
