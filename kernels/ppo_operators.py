"""From a checked clipped surrogate to its loss: the operator ``fusedrl::clip_ppo_loss`` and what is around it."""

from .dispatch import backend_modules
from .ppo_problem import PPOConstants, outputs, slope_of
from .samples_operators import SCALAR, loss_operator

backend_module = backend_modules("ppo")

solve = loss_operator(
    "clip_ppo_loss",
    "log_prob",
    PPOConstants,
    {
        "old_log_prob": "Tensor",
        "advantage": "Tensor",
        "proximal_log_prob": "Tensor?",
        "mask": "Tensor?",
        "weights": "Tensor?",
        "clip_low": SCALAR,
        "clip_high": SCALAR,
        "max_ratio": SCALAR,
        "normalize": "bool",
        "reduction": "str",
    },
    outputs,
    backend_module,
    slope_of,
)
