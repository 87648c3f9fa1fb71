"""Losses: modules that read a TensorDict, estimate advantages where they are missing, and return ``loss_*`` entries."""

from .a2c import A2CLoss
from .base import AUTO_LOSS_MASK_KEYS, LossModule
from .ppo import ClipPPOLoss, KLPENPPOLoss, PPOLoss
from .reinforce import ReinforceLoss
from .utils import (
    ValueEstimators,
    build_value_estimator,
    default_value_kwargs,
    dispatch_value_estimator,
    distance_loss,
    get_value_estimator_entry,
    group_optimizers,
    hold_out_net,
    hold_out_params,
    next_state_value,
    register_value_estimator,
)

__all__ = [
    "AUTO_LOSS_MASK_KEYS",
    "A2CLoss",
    "ClipPPOLoss",
    "KLPENPPOLoss",
    "LossModule",
    "PPOLoss",
    "ReinforceLoss",
    "ValueEstimators",
    "build_value_estimator",
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
