"""Networks whose parameters get their shapes from the first data: taken where nothing of them is copied."""

import pytest
import torch
from fusedrl import losses
from helpers_dreamer import actor_model, sequences, value_model
from helpers_dreamer_v3 import Env, continuation_model
from helpers_imitation import demonstrations, demonstrations_and_attempts, single
from helpers_losses import DOUBLE, collect, critic, gaussian_actor
from helpers_q import losses_of, qvalue_network, stochastic_actor, transitions
from tensordict.nn import TensorDictModule
from torch import nn

IMAGINED = {"lambda_target": torch.ones(3, 5, 1, **DOUBLE)}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Scores(nn.Module):
    """A discriminator."""

    def __init__(self):
        super().__init__()
        self.layer = nn.LazyLinear(1)

    def forward(self, observation, action):
        return self.layer(torch.cat([observation, action], -1)).sigmoid()


class LazyGaussian(nn.LazyLinear):
    """Mean and standard deviation of two dimensions; stays what it is once it is initialised."""

    cls_to_become = None

    def forward(self, x):
        loc, log_scale = super().forward(x).chunk(2, -1)
        return loc, log_scale.exp()


def lazy(size, out_key):
    return TensorDictModule(nn.LazyLinear(size, **DOUBLE), ["observation"], [out_key])


def lazy_policy(make):
    policy = make()
    policy[0].module = LazyGaussian(4, **DOUBLE)
    return policy


CASES = {
    "BCLoss": (lambda: losses.BCLoss(lazy(2, "action")), demonstrations),
    "BCLoss of a policy": (lambda: losses.BCLoss(lazy_policy(stochastic_actor)), demonstrations),
    "DTLoss": (lambda: losses.DTLoss(lazy(2, "action")), demonstrations),
    "OnlineDTLoss": (lambda: losses.OnlineDTLoss(lazy_policy(stochastic_actor), target_entropy=-2.0), demonstrations),
    "GAILLoss": (
        lambda: losses.GAILLoss(TensorDictModule(Scores(), ["observation", "action"], ["d_logits"])),
        lambda: single(demonstrations_and_attempts()),
    ),
    "ClipPPOLoss": (
        lambda: losses.ClipPPOLoss(lazy_policy(gaussian_actor), critic()),
        lambda: collect(gaussian_actor()),
    ),
    "A2CLoss": (
        lambda: losses.A2CLoss(lazy_policy(gaussian_actor), lazy(1, "state_value")),
        lambda: collect(gaussian_actor()),
    ),
    "DreamerV3ValueLoss": (
        lambda: losses.DreamerV3ValueLoss(lazy(1, "state_value")),
        lambda: demonstrations().update(IMAGINED),
    ),
}


@pytest.mark.parametrize("change", [lambda loss: loss, lambda loss: loss.to("cpu")], ids=["as it is", "moved"])
@pytest.mark.parametrize("name", CASES)
def test_the_first_call_initialises_what_the_loss_trains(name, change):
    make, data = CASES[name]
    loss, data = change(make()), data()
    assert any(nn.parameter.is_lazy(p) for p in loss.parameters())

    def total():
        return sum(value for key, value in losses_of(loss(data.clone())).items() if key.startswith("loss"))

    first = total()
    first.backward()
    assert all(not nn.parameter.is_lazy(p) and p.grad is not None for p in loss.parameters())
    with torch.no_grad():
        torch.testing.assert_close(total(), first)
        for p in loss.parameters():
            p -= 1e-3 * p.grad
        assert total() < first


def lazy_judge():
    return TensorDictModule(Scores(), ["observation", "action"], ["state_action_value"])


@pytest.mark.parametrize(
    "make",
    [
        lambda: losses.SACLoss(stochastic_actor(), lazy_judge(), target_entropy=-2.0),
        lambda: losses.SACLoss(stochastic_actor(), [lazy_judge(), lazy_judge()], target_entropy=-2.0),
        lambda: losses.SACLoss(stochastic_actor(), [qvalue_network(), lazy_judge()], target_entropy=-2.0),
        lambda: losses.DDPGLoss(lazy(2, "action"), qvalue_network(), delay_actor=True),
        lambda: losses.DreamerV3ValueLoss(lazy(1, "state_value"), slow_critic_regularization=1.0),
    ],
    ids=["ensemble", "list", "one of a list", "target", "slow value"],
)
def test_what_would_be_copied_is_refused_and_the_error_says_what_to_do(make):
    with pytest.raises(RuntimeError, match="call the network once on data before"):
        make()


def imagining(*lazy_ones):
    model, value, continuation = Env(), value_model(), continuation_model()
    networks = {"reward": model.reward, "value": value.module, "continuation": continuation.module}
    for name in lazy_ones:
        networks[name][0] = nn.LazyLinear(networks[name][0].out_features, **DOUBLE)
    return losses.DreamerV3ActorLoss(actor_model(), value, model, continuation_model=continuation)


@pytest.mark.parametrize("name", ["reward", "value", "continuation"])
def test_what_imagination_holds_constant_is_refused_likewise(name):
    data = sequences((3,)).select("state", "belief")
    assert imagining()(data)[0]["loss_actor"].isfinite()
    with pytest.raises(RuntimeError, match="call the network once on data before"):
        imagining(name)(data)


def test_a_lazy_network_that_was_called_once_is_like_any_other():
    judge = lazy_judge().double()
    data = transitions()
    judge(data.clone())
    assert losses.SACLoss(stochastic_actor(), judge, target_entropy=-2.0)(data)["loss_qvalue"].isfinite()
