"""REDQ: the equations, and what is promised beyond (or against) what TorchRL does."""

import pytest
import torch
from fusedrl.losses.redq import REDQLoss
from helpers_q import (
    CLOSE,
    DOUBLE,
    LocScale,
    desynchronise_targets,
    gradients,
    poisoned,
    qvalue_network,
    run,
    stochastic_actor,
)
from helpers_sac import continuous, made, policy_of, redq, values_of
from tensordict.nn import TensorDictModule

ALPHA, GAMMA, NETS = 0.5, 0.5, 4


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def prepared(**options):
    loss = redq(alpha_init=ALPHA, num_qvalue_nets=NETS, **options).make_value_estimator("TD0", gamma=GAMMA)
    return desynchronise_targets(loss), continuous()


def test_losses_are_those_of_the_paper():
    loss, data = prepared(loss_function="l2", reduction="none")
    out, seen = run(loss, data)

    torch.manual_seed(1)
    members = torch.randperm(NETS)[:2]
    both = torch.stack([data["observation"], data["next", "observation"]])
    policy = policy_of(loss, loss.actor_network_params, both)
    actions = policy.sample()
    log_probs = policy.log_prob(actions)
    next_values = values_of(loss, loss.target_qvalue_network_params[members], both[1], actions[1]).squeeze(-1)
    next_value = next_values.min(0).values - ALPHA * log_probs[1]
    bootstrap = torch.where(data["next", "terminated"].squeeze(-1), 0, next_value)
    target = data["next", "reward"].squeeze(-1) + GAMMA * bootstrap
    values = values_of(loss, loss.qvalue_network_params, both[0], data["action"]).squeeze(-1)
    judged = values_of(loss, loss.qvalue_network_params, both[0], actions[0]).squeeze(-1)
    expected = {
        "loss_qvalue": (values - target).square(),
        "loss_actor": ALPHA * log_probs[0] - judged,
        "loss_alpha": ALPHA * (-log_probs + 2.0),
        "alpha": torch.tensor(ALPHA),
        "entropy": -log_probs.mean(),
        "state_action_value_actor": judged,
        "action_log_prob_actor": log_probs[0],
        "next.state_value": next_value,
        "target_value": target,
    }
    torch.testing.assert_close(out.detach().to_dict(), expected, **CLOSE)
    torch.testing.assert_close(seen["td_error"], (values - target).square().max(0).values, **CLOSE)


def members_asked(size):
    """The least member among those asked for the target, in each of 40 calls; each member's value tells which it is."""
    loss, data = prepared(sub_sample_len=size)
    for p in loss.actor_network_params.values(True, True):
        p.data.zero_()
    for p in loss.target_qvalue_network_params.values(True, True):
        p.data.zero_()
        if p.shape == (NETS, 1):  # the bias of the last layer is the value
            p.data.copy_(1000.0 * torch.arange(NETS).unsqueeze(-1))
    return {round(run(loss, data, seed)[0]["next.state_value"].mean().item() / 1000) for seed in range(40)}


def test_every_call_draws_a_subset_of_its_own():
    assert members_asked(1) == set(range(NETS))


@pytest.mark.parametrize("size", [NETS, NETS + 3])
def test_a_subset_of_all_is_the_ensemble_whatever_is_drawn(size):
    """TorchRL takes one less, so that it misses the least member now and then."""
    assert members_asked(NETS - 1) == {0, 1}
    assert members_asked(size) == {0}


@pytest.mark.parametrize("size", [0, -1])
def test_an_empty_subset_is_refused(size):
    with pytest.raises(ValueError, match=f"sub_sample_len must be at least 1, but is {size}"):
        redq(sub_sample_len=size)


def test_the_policy_is_asked_once():
    loss, data = prepared()
    calls = []
    module = loss.actor_network[0].module
    forward = module.forward
    module.forward = lambda x: calls.append(x) or forward(x)
    run(loss, data)
    assert len(calls) == 1


def test_only_the_subset_of_the_target_networks_is_computed():
    loss, data = prepared()
    calls = []
    loss.qvalue_network.module.register_forward_hook(lambda *_: calls.append(1))
    run(loss, data)
    assert len(calls) == 2 + NETS + NETS  # the members are few, and asked in turn


def test_a_single_network_keeps_the_shape_of_an_ensemble():
    loss = redq(num_qvalue_nets=1, reduction="none")
    out, _ = run(loss, continuous())
    assert out["loss_qvalue"].shape == out["loss_actor"].shape == (1, 3, 5)
    assert out["loss_alpha"].shape == (2, 3, 5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_after_a_terminal_step_reaches_the_values(value):
    loss, data = made("redq", fixed_alpha=True)
    (reference, seen), (out, also_seen) = run(loss, data), run(loss, poisoned(data, value))
    for name in ("loss_actor", "loss_qvalue", "target_value"):
        torch.testing.assert_close(out[name], reference[name], **CLOSE)
    torch.testing.assert_close(gradients(loss, out), gradients(loss, reference), **CLOSE)
    torch.testing.assert_close(also_seen["td_error"], seen["td_error"], **CLOSE)
    # α is learned from the policy at s_{t+1} too, and from that at s_t where there is no s_{t+1}.
    assert out["loss_alpha"].isfinite()


def test_exploration_noise_is_left_out_of_the_policy():
    class Exploring(LocScale):
        def forward(self, observation, noise):
            loc, scale = super().forward(observation)
            return loc + noise.unsqueeze(-1), scale

    def make(**options):
        actor = stochastic_actor()
        actor[0] = TensorDictModule(Exploring(), ["observation", "_eps_gSDE"], ["loc", "scale"])
        actor = type(actor)(*actor)
        return REDQLoss(actor, qvalue_network(), target_entropy=-2.0, num_qvalue_nets=NETS, **options)

    loss, plain = make(gSDE=True), redq()
    plain.load_state_dict(loss.state_dict())
    data = continuous()
    expected, _ = run(plain, data)
    torch.testing.assert_close(run(loss, data)[0].to_dict(), expected.to_dict(), **CLOSE)
    noisy = data.clone()
    noisy["_eps_gSDE"] = noisy["next", "_eps_gSDE"] = torch.ones(data.shape, **DOUBLE)
    out, seen = run(loss, noisy)
    torch.testing.assert_close(out.to_dict(), expected.to_dict(), **CLOSE)
    assert seen["_eps_gSDE"].all()
    assert seen["next", "_eps_gSDE"].all()


def test_a_state_without_target_entropy_keeps_the_one_there_is():
    loss = redq(target_entropy=-3.0)
    state = redq().state_dict()
    del state["target_entropy_buffer"]
    loss.load_state_dict(state)
    assert loss.target_entropy == -3.0


def test_the_bounds_of_alpha_can_be_left_out():
    loss, data = made("redq", min_alpha=None, max_alpha=None, alpha_init=100.0)
    assert run(loss, data)[0]["alpha"].item() == pytest.approx(100.0)
    assert not any("min_log_alpha" in key for key in loss.state_dict())
