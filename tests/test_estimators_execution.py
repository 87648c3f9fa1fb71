"""How estimators run: without waiting on the host, compiled as one graph, on the backend that was chosen."""

import pytest
import torch
from fusedrl.kernels import use_backend
from helpers_estimators import (
    ESTIMATORS,
    WRITTEN,
    assert_close,
    critic,
    estimator,
    every_backend,
    every_estimator,
    no_host_sync,
    rollout,
)
from tensordict import TensorDict


@every_estimator
@every_backend
def test_nothing_waits_on_the_host(name, backend):
    e = estimator(name, backend=backend, differentiable=True)
    data = rollout()
    data["next", "reward"].requires_grad_()
    with no_host_sync():
        td = e(data)
        e.value_estimate(data)
        if backend == "torch":  # the reference loop differentiates itself, which no dispatch mode lets it do
            td["advantage"].sum().backward()


@every_estimator
@pytest.mark.parametrize(
    "options",
    [
        {"shifted": True, "shifted_budget": 2},
        {"average_rewards": True},
        {"value_chunk_size": 1},
        {"deactivate_vmap": True},
    ],
    ids=str,
)
def test_nothing_waits_on_the_host_whatever_the_options(name, options):
    e, data = estimator(name, **options), rollout()
    data["next", "reward"] = data["next", "reward"].abs()
    with no_host_sync():
        e(data)


@pytest.mark.parametrize(
    "options", [{"average_gae": True}, {"average_gae": True, "shifted": True}, {"auto_reset_env": True}], ids=str
)
def test_nothing_waits_on_the_host_whatever_the_options_of_gae(options):
    e, data = estimator("GAE", **options), rollout()
    with no_host_sync():
        e(data)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in ESTIMATORS),
        *((name, {"differentiable": True}) for name in ESTIMATORS),
        ("GAE", {"deactivate_vmap": True, "average_gae": True}),
        ("GAE", {"shifted": True, "shifted_budget": 2, "auto_reset_env": True}),
        ("TD0Estimator", {"skip_existing": True}),
        ("TDLambdaEstimator", {"value_chunk_size": 1, "average_rewards": True}),
    ],
    ids=str,
)
def test_compiled_as_one_graph_equals_eager(name, options):
    torch._dynamo.reset()
    network = critic()
    params = TensorDict.from_module(network).data.clone() if "differentiable" in options else None
    e = estimator(name, value_network=network, **options)
    compiled = torch.compile(e, fullgraph=True, backend="eager")
    expected, actual = (f(rollout(), params=params) for f in (e, compiled))
    assert set(actual.keys(True, True)) == set(expected.keys(True, True))
    for key in WRITTEN:
        assert_close(actual[key], expected[key])


@every_estimator
def test_compiled_value_estimate_with_gradients_equals_eager(name):
    torch._dynamo.reset()
    e = estimator(name, gamma=torch.tensor(0.9, dtype=torch.float64))
    compiled = torch.compile(e.value_estimate, fullgraph=True, backend="aot_eager")
    results = []
    for function in (e.value_estimate, compiled):
        data = rollout()
        data["next", "reward"].requires_grad_()
        output = function(data)
        results.append((output, *torch.autograd.grad(output.sum(), data["next", "reward"])))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("name", ["GAE", "TDLambdaEstimator"])
def test_without_flags_the_fast_path_is_taken(name, monkeypatch):
    from fusedrl.kernels import operators

    ran = []
    module = operators.backend_module
    monkeypatch.setattr(operators, "backend_module", lambda backend: ran.append(backend) or module(backend))
    monkeypatch.delenv("FUSEDRL_BACKEND", raising=False)
    estimator(name, backend=None)(rollout())
    estimator(name, backend=None, vectorized=True)(rollout())
    assert set(ran) <= {"torch", "triton"}
    assert len(ran) == 2
    e = estimator(name, backend=None, vectorized=False)
    e(rollout())
    assert ran[2:] == ["reference"]
    e.vectorized = True
    e(rollout())
    assert ran[3] in {"torch", "triton"}
    e.vectorized = False
    e(rollout())
    assert ran[4:] == ["reference"]


def test_the_nearest_choice_of_backend_wins(monkeypatch):
    from fusedrl.kernels import operators

    ran = []
    module = operators.backend_module
    monkeypatch.setattr(operators, "backend_module", lambda backend: ran.append(backend) or module(backend))
    monkeypatch.setenv("FUSEDRL_BACKEND", "torch")
    with use_backend("reference"):
        estimator("GAE", backend=None)(rollout())
        estimator("GAE", backend="torch")(rollout())
    estimator("GAE", backend=None)(rollout())
    assert ran == ["reference", "torch", "torch"]
