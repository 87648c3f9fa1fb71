"""What the losses share besides their base class, and the registry of value estimators by its usual address."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, ContextDecorator, nullcontext
from typing import Any, TypeVar

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn

from ..estimators.registry import (
    ValueEstimators,
    build_value_estimator,
    default_value_kwargs,
    dispatch_value_estimator,
    get_value_estimator_entry,
    register_value_estimator,
)
from ..kernels.distances import DISTANCES

__all__ = [
    "ValueEstimators",
    "build_value_estimator",
    "check_distance",
    "default_value_kwargs",
    "dispatch_value_estimator",
    "distance_loss",
    "get_value_estimator_entry",
    "group_optimizers",
    "hold_out_net",
    "hold_out_params",
    "next_state_value",
    "register_value_estimator",
]

Distances = TypeVar("Distances", Tensor, TensorDictBase)


def check_distance(loss_function: str, argument: str = "loss_function") -> str:
    """``loss_function`` if `distance_loss` knows it.

    Raises:
        ValueError: it doesn't; the message names the ``argument``.

    """
    if loss_function not in DISTANCES:
        raise ValueError(f"{argument} is {loss_function!r}; it can be {', '.join(map(repr, DISTANCES))}")
    return loss_function


def distance_loss(v1: Distances, v2: Distances, loss_function: str, strict_shape: bool = True) -> Distances:
    r"""Distance between two tensors, or between all entries of two TensorDicts, element by element.

    ==============  =====================================================
    ``l1``          \|v1 − v2\|
    ``l2``          (v1 − v2)²
    ``smooth_l1``   (v1 − v2)²/2 where \|v1 − v2\| < 1, else \|v1 − v2\| − 1/2
    ==============  =====================================================

    Args:
        v1: any shape.
        v2: the same shape; with ``strict_shape=False`` one that broadcasts with it.
        loss_function: ``"l1"``, ``"l2"`` or ``"smooth_l1"``.
        strict_shape: refuse different shapes.

    Raises:
        RuntimeError: the shapes differ.
        ValueError: ``loss_function`` is something else.

    Examples:
        >>> distance_loss(torch.tensor([0.5, 3.0]), torch.zeros(2), "smooth_l1")
        tensor([0.1250, 2.5000])

    """
    check_distance(loss_function)
    if v1.shape != v2.shape:
        if strict_shape:
            raise RuntimeError(f"distance_loss got shapes {tuple(v1.shape)} and {tuple(v2.shape)}: they must agree")
        v1, v2 = torch.broadcast_tensors(v1, v2)
    distance = DISTANCES[loss_function]
    if isinstance(v1, TensorDictBase):
        return v1.apply(lambda x, y: distance(x, y, reduction="none"), v2)
    return distance(v1, v2, reduction="none")


class hold_out_net(ContextDecorator):
    """Inside the block the parameters of ``network`` require no gradient; after it they do as before.

    It can be entered again, also inside of itself.

    Examples:
        >>> net = nn.Linear(1, 1)
        >>> with hold_out_net(net):
        ...     net(torch.ones(1)).requires_grad
        False

    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._required: list[list[tuple[Tensor, bool]]] = []

    def __enter__(self) -> None:
        self._required.append([(p, p.requires_grad) for p in self._network.parameters()])
        self._network.requires_grad_(False)

    def __exit__(self, *error: object) -> None:
        for p, requires_grad in self._required.pop():
            p.requires_grad_(requires_grad)


def hold_out_params(
    params: Iterable[Tensor] | TensorDictBase,
) -> AbstractContextManager[tuple[Tensor, ...] | TensorDictBase]:
    """The ``params`` detached, for use inside the block: a TensorDict if they are in one, else a tuple."""
    return nullcontext(params.detach() if isinstance(params, TensorDictBase) else tuple(p.detach() for p in params))


def next_state_value(
    tensordict: TensorDictBase,
    operator: Any = None,
    next_val_key: NestedKey = "state_action_value",
    gamma: float | Tensor = 0.99,
    pred_next_val: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    r"""One-step value target, without gradient.

    .. math::
        r + γ^n (1 - \text{term}) v',

    where n is the entry ``steps_to_next_obs`` if there is one (n-step rewards), else 1, and the entry ``done``
    stands in for a missing ``terminated``. v' of a terminated step is never read into the result; that of a truncated
    one is. (In TorchRL it isn't either.)

    Args:
        tensordict: batch size ``[*B]``, with ``("next", "reward")`` and the rest of shape ``[*B, 1]``.
        operator: a module that writes v' at ``next_val_key`` when it reads what is under "next".
        next_val_key: where it does.
        gamma: γ.
        pred_next_val: v' of shape ``[*B, 1]`` or ``[*B]``, instead of ``operator``.
        kwargs: passed to ``operator``.

    Returns:
        Shape ``[*B]``.

    Raises:
        ValueError: not exactly one of ``operator`` and ``pred_next_val`` is given.
        KeyError: the reward is missing, or both of done and terminated.
        RuntimeError: an entry or a value hasn't one element per sample.

    """
    if (operator is None) == (pred_next_val is None):
        raise ValueError("next_state_value needs either operator or pred_next_val, and not both")
    with torch.no_grad():
        names = [("next", "reward"), ("next", "terminated"), ("next", "done"), "steps_to_next_obs"]
        reward, terminated, done, steps = (tensordict.get(name, None) for name in names)
        if reward is None or (terminated is None and done is None):
            absent = names[0] if reward is None else f"{names[1]} or {names[2]}"
            raise KeyError(f"next_state_value: the entry {absent} is missing")
        terminated, ends = (done, names[2]) if terminated is None else (terminated, names[1])
        reward = reward.squeeze(-1)
        ended = _one_per_sample(ends, terminated, reward) != 0
        steps = None if steps is None else _one_per_sample(names[3], steps, reward)
        if pred_next_val is None:
            pred_next_val = operator(tensordict.get("next").copy(), **kwargs).get(next_val_key)
        next_value = _one_per_sample("the next value", pred_next_val, reward)
        # To the power of integers γ would be rounded to float32.
        discount = gamma if steps is None else (gamma ** steps.double()).to(next_value.dtype)
        return reward + discount * next_value.masked_fill(ended, 0.0)


def _one_per_sample(name: NestedKey, x: Tensor, reward: Tensor) -> Tensor:
    """``x``, of shape ``[*B]`` or ``[*B, 1]``, in the shape ``[*B]`` of ``reward``."""
    if x.shape not in (reward.shape, (*reward.shape, 1)):
        raise RuntimeError(f"{name} has shape {tuple(x.shape)}, but there is one reward for {tuple(reward.shape)}")
    return x.reshape(reward.shape)


def group_optimizers(*optimizers: torch.optim.Optimizer | None) -> torch.optim.Optimizer:
    """One optimizer with the parameter groups of all ``optimizers`` that aren't None, and their state.

    Raises:
        ValueError: there are none, or they are of different classes.

    Examples:
        >>> a, b = (torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=lr) for lr in (0.1, 0.2))
        >>> [group["lr"] for group in group_optimizers(a, b).param_groups]
        [0.1, 0.2]

    """
    given = [optimizer for optimizer in optimizers if optimizer is not None]
    classes: set[Any] = {type(optimizer) for optimizer in given}
    if len(classes) != 1:
        names = ", ".join(sorted(cls.__name__ for cls in classes)) or "none"
        raise ValueError(f"group_optimizers needs optimizers of one class, but got {names}")
    group = classes.pop()([group for optimizer in given for group in optimizer.param_groups])
    for optimizer in given:
        group.state.update(optimizer.state)
    return group
