"""What the action-value losses cost: torch calls of the ``torch`` backend, launches of the kernels."""

import pytest
import torch
from fusedrl.kernels import ensemble_loss, soft_policy_loss, value_target
from helpers_action_value import of_ensemble, of_policy, of_target, problem
from torch.utils._python_dispatch import TorchDispatchMode

IMPLEMENTATION = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)


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
