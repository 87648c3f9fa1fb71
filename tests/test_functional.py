"""What the functionals promise, on tensors, whatever the backend."""

import inspect
import math

import fusedrl.estimators.functional as F
import pytest
import torch
from fusedrl import kernels
from helpers_estimators import BACKENDS, assert_close, masks, no_host_sync, signals

VECTORISED = [
    name for name in F.__all__ if name.startswith("vec_") or name in ("reward2go", "vtrace_advantage_estimate")
]
PLAIN = [name for name in F.__all__ if name not in VECTORISED]
BOOTSTRAPPING = [name for name in F.__all__ if name != "reward2go"]
WITH_TIME = [name for name in F.__all__ if not name.startswith("td0")]
CASES = [(name, None) for name in PLAIN] + [(name, backend) for name in VECTORISED for backend in BACKENDS]
CASE_IDS = [f"{name}-{backend}" if backend else name for name, backend in CASES]
GAMMA, LMBDA = 0.9, 0.8

every_case = pytest.mark.parametrize(("name", "backend"), CASES, ids=CASE_IDS)


def call(name, backend=None, **kwargs):
    """Call a functional with those of ``kwargs`` that it takes; always a tuple of results."""
    function = getattr(F, name)
    parameters = inspect.signature(function).parameters
    kwargs = {"gamma": GAMMA, "lmbda": LMBDA, **kwargs, **({"backend": backend} if backend else {})}
    result = function(**{key: x for key, x in kwargs.items() if key in parameters})
    return result if isinstance(result, tuple) else (result,)


def written_out(gamma, lmbda, log_pi, log_mu, state_value, next_state_value, reward, done, terminated):
    """Every estimate of one trajectory of numbers, each sum written as Python would be by hand."""
    steps = range(len(reward))
    value_target, td1, to_go, advantage, vtrace, vtrace_advantage = {}, {}, {}, {}, {}, {}
    for t in reversed(steps):
        ends = done[t] or terminated[t]
        last = ends or t == len(reward) - 1
        v, nv, keep = state_value[t], next_state_value[t], 0.0 if terminated[t] else 1.0
        tail = nv if last else value_target[t + 1]
        value_target[t] = reward[t] + gamma * keep * ((1 - lmbda) * nv + lmbda * tail)
        td1[t] = reward[t] + gamma * keep * (nv if last else td1[t + 1])
        to_go[t] = reward[t] + (0.0 if done[t] or t == len(reward) - 1 else gamma * to_go[t + 1])
        delta = reward[t] + gamma * keep * nv - v
        advantage[t] = delta + (0.0 if last else gamma * lmbda * advantage[t + 1])
        weight = min(1.0, math.exp(log_pi[t] - log_mu[t]))
        rest = 0.0 if last else gamma * weight * (vtrace[t + 1] - state_value[t + 1])
        vtrace[t] = v + weight * delta + rest
        vtrace_advantage[t] = weight * (reward[t] + gamma * (keep * nv if last else vtrace[t + 1]) - v)
    td0 = [reward[t] + (0.0 if terminated[t] else gamma * next_state_value[t]) for t in steps]

    def minus_value(x):
        return [x[t] - state_value[t] for t in steps]

    return {
        "generalized_advantage_estimate": (
            [advantage[t] for t in steps],
            [advantage[t] + state_value[t] for t in steps],
        ),
        "td0_return_estimate": (td0,),
        "td0_advantage_estimate": (minus_value(td0),),
        "td1_return_estimate": ([td1[t] for t in steps],),
        "td1_advantage_estimate": (minus_value(td1),),
        "td_lambda_return_estimate": ([value_target[t] for t in steps],),
        "td_lambda_advantage_estimate": (minus_value(value_target),),
        "reward2go": ([to_go[t] for t in steps],),
        "vtrace_advantage_estimate": ([vtrace_advantage[t] for t in steps], [vtrace[t] for t in steps]),
    }


@every_case
def test_numbers_agree_with_the_equations_written_out_in_python(name, backend):
    inputs = signals((1, 12, 1), seed=3)
    assert inputs["done"].any()
    assert (inputs["done"] & ~inputs["terminated"]).any()
    numbers = {key: x.flatten().tolist() for key, x in inputs.items()}
    expected = written_out(GAMMA, LMBDA, **numbers)[name.removeprefix("vec_")]
    for actual, wanted in zip(call(name, backend, **inputs), expected, strict=True):
        assert_close(actual.flatten(), torch.tensor(wanted, dtype=torch.float64))


@every_case
def test_gamma_of_zero_and_lambda_of_zero_are_exact(name, backend):
    inputs = signals()
    for gamma, lmbda in ((0.0, LMBDA), (GAMMA, 0.0), (0.0, 0.0), (1e-9, 1e-9)):
        (actual, *_) = call(name, backend, **inputs, gamma=gamma, lmbda=lmbda)
        (tensors, *_) = call(name, backend, **inputs, gamma=torch.tensor(gamma), lmbda=torch.tensor(lmbda))
        assert actual.isfinite().all()
        assert_close(tensors, actual, rtol=1e-6, atol=1e-6)
        if gamma == 0.0:
            value = inputs["state_value"] if "advantage" in name else 0
            weight = (inputs["log_pi"] - inputs["log_mu"]).exp().clamp_max(1) if name.startswith("vtrace") else 1
            assert_close(actual, weight * (inputs["reward"] - value))


@every_case
@pytest.mark.parametrize("shape", [(), (1,), (2, 1, 1), (9, 1), (2, 9, 1)], ids=str)
def test_tensor_gamma_and_lambda_of_any_broadcastable_shape_equal_the_numbers(name, backend, shape):
    inputs = signals()
    gamma, lmbda = (torch.full(shape, x, dtype=torch.float64) for x in (GAMMA, LMBDA))
    for actual, expected in zip(
        call(name, backend, **inputs, gamma=gamma, lmbda=lmbda), call(name, backend, **inputs), strict=True
    ):
        assert_close(actual, expected)


@every_case
@pytest.mark.parametrize("shape", [(2, 1, 1), (2, 0, 1), (0, 5, 1), (0, 0, 1), (3, 1)], ids=str)
def test_degenerate_lengths_give_the_shape_of_the_reward(name, backend, shape):
    for x in call(name, backend, **signals(shape)):
        assert x.shape == shape
        assert x.isfinite().all()


@pytest.mark.parametrize(("name", "backend"), [c for c in CASES if c[0] in WITH_TIME])
def test_time_can_be_any_dimension_of_any_layout(name, backend):
    inputs = signals((3, 4, 7, 2))
    expected = call(name, backend, **inputs)
    for dim in (0, 1, -1, -4):
        moved = {key: x.movedim(-2, dim) for key, x in inputs.items()}
        for layout in (moved, {key: x.contiguous() for key, x in moved.items()}):
            for actual, wanted in zip(call(name, backend, **layout, time_dim=dim), expected, strict=True):
                assert_close(actual.movedim(dim, -2), wanted)
    flat = {key: x[0, 0, :, 0] for key, x in inputs.items()}
    for actual, wanted in zip(call(name, backend, **flat, time_dim=-1), expected, strict=True):
        assert_close(actual, wanted[0, 0, :, 0])


@pytest.mark.parametrize(("name", "backend"), [c for c in CASES if c[0] in BOOTSTRAPPING])
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf")])
def test_next_value_of_a_terminal_step_is_ignored_forward_and_backward(name, backend, garbage):
    inputs = signals()
    poisoned = dict(inputs, next_state_value=inputs["next_state_value"].clone())
    poisoned["next_state_value"][inputs["terminated"]] = garbage
    results = []
    for case in (inputs, poisoned):
        leaves = {k: case[k].clone().requires_grad_() for k in ("reward", "state_value", "next_state_value")}
        outputs = call(name, backend, **{**case, **leaves})
        grads = torch.autograd.grad(sum(x.sum() for x in outputs), list(leaves.values()), allow_unused=True)
        results.append([*outputs, *(g for g in grads if g is not None)])
    for clean, dirty in zip(*results, strict=True):
        assert_close(dirty, clean)


@every_case
def test_terminated_without_done_ends_the_trajectory(name, backend):
    inputs = signals()
    inputs["terminated"][:, 4] = True
    without = dict(inputs, done=inputs["done"] & ~inputs["terminated"])
    if name == "reward2go":
        pytest.skip("takes no terminated")
    for actual, expected in zip(
        call(name, backend, **without),
        call(name, backend, **dict(inputs, done=inputs["done"] | inputs["terminated"])),
        strict=True,
    ):
        assert_close(actual, expected)


@pytest.mark.parametrize(("name", "backend"), [c for c in CASES if c[0] in BOOTSTRAPPING])
def test_terminated_defaults_to_done(name, backend):
    inputs = signals()
    expected = call(name, backend, **dict(inputs, terminated=inputs["done"]))
    for actual, wanted in zip(call(name, backend, **dict(inputs, terminated=None)), expected, strict=True):
        assert_close(actual, wanted)


@every_case
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32])
def test_masks_of_any_dtype_are_true_where_not_zero(name, backend, dtype):
    inputs = signals()
    cast = {k: inputs[k].to(dtype) * 3 for k in ("done", "terminated")}
    for actual, expected in zip(call(name, backend, **{**inputs, **cast}), call(name, backend, **inputs), strict=True):
        assert_close(actual, expected)


@every_case
def test_integer_rewards_are_computed_in_floating_point(name, backend):
    inputs = signals(dtype=torch.float32)
    reward = torch.arange(18).view(2, 9, 1) - 9
    expected = call(name, backend, **dict(inputs, reward=reward.float()))
    for actual, wanted in zip(call(name, backend, **dict(inputs, reward=reward)), expected, strict=True):
        assert actual.dtype == torch.float32
        assert_close(actual, wanted)


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_and_rounded_once(name, backend, dtype):
    inputs = signals((2, 40, 1), dtype=dtype)
    wide = {k: x.float() if x.is_floating_point() else x for k, x in inputs.items()}
    for actual, expected in zip(call(name, backend, **inputs), call(name, backend, **wide), strict=True):
        assert actual.dtype == dtype
        assert torch.equal(actual, expected.to(dtype))


@every_case
def test_float64_keeps_the_precision_of_gamma(name, backend):
    inputs = signals((1, 30, 1), seed=1)
    inputs["done"][:], inputs["terminated"][:] = False, False
    numbers = {key: x.flatten().tolist() for key, x in inputs.items()}
    expected = written_out(0.99, 0.97, **numbers)[name.removeprefix("vec_")]
    for gamma, lmbda in (
        (0.99, 0.97),
        (torch.tensor(0.99).double() * 0 + 0.99, torch.tensor(0.97, dtype=torch.float64)),
    ):
        for actual, wanted in zip(call(name, backend, **inputs, gamma=gamma, lmbda=lmbda), expected, strict=True):
            assert_close(actual.flatten(), torch.tensor(wanted, dtype=torch.float64))


def check_hyperparameter_gradients(name, backend, inputs):
    gamma, lmbda = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (GAMMA, LMBDA))
    takes_lambda = "lmbda" in inspect.signature(getattr(F, name)).parameters

    def estimate(*hyperparameters):
        return call(name, backend, **inputs, **dict(zip(("gamma", "lmbda"), hyperparameters, strict=False)))

    assert torch.autograd.gradcheck(estimate, (gamma, lmbda) if takes_lambda else (gamma,))


@every_case
def test_gradients_to_scalar_gamma_and_lambda_agree_with_finite_differences(name, backend):
    check_hyperparameter_gradients(name, backend, signals((2, 6, 1)))


@pytest.mark.parametrize("name", BOOTSTRAPPING)
def test_next_value_of_a_terminal_step_stays_out_of_the_gradient_of_gamma(name):
    inputs = signals((2, 6, 1))
    assert inputs["terminated"].any()
    inputs["next_state_value"][inputs["terminated"]] = float("nan")
    check_hyperparameter_gradients(name, "torch" if name in VECTORISED else None, inputs)


@pytest.mark.parametrize("name", [n for n in VECTORISED if n != "reward2go"])
def test_a_hundred_thousand_undiscounted_steps_are_exact(name):
    steps = 100_000
    reward = torch.ones(1, steps, 1)
    zero = torch.zeros_like(reward)
    done = torch.zeros_like(reward, dtype=torch.bool)
    (result, *_) = call(
        name,
        "torch",
        gamma=1.0,
        lmbda=1.0,
        log_pi=zero,
        log_mu=zero,
        state_value=zero,
        next_state_value=zero,
        reward=reward,
        done=done,
        terminated=done,
    )
    assert torch.equal(result.flatten(), torch.arange(steps, 0, -1.0))


@pytest.mark.parametrize("name", [n for n in VECTORISED if n != "reward2go"])
def test_per_step_gamma_makes_no_matrix_over_time(name):
    # [B, T, T] in float32 would take 40 GB here.
    inputs = signals((1, 100_000, 1), dtype=torch.float32)
    gamma = torch.full_like(inputs["reward"], GAMMA)
    for actual, expected in zip(call(name, "torch", **inputs, gamma=gamma), call(name, "torch", **inputs), strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("kind", ["td1", "td_lambda"])
@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("target", ["return", "advantage"])
def test_without_rolling_gamma_each_trajectory_is_discounted_with_the_gamma_of_its_first_step(kind, backend, target):
    inputs = signals((2, 6, 1))
    generator = torch.Generator().manual_seed(5)
    gamma = torch.rand(2, 6, 1, generator=generator, dtype=torch.float64)
    prefix = "" if backend is None else "vec_"
    (actual,) = call(f"{prefix}{kind}_{target}_estimate", backend, **inputs, gamma=gamma, rolling_gamma=False)
    for b in range(2):
        for t in range(6):
            rest = {key: x[b : b + 1, t:] for key, x in inputs.items()}
            (expected,) = call(f"{kind}_{target}_estimate", **rest, gamma=gamma[b, t].item())
            assert_close(actual[b, t], expected[0, 0])


@pytest.mark.parametrize("gamma", [GAMMA, torch.tensor(GAMMA, dtype=torch.float64)], ids=["number", "0-d"])
@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("target", ["return", "advantage"])
def test_without_rolling_gamma_a_trajectory_has_the_lambda_of_its_first_step_too(gamma, backend, target):
    inputs = signals((2, 6, 1))
    lmbda = torch.rand(2, 6, 1, generator=torch.Generator().manual_seed(5), dtype=torch.float64).requires_grad_()
    found = []
    for discount in (gamma, torch.full((2, 6, 1), GAMMA, dtype=torch.float64)):
        name = f"{'' if backend is None else 'vec_'}td_lambda_{target}_estimate"
        (actual,) = call(name, backend, **inputs, gamma=discount, lmbda=lmbda, rolling_gamma=False)
        found.append((actual, *torch.autograd.grad(actual.square().sum(), lmbda)))
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected)
    (rolling,) = call("vec_td_lambda_return_estimate", "torch", **inputs, gamma=gamma, lmbda=lmbda)
    assert (rolling - found[0][0]).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["td1", "td_lambda"])
def test_rolling_gamma_makes_no_difference_to_a_constant(kind):
    inputs = signals()
    (expected,) = call(f"vec_{kind}_return_estimate", "torch", **inputs)
    for gamma in (GAMMA, torch.tensor(GAMMA, dtype=torch.float64), torch.full((2, 9, 1), GAMMA, dtype=torch.float64)):
        for rolling in (None, True, False):
            (actual,) = call(f"vec_{kind}_return_estimate", "torch", **inputs, gamma=gamma, rolling_gamma=rolling)
            assert_close(actual, expected)


@every_case
@pytest.mark.parametrize("argument", ["state_value", "next_state_value", "done", "terminated"])
def test_a_shape_that_differs_is_an_error_that_names_the_argument(name, backend, argument):
    if argument not in inspect.signature(getattr(F, name)).parameters:
        pytest.skip("no such argument")
    inputs = signals()
    inputs[argument] = inputs[argument][:, :1]
    error = ValueError if name == "reward2go" else RuntimeError
    with pytest.raises(error, match=rf"{argument} has shape \(2, 1, 1\).*\(2, 9, 1\)"):
        call(name, backend, **inputs)


@pytest.mark.parametrize("shape", [(4, 1, 1), (2, 9, 2), (1, 2, 9, 1)], ids=str)
@every_case
def test_a_gamma_that_does_not_broadcast_is_an_error(name, backend, shape):
    with pytest.raises(RuntimeError, match="gamma"):
        call(name, backend, **signals(), gamma=torch.full(shape, GAMMA))


@pytest.mark.parametrize("name", VECTORISED)
def test_an_unknown_backend_is_an_error_that_lists_the_backends(name):
    with pytest.raises(ValueError, match=r"'tritn'.*reference"):
        call(name, "tritn", **signals())


def test_td0_return_needs_to_know_terminal_steps():
    inputs = signals()
    with pytest.raises(TypeError, match="terminated"):
        F.td0_return_estimate(GAMMA, inputs["next_state_value"], inputs["reward"])


@pytest.mark.parametrize("name", ["reward", "done"])
@pytest.mark.parametrize("wrong", [None, [1.0]], ids=["None", "list"])
def test_reward_to_go_and_td0_name_what_is_no_tensor(name, wrong):
    right = {"reward": torch.ones(3), "done": torch.zeros(3)}
    for function in (F.reward2go, kernels.reward_to_go):
        with pytest.raises(TypeError, match=f"{name} must be a real tensor"):
            function(**right | {name: wrong}, gamma=GAMMA)
    if wrong is not None or name == "reward":
        with pytest.raises(TypeError, match=f"{name.replace('done', 'terminated')} must be a real tensor"):
            F.td0_return_estimate(GAMMA, torch.ones(3), **right | {name: wrong})


def test_td0_return_of_a_single_step_without_dimensions():
    reward, next_value = torch.tensor(1.0), torch.tensor(2.0)
    for terminal, expected in ((False, 1 + GAMMA * 2), (True, 1.0)):
        actual = F.td0_return_estimate(GAMMA, next_value, reward, torch.tensor(terminal))
        assert_close(actual, torch.tensor(expected))


def test_td0_return_takes_done_in_place_of_terminated():
    inputs = signals()
    next_value, reward, done = inputs["next_state_value"], inputs["reward"], inputs["done"]
    assert_close(
        F.td0_return_estimate(GAMMA, next_value, reward, done=done),
        F.td0_return_estimate(GAMMA, next_value, reward, done),
    )


@pytest.mark.parametrize("shape", [(9,), (2, 9), (2, 9, 1), (2, 9, 3)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_reward2go_keeps_the_shape_of_the_reward(shape, backend):
    reward = torch.ones(shape)
    done, _ = masks(shape)
    for time_dim in range(-len(shape), len(shape)):
        assert F.reward2go(reward, done, GAMMA, time_dim=time_dim, backend=backend).shape == shape


@every_case
def test_nothing_waits_on_the_host(name, backend):
    inputs = signals()
    gamma, lmbda = torch.tensor(GAMMA), torch.tensor(LMBDA)
    reward = inputs["reward"].requires_grad_()
    with no_host_sync():
        outputs = call(name, backend, **dict(inputs, reward=reward), gamma=gamma, lmbda=lmbda)
        if backend == "torch":  # the reference loop differentiates itself, which no dispatch mode lets it do
            sum(x.sum() for x in outputs).backward()


@pytest.mark.parametrize("name", [*VECTORISED, "td0_return_estimate", "generalized_advantage_estimate"])
def test_compiled_with_a_tensor_gamma_equals_eager(name):
    torch._dynamo.reset()
    backend = "torch" if name in VECTORISED else None
    inputs = signals()
    inputs["reward"].requires_grad_()
    gamma, lmbda = torch.tensor(GAMMA, dtype=torch.float64), torch.tensor(LMBDA, dtype=torch.float64)

    def estimate(gamma, lmbda, **inputs):
        return call(name, backend, **inputs, gamma=gamma, lmbda=lmbda)

    compiled = torch.compile(estimate, fullgraph=True, backend="aot_eager")
    results = []
    for function in (estimate, compiled):
        outputs = function(gamma, lmbda, **inputs)
        results.append([*outputs, *torch.autograd.grad(sum(x.sum() for x in outputs), [inputs["reward"]])])
    for eager, actual in zip(*results, strict=True):
        assert_close(actual, eager)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["vec_generalized_advantage_estimate", "vec_td_lambda_return_estimate"])
def test_the_compiled_graph_does_not_grow_with_time(name, backend):
    sizes = []

    def count_nodes(graph, example_inputs):
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    for steps in (4, 400):
        torch._dynamo.reset()
        torch.compile(
            lambda **inputs: call(name, backend, **inputs), fullgraph=True, backend=count_nodes, dynamic=False
        )(**signals((1, steps, 1)))
    assert sizes[0] == sizes[1]
