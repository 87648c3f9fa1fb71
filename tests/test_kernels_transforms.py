"""`torch.vmap` and the other transforms of `torch.func` over scans and V-trace."""

import pytest
import torch
from fusedrl import kernels

MAPPED = 3
SHAPE = (2, 5)


@pytest.fixture
def steps(device):
    generator = torch.Generator().manual_seed(0)
    floats = [torch.randn(MAPPED, *SHAPE, generator=generator, dtype=torch.float64).to(device) for _ in range(4)]
    return {
        **dict(zip(("value", "next_value", "reward", "log_pi"), floats, strict=True)),
        "done": (torch.rand(MAPPED, *SHAPE, generator=generator) < 0.3).to(device),
    }


CASES = {
    "gae": lambda g, x: kernels.gae(g, 0.8, x["value"], x["next_value"], x["reward"], x["done"])[0],
    "td_lambda": lambda g, x: kernels.td_lambda_return(g, 0.8, x["next_value"], x["reward"], x["done"]),
    "fixed": lambda g, x: kernels.fixed_discount_td_lambda_return(g, 0.8, x["next_value"], x["reward"], x["done"]),
    "reverse_scan": lambda g, x: kernels.reverse_scan(g, x["reward"]),
    "vtrace": lambda g, x: kernels.vtrace(
        g, x["log_pi"], None, x["value"], x["next_value"], x["reward"], x["done"], rho_thresh=1.2
    )[0],
}
every_case = pytest.mark.parametrize("name", CASES)


def for_each(function, *mapped):
    return torch.stack([function(*(x[i] for x in mapped)) for i in range(MAPPED)])


@every_case
@pytest.mark.parametrize("shared", [(), ("done", "next_value")], ids=["all mapped", "some shared"])
@pytest.mark.parametrize("mapped_dim", [0, 2])
def test_vmap_is_a_loop(backend, steps, name, shared, mapped_dim) -> None:
    names = [key for key in steps if key not in shared]
    fixed = {key: steps[key][0] for key in shared}

    def function(*x):
        return CASES[name](0.9, {**fixed, **dict(zip(names, x, strict=True))})

    with kernels.use_backend(backend):
        moved = [steps[key].movedim(0, mapped_dim) for key in names]
        found = torch.vmap(function, in_dims=mapped_dim)(*moved)
        torch.testing.assert_close(found, for_each(function, *(steps[key] for key in names)))


@every_case
def test_a_discount_can_be_mapped_over(backend, steps, name) -> None:
    first = {key: x[0] for key, x in steps.items()}
    for shape in ((MAPPED,), (MAPPED, 5), (MAPPED, 2, 1)):
        gamma = torch.linspace(0.3, 0.9, MAPPED, dtype=torch.float64, device=first["reward"].device)
        gamma = gamma.view(-1, *(1,) * (len(shape) - 1)).expand(shape)
        with kernels.use_backend(backend):
            found = torch.vmap(lambda g: CASES[name](g, first))(gamma)
            torch.testing.assert_close(found, for_each(lambda g: CASES[name](g, first), gamma))


@every_case
def test_gradients_of_each_sample_are_those_of_a_loop(backend, steps, name) -> None:
    gamma = torch.tensor(0.9, dtype=torch.float64, device=steps["reward"].device)
    names = list(steps)

    def gradients(*x):
        given = dict(zip(names, x, strict=True))
        of = torch.func.grad(lambda g, r: CASES[name](g, {**given, "reward": r}).square().sum(), argnums=(0, 1))(
            gamma, given["reward"]
        )
        return torch.cat([of[0].reshape(1), of[1].flatten()])

    with kernels.use_backend(backend):
        found = torch.vmap(gradients)(*steps.values())
        torch.testing.assert_close(found, for_each(gradients, *steps.values()))


@every_case
def test_jacobian_and_hessian_are_those_of_autograd(steps, name) -> None:
    first = {key: x[0] for key, x in steps.items()}

    def of_reward(reward):
        return CASES[name](0.9, {**first, "reward": reward})

    def total(gamma):
        return CASES[name](gamma, first).square().sum()

    gamma = torch.tensor(0.9, dtype=torch.float64, device=first["reward"].device)
    with kernels.use_backend("torch"):
        expected = torch.autograd.functional.jacobian(of_reward, first["reward"])
        torch.testing.assert_close(torch.func.jacrev(of_reward)(first["reward"]), expected)
        twice = torch.func.grad(torch.func.grad(total))(gamma)
        torch.testing.assert_close(twice, torch.autograd.functional.hessian(total, gamma))
