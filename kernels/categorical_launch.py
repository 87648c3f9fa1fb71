"""Host side of the categorical kernels: tiles, strides and launches; the ``triton`` backend."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .categorical_kernel import gradient_kernel, loss_kernel, projection_kernel
from .categorical_problem import Bellman, Transition, new_gradient
from .dtypes import compute_dtype
from .launching import launch

# One warp, which keeps every exchange between lanes a shuffle or a read of shared memory without a barrier.
_WARPS = 1
# Bytes of a tile [atoms, actions]: 16 elements per thread in float32, all of their loads in flight.
_TILE_BYTES = 2048
# Bytes of the targets that a warp projects onto at once: 2 per thread in float32. Twice as many spill in float64.
_TARGET_BYTES = 256
# One source for each lane of a warp. With fewer sources than lanes the compiler would have every lane prepare all of
# them, exponential included.
_SOURCES = 64 if torch.version.hip else 32


class Tiling(NamedTuple):
    """Block sizes of the kernels; see the drawing in `fusedrl.kernels.categorical_kernel`."""

    actions_power: int
    atoms: int
    targets: int
    sources: int


def tiling(atoms: int, actions: int, itemsize: int, sources: int = _SOURCES) -> Tiling:
    """Choose the blocks for a number of atoms and actions, computed in elements of ``itemsize`` bytes."""
    atoms_power, actions_power = triton.next_power_of_2(atoms), triton.next_power_of_2(actions)
    return Tiling(
        actions_power=actions_power,
        atoms=max(1, min(atoms_power, _TILE_BYTES // (itemsize * actions_power))),
        targets=min(atoms_power, _TARGET_BYTES // itemsize),
        sources=sources,
    )


def forward(transition: Transition, bellman: Bellman, keep: bool) -> list[Tensor]:
    """The loss ``[B]`` and, if it is to be kept, the projected distribution ``[B, atoms]``."""
    log_prob = transition.log_prob
    samples, atoms, actions = log_prob.shape
    dtype = compute_dtype(log_prob.dtype)
    loss = log_prob.new_empty(samples)
    projected = log_prob.new_empty(samples, atoms, dtype=dtype) if keep else None
    tile = tiling(atoms, actions, dtype.itemsize)
    launch(
        loss_kernel,
        samples,
        *(None if x is None else (x, *x.stride()) for x in transition),
        *_bellman_arguments(bellman),
        loss,
        projected,
        atoms,
        actions,
        DTYPE=_TRITON_DTYPE[dtype],
        INDEX=_index(*transition),
        ACTIONS_POWER=tile.actions_power,
        TILE_ATOMS=tile.atoms,
        TARGETS=tile.targets,
        SOURCES=tile.sources,
        num_warps=_WARPS,
    )
    return [loss] if projected is None else [loss, projected]


def backward(log_prob: Tensor, action: Tensor, projected: Tensor, grad: Tensor) -> Tensor:
    """∂L/∂log p, every element written once."""
    found = new_gradient(log_prob)
    samples, atoms, actions = found.shape
    tile = tiling(atoms, actions, projected.dtype.itemsize)
    launch(
        gradient_kernel,
        samples,
        (action, *action.stride()),
        projected.contiguous(),
        (grad, *grad.stride()),
        (found, *found.stride()),
        atoms,
        actions,
        DTYPE=_TRITON_DTYPE[projected.dtype],
        INDEX=_index(found),
        ACTIONS_POWER=tile.actions_power,
        TILE_ATOMS=tile.atoms,
        num_warps=_WARPS,
    )
    return found


def project(prob: Tensor, bellman: Bellman) -> Tensor:
    """The projected distribution ``[B, atoms]`` of ``prob``."""
    projected = torch.empty_like(prob, memory_format=torch.contiguous_format)
    samples, atoms = prob.shape
    dtype = compute_dtype(prob.dtype)
    tile = tiling(atoms, 1, dtype.itemsize)
    launch(
        projection_kernel,
        samples,
        (prob, *prob.stride()),
        *_bellman_arguments(bellman),
        projected,
        atoms,
        DTYPE=_TRITON_DTYPE[dtype],
        INDEX=_index(prob),
        TARGETS=tile.targets,
        SOURCES=tile.sources,
        num_warps=_WARPS,
    )
    return projected


def _bellman_arguments(bellman: Bellman) -> tuple[Any, ...]:
    """Support, reward, terminated with their stride; γ as a number and a tensor, of which one counts."""
    *members, gamma = bellman
    strided = tuple((x, *x.stride()) for x in members)
    if not isinstance(gamma, Tensor):
        return (*strided, gamma, None)
    if gamma.ndim == 0:
        return (*strided, 0.0, (gamma.to(bellman.reward.device, non_blocking=True), 0))
    return (*strided, 0.0, (gamma, *gamma.stride()))


def _index(*tensors: Tensor | None) -> tl.dtype:
    """The integer in which the offsets inside of a sample are computed, padding included."""
    reach = max(
        2 * sum(n * s for n, s in zip(x.shape[1:], x.stride()[1:], strict=True)) for x in tensors if x is not None
    )
    return tl.int64 if reach >= 1 << 31 else tl.int32


_TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}
