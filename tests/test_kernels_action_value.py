"""Value target, ensemble loss and soft policy loss: hand-computed cases, backends against the reference, semantics."""

import math

import pytest
import torch
from fusedrl.kernels import VerificationError, ensemble_loss, soft_policy_loss, use_backend, value_target
from fusedrl.kernels import action_value_operators as operators
from fusedrl.kernels.backend import fastest_backend
from helpers_action_value import (
    BACKENDS,
    FAST,
    LAYOUTS,
    TOLERANCE,
    in_float64,
    of_ensemble,
    of_policy,
    of_target,
    problem,
)
from hypothesis import given, settings
from hypothesis import strategies as st

INF, NAN = math.inf, math.nan
LOSS_FUNCTIONS, REDUCTIONS = ("l1", "l2", "smooth_l1"), ("mean", "sum", "none")


@pytest.fixture(params=BACKENDS)
def any_backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn, the reference included: it too must meet the hand-computed numbers."""
    return request.param


def tensor(x, device=None) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64, device=device)


# --- hand-computed ------------------------------------------------------------------------------------------------


def test_a_hand_computed_target(any_backend, device) -> None:
    """The least of (3, 4), (5, 2), (1, 1); log π = (−1, −2, 0) at α = ½ adds (½, 1, 0); γ = ½."""
    next_values, reward = tensor([[3, 5, 1], [4, 2, 1]], device), tensor([1, 2, 3], device)
    terminated = torch.tensor([False, False, True], device=device)
    plain = value_target(next_values, reward, terminated, 0.5, backend=any_backend)
    assert plain.next_value.tolist() == [3, 2, 1]
    assert plain.value_target.tolist() == [2.5, 3, 3]
    log_prob = tensor([-1, -2, 0], device)
    soft = value_target(next_values, reward, terminated, 0.5, log_prob=log_prob, alpha=0.5, backend=any_backend)
    assert soft.next_value.tolist() == [3.5, 3, 1]
    assert soft.value_target.tolist() == [2.75, 3.5, 3]


@pytest.mark.parametrize(
    ("loss_function", "terms", "slopes"),
    [
        # Errors (½, −3) of one member and (−2, ¼) of the other.
        ("l1", [[0.5, 3], [2, 0.25]], [[1, -1], [-1, 1]]),
        ("l2", [[0.25, 9], [4, 0.0625]], [[1, -6], [-4, 0.5]]),
        ("smooth_l1", [[0.125, 2.5], [1.5, 0.03125]], [[0.5, -1], [-1, 0.25]]),
    ],
)
def test_hand_computed_ensemble_losses(any_backend, device, loss_function, terms, slopes) -> None:
    target, terms, slopes = tensor([1, 4], device), tensor(terms, device), tensor(slopes, device)
    values = tensor([[1.5, 1], [-1, 4.25]], device).requires_grad_()
    weights = tensor([3, 1], device)

    def run(**options):
        loss, priority = ensemble_loss(values, target, loss_function, backend=any_backend, **options)
        return loss, priority, torch.autograd.grad(loss.sum(), values)[0]

    loss, priority, gradient = run()
    assert loss.item() == terms.sum().item() / 2
    assert priority.tolist() == [4, 9]
    assert gradient.tolist() == (slopes / 2).tolist()
    loss, priority, gradient = run(per_member=True, priority="abs")
    assert loss.item() == terms.sum().item() / 4
    assert priority.tolist() == [2, 3]
    assert gradient.tolist() == (slopes / 4).tolist()
    loss, _, gradient = run(weights=weights)
    assert loss.item() == (terms * weights).sum().item() / 4
    assert gradient.tolist() == (slopes * weights / 4).tolist()
    loss, priority, gradient = run(mask=torch.tensor([False, True], device=device), weights=weights)
    assert loss.item() == terms[:, 1].sum().item()
    assert priority.tolist() == [0, 9]
    assert gradient.tolist() == (slopes * tensor([0, 1], device)).tolist()
    loss, _, gradient = run(reduction="none", weights=weights)
    assert loss.tolist() == (terms * weights).sum(0).tolist()
    assert gradient.tolist() == (slopes * weights).tolist()
    loss, _, gradient = run(reduction="none", per_member=True)
    assert loss.tolist() == terms.tolist()
    assert gradient.tolist() == slopes.tolist()


def test_a_hand_computed_policy_loss(any_backend, device) -> None:
    """½ log π − min Q = (−½ − 1, −1½ − 2, 0 − 2), of weights (3, 1, 0); the second sample's values tie."""
    values = tensor([[1, 2, 2], [3, 2, 5]], device).requires_grad_()
    log_prob = tensor([-1, -3, 0], device).requires_grad_()

    def run(**options):
        loss, entropy = soft_policy_loss(values, log_prob, 0.5, backend=any_backend, **options)
        return loss, entropy.item(), *torch.autograd.grad(loss.sum(), (values, log_prob))

    loss, entropy, d_values, d_log_prob = run()
    assert loss.item() == pytest.approx(-7 / 3)
    assert entropy == pytest.approx(4 / 3)
    assert torch.allclose(-3 * d_values, tensor([[1, 0.5, 1], [0, 0.5, 0]], device))
    assert d_log_prob.tolist() == pytest.approx([1 / 6] * 3)
    loss, entropy, d_values, d_log_prob = run(weights=tensor([3, 1, 0], device))
    assert loss.item() == (-3 * 1.5 - 3.5) / 4
    assert entropy == pytest.approx(4 / 3)
    assert d_values.tolist() == [[-0.75, -0.125, 0], [0, -0.125, 0]]
    assert d_log_prob.tolist() == [0.375, 0.125, 0]
    mask = torch.tensor([True, True, False], device=device)
    loss, entropy, d_values, _ = run(mask=mask, weights=tensor([3, 1, 7], device), reduction="none")
    assert loss.tolist() == [-4.5, -3.5, 0]
    assert entropy == 2
    assert d_values.tolist() == [[-3, -0.5, 0], [0, -0.5, 0]]
    loss, entropy, _, _ = run(mask=mask, reduction="sum")
    assert (loss.item(), entropy) == (-5, 2)


@pytest.mark.parametrize("ties", [2, 3, 5])
def test_members_that_tie_for_the_least_share_its_gradient(any_backend, device, ties) -> None:
    """Zeros of both signs are equal; the first and last members have more."""
    values = torch.tensor([3.0, *[0.0, -0.0, 0.0, -0.0, 0.0][:ties], 1.0], device=device).repeat(4, 1).t()
    values.requires_grad_()
    loss, _ = soft_policy_loss(values, torch.zeros(4, device=device), 1.0, reduction="sum", backend=any_backend)
    (gradient,) = torch.autograd.grad(loss, values)
    (expected,) = torch.autograd.grad(-values.amin(0).sum(), values)
    assert torch.allclose(gradient, expected)
    assert gradient[1].tolist() == pytest.approx([-1 / ties] * 4)


# --- against the reference ----------------------------------------------------------------------------------------

batches = st.sampled_from([(), (1,), (3,), (7,), (2, 3), (1, 2, 1)])
layouts = st.sampled_from([name for name in LAYOUTS if name not in ("one member expanded", "batch transposed")])


def laid_out(arguments, layout):
    """The values in another layout, where they have a batch."""
    values = arguments["values"].detach()
    return arguments | {"values": (LAYOUTS[layout](values) if values.ndim > 1 else values).requires_grad_()}


def agree(found, expected, dtype, size) -> None:
    assert found.dtype == dtype
    assert found.shape == expected.shape
    assert ((found.double() - expected).abs() <= TOLERANCE[dtype] * size).all()


@given(
    batch=batches,
    members=st.integers(1, 4),
    dtype=st.sampled_from(list(TOLERANCE)),
    gamma=st.sampled_from([0.0, 0.3, 0.99, 1.0]),
    gamma_kind=st.sampled_from(["number", "0-d", "per sample", "one element"]),
    alpha=st.sampled_from([None, 0.2, torch.tensor(0.7), torch.tensor(1.5, dtype=torch.float64)]),
    mask_dtype=st.sampled_from([torch.bool, torch.int64, torch.float32, torch.uint8]),
    layout=layouts,
    seed=st.integers(0, 100),
)
@settings(max_examples=40, deadline=None, derandomize=True)
@pytest.mark.parametrize("backend", FAST)
def test_targets_agree_with_the_reference(
    backend, device, batch, members, dtype, gamma, gamma_kind, alpha, mask_dtype, layout, seed
) -> None:
    arguments = laid_out(problem(batch, members, dtype=dtype, device=device, seed=seed), layout)
    arguments["terminated"] = (3 * arguments["terminated"]).to(mask_dtype)
    shape = {"0-d": (), "per sample": batch, "one element": (1,) if batch else ()}
    if gamma_kind != "number":
        gamma = torch.full(shape[gamma_kind], gamma, device=device)
    results = []
    for name, inputs in ((backend, arguments), ("reference", in_float64(arguments))):
        entropy = {} if alpha is None else {"log_prob": inputs["log_prob"], "alpha": alpha}
        results.append(value_target(**of_target(inputs), gamma=gamma, **entropy, backend=name))
    size = 1 + sum(arguments[k].double().abs().max() for k in ("values", "reward", "log_prob"))
    for found, expected in zip(*results, strict=True):
        assert not found.requires_grad
        agree(found, expected, dtype, 2 * size)


@given(
    batch=batches,
    members=st.integers(1, 4),
    dtype=st.sampled_from(list(TOLERANCE)),
    loss_function=st.sampled_from(LOSS_FUNCTIONS),
    priority=st.sampled_from(["square", "abs"]),
    per_member=st.booleans(),
    reduction=st.sampled_from(REDUCTIONS),
    mask=st.booleans(),
    weights=st.booleans(),
    block=st.sampled_from([2, 4096]),
    layout=layouts,
    seed=st.integers(0, 100),
)
@settings(max_examples=60, deadline=None, derandomize=True)
@pytest.mark.parametrize("backend", FAST)
def test_ensemble_losses_agree_with_the_reference(
    backend,
    device,
    batch,
    members,
    dtype,
    loss_function,
    priority,
    per_member,
    reduction,
    mask,
    weights,
    block,
    layout,
    seed,
) -> None:
    arguments = laid_out(
        problem(batch, members, dtype=dtype, device=device, mask=mask, weights=weights, seed=seed), layout
    )
    options = {"priority": priority, "per_member": per_member, "reduction": reduction}
    results = []
    with pytest.MonkeyPatch.context() as patch:
        in_blocks(patch, block, dtype)
        for name, inputs in ((backend, arguments), ("reference", in_float64(arguments))):
            loss, priorities = ensemble_loss(
                **of_ensemble(inputs), loss_function=loss_function, **options, backend=name
            )
            upstream = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype, device=device).view(loss.shape)
            (gradient,) = torch.autograd.grad(loss, inputs["values"], upstream)
            assert not priorities.requires_grad
            results.append((loss.detach(), priorities, gradient))
    # Of a square, of the sum over members and samples where it is one, and of the weights.
    size = (1 + arguments["values"].double().abs().max() + arguments["target"].double().abs().max()) ** 2
    size = size * members * (math.prod(batch) if reduction == "sum" else 1)
    size = size * (1 if arguments["weights"] is None else 1 + arguments["weights"].double().max())
    for found, expected in zip(*results, strict=True):
        agree(found, expected, dtype, size)


@given(
    batch=batches,
    members=st.integers(1, 4),
    dtype=st.sampled_from(list(TOLERANCE)),
    alpha=st.sampled_from([0.0, 0.3, torch.tensor(0.7), torch.tensor(1.5, dtype=torch.float64)]),
    reduction=st.sampled_from(REDUCTIONS),
    mask=st.booleans(),
    weights=st.booleans(),
    block=st.sampled_from([2, 4096]),
    layout=layouts,
    seed=st.integers(0, 100),
)
@settings(max_examples=50, deadline=None, derandomize=True)
@pytest.mark.parametrize("backend", FAST)
def test_policy_losses_agree_with_the_reference(
    backend, device, batch, members, dtype, alpha, reduction, mask, weights, block, layout, seed
) -> None:
    arguments = laid_out(
        problem(batch, members, dtype=dtype, device=device, mask=mask, weights=weights, seed=seed), layout
    )
    results = []
    with pytest.MonkeyPatch.context() as patch:
        in_blocks(patch, block, dtype)
        for name, inputs in ((backend, arguments), ("reference", in_float64(arguments))):
            loss, *metrics = soft_policy_loss(**of_policy(inputs), alpha=alpha, reduction=reduction, backend=name)
            upstream = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype, device=device).view(loss.shape)
            gradients = torch.autograd.grad(loss, (inputs["values"], inputs["log_prob"]), upstream)
            assert not any(x.requires_grad for x in metrics)
            results.append((loss.detach(), *metrics, *gradients))
    size = 2 * (1 + arguments["values"].double().abs().max() + arguments["log_prob"].double().abs().max())
    size = size * (math.prod(batch) if reduction == "sum" else 1)
    size = size * (1 if arguments["weights"] is None else 1 + arguments["weights"].double().max())
    for found, expected in zip(*results, strict=True):
        agree(found, expected, dtype, size)


def in_blocks(patch: pytest.MonkeyPatch, block: int, dtype: torch.dtype = torch.float64) -> None:
    """Have the kernels work in tiles of ``block`` samples, shared by at most 4 programs."""
    from fusedrl.kernels import action_value_launch
    from helpers_launches import plan_with

    tile = block * (8 if dtype == torch.float64 else 4)
    plan_with(patch, action_value_launch, _TILE_BYTES=tile, _PROGRAMS=4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_give_the_same_numbers(any_backend, device, layout) -> None:
    arguments = problem((4, 3), 3, device=device, mask=True, weights=True)
    results = []
    for change in (LAYOUTS["contiguous"], LAYOUTS[layout]):
        changed = {
            k: x if x is None else x.detach().t().contiguous().t() if x.ndim == 2 else change(x.detach())
            for k, x in arguments.items()
        }
        if layout == "one member expanded":
            changed["values"] = LAYOUTS[layout](arguments["values"].detach())
            changed["values"] = changed["values"].contiguous() if not results else changed["values"]
        for name in ("values", "log_prob"):
            changed[name] = changed[name].requires_grad_()
        target = value_target(**of_target(changed), gamma=0.9, backend=any_backend)
        loss, priority = ensemble_loss(**of_ensemble(changed), loss_function="l2", backend=any_backend)
        policy = soft_policy_loss(**of_policy(changed), alpha=0.3, backend=any_backend)
        results.append(
            [
                *target,
                loss,
                priority,
                *policy,
                *torch.autograd.grad(loss, changed["values"]),
                *torch.autograd.grad(policy.loss, (changed["values"], changed["log_prob"])),
            ]
        )
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_sums_over_several_programs_are_those_of_the_reference(monkeypatch, device, reduction) -> None:
    in_blocks(monkeypatch, 16)
    arguments = problem((200,), device=device, mask=True, weights=True)
    found, expected = (
        [
            *ensemble_loss(**of_ensemble(arguments), loss_function="l2", reduction=reduction, backend=backend),
            *soft_policy_loss(**of_policy(arguments), alpha=0.3, reduction=reduction, backend=backend),
        ]
        for backend in ("triton", "reference")
    )
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", FAST)
def test_results_are_bitwise_reproducible_with_many_programs(monkeypatch, backend, device, reduction) -> None:
    in_blocks(monkeypatch, 16)
    arguments = problem((200,), dtype=torch.float32, device=device, mask=True, weights=True)

    def run() -> list[torch.Tensor]:
        loss, priority = ensemble_loss(
            **of_ensemble(arguments), loss_function="smooth_l1", reduction=reduction, backend=backend
        )
        policy = soft_policy_loss(**of_policy(arguments), alpha=0.3, reduction=reduction, backend=backend)
        leaves = (arguments["values"], arguments["log_prob"])
        return [
            loss,
            priority,
            *policy,
            *torch.autograd.grad(loss.sum(), leaves[0]),
            *torch.autograd.grad(policy.loss.sum(), leaves),
        ]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_the_kernels_write_every_element(monkeypatch, device) -> None:
    """What they write to is filled with NaN first, in one tile and in several programs of several tiles."""
    from fusedrl.kernels import action_value_launch

    def poisoned(allocate):
        def allocate_and_fill(*arguments, **options):
            x = allocate(*arguments, **options)
            return x.fill_(NAN) if x.is_floating_point() else x

        return allocate_and_fill

    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    for block in (64, 2):
        in_blocks(monkeypatch, block)
        for reduction in REDUCTIONS:
            arguments = problem((23,), 3, device=device, mask=True, weights=True)
            loss, priority = ensemble_loss(
                **of_ensemble(arguments), loss_function="l2", reduction=reduction, backend="triton"
            )
            policy = soft_policy_loss(**of_policy(arguments), alpha=0.3, reduction=reduction, backend="triton")
            leaves = (arguments["values"], arguments["log_prob"])
            gradients = torch.autograd.grad(loss.sum() + policy.loss.sum(), leaves)
            target = value_target(**of_target(arguments), gamma=0.9, backend="triton")
            assert all(x.isfinite().all() for x in (loss, priority, *policy, *gradients, *target))
    assert action_value_launch._PROGRAMS == 4


# --- semantics ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("kind", ["number", "per sample"])
def test_nothing_after_a_terminal_step_reaches_the_target(any_backend, device, poison, kind) -> None:
    arguments = of_target(problem((4,), device=device))
    terminated = arguments["terminated"] = torch.tensor([True, False, True, False], device=device)
    gamma = 0.9 if kind == "number" else torch.where(terminated, poison, 0.9)
    arguments["next_values"] = torch.where(terminated, poison, arguments["next_values"].detach())
    log_prob = torch.where(terminated, poison, torch.zeros(4, device=device, dtype=torch.float64))
    found = value_target(**arguments, gamma=gamma, log_prob=log_prob, alpha=0.1, backend=any_backend)
    assert found.value_target.isfinite().all()
    assert torch.equal(found.value_target[terminated], arguments["reward"][terminated])
    assert not found.next_value[terminated].isfinite().any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("per_member", [False, True])
@pytest.mark.parametrize("weighed", [False, True])
def test_nothing_of_a_masked_sample_reaches_a_result(any_backend, device, reduction, per_member, weighed) -> None:
    arguments = problem((6,), 3, device=device, mask=True, weights=weighed)
    masked = ~arguments["mask"]
    assert 0 < masked.sum() < 6
    results = []
    for poison in (0.0, NAN, INF):
        inputs = {k: x.detach().clone() if isinstance(x, torch.Tensor) else x for k, x in arguments.items()}
        for name in ("values", "log_prob", "target", "weights"):
            if inputs[name] is not None:
                inputs[name][..., masked] = poison
        values, log_prob = inputs["values"].requires_grad_(), inputs["log_prob"].requires_grad_()
        found = []
        for loss_function in LOSS_FUNCTIONS:
            loss, priority = ensemble_loss(
                **of_ensemble(inputs),
                loss_function=loss_function,
                per_member=per_member,
                reduction=reduction,
                backend=any_backend,
            )
            found += [loss, priority, *torch.autograd.grad(loss.sum(), values)]
            assert (priority[masked] == 0).all()
            assert (found[-1][:, masked] == 0).all()
        policy = soft_policy_loss(**of_policy(inputs), alpha=0.3, reduction=reduction, backend=any_backend)
        found += [*policy, *torch.autograd.grad(policy.loss.sum(), (values, log_prob))]
        results.append(found)
    for clean, *poisoned in zip(*results, strict=True):
        assert clean.isfinite().all()
        assert all(torch.equal(clean, x) for x in poisoned)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("members", [1, 3])
def test_with_all_samples_masked_everything_is_zero(any_backend, device, reduction, weighed, members) -> None:
    arguments = problem((6,), members, device=device, mask=True, weights=weighed)
    arguments["mask"] = torch.zeros(6, dtype=torch.bool, device=device)
    loss, priority = ensemble_loss(
        **of_ensemble(arguments), loss_function="smooth_l1", reduction=reduction, backend=any_backend
    )
    policy = soft_policy_loss(**of_policy(arguments), alpha=0.3, reduction=reduction, backend=any_backend)
    leaves = (arguments["values"], arguments["log_prob"])
    gradients = torch.autograd.grad(loss.sum() + policy.loss.sum(), leaves)
    assert all((x == 0).all() for x in (loss, priority, *policy, *gradients))


def test_a_nan_that_counts_is_not_hidden(any_backend, device) -> None:
    """In any member, first or last, in the target, in the log-probability and in a weight."""
    arguments = problem((6,), 3, device=device, weights=True)
    for member, sample in ((0, 0), (1, 1), (2, 2)):
        arguments["values"].data[member, sample] = NAN
    arguments["target"][3] = arguments["log_prob"].data[3] = arguments["weights"][4] = NAN
    hidden = [True] * 5 + [False]
    for loss_function in LOSS_FUNCTIONS:
        loss, priority = ensemble_loss(
            **of_ensemble(arguments), loss_function=loss_function, reduction="none", backend=any_backend
        )
        assert loss.isnan().tolist() == hidden
        assert priority.isnan().tolist() == [True] * 4 + [False] * 2
    loss, entropy = soft_policy_loss(**of_policy(arguments), alpha=1.0, reduction="none", backend=any_backend)
    assert loss.isnan().tolist() == hidden
    assert entropy.isnan()
    (gradient,) = torch.autograd.grad(loss[:3].sum(), arguments["values"])
    assert gradient[:, :3].isnan().all()
    target = value_target(**of_target(arguments | {"terminated": torch.zeros(6, device=device)}), gamma=0.9)
    assert target.value_target.isnan().tolist() == [True] * 3 + [False] * 3


@pytest.mark.parametrize("batch", [(0,), (3, 0)])
@pytest.mark.parametrize("masked", [False, True])
def test_an_empty_batch(any_backend, device, batch, masked) -> None:
    """A mean of nothing is NaN as it is to PyTorch; with a mask it is the 0 of nothing that counts."""
    arguments = problem(batch, device=device, mask=masked)
    target = value_target(**of_target(arguments), gamma=0.9, backend=any_backend)
    assert target.value_target.shape == target.next_value.shape == batch
    for reduction, expected in (("sum", 0.0), ("mean", 0.0 if masked else NAN), ("none", None)):
        loss, priority = ensemble_loss(
            **of_ensemble(arguments), loss_function="l2", reduction=reduction, backend=any_backend
        )
        policy = soft_policy_loss(**of_policy(arguments), alpha=0.3, reduction=reduction, backend=any_backend)
        assert priority.shape == batch
        for x in (loss, policy.loss):
            assert x.shape == (batch if expected is None else ())
            assert expected is None or x.item() == pytest.approx(expected, nan_ok=True)
        (loss.sum() + policy.loss.sum()).backward()
        assert arguments["values"].grad.shape == arguments["values"].shape


def test_what_is_a_constant_gets_no_gradient(any_backend, device) -> None:
    arguments = problem(device=device, weights=True)
    target, weights = arguments["target"].requires_grad_(), arguments["weights"].requires_grad_()
    alpha = torch.tensor(0.3, dtype=torch.float64, device=device, requires_grad=True)
    loss, _ = ensemble_loss(**of_ensemble(arguments), loss_function="l2", backend=any_backend)
    policy = soft_policy_loss(**of_policy(arguments), alpha=alpha, backend=any_backend)
    for create_graph in (False, True):
        found = torch.autograd.grad(
            loss + policy.loss,
            (target, weights, alpha),
            create_graph=create_graph,
            retain_graph=True,
            allow_unused=True,
        )
        assert found == (None,) * 3
    constant = ensemble_loss(arguments["values"].detach(), target, "l2", weights=weights, backend=any_backend)
    assert not constant.loss.requires_grad
    found = value_target(**of_target(arguments), gamma=alpha, log_prob=arguments["log_prob"], alpha=alpha)
    assert not found.value_target.requires_grad
    with torch.no_grad():
        assert not ensemble_loss(**of_ensemble(arguments), loss_function="l2", backend=any_backend).loss.requires_grad


def test_only_what_needs_a_gradient_gets_one(any_backend, device) -> None:
    arguments = problem(device=device)
    values, log_prob = arguments["values"], arguments["log_prob"]
    both = torch.autograd.grad(soft_policy_loss(values, log_prob, 0.3, backend=any_backend).loss, (values, log_prob))
    for i, inputs in enumerate([(values, log_prob.detach()), (values.detach(), log_prob)]):
        loss, _ = soft_policy_loss(*inputs, 0.3, backend=any_backend)
        assert torch.equal(torch.autograd.grad(loss, inputs[i])[0], both[i])


def test_results_have_the_floating_dtype_of_the_inputs_together(any_backend, device) -> None:
    arguments = problem(dtype=torch.float32, device=device)
    values = arguments["values"].detach().bfloat16().requires_grad_()
    target = value_target(values, torch.ones(5, device=device).long(), arguments["terminated"], 0.9)
    assert target.value_target.dtype == target.next_value.dtype == torch.bfloat16
    loss, priority = ensemble_loss(values, arguments["target"], "l2", backend=any_backend)
    policy = soft_policy_loss(values, arguments["log_prob"], 0.3, backend=any_backend)
    assert {x.dtype for x in (loss, priority, *policy)} == {torch.float32}
    (gradient,) = torch.autograd.grad(loss, values)
    assert gradient.dtype == torch.bfloat16
    expected = values.detach().double().requires_grad_()
    reference = ensemble_loss(expected, arguments["target"].double(), "l2", backend="reference").loss
    assert loss.item() == pytest.approx(reference.item(), rel=1e-6)


@pytest.mark.parametrize("make", [float, lambda x: torch.tensor(x, dtype=torch.float64)], ids=["number", "0-d"])
def test_coefficients_keep_float64_precision(any_backend, device, make) -> None:
    """1 − 2⁻⁴⁰ rounds to 1 in float32."""
    one = torch.ones(1, dtype=torch.float64, device=device)
    x = make(1 - 2**-40)
    target = value_target(one[None], 0 * one, 0 * one, x, backend=any_backend)
    assert target.value_target.item() == 1 - 2**-40
    soft = value_target(one[None], 0 * one, 0 * one, 1.0, log_prob=one, alpha=x, backend=any_backend)
    assert soft.value_target.item() == 2**-40
    assert soft_policy_loss(0 * one[None], one, x, backend=any_backend).loss.item() == 1 - 2**-40


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_that_of_inputs_and_results_only(any_backend, device, dtype) -> None:
    """The sum of 4096 squares of 16 is 2²⁰, and the slope 3·2⁻²⁵ is no float16, but its product with 2¹⁵ is."""

    def run(x: float):
        values = torch.full((1, 4096), x, dtype=dtype, device=device, requires_grad=True)
        loss, _ = ensemble_loss(values, torch.zeros_like(values[0]), "l2", backend=any_backend)
        return loss.item(), torch.autograd.grad(loss, values, torch.full_like(loss, 2.0**15))[0]

    assert run(16.0)[0] == 256
    assert (run(3 * 2.0**-14)[1] == 3 * 2.0**-10).all()


def test_inputs_are_not_written(any_backend, device) -> None:
    arguments = problem(device=device, mask=True, weights=True)
    before = {k: x.detach().clone() for k, x in arguments.items()}
    for reduction in REDUCTIONS:
        for loss_function in LOSS_FUNCTIONS:
            loss = ensemble_loss(
                **of_ensemble(arguments), loss_function=loss_function, reduction=reduction, backend=any_backend
            ).loss
            loss.sum().backward()
        loss = soft_policy_loss(**of_policy(arguments), alpha=0.3, reduction=reduction, backend=any_backend).loss
        loss.sum().backward()
    value_target(**of_target(arguments), gamma=0.9, log_prob=arguments["log_prob"], alpha=1.0, backend=any_backend)
    assert all(torch.equal(arguments[k].detach(), x) for k, x in before.items())


# --- verify -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_verify_accepts_what_is_right(device, dtype, weighed, reduction) -> None:
    arguments = problem((3, 2), dtype=dtype, device=device, mask=weighed, weights=weighed)
    with use_backend("verify"):
        value_target(**of_target(arguments), gamma=0.9, log_prob=arguments["log_prob"], alpha=torch.tensor(0.3))
        for loss_function in LOSS_FUNCTIONS:
            loss, _ = ensemble_loss(**of_ensemble(arguments), loss_function=loss_function, reduction=reduction)
            loss.sum().backward()
        soft_policy_loss(**of_policy(arguments), alpha=0.3, reduction=reduction).loss.sum().backward()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_verify_accepts_what_is_right_though_the_dtype_has_few_digits_for_it(device, dtype) -> None:
    """Gradients of a large batch are subnormal in half precision."""
    arguments = problem((2000,), dtype=dtype, device=device, weights=True)
    with use_backend("verify"):
        ensemble_loss(**of_ensemble(arguments), loss_function="smooth_l1").loss.backward()
        soft_policy_loss(**of_policy(arguments), alpha=0.01).loss.backward()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_verify_accepts_what_is_right_though_the_dtype_cannot_hold_it(device, dtype) -> None:
    """The square of a large error is infinite, in the narrower dtypes not so in the reference, which is in float64."""
    large = torch.finfo(dtype).max / 8
    values = torch.full((2, 3), large, dtype=dtype, device=device)
    with use_backend("verify"):
        found = ensemble_loss(values, -values[0], loss_function="l2", reduction="none")
    assert found.loss.isinf().all()


@pytest.mark.parametrize("broken", ["target", "ensemble", "ensemble_backward", "policy", "policy_backward"])
def test_verify_names_the_element_that_is_wrong(monkeypatch, device, broken) -> None:
    arguments = problem((4,), device=device)
    module = operators.backend_module(fastest_backend(arguments["values"]))
    right = getattr(module, broken)

    def wrong(*inputs):
        found = right(*inputs)
        (found[0] if isinstance(found, list) else found)[..., 2] += 0.5
        return found

    def run() -> None:
        if broken == "target":
            value_target(**of_target(arguments), gamma=0.9)
        elif "ensemble" in broken:
            ensemble_loss(**of_ensemble(arguments), loss_function="l1", reduction="none").loss.sum().backward()
        else:
            soft_policy_loss(**of_policy(arguments), alpha=0.3, reduction="none").loss.sum().backward()

    monkeypatch.setattr(module, broken, wrong)
    with use_backend("verify"), pytest.raises(VerificationError, match=r"at index \((\d, )?2"):
        run()


# --- errors -------------------------------------------------------------------------------------------------------

TARGET = {"next_values": torch.zeros(2, 4), "reward": torch.zeros(4), "terminated": torch.zeros(4), "gamma": 0.9}
ENSEMBLE = {"values": torch.zeros(2, 4), "target": torch.zeros(4), "loss_function": "l2"}
POLICY = {"values": torch.zeros(2, 4), "log_prob": torch.zeros(4), "alpha": 0.5}
COLUMN, META = torch.zeros(4, 1), torch.zeros(4, device="meta")


@pytest.mark.parametrize(
    ("function", "change", "error", "message"),
    [
        (value_target, {"next_values": torch.zeros(())}, RuntimeError, r"next_values has shape \(\).*\[members, "),
        (value_target, {"next_values": torch.zeros(0, 4)}, RuntimeError, r"next_values has shape \(0, 4\).*one member"),
        (value_target, {"next_values": torch.zeros(2, 4).long()}, RuntimeError, "next_values has .*torch.int64"),
        (value_target, {"reward": COLUMN}, RuntimeError, r"reward has shape \(4, 1\).*next_values has .*\(2, 4\)"),
        (value_target, {"reward": META}, RuntimeError, "reward has .* on meta"),
        (value_target, {"terminated": torch.zeros(1)}, RuntimeError, r"terminated has shape \(1,\)"),
        (value_target, {"gamma": torch.zeros(4, 1)}, RuntimeError, r"gamma has shape \(4, 1\).*broadcast.*\(4,\)"),
        (value_target, {"gamma": META}, RuntimeError, "gamma is on meta"),
        (value_target, {"log_prob": COLUMN, "alpha": 1.0}, RuntimeError, r"log_prob has shape \(4, 1\)"),
        (value_target, {"log_prob": torch.zeros(4)}, TypeError, "log_prob is given, but alpha is None"),
        (value_target, {"log_prob": torch.zeros(4), "alpha": COLUMN}, RuntimeError, r"alpha has shape \(4, 1\)"),
        (value_target, {"backend": "cuda"}, ValueError, "backend is 'cuda'"),
        (value_target, {"gamma": None}, TypeError, "gamma must be a number or a real tensor, but is None"),
        (value_target, {"reward": 1.0}, TypeError, "reward must be a tensor, but is 1.0"),
        (ensemble_loss, {"values": [1.0]}, TypeError, "values must be a tensor"),
        (ensemble_loss, {"target": None}, TypeError, "target must be a tensor, but is None"),
        (soft_policy_loss, {"alpha": None}, TypeError, "alpha must be a number"),
        (ensemble_loss, {"values": torch.zeros(4)}, RuntimeError, r"target has shape \(4,\).*values has shape \(4,\)"),
        (ensemble_loss, {"values": torch.zeros(2, 4).bool()}, RuntimeError, "values has .*torch.bool"),
        (ensemble_loss, {"target": COLUMN}, RuntimeError, r"target has shape \(4, 1\).*shape \(4,\), one value"),
        (ensemble_loss, {"mask": COLUMN.bool()}, RuntimeError, r"mask has shape \(4, 1\)"),
        (ensemble_loss, {"mask": torch.ones(4)}, TypeError, "mask has dtype torch.float32: torch.bool"),
        (ensemble_loss, {"weights": torch.ones(1)}, RuntimeError, r"weights has shape \(1,\)"),
        (ensemble_loss, {"weights": META}, RuntimeError, "weights has .* on meta"),
        (ensemble_loss, {"loss_function": "l3"}, ValueError, "loss_function is 'l3'.*'l1', 'l2', 'smooth_l1'"),
        (ensemble_loss, {"priority": "max"}, ValueError, "priority is 'max'.*'square', 'abs'"),
        (ensemble_loss, {"reduction": "foo"}, ValueError, "reduction is 'foo'.*'none', 'mean', 'sum'"),
        (ensemble_loss, {"backend": "cuda"}, ValueError, "backend is 'cuda'"),
        (soft_policy_loss, {"log_prob": COLUMN}, RuntimeError, r"log_prob has shape \(4, 1\)"),
        (soft_policy_loss, {"log_prob": META}, RuntimeError, "log_prob has .* on meta"),
        (soft_policy_loss, {"alpha": torch.ones(4)}, RuntimeError, r"alpha has shape \(4,\)"),
        (soft_policy_loss, {"mask": torch.ones(4).long()}, TypeError, "mask has dtype torch.int64"),
        (soft_policy_loss, {"weights": COLUMN}, RuntimeError, r"weights has shape \(4, 1\)"),
        (soft_policy_loss, {"reduction": "foo"}, ValueError, "reduction is 'foo'"),
        (soft_policy_loss, {"backend": "cuda"}, ValueError, "backend is 'cuda'"),
    ],
)
def test_a_bad_argument_is_named_before_anything_runs(monkeypatch, function, change, error, message) -> None:
    monkeypatch.setattr(operators, "backend_module", None)
    right = {value_target: TARGET, ensemble_loss: ENSEMBLE, soft_policy_loss: POLICY}[function]
    with pytest.raises(error, match=message):
        function(**right | change)


def test_constants_are_constants_in_forward_mode_too(device) -> None:
    values, one = torch.ones(2, 3, device=device), torch.ones(3, device=device)
    never = torch.zeros(3, dtype=torch.bool, device=device)
    _, along = torch.func.jvp(lambda x: value_target(x, one, never, 0.9).value_target, (values,), (values,))
    assert not along.any()
    _, along = torch.func.jvp(lambda x: ensemble_loss(2 * values, x, "l2").loss, (one,), (one,))
    assert not along.any()
