"""To the compiler a scan is one opaque operator, whatever the backend and the number of steps."""

import pytest
import torch
from fusedrl import kernels
from fusedrl.estimators import GAE
from tensordict import TensorDict

BACKENDS = [None, "torch", "triton", "reference"]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def leaves(steps: int, device: torch.device) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(3, steps, generator=generator).to(device).requires_grad_() for _ in range(3)]
    return [torch.tensor(0.9, device=device, requires_grad=True), *tensors]


def estimate(gamma, value, next_value, reward, *, backend=None):
    advantage, target = kernels.gae(gamma, 0.95, value, next_value, reward, reward > 1, backend=backend)
    return (advantage * target).sum()


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_equals_eager_in_values_and_gradients(backend, device) -> None:
    compiled = torch.compile(lambda *x: estimate(*x, backend=backend), fullgraph=True, backend="aot_eager")
    results = []
    for function in (lambda *x: estimate(*x, backend=backend), compiled):
        inputs = leaves(7, device)
        loss = function(*inputs)
        results.append((loss, *torch.autograd.grad(loss, inputs)))
    for eager, found in zip(*results, strict=True):
        assert torch.allclose(eager, found, rtol=1e-5, atol=1e-6)


def test_one_mask_for_done_and_terminated_compiles(device):
    def loss(reward, value, done):
        return kernels.td_lambda_return(0.9, 0.9, value, reward, done, done).square().sum()

    reward, value = torch.randn(2, 3, 5, device=device).requires_grad_().unbind(0)
    done = torch.rand(3, 5, device=device) < 0.3
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(reward, value, done), loss(reward, value, done))


def test_inductor_gives_the_same_numbers(device) -> None:
    inputs = leaves(7, device)
    expected = torch.autograd.grad(estimate(*inputs), inputs)
    found = torch.autograd.grad(torch.compile(estimate, fullgraph=True)(*inputs), inputs)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_graph_does_not_grow_with_time(backend, device) -> None:
    sizes = []

    def count(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        sizes.append(len(graph.graph.nodes))
        return graph

    for steps in (2, 200):
        torch._dynamo.reset()
        compiled = torch.compile(lambda *x: estimate(*x, backend=backend), fullgraph=True, backend=count)
        compiled(*(x.detach() for x in leaves(steps, device)))
    assert sizes[0] == sizes[1] < 40


def test_a_block_chooses_the_backend_of_a_compiled_function_too(monkeypatch, device) -> None:
    ran = []
    original = kernels.scan_operators.backend_module
    monkeypatch.setattr(kernels.scan_operators, "backend_module", lambda name: ran.append(name) or original(name))
    compiled = torch.compile(estimate, fullgraph=True, backend="aot_eager")
    inputs = [x.detach() for x in leaves(5, device)]
    with kernels.use_backend("torch"):
        compiled(*inputs)
    with kernels.use_backend("reference"):
        compiled(*inputs)
    assert ran == ["torch", "reference"]


def test_an_estimator_that_names_no_backend_compiles(device) -> None:
    network = torch.nn.Linear(4, 1, device=device)
    observation, after = torch.randn(2, 3, 5, 4, device=device)
    data = TensorDict(
        {
            "state_value": network(observation).detach(),
            "next": {
                "state_value": network(after).detach(),
                "reward": torch.randn(3, 5, 1, device=device),
                "done": torch.zeros(3, 5, 1, dtype=torch.bool, device=device),
            },
        },
        batch_size=[3, 5],
    )
    gae = GAE(gamma=0.9, lmbda=0.9, value_network=None, device=device)
    found = torch.compile(gae, fullgraph=True, backend="aot_eager")(data.clone())
    assert torch.allclose(found["advantage"], gae(data.clone())["advantage"], atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_nothing_waits_on_the_host(backend) -> None:
    """Fake tensors have no data: reading any would raise."""
    with torch._subclasses.FakeTensorMode():
        inputs = [torch.tensor(0.9, requires_grad=True), *(torch.randn(3, 7).requires_grad_() for _ in range(3))]
        found = torch.autograd.grad(estimate(*inputs, backend=backend), inputs)
    assert [g.shape for g in found] == [x.shape for x in inputs]


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("transposed", range(4))
def test_gradients_are_laid_out_as_the_compiler_was_told_whatever_the_others_are(backend, transposed, device):
    shape = torch.Size([4, 6])
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.rand(shape, generator=generator).to(device) for _ in range(4)]
    inputs[transposed] = inputs[transposed].t().contiguous().t()
    inputs = [x.requires_grad_() for x in inputs]
    expected = torch.autograd.grad(estimate(*inputs, backend=backend), inputs)
    compiled = torch.compile(lambda *x: estimate(*x, backend=backend), fullgraph=True)
    for gradient, found in zip(expected, torch.autograd.grad(compiled(*inputs), inputs), strict=True):
        assert torch.allclose(gradient, found, rtol=1e-5, atol=1e-6)
