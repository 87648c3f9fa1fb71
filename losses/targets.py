"""Target networks: slowly moving copies of the trained ones, and how they move.

A loss that was told to delay a network holds its parameters twice: ``<name>_params``, which are trained, and
``target_<name>_params``, which only an updater changes. All the tensors of all the networks move at once, in a number
of launches that doesn't depend on how many they are. Buffers, such as the statistics of a batch normalisation, belong
to what a network computes: they move with the parameters.
"""

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from .base import LossModule

Group = tuple[list[Tensor], list[Tensor]]
"""Targets and their sources, of one device and one dtype: what a single launch can move."""


class TargetNetUpdater:
    """Base of the updaters: which tensors move, and when. A subclass says how: in ``_step``, of one, or in ``_move``.

    The targets start as copies of the parameters: that is done when the updater is constructed, which therefore comes
    before the state of a loss is loaded, whose targets it would overwrite.

    Args:
        loss_module: the loss whose target networks are updated.

    Raises:
        ValueError: ``loss_module`` is not a `LossModule`.
        RuntimeError: it has no target networks of their own: none of its networks is delayed.

    """

    def __init__(self, loss_module: LossModule) -> None:
        if not isinstance(loss_module, LossModule):
            raise ValueError(f"loss_module must be a LossModule, but is a {type(loss_module).__name__}")
        if not loss_module._has_update_associated:
            raise RuntimeError(
                f"{type(loss_module).__name__} has no target parameters to update: construct it with the delay_* "
                "option of the network whose target should lag behind"
            )
        self.loss_module = loss_module
        self.initialized = False
        self.init_()
        for name in loss_module._has_update_associated:
            loss_module._has_update_associated[name] = True

    def init_(self) -> None:
        """Copy the parameters to the targets; warns if that was done before."""
        if self.initialized:
            warnings.warn(f"{type(self).__name__} is initialized already: the targets start anew", stacklevel=2)
        self._copy()
        self.initialized = True

    def step(self) -> None:
        """Move the targets; to be called after each step of the optimizer.

        Raises:
            RuntimeError: `init_` has not been called, which loading a state can bring about.

        """
        if not self.initialized:
            raise RuntimeError(f"{type(self).__name__} is not initialized: call init_() before step()")
        self._move()

    @torch.no_grad()
    def _move(self) -> None:
        """Move all targets; one after the other, unless a subclass does it at once."""
        for targets, sources in self._groups():
            for target, source in zip(targets, sources, strict=True):
                self._step(source, target)

    def _step(self, p_source: Tensor, p_target: Tensor) -> None:
        """Move the target ``p_target`` of the parameter or buffer ``p_source``, in place."""
        raise NotImplementedError(f"{type(self).__name__} doesn't say how targets move: it needs a method _step")

    @torch.no_grad()
    def _copy(self) -> None:
        for targets, sources in self._groups():
            torch._foreach_copy_(targets, sources)

    def _groups(self) -> Iterable[Group]:
        # Looked up each time: moving or casting the loss, and loading a state, may put new tensors in place of old.
        groups: dict[tuple[torch.device, torch.dtype], Group] = {}
        for name in self.loss_module._has_update_associated:
            params = getattr(self.loss_module, f"{name}_params")
            for target, source in _pairs(getattr(self.loss_module, f"target_{name}_params"), params):
                targets, sources = groups.setdefault((target.device, target.dtype), ([], []))
                targets.append(target)
                sources.append(source)
        return groups.values()

    def state_dict(self) -> dict[str, Any]:
        """What the updater has to remember; the targets are part of the loss's own state."""
        return {"initialized": self.initialized}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state that `state_dict` returned.

        Raises:
            KeyError: it is not one of this kind of updater.

        """
        expected = self.state_dict().keys()
        if state_dict.keys() != expected:
            raise KeyError(
                f"the state of a {type(self).__name__} has the entries {sorted(expected)}, but this one has "
                f"{sorted(state_dict)}"
            )
        for name, value in state_dict.items():
            setattr(self, name, value)

    def __repr__(self) -> str:
        names = ", ".join(self.loss_module._has_update_associated)
        return f"{type(self).__name__}({type(self.loss_module).__name__}: {names})"


class SoftUpdate(TargetNetUpdater):
    r"""Targets that follow the parameters as an exponential moving average.

    .. math::
        \bar θ \leftarrow (1 - τ) \bar θ + τ θ

    Buffers of a floating dtype are averaged too, others are copied. A step can be captured in a CUDA graph.

    Args:
        loss_module: the loss whose target networks are updated.
        eps: 1 − τ, the share that stays.
        tau: τ, the share that is renewed.

    Raises:
        RuntimeError: neither ``eps`` nor ``tau`` is given, or the loss has no targets.
        ValueError: both are given, or they are not between 0 and 1.

    Examples:
        >>> from tensordict import TensorDict
        >>> class Delayed(LossModule):
        ...     def __init__(self, network):
        ...         super().__init__()
        ...         self.convert_to_functional(network, "network", create_target_params=True)
        >>> network = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(network.weight)
        >>> loss = Delayed(network)
        >>> updater = SoftUpdate(loss, tau=0.1)
        >>> _ = torch.nn.init.ones_(network.weight)
        >>> for _ in range(2):
        ...     updater.step()
        >>> loss.target_network_params["weight"]
        tensor([[0.1900]])

    See Lillicrap et al. 2016, Continuous control with deep reinforcement learning (arXiv:1509.02971), section 3.

    """

    def __init__(self, loss_module: LossModule, *, eps: float | None = None, tau: float | None = None) -> None:
        if eps is None and tau is None:
            raise RuntimeError("SoftUpdate needs eps or tau: the share of the target that stays, or that is renewed")
        if eps is not None and tau is not None:
            raise ValueError(f"SoftUpdate takes eps or tau, which is 1 − eps, but got eps={eps} and tau={tau}")
        name, value = ("eps", eps) if tau is None else ("tau", tau)
        if not 0 <= value <= 1:  # type: ignore[operator]  # one of the two is not None
            raise ValueError(f"{name} must be between 0 and 1, but is {value}")
        if eps is not None and eps < 0.5:
            warnings.warn(f"eps is {eps}: most of the target is renewed in each step. Is it tau?", stacklevel=2)
        self.eps = float(eps if tau is None else 1 - tau)  # type: ignore[arg-type]  # as above
        super().__init__(loss_module)

    @torch.no_grad()
    def _move(self) -> None:
        for targets, sources in self._groups():
            if targets[0].is_floating_point():
                torch._foreach_lerp_(targets, sources, 1 - self.eps)
            else:
                torch._foreach_copy_(targets, sources)


class HardUpdate(TargetNetUpdater):
    """Targets that stay as they are for a number of steps and are then copies of the parameters again.

    As in TorchRL, whose checkpoints hold the count of the steps since the last copy: ``value_network_update_interval``
    steps leave the targets alone, and the one after them copies. With 0 every step does. The host counts, so that a
    CUDA graph would repeat what the step did that was captured: step outside of it.

    Args:
        loss_module: the loss whose target networks are updated.
        value_network_update_interval: steps between two that copy.

    Raises:
        RuntimeError: the loss has no targets.
        ValueError: the interval is negative.

    See van Hasselt et al. 2016, Deep reinforcement learning with double Q-learning (arXiv:1509.06461).

    """

    def __init__(self, loss_module: LossModule, *, value_network_update_interval: float = 1000) -> None:
        if not value_network_update_interval >= 0:
            raise ValueError(
                f"value_network_update_interval must not be negative, but is {value_network_update_interval}"
            )
        super().__init__(loss_module)
        self.value_network_update_interval = value_network_update_interval
        self.counter = 0

    def _move(self) -> None:
        if self.counter >= self.value_network_update_interval:
            self._copy()
            self.counter = 0
        else:
            self.counter += 1

    def state_dict(self) -> dict[str, Any]:
        """Whether the updater is initialized, and the steps since the last copy."""
        return {**super().state_dict(), "counter": self.counter}


def _pairs(targets: TensorDictBase, params: TensorDictBase) -> Iterator[tuple[Tensor, Tensor]]:
    """Each target with its source. Level by level: looking up nested keys would cost more than moving the tensors."""
    sources = dict(params.items())
    for key, target in targets.items():
        if isinstance(target, TensorDictBase):
            yield from _pairs(target, sources[key])
        else:
            yield target, sources[key]
