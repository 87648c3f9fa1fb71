"""Networks, replayed transitions and common checks for the losses that learn action values. All float64 and seeded."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers_compile import traced_once
from helpers_losses import DOUBLE, OBSERVATION, diagonal_normal
from tensordict import TensorDict
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    set_skip_existing,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

ACTION = 2
ACTIONS = 3

# Both compute in float64, but TorchRL keeps γ and coefficients in float32.
PARITY = {"rtol": 1e-6, "atol": 1e-7}
# The same float64 operations, reordered at most.
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


class StateAction(nn.Module):
    """Q(s, a) of an observation and a continuous action."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(OBSERVATION + ACTION, 6, **DOUBLE), nn.Tanh(), nn.Linear(6, 1, **DOUBLE))

    def forward(self, observation, action):
        return self.layers(torch.cat([observation, action], -1))


class LocScale(nn.Linear):
    def __init__(self):
        super().__init__(OBSERVATION, 2 * ACTION, **DOUBLE)

    def forward(self, x):
        loc, log_scale = super().forward(x).chunk(2, -1)
        return loc, log_scale.exp()


def qvalue_network():
    return TensorDictModule(StateAction(), ["observation", "action"], ["state_action_value"])


def value_network():
    return TensorDictModule(nn.Linear(OBSERVATION, 1, **DOUBLE), ["observation"], ["state_value"])


def action_values(actions=ACTIONS, key="action_value"):
    """Q(s, ·) of every discrete action."""
    return TensorDictModule(nn.Linear(OBSERVATION, actions, **DOUBLE), ["observation"], [key])


def deterministic_actor():
    net = nn.Sequential(nn.Linear(OBSERVATION, ACTION, **DOUBLE), nn.Tanh())
    return TensorDictModule(net, ["observation"], ["action"])


def stochastic_actor(distribution=diagonal_normal, action="action"):
    return ProbabilisticTensorDictSequential(
        TensorDictModule(LocScale(), ["observation"], ["loc", "scale"]),
        ProbabilisticTensorDictModule(
            ["loc", "scale"], [action], distribution_class=distribution, return_log_prob=True,
            default_interaction_type="random",
        ),
    )  # fmt: skip


def transitions(batch=(3, 5), action="continuous", steps_to_next_obs=False):
    """Replayed transitions; ``action`` is "continuous", "one-hot" or "categorical"."""
    data = TensorDict({"observation": torch.randn(*batch, OBSERVATION, **DOUBLE)}, batch)
    if action == "continuous":
        data["action"] = torch.rand(*batch, ACTION, **DOUBLE) * 2 - 1
    else:
        index = torch.randint(ACTIONS, batch)
        data["action"] = nn.functional.one_hot(index, ACTIONS) if action == "one-hot" else index
    data["next"] = TensorDict(
        {
            "observation": torch.randn(*batch, OBSERVATION, **DOUBLE),
            "reward": torch.randn(*batch, 1, **DOUBLE),
            "done": torch.rand(*batch, 1) < 0.3,
        },
        batch,
    )
    data["next", "terminated"] = data["next", "done"] & (torch.rand(*batch, 1) < 0.7)
    if steps_to_next_obs:
        data["steps_to_next_obs"] = torch.randint(1, 4, (*batch, 1))
    return data


def desynchronise_targets(*losses):
    """Move the target parameters away from the trained ones, by the same in all ``losses``; return the first."""
    for loss in losses:
        torch.manual_seed(7)
        for name, buffer in sorted(loss.named_buffers()):
            if name.startswith("target_") and "_params" in name and buffer.is_floating_point():
                buffer.data.add_(0.1 * torch.randn_like(buffer))
    return losses[0]


def same_parameters(source, *others):
    """Load the state of ``source`` into the ``others`` (an ensemble is drawn anew by each loss)."""
    for other in others:
        other.load_state_dict(source.state_dict())


def run(loss, data, seed=1):
    """The output of ``loss`` on a copy of ``data``, and the copy. Draws are seeded."""
    data = data.clone()
    torch.manual_seed(seed)
    return losses_of(loss(data)), data


def losses_of(out):
    """The losses alone, without the imagined trajectories that Dreamer's return too."""
    return out[0] if isinstance(out, tuple) else out


def gradients(loss, out):
    """Gradient of every ``loss_*`` entry with respect to every trained parameter of ``loss``, by names."""
    trained = sorted((name, p) for name, p in loss.named_parameters() if p.requires_grad)
    names, parameters = [name for name, _ in trained], [p for _, p in trained]
    found = {}
    for term, value in out.items():
        if term.startswith("loss") and value.requires_grad and trained:
            grads = torch.autograd.grad(
                value.sum(), parameters, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            found[term] = dict(zip(names, grads, strict=True))
    return found


def assert_parity(ours, theirs, data, *, priority="td_error", keys=None, **tolerance):
    """The same outputs, gradients and priorities from both losses, once they have the same state.

    Args:
        keys: the outputs compared; by default all, which must have the same names.

    """
    tolerance = tolerance or PARITY
    (a, seen_a), (b, seen_b) = run(ours, data), run(theirs, data)
    if keys is None:
        assert set(a.keys()) == set(b.keys())
    a_terms, b_terms = (out if keys is None else out.select(*keys) for out in (a, b))
    torch.testing.assert_close(a_terms.detach().to_dict(), b_terms.detach().to_dict(), **tolerance)
    torch.testing.assert_close(gradients(ours, a_terms), gradients(theirs, b_terms), **tolerance)
    if priority is not None:
        torch.testing.assert_close(seen_a[priority], seen_b[priority].detach(), **tolerance)


def assert_states_are_exchanged(ours, theirs):
    """Either loads what the other saved, strictly."""
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    buffer = io.BytesIO()
    torch.save(theirs.state_dict(), buffer)
    buffer.seek(0)
    ours.load_state_dict(torch.load(buffer, weights_only=False), strict=True)


def assert_compiles(make: Callable[[], Any], data, *, backend="aot_eager", **tolerance):
    """`torch.compile(fullgraph=True)` gives the eager outputs, gradients and priorities."""
    tolerance = tolerance or CLOSE
    torch._dynamo.reset()
    eager = traced_once(make())
    compiled = copy.deepcopy(eager)
    graph = torch.compile(compiled, fullgraph=True, backend=backend)
    (a, seen_a), (b, seen_b) = run(eager, data), run(graph, data)
    torch.testing.assert_close(b.detach().to_dict(), a.detach().to_dict(), **tolerance)
    torch.testing.assert_close(gradients(compiled, b), gradients(eager, a), **tolerance)
    torch.testing.assert_close(seen_b.detach().to_dict(), seen_a.detach().to_dict(), **tolerance)


class NoHostSync(TorchDispatchMode):
    """Refuses what waits for a CUDA device: reading a number, or an output whose shape depends on the data."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        # One number put where a mask says is a masked_fill to a CUDA device.
        bool_index = (name == "index" or (name in ("index_put", "index_put_") and args[2].numel() != 1)) and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in args[1] if i is not None
        )
        if name in self.WAITING or bool_index:
            raise AssertionError(f"aten.{name} waits for the device")
        return func(*args, **(kwargs or {}))


def assert_no_host_sync(loss, data, monkeypatch):
    """Forward and backward never wait for the device."""
    # The distributions' own checks of their arguments do.
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)
    with NoHostSync():
        out = losses_of(loss(data.clone()))
        sum(term.sum() for name, term in out.items() if name.startswith("loss")).backward()


def assert_rejected(loss, data, error, match):
    """``loss`` refuses ``data`` with ``error``, and leaves it as it was."""
    keys, before = set(data.keys(True, True)), data.clone()
    with pytest.raises(error, match=match):
        loss(data)
    assert set(data.keys(True, True)) == keys
    assert all(torch.equal(data[k], before[k]) or data[k].isnan().any() for k in keys)


def poisoned(data, value=float("nan")):
    """``data`` whose next observations of terminal steps hold ``value``."""
    data = data.clone()
    terminated = data["next", "terminated"]
    data["next", "observation"] = torch.where(terminated, value, data["next", "observation"])
    return data


def assert_terminal_observations_are_ignored(loss, data):
    """What follows a terminal step reaches neither the losses nor their gradients, nor the priorities."""
    assert data["next", "terminated"].any()
    reference, seen = run(loss, data)
    for value in (float("nan"), float("inf")):
        out, also_seen = run(loss, poisoned(data, value))
        for name in (name for name in out.keys() if name.startswith("loss")):  # noqa: SIM118  # a TensorDict is no dict
            torch.testing.assert_close(out[name], reference[name], **CLOSE)
        torch.testing.assert_close(gradients(loss, out), gradients(loss, reference), **CLOSE)
        torch.testing.assert_close(also_seen["td_error"], seen["td_error"], **CLOSE)


def padded(data, fill):
    """``data`` as one row, followed by two steps of padding that hold ``fill``, and a mask that says so."""
    flat = data.reshape(-1)
    padding = flat[:2].clone()
    for key in list(padding.keys(True, True)):
        x = padding[key]
        padding[key] = torch.full_like(x, fill) if x.is_floating_point() else torch.zeros_like(x)
    result = torch.cat([flat, padding])
    result["collector", "mask"] = torch.arange(len(result)) < len(flat)
    return result


def assert_padding_is_ignored(loss, data, *, random=False):
    """Steps that ("collector", "mask") marks as padding don't count, whatever they hold.

    Args:
        random: the loss draws numbers, other ones where there are more steps.

    """
    out, _ = run(loss, padded(data, float("nan")))
    wanted, _ = run(loss, padded(data, 0.5) if random else data.reshape(-1))
    for name in (name for name in wanted.keys() if name.startswith("loss")):  # noqa: SIM118  # a TensorDict is no dict
        torch.testing.assert_close(out[name], wanted[name], **CLOSE)
    torch.testing.assert_close(gradients(loss, out), gradients(loss, wanted), **CLOSE)


def assert_existing_entries_are_not_kept(loss, data):
    """Where modules skip what is there already, losses and gradients are those of where they don't."""
    wanted, _ = run(loss, data)
    with set_skip_existing(True):
        found, _ = run(loss, data)
    torch.testing.assert_close(found.to_dict(), wanted.to_dict(), **CLOSE)
    torch.testing.assert_close(gradients(loss, found), gradients(loss, wanted), **CLOSE)
