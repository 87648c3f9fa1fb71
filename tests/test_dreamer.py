"""Dreamer's losses: returns through the scan, padding and ends left out, vectors seen, calls with tensors, refusals.

The values are those of test_parity_dreamer.py, or computed here by the reference loop.
"""

import copy
import pickle

import pytest
import torch
from fusedrl.kernels import use_backend
from fusedrl.losses import ValueEstimators
from fusedrl.losses.dreamer import DreamerActorLoss, DreamerModelLoss, DreamerValueLoss
from helpers_dreamer import (
    BACKENDS,
    BELIEF,
    DOUBLE,
    Imagination,
    actor_model,
    imagined,
    sequences,
    value_model,
    world_model,
)
from helpers_q import CLOSE, NoHostSync
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

GAMMA, LMBDA, HORIZON = 0.9, 0.8, 4
LOSSES = ["model", "actor", "value"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def states(batch=(5,)):
    return sequences(batch).select("state", "belief")


def model_loss(**options):
    return DreamerModelLoss(world_model(), **{"free_nats": 0.5, **options})


def actor_loss(env=None, value_type="TDLambda", lmbda=True, **options):
    env = Imagination() if env is None else env
    loss = DreamerActorLoss(actor_model(), value_model(), env, **{"imagination_horizon": HORIZON, **options})
    return loss.make_value_estimator(value_type, gamma=GAMMA, **({"lmbda": LMBDA} if lmbda else {}))


def value_loss(**options):
    return DreamerValueLoss(value_model(), **options)


def made(name, **options):
    """A loss and what it reads."""
    make, data = {
        "model": (model_loss, sequences),
        "actor": (actor_loss, states),
        "value": (value_loss, imagined),
    }[name]
    return make(**options), data()


def run(loss, data):
    torch.manual_seed(1)  # the imagination draws
    return loss(data)


def gradients(loss, losses):
    """Of each loss with respect to each parameter of the module."""
    names, parameters = zip(*loss.named_parameters(), strict=True)
    return {
        key: dict(
            zip(
                names,
                torch.autograd.grad(x.sum(), parameters, retain_graph=True, allow_unused=True, materialize_grads=True),
                strict=True,
            )
        )
        for key, x in losses.items()
    }


def assert_same(loss, losses, other, others):
    torch.testing.assert_close(losses.to_dict(), others.to_dict(), **CLOSE)
    torch.testing.assert_close(gradients(loss, losses), gradients(other, others), **CLOSE)


# --- λ-returns ----------------------------------------------------------------------------------------------------


def looped_returns(imagined, value, lmbda):
    """The returns by the definition (Hafner et al. 2020, equation 6), last step first."""
    reward, following = imagined["next", "reward"], imagined["next"]
    next_value = value(following.select("state", "belief").clone())["state_value"]
    returns, after = [], next_value[:, -1]
    for t in reversed(range(reward.shape[1])):
        after = reward[:, t] + GAMMA * ((1 - lmbda) * next_value[:, t] + lmbda * after)
        returns.insert(0, after)
    return torch.stack(returns, 1)


def objective_by_loop(loss, data, lmbda):
    """The actor's loss and its gradient by plain autograd through model, value and loop."""
    torch.manual_seed(1)
    trajectories = loss.model_based_env.rollout(HORIZON, loss.actor_model, auto_reset=False, tensordict=data)
    returns = looped_returns(trajectories, loss.value_model, lmbda)
    discount = GAMMA ** torch.arange(HORIZON, **DOUBLE).unsqueeze(-1)
    value = -(returns * discount).sum((-2, -1)).mean()
    return value, returns, torch.autograd.grad(value, list(loss.actor_model.parameters()))


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize(("value_type", "lmbda"), [("TD0", 0.0), ("TD1", 1.0), ("TDLambda", LMBDA)])
def test_the_policy_gets_the_gradient_of_the_returns_through_the_scan(value_type, lmbda, which):
    loss, data = actor_loss(value_type=value_type, lmbda=value_type == "TDLambda"), states()
    wanted, returns, wanted_gradient = objective_by_loop(loss, data, lmbda)
    with use_backend(which):
        losses, trajectories = run(loss, data)
        gradient = torch.autograd.grad(losses["loss_actor"], list(loss.actor_model.parameters()))
    torch.testing.assert_close(losses["loss_actor"], wanted, **CLOSE)
    torch.testing.assert_close(trajectories["lambda_target"], returns.detach(), **CLOSE)
    torch.testing.assert_close(gradient, wanted_gradient, **CLOSE)
    assert all(g.abs().sum() > 0 for g in gradient)


def test_by_default_returns_look_further_than_one_step():
    loss = DreamerActorLoss(actor_model(), value_model(), Imagination(), imagination_horizon=HORIZON)
    trajectories = run(loss, states())[1]
    with torch.no_grad():
        next_value = loss.value_model(trajectories["next"].select("state", "belief"))["state_value"]
    one_step = trajectories["next", "reward"] + 0.99 * next_value
    same = (trajectories["lambda_target"] - one_step).abs() < 1e-9
    assert same[:, -1].all()
    assert not same[:, :-1].any()


def test_model_and_value_are_constants_to_the_policy():
    loss = actor_loss()
    run(loss, states())[0]["loss_actor"].backward()
    assert all(p.grad is not None for p in loss.actor_model.parameters())
    assert all(
        p.grad is None and p.requires_grad for p in (*loss.model_based_env.parameters(), *loss.value_model.parameters())
    )


def test_an_error_in_the_imagination_leaves_the_networks_their_parameters():
    loss = actor_loss()
    loss.actor_model.module[0].module.forward = None
    with pytest.raises(TypeError):
        loss(states())
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in loss.model_based_env.parameters())
    assert len(list(loss.model_based_env.parameters())) > 0


def test_what_follows_an_imagined_end_reaches_neither_returns_nor_gradients():
    end = 1
    loss, data = actor_loss(Imagination(end)), states()
    losses, trajectories = run(loss, data)
    reward = trajectories["next", "reward"]
    torch.testing.assert_close(trajectories["lambda_target"][:, end], reward[:, end], **CLOSE)
    for poison in (float("nan"), float("inf")):
        other = copy.deepcopy(loss)
        other.model_based_env.afterwards = poison
        assert_same(other, run(other, data)[0], loss, losses)


@pytest.mark.parametrize("missing", ["done", "terminated"])
def test_of_done_and_terminated_one_is_enough(missing):
    class OfOne(Imagination):
        def rollout(self, *args, **kwargs):
            return super().rollout(*args, **kwargs).exclude(("next", missing))

    data = states()
    losses = [actor_loss(kind(end=1)) for kind in (Imagination, OfOne)]
    if missing == "done":  # then the end of the environment is that of the trajectory
        losses[1].load_state_dict(losses[0].state_dict())
        losses[1].value_model.load_state_dict(losses[0].value_model.state_dict())
        torch.testing.assert_close(run(losses[1], data)[1]["lambda_target"], run(losses[0], data)[1]["lambda_target"])
    else:
        assert run(losses[1], data)[1]["lambda_target"].isfinite().all()


def test_a_discount_of_0_weighs_the_first_step_alone():
    loss, data = actor_loss(), states()
    loss.make_value_estimator("TDLambda", gamma=0.0)
    losses, trajectories = run(loss, data)
    torch.testing.assert_close(losses["loss_actor"], -trajectories["next", "reward"][:, 0].mean(), **CLOSE)


def test_a_discount_of_each_step_is_multiplied_up():
    gamma = torch.tensor([0.5, 0.8, 0.9, 1.0], **DOUBLE).unsqueeze(-1)
    loss, data = actor_loss(), states()
    loss.make_value_estimator("TDLambda", gamma=gamma)
    losses, trajectories = run(loss, data)
    weight = torch.tensor([1.0, 0.5, 0.4, 0.36], **DOUBLE).unsqueeze(-1)
    torch.testing.assert_close(
        losses["loss_actor"], -(weight * trajectories["lambda_target"]).sum((1, 2)).mean(), **CLOSE
    )


def test_several_batch_dimensions_imagine_as_one_does():
    loss, data = actor_loss(), states((2, 3))
    data.names = [None, "time"]  # which is not the time of the imagination
    losses, trajectories = run(loss, data)
    flat_losses, flat = run(loss, data.reshape(-1))
    assert trajectories.batch_size == (2, 3, HORIZON)
    torch.testing.assert_close(losses.to_dict(), flat_losses.to_dict(), **CLOSE)
    torch.testing.assert_close(trajectories["lambda_target"].flatten(0, 1), flat["lambda_target"], **CLOSE)


# --- the world model ----------------------------------------------------------------------------------------------


def test_a_vector_is_reconstructed_step_by_step():
    loss, data = DreamerModelLoss(world_model(image=(5,))), sequences()
    loss.set_keys(pixels="vector")
    data["next", "vector"] = torch.randn(*data.shape, 5, **DOUBLE)
    losses, found = loss(data)
    error = (found["next", "vector"] - found["next", "reco_pixels"]).square()
    torch.testing.assert_close(losses["loss_model_reco"], error.sum(-1).mean().view(1), **CLOSE)


def test_integer_rewards_and_images_are_compared_as_numbers():
    loss, data = model_loss(), sequences()
    data["next", "reward"] = torch.randint(-2, 3, data["next", "reward"].shape)
    in_float = data.clone()
    in_float["next", "reward"] = data["next", "reward"].double()
    assert_same(loss, loss(data)[0], loss, loss(in_float)[0])


def test_half_precision_does_not_overflow_over_an_image():
    class Blank(nn.Module):
        def forward(self, pixels):
            latents = pixels.flatten(-3)[..., :2]
            return (*[latents, torch.ones_like(latents)] * 2, torch.zeros_like(pixels), latents[..., :1])

    names = ("prior_mean", "prior_std", "posterior_mean", "posterior_std", "reco_pixels", "reward")
    loss = DreamerModelLoss(TensorDictModule(Blank(), [("next", "pixels")], [("next", name) for name in names]))
    pixels = torch.full((2, 3, 64, 64), 4.0, dtype=torch.float16)
    data = TensorDict({"next": {"pixels": pixels, "reward": pixels[:, 0, 0, :1]}}, [2])
    # 16 · 12288 is more than float16 holds
    torch.testing.assert_close(loss(data)[0]["loss_model_reco"], torch.tensor([16.0 * 3 * 64 * 64]))


@pytest.mark.parametrize(
    "name", ["prior_mean", "prior_std", "posterior_mean", "posterior_std", "reco_pixels", "reward"]
)
def test_what_the_world_model_does_not_write_is_named(name, monkeypatch):
    model = world_model()
    write = model.forward
    monkeypatch.setattr(model, "forward", lambda data: write(data).exclude(("next", name)))
    with pytest.raises(KeyError, match=rf"DreamerModelLoss needs the entry \('next', '{name}'\).*set_keys\({name}="):
        DreamerModelLoss(model)(sequences())


# --- which steps count --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", [None, "mean", "sum", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_reductions_of_one_loss_for_each_sample(name, reduction):
    loss, data = made(name, reduction=reduction)
    each = copy.deepcopy(loss)
    each.reduction = "none"
    (losses, _), (per_sample, _) = run(loss, data), run(each, data)
    for key, x in per_sample.items():
        assert x.shape == (data.batch_size if name == "model" else data.batch_size[:1])
        wanted = {"none": x, "sum": x.sum()}.get(reduction, x.mean())
        torch.testing.assert_close(losses[key], wanted.reshape(losses[key].shape), **CLOSE)


def padded(data, key, fill=float("nan")):
    """``data`` followed by two rows of padding, and the mask that says so."""
    padding = data[:2].clone().apply_(lambda x: x.fill_(fill))
    whole = torch.cat([data, padding])
    rows = torch.arange(len(whole)) < len(data)
    whole[key] = rows.view(-1, *[1] * (data.ndim - 1)).expand(whole.shape)
    return whole


@pytest.mark.parametrize("key", [("collector", "mask"), "mine"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ["model", "value"])
def test_padded_steps_are_ignored_whatever_they_hold(name, reduction, key):
    loss, data = made(name, reduction=reduction)
    loss.loss_mask_key = "auto" if key != "mine" else key
    assert_same(loss, run(loss, padded(data, key))[0], loss, run(loss, data)[0])


@pytest.mark.parametrize("key", [("collector", "mask"), "mine"])
def test_from_padded_states_nothing_is_imagined_that_counts(key):
    loss, data = made("actor")
    loss.loss_mask_key = "auto" if key != "mine" else key
    losses, trajectories = run(loss, padded(data, key))
    each = copy.deepcopy(loss)
    each.reduction = "none"
    per_start = run(each, padded(data, key))[0]["loss_actor"]
    assert (per_start[len(data) :] == 0).all()
    torch.testing.assert_close(losses["loss_actor"], per_start[: len(data)].mean(), **CLOSE)
    assert all(g.isfinite().all() for g in gradients(loss, losses)["loss_actor"].values())
    # and the value doesn't learn from it either
    learner = value_loss()
    learner.loss_mask_key = loss.loss_mask_key
    assert_same(learner, run(learner, trajectories)[0], learner, run(learner, trajectories[: len(data)])[0])


def test_half_a_trajectory_of_padding_leaves_the_steps_before_it():
    loss, data = made("value", discount_loss=False)
    data["collector", "mask"] = torch.arange(data.shape[1]).expand(data.shape) < 2
    before = data[:, :2].exclude("collector")
    assert_same(loss, run(loss, data)[0], loss, run(loss, before)[0])


# --- how they are called ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_the_input_stays_as_it_is_and_the_data_holds_no_gradient(name):
    loss, data = made(name)
    before = data.clone()
    _, found = run(loss, data)
    assert set(data.keys(True, True)) == set(before.keys(True, True))
    assert (data == before).all()
    assert not any(x.requires_grad for x in found.values(True, True))


@pytest.mark.parametrize("name", LOSSES)
def test_called_with_tensors_a_loss_returns_the_losses_in_order(name):
    loss, data = made(name)
    tensors = {"_".join(k) if isinstance(k, tuple) else k: data[k] for k in loss.in_keys}
    torch.manual_seed(1)
    losses = loss(**tensors)
    losses = losses if isinstance(losses, tuple) else (losses,)
    # without a TensorDict the batch is all that the tensors share, so an average needn't be over the same samples
    assert len(losses) == len(loss.out_keys)
    assert all(isinstance(x, torch.Tensor) and x.requires_grad for x in losses)


def test_called_with_tensors_a_loss_has_room_for_what_a_network_writes_beside_them():
    value, data = value_model(), imagined()
    nested = TensorDictModule(value.module, ["state", ("latent", "belief")], [("latent", "value")])
    loss = DreamerValueLoss(nested)
    loss.set_keys(value=("latent", "value"))
    found = loss(state=data["state"], latent_belief=data["belief"], lambda_target=data["lambda_target"])
    assert torch.equal(found, DreamerValueLoss(value)(data)[0]["loss_value"])


def test_selected_losses_are_all_that_is_returned():
    loss, data = made("model")
    loss.select_out_keys("loss_model_kl", "loss_model_reward")
    losses, found = loss(data)
    assert set(losses.keys()) == {"loss_model_kl", "loss_model_reward"}
    assert "reco_pixels" in found["next"].keys()  # noqa: SIM118  # a TensorDict is no dict
    assert len(loss(**{"_".join(k) if isinstance(k, tuple) else k: data[k] for k in loss.in_keys})) == 2


@pytest.mark.parametrize("name", ["pixels", "reward"])
def test_entries_of_the_model_loss_can_have_other_names(name):
    loss, data = made("model")
    wanted = run(loss, data)[0]
    renamed = copy.deepcopy(loss)
    other = ("deep", name)
    renamed.set_keys(**{name: other})
    data = data.clone()
    data["next", "deep", name] = data["next", name]
    if name == "reward":
        renamed.world_model[1].out_keys = [("next", *other)]
        del data["next", name]
    assert_same(renamed, run(renamed, data)[0], loss, wanted)


@pytest.mark.parametrize("name", LOSSES)
def test_a_missing_entry_is_named_and_nothing_is_changed(name):
    loss, data = made(name)
    for key in loss.in_keys:
        less = data.exclude(key)
        before = less.clone()
        last = key if isinstance(key, str) else key[-1]
        with pytest.raises(KeyError, match=f"{type(loss).__name__}.*{last}"):
            loss(less)
        assert (less == before).all()
        assert set(less.keys(True, True)) == set(before.keys(True, True))


def test_time_that_is_not_in_the_batch_size_is_no_feature_to_be_summed():
    loss, data = made("model")
    data.batch_size = data.batch_size[:1]
    with pytest.raises(RuntimeError, match=r"shape \(3, 4, 1\), but the batch size is \(3,\)"):
        loss(data)


@pytest.mark.parametrize(("name", "key"), [("model", ("next", "reward")), ("value", "lambda_target")])
def test_what_would_broadcast_by_accident_is_refused(name, key):
    loss, data = made(name)
    data[key] = data[key].expand(*data.shape, 3)
    with pytest.raises(RuntimeError, match=r"shape \(3, 4, 1\).*shape \(3, 4, 3\).*must agree"):
        loss(data)


def test_a_value_of_another_shape_than_the_reward_is_refused():
    loss = actor_loss()
    loss.__dict__["value_model"] = TensorDictModule(nn.Linear(BELIEF, 2, **DOUBLE), ["belief"], ["state_value"])
    with pytest.raises(RuntimeError, match=r"state_value.*must agree"):
        loss(states())


@pytest.mark.parametrize("name", ["actor", "value"])
def test_a_value_under_another_name_is_asked_for(name):
    loss, data = made(name)
    loss.value_model.out_keys = ["worth"]
    with pytest.raises(KeyError, match=r"doesn't write 'state_value'.*set_keys\(value="):
        loss(data)
    loss.set_keys(value="worth")
    assert run(loss, data)[0][f"loss_{name}"].isfinite()


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: model_loss(reco_loss="foo"), ValueError, "reco_loss is 'foo'"),
        (lambda: model_loss(reward_loss="foo"), ValueError, "reward_loss is 'foo'"),
        (lambda: value_loss(value_loss="foo"), ValueError, "value_loss is 'foo'"),
        (lambda: model_loss(reduction="foo"), ValueError, "reduction is 'foo'"),
        (lambda: actor_loss(reduction="foo"), ValueError, "reduction is 'foo'"),
        (lambda: value_loss(reduction="foo"), ValueError, "reduction is 'foo'"),
        (lambda: actor_loss(imagination_horizon=0), ValueError, "imagination_horizon must be at least 1, but is 0"),
        (lambda: actor_loss(env=object()), TypeError, "model_based_env must be a module, but is a object"),
        (lambda: actor_loss(gamma=0.9), TypeError, "make_value_estimator"),
        (lambda: model_loss(gamma=0.9), TypeError, "make_value_estimator"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(make, error, says):
    with pytest.raises(error, match=says):
        make()


@pytest.mark.parametrize("name", LOSSES)
def test_an_unknown_key_is_refused(name):
    with pytest.raises(ValueError, match="foo is not a key of"):
        made(name)[0].set_keys(foo="bar")


def test_an_estimator_that_needs_values_of_the_present_is_refused():
    with pytest.raises(NotImplementedError, match=r"TD0.*TDLambda"):
        actor_loss().make_value_estimator(ValueEstimators.GAE)


# --- how they run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_waits_for_the_device(name, monkeypatch):
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)
    loss, data = made(name)
    with NoHostSync():
        losses, _ = loss(data)
        sum(losses.values()).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_keeps_the_discounts(dtype):
    loss = actor_loss().to(dtype)
    for name, value in (("gamma", GAMMA), ("lmbda", LMBDA)):
        buffer = getattr(loss.value_estimator, name)
        torch.testing.assert_close(buffer, torch.tensor(value, **DOUBLE), rtol=0, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_one_summed_backward_is_one_for_each_loss(name):
    loss, data = made(name)
    losses, _ = run(loss, data)
    parameters = list(loss.parameters())
    whole = torch.autograd.grad(
        sum(losses.values()).sum(), parameters, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    each = gradients(loss, losses)
    summed = [sum(g) for g in zip(*(terms.values() for terms in each.values()), strict=True)]
    torch.testing.assert_close(list(whole), summed, **CLOSE)


@pytest.mark.parametrize("name", LOSSES)
def test_it_can_be_pickled(name):
    loss, data = made(name)
    again = pickle.loads(pickle.dumps(loss))
    torch.testing.assert_close(run(again, data)[0].to_dict(), run(loss, data)[0].to_dict(), **CLOSE)


def test_the_value_is_neither_saved_nor_trained_with_the_policy():
    loss = actor_loss()
    assert not any("value_model" in key for key in loss.state_dict())
    assert not {id(p) for p in loss.parameters()} & {id(p) for p in loss.value_model.parameters()}
    saved = {key for key in loss.state_dict() if not key.startswith(("actor_model.", "model_based_env."))}
    assert saved == {"_value_estimator.gamma", "_value_estimator.lmbda"}


class WithNoise(nn.Module):
    """A world model that draws its noise if it isn't given any."""

    def __init__(self, recognition):
        super().__init__()
        self.recognition = recognition

    def forward(self, state, belief, action, pixels, noise=None):
        return self.recognition(state, belief, action, pixels)


def test_a_world_model_may_do_without_some_of_its_inputs():
    model, data = world_model(), sequences()
    recognition = model[0][0]
    expected = DreamerModelLoss(model)(data)[0]
    reads = [*recognition.in_keys, "prior_noise"]
    optional = TensorDictModule(WithNoise(recognition.module), reads, recognition.out_keys)
    loss = DreamerModelLoss(TensorDictSequential(TensorDictSequential(optional, model[0][1]), model[1]))
    torch.testing.assert_close(loss(data)[0].to_dict(), expected.to_dict(), **CLOSE)


def test_a_world_model_may_read_the_reward_of_the_data():
    model, data = world_model(), sequences()
    noted = TensorDictModule(nn.Identity(), [("next", "true_reward")], [("next", "noted")])
    loss = DreamerModelLoss(TensorDictSequential(*model, noted))
    assert ("next", "true_reward") not in loss.in_keys
    torch.testing.assert_close(loss(data)[1]["next", "noted"], data["next", "reward"])


def test_free_nats_are_free_of_the_average_where_that_is_clamped():
    losses, _ = run(model_loss(delayed_clamp=True, free_nats=1000.0, lambda_kl=2.0), sequences())
    assert losses["loss_model_kl"].item() == 2000.0
