"""What every public loss promises, whichever it is: a loss that is added without an entry here is a failure."""

import inspect
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from fusedrl import losses
from helpers_losses import collect, critic, discrete_actor
from helpers_q import (
    assert_compiles,
    assert_no_host_sync,
    assert_rejected,
    run,
)
from tensordict import TensorDictBase
from tensordict.nn import set_composite_lp_aggregate


@dataclass
class Case:
    """How to make a loss and its data, and what it reads."""

    make: Callable[..., Any]
    data: Callable[[], TensorDictBase]
    reads: str = "reward"
    options: dict[str, Any] = field(default_factory=dict)


def policy_gradient(cls, **options):
    return lambda **more: cls(discrete_actor(), critic(), **options, **more)


CASES = {
    name: Case(policy_gradient(getattr(losses, name)), lambda: collect(discrete_actor(), estimated=False))
    for name in ("A2CLoss", "ClipPPOLoss", "KLPENPPOLoss", "PPOLoss", "ReinforceLoss")
}

every_loss = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    with set_composite_lp_aggregate(False):
        yield


def public_losses():
    found = {name: getattr(losses, name) for name in losses.__all__}
    return {n for n, x in found.items() if inspect.isclass(x) and issubclass(x, losses.LossModule)} - {"LossModule"}


def test_every_public_loss_is_checked_here():
    assert set(CASES) == public_losses()


@every_loss
def test_nothing_waits_for_the_device(name, monkeypatch):
    case = CASES[name]
    assert_no_host_sync(case.make(), case.data(), monkeypatch)


@every_loss
def test_compiled_whole_it_gives_the_eager_numbers(name):
    case = CASES[name]
    assert_compiles(case.make, case.data())


@every_loss
def test_an_unknown_reduction_is_refused_when_the_loss_is_made(name):
    case = CASES[name]
    if "reduction" not in inspect.signature(getattr(losses, name)).parameters:
        pytest.skip("takes no reduction")
    with pytest.raises(ValueError, match="reduction is 'foo'"):
        case.make(reduction="foo")


@every_loss
def test_a_discount_in_the_wrong_place_points_to_the_right_one(name):
    if "gamma" in inspect.signature(getattr(losses, name)).parameters:
        pytest.skip("takes gamma")
    with pytest.raises(TypeError, match="make_value_estimator"):
        CASES[name].make(gamma=0.9)


@every_loss
def test_a_missing_entry_is_named_and_nothing_is_changed(name):
    case = CASES[name]
    loss, data = case.make(), case.data()
    key = getattr(loss.tensor_keys, case.reads)
    entry = key if data.get(key, None) is not None else ("next", key)
    assert_rejected(loss, data.exclude(entry), KeyError, f"{key}.*set_keys\\({case.reads}=")


@every_loss
def test_a_cast_keeps_the_discount_and_the_coefficients(name):
    loss = CASES[name].make()
    before = {k: b.clone() for k, b in loss.named_buffers() if "_params" not in k and b.is_floating_point()}
    after = dict(loss.to(torch.bfloat16).named_buffers())
    for key, value in before.items():
        assert after[key].dtype == value.dtype, key
        assert torch.equal(after[key], value), key


@every_loss
def test_it_can_be_pickled(name):
    case = CASES[name]
    loss, data = case.make(), case.data()
    again = pickle.loads(pickle.dumps(loss))
    torch.testing.assert_close(run(again, data)[0].to_dict(), run(loss, data)[0].to_dict())


@every_loss
def test_the_docstring_has_the_formula_and_the_paper(name):
    doc = inspect.getdoc(getattr(losses, name))
    assert ".. math::" in doc
    assert "arXiv:" in doc or "doi.org" in doc
