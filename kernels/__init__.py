"""Recurrences and the categorical loss on tensors: Triton kernels, vectorised PyTorch and the reference loops.

Nothing here knows TensorDicts or networks; `fusedrl.estimators` and `fusedrl.losses` build on it.
"""

from .backend import BACKENDS, current_backend, fastest_backend, resolve_backend, use_backend
from .categorical import categorical_projection, categorical_q_loss
from .returns import (
    fixed_discount_td_lambda_return,
    gae,
    reverse_scan,
    reward_to_go,
    td1_return,
    td_lambda_return,
)
from .vtrace import vtrace

__all__ = [
    "BACKENDS",
    "categorical_projection",
    "categorical_q_loss",
    "current_backend",
    "fastest_backend",
    "fixed_discount_td_lambda_return",
    "gae",
    "resolve_backend",
    "reverse_scan",
    "reward_to_go",
    "td1_return",
    "td_lambda_return",
    "use_backend",
    "vtrace",
]
