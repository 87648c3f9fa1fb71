"""`torch.func.grad` in compiled code: there the compiler says that what is differentiated requires no gradient."""

import pytest
import torch
from fusedrl import kernels
from torch.func import grad

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


@pytest.mark.parametrize(("function", "key"), DIFFERENTIATED, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_compiled_gradients_of_torch_func_are_those_of_eager(function, key, data, any_backend):
    torch.compiler.reset()
    gradient = grad(lambda x: function(data | {key: x}, backend=any_backend))
    expected = gradient(data[key])
    assert expected.any()
    found = torch.compile(gradient, fullgraph=True, backend="aot_eager")(data[key])
    torch.testing.assert_close(found, expected, **CLOSE)
