"""Gradients of the action-value losses, once, twice and forwards; and what the compiler makes of them."""

import math

import pytest
import torch
from fusedrl.kernels import ensemble_loss, soft_policy_loss, use_backend, value_target
from helpers_action_value import BACKENDS, of_ensemble, of_policy, of_target, problem

PRIORITIES = ("abs", "square")
LOSS_FUNCTIONS, REDUCTIONS = ("l1", "l2", "smooth_l1"), ("mean", "sum", "none")


@pytest.fixture(params=BACKENDS)
def any_backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn."""
    return request.param


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def away_from_kinks(arguments):
    """No error near 0 or ±1, no two values near each other: finite differences must not cross a kink."""
    errors = torch.tensor([[0.5, -0.6, 2.0, -2.5, 0.3], [-2.0, 0.7, -0.4, 3.0, 1.5]], dtype=torch.float64)
    values = (arguments["target"] + errors.to(arguments["target"].device)).requires_grad_()
    return arguments | {"values": values}


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("per_member", [False, True])
@pytest.mark.parametrize("loss_function", LOSS_FUNCTIONS)
def test_gradcheck_of_the_ensemble_loss(any_backend, device, loss_function, per_member, reduction, weighed) -> None:
    arguments = of_ensemble(away_from_kinks(problem(device=device, mask=weighed, weights=weighed)))
    values = arguments.pop("values")

    def loss(x):
        options = {"loss_function": loss_function, "per_member": per_member, "reduction": reduction}
        return ensemble_loss(x, **arguments, **options, backend=any_backend).loss

    assert torch.autograd.gradcheck(loss, values, fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, values, fast_mode=True)


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck_of_the_policy_loss(any_backend, device, reduction, weighed) -> None:
    arguments = of_policy(away_from_kinks(problem(device=device, mask=weighed, weights=weighed)))
    inputs = (arguments.pop("values"), arguments.pop("log_prob"))

    def loss(values, log_prob):
        return soft_policy_loss(values, log_prob, 0.3, **arguments, reduction=reduction, backend=any_backend).loss

    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, inputs, fast_mode=True)


def test_the_second_derivative_of_l2_is_two(any_backend, device) -> None:
    """A gradient without a graph of its own would make this zero, or an error."""
    values = torch.randn(2, 3, dtype=torch.float64, device=device, requires_grad=True)
    loss, _ = ensemble_loss(values, torch.zeros_like(values[0]), "l2", reduction="sum", backend=any_backend)
    (gradient,) = torch.autograd.grad(loss, values, create_graph=True)
    assert torch.equal(torch.autograd.grad(gradient.sum(), values)[0], torch.full_like(values, 2.0))


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_made_to_be_differentiated_are_the_same_gradients(any_backend, device, reduction, weighed) -> None:
    """gradgradcheck compares these with themselves; here they meet the kernels', at masked NaNs too."""
    arguments = problem((6,), 3, device=device, mask=weighed, weights=weighed)
    if weighed:
        for name in ("values", "log_prob", "target", "weights"):
            arguments[name].data[..., ~arguments["mask"]] = math.nan
    leaves = (arguments["values"], arguments["log_prob"])
    for loss_function in LOSS_FUNCTIONS:
        loss, _ = ensemble_loss(
            **of_ensemble(arguments), loss_function=loss_function, reduction=reduction, backend=any_backend
        )
        policy = soft_policy_loss(**of_policy(arguments), alpha=0.3, reduction=reduction, backend=any_backend).loss
        total = 3 * loss.sum() + policy.sum()
        plain, again = (
            torch.autograd.grad(total, leaves, retain_graph=True, create_graph=create) for create in (False, True)
        )
        assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-15) for a, b in zip(plain, again, strict=True))


def test_forward_mode_agrees_with_the_gradient(any_backend, device) -> None:
    arguments = problem(device=device)
    values, log_prob, target = (arguments[k].detach() for k in ("values", "log_prob", "target"))
    for function in (
        lambda x: ensemble_loss(x, target, "l2", backend=any_backend).loss,
        lambda x: soft_policy_loss(x, log_prob, 0.3, backend=any_backend).loss,
    ):
        tangent = torch.linspace(-1, 2, values.numel(), dtype=values.dtype, device=device).view_as(values)
        _, along = torch.func.jvp(function, (values,), (tangent,))
        leaf = values.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(leaf), leaf)
        torch.testing.assert_close(along, (gradient * tangent).sum())


# --- compiled -----------------------------------------------------------------------------------------------------


def update(values, log_prob, target, reward, terminated, gamma, alpha, mask, weights, reduction, backend):
    """All three functions in a row, as a loss calls them; differentiable in values and log_prob."""
    y, next_value = value_target(
        values.detach() + 1, reward, terminated, gamma, log_prob=log_prob, alpha=alpha, backend=backend
    )
    options = {"mask": mask, "weights": weights, "reduction": reduction, "backend": backend}
    loss, priority = ensemble_loss(2 * values, y + target, "smooth_l1", **options)
    policy, entropy = soft_policy_loss(values, 2 * log_prob, alpha, **options)
    return (loss + policy).sum(), priority, next_value, entropy


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("batch", [(4,), (2, 3)])
@pytest.mark.parametrize("name", [*BACKENDS, "verify"])
def test_compiled_equals_eager(device, name, batch, reduction, weighed) -> None:
    arguments = problem(batch, device=device, mask=weighed, weights=weighed)
    scalars = {k: torch.tensor(x, device=device) for k, x in (("gamma", 0.9), ("alpha", 0.3))}
    results = []
    for function in (update, torch.compile(update, fullgraph=True, backend="aot_eager")):
        total, *rest = function(**arguments, **scalars, reduction=reduction, backend=name)
        gradients = torch.autograd.grad(total, (arguments["values"], arguments["log_prob"]))
        results.append((total, *rest, *gradients))
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(*results, strict=True))


def test_inductor_gives_the_same_numbers(device) -> None:
    arguments = problem((2, 3), device=device, mask=True, weights=True)
    # Not contiguous: the compiler must be told the layouts that results and gradients really have.
    arguments = {k: x.detach().transpose(-1, -2).contiguous().transpose(-1, -2) for k, x in arguments.items()}
    leaves = [arguments[k].requires_grad_() for k in ("values", "log_prob")]
    options = {"gamma": 0.9, "alpha": 0.3, "reduction": "mean", "backend": "torch"}
    expected = torch.autograd.grad(update(**arguments, **options)[0], leaves)
    found = torch.autograd.grad(torch.compile(update, fullgraph=True)(**arguments, **options)[0], leaves)
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(found, expected, strict=True))


def test_new_coefficients_do_not_recompile(any_backend, device) -> None:
    compiled = []

    def count(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        compiled.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return graph

    function = torch.compile(update, fullgraph=True, backend=count)
    arguments = problem(device=device)
    with torch.no_grad():
        for x in (0.9, 0.8, 1.0):
            scalars = {k: torch.tensor(x, device=device) for k in ("gamma", "alpha")}
            function(**arguments, **scalars, reduction="mean", backend=any_backend)
    (targets,) = compiled
    if any_backend == "triton":
        for operator in ("target", "ensemble", "policy"):
            assert sum(f"action_value_{operator}" in t for t in targets) == 1
        assert not any(word in t for t in targets for word in ("amin", "amax", "smooth", "where"))


@pytest.mark.parametrize("loss_function", LOSS_FUNCTIONS)
@pytest.mark.parametrize("priority", PRIORITIES)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_an_ensemble_loss_can_be_mapped(device, loss_function, priority, backend) -> None:
    values, target = torch.randn(5, 3, 4, device=device), torch.randn(5, 4, device=device)

    def loss(values, target):
        return tuple(ensemble_loss(values, target, loss_function, priority=priority, backend=backend))

    mapped = torch.vmap(loss)(values, target)
    one_by_one = [torch.stack(x) for x in zip(*map(loss, values, target), strict=True)]
    torch.testing.assert_close(list(mapped), one_by_one)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_operators_keep_their_contract(device, transposed, weighed, reduction) -> None:
    """Schema, and fake results of the same shapes and strides, as PyTorch checks them."""
    arguments = problem((2, 3), 4, device=device, mask=weighed, weights=weighed)
    given = {k: x if x is None else x.detach() for k, x in arguments.items()}
    if transposed:
        given = {k: x if x is None else x.transpose(-1, -2).contiguous().transpose(-1, -2) for k, x in given.items()}
    values, log_prob, target, reward, terminated, mask, weights = given.values()
    alpha = torch.tensor(0.3, device=device)

    def check(operator, *inputs):
        torch.library.opcheck(operator, inputs, test_utils=("test_schema", "test_faketensor"))
        return operator(*inputs)

    ops = torch.ops.fusedrl
    check(ops.action_value_target.default, "triton", values, reward, terminated, 0.9, None, log_prob, None, alpha)
    fields = (values, target, mask, weights, "smooth_l1", "square", False, reduction)
    loss, _, *kept = check(ops.action_value_ensemble.default, "triton", True, *fields)
    check(ops.action_value_ensemble_backward.default, "triton", *fields, kept, torch.ones_like(loss))
    fields = (values, log_prob, None, alpha, mask, weights, reduction)
    loss, _, *kept = check(ops.action_value_policy.default, "triton", True, *fields)
    check(ops.action_value_policy_backward.default, "triton", *fields, kept, torch.ones_like(loss), [True, True])


def test_nothing_waits_on_the_host() -> None:
    """Fake tensors have no data: reading any would raise."""
    with torch._subclasses.FakeTensorMode():
        arguments = {k: torch.empty_like(x) for k, x in problem(mask=True, weights=True).items()}
        for name in ("values", "log_prob"):
            arguments[name].requires_grad_()
        scalars = {k: torch.tensor(0.9) for k in ("gamma", "alpha")}
        total, *_ = update(**arguments, **scalars, reduction="mean", backend="torch")
        gradients = torch.autograd.grad(total, (arguments["values"], arguments["log_prob"]))
    assert [g.shape for g in gradients] == [(2, 5), (5,)]


def test_a_block_chooses_the_backend_of_a_compiled_function_too(device) -> None:
    seen = []

    def count(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        seen.append(any("action_value_target" in str(n.target) for n in graph.graph.nodes))
        return graph

    arguments = of_target(problem(device=device))
    compiled = torch.compile(lambda **x: value_target(**x, gamma=0.9), fullgraph=True, backend=count)
    for name in ("torch", "triton"):
        with use_backend(name):
            compiled(**{k: x.detach() for k, x in arguments.items()})
    assert seen == [False, True]
