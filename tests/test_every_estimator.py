"""What every public estimator, functional and kernel function promises: one that is added without an entry fails.

None waits for the device. Compiled as one graph it gives the eager numbers and gradients, whatever γ and λ are then,
and is compiled once more at most when the size of the data changes, after which it serves all sizes.
"""

import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from fusedrl import estimators, kernels
from fusedrl.estimators import functional
from helpers_compile import DECOMPOSED, assert_compiles_once_more_at_most, gradient, traced_once
from helpers_estimators import OBSERVATION, WRITTEN, critic, no_host_sync, policy, rollout, signals
from tensordict import TensorDict
from tensordict.nn import set_composite_lp_aggregate
from torch import Tensor

# Batch and time. All differ: the compiler takes two lengths that are equal for one. All have more than 32 steps: the
# compiler has another matrix product for less.
SIZES = [(4, 11), (5, 9), (6, 8)]
AGENTS = 3
ATOMS, ACTIONS = 5, 3


@pytest.fixture(autouse=True)
def _no_checks_of_distributions(monkeypatch):
    # Those of their arguments wait for the device.
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)
    with set_composite_lp_aggregate(False):
        yield


# --- estimators -----------------------------------------------------------------------------------------------------


class Estimator(NamedTuple):
    """How to make an estimator, and data of a batch and a time."""

    make: Callable[[], estimators.ValueEstimatorBase]
    data: Callable[[tuple[int, int]], TensorDict]


def case(name: str, data=rollout, actor=None, **options):
    def make():
        given = {} if actor is None else {"actor_network": actor()}
        return getattr(estimators, name)(gamma=0.9, differentiable=True, value_network=critic(), **given, **options)

    return Estimator(make, data)


def team_rollout(size):
    """What each agent sees, and the reward and the masks of the team."""
    return rollout(size, obs=(AGENTS, OBSERVATION))


def acted_rollout(size):
    """With actions, and the log-probabilities that another policy gave them."""
    data, generator = rollout(size), torch.Generator().manual_seed(5)
    data["action"] = torch.randint(2, size, generator=generator)
    data["action_log_prob"] = -2 * torch.rand(size, generator=generator, dtype=torch.float64)
    return data


def n_step_rollout(size):
    """Some of whose steps are padding, and some span two steps."""
    data = rollout(size)
    data["steps_to_next_obs"] = 1 + torch.arange(size[1]).remainder(2).expand(size)[..., None]
    data["collector", "mask"] = torch.arange(size[1]).expand(size) < size[1] - 2
    return data


ESTIMATORS = {
    "GAE": case("GAE", lmbda=0.8),
    "MultiAgentGAE": case("MultiAgentGAE", team_rollout, lmbda=0.8),
    "TD0Estimator": case("TD0Estimator"),
    "TD1Estimator": case("TD1Estimator"),
    "TDLambdaEstimator": case("TDLambdaEstimator", lmbda=0.8),
    "VTrace": case("VTrace", acted_rollout, policy, rho_thresh=0.8, c_thresh=0.7),
}
VARIANTS = {
    "shifted": case("GAE", lmbda=0.8, shifted=True, shifted_budget=2, average_gae=True),
    "n_step_and_padded": case("TDLambdaEstimator", n_step_rollout, lmbda=0.8, average_rewards=True),
}
CASES = {**ESTIMATORS, **VARIANTS}
BASES = {"ValueEstimatorBase", "LambdaEstimatorBase"}

every_case = pytest.mark.parametrize("name", CASES)


def test_every_public_estimator_is_checked_here():
    public = {getattr(estimators, name) for name in estimators.__all__}
    classes = {x for x in public if inspect.isclass(x) and issubclass(x, estimators.ValueEstimatorBase)}
    assert {cls.__name__ for cls in classes} - BASES == set(ESTIMATORS)


SOURCE = re.compile(r"arXiv:|doi\.org|Sutton & Barto 2018|Blelloch 1990|Sutton 1988")


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimators_docstring_has_the_formula_and_the_source(name):
    doc = inspect.getdoc(getattr(estimators, name))
    assert ".. math::" in doc
    assert SOURCE.search(doc)


def made_on(device: torch.device, name: str) -> estimators.ValueEstimatorBase:
    """The estimator, with networks on ``device``, which it doesn't move itself."""
    e = CASES[name].make().to(device)
    for network in (e.value_network, getattr(e, "actor_network", None)):
        if network is not None:
            network.to(device)
    return e


def leaves(data: TensorDict, device: torch.device) -> TensorDict:
    """A copy whose rewards and observations ask for gradients."""
    data = data.to(device).clone()
    for key in (("next", "reward"), "obs", ("next", "obs")):
        data[key].requires_grad_()
    return data


def forward(estimator, data: TensorDict):
    inputs = [data["next", "reward"], data["obs"]]
    data = estimator(data.copy())
    outputs = [data[key] for key in WRITTEN]
    return outputs, gradient(outputs, inputs)


def value_estimate(estimate, data: TensorDict):
    output = estimate(data)
    return output, gradient([output], [data["next", "reward"], data["next", "obs"]])


@every_case
def test_no_estimator_waits_for_the_device(name, device):
    e, data = made_on(device, name), leaves(CASES[name].data(SIZES[0]), device)
    with no_host_sync():
        forward(e, data)
        value_estimate(e.value_estimate, data)


@every_case
def test_a_compiled_estimator_gives_the_eager_numbers_and_serves_every_discount_and_size(name, device):
    e = made_on(device, name)
    compiled = torch.compile(e, fullgraph=True, backend=DECOMPOSED)
    assert_compiles_once_more_at_most(
        lambda size: forward(e, leaves(CASES[name].data(size), device)),
        lambda size: forward(compiled, leaves(CASES[name].data(size), device)),
        *SIZES,
        change=lambda: [x.mul_(0.9) for x in e.buffers()],
    )


@every_case
def test_a_compiled_value_estimate_gives_the_eager_numbers_and_serves_every_discount(name, device):
    e = traced_once(made_on(device, name))
    compiled = torch.compile(e.value_estimate, fullgraph=True, backend="aot_eager")
    assert_compiles_once_more_at_most(
        lambda size: value_estimate(e.value_estimate, leaves(CASES[name].data(size), device)),
        lambda size: value_estimate(compiled, leaves(CASES[name].data(size), device)),
        SIZES[0],  # one is enough: what depends on the size is what `forward` does too
        change=lambda: [x.mul_(0.9) for x in e.buffers()],
    )


# --- functions of tensors -------------------------------------------------------------------------------------------


class Function(NamedTuple):
    """A function, its tensors for a batch and a time, and its numbers, each of which can be a 0-d tensor instead."""

    call: Callable[..., Any]
    inputs: Callable[[tuple[int, int]], dict[str, Tensor]]
    numbers: dict[str, float]
    trained: tuple[str, ...] | None = None
    """What gets a gradient; None: every number and floating-point tensor."""

    def asks_for_gradient(self, name: str) -> bool:
        return self.trained is None or name in self.trained


def of_steps(function, trailing=(), **numbers):
    """A function whose tensors have one shape and the names below."""
    parameters = inspect.signature(function).parameters
    known = {"gamma": 0.9, "lmbda": 0.8, "rho_thresh": 0.8, "c_thresh": 0.7, **numbers}

    def inputs(size):
        x = signals((*size, *trailing))
        named = {
            **x,
            "value": x["state_value"],
            "next_value": x["next_state_value"],
            "increment": x["reward"],
        }
        return {key: value for key, value in named.items() if key in parameters}

    return Function(function, inputs, {key: value for key, value in known.items() if key in parameters})


def per_step_discount(function):
    """``fixed_discount_td_lambda_return``, which is there for a γ that isn't one number."""
    plain = of_steps(function)

    def inputs(size):
        return {**plain.inputs(size), "gamma": torch.linspace(0.5, 1.0, size[1], dtype=torch.float64)}

    return Function(function, inputs, {"lmbda": 0.8})


def transitions(size):
    """What the categorical functions take, of which `categorical_q_loss` trains the distribution alone."""
    batch, generator = size[0] * size[1], torch.Generator().manual_seed(3)
    log_prob, next_log_prob = torch.randn(2, batch, ATOMS, ACTIONS, generator=generator, dtype=torch.float64)
    return {
        "log_prob": log_prob.log_softmax(-2),
        "action": torch.randint(ACTIONS, (batch,), generator=generator),
        "next_log_prob": next_log_prob.log_softmax(-2),
        "support": torch.linspace(-2, 2, ATOMS, dtype=torch.float64),
        "reward": torch.randn(batch, generator=generator, dtype=torch.float64),
        "terminated": torch.rand(batch, generator=generator) < 0.3,
    }


def distributions(size):
    x = transitions(size)
    prob = x["log_prob"][..., 0].exp()
    return {"prob": prob, **{key: x[key] for key in ("support", "reward", "terminated")}}


def numbered(*names, members=(), positive=(), masks=()):
    """Random tensors ``[batch]`` under the ``names``; those of an ensemble have a first dimension for two members."""

    def inputs(size):
        generator = torch.Generator().manual_seed(4)

        def draw(name):
            shape = (2, size[0] * size[1]) if name in members else (size[0] * size[1],)
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
            return x > 0 if name in masks else x.exp() if name in positive else x

        return {name: draw(name) for name in names}

    return inputs


def actions(third):
    """Parameters of a Gaussian policy over two dimensions, and what the functions of it take third."""

    def inputs(size):
        generator = torch.Generator().manual_seed(5)
        loc, scale, x = torch.randn(3, size[0] * size[1], 2, generator=generator, dtype=torch.float64)
        return {"loc": loc, "scale": scale.exp(), third: x}

    return inputs


FUNCTIONALS = {name: of_steps(getattr(functional, name), trailing=(1,)) for name in functional.__all__}
# Those that the reference loop computes, whatever the backend.
REFERENCE = {name.removeprefix("vec_") for name in FUNCTIONALS if name.startswith("vec_")}
# A line for each public function of `fusedrl.kernels` that computes.
KERNELS = {
    "categorical_projection": Function(kernels.categorical_projection, distributions, {"gamma": 0.9}),
    "categorical_q_loss": Function(kernels.categorical_q_loss, transitions, {"gamma": 0.9}),
    "clip_ppo_loss": Function(
        partial(kernels.clip_ppo_loss, normalize=True),
        numbered("log_prob", "old_log_prob", "advantage"),
        {"clip_low": 0.2, "clip_high": 0.3},
        trained=("log_prob",),
    ),
    "ensemble_loss": Function(
        partial(kernels.ensemble_loss, loss_function="smooth_l1"),
        numbered("values", "target", members=("values",)),
        {},
        trained=("values",),
    ),
    "fixed_discount_td_lambda_return": per_step_discount(kernels.fixed_discount_td_lambda_return),
    "gae": of_steps(kernels.gae),
    "normal_log_prob": Function(kernels.normal_log_prob, actions("action"), {}),
    "normal_sample": Function(
        partial(kernels.normal_sample, squash=(-1.0, 1.0)), actions("noise"), {}, trained=("loc", "scale")
    ),
    "reverse_scan": of_steps(kernels.reverse_scan, coefficient=0.9),
    "reward_to_go": of_steps(kernels.reward_to_go),
    "soft_policy_loss": Function(
        kernels.soft_policy_loss,
        numbered("values", "log_prob", members=("values",)),
        {"alpha": 0.3},
        trained=("values", "log_prob"),
    ),
    "td1_return": of_steps(kernels.td1_return),
    "td_lambda_return": of_steps(kernels.td_lambda_return),
    "value_loss": Function(
        partial(kernels.value_loss, loss_function="l2", explained_variance=True),
        numbered("value", "value_target", "old_value"),
        {"clip": 0.2, "coefficient": 0.5},
        trained=("value",),
    ),
    "value_target": Function(
        kernels.value_target,
        numbered("next_values", "reward", "terminated", "log_prob", members=("next_values",), masks=("terminated",)),
        {"gamma": 0.9, "alpha": 0.3},
        trained=(),
    ),
    "vtrace": of_steps(kernels.vtrace),
}
CHOOSE_BACKENDS = {"current_backend", "fastest_backend", "resolve_backend", "use_backend"}
FUNCTIONS = {**FUNCTIONALS, **KERNELS}

every_function = pytest.mark.parametrize("name", FUNCTIONS)


def test_every_public_kernel_function_is_checked_here():
    public = {name for name in kernels.__all__ if inspect.isroutine(getattr(kernels, name))}
    assert public - CHOOSE_BACKENDS == set(KERNELS)
    assert not set(KERNELS) & set(FUNCTIONALS)


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_functions_docstring_has_the_formula_and_the_source(name):
    doc = inspect.getdoc(getattr(kernels, name))
    assert ".. math::" in doc
    assert SOURCE.search(doc)


def results(function, inputs: dict[str, Tensor], numbers: dict[str, Any]):
    outputs = function(**inputs, **numbers)
    outputs = [x for x in ([outputs] if isinstance(outputs, Tensor) else outputs) if x is not None]
    return outputs, gradient(outputs, (x for x in (*inputs.values(), *numbers.values()) if wants_gradient(x)))


def wants_gradient(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def tensors(function: Function, size, device) -> dict[str, Tensor]:
    inputs = {key: x.to(device) for key, x in function.inputs(size).items()}
    for key, x in inputs.items():
        x.requires_grad_(x.is_floating_point() and function.asks_for_gradient(key))
    return inputs


def zero_dimensional(function: Function, device) -> dict[str, Tensor]:
    return {
        key: torch.tensor(x, dtype=torch.float64, device=device, requires_grad=function.asks_for_gradient(key))
        for key, x in function.numbers.items()
    }


@every_function
def test_no_function_waits_for_the_device(name, device):
    function = FUNCTIONS[name]
    inputs, numbers = tensors(function, SIZES[0], device), zero_dimensional(function, device)
    if name in REFERENCE:  # the loop differentiates itself, which no dispatch mode lets it do
        inputs, numbers = ({key: x.detach() for key, x in found.items()} for found in (inputs, numbers))
    with no_host_sync():
        results(function.call, inputs, numbers)


@every_function
def test_a_compiled_function_gives_the_eager_numbers_and_serves_every_discount_and_size(name, device):
    function = FUNCTIONS[name]
    numbers = zero_dimensional(function, device)
    compiled = torch.compile(function.call, fullgraph=True, backend="aot_eager")

    def change():
        with torch.no_grad():
            for x in numbers.values():
                x.mul_(0.9)

    assert_compiles_once_more_at_most(
        lambda size: results(function.call, tensors(function, size, device), numbers),
        lambda size: results(compiled, tensors(function, size, device), numbers),
        *SIZES,
        change=change if numbers else None,
    )


# The functionals but one hand their numbers on. To the compiler a number that `torch.clamp` or `torch.add` takes is a
# part of the operation: these functions are compiled for each, and the losses give them 0-d tensors.
NUMBERS_ARE_COMPILED_IN = {"clip_ppo_loss", "value_loss", "value_target"}
WITH_NUMBERS = ["td0_return_estimate", *(name for name in KERNELS if KERNELS[name].numbers)]


@pytest.mark.parametrize("name", [name for name in WITH_NUMBERS if name not in NUMBERS_ARE_COMPILED_IN])
def test_a_compiled_function_of_a_python_discount_is_compiled_once_more_for_all_others(name, device):
    function = FUNCTIONS[name]
    inputs = tensors(function, SIZES[0], device)
    compiled = torch.compile(function.call, fullgraph=True, backend="aot_eager")
    numbers = [{key: x * scale for key, x in function.numbers.items()} for scale in (1.0, 0.9, 0.8)]
    assert_compiles_once_more_at_most(
        lambda given: results(function.call, inputs, given), lambda given: results(compiled, inputs, given), *numbers
    )
