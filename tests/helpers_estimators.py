"""Trajectories, value networks and observers for the tests of functionals and estimators."""

from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch
from fusedrl import estimators
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torch import nn
from torch.distributions import Categorical
from torch.utils._python_dispatch import TorchDispatchMode

# Errors of a sum of a dozen terms of size 1: some units in the last place of the dtype. Half precision is computed in
# float32, so that only the rounding of inputs and outputs shows.
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 8e-3, "atol": 8e-3},
    torch.float16: {"rtol": 1e-3, "atol": 1e-3},
}
BACKENDS = ("reference", "torch")
OBSERVATION = 3
HYPERPARAMETERS = {
    "GAE": {"gamma": 0.9, "lmbda": 0.8},
    "TD0Estimator": {"gamma": 0.9},
    "TD1Estimator": {"gamma": 0.9},
    "TDLambdaEstimator": {"gamma": 0.9, "lmbda": 0.8},
}
ESTIMATORS = list(HYPERPARAMETERS)
WRITTEN = ["advantage", "value_target", "state_value", ("next", "state_value")]
every_estimator = pytest.mark.parametrize("name", ESTIMATORS)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def estimator(name, **options):
    """An estimator by name, on the torch backend and with a small network unless said otherwise."""
    options.setdefault("value_network", critic())
    return getattr(estimators, name)(**{**HYPERPARAMETERS[name], "backend": "torch", **options})


def assert_close(actual, expected, **tolerance):
    torch.testing.assert_close(actual, expected, **(tolerance or TOLERANCE[actual.dtype]))


def masks(shape, seed=0):
    """``done`` and ``terminated``, a subset of it, each set at about a fifth of the steps."""
    generator = torch.Generator().manual_seed(seed)
    terminated = torch.rand(shape, generator=generator) < 0.15
    return terminated | (torch.rand(shape, generator=generator) < 0.15), terminated


def signals(shape=(2, 9, 1), seed=0, dtype=torch.float64):
    """The tensor arguments of a functional, by name."""
    generator = torch.Generator().manual_seed(seed)
    value, next_value, reward = torch.randn(3, *shape, generator=generator, dtype=torch.float64).to(dtype)
    log_pi, log_mu = -torch.rand(2, *shape, generator=generator, dtype=torch.float64).to(dtype)
    done, terminated = masks(shape, seed)
    return {
        "log_pi": log_pi,
        "log_mu": log_mu,
        "state_value": value,
        "next_state_value": next_value,
        "reward": reward,
        "done": done,
        "terminated": terminated,
    }


def rollout(batch=(2, 9), seed=0, dtype=torch.float64, obs=(OBSERVATION,), trailing=(1,), consistent=False):
    """A TensorDict of steps. ``consistent``: a next observation is the following one unless a trajectory ends."""
    generator = torch.Generator().manual_seed(seed)
    done, terminated = masks((*batch, *trailing), seed)
    observation, next_observation = torch.randn(2, *batch, *obs, generator=generator, dtype=torch.float64)
    if consistent:
        ends = done[..., 0].clone()
        ends[..., -1] = True
        next_observation = torch.where(ends.unsqueeze(-1), next_observation, observation.roll(-1, -2))
    reward = torch.randn(*batch, *trailing, generator=generator, dtype=torch.float64)
    return TensorDict(
        {
            "obs": observation.to(dtype),
            "next": {
                "obs": next_observation.to(dtype),
                "reward": reward.to(dtype),
                "done": done,
                "terminated": terminated,
            },
        },
        batch,
    )


def critic(dtype=torch.float64, out=1, module=None):
    """A small value network with fixed parameters."""
    if module is None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = nn.Sequential(nn.Linear(OBSERVATION, 4), nn.Tanh(), nn.Linear(4, out)).to(dtype)
    return TensorDictModule(module, in_keys=["obs"], out_keys=["state_value"])


def policy(dtype=torch.float64):
    """A small policy with two actions and fixed parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = TensorDictModule(nn.Linear(OBSERVATION, 2).to(dtype), in_keys=["obs"], out_keys=["logits"])
    draw = ProbabilisticTensorDictModule(
        in_keys=["logits"], out_keys=["action"], distribution_class=Categorical, return_log_prob=True
    )
    return ProbabilisticTensorDictSequential(module, draw)


def as_keywords(tensordict):
    """The entries of a rollout as `dispatch` takes them."""
    return {key if isinstance(key, str) else "_".join(key): x for key, x in tensordict.items(True, leaves_only=True)}


def snapshot(tensordict):
    """What a TensorDict holds, to be compared later: keys, the very tensors, and their values."""
    return {key: (x, x.clone()) for key, x in tensordict.items(True, True)}


def assert_untouched(tensordict, before):
    assert set(tensordict.keys(True, True)) == set(before)
    for key, (x, values) in before.items():
        assert tensordict.get(key) is x
        torch.testing.assert_close(x, values, rtol=0, atol=0, equal_nan=True)


@contextmanager
def no_host_sync():
    """Fails on whatever would wait for a device, or whose result's shape depends on data, also inside operators."""
    with ExitStack() as stack:
        for owner, name in SYNCING:
            stack.enter_context(mock.patch.object(owner, name, _forbidden(name)))
        for name in ("__getitem__", "__setitem__"):
            stack.enter_context(mock.patch.object(torch.Tensor, name, _without_masks(getattr(torch.Tensor, name))))
        stack.enter_context(mock.patch.object(torch, "where", _with_three_arguments(torch.where)))
        stack.enter_context(_NoSyncingOperator())
        yield


SYNCING = [
    *((torch.Tensor, x) for x in ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__")),
    *(
        (owner, x)
        for owner in (torch, torch.Tensor)
        for x in ("nonzero", "masked_select", "unique", "equal", "argwhere")
    ),
]


class _NoSyncingOperator(TorchDispatchMode):
    """Sees what each call comes down to, but nothing inside custom operators: for those, the calls are replaced."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not name.startswith(self.FORBIDDEN), f"{name} waits on the host"
        return func(*args, **(kwargs or {}))


def _forbidden(name):
    def fail(*args, **kwargs):
        raise AssertionError(f"{name} waits on the host")

    return fail


def _without_masks(function):
    def checked(x, index, *value):
        parts = index if isinstance(index, list | tuple) else (index,)
        masked = any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in parts)
        assert not masked, f"{function.__name__} with a mask waits on the host"
        return function(x, index, *value)

    return checked


def _with_three_arguments(where):
    def checked(*args, **kwargs):
        assert len(args) + len(kwargs) >= 3, "where with a condition alone waits on the host"
        return where(*args, **kwargs)

    return checked
