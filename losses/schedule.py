"""A learning rate that follows how far the policy moves."""

import math
from typing import Any

import torch
from torch import Tensor


class KLAdaptiveLR:
    r"""Learning rate that holds the divergence between the policy before and after an update near a target.

    ========================  ==========================
    KL > 2 · target           the rate divided by factor
    0 < KL < target / 2       the rate times factor
    otherwise                 the rate as it is
    ========================  ==========================

    and never outside [min_lr, max_lr]. A policy that did not move, or an estimate below 0, says nothing. Every
    parameter group is changed. A rate that is a tensor is changed in place, without waiting for the device if ``kl`` is
    there too, so that an update that was compiled or captured in a CUDA graph sees it; for a rate that is a number
    ``kl`` is read on the host.

    Args:
        optimizer: whose learning rates are changed.
        target_kl: the divergence aimed at, in nats.
        factor: how much the rate changes in one step.
        min_lr: the least rate.
        max_lr: the greatest rate.

    Raises:
        ValueError: ``target_kl`` is not positive, ``factor`` not above 1, or not 0 < ``min_lr`` ≤ ``max_lr``; or one of
            them is not finite.

    Examples:
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.001)
        >>> schedule = KLAdaptiveLR(optimizer, target_kl=0.01, factor=2.0)
        >>> schedule.step(0.05)  # such as the ``kl_approx`` of a PPO loss
        >>> schedule.get_last_lr()
        [0.0005]

    See Rudin et al. 2021, Learning to walk in minutes using massively parallel deep reinforcement learning
    (arXiv:2109.11978).

    """

    _settings = ("target_kl", "factor", "min_lr", "max_lr", "last_kl")

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        target_kl: float,
        *,
        factor: float = 1.5,
        min_lr: float = 1e-5,
        max_lr: float = 1e-2,
    ) -> None:
        if not 0 < target_kl < math.inf:
            raise ValueError(f"target_kl is {target_kl}, but must be positive and finite")
        if not 1 < factor < math.inf:
            raise ValueError(f"factor is {factor}, but must be above 1 and finite")
        if not 0 < min_lr <= max_lr < math.inf:
            raise ValueError(
                f"min_lr is {min_lr} and max_lr {max_lr}, but it must be 0 < min_lr <= max_lr, both finite"
            )
        self.optimizer = optimizer
        self.target_kl = target_kl
        self.factor = factor
        self.min_lr = min_lr
        self.max_lr = max_lr
        self.last_kl: float | Tensor | None = None

    @torch.no_grad()
    def step(self, kl: float | Tensor) -> None:
        """Change the learning rates after an update that moved the policy by ``kl``, a number or a tensor of one.

        Raises:
            ValueError: ``kl`` has several elements; it is not finite, and a rate is a number. Nothing is changed then.

        """
        if isinstance(kl, Tensor) and kl.numel() != 1:
            raise ValueError(f"kl must be a number or a tensor of one element, but has shape {tuple(kl.shape)}")
        groups = self.optimizer.param_groups
        if not (isinstance(kl, Tensor) and all(isinstance(group["lr"], Tensor) for group in groups)):
            kl = float(kl)
            if not math.isfinite(kl):
                raise ValueError(f"kl must be finite, but is {kl}")
        for group in groups:
            lr = group["lr"]
            if isinstance(lr, Tensor):
                lr.copy_(self._adapted_tensor(lr, kl))
            else:
                group["lr"] = self._adapted(lr, float(kl))
        self.last_kl = kl.detach() if isinstance(kl, Tensor) else kl

    def _adapted(self, lr: float, kl: float) -> float:
        if kl > 2 * self.target_kl:
            lr = lr / self.factor
        elif 0 < kl < self.target_kl / 2:
            lr = lr * self.factor
        return min(max(lr, self.min_lr), self.max_lr)

    def _adapted_tensor(self, lr: Tensor, kl: float | Tensor) -> Tensor:
        kl = torch.as_tensor(kl, device=lr.device).reshape(())
        larger = (kl > 0) & (kl < self.target_kl / 2)
        # A KL that is NaN or infinite is nobody's to raise an error for, without waiting for it: it says nothing.
        smaller = (kl > 2 * self.target_kl) & kl.isfinite()
        rate = torch.where(smaller, lr / self.factor, torch.where(larger, lr * self.factor, lr))
        return rate.clamp(self.min_lr, self.max_lr)

    def get_last_lr(self) -> list[float]:
        """The learning rate of each parameter group, read on the host."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """The settings and the last KL as numbers; the learning rates are part of the optimizer's state."""
        state = {name: getattr(self, name) for name in self._settings}
        return {name: float(x) if isinstance(x, Tensor) else x for name, x in state.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            KeyError: an entry is missing.

        """
        missing = [name for name in self._settings if name not in state_dict]
        if missing:
            raise KeyError(f"the state of KLAdaptiveLR lacks {', '.join(missing)}")
        for name in self._settings:
            setattr(self, name, state_dict[name])
