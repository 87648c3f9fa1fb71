"""The ``verify`` backend of the Gaussian log-probability: what ``auto`` picks, compared with the reference in float64.

A debugging aid: it reads results on the host, which waits for the device.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import squashed_normal_reference as reference
from . import squashed_normal_vectorized as vectorized
from .backend import fastest_backend
from .compare import TOLERANCE, compare
from .dtypes import compute_dtype, result_dtype
from .function import autograd_inside
from .squashed_normal_operators import backend_module, gradients
from .squashed_normal_problem import Squash


def log_prob(loc: Tensor, scale: Tensor, action: Tensor, squash: Squash | None) -> Tensor:
    """log π(a) of the fastest backend, once it agrees with the reference.

    Raises:
        VerificationError: a value differs; the message has the worst one's index and both values.

    """
    tensors = (loc, scale, action)
    found = _fastest(loc).log_prob(*tensors, squash)
    _compare(["log-probability"], [found], reference.log_prob, tensors, squash, inverse=True)
    return found.to(result_dtype(*tensors)).contiguous()  # which is what the operators promise


def log_prob_backward(
    loc: Tensor, scale: Tensor, action: Tensor, squash: Squash | None, grad: Tensor, needs: Sequence[bool]
) -> list[Tensor]:
    """The gradients of the fastest backend, once they agree with the reference's.

    Raises:
        VerificationError: a gradient differs; the message has the worst element's index and both values.

    """
    return _backward("log_prob", (loc, scale, action), squash, [grad], needs)


def sample(loc: Tensor, scale: Tensor, noise: Tensor, squash: Squash | None) -> tuple[Tensor, Tensor]:
    """The action and log π(a) of the fastest backend, once they agree with the reference's.

    Raises:
        VerificationError: a value differs; the message has the worst one's index and both values.

    """
    tensors = (loc, scale, noise)
    found = _fastest(loc).sample(*tensors, squash)
    _compare(["action", "log-probability"], found, reference.sample, tensors, squash, inverse=False)
    dtype = result_dtype(*tensors)
    return found[0].to(dtype).contiguous(), found[1].to(dtype).contiguous()


def sample_backward(
    loc: Tensor,
    scale: Tensor,
    noise: Tensor,
    squash: Squash | None,
    grad_action: Tensor | None,
    grad_log_prob: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients of the fastest backend, once they agree with the reference's.

    Raises:
        VerificationError: a gradient differs; the message has the worst element's index and both values.

    """
    return _backward("sample", (loc, scale, noise), squash, [grad_action, grad_log_prob], needs)


def _fastest(tensor: Tensor) -> Any:
    name = fastest_backend(tensor)
    return vectorized if name == "torch" else backend_module(name)


def _backward(
    function: str,
    tensors: Sequence[Tensor],
    squash: Squash | None,
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor]:
    backend = _fastest(tensors[0])
    if backend is vectorized:
        found = gradients(getattr(vectorized, function), tensors, squash, grads, needs)
    else:
        found = getattr(backend, f"{function}_backward")(*tensors, squash, *grads, needs)

    def expected(*inputs: Any) -> list[Tensor]:
        return gradients(getattr(reference, function), inputs[:3], inputs[3], grads, needs)

    names = [f"gradient of {name}" for name, need in zip(("loc", "scale", "action"), needs, strict=True) if need]
    _compare(names, found, expected, tensors, squash, inverse=function == "log_prob")
    return [x.contiguous() for x in found]


def _compare(
    names: Sequence[str],
    found: Any,
    function: Callable[..., Any],
    tensors: Sequence[Tensor],
    squash: Squash | None,
    *,
    inverse: bool,
) -> None:
    """Raise VerificationError if ``found`` isn't what ``function`` makes of the tensors in float64, but for rounding.

    A result may be as far off as a relative change of all that it is computed from would move it. What is computed
    from loc, scale and an action or noise belongs to an element of them, or is a row's sum.
    """
    found = (found,) if isinstance(found, Tensor) else found
    magnitudes = [x.detach().double().abs() for x in tensors]
    if squash is not None:
        magnitudes[2] = magnitudes[2] + abs(squash.low) + abs(squash.high)
        limit = squash.limit_of_inverse(*tensors) if inverse else squash.limit_of_draw(*tensors)
        # As the backend rounds it: what is left of 1 decides.
        squash = squash._replace(margin=1 - torch.tensor(limit, dtype=compute_dtype(result_dtype(*tensors))).item())
    leaves = [x.detach().double().requires_grad_() for x in tensors]
    with autograd_inside():
        expected = function(*leaves, squash)
        expected = (expected,) if isinstance(expected, Tensor) else expected
        sums = [x.sum() for x in expected]
    for name, result, wanted, total in zip(names, found, expected, sums, strict=True):
        size = wanted.detach().abs()
        if total.requires_grad:
            with autograd_inside():
                slopes = torch.autograd.grad(
                    total, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
                )
            moved: Any = sum(
                slope.abs() * size_of_input for slope, size_of_input in zip(slopes, magnitudes, strict=True)
            )
            size = size + (moved if moved.shape == size.shape else (1 + moved).sum(-1))
        # A gradient may be rounded to a narrower dtype than the results have.
        dtype = max(result_dtype(*tensors), result.dtype, key=TOLERANCE.__getitem__)
        compare(name, fastest_backend(tensors[0]), dtype, result, wanted.detach(), size)
