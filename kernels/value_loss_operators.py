"""From a checked critic's loss to its value: the operator ``fusedrl::value_loss`` and what is around it."""

from .dispatch import backend_modules
from .samples_operators import SCALAR, loss_operator
from .value_loss_problem import ValueConstants, outputs

backend_module = backend_modules("value_loss")

solve = loss_operator(
    "value_loss",
    "value",
    ValueConstants,
    {
        "value_target": "Tensor",
        "old_value": "Tensor?",
        "mask": "Tensor?",
        "weights": "Tensor?",
        "clip": SCALAR,
        "coefficient": SCALAR,
        "loss_function": "str",
        "explained_variance": "bool",
        "reduction": "str",
    },
    outputs,
    backend_module,
)
