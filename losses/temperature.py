"""The temperature α: what an entropy-seeking loss pays for a unit of the policy's entropy, fixed or learned."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from tensordict import NestedKey
from torch import Tensor, nn

from .base import LossModule

UNREACHED_ALPHA = 1e9
"""The greatest α where only the least is given: as in TorchRL, whose checkpoints then hold an upper bound too."""


class TemperatureLoss(LossModule):
    r"""Base of the losses with a temperature α.

    Its logarithm is kept, ``log_alpha``: a parameter of the loss, or a buffer if α is fixed. It stays in its dtype
    when the loss is cast to another: what is left of an optimizer's small steps would be rounded away. Where α has
    bounds, each call first moves it back between them.
    """

    _schedulable_buffers = frozenset({"alpha_init", "min_log_alpha", "max_log_alpha"})
    _multipliers: ClassVar[tuple[str, ...]] = ("log_alpha",)
    """What stays in its dtype."""

    _target_entropy_name: ClassVar[str]
    """The buffer of the target entropy, whose name in TorchRL's checkpoints isn't the same for all losses."""

    alpha_init: Tensor
    min_log_alpha: Tensor | None
    max_log_alpha: Tensor | None
    log_alpha: Tensor

    def _set_temperature(
        self,
        alpha_init: float,
        min_alpha: float | None,
        max_alpha: float | None,
        *,
        fixed: bool,
        target_entropy: float | Tensor,
    ) -> None:
        """Start with α = ``alpha_init``, to stay in [``min_alpha``, ``max_alpha``] (None: no bound that is reached).

        Raises:
            ValueError: one of them isn't positive, or the bounds are in the wrong order.

        """
        for name, value in (("alpha_init", alpha_init), ("min_alpha", min_alpha), ("max_alpha", max_alpha)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, but is {value}")
        if min_alpha is not None and max_alpha is None:
            max_alpha = UNREACHED_ALPHA
        if min_alpha is not None and max_alpha is not None and min_alpha > max_alpha:
            raise ValueError(f"min_alpha is {min_alpha}, which is more than max_alpha, {max_alpha}")
        self.register_coeff_buffer("alpha_init", alpha_init)
        self.register_coeff_buffer("min_log_alpha", None if min_alpha is None else math.log(min_alpha))
        self.register_coeff_buffer("max_log_alpha", None if max_alpha is None else math.log(max_alpha))
        self.register_coeff_buffer(self._target_entropy_name, target_entropy)
        if fixed:
            self.register_buffer("log_alpha", self.alpha_init.log())
        else:
            self.register_parameter("log_alpha", nn.Parameter(self.alpha_init.log()))

    @property
    def alpha(self) -> Tensor:
        """α between its bounds, a 0-d tensor without gradient."""
        log_alpha = self.log_alpha.detach()
        return (log_alpha.clamp(self.min_log_alpha, self.max_log_alpha) if self._has_bounds else log_alpha).exp()

    @property
    def fixed_alpha(self) -> bool:
        """Whether α isn't learned."""
        return not isinstance(self.log_alpha, nn.Parameter)

    @property
    def device(self) -> torch.device:
        """Where α is, and with it the loss."""
        return self.log_alpha.device

    @property
    def _has_bounds(self) -> bool:
        return self.min_log_alpha is not None or self.max_log_alpha is not None

    def _bounded_alpha(self) -> Tensor:
        """α as a constant, once ``log_alpha`` is moved between its bounds."""
        with torch.no_grad():
            return self._trained_alpha()

    def _trained_alpha(self) -> Tensor:
        """α as a function of ``log_alpha``, once that is moved between its bounds."""
        if self._has_bounds:
            with torch.no_grad():
                self.log_alpha.clamp_(self.min_log_alpha, self.max_log_alpha)
        return self.log_alpha.exp()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TemperatureLoss":
        found = [getattr(self, name) for name in self._multipliers]
        kept = [x for parameter in found if parameter is not None for x in (parameter, parameter.grad)]

        def convert(x: Tensor) -> Tensor:
            converted = fn(x)
            return x.to(converted.device) if any(x is y for y in kept) else converted

        super()._apply(convert, recurse)
        return self


def continuous_target_entropy(target_entropy: str | float | Tensor, action_spec: Any, actor_network: Any) -> Any:
    """The target for continuous actions: as given, or for ``"auto"`` minus the number of the action's dimensions.

    Args:
        target_entropy: a number, or ``"auto"``.
        action_spec: has the ``shape`` of one action; or maps keys to such specs and has a ``shape`` of its own, the
            dimensions that they begin with and that don't belong to the action (as TorchRL's Composite has).
            Those of a nested one count as well: the agents of a team. None: an attribute ``spec`` of the actor.
        actor_network: the policy, which says under which key its action is.

    Raises:
        RuntimeError: it is ``"auto"``, and the shape of the action isn't to be found.
        ValueError: it is some other string, or None.

    See Haarnoja et al. 2018, Soft actor-critic algorithms and applications (arXiv:1812.05905), table 1.

    """
    if target_entropy != "auto":
        return check_target_entropy(target_entropy)
    spec: Any = getattr(actor_network, "spec", None) if action_spec is None else action_spec
    if spec is not None and not hasattr(spec, "keys"):
        return -float(math.prod(spec.shape))
    keys = list(actor_network.dist_sample_keys)
    shapes = [None if spec is None else _shape_of_action(spec, key) for key in keys]
    unknown = [repr(key) for key, shape in zip(keys, shapes, strict=True) if shape is None]
    if unknown:
        raise RuntimeError(
            f"target_entropy is 'auto', but nothing says how many dimensions {', '.join(unknown)} has: give a number "
            "as target_entropy, or an action_spec"
        )
    return -float(sum(math.prod(shape) for shape in shapes if shape is not None))


def _shape_of_action(spec: Any, key: NestedKey) -> tuple[int, ...] | None:
    """The dimensions of one action at ``key``, less those of the specs that it is in, such as a team's agents."""
    leaf, holder = _at(spec, key), None if isinstance(key, str) else _at(spec, key[:-1])
    if leaf is None:
        return None
    return tuple(leaf.shape[len((spec if holder is None else holder).shape) :])


def _at(spec: Any, key: NestedKey) -> Any:
    """The spec at ``key``; None if there is none."""
    try:
        return spec[key]
    except KeyError:
        return None


def check_target_entropy(target_entropy: Any) -> float | Tensor:
    """``target_entropy`` if it is a number.

    Raises:
        ValueError: it isn't.

    """
    if isinstance(target_entropy, bool) or not isinstance(target_entropy, int | float | Tensor):
        raise ValueError(f"target_entropy must be a number or 'auto', but is {target_entropy!r}")
    return target_entropy
