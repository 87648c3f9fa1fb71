"""Problems for the tests of the action-value losses in fusedrl.kernels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BACKENDS = ["torch", "triton", "reference"]
FAST = ["torch", "triton"]

# Some ten roundings of the dtype that is computed in, at the size of the largest term; the half types add the rounding
# of the result, twice since Triton's interpreter rounds it down.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

# From [N, B1, B2] to another layout of the same numbers.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "members last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "batch transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "a column squeezed": lambda x: torch.stack([x, -x], -1)[..., :1].squeeze(-1),
    "every other sample": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "one member expanded": lambda x: x[:1].expand_as(x),
}


def problem(
    batch: tuple[int, ...] = (5,),
    members: int = 2,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | None = None,
    mask: bool = False,
    weights: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Values, rewards, log-probabilities … of a batch; mask and weights are None unless asked for."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device, dtype)

    def chance(p: float) -> Tensor:
        return (torch.rand(batch, generator=generator) < p).to(device)

    return {
        "values": normal(members, *batch).requires_grad_(),
        "log_prob": normal(*batch).requires_grad_(),
        "target": normal(*batch),
        "reward": normal(*batch),
        "terminated": chance(0.3),
        "mask": chance(0.6) if mask else None,
        "weights": normal(*batch).abs() if weights else None,
    }


def in_float64(given: dict[str, Any]) -> dict[str, Any]:
    """The same numbers, for the reference."""
    return {
        k: x.detach().double().requires_grad_(x.requires_grad) if isinstance(x, Tensor) and x.is_floating_point() else x
        for k, x in given.items()
    }


def only(given: dict[str, Any], *names: str) -> dict[str, Any]:
    """The entries that a function takes."""
    return {name: given[name] for name in names}


def of_target(given: dict[str, Any]) -> dict[str, Any]:
    """The tensors that `value_target` takes."""
    return {"next_values": given["values"], **only(given, "reward", "terminated")}


def of_ensemble(given: dict[str, Any]) -> dict[str, Any]:
    """The tensors that `ensemble_loss` takes."""
    return only(given, "values", "target", "mask", "weights")


def of_policy(given: dict[str, Any]) -> dict[str, Any]:
    """The tensors that `soft_policy_loss` takes."""
    return only(given, "values", "log_prob", "mask", "weights")
