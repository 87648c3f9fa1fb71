"""The categorical loss in vectorised PyTorch, tile by tile over the batch: the ``torch`` backend.

A tile's temporaries stay in the cache of a core, which the exponential of all actions would otherwise stream through
memory, and nothing of size [B, atoms, atoms] exists.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .categorical_problem import Bellman, Transition, compute_dtype, new_gradient

# Elements of a tile's largest temporary: half a megabyte in float32.
_TILE = 1 << 17


def forward(transition: Transition, bellman: Bellman, keep: bool) -> list[Tensor]:
    """The loss ``[B]`` and, if it is to be kept, the projected distribution ``[B, atoms]``."""
    log_prob = transition.log_prob
    samples, atoms, actions = log_prob.shape
    dtype = compute_dtype(log_prob.dtype)
    loss = log_prob.new_empty(samples)
    projected = log_prob.new_empty((samples, atoms) if keep else 0, dtype=dtype)
    for tile in _tiles(log_prob, atoms * actions):
        part = Transition(*(x if x is None else x[tile] for x in transition))
        moved = _tile_of(bellman, tile, dtype)
        m = _project(_greedy_next_prob(part, moved.support), moved)
        taken = _of_action(part.log_prob, part.action).to(dtype)
        # Selected: an atom without mass counts for nothing even if its log-probability is −∞.
        loss[tile] = torch.where(m == 0, 0, m * taken).sum(-1).neg_()
        if keep:
            projected[tile] = m
    return [loss, projected] if keep else [loss]


def backward(log_prob: Tensor, action: Tensor, projected: Tensor, grad: Tensor) -> Tensor:
    """∂L/∂log p(a) is −m for the taken action and 0 for the others."""
    found = new_gradient(log_prob).zero_()
    values = (projected * -grad[:, None]).to(found.dtype)
    return found.scatter_(-1, _index(action, projected.shape[-1]), values[..., None])


def project(prob: Tensor, bellman: Bellman) -> Tensor:
    """The projected distribution ``[B, atoms]`` of ``prob``."""
    dtype = compute_dtype(prob.dtype)
    projected = torch.empty_like(prob, memory_format=torch.contiguous_format)
    for tile in _tiles(prob, prob.shape[-1]):
        projected[tile] = _project(prob[tile].to(dtype), _tile_of(bellman, tile, dtype))
    return projected


def _greedy_next_prob(part: Transition, support: Tensor) -> Tensor:
    """The target network's distribution of the greedy next action."""
    _, _, target, online = part
    q = torch.einsum("n,bna->ba", support, (target if online is None else online).to(support.dtype).exp())
    return _of_action(target, q.argmax(-1)).to(support.dtype).exp_()


def _project(prob: Tensor, bellman: Bellman) -> Tensor:
    """m_i = Σ_j p_j · max(0, 1 − |b_j − i|)."""
    support, reward, terminated, gamma = bellman
    last = support.shape[-1] - 1
    v_min, v_max = support[0], support[-1]
    # After a terminal step one atom, the first, has all mass and lands at the reward.
    terminated = terminated[:, None]
    prob = torch.where(terminated, _first_atom(prob), prob)
    moved = reward[:, None] + torch.where(terminated, 0, gamma * support)
    b = ((moved.clamp_(v_min, v_max) - v_min) * (last / (v_max - v_min))).clamp_(0, last)
    if not _adds_in_order(prob):
        atoms = torch.arange(last + 1, dtype=b.dtype, device=b.device)
        hat = (1 - (b[..., None] - atoms).abs_()).clamp_min_(0)
        return hat.mul_(prob[..., None]).sum(-2)
    lower = b.nan_to_num(0.0).floor_()  # an index whatever b is; where it is NaN the weights carry it on
    upper_mass = (b - lower) * prob
    index = lower.long()
    m = torch.zeros_like(prob).scatter_add_(-1, index, prob - upper_mass)
    return m.scatter_add_(-1, index.add_(1).clamp_(max=last), upper_mass)


def _adds_in_order(x: Tensor) -> bool:
    """Whether scatter_add_, which is faster than the hat function, is reproducible: elsewhere it runs on atomics."""
    return x.device.type == "cpu"


def _first_atom(prob: Tensor) -> Tensor:
    one = prob.new_zeros(prob.shape[-1])
    one[0] = 1
    return one


def _of_action(x: Tensor, action: Tensor) -> Tensor:
    """``[b, atoms]`` of ``[b, atoms, actions]``."""
    return x.gather(-1, _index(action, x.shape[1])).squeeze(-1)


def _index(action: Tensor, atoms: int) -> Tensor:
    return action.long()[:, None, None].expand(-1, atoms, 1)


def _tile_of(bellman: Bellman, tile: slice, dtype: torch.dtype) -> Bellman:
    """The tile's share, in ``dtype``; γ broadcastable to ``[b, atoms]``."""
    support, reward, terminated, gamma = bellman
    if isinstance(gamma, Tensor):
        gamma = gamma.to(support.device, dtype, non_blocking=True)
        gamma = gamma[tile, None] if gamma.ndim else gamma
    return Bellman(support.to(dtype), reward[tile].to(dtype), terminated[tile] != 0, gamma)


def _tiles(x: Tensor, elements_per_sample: int) -> Iterator[slice]:
    samples = max(1, _TILE // elements_per_sample)
    return (slice(start, start + samples) for start in range(0, x.shape[0], samples))
