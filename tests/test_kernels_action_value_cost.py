"""What the action-value losses cost: torch calls of the ``torch`` backend, launches and machine code of the kernels."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fusedrl.kernels import ensemble_loss, soft_policy_loss, value_target
from helpers_action_value import of_ensemble, of_policy, of_target, problem
from torch.utils._python_dispatch import TorchDispatchMode

IMPLEMENTATION = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
BENCH = Path(__file__).parent.parent / "bench"


class Calls(TorchDispatchMode):
    """Every call of an operator, views and those inside of our own operators included."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        if function.namespace == "fusedrl":
            # Past this mode to the implementation, with the mode on for what it calls.
            with self:
                return function.redispatch(IMPLEMENTATION, *args, **kwargs or {})
        return function(*args, **kwargs or {})


def calls(run) -> list[str]:
    with Calls() as seen:
        run()
    return seen.names


@pytest.fixture
def arguments():
    return problem((8,), dtype=torch.float32)


@pytest.mark.parametrize("coefficient", [0.9, torch.tensor(0.9)], ids=["number", "0-d"])
def test_a_target_takes_three_calls_with_entropy_four(arguments, coefficient) -> None:
    plain = {k: x.detach() for k, x in of_target(arguments).items()} | {"gamma": coefficient, "backend": "torch"}
    entropy = {"log_prob": arguments["log_prob"].detach(), "alpha": coefficient}
    assert len(calls(lambda: value_target(**plain))) == 3
    assert len(calls(lambda: value_target(**plain, **entropy))) == 4


@pytest.mark.parametrize("members", [1, 2, 10])
@pytest.mark.parametrize("loss_function", ["l1", "l2", "smooth_l1"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("per_member", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_an_ensemble_loss_takes_few_calls(members, loss_function, reduction, per_member, grad) -> None:
    """The distance, summed over members, and the priority: 3 at least, or what is seen isn't all."""
    arguments = of_ensemble(problem((8,), members, dtype=torch.float32))
    arguments["values"].requires_grad_(grad)
    options = {"loss_function": loss_function, "reduction": reduction, "per_member": per_member, "backend": "torch"}
    assert 3 <= len(calls(lambda: ensemble_loss(**arguments, **options))) <= (7 if loss_function == "l1" else 5)


@pytest.mark.parametrize("alpha", [0.3, torch.tensor(0.3)], ids=["number", "0-d"])
@pytest.mark.parametrize("grad", [False, True])
def test_a_policy_loss_takes_seven_calls(arguments, alpha, grad) -> None:
    inputs = [x.requires_grad_(grad) for x in (arguments["values"], arguments["log_prob"])]
    assert len(calls(lambda: soft_policy_loss(*inputs, alpha, backend="torch"))) <= 7


def test_a_gradient_takes_few_calls(arguments) -> None:
    """Of the ensemble: the share of the sum, the result, the derivative; the rest is autograd's."""
    loss, _ = ensemble_loss(**of_ensemble(arguments), loss_function="smooth_l1", backend="torch")
    assert len(calls(lambda: torch.autograd.grad(loss, arguments["values"]))) <= 5
    policy = soft_policy_loss(**of_policy(arguments), alpha=0.3, backend="torch")
    leaves = (arguments["values"], arguments["log_prob"])
    assert len(calls(lambda: torch.autograd.grad(policy.loss, leaves))) <= 13


# --- the kernels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1024, 5000])
@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_loss_is_one_launch_and_at_most_one_fill(monkeypatch, device, samples, weighed, reduction) -> None:
    """A kernel of ours, and the zero that programs are counted from; an empty tensor launches nothing."""
    from helpers_launches import launched

    seen = launched(monkeypatch, run=False)  # the interpreter makes calls of its own
    arguments = problem((samples,), dtype=torch.float32, device=device, mask=weighed, weights=weighed)
    arguments = {k: x if x is None else x.detach() for k, x in arguments.items()}
    options = {"reduction": reduction, "backend": "triton"}
    for run, kernel, sums in (
        (lambda: value_target(**of_target(arguments), gamma=0.9, backend="triton"), "target_kernel", False),
        (
            lambda: ensemble_loss(**of_ensemble(arguments), loss_function="l2", **options),
            "ensemble_kernel",
            reduction == "mean",
        ),
        (lambda: soft_policy_loss(**of_policy(arguments), alpha=0.3, **options), "policy_kernel", True),
    ):
        run()  # which plans the launch
        seen.clear()
        names = [x for x in calls(run) if "empty" not in x and not x.startswith("fusedrl")]
        assert [name for name, _ in seen] == [kernel]
        assert names == (["aten.new_zeros.default"] if sums and samples > 1024 else [])


@pytest.mark.parametrize("weighed", [False, True])
def test_the_gradient_of_the_kernels_is_one_product_each(device, weighed) -> None:
    arguments = problem(dtype=torch.float32, device=device, mask=weighed, weights=weighed)
    loss, _ = ensemble_loss(**of_ensemble(arguments), loss_function="l2", backend="triton")
    names = calls(lambda: torch.autograd.grad(loss, arguments["values"]))
    assert names.count("aten.mul.out") == 1
    assert names.count("aten.mul.Tensor") == int(weighed)  # 1 / Σ m·w, which the forward launch has found


PROGRAM = """
import itertools, json, sys
sys.path.insert(0, sys.argv[1])
import triton.language as tl
from fusedrl.kernels import action_value_kernel, action_value_launch
from fusedrl.kernels.checks import LOSS_FUNCTIONS, REDUCTIONS
from static_table import TARGETS, _read_nvidia
from static_variants import Strided, compile_as_launched

COMPUTE = {"bf16": tl.float32, "fp32": tl.float32, "fp64": tl.float64}
SAMPLES = 1 << 20

def arguments(dtype, reduction, loss_function, weighed, single):
    given, computed = "*" + dtype, f"*{COMPUTE[dtype]}"
    ensemble, row = Strided(given, (SAMPLES, 1)), Strided(given, (1,))
    names = {
        "next_values": ensemble, "values": ensemble, "reward": row, "target": row, "log_prob": row,
        "terminated": Strided("*u1", (1,)), "gamma": "fp64", "alpha": "fp64", "scale": "fp64",
        "sample_scale": "fp64", "value_target": given, "next_value": given, "loss": given, "priority": given,
        "entropy": given, "slopes": computed, "value_slopes": computed, "log_prob_slopes": computed,
        "samples": SAMPLES, "members": 2, "LOSS_FUNCTION": loss_function, "PRIORITY": "square", "PER_MEMBER": False,
        "REDUCTION": reduction, "COUNT": weighed and reduction == "mean", "DTYPE": COMPUTE[dtype],
        "INDEX": tl.int32, "PROGRAMS": action_value_launch._PROGRAMS,
        "BLOCK": action_value_launch._TILE_BYTES * 8 // COMPUTE[dtype].primitive_bitwidth,
    }
    if weighed:
        names |= {"mask": Strided("*u1", (1,)), "weights": row}
    if weighed or reduction != "mean":
        names |= {"surprise": given}
    if weighed and reduction == "mean":
        names |= {"reciprocal": computed}
    return names | ({} if single else {"partials": computed, "arrivals": "*i32"})

rows = []
for dtype in COMPUTE:
    variants = [("target", "mean", "l2", False, True)]
    for weighed, single in itertools.product((False, True), (False, True)):
        variants += [("policy", "mean", "l2", weighed, single), ("ensemble", "mean", "smooth_l1", weighed, single)]
    variants += [("policy", "none", "l2", True, False), ("ensemble", "none", "smooth_l1", True, True)]
    for name, *variant in variants:
        kernel = getattr(action_value_kernel, f"{name}_kernel")
        compiled = compile_as_launched(
            kernel, arguments(dtype, *variant), TARGETS["sm_90"], action_value_launch._WARPS
        )
        cost = _read_nvidia(compiled)
        row = {"registers": cost.registers, "spilled": cost.spill_bytes, "bits": max(cost.loads)}
        rows.append({"kernel": (name, dtype, *variant), **row})
print(json.dumps(rows))
"""


def test_the_kernels_compile_for_sm_90_without_spills_and_with_wide_loads() -> None:
    """In a process without the interpreter. 64 registers let four programs of 256 threads onto a processor."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM, str(BENCH)]
    output = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    rows = json.loads(output.stdout)
    assert len(rows) == 33
    assert [row for row in rows if row["spilled"]] == []
    assert [row for row in rows if row["bits"] < (64 if "bf16" in row["kernel"] else 128)] == []
    assert [row for row in rows if row["registers"] > (64 if "fp64" not in row["kernel"] else 96)] == []
