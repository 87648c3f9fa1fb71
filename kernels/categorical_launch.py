"""Host side of the categorical kernels: tiles, strides and launches; the ``triton`` backend."""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching
from .categorical_kernel import gradient_kernel, loss_kernel, projection_kernel
from .categorical_problem import Bellman, Transition, loss_dtype, new_gradient, unevenness
from .dtypes import compute_dtype
from .launching import TRITON_DTYPE, Launch, Launcher, Plan, scalar, scalar_arguments, strided

# One warp, which keeps every exchange between lanes a shuffle or a read of shared memory without a barrier.
_WARPS = 1
# Bytes of a tile [atoms, actions]: 16 elements per thread in float32, all of their loads in flight.
_TILE_BYTES = 2048
# Bytes of the targets that a warp projects onto at once: 2 per thread in float32.
_TARGET_BYTES = 256
# Of the atoms whose clipped mass is summed, one for each lane of a warp: of fewer, several lanes would have the same.
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
    samples, atoms, _ = log_prob.shape
    loss = log_prob.new_empty(samples, dtype=loss_dtype(log_prob, bellman.reward))
    found = [loss]
    if keep:
        found.append(log_prob.new_empty(samples, atoms, dtype=compute_dtype(log_prob.dtype)))
    _loss(None, *transition, *bellman[:3], scalar(bellman.gamma, loss), *(found if keep else (loss, None)))
    return found


def _plan_loss(_: None, *arguments: Any) -> Plan:
    *transition, support, reward, terminated, gamma, loss, projected = arguments
    samples, atoms, actions = transition[0].shape
    dtype = compute_dtype(transition[0].dtype)
    each = _samples_of_program(samples, launching.processors(loss.device))
    tile = tiling(atoms, actions, dtype.itemsize)
    launch = Launch(
        loss_kernel,
        triton.cdiv(samples, each),
        [
            *map(_strided, transition),
            *map(strided, (support, reward, terminated)),
            *_discount(gamma),
            loss,
            projected,
            samples,
        ],
        ATOMS=atoms,
        ACTIONS=actions,
        DTYPE=TRITON_DTYPE[dtype],
        INDEX=_index(*transition, support[None]),
        ACTIONS_POWER=tile.actions_power,
        TILE_ATOMS=tile.atoms,
        TARGETS=tile.targets,
        SOURCES=tile.sources,
        UNEVEN=unevenness(support),
        ROUNDING=16 * torch.finfo(dtype).eps,
        SAMPLES=each,
        num_warps=_WARPS,
    )
    return Plan([launch])


_loss = Launcher(_plan_loss)


def backward(log_prob: Tensor, action: Tensor, projected: Tensor, grad: Tensor) -> Tensor:
    """∂L/∂log p, every element written once."""
    found = new_gradient(log_prob)
    _gradient(None, action, projected.contiguous(), grad, found)
    return found


def _plan_gradient(_: None, action: Tensor, projected: Tensor, grad: Tensor, found: Tensor) -> Plan:
    samples, atoms, actions = found.shape
    each = _samples_of_program(samples, launching.processors(found.device))
    tile = tiling(atoms, actions, projected.dtype.itemsize)
    launch = Launch(
        gradient_kernel,
        triton.cdiv(samples, each),
        [strided(action), projected, strided(grad), _strided(found), samples],
        ATOMS=atoms,
        ACTIONS=actions,
        DTYPE=TRITON_DTYPE[projected.dtype],
        INDEX=_index(found),
        ACTIONS_POWER=tile.actions_power,
        TILE_ATOMS=tile.atoms,
        SAMPLES=each,
        num_warps=_WARPS,
    )
    return Plan([launch])


_gradient = Launcher(_plan_gradient)


def project(prob: Tensor, bellman: Bellman) -> Tensor:
    """The projected distribution ``[B, atoms]`` of ``prob``."""
    projected = torch.empty_like(prob, memory_format=torch.contiguous_format)
    _projection(None, prob, *bellman[:3], scalar(bellman.gamma, prob), projected)
    return projected


def _plan_projection(_: None, *arguments: Any) -> Plan:
    prob, support, reward, terminated, gamma, projected = arguments
    samples, atoms = prob.shape
    dtype = compute_dtype(prob.dtype)
    each = _samples_of_program(samples, launching.processors(prob.device))
    tile = tiling(atoms, 1, dtype.itemsize)
    launch = Launch(
        projection_kernel,
        triton.cdiv(samples, each),
        [*map(strided, (prob, support, reward, terminated)), *_discount(gamma), projected, samples],
        ATOMS=atoms,
        DTYPE=TRITON_DTYPE[dtype],
        INDEX=_index(prob, support[None]),
        TARGETS=tile.targets,
        SOURCES=tile.sources,
        UNEVEN=unevenness(support),
        ROUNDING=16 * torch.finfo(dtype).eps,
        SAMPLES=each,
        num_warps=_WARPS,
    )
    return Plan([launch])


_projection = Launcher(_plan_projection)


def _discount(gamma: Any) -> tuple[Any, Any]:
    """γ as a number and a tensor with its stride, of which one counts."""
    return scalar_arguments(gamma, *(gamma.stride() or (0,) if isinstance(gamma, Tensor) else ()))


def _samples_of_program(samples: int, processors: int) -> int:
    """One, or 4 of many: programs don't start faster than three in two nanoseconds. Of one warp 32 run at once."""
    return 4 if samples >= 4 * 32 * processors else 1


def _strided(x: Tensor | None) -> tuple[Any, ...] | None:
    """`strided`, with strides that are constants where samples are dense: then they say little but how many atoms."""
    if x is None or x.stride(0) != math.prod(x.shape[1:]):
        return strided(x)
    return (x, *map(tl.constexpr, x.stride()))


def _index(*tensors: Tensor | None) -> tl.dtype:
    """The integer in which the offsets inside of a sample are computed, padding included."""
    reach = max(
        2 * sum(n * s for n, s in zip(x.shape[1:], x.stride()[1:], strict=True)) for x in tensors if x is not None
    )
    return tl.int64 if reach >= 1 << 31 else tl.int32
