"""The ``verify`` backend of the categorical loss: what ``auto`` picks, compared with the reference in float64.

A debugging aid: it reads results on the host, which waits for the device.
"""

import torch
from torch import Tensor

from . import categorical_reference
from .backend import fastest_backend
from .categorical_operators import backend_module
from .categorical_problem import Bellman, Transition
from .compare import TOLERANCE, compare


def forward(transition: Transition, bellman: Bellman, keep: bool) -> list[Tensor]:
    """The results of the fastest backend, once the loss agrees with the reference.

    A sample whose two best actions differ by no more than rounding isn't compared: either choice is right.

    Raises:
        VerificationError: a loss differs; the message has the worst sample's index and both values.

    """
    name = fastest_backend(transition.log_prob)
    found = backend_module(name).forward(transition, bellman, keep)
    precise = Transition(*(x.double() if x is not None and x.is_floating_point() else x for x in transition))
    (expected,) = categorical_reference.forward(precise, bellman, False)
    atoms = precise.log_prob.shape[1]
    taken = precise.log_prob.gather(-1, transition.action.long()[:, None, None].expand(-1, atoms, 1)).squeeze(-1)
    scale = _rounding_of_a_position(bellman) * (1 + taken.nan_to_num(0, 0, 0).abs().amax(-1))
    decided = _is_decided(precise, bellman, TOLERANCE[transition.log_prob.dtype])
    loss = torch.where(decided, found[0], expected.to(found[0].dtype))
    compare("categorical loss", name, loss.dtype, loss, expected, scale)
    return found


def backward(log_prob: Tensor, action: Tensor, projected: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the fastest backend, once it agrees with autograd through the reference.

    Raises:
        VerificationError: an element differs; the message has the worst one's index and both values.

    """
    name = fastest_backend(log_prob)
    found = backend_module(name).backward(log_prob, action, projected, grad)
    expected = categorical_reference.backward(log_prob.double(), action, projected.double(), grad.double())
    scale = grad.double().abs()[:, None, None].expand_as(found)
    compare("gradient of log_prob", name, found.dtype, found, expected, scale)
    return found


def project(prob: Tensor, bellman: Bellman) -> Tensor:
    """The projection of the fastest backend, once it agrees with the reference.

    Raises:
        VerificationError: an element differs; the message has the worst one's index and both values.

    """
    name = fastest_backend(prob)
    found = backend_module(name).project(prob, bellman)
    expected = categorical_reference.project(prob.double(), bellman)
    scale = _rounding_of_a_position(bellman) * expected.new_ones(()).expand_as(found)
    compare("categorical projection", name, found.dtype, found, expected, scale)
    return found


def _rounding_of_a_position(bellman: Bellman) -> Tensor:
    """How many roundings off a position b may be: the largest return in units of the spacing, per 64 atoms.

    The tolerances allow for some hundred roundings, which is plenty for a support of 64 atoms around zero.
    """
    support = bellman.support.double()
    spacing = (support[-1] - support[0]) / (len(support) - 1)
    return 1 + support.abs().amax() / spacing / 64


def _is_decided(transition: Transition, bellman: Bellman, tolerance: float) -> Tensor:
    """Whether rounding can't change which action is greedy, or it doesn't matter since the step is terminal."""
    _, _, target, online = transition
    support = bellman.support.double()
    q = torch.einsum("n,bna->ba", support, (target if online is None else online).exp())
    best = q.topk(min(2, q.shape[-1])).values
    close = best[:, 0] - best[:, -1] <= tolerance * support.abs().amax()
    return ~close | (bellman.terminated != 0) | (q.shape[-1] == 1)
