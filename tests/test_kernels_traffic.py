"""What the compiled kernels execute, load and store, counted where an emulator runs them: ``make emulate``."""

import os

import pytest
import torch
from fusedrl import kernels

if os.environ.get("FUSEDRL_EMULATE", "0") == "0":
    pytest.skip("counted by the emulator alone", allow_module_level=True)

import triton
from emulator import counted
from helpers_categorical import problem

ROWS, STEPS = 2048, 32  # enough rows not to be split, and sectors that no two of them share


def sectors(*tensors) -> int:
    return sum(x.numel() * x.element_size() for x in tensors) // 32


@pytest.mark.parametrize("time_major", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # a thread's 4 steps of float64 are two accesses
@pytest.mark.parametrize("operation", ["gae", "td_lambda_return", "reward_to_go"])
def test_whole_rows_are_loaded_once_and_stored_once(operation, dtype, time_major) -> None:
    shape = (STEPS, ROWS) if time_major else (ROWS, STEPS)
    value, next_value, reward = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(3))
    done = torch.rand(shape) < 0.1
    options = {"time_dim": 0 if time_major else 1, "backend": "triton"}
    inputs = {
        "gae": (0.9, 0.8, value, next_value, reward, done),
        "td_lambda_return": (0.9, 0.8, next_value, reward, done),
        "reward_to_go": (0.9, reward, done),
    }[operation]
    tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
    with counted() as forward:
        outputs = getattr(kernels, operation)(*inputs, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert (forward.loaded, forward.stored) == (sectors(*tensors), sectors(*outputs))

    leaves, arrived = tensors[:-1], [torch.ones_like(x) for x in outputs]
    with counted() as backward:
        found = torch.autograd.grad(outputs, leaves, arrived)
    assert (backward.loaded, backward.stored) == (sectors(done, *arrived), sectors(*found))


@pytest.mark.parametrize("steps", [2048, 2000])
@pytest.mark.parametrize("time_major", [False, True])
def test_split_rows_that_end_are_loaded_twice_only_up_to_their_ends(steps, time_major) -> None:
    shape, dim = ((steps, 16), 0) if time_major else ((8, steps), 1)
    value, next_value, reward = torch.randn(3, *shape)
    done = torch.zeros(shape, dtype=torch.bool)
    loaded = []
    for every in (steps, 16):  # no row ends but at its end, or each after 16 steps
        done.movedim(dim, 0)[every - 1 :: every] = True
        with counted() as traffic:
            kernels.gae(0.9, 0.8, value, next_value, reward, done, time_dim=dim, backend="triton")
        loaded.append(traffic.loaded / sectors(value, next_value, reward, done))
    shares = 4 if time_major else 2  # of which the last isn't composed
    close = 0.2 if time_major else 0.01  # tiles of few rows share sectors of masks
    assert 1 + (shares - 1) / shares == pytest.approx(loaded[0], rel=close)
    assert loaded[1] < (1.4 if time_major else 1.2)


@pytest.mark.parametrize("gamma", [0.99, 0.5])
def test_what_is_loaded_for_a_projection_grows_with_its_atoms_and_not_with_their_square(gamma) -> None:
    loaded = []
    for atoms in (64, 512):
        prob, support = torch.rand(8, atoms).softmax(-1), torch.linspace(-10, 10, atoms)
        with counted() as traffic:
            kernels.categorical_projection(
                prob, support, torch.randn(8), torch.zeros(8, dtype=torch.bool), gamma, backend="triton"
            )
        loaded.append(traffic.loaded)
    assert loaded[1] < 10 * loaded[0]


def test_a_categorical_loss_of_what_is_loaded_takes_few_instructions() -> None:
    """Of 51 atoms a target meets 3, where γ is near 1. Forward Triton 3.9 takes 10 instructions more than 3.7."""
    arguments = problem((8,), 51, 6, v_min=-10.0, v_max=10.0, dtype=torch.float32)
    arguments |= {"terminated": torch.zeros(8, dtype=torch.bool), "gamma": 0.99}
    with counted() as forward:
        loss, _ = kernels.categorical_q_loss(**arguments, backend="triton")
    with counted() as backward:
        torch.autograd.grad(loss, arguments["log_prob"], torch.ones(8))
    since_triton_3_9 = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
    assert forward.executed <= 8 * (530 if since_triton_3_9 else 520)
    assert backward.executed <= 8 * 120
