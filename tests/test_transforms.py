"""Transforms of `torch.func`, nested and compiled, in which a tensor may hide that a gradient is wanted of it."""

import pytest
import torch
from fusedrl import kernels
from torch.func import grad, jacrev, vmap

DOUBLE = {"dtype": torch.float64}
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


@pytest.fixture(params=["torch", "triton", "reference"])
def any_backend(request):
    return request.param


@pytest.fixture
def data(device):
    torch.manual_seed(0)
    rows = dict(zip(("log_pi", "log_mu", "value", "next_value", "reward"), torch.randn(5, 2, 6, **DOUBLE), strict=True))
    samples = dict(zip(("log_prob", "old_log_prob", "advantage"), torch.randn(3, 8, **DOUBLE), strict=True))
    others = {
        "done": torch.rand(2, 6) < 0.3,
        "values": torch.randn(2, 8, **DOUBLE),
        "log_probs": torch.randn(4, 5, 3, **DOUBLE).log_softmax(1),
        "action": torch.randint(3, (4,)),
        "support": torch.linspace(-2, 2, 5, **DOUBLE),
        "gamma": torch.tensor(0.9, **DOUBLE),
        "clip": torch.tensor(0.2, **DOUBLE),
    }
    return {key: x.to(device) for key, x in (rows | samples | others).items()}


def gae(d, **options):
    rows = (d[key] for key in ("value", "next_value", "reward", "done", "done"))
    return sum(x.square().sum() for x in kernels.gae(d["gamma"], 0.95, *rows, **options))


def vtrace(d, **options):
    rows = (d[key] for key in ("log_pi", "log_mu", "value", "next_value", "reward", "done"))
    return sum(x.square().sum() for x in kernels.vtrace(d["gamma"], *rows, d["done"], **options))


def categorical_q_loss(d, **options):
    reward, terminated = d["reward"].flatten()[:4], d["done"].flatten()[:4]
    constants = d["action"], d["log_probs"].detach(), d["support"], reward, terminated, 0.9
    return kernels.categorical_q_loss(d["log_probs"], *constants, **options)[0].sum()


def clip_ppo_loss(d, **options):
    return kernels.clip_ppo_loss(d["log_prob"], d["old_log_prob"], d["advantage"], d["clip"], 0.2, **options).loss


def value_loss(d, **options):
    return kernels.value_loss(d["log_prob"], d["advantage"], "l2", **options)[0]


def ensemble_loss(d, **options):
    return kernels.ensemble_loss(d["values"], d["advantage"], "l2", **options)[0]


def soft_policy_loss(d, **options):
    return kernels.soft_policy_loss(d["values"], d["log_prob"], 0.2, **options)[0]


def normal_log_prob(d, **options):
    return kernels.normal_log_prob(d["value"], d["reward"].exp(), d["next_value"], **options).square().sum()


def normal_sample(d, **options):
    return kernels.normal_sample(d["value"], d["reward"].exp(), d["next_value"], **options)[0].square().sum()


DIFFERENTIATED = [
    (gae, "gamma"),
    (gae, "value"),
    (vtrace, "log_pi"),
    (vtrace, "value"),
    (categorical_q_loss, "log_probs"),
    (clip_ppo_loss, "log_prob"),
    (clip_ppo_loss, "advantage"),
    (clip_ppo_loss, "clip"),
    (value_loss, "log_prob"),
    (ensemble_loss, "values"),
    (soft_policy_loss, "log_prob"),
    (normal_log_prob, "value"),
    (normal_sample, "value"),
]


every_gradient = pytest.mark.parametrize(
    ("function", "key"), DIFFERENTIATED, ids=lambda x: x if isinstance(x, str) else x.__name__
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def of(function, key, data, backend):
    """``function`` of the entry ``key``, and values of it to map over."""
    changes = 0.1 * torch.randn(3, *data[key].shape, **DOUBLE, device=data[key].device)
    return lambda x: function(data | {key: x}, backend=backend), data[key] + changes


@every_gradient
def test_what_vmap_maps_over_has_its_gradient(function, key, data, any_backend):
    f, several = of(function, key, data, any_backend)
    found = grad(lambda xs: vmap(f)(xs).square().sum())(several)
    leaf = several.clone().requires_grad_()
    (expected,) = torch.autograd.grad(torch.stack([f(x) for x in leaf]).square().sum(), leaf)
    assert expected.any()
    torch.testing.assert_close(found, expected, **CLOSE)
    vmap(f)(leaf).square().sum().backward()
    torch.testing.assert_close(leaf.grad, expected, **CLOSE)


@every_gradient
def test_gradients_can_be_mapped_over(function, key, data, any_backend):
    f, several = of(function, key, data, any_backend)
    torch.testing.assert_close(vmap(grad(f))(several), torch.stack([grad(f)(x) for x in several]), **CLOSE)


@every_gradient
def test_a_jacobian_can_be_differentiated(function, key, data, any_backend):
    f, _ = of(function, key, data, any_backend)

    def square(x):
        return f(x).square().reshape(1)

    found = grad(lambda x: jacrev(square)(x).square().sum())(data[key])
    leaf = data[key].clone().requires_grad_()
    (slope,) = torch.autograd.grad(square(leaf), leaf, create_graph=True)
    (expected,) = torch.autograd.grad(slope.square().sum(), leaf)
    assert expected.any()
    torch.testing.assert_close(found, expected, **CLOSE)


@every_gradient
def test_what_compiled_code_maps_over_has_its_gradient(function, key, data, any_backend):
    torch.compiler.reset()
    f, several = of(function, key, data, any_backend)
    leaf, compiled = several.clone().requires_grad_(), several.clone().requires_grad_()
    vmap(f)(leaf).square().sum().backward()
    torch.compile(lambda xs: vmap(f)(xs).square().sum(), fullgraph=True, backend="aot_eager")(compiled).backward()
    torch.testing.assert_close(compiled.grad, leaf.grad, **CLOSE)


@pytest.mark.parametrize("mapped", ["nothing", "gamma", "gamma of each sample"])
def test_the_distributional_loss_can_be_mapped_over(mapped, data, any_backend):
    log_probs, following = torch.randn(2, 3, 4, 5, 2, **DOUBLE, device=data["done"].device).log_softmax(3)
    action, ends = torch.randint(2, (3, 4)), torch.rand(3, 4) < 0.3
    reward, gammas = torch.randn(3, 4, **DOUBLE), torch.rand(3, 4, **DOUBLE)
    rows = [x.to(log_probs.device) for x in (action, reward, ends)]
    gamma = {"nothing": 0.9, "gamma": gammas[:, 0], "gamma of each sample": gammas}[mapped]
    gamma = gamma if mapped == "nothing" else gamma.to(log_probs.device)
    dims = 0, 0, 0, 0, 0, None if mapped == "nothing" else 0

    def loss(log_prob, next_log_prob, action, reward, ends, gamma):
        constants = data["support"], reward, ends, gamma
        return kernels.categorical_q_loss(log_prob, action, next_log_prob, *constants, backend=any_backend)

    found = vmap(loss, dims)(log_probs, following, *rows, gamma)
    each = [
        loss(*(x[i] for x in (log_probs, following, *rows)), gamma if mapped == "nothing" else gamma[i])
        for i in range(3)
    ]
    for part, wanted in zip(found, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(part, torch.stack(wanted), **CLOSE)


def test_a_support_of_each_distribution_is_refused(data, any_backend):
    def loss(support):
        reward, ends = data["reward"].flatten()[:4], data["done"].flatten()[:4]
        rest = data["action"], data["log_probs"], support, reward, ends, 0.9
        return kernels.categorical_q_loss(data["log_probs"], *rest, backend=any_backend)[0]

    with pytest.raises(RuntimeError, match="can't map over the support"):
        vmap(loss)(data["support"].expand(2, -1))


@every_gradient
def test_compiled_gradients_of_torch_func_are_those_of_eager(function, key, data, any_backend):
    torch.compiler.reset()
    gradient = grad(lambda x: function(data | {key: x}, backend=any_backend))
    expected = gradient(data[key])
    assert expected.any()
    found = torch.compile(gradient, fullgraph=True, backend="aot_eager")(data[key])
    torch.testing.assert_close(found, expected, **CLOSE)
