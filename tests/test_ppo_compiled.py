"""The PPO family compiled as one graph, without host synchronisation, and on several ranks."""

import pytest
import torch
from fusedrl.losses import ClipPPOLoss, KLPENPPOLoss, PPOLoss
from helpers_compile import traced_once
from helpers_losses import (
    ACTORS,
    collect,
    composite_actor,
    critic,
    discrete_actor,
    gaussian_actor,
    squashed_normal,
)
from helpers_q import NoHostSync
from tensordict.nn import set_composite_lp_aggregate
from torch import distributed as dist

# The same float64 operations, reordered at most.
CLOSE = {"rtol": 1e-9, "atol": 1e-12}

every_loss = pytest.mark.parametrize("cls", [PPOLoss, ClipPPOLoss, KLPENPPOLoss])

EVERYTHING = {
    "clip_value": 0.1,
    "normalize_advantage": True,
    "max_importance_ratio": 1.5,
    "delay_actor": True,
}


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch.distributions.kl._KL_MEMOIZE.clear()  # as in a process in which no divergence was computed yet
    with set_composite_lp_aggregate(False):
        yield


def losses_and_gradients(loss, call, data):
    torch.manual_seed(1)
    out = call(data)
    total = sum(term.sum() for name, term in out.items() if name.startswith("loss_"))
    return out.to_dict(), torch.autograd.grad(total, list(loss.parameters()))


def assert_compiles(cls, actor, data, backend="aot_eager", **options):
    value = critic()
    eager, compiled = (traced_once(cls(actor, value, **options).make_value_estimator()) for _ in range(2))
    graph = torch.compile(compiled, fullgraph=True, backend=backend)
    for _ in range(2):  # the second call sees the β that the first one left
        torch.testing.assert_close(
            losses_and_gradients(compiled, graph, data), losses_and_gradients(eager, eager, data), **CLOSE
        )
    torch.testing.assert_close(dict(compiled.named_buffers()), dict(eager.named_buffers()))


@pytest.mark.parametrize(
    ("cls", "options"),
    [(PPOLoss, {}), (ClipPPOLoss, EVERYTHING), (KLPENPPOLoss, {}), (KLPENPPOLoss, EVERYTHING)],
    ids=["ppo", "clip", "kl", "kl_everything"],
)
def test_compiled_loss_is_the_eager_one(cls, options):
    actor = discrete_actor()
    data = collect(actor)
    data["collector", "mask"] = torch.rand(data.shape) < 0.8
    assert_compiles(cls, actor, data, **options)


@every_loss
def test_missing_advantage_is_estimated_in_the_same_graph(cls):
    actor = discrete_actor()
    assert_compiles(cls, actor, collect(actor, estimated=False), backend="eager")


@pytest.mark.parametrize("cls", [ClipPPOLoss, KLPENPPOLoss])
def test_policies_of_several_heads_compile(cls):
    actor = composite_actor()
    assert_compiles(cls, actor, collect(actor), backend="eager")


def test_sampled_entropy_compiles():
    actor = gaussian_actor(squashed_normal)
    assert_compiles(KLPENPPOLoss, actor, collect(actor), backend="eager", samples_mc_entropy=2)


def test_scheduled_coefficient_does_not_recompile():
    actor, value = discrete_actor(), critic()
    data = collect(actor)
    loss = ClipPPOLoss(actor, value)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    for _ in range(2):
        compiled(data)
    with torch.compiler.set_stance("fail_on_recompile"):
        loss.clip_epsilon = 0.05
        loss.entropy_coeff = 0.5
        out = compiled(data)
    expected = ClipPPOLoss(actor, value, clip_epsilon=0.05, entropy_coeff=0.5)(data)
    torch.testing.assert_close(out.to_dict(), expected.to_dict())


def test_host_syncs_are_detected():
    x = torch.ones(2)
    for wait in (lambda: x[0].item(), lambda: bool(x.sum()), lambda: x.nonzero(), lambda: x[x > 0]):
        with NoHostSync(), pytest.raises(AssertionError, match="waits for the device"):
            wait()


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("estimated", [True, False], ids=["advantage", "no_advantage"])
@pytest.mark.parametrize("heads", ACTORS)
@every_loss
def test_nothing_waits_for_the_device(cls, heads, estimated, options, monkeypatch):
    # The distributions' own checks of their arguments do.
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)
    actor = ACTORS[heads]()
    data = collect(actor, estimated=estimated)
    data["collector", "mask"] = torch.rand(data.shape) < 0.8
    loss = cls(actor, critic(), **options)
    with NoHostSync():
        out = loss(data)
        sum(term for name, term in out.items() if name.startswith("loss_")).backward()


def test_advantage_is_normalized_over_the_default_process_group(tmp_path):
    actor, value = discrete_actor(), critic()
    data = collect(actor)
    expected = ClipPPOLoss(actor, value, normalize_advantage=True)(data)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        loss = ClipPPOLoss(actor, value, normalize_advantage=True, normalize_advantage_over_ranks=True)
        torch.testing.assert_close(loss(data).to_dict(), expected.to_dict(), **CLOSE)
    finally:
        dist.destroy_process_group()


def test_normalizing_over_ranks_needs_a_process_group():
    actor, value = discrete_actor(), critic()
    loss = ClipPPOLoss(actor, value, normalize_advantage=True, normalize_advantage_over_ranks=True)
    with pytest.raises(RuntimeError, match=r"normalize_advantage_over_ranks.*init_process_group"):
        loss(collect(actor))
