"""Any strides run, without a copy where one stride walks the batch; every element is written; offsets may be long."""

import math

import pytest
import torch
from fusedrl.kernels import categorical_launch, categorical_projection, categorical_q_loss, launching
from fusedrl.kernels.categorical_problem import Bellman, Transition, flat
from fusedrl.kernels.launching import Launch
from helpers_categorical import problem
from helpers_launches import plan_with

# From [B1, B2, atoms, actions] to another layout of the same numbers.
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "atoms last": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "batch last": lambda x: x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
    "batch transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda x: x.repeat_interleave(2, -1).repeat_interleave(2, -2)[..., ::2, ::2],
    "every other sample": lambda x: x.repeat_interleave(2, 1)[:, ::2],
}
UNCOPIED = ["contiguous", "atoms last", "batch last", "sliced", "every other sample"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mixed", [False, True], ids=["one layout", "mixed layouts"])
def test_any_strides_give_the_same_numbers(backend, device, layout, mixed) -> None:
    arguments = problem((2, 3), 5, 3, device=device)
    arguments["gamma"] = torch.rand(2, 3, dtype=torch.float64, device=device)

    def run(change, other):
        laid_out = dict(arguments)
        for name in ("log_prob", "next_log_prob", "next_online_log_prob"):
            laid_out[name] = (other if name == "next_log_prob" else change)(arguments[name].detach())
        leaf = laid_out["log_prob"].requires_grad_()
        for name in ("action", "reward", "terminated", "gamma"):
            laid_out[name] = arguments[name].t().contiguous().t() if layout != "contiguous" else arguments[name]
        prob = laid_out["next_log_prob"][..., 1].exp()
        bellman = (laid_out[k] for k in ("support", "reward", "terminated", "gamma"))
        loss, _ = categorical_q_loss(**laid_out, backend=backend)
        projected = categorical_projection(prob, *bellman, backend=backend)
        return loss, *torch.autograd.grad((loss * loss.detach()).sum(), leaf), projected

    same = LAYOUTS["contiguous"]
    expected = run(same, same)
    found = run(LAYOUTS[layout], same if mixed else LAYOUTS[layout])
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("layout", UNCOPIED)
def test_a_batch_of_one_stride_is_not_copied(layout) -> None:
    x = LAYOUTS[layout](torch.zeros(2, 4, 5, 3))
    assert flat(x, 2).shape == (8, 5, 3)
    assert flat(x, 2).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("layout", ["contiguous", "atoms last", "batch last"])
def test_the_gradient_is_laid_out_like_the_log_probabilities(backend, device, layout) -> None:
    """So that the network's backward meets the layout that its forward wrote."""
    arguments = problem((2, 3), device=device)
    leaf = LAYOUTS[layout](arguments["log_prob"].detach()).requires_grad_()
    loss, _ = categorical_q_loss(**arguments | {"log_prob": leaf}, backend=backend)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    assert gradient.stride() == leaf.stride()


def test_every_element_is_written(monkeypatch, backend, device) -> None:
    """Buffers come filled with NaN."""
    arguments = problem((3,), 51, 6, device=device)

    def poisoned(allocate):
        def run(*args, **kwargs):
            x = allocate(*args, **kwargs)
            return x.fill_(math.nan) if x.is_floating_point() else x

        return run

    for owner, name in ((torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    loss, _ = categorical_q_loss(**arguments, backend=backend)
    (gradient,) = torch.autograd.grad(loss.sum(), arguments["log_prob"])
    bellman = (arguments[k] for k in ("support", "reward", "terminated", "gamma"))
    projected = categorical_projection(arguments["next_log_prob"][..., 0].exp(), *bellman, backend=backend)
    assert all(x.isfinite().all() for x in (loss, gradient, projected))


@pytest.mark.parametrize("actions", [1, 7, 40])
@pytest.mark.parametrize("atoms", [2, 3, 64, 130])
def test_tiles_that_atoms_and_actions_do_not_fill(device, atoms, actions) -> None:
    arguments = problem((2,), atoms, actions, device=device)
    found, expected = [], []
    for name, results in (("triton", found), ("reference", expected)):
        loss, _ = categorical_q_loss(**arguments, backend=name)
        results += [loss, *torch.autograd.grad(loss.sum(), arguments["log_prob"])]
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(found, expected, strict=True))


def test_offsets_beyond_32_bits_are_computed_in_64() -> None:
    def index(shape: tuple[int, ...], strides: tuple[int, ...]) -> str:
        return str(categorical_launch._index(torch.empty(0).as_strided((0, *shape), (1, *strides))))

    assert index((51, 6), (6, 1)) == "int32"
    assert index((51, 6), (6 << 24, 1 << 24)) == "int64"
    assert index((51,), (1 << 25,)) == "int64"


def test_the_stride_of_the_support_counts_among_the_offsets(monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(Launch, "__call__", lambda self, *_: seen.append(str(self._options["INDEX"])))
    plan_with(monkeypatch, launching, processors=lambda device: 132)
    log_prob, reward = torch.empty(3, 51, 2, device="meta"), torch.empty(3, device="meta")
    transition = Transition(log_prob, reward.long(), log_prob, log_prob)
    for stride in (1, 1 << 25):
        support = torch.empty(1, device="meta").as_strided((51,), (stride,))
        bellman = Bellman(support, reward, reward, 0.9)
        categorical_launch.forward(transition, bellman, keep=False)
        categorical_launch.project(log_prob[..., 0], bellman)
    assert seen == ["int32", "int32", "int64", "int64"]


def test_blocks_are_bounded_whatever_the_problem() -> None:
    """So that no number of atoms or actions spills."""
    for atoms in (2, 51, 101, 512, 4000):
        for actions in (1, 6, 18, 300):
            for itemsize in (4, 8):
                tile = categorical_launch.tiling(atoms, actions, itemsize, sources=32)
                assert tile.atoms * tile.actions_power * itemsize <= max(2048, tile.actions_power * itemsize)
                assert tile.targets * itemsize <= 256
