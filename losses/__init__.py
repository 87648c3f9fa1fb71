"""Losses: modules that read a TensorDict, estimate advantages where they are missing, and return ``loss_*`` entries."""

from ..estimators.modules import add_random_module
from .a2c import A2CLoss
from .act import ACTLoss
from .base import AUTO_LOSS_MASK_KEYS, LossModule
from .behaviour_cloning import BCLoss
from .cql import CQLLoss
from .cross_q import CrossQLoss
from .ddpg import DDPGLoss
from .decision_transformer import DTLoss, OnlineDTLoss
from .diffusion_bc import DiffusionBCLoss
from .discrete_cql import DiscreteCQLLoss
from .discrete_iql import DiscreteIQLLoss
from .discrete_sac import DiscreteSACLoss
from .distributional_dqn import DistributionalDQNLoss
from .dqn import DQNLoss
from .dreamer import DreamerActorLoss, DreamerModelLoss, DreamerValueLoss
from .dreamer_v3 import DreamerV3Loss
from .dreamer_v3_actor import DreamerV3ActorLoss
from .dreamer_v3_model import DreamerV3ModelLoss
from .dreamer_v3_value import DreamerV3ValueLoss
from .functional.categorical_kl import categorical_kl_balanced, categorical_kl_terms
from .functional.discrete_regression import symexp, symlog, two_hot_cross_entropy, two_hot_decode, two_hot_encode
from .gail import GAILLoss
from .iql import IQLLoss
from .klpen_ppo import KLPENPPOLoss
from .multi_agent import IPPOLoss, MAPPOLoss
from .pilco import ExponentialQuadraticCost
from .ppo import ClipPPOLoss, PPOLoss
from .qmixer import QMixerLoss
from .redq import REDQLoss
from .reinforce import ReinforceLoss
from .rnd import RNDLoss
from .sac import SACLoss
from .schedule import KLAdaptiveLR
from .targets import HardUpdate, SoftUpdate, TargetNetUpdater
from .td3 import TD3Loss
from .td3_bc import TD3BCLoss
from .tqc import TQCLoss
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
from .world_model import WorldModelLoss

__all__ = [
    "AUTO_LOSS_MASK_KEYS",
    "A2CLoss",
    "ACTLoss",
    "BCLoss",
    "CQLLoss",
    "ClipPPOLoss",
    "CrossQLoss",
    "DDPGLoss",
    "DQNLoss",
    "DTLoss",
    "DiffusionBCLoss",
    "DiscreteCQLLoss",
    "DiscreteIQLLoss",
    "DiscreteSACLoss",
    "DistributionalDQNLoss",
    "DreamerActorLoss",
    "DreamerModelLoss",
    "DreamerV3ActorLoss",
    "DreamerV3Loss",
    "DreamerV3ModelLoss",
    "DreamerV3ValueLoss",
    "DreamerValueLoss",
    "ExponentialQuadraticCost",
    "GAILLoss",
    "HardUpdate",
    "IPPOLoss",
    "IQLLoss",
    "KLAdaptiveLR",
    "KLPENPPOLoss",
    "LossModule",
    "MAPPOLoss",
    "OnlineDTLoss",
    "PPOLoss",
    "QMixerLoss",
    "REDQLoss",
    "RNDLoss",
    "ReinforceLoss",
    "SACLoss",
    "SoftUpdate",
    "TD3BCLoss",
    "TD3Loss",
    "TQCLoss",
    "TargetNetUpdater",
    "ValueEstimators",
    "WorldModelLoss",
    "add_random_module",
    "build_value_estimator",
    "categorical_kl_balanced",
    "categorical_kl_terms",
    "default_value_kwargs",
    "dispatch_value_estimator",
    "distance_loss",
    "get_value_estimator_entry",
    "group_optimizers",
    "hold_out_net",
    "hold_out_params",
    "next_state_value",
    "register_value_estimator",
    "symexp",
    "symlog",
    "two_hot_cross_entropy",
    "two_hot_decode",
    "two_hot_encode",
]
