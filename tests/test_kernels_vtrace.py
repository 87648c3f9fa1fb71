"""The fused V-trace kernel against the operations that it fuses, and what is around it."""

import pytest
import torch
from fusedrl import kernels
from fusedrl.kernels import VerificationError, launching, vtrace_launch
from helpers_launches import plan_with
from torch.library import opcheck

pytest.importorskip("triton")

FUSED = ("triton", "verify")
LEAVES = ("log_pi", "value", "next_value", "reward", "log_mu")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def arguments(shape, device, *, time_major=False, log_mu=True, terminated=True, dtype=torch.float64):
    def new():
        x = torch.randn(shape[::-1] if time_major else shape, dtype=dtype, device=device)
        return x.permute(*reversed(range(x.ndim))) if time_major else x

    found = {name: new() for name in LEAVES}
    found["done"] = new() > 1
    found["terminated"] = new() > 1.2 if terminated else None
    if not log_mu:
        found["log_mu"] = None
    return found


def solved(given, backend, *, dim=-1, gamma=0.9, rho=1.3, c=0.8, outputs=(0, 1)):
    """Results, and the gradients of a weighted sum of the ``outputs``."""
    leaves = {k: x.detach().requires_grad_() for k, x in given.items() if x is not None and x.is_floating_point()}
    scalars = {"gamma": gamma, "rho_thresh": rho, "c_thresh": c}
    results = kernels.vtrace(**{**given, **leaves, **scalars}, time_dim=dim, backend=backend)
    total = sum(
        (
            results[i]
            * torch.linspace(1 - 2 * i, 2, results[i].numel(), device=results[i].device).view(results[i].shape)
        ).sum()
        for i in outputs
    )
    return *results, *torch.autograd.grad(total, list(leaves.values()))


def assert_equal(found, wanted, tolerance=1e-10):
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize(
    ("shape", "dim", "time_major"),
    [((3, 7), -1, False), ((3, 7), -1, True), ((5, 1), -1, False), ((2, 140), -1, False), ((1, 1500), -1, False),
     ((40, 33), -1, True), ((3, 300), -1, True), ((2, 9, 2), 1, False), ((2, 3, 9, 2), 2, False)],
    ids=str,
)  # fmt: skip
def test_one_kernel_computes_what_the_operations_do(backend, device, shape, dim, time_major):
    for log_mu, terminated in ((True, True), (False, False)):
        given = arguments(shape, device, time_major=time_major, log_mu=log_mu, terminated=terminated)
        assert_equal(solved(given, backend, dim=dim), solved(given, "torch", dim=dim))


@pytest.mark.parametrize("outputs", [(0,), (1,)], ids=["advantage", "target"])
def test_one_result_may_be_used_alone(device, outputs):
    given = arguments((3, 21), device)
    assert_equal(solved(given, "triton", outputs=outputs), solved(given, "torch", outputs=outputs))


def test_three_dimensions_of_rows_that_strides_keep_apart_are_copied(device):
    given = arguments((4, 4, 4, 10), device)
    sliced = {key: x[::2, ::2, ::2] for key, x in given.items()}
    assert_equal(solved(sliced, "triton"), solved(sliced, "torch"))


def test_of_many_short_rows_a_program_has_several_blocks(device, monkeypatch):
    plan_with(monkeypatch, launching, processors=lambda device: 1)
    given = arguments((266, 20), device, dtype=torch.float32)
    assert_equal(solved(given, "triton"), solved(given, "torch"), 1e-4)


def test_scalars_may_be_integers_or_0_d_tensors_of_any_dtype_and_device(device):
    given = arguments((3, 9), device)
    scalars = {"gamma": torch.tensor(0.9), "rho": torch.tensor(1.3, dtype=torch.float64), "c": torch.tensor(2)}
    assert_equal(solved(given, "triton", **scalars), solved(given, "torch", gamma=0.9, rho=1.3, c=2.0), 1e-6)
    integers = {"gamma": 1, "rho": 1, "c": 2}
    assert_equal(solved(given, "triton", **integers), solved(given, "torch", gamma=1.0, rho=1.0, c=2.0))


@pytest.mark.parametrize("which", ["gamma", "rho_thresh", "c_thresh"])
def test_a_scalar_that_wants_a_gradient_gets_it(device, which):
    given = arguments((2, 9), device)
    found = []
    for backend in ("triton", "torch"):
        x = torch.tensor(0.9, dtype=torch.float64, device=device, requires_grad=True)
        scalars = {"gamma": 0.9, "rho_thresh": 1.0, "c_thresh": 1.0, which: x}
        results = kernels.vtrace(**given, **scalars, backend=backend)
        found.append(torch.autograd.grad(sum(y.square().sum() for y in results), x))
    assert_equal(*found)


def test_gradients_can_be_differentiated(device):
    given = arguments((2, 5), device)
    leaves = [given[name].requires_grad_() for name in LEAVES]
    assert torch.autograd.gradgradcheck(
        lambda *x: kernels.vtrace(0.9, **{**given, **dict(zip(LEAVES, x, strict=True))}, backend="triton"),
        leaves,
        fast_mode=True,
    )


@pytest.mark.parametrize("backend", FUSED)
def test_an_input_computed_from_another_gives_that_one_its_gradient_once(device, backend):
    given = arguments((2, 5), device)
    value = given["value"].requires_grad_()
    results = kernels.vtrace(0.9, **given | {"next_value": value.roll(-1, 1)}, backend=backend)
    total = sum(x.square().sum() for x in results)
    plain, again = (torch.autograd.grad(total, value, retain_graph=True, create_graph=x) for x in (False, True))
    assert_equal(again, plain)


def test_a_nan_behind_the_end_of_a_trajectory_reaches_nothing(device):
    given = arguments((3, 9), device)
    expected = solved(given, "triton")
    given["next_value"] = torch.where(given["terminated"], torch.nan, given["next_value"])
    assert_equal(solved(given, "triton"), expected)


def test_a_nan_that_counts_is_not_hidden_by_a_threshold(device):
    given = arguments((1, 4), device, terminated=False)
    given["log_pi"][0, 2] = torch.nan
    advantage, value_target = kernels.vtrace(0.9, **given, backend="triton")
    assert advantage[0, 2].isnan()
    assert value_target[0, 2].isnan()


def test_nothing_at_all(device):
    for shape in ((0, 4), (3, 0)):
        given = arguments(shape, device)
        assert all(x.shape == shape for x in solved(given, "triton"))


def test_verify_names_what_is_wrong(device, monkeypatch):
    forward, backward = vtrace_launch.forward, vtrace_launch.backward
    given = arguments((2, 5), device)
    monkeypatch.setattr(vtrace_launch, "backward", lambda *x: [2 * g for g in backward(*x)])
    with pytest.raises(VerificationError, match="V-trace gradient of log_pi"):
        solved(given, "verify")
    monkeypatch.setattr(vtrace_launch, "forward", lambda *x: [y + (i == 1) for i, y in enumerate(forward(*x))])
    with pytest.raises(VerificationError, match=r"V-trace value target.*index \(\d, \d\)"):
        solved(given, "verify")


@pytest.mark.parametrize("wants", [True, False], ids=["gradients", "none"])
def test_the_operators_keep_their_contract(device, wants):
    given = arguments((2, 5), device)
    x = [given[name].requires_grad_(wants) for name in LEAVES]
    constants = (0.9, None, None, torch.tensor(1.0), 0.8, None)
    fields = (x[0], x[4], *x[1:4], *constants, given["done"], given["terminated"])
    kinds = ("test_schema", "test_faketensor")
    opcheck(torch.ops.fusedrl.vtrace, ("triton", 1, *fields), test_utils=kinds)
    fields = tuple(y.detach() if isinstance(y, torch.Tensor) else y for y in fields)
    grads = (x[0].detach(), x[1].detach(), None)
    needs = [True, wants, True, wants, True, False, False, False]
    opcheck(torch.ops.fusedrl.vtrace_backward, ("triton", 1, *fields, *grads, needs), test_utils=kinds)
