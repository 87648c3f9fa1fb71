"""Problems for the tests of the categorical loss."""

from typing import Any

import torch
from torch import Tensor

BACKENDS = ["torch", "triton", "reference"]

# Some ten roundings of the dtype that is computed in, at the size of the largest log-probability, position or value of
# these problems; the half types add the rounding of the result, twice since Triton's interpreter rounds it down.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def problem(
    batch: tuple[int, ...] = (4,),
    atoms: int = 5,
    actions: int = 3,
    *,
    v_min: float = -2.0,
    v_max: float = 3.0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | None = None,
    double: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """The arguments of `categorical_q_loss`: random distributions and rewards that leave the support at times."""
    generator = torch.Generator().manual_seed(seed)

    def log_prob() -> Tensor:
        x = torch.randn(*batch, atoms, actions, generator=generator, dtype=torch.float64)
        return (2 * x).log_softmax(-2).to(device, dtype)

    arguments = {
        "log_prob": log_prob().requires_grad_(),
        "action": torch.randint(actions, batch, generator=generator).to(device),
        "next_log_prob": log_prob(),
        "support": torch.linspace(v_min, v_max, atoms, dtype=torch.float64).to(device, dtype),
        "reward": torch.randn(batch, generator=generator, dtype=torch.float64).to(device, dtype),
        "terminated": (torch.rand(batch, generator=generator) < 0.3).to(device),
        "gamma": 0.9,
    }
    return arguments | ({"next_online_log_prob": log_prob()} if double else {})


def in_float64(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same numbers, for the reference."""
    return {
        k: x.detach().double().requires_grad_(x.requires_grad) if isinstance(x, Tensor) and x.is_floating_point() else x
        for k, x in arguments.items()
    }
