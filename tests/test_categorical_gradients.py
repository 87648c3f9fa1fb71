"""Gradients of the categorical loss through every backend; to the compiler each call is one opaque operator."""

import pytest
import torch
from fusedrl.kernels import categorical_operators, categorical_projection, categorical_q_loss, use_backend
from helpers_categorical import BACKENDS, problem


@pytest.fixture(params=BACKENDS)
def any_backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn."""
    return request.param


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def loss_of(log_prob, arguments, backend=None) -> torch.Tensor:
    return categorical_q_loss(**arguments | {"log_prob": log_prob}, backend=backend)[0]


def test_gradcheck(any_backend, device) -> None:
    arguments = problem((2, 2), device=device)
    assert torch.autograd.gradcheck(lambda x: loss_of(x, arguments, any_backend), arguments["log_prob"], fast_mode=True)


def test_gradgradcheck(any_backend, device) -> None:
    """The loss is linear in log_prob, so that the second order is that of the incoming gradient alone."""
    arguments = problem((2, 2), device=device)
    assert torch.autograd.gradgradcheck(
        lambda x: loss_of(x, arguments, any_backend), arguments["log_prob"], fast_mode=True
    )


def test_gradients_made_to_be_differentiated_are_the_same_gradients(any_backend, device) -> None:
    """gradgradcheck compares these with themselves; here they meet the kernels'."""
    arguments = problem(device=device)
    weight = torch.arange(4.0, device=device)
    loss = (weight * loss_of(arguments["log_prob"], arguments, any_backend)).sum()
    plain, again = (
        torch.autograd.grad(loss, arguments["log_prob"], retain_graph=True, create_graph=create)[0]
        for create in (False, True)
    )
    assert torch.equal(plain, again)


def test_the_gradient_is_minus_the_projection_at_the_taken_action_and_zero_elsewhere(any_backend, device) -> None:
    arguments = problem(device=device, double=False, actions=1)
    (gradient,) = torch.autograd.grad(
        loss_of(arguments["log_prob"], arguments, any_backend).sum(), arguments["log_prob"]
    )
    bellman = (arguments[k] for k in ("support", "reward", "terminated", "gamma"))
    m = categorical_projection(arguments["next_log_prob"][..., 0].exp(), *bellman, backend=any_backend)
    assert torch.allclose(gradient[..., 0], -m, rtol=1e-12, atol=1e-14)
    arguments = problem(device=device)
    (gradient,) = torch.autograd.grad(
        loss_of(arguments["log_prob"], arguments, any_backend).sum(), arguments["log_prob"]
    )
    others = torch.ones_like(gradient).scatter(-1, arguments["action"][:, None, None].expand(-1, 5, 1), 0).bool()
    assert (gradient[others] == 0).all()
    assert (gradient[~others].view(4, -1).sum(-1) + 1).abs().max() < 1e-12


def test_everything_but_log_prob_is_a_constant(any_backend, device) -> None:
    arguments = problem(device=device)
    arguments["gamma"] = torch.tensor(0.9, dtype=torch.float64, device=device)
    names = ("next_log_prob", "next_online_log_prob", "support", "reward", "gamma")
    for name in names:
        arguments[name].requires_grad_()
    loss = loss_of(arguments["log_prob"], arguments, any_backend)
    found = torch.autograd.grad(loss.sum(), [arguments[k] for k in names], allow_unused=True)
    assert found == (None,) * len(names)
    assert not loss_of(arguments["log_prob"].detach(), arguments, any_backend).requires_grad
    projected = categorical_projection(
        arguments["next_log_prob"][..., 0].exp(), *(arguments[k] for k in ("support", "reward", "terminated", "gamma"))
    )
    assert not projected.requires_grad


def test_without_gradients_the_projection_is_not_kept(monkeypatch, any_backend, device) -> None:
    kept = []
    module = categorical_operators.backend_module(any_backend)
    original = module.forward
    monkeypatch.setattr(module, "forward", lambda *a: kept.append(a[-1]) or original(*a))
    arguments = problem(device=device)
    loss_of(arguments["log_prob"], arguments, any_backend)
    with torch.no_grad():
        loss_of(arguments["log_prob"], arguments, any_backend)
    loss_of(arguments["log_prob"].detach(), arguments, any_backend)
    assert kept == [True, False, False]


def test_forward_mode_is_refused_rather_than_wrong(backend, device) -> None:
    arguments = problem(device=device)
    log_prob = arguments["log_prob"].detach()
    with pytest.raises((NotImplementedError, RuntimeError), match="jvp"):
        torch.func.jvp(lambda x: loss_of(x, arguments, backend), (log_prob,), (torch.ones_like(log_prob),))


@pytest.mark.parametrize("batch", [(4,), (2, 3)])
def test_compiled_equals_eager(any_backend, device, batch) -> None:
    arguments = problem(batch, device=device)
    arguments["gamma"] = torch.tensor(0.9, device=device)

    def scaled(log_prob, arguments):
        return loss_of(log_prob.log_softmax(-2), arguments, any_backend).square().mean()

    compiled = torch.compile(scaled, fullgraph=True, backend="aot_eager")
    results = []
    for function in (scaled, compiled):
        loss = function(arguments["log_prob"], arguments)
        results.append((loss, *torch.autograd.grad(loss, arguments["log_prob"])))
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(*results, strict=True))


def test_inductor_gives_the_same_numbers(device) -> None:
    arguments = problem((2, 3), device=device)
    # Not contiguous: the compiler must be told the layout that the gradient really has.
    logits = arguments["log_prob"].detach().transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_()

    def scaled(logits):
        return (3 * loss_of(logits.log_softmax(-2), arguments, "torch")).mean()

    expected = torch.autograd.grad(scaled(logits), logits)
    found = torch.autograd.grad(torch.compile(scaled, fullgraph=True)(logits), logits)
    assert torch.allclose(found[0], expected[0], rtol=1e-9, atol=1e-12)


def test_to_the_compiler_a_call_is_one_operator(any_backend, device) -> None:
    calls = []

    def count(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        calls.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return graph

    arguments = problem(device=device)
    with use_backend(any_backend), torch.no_grad():
        torch.compile(categorical_q_loss, fullgraph=True, backend=count)(**arguments)
    (targets,) = calls
    assert sum("categorical_loss" in t for t in targets) == 1
    assert not any(word in t for t in targets for word in ("scatter", "exp", "gather"))


@pytest.mark.parametrize("batch", [(4,), (2, 3)])
def test_the_operators_keep_their_contract(backend, device, batch) -> None:
    """Schema, fake results of the same shapes and strides, and autograd registration, as PyTorch checks them."""
    arguments = problem(batch, device=device)
    gamma = arguments.pop("gamma")
    order = ("log_prob", "action", "next_log_prob", "next_online_log_prob", "support", "reward", "terminated")
    tensors = [arguments[k].detach() for k in order]
    checks = ("test_schema", "test_faketensor")
    loss = torch.ops.fusedrl.categorical_loss.default
    torch.library.opcheck(loss, (backend, True, *tensors, gamma, None), test_utils=checks)
    _, projected = loss(backend, True, *tensors, gamma, None)
    for log_prob in (tensors[0], tensors[0].transpose(0, 1).contiguous().transpose(0, 1)):
        torch.library.opcheck(
            torch.ops.fusedrl.categorical_loss_backward.default,
            (backend, log_prob, tensors[1], projected, projected.sum(-1)),
            test_utils=checks,
        )
    torch.library.opcheck(
        torch.ops.fusedrl.categorical_projection.default,
        (backend, tensors[2][..., 0].exp(), *tensors[4:], gamma, None),
        test_utils=checks,
    )


def test_nothing_waits_on_the_host(backend) -> None:
    """Fake tensors have no data: reading any would raise."""
    with torch._subclasses.FakeTensorMode():
        arguments = {k: torch.empty_like(x) for k, x in problem().items() if isinstance(x, torch.Tensor)}
        log_prob = torch.randn(4, 5, 3).requires_grad_()
        arguments |= {"gamma": torch.tensor(0.9)}
        loss = loss_of(log_prob, arguments, backend if backend == "torch" else None)
        (gradient,) = torch.autograd.grad(loss.sum(), log_prob)
    assert gradient.shape == (4, 5, 3)


def test_the_torch_backend_itself_waits_on_nothing() -> None:
    """The operator is opaque to fake tensors, so what is inside of it meets them here."""
    from fusedrl.kernels import categorical_vectorized
    from fusedrl.kernels.categorical_problem import Bellman, Transition

    with torch._subclasses.FakeTensorMode():
        distributions = [torch.randn(700, 51, 6) for _ in range(3)]
        action = torch.zeros(700, dtype=torch.int64)
        bellman = Bellman(torch.zeros(51), torch.zeros(700), torch.zeros(700).bool(), torch.tensor(0.9))
        transition = Transition(distributions[0], action, *distributions[1:])
        loss, projected = categorical_vectorized.forward(transition, bellman, True)
        gradient = categorical_vectorized.backward(distributions[0], action, projected, loss)
    assert gradient.shape == (700, 51, 6)
