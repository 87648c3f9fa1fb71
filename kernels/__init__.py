"""Recurrences and the losses' inner loops on tensors: Triton kernels, vectorised PyTorch and readable references.

Nothing here knows TensorDicts or networks; `fusedrl.estimators` and `fusedrl.losses` build on it.
"""

from .action_value import EnsembleLoss, SoftPolicyLoss, Target, ensemble_loss, soft_policy_loss, value_target
from .backend import BACKENDS, current_backend, fastest_backend, resolve_backend, use_backend
from .categorical import categorical_projection, categorical_q_loss
from .compare import VerificationError
from .ppo import ClipPPO, clip_ppo_loss
from .returns import (
    fixed_discount_td_lambda_return,
    gae,
    reverse_scan,
    reward_to_go,
    td1_return,
    td_lambda_return,
)
from .squashed_normal import normal_log_prob, normal_sample
from .value_loss import ValueLoss, value_loss
from .vtrace import vtrace

__all__ = [
    "BACKENDS",
    "ClipPPO",
    "EnsembleLoss",
    "SoftPolicyLoss",
    "Target",
    "ValueLoss",
    "VerificationError",
    "categorical_projection",
    "categorical_q_loss",
    "clip_ppo_loss",
    "current_backend",
    "ensemble_loss",
    "fastest_backend",
    "fixed_discount_td_lambda_return",
    "gae",
    "normal_log_prob",
    "normal_sample",
    "resolve_backend",
    "reverse_scan",
    "reward_to_go",
    "soft_policy_loss",
    "td1_return",
    "td_lambda_return",
    "use_backend",
    "value_loss",
    "value_target",
    "vtrace",
]
