"""The functionals agree with TorchRL's, where those are right: values, gradients, signatures."""

import inspect

import fusedrl.estimators.functional as ours
import pytest
import torch
from helpers_estimators import masks

pytest.importorskip("torchrl")
import torchrl.objectives.value.functional as theirs

# TorchRL discounts in float32 whatever the dtype of the data: 0.9 is off by 3e-8, and sums of a dozen terms follow.
TOLERANCE = {"rtol": 2e-6, "atol": 2e-6}
GAMMA, LMBDA = 0.9, 0.8
NAMES = ours.__all__
SHAPES = [(3, 12, 1), (2, 3, 12, 1), (3, 12, 4), (12, 1)]


def arguments(name, shape, seed, extra):
    generator = torch.Generator().manual_seed(seed)
    done, terminated = masks(shape, seed)
    everything = {"gamma": GAMMA, "lmbda": LMBDA, "done": done, "terminated": terminated, **extra}
    for key in ("state_value", "next_state_value", "reward", "log_pi", "log_mu"):
        everything[key] = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    parameters = inspect.signature(getattr(theirs, name)).parameters
    return {key: x for key, x in everything.items() if key in parameters}


def results_and_gradients(function, arguments):
    outputs = function(**arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    leaves = [x for x in arguments.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    weights = [torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype).view_as(x) * (i + 1) for i, x in enumerate(outputs)]
    return [*outputs, *torch.autograd.grad(outputs, leaves, weights)]


def assert_parity(name, arguments, **ours_only):
    expected = results_and_gradients(getattr(theirs, name), arguments)
    actual = results_and_gradients(getattr(ours, name), {**arguments, **ours_only})
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e.view_as(a), **TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_the_signature_is_theirs_and_at_most_a_backend_more(name):
    expected = inspect.signature(getattr(theirs, name)).parameters
    actual = inspect.signature(getattr(ours, name)).parameters
    assert [x for x in actual if x != "backend"] == list(expected)
    for x, parameter in expected.items():
        assert (actual[x].kind, actual[x].default) == (parameter.kind, parameter.default)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(name, shape):
    for seed in range(3):
        assert_parity(name, arguments(name, shape, seed, {}))


@pytest.mark.parametrize("name", [x for x in NAMES if "time_dim" in inspect.signature(getattr(ours, x)).parameters])
@pytest.mark.parametrize("time_dim", [0, 1, -3])
def test_values_and_gradients_for_time_elsewhere(name, time_dim):
    assert_parity(name, arguments(name, (4, 5, 6, 1), 0, {"time_dim": time_dim}))


@pytest.mark.parametrize(
    "name", [x for x in NAMES if "rolling_gamma" in inspect.signature(getattr(ours, x)).parameters]
)
@pytest.mark.parametrize("rolling_gamma", [None, True, False])
def test_values_and_gradients_for_a_gamma_per_step(name, rolling_gamma):
    gamma = torch.rand(3, 12, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    given = arguments(name, (3, 12, 1), 0, {"gamma": gamma, "rolling_gamma": rolling_gamma})
    if rolling_gamma is not False:
        assert_parity(name, given)
        return
    # Theirs has no vectorised version of it, and its TD(1) bootstraps a trajectory that goes on past the last step
    # with another discount than its TD(λ) at λ = 1, which is right.
    reference = name.removeprefix("vec_").replace("td1", "td_lambda")
    expected = results_and_gradients(getattr(theirs, reference), {"lmbda": 1.0, **given})
    for a, e in zip(results_and_gradients(getattr(ours, name), given), expected, strict=True):
        torch.testing.assert_close(a, e, **TOLERANCE)


@pytest.mark.parametrize("name", ["generalized_advantage_estimate", "vec_generalized_advantage_estimate"])
def test_values_and_gradients_for_gamma_and_lambda_per_step(name):
    generator = torch.Generator().manual_seed(1)
    gamma, lmbda = torch.rand(2, 3, 12, 1, generator=generator, dtype=torch.float64)
    # Their loop takes numbers alone, so both of ours are compared with their vectorised function.
    given = arguments(name, (3, 12, 1), 0, {"gamma": gamma, "lmbda": lmbda})
    expected = results_and_gradients(theirs.vec_generalized_advantage_estimate, given)
    for a, e in zip(results_and_gradients(getattr(ours, name), given), expected, strict=True):
        torch.testing.assert_close(a, e, **TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_a_shape_that_differs_is_the_same_kind_of_error(name):
    given = arguments(name, (3, 12, 1), 0, {})
    given["done" if "done" in given else "terminated"] = torch.zeros(3, 1, 1, dtype=torch.bool)
    if name == "td0_return_estimate":
        del given["done"]
        given["terminated"] = torch.zeros(3, 1, 1, dtype=torch.bool)
    with pytest.raises((RuntimeError, ValueError)) as expected:
        getattr(theirs, name)(**given)
    with pytest.raises(expected.type):
        getattr(ours, name)(**given)
