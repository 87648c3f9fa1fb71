"""The categorical loss in vectorised PyTorch, tile by tile over the batch: the ``torch`` backend.

A tile's temporaries stay in the cache of a core, which the exponential of all actions would otherwise stream through
memory, and nothing of size [B, atoms, atoms] exists.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .categorical_problem import Bellman, Transition, loss_dtype, new_gradient
from .dtypes import cast, compute_dtype, full_precision

# Elements of a tile's largest temporary: half a megabyte in float32.
_TILE = 1 << 17


def forward(transition: Transition, bellman: Bellman, keep: bool) -> list[Tensor]:
    """The loss ``[B]`` and, if it is to be kept, the projected distribution ``[B, atoms]``."""
    log_prob, action, target, online = transition
    samples, atoms, _ = log_prob.shape
    dtype = compute_dtype(log_prob.dtype)
    best = _greedy_action(target if online is None else online, cast(bellman.support, dtype))
    positions = _positions(bellman, dtype)
    projected = log_prob.new_zeros((samples, atoms), dtype=dtype)
    losses = []
    for tile in _tiles(samples, _largest(projected)):
        m = _part(projected, tile)
        next_prob = cast(_of_action(_part(target, tile), _part(best, tile)), dtype).exp_()
        _add_projection(m, next_prob, positions.of(tile))
        losses.append(_cross_entropy(m, _of_action(_part(log_prob, tile), _part(action, tile))))
    loss = cast(_joined(losses).neg_(), loss_dtype(log_prob, bellman.reward))
    return [loss, projected] if keep else [loss]


def backward(log_prob: Tensor, action: Tensor, projected: Tensor, grad: Tensor) -> Tensor:
    """∂L/∂log p(a) is −m for the taken action and 0 for the others."""
    found = new_gradient(log_prob).zero_()
    values = cast(projected * -grad[:, None], found.dtype)
    return found.scatter_(-1, _index(action, projected.shape[-1]), values[..., None])


def project(prob: Tensor, bellman: Bellman) -> Tensor:
    """The projected distribution ``[B, atoms]`` of ``prob``."""
    dtype = compute_dtype(prob.dtype)
    positions = _positions(bellman, dtype)
    projected = prob.new_zeros(prob.shape, dtype=dtype)
    for tile in _tiles(len(prob), _largest(projected)):
        _add_projection(_part(projected, tile), _part(prob, tile).to(dtype, copy=True), positions.of(tile))
    return projected.to(prob.dtype)


class _Positions(NamedTuple):
    """b_j = clip(start + step · z_j, 0, N − 1), with the columns start, step and terminated of shape ``[B, 1]``."""

    start: Tensor
    step: Tensor
    terminated: Tensor
    support: Tensor

    def of(self, tile: slice | None) -> "_Positions":
        """Those of some samples."""
        if tile is None:
            return self
        return _Positions(self.start[tile], self.step[tile], self.terminated[tile], self.support)


def _positions(bellman: Bellman, dtype: torch.dtype) -> _Positions:
    support, reward, terminated, gamma = bellman
    support, reward = cast(support, dtype), cast(reward, dtype)
    terminated = terminated if terminated.dtype == torch.bool else terminated != 0
    if isinstance(gamma, Tensor) and (gamma.dtype != dtype or gamma.device != support.device):
        gamma = gamma.to(support.device, dtype, non_blocking=True)
    v_min = support[0]
    spacing = (support[-1] - v_min).div_(support.shape[0] - 1)
    reward, terminated = reward[:, None], terminated[:, None]
    start = (reward - v_min).div_(spacing)
    step = gamma / spacing
    # Selected: after a terminal step γ isn't read.
    step = torch.where(terminated, 0, step[:, None] if step.ndim else step)
    return _Positions(start, step, terminated, support)


def _greedy_action(log_prob: Tensor, support: Tensor) -> Tensor:
    """argmax_a Σ_j z_j p_j(a), the first of equals, shape ``[B, 1, 1]``."""
    samples, atoms, actions = log_prob.shape
    best = []
    for tile in _tiles(samples, atoms * actions):
        prob = cast(_part(log_prob, tile), support.dtype).exp()
        with full_precision(prob):
            q = torch.bmm(support.expand(len(prob), 1, atoms), prob)
        best.append(q.argmax(-1, keepdim=True))
    return _joined(best)


def _add_projection(m: Tensor, prob: Tensor, positions: _Positions) -> None:
    """m_i += Σ_j p_j · max(0, 1 − |b_j − i|); ``prob`` is used up."""
    start, step, terminated, support = positions
    last = m.shape[-1] - 1
    prob.masked_fill_(terminated, 1 / (last + 1))  # after a terminal step all atoms land at the reward
    b = torch.addcmul(start, step, support).clamp_(0, last)
    if not _adds_in_order(m):
        atoms = torch.arange(last + 1, dtype=b.dtype, device=b.device)
        hat = (1 - (b[..., None] - atoms).abs_()).clamp_min_(0)
        m += hat.mul_(prob[..., None]).sum(-2)
        return
    lower = b.long().clamp_(0, last - 1)  # an index whatever b is; where it is NaN the masses carry it on
    upper_mass = (b - lower) * prob
    m.scatter_add_(-1, lower, prob - upper_mass)
    m[:, 1:].scatter_add_(-1, lower, upper_mass)


def _cross_entropy(m: Tensor, log_prob: Tensor) -> Tensor:
    """Σ m log p; an atom without mass counts for nothing even if its log-probability is −∞."""
    return (torch.where(m.bool(), log_prob, m) * m).sum(-1)


def _largest(m: Tensor) -> int:
    """Elements of the largest temporary that one sample of ``m`` takes in `_add_projection`."""
    atoms = m.shape[-1]
    return atoms if _adds_in_order(m) else atoms * atoms


def _adds_in_order(x: Tensor) -> bool:
    """Whether scatter_add_, which is faster than the hat function, is reproducible: elsewhere it runs on atomics."""
    return x.is_cpu


def _of_action(x: Tensor, action: Tensor) -> Tensor:
    """``[b, atoms]`` of ``[b, atoms, actions]``."""
    return x.gather(-1, _index(action, x.shape[1])).squeeze(-1)


def _index(action: Tensor, atoms: int) -> Tensor:
    return cast(action, torch.int64).view(-1, 1, 1).expand(-1, atoms, 1)


def _tiles(samples: int, elements_per_sample: int) -> Iterator[slice | None]:
    """Slices of the samples; None for all of them, since at small batches the cost is the number of calls."""
    size = max(1, _TILE // elements_per_sample)
    if samples <= size:
        return iter((None,))
    return (slice(start, start + size) for start in range(0, samples, size))


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _part(x: Tensor, tile: slice | None) -> Tensor:
    return x if tile is None else x[tile]
