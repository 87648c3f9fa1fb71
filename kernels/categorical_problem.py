"""The problem that every backend of the categorical loss solves: its inputs, their checks and one flat batch.

The mathematics is that of Bellemare, Dabney & Munos 2017 (arXiv:1707.06887), algorithm 1. With atoms z_i of spacing
Δz, V_min = z_0, V_max = z_{N−1} and a next distribution p,

    b_j = (clip(r + γ(1 − term) z_j, V_min, V_max) − V_min) / Δz        where atom j lands, in atoms
    m_i = Σ_j p_j · max(0, 1 − |b_j − i|)                               the projected distribution
    L   = −Σ_i m_i · log p(s_t, a_t)_i                                  the cross-entropy

Clipping commutes with the map to atoms, so that the fast backends compute b_j = clip(start + step · z_j, 0, N − 1)
with start = (r − V_min) / Δz and step = γ(1 − term) / Δz.

The hat function shares the mass p_j between the two atoms around b_j, and gives all of it to an atom that is hit
exactly. After a terminal step all mass is at r, selected and not multiplied by zero, so that nothing is read of the
next observation.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import check_agrees, check_broadcasts, check_scalar, check_tensor
from .dispatch import are_plain

_HALF = (torch.float16, torch.bfloat16)
_INDICES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Bellman(NamedTuple):
    """How the atoms move: support ``[atoms]``, reward and terminated of the batch's shape, γ broadcastable to it."""

    support: Any
    reward: Any
    terminated: Any
    gamma: Any  # a number, or a tensor


class Transition(NamedTuple):
    """What the networks say of a transition: log-probabilities ``[*B, atoms, actions]``, the action's index ``[*B]``.

    The greedy next action is that of ``next_online_log_prob`` where it is there, else of ``next_log_prob``.
    """

    log_prob: Any
    action: Any
    next_log_prob: Any
    next_online_log_prob: Any  # a tensor, or None


def check_transition(transition: Transition, bellman: Bellman) -> None:
    """Raise TypeError for a dtype, RuntimeError for a shape or device that doesn't fit the log-probabilities."""
    log_prob = transition.log_prob
    check_tensor("log_prob", log_prob)
    check_tensor("next_log_prob", transition.next_log_prob)
    shape, device = log_prob.shape, log_prob.device
    if len(shape) < 2 or not log_prob.is_floating_point():
        raise RuntimeError(
            f"log_prob has shape {tuple(shape)} and dtype {log_prob.dtype}: floating-point log-probabilities "
            "[*batch, atoms, actions] are wanted"
        )
    for name in ("next_log_prob", "next_online_log_prob"):
        check_agrees(name, getattr(transition, name), "log_prob", log_prob)
    _check_member("action", transition.action, shape[:-2], device)
    if transition.action.dtype not in _INDICES:
        raise TypeError(f"action has dtype {transition.action.dtype}: the integer index of the action is wanted")
    if shape[-1] == 0:
        raise RuntimeError(f"log_prob has shape {tuple(shape)}: there is no action to choose")
    check_bellman(bellman, shape[:-1], device)


def check_bellman(bellman: Bellman, shape: torch.Size, device: torch.device) -> None:
    """Raise RuntimeError or TypeError for what doesn't fit a distribution ``[*B, atoms]`` of that shape and device."""
    support, reward, terminated, gamma = bellman
    *batch, atoms = shape
    check_tensor("support", support)
    if support.shape != (atoms,) or support.device != device or atoms < 2:
        raise RuntimeError(
            f"support has shape {tuple(support.shape)} on {support.device}: one value for each of the {atoms} atoms, "
            f"of which there must be 2 or more, is wanted on {device}"
        )
    _check_member("reward", reward, torch.Size(batch), device)
    _check_member("terminated", terminated, torch.Size(batch), device)
    check_scalar("gamma", gamma)
    check_broadcasts("gamma", gamma, "the batch", torch.Size(batch), device)


def check_evenly_spaced(support: Tensor) -> None:
    """Raise ValueError unless the atoms are increasing at equal distances, as evenly as the kernels need them to be.

    It waits for the device. Of a support without numbers, on the device "meta" or a fake tensor, nothing can be said.
    """
    if not are_plain([support]):
        return
    z = support.detach().cpu().double()
    if z.ndim == 1 and len(z) > 1:
        distance = (z[-1] - z[0]) / (len(z) - 1)
        off = z - z[0] - distance * torch.arange(len(z))
        if distance > 0 and (off.abs() <= 0.25 * distance + unevenness(support) * z.abs().max()).all():
            return
    raise ValueError(
        "the support of the network must be two or more atoms, increasing at equal distances, but is "
        f"{str(support.detach()).replace(chr(10), '')}"
    )


def unevenness(support: Tensor) -> float:
    """How far from evenly spaced the support may be, rounded to its dtype, as a part of its greatest number."""
    return 2 * torch.finfo(support.dtype).eps if support.is_floating_point() else 0.0


def flat_transition(transition: Transition) -> Transition:
    """``transition`` with one batch dimension; a copy is made only of what no single stride walks."""
    log_prob, action, next_log_prob, next_online_log_prob = transition
    return Transition(flat(log_prob, 2), flat(action, 0), flat(next_log_prob, 2), flat(next_online_log_prob, 2))


def flat_bellman(bellman: Bellman) -> Bellman:
    """``bellman`` with one batch dimension: γ stays a number or a 0-d tensor if it is one."""
    support, reward, terminated, gamma = bellman
    if isinstance(gamma, Tensor) and gamma.ndim:
        gamma = gamma.expand_as(reward).reshape(-1)
    return Bellman(support, flat(reward, 0), flat(terminated, 0), gamma)


def flat(x: Any, trailing: int) -> Any:
    """``x`` with the dimensions before the ``trailing`` last ones made one."""
    return x if x is None or x.ndim == trailing + 1 else x.reshape(-1, *x.shape[x.ndim - trailing :])


def loss_dtype(log_prob: Tensor, reward: Tensor) -> torch.dtype:
    """That of the log-probabilities; float32, in which the loss is computed, if only they are of half precision."""
    half = log_prob.dtype in _HALF and reward.is_floating_point() and reward.dtype not in _HALF
    return torch.float32 if half else log_prob.dtype


def new_gradient(log_prob: Tensor) -> Tensor:
    """An uninitialised gradient of the flat ``log_prob``, laid out like it where that is dense."""
    return torch.empty_like(flat(log_prob, 2))


def _check_member(name: str, x: Tensor, batch: torch.Size, device: torch.device) -> None:
    check_tensor(name, x)
    if x.shape != batch or x.device != device:
        raise RuntimeError(
            f"{name} has shape {tuple(x.shape)} on {x.device}, but the batch has shape {tuple(batch)} on {device}: "
            "both must agree"
        )
