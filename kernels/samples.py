"""What the fused losses over samples share: checks, layout, and how they are differentiated.

Such a loss is a function of one tensor x, one element per sample, and of constants. Its operator gives, besides the
loss and what is logged, the loss's slope ∂L/∂x, so that the backward pass is the product of a gradient and the slope.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .backend import resolve_backend
from .checks import check_agrees, check_tensor
from .dispatch import as_input, in_transform
from .function import apply

Run = Callable[..., list[Tensor]]


def solver(
    run: Run, compose: Run, vectorized: Run, tensors: int, slope_of: Callable[[Tensor, Tensor], Tensor] | None
) -> Callable[[Tensor, Any, str | None], Sequence[Tensor]]:
    """How a loss is solved on a backend: a function of x, a NamedTuple of constants, and the backend's name or None.

    Args:
        run: ``run(name, keep, x, constants)`` gives the loss, what is logged, and the slope if it is to be kept.
        compose: ``compose(x, constants)`` gives the loss and what is logged, of operations that autograd knows: the
            ``reference`` backend, which can be differentiated in everything.
        vectorized: the same in few calls: the ``torch`` backend, which can be differentiated in x. At the size of a
            minibatch an `autograd.Function` costs more than the calls of both passes.
        tensors: how many of the constants, the first ones, have an element per sample.
        slope_of: ``slope_of(x, slope)`` gives the slope as a function of x that autograd knows, if the slope says by
            itself how it changes. None: a gradient that is to be differentiated is composed anew, of the constants.

    Returns:
        A function to the loss, which is differentiable any number of times, and what is logged, which isn't.

    """

    # Without setup_context, which costs a call as much as the rest of an autograd.Function does. What setup_context is
    # for, the transforms of torch.func, gets the composition (`_goes_beyond_the_slope`).
    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, name: str, constants: Any) -> tuple[Tensor, ...]:
            found = run(name, True, x, constants)
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*found[1:])
            if slope_of is None and not torch.compiler.is_compiling():
                ctx.save_for_backward(x, found[-1], *constants[:tensors])
                # Not saved, since a coefficient may be scheduled, in place, before the gradient is asked for.
                ctx.gathered, ctx.others = type(constants), constants[tensors:]
                ctx.versions = [_version(y) for y in ctx.others]
            else:
                ctx.save_for_backward(x, found[-1])
            return tuple(found)

        @staticmethod
        def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, None, None]:
            if grad is None:
                return None, None, None
            x, slope, *samples = ctx.saved_tensors
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                # To be differentiated again: the same gradient, composed of what autograd knows.
                if slope_of is None:
                    if ctx.versions != [_version(y) for y in ctx.others]:
                        raise RuntimeError(
                            "a coefficient was changed in place after the loss was computed: a gradient that is to be "
                            "differentiated in turn can't be made of what it was"
                        )
                    loss = compose(x, ctx.gathered(*samples, *ctx.others))[0]
                    return torch.autograd.grad(loss, x, grad, create_graph=True)[0], None, None
                slope = slope_of(x, slope)
            return (grad * slope).to(x.dtype), None, None

    def solve(x: Tensor, constants: Any, backend: str | None) -> Sequence[Tensor]:
        name = resolve_backend(backend, x)
        if torch.compiler.is_compiling():
            constants = constants._make(as_input(constant, x) for constant in constants)
        if name == "reference" or _goes_beyond_the_slope(constants) or not x.numel():
            return compose(x, constants)
        if name == "torch":
            return vectorized(x, constants)
        if torch.is_grad_enabled() and x.requires_grad:
            return apply(Loss, x, name, constants)[:-1]
        return run(name, False, x, constants)

    return solve


def _version(x: Any) -> int | None:
    """How often ``x`` was written in place, if anybody counts."""
    return x._version if isinstance(x, Tensor) and not x.is_inference() else None


def _goes_beyond_the_slope(constants: Any) -> bool:
    """Whether more is asked for than the gradient with respect to x: forward mode, torch.func, other gradients."""
    if forward_ad._current_level >= 0 or in_transform():
        return True
    if torch.is_grad_enabled():
        for constant in constants:  # without a generator, which would take as long as an operation
            if isinstance(constant, Tensor) and constant.requires_grad:
                return True
    return False


# --- checks -------------------------------------------------------------------------------------------------------


def check_samples(
    name: str, x: Tensor, others: dict[str, Tensor], optional: dict[str, Tensor | None], mask: Tensor | None
) -> None:
    """Raise RuntimeError for a shape or device that isn't that of ``x``, TypeError for a dtype that can't be used.

    So for what isn't a tensor. The ``optional`` ones, and the mask, may be None.
    """
    check_tensor(name, x)
    for other, required in others.items():
        check_tensor(other, required)
    if not x.is_floating_point():
        raise TypeError(f"{name} has dtype {x.dtype}: a floating-point one is wanted")
    for other, y in (others | optional).items():
        check_agrees(other, y, name, x)
        if y is not None and y.is_complex():
            raise TypeError(f"{other} has dtype {y.dtype}: a real one is wanted")
    if mask is not None:
        check_agrees("mask", mask, name, x)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask has dtype {mask.dtype}: torch.bool is wanted, True where a sample counts")


# --- dtype and layout ---------------------------------------------------------------------------------------------


def new_outputs(
    x: Tensor, dtype: torch.dtype, precise: torch.dtype, reduction: str, logged: int, keep: bool
) -> list[Tensor]:
    """Uninitialised: the loss, ``logged`` 0-d tensors of ``dtype``, and the slope if it is to be kept."""
    loss = torch.empty_like(x, dtype=dtype) if reduction == "none" else x.new_empty((), dtype=dtype)
    slope = [torch.empty_like(x, dtype=precise)] if keep else []
    return [loss, *(x.new_empty((), dtype=dtype) for _ in range(logged)), *slope]
