"""The categorical loss as plain loops over samples and atoms: the text that the fast backends are tested against.

Each sample is computed in Python's numbers, that is in float64. `forward`, `project` and `backward` make it the
``reference`` backend; gradients come from autograd.
"""

import math

import torch
from torch import Tensor

from .categorical_problem import Bellman, Transition, loss_dtype
from .dtypes import compute_dtype
from .function import autograd_inside


def projected_distribution(
    prob: list[float], support: list[float], reward: float, terminated: bool, gamma: float
) -> list[float]:
    """Bellemare, Dabney & Munos 2017 (arXiv:1707.06887), algorithm 1, for one sample.

    The paper's m_l += p_j (u − b_j), m_u += p_j (b_j − l) loses the mass where l = u; here it goes to that atom.
    """
    v_min, v_max, last = support[0], support[-1], len(support) - 1
    spacing = (v_max - v_min) / last
    m = [0.0] * len(support)
    # The return after a terminal step is the reward, with certainty.
    moved = [(1.0, reward)] if terminated else [(p, reward + gamma * z) for p, z in zip(prob, support, strict=True)]
    for p_j, z_j in moved:
        b_j = min((min(max(z_j, v_min), v_max) - v_min) / spacing, last)
        if math.isnan(b_j):
            return [math.nan] * len(support)
        lower, upper = math.floor(b_j), math.ceil(b_j)
        if lower == upper:
            m[lower] += p_j
        else:
            m[lower] += p_j * (upper - b_j)
            m[upper] += p_j * (b_j - lower)
    return m


def greedy_action(log_prob: Tensor, support: Tensor) -> int:
    """argmax_a Σ_j z_j p_j(a), the first of equals; ``log_prob`` is ``[atoms, actions]``."""
    q = (support[:, None] * log_prob.exp()).sum(0)
    return int(q.argmax())


def cross_entropy(m: list[float], log_prob: Tensor) -> Tensor:
    """−Σ_i m_i log p_i, where an atom without mass counts for nothing even if log p_i is −∞."""
    loss = torch.zeros_like(log_prob[0])
    for i, m_i in enumerate(m):
        if m_i != 0:
            loss = loss - m_i * log_prob[i]
    return loss


def forward(transition: Transition, bellman: Bellman, keep: bool) -> list[Tensor]:
    """The loss ``[B]`` and, if it is to be kept, the projected distribution ``[B, atoms]``."""
    dtype = transition.log_prob.dtype
    chooser = transition.next_log_prob if transition.next_online_log_prob is None else transition.next_online_log_prob
    support = bellman.support.double()
    best = torch.tensor([greedy_action(x, support) for x in chooser.double()], device=chooser.device)
    next_prob = transition.next_log_prob.gather(-1, best[:, None, None].expand(-1, len(support), 1)).double().exp()
    m = project(next_prob.squeeze(-1), bellman)
    loss = _loss(transition.log_prob.to(compute_dtype(dtype)), transition.action, m)
    return [loss.to(loss_dtype(transition.log_prob, bellman.reward)), *([m.to(compute_dtype(dtype))] if keep else [])]


def backward(log_prob: Tensor, action: Tensor, projected: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the loss with respect to ``log_prob``: the loop again, under autograd."""
    leaf = log_prob.detach().requires_grad_()
    with autograd_inside():
        loss = _loss(leaf.to(projected.dtype), action, projected)
        (found,) = torch.autograd.grad(loss, leaf, grad.to(loss.dtype))
    return found


def project(prob: Tensor, bellman: Bellman) -> Tensor:
    """The projected distribution ``[B, atoms]`` of ``prob``, in float64 rounded to its dtype."""
    gamma = torch.as_tensor(bellman.gamma, dtype=torch.float64, device=prob.device).expand_as(bellman.reward)
    support = bellman.support.tolist()
    rows = zip(prob.tolist(), bellman.reward.tolist(), bellman.terminated.tolist(), gamma.tolist(), strict=True)
    m = [projected_distribution(p, support, r, bool(ended), g) for p, r, ended, g in rows]
    return torch.tensor(m, dtype=prob.dtype, device=prob.device)


def _loss(log_prob: Tensor, action: Tensor, m: Tensor) -> Tensor:
    samples = zip(m.tolist(), log_prob, action.tolist(), strict=True)
    return torch.stack([cross_entropy(m_t, log_prob_t[:, a_t]) for m_t, log_prob_t, a_t in samples])
