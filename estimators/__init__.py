"""Value estimators: how rewards and values become advantages and value targets.

`GAE`, `MultiAgentGAE`, `TD0Estimator`, `TD1Estimator`, `TDLambdaEstimator` and `VTrace` work on TensorDicts and call
the value network; the functions in `fusedrl.estimators.functional` are the same estimates on tensors.
"""

from . import functional
from .base import ValueEstimatorBase
from .functional import (
    generalized_advantage_estimate,
    reward2go,
    td0_advantage_estimate,
    td0_return_estimate,
    td1_advantage_estimate,
    td1_return_estimate,
    td_lambda_advantage_estimate,
    td_lambda_return_estimate,
    vec_generalized_advantage_estimate,
    vec_td1_advantage_estimate,
    vec_td1_return_estimate,
    vec_td_lambda_advantage_estimate,
    vec_td_lambda_return_estimate,
    vtrace_advantage_estimate,
)
from .gae import GAE
from .multi_agent import MultiAgentGAE
from .registry import (
    ValueEstimatorEntry,
    ValueEstimators,
    build_value_estimator,
    default_value_kwargs,
    dispatch_value_estimator,
    get_value_estimator_entry,
    register_value_estimator,
)
from .td import (
    TD0Estimate,
    TD0Estimator,
    TD1Estimate,
    TD1Estimator,
    TDLambdaEstimate,
    TDLambdaEstimator,
)
from .variants import LambdaEstimatorBase
from .vtrace import VTrace

__all__ = [
    "GAE",
    "LambdaEstimatorBase",
    "MultiAgentGAE",
    "TD0Estimate",
    "TD0Estimator",
    "TD1Estimate",
    "TD1Estimator",
    "TDLambdaEstimate",
    "TDLambdaEstimator",
    "VTrace",
    "ValueEstimatorBase",
    "ValueEstimatorEntry",
    "ValueEstimators",
    "build_value_estimator",
    "default_value_kwargs",
    "dispatch_value_estimator",
    "functional",
    "generalized_advantage_estimate",
    "get_value_estimator_entry",
    "register_value_estimator",
    "reward2go",
    "td0_advantage_estimate",
    "td0_return_estimate",
    "td1_advantage_estimate",
    "td1_return_estimate",
    "td_lambda_advantage_estimate",
    "td_lambda_return_estimate",
    "vec_generalized_advantage_estimate",
    "vec_td1_advantage_estimate",
    "vec_td1_return_estimate",
    "vec_td_lambda_advantage_estimate",
    "vec_td_lambda_return_estimate",
    "vtrace_advantage_estimate",
]
