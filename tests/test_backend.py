"""Which backend runs, what `verify` does, and life without Triton."""

import os
import subprocess
import sys

import pytest
import torch
from fusedrl import kernels
from fusedrl.kernels import VerificationError, scan_vectorized
from fusedrl.kernels import backend as choice
from torch.utils.flop_counter import FlopCounterMode


def run_python(code: str, **environment: str | None) -> str:
    """Standard output of ``code`` in a new process with these environment variables set, or removed for None."""
    merged = {**os.environ, **environment}
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={k: v for k, v in merged.items() if v is not None},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_the_nearest_choice_wins(monkeypatch) -> None:
    x = torch.zeros(2)
    monkeypatch.setattr(choice, "_process_backend", "torch")
    assert kernels.resolve_backend(None, x) == "torch"
    with kernels.use_backend("reference"):
        assert kernels.resolve_backend(None, x) == "reference"
        assert kernels.resolve_backend("verify", x) == "verify"
        with kernels.use_backend("torch"):
            assert kernels.resolve_backend(None, x) == "torch"
        assert kernels.resolve_backend(None, x) == "reference"
    assert kernels.resolve_backend(None, x) == "torch"


def test_the_choice_returns_when_a_block_raises() -> None:
    before = kernels.current_backend()
    with pytest.raises(RuntimeError, match="out"), kernels.use_backend("reference"):
        raise RuntimeError("out")
    assert kernels.current_backend() == before


@pytest.mark.parametrize("source", ["argument", "block", "environment"])
def test_an_unknown_backend_is_refused_wherever_it_is_named(monkeypatch, source) -> None:
    done = torch.zeros(3, dtype=torch.bool)

    def estimate(backend: str | None = None) -> None:
        kernels.reward_to_go(0.9, torch.ones(3), done, backend=backend)

    if source == "argument":
        with pytest.raises(ValueError, match="backend is 'cuda'"):
            estimate("cuda")
    elif source == "block":
        with pytest.raises(ValueError, match="backend is 'cuda'"), kernels.use_backend("cuda"):
            pass
    else:
        monkeypatch.setattr(choice, "_process_backend", "cuda")
        with pytest.raises(ValueError, match="FUSEDRL_BACKEND is 'cuda'"):
            estimate()


def test_the_environment_variable_chooses_for_the_process() -> None:
    code = "import torch; from fusedrl import kernels; print(kernels.resolve_backend(None, torch.zeros(1)))"
    assert run_python(code, TRITON_INTERPRET=None, FUSEDRL_BACKEND="reference") == "reference"
    assert run_python(code, TRITON_INTERPRET=None, FUSEDRL_BACKEND="") == "torch"


def test_auto_means_torch_on_a_cpu_and_triton_under_the_interpreter() -> None:
    code = "import torch; from fusedrl import kernels; print(kernels.resolve_backend('auto', torch.zeros(1)))"
    assert run_python(code, TRITON_INTERPRET=None) == "torch"
    assert run_python(code, TRITON_INTERPRET="1") == "triton"


def test_triton_on_a_cpu_without_the_interpreter_says_what_to_do() -> None:
    code = """
import torch
from fusedrl import kernels
try:
    kernels.reverse_scan(0.5, torch.ones(3), backend="triton")
except RuntimeError as error:
    print(error)
"""
    message = run_python(code, TRITON_INTERPRET=None)
    assert "'triton' can't run" in message
    assert "TRITON_INTERPRET=1" in message


def test_everything_imports_and_runs_without_triton() -> None:
    code = """
import sys

class HideTriton:
    def find_spec(self, name, path=None, target=None):
        if name == "triton" or name.startswith("triton."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, HideTriton())
import importlib.util
import torch
original = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else original(name, package)

import fusedrl.losses
from fusedrl import estimators, kernels
reward = torch.ones(2, 5, 1, requires_grad=True)
done = torch.zeros(2, 5, 1, dtype=torch.bool)
kernels.gae(0.9, 0.9, reward, reward, reward, done, time_dim=1)[0].sum().backward()
try:
    kernels.reverse_scan(0.5, torch.ones(3), backend="triton")
except RuntimeError as error:
    print(kernels.resolve_backend(None, reward), "|", error, "|", "triton" in sys.modules)
"""
    found = run_python(code, TRITON_INTERPRET=None, FUSEDRL_BACKEND=None)
    assert found == "torch | backend 'triton' can't run: Triton is not installed | False"


def test_verify_gives_the_fast_backends_numbers(device) -> None:
    reward, value, next_value = torch.randn(3, 4, 50, 1, device=device)
    reward.requires_grad_()
    done = torch.rand(4, 50, 1, device=device) < 0.1
    gamma = torch.tensor(0.99, device=device, requires_grad=True)
    results = []
    for backend in ("auto", "verify"):
        advantage, target = kernels.gae(gamma, 0.95, value, next_value, reward, done, time_dim=1, backend=backend)
        results.append((advantage, target, *torch.autograd.grad((advantage * target).sum(), [reward, gamma])))
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("estimator", [kernels.td_lambda_return, kernels.fixed_discount_td_lambda_return])
def test_verify_accepts_correct_results_of_every_dtype(device, dtype, estimator) -> None:
    reward, next_value = torch.randn(2, 3, 20, device=device).to(dtype)
    reward.requires_grad_()
    done = torch.rand(3, 20, device=device) < 0.1
    gamma = torch.rand(3, 20, device=device).requires_grad_()
    estimator(gamma, 0.9, next_value, reward, done, backend="verify").sum().backward()
    assert gamma.grad is not None


def wrong_by_one_part_in_a_thousand(function):
    def wrapped(*arguments):
        results = function(*arguments)
        results[0].view(-1)[7] *= 1.001
        results[0].view(-1)[7] += 0.01
        return results

    return wrapped


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_verify_names_the_worst_element_and_both_values(monkeypatch, direction) -> None:
    monkeypatch.setattr("fusedrl.kernels.scan_verify.fastest_backend", lambda tensor: "torch")
    right = kernels.reward_to_go(0.9, torch.arange(12.0).view(3, 4), torch.zeros(3, 4), backend="torch")
    monkeypatch.setattr(
        scan_vectorized, direction, wrong_by_one_part_in_a_thousand(getattr(scan_vectorized, direction))
    )
    reward = torch.arange(12.0).view(3, 4).requires_grad_()

    def estimate() -> None:
        kernels.reward_to_go(0.9, reward, torch.zeros(3, 4), backend="verify").sum().backward()

    with pytest.raises(VerificationError, match=r"at index \(1, 3\)") as caught:
        estimate()
    wanted = right[1, 3].item() if direction == "forward" else 1 + 0.9 + 0.9**2 + 0.9**3
    assert f"{wanted:.4}"[:5] in str(caught.value)
    assert "'torch'" in str(caught.value)


@pytest.mark.parametrize("backend", ["reference", "verify"])
def test_gradients_by_autograd_are_found_below_a_dispatch_mode_too(backend) -> None:
    """As `bench.profile` and counters of operations need it."""
    calls = {
        "gae": lambda x: kernels.gae(0.9, 0.8, x, x.detach(), x, x.detach() > 1)[0].sum(),
        "vtrace": lambda x: kernels.vtrace(0.9, x, None, x, x.detach(), x, x.detach() > 1)[0].sum(),
        "ensemble_loss": lambda x: kernels.ensemble_loss(x, x[0].detach(), "l2").loss,
        "soft_policy_loss": lambda x: kernels.soft_policy_loss(x, x[0], 0.3).loss,
        "normal_log_prob": lambda x: kernels.normal_log_prob(x, x.exp(), x.tanh(), squash=(-2.0, 2.0)).sum(),
    }
    for call in calls.values():
        x = torch.linspace(-1, 2, 12).view(3, 4).requires_grad_()
        with kernels.use_backend(backend):
            (wanted,) = torch.autograd.grad(call(x), x)
            with FlopCounterMode(display=False):
                (found,) = torch.autograd.grad(call(x), x)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda one, done: kernels.gae(None, 0.9, one, one, one, done),
            "gamma must be a number or a real tensor, but is None",
        ),
        (
            lambda one, done: kernels.gae("0.9", 0.9, one, one, one, done),
            "gamma must be a number or a real tensor, but is '0.9'",
        ),
        (lambda one, done: kernels.gae(0.9, None, one, one, one, done), "lmbda must be a number"),
        (lambda one, done: kernels.gae(0.9, 0.9, one, one, one, None), "done must be a real tensor, but is None"),
        (
            lambda one, done: kernels.td_lambda_return(0.9, 0.9, None, one, done),
            "next_value must be a real tensor, but is None",
        ),
        (
            lambda one, done: kernels.gae(0.9, 0.9, one, one, one.cfloat(), done),
            "reward must be a real tensor.*complex64",
        ),
        (lambda one, done: kernels.reverse_scan(one.cfloat()[0, 0], one), "coefficient must be .*complex64"),
        (
            lambda one, done: kernels.vtrace(0.9, one, None, one, one, one, done, rho_thresh=one.cfloat()),
            "rho_thresh must be",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_what_is_no_real_tensor_or_number_is_named(call, message, backend, device) -> None:
    with kernels.use_backend(backend), pytest.raises(TypeError, match=message):
        call(torch.ones(1, 3, device=device), torch.zeros(1, 3, dtype=torch.bool, device=device))


def test_a_bare_scan_names_its_own_arguments() -> None:
    with pytest.raises(RuntimeError, match=r"coefficient has shape \(4,\), .* of increment"):
        kernels.reverse_scan(torch.ones(4), torch.ones(1, 3))
    with pytest.raises(IndexError, match="time_dim is 2, but increment"):
        kernels.reverse_scan(0.5, torch.ones(1, 3), time_dim=2)


def test_blocks_that_overlap_as_those_of_two_threads_do_leave_nothing_behind():
    before = choice.current_backend()
    first, second = kernels.use_backend("verify"), kernels.use_backend("reference")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert choice.current_backend() == "reference"
    second.__exit__(None, None, None)
    assert choice.current_backend() == before
