"""How estimators run with other options than their own: on the host's time, compiled, on the backend that was chosen.

What every estimator promises by default is in test_every_estimator.py.
"""

import pytest
import torch
from fusedrl.kernels import use_backend
from helpers_estimators import (
    WRITTEN,
    assert_close,
    critic,
    estimator,
    every_estimator,
    no_host_sync,
    rollout,
)
from tensordict import TensorDict


@every_estimator
def test_the_reference_loop_does_not_wait_on_the_host_either(name):
    e, data = estimator(name, backend="reference", differentiable=True), rollout()
    with no_host_sync():
        e(data)
        e.value_estimate(data)


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
        ("GAE", {"differentiable": True}),
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


@pytest.mark.parametrize("name", ["GAE", "TDLambdaEstimator"])
def test_without_flags_the_fast_path_is_taken(name, monkeypatch):
    from fusedrl.kernels import scan_operators

    ran = []
    module = scan_operators.backend_module
    monkeypatch.setattr(scan_operators, "backend_module", lambda backend: ran.append(backend) or module(backend))
    monkeypatch.setattr("fusedrl.kernels.backend._process_backend", None)
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
    from fusedrl.kernels import scan_operators

    ran = []
    module = scan_operators.backend_module
    monkeypatch.setattr(scan_operators, "backend_module", lambda backend: ran.append(backend) or module(backend))
    monkeypatch.setattr("fusedrl.kernels.backend._process_backend", "torch")
    with use_backend("reference"):
        estimator("GAE", backend=None)(rollout())
        estimator("GAE", backend="torch")(rollout())
    estimator("GAE", backend=None)(rollout())
    assert ran == ["reference", "torch", "torch"]
