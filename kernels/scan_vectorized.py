"""The ``torch`` backend: the recurrence by doubling, in PyTorch operators, tile by tile.

A pass of stride s folds into each step the result of the step s later, ``y[t] += c[t] · y[t+s]``, and doubles the
reach of the coefficients, ``c[t] *= c[t+s]``; after log₂(steps) passes over y = d, y is the solution. The adjoint
recurrence runs forwards in time, with the transposed passes ``a[t+s] += c[t] · a[t]`` and the same coefficients. A
few steps are walked one by one.

Tiles keep the passes in cache and bound the work: rows are split first, then time, whose tiles are walked in the
direction of the recurrence with a carry between them, so that the cost is O(B·T) for any T. Nothing is transposed:
time stays the dimension it is, with the strides it has.
"""

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from . import scan_fixed_discount
from .scan_problem import FIXED_DISCOUNT, GAE, SCAN, TD_LAMBDA, Recurrence

# Elements of a tile. Its float32 arrays (c, y and their product) then stay in a CPU's second-level cache, and a pass is
# the largest that PyTorch leaves to one thread. That is on purpose: where environments keep the
# cores busy, each of the hundreds of passes would wait at a barrier for a thread that isn't running. A tile four times
# as large is up to twice as fast on idle cores, and was 70 times slower (65536×32) beside one other process on two.
_TILE = 1 << 15
# Steps of a tile that are walked one by one: an operation for each, of a doubling's 3·log₂(steps) over all of them.
_FEW_STEPS = 24


def forward(problem: Recurrence, time_dim: int) -> list[Tensor]:
    """The outputs of ``problem``."""
    if problem.kind == FIXED_DISCOUNT:
        return scan_fixed_discount.forward(forward, problem, time_dim)
    dtype = problem.compute_dtype
    outputs = problem.new_outputs()
    problem = _with_tensor_scalars(problem, dtype)
    for tiles in _tiles_of_rows((*problem, *outputs), problem.reward, time_dim):
        carry = None
        for fields in reversed(tiles):
            part, (y, *target) = Recurrence(*fields[:8]), fields[8:]
            coefficient, weight = _coefficients(part, time_dim, ends=carry is None)
            solution = _increment(part, weight, dtype, out=y if y.dtype == dtype else None)
            if carry is not None:
                solution.select(time_dim, -1).addcmul_(coefficient.select(time_dim, -1), carry)
            _solve(coefficient, solution, time_dim)
            carry = solution.select(time_dim, 0)
            if solution is not y:
                y.copy_(solution)
            if target:
                torch.add(solution, part.value, out=target[0])
    return outputs


def backward(
    problem: Recurrence, time_dim: int, y: Tensor | None, grads: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor]:
    """Per-step gradients of the needed inputs among γ, λ, reward, value and next value."""
    if problem.kind == FIXED_DISCOUNT:
        return scan_fixed_discount.backward(forward, backward, problem, time_dim, grads, needs)
    dtype = problem.compute_dtype
    found = [torch.empty_like(problem.reward, dtype=dtype) if need else None for need in needs]
    y_next = None if y is None else _next_step(y, time_dim)
    grad_y, grad_target = [*grads, None][:2]
    problem = _with_tensor_scalars(problem, dtype)
    for tiles in _tiles_of_rows((*problem, y_next, grad_y, grad_target, *found), problem.reward, time_dim):
        carry = None
        for fields in tiles:
            part, (y_next_part, grad_y_part, grad_target_part, *out) = Recurrence(*fields[:8]), fields[8:]
            ends = fields is tiles[-1]
            coefficient, weight = _coefficients(part, time_dim, ends=ends)
            adjoint = _sum(grad_y_part, grad_target_part, dtype)
            if carry is not None:
                adjoint.select(time_dim, 0).add_(carry)
            _solve_adjoint(coefficient, adjoint, time_dim)
            carry = coefficient.select(time_dim, -1) * adjoint.select(time_dim, -1)
            _write_gradients(part, time_dim, weight, adjoint, y_next_part, grad_target_part, out, ends=ends)
    return [x for x in found if x is not None]


def _write_gradients(
    part: Recurrence,
    time_dim: int,
    weight: Any,
    adjoint: Tensor,
    y_next: Tensor | None,
    grad_target: Tensor | None,
    out: Sequence[Any],
    *,
    ends: bool,
) -> None:
    """From the adjoint λ_t = ∂L/∂d_t to the gradients of one tile; ∂L/∂c_t is λ_t · y_{t+1}."""
    kind, gamma, lmbda, _, _, next_value, done, _ = part
    for_gamma, for_lmbda, for_reward, for_value, for_next_value = out
    if for_reward is not None:
        for_reward.copy_(adjoint)
    if for_value is not None:
        torch.neg(adjoint, out=for_value)
        if grad_target is not None:
            for_value.add_(grad_target)
    if for_next_value is not None:
        torch.mul(weight, adjoint, out=for_next_value).masked_fill_(_no_bootstrap(part), 0.0)
    if y_next is None:
        return
    if kind == SCAN:
        d_coefficient = adjoint * y_next
        for_gamma.copy_(d_coefficient if done is None else torch.where(done, 0.0, d_coefficient))
        return
    cut = _cut(part, time_dim, ends=ends)
    d_coefficient = torch.where(cut, 0.0, adjoint * y_next)
    d_weight = torch.where(_no_bootstrap(part), 0.0, adjoint * next_value)
    if for_gamma is not None:
        d_gamma = d_weight if kind == GAE else d_weight * torch.where(cut, 1.0, 1 - lmbda)
        torch.add(d_gamma, d_coefficient * lmbda, out=for_gamma)
    if for_lmbda is not None:
        d_lmbda = d_coefficient if kind == GAE else d_coefficient - torch.where(cut, 0.0, d_weight)
        torch.mul(d_lmbda, gamma, out=for_lmbda)


def _solve(coefficient: Tensor, y: Tensor, time_dim: int) -> None:
    """y_t ← y_t + c_t · y_{t+1}, solved in place: by doubling, or step by step where they are few."""
    if _walks(y, time_dim):
        following, *earlier = reversed(y.unbind(time_dim))
        for step, c in zip(earlier, reversed(coefficient.unbind(time_dim)[:-1]), strict=True):
            following = step.addcmul_(c, following)
        return
    for stride, reach in _passes(coefficient, y.shape[time_dim], time_dim):
        steps = reach.shape[time_dim]
        y.narrow(time_dim, 0, steps).add_(reach * y.narrow(time_dim, stride, steps))


def _solve_adjoint(coefficient: Tensor, adjoint: Tensor, time_dim: int) -> None:
    """a_{t+1} ← a_{t+1} + c_t · a_t, solved in place likewise."""
    if _walks(adjoint, time_dim):
        before, *later = adjoint.unbind(time_dim)
        for step, c in zip(later, coefficient.unbind(time_dim)[:-1], strict=True):
            before = step.addcmul_(c, before)
        return
    for stride, reach in _passes(coefficient, adjoint.shape[time_dim], time_dim):
        steps = reach.shape[time_dim]
        adjoint.narrow(time_dim, stride, steps).add_(reach * adjoint.narrow(time_dim, 0, steps))


def _walks(y: Tensor, time_dim: int) -> bool:
    """Whether to go step by step. On another device than the CPU each step is a launch, however many rows it has."""
    return y.shape[time_dim] <= _FEW_STEPS and y.device.type == "cpu"


def _passes(coefficient: Tensor, steps: int, time_dim: int) -> Iterator[tuple[int, Tensor]]:
    """(s, [c_t · … · c_{t+s−1} for t < steps − s]) for the strides s = 1, 2, 4 …"""
    stride = 1
    reach = coefficient
    while stride < steps:
        reach = reach.narrow(time_dim, 0, steps - stride)
        yield stride, reach
        if 2 * stride < steps:
            rest = steps - 2 * stride
            reach = reach.narrow(time_dim, 0, rest) * reach.narrow(time_dim, stride, rest)
        stride *= 2


def _coefficients(part: Recurrence, time_dim: int, *, ends: bool) -> tuple[Tensor, Any]:
    """c_t, and the weight of the next value where the step isn't terminated (None if it has none)."""
    kind, gamma, lmbda, reward, *_ = part
    if kind == SCAN:
        coefficient = gamma.expand_as(reward) if part.done is None else torch.where(part.done, 0.0, gamma)
        return coefficient, None
    cut = _cut(part, time_dim, ends=ends)
    coefficient = torch.where(cut, 0.0, gamma * lmbda)
    return coefficient, gamma if kind == GAE else torch.where(cut, gamma, gamma * (1 - lmbda))


def _increment(part: Recurrence, weight: Any, dtype: torch.dtype, *, out: Tensor | None) -> Tensor:
    """d_t, in ``out`` if given, else in a new tensor."""
    reward: Any
    reward, value, next_value = (None if x is None else x.to(dtype) for x in part[3:6])
    if out is None:
        out = torch.empty_like(reward)
    if next_value is None:
        return out.copy_(reward)
    # A selected-away next value may be NaN, so the product is made first and then chosen or not.
    torch.where(_no_bootstrap(part), reward, torch.addcmul(reward, weight, next_value), out=out)
    return out if value is None else out.sub_(value)


def _cut(part: Recurrence, time_dim: int, *, ends: bool) -> Tensor:
    """Where the trajectory ends; ``ends``: the tile holds the tensor's last step, which ends every TD(λ) return."""
    done, terminated = part.done, part.terminated
    close = ends and part.kind == TD_LAMBDA
    cut = done if terminated is None else done | terminated
    if close:
        cut = cut.clone() if terminated is None else cut
        cut.select(time_dim, -1).fill_(True)
    return cut


def _no_bootstrap(part: Recurrence) -> Tensor:
    return part.done if part.terminated is None else part.terminated


def _with_tensor_scalars(problem: Recurrence, dtype: torch.dtype) -> Recurrence:
    """γ and λ as tensors of the compute dtype: 0-d, or expanded to the reward's shape so that tiles can slice them."""
    reward = problem.reward

    def as_tensor(x: Any) -> Tensor | None:
        if x is None:
            return None
        if not isinstance(x, Tensor):
            return torch.full((), x, dtype=dtype, device=reward.device)
        x = x.to(reward.device, dtype, non_blocking=True)
        return x.expand_as(reward) if x.ndim else x

    return problem._replace(gamma=as_tensor(problem.gamma), lmbda=as_tensor(problem.lmbda))


def _sum(a: Tensor | None, b: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The sum of the gradients that arrived, as a new tensor."""
    if a is not None and b is not None:
        return a.to(dtype) + b.to(dtype)
    one = b if a is None else a
    assert one is not None
    return one.to(dtype, copy=True)


def _next_step(y: Tensor, time_dim: int) -> Tensor:
    """y_{t+1}, zero after the last step."""
    y_next = torch.zeros_like(y)
    steps = y.shape[time_dim] - 1
    y_next.narrow(time_dim, 0, steps).copy_(y.narrow(time_dim, 1, steps))
    return y_next


def _tiles_of_rows(fields: Sequence[Any], like: Tensor, time_dim: int) -> Iterator[list[Sequence[Any]]]:
    """For each group of rows its tiles in time order; a tile is ``fields`` with every tensor cut to it."""
    size = like.numel()
    if size <= _TILE:
        yield [fields]
        return
    row_dim = max((dim for dim in range(like.ndim) if dim != time_dim), key=lambda dim: like.shape[dim], default=None)
    row_groups: Iterator[Sequence[Any]] = iter((fields,))
    row_size = size
    if row_dim is not None:
        row_size //= like.shape[row_dim]
        row_groups = _split(fields, row_dim, max(1, _TILE // row_size))
    steps = max(1, _TILE * like.shape[time_dim] // row_size)
    for rows in row_groups:
        yield list(_split(rows, time_dim, steps))


def _split(fields: Sequence[Any], dim: int, size: int) -> Iterator[Sequence[Any]]:
    """``fields`` cut along ``dim`` into pieces of at most ``size``; numbers, 0-d tensors and None go to every piece."""
    return zip(*(x.split(size, dim) if isinstance(x, Tensor) and x.ndim else repeat(x) for x in fields), strict=False)
