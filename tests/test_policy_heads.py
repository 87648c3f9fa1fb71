"""Gaussian heads are recognised and give the numbers of their distributions; other distributions stay as they are."""

import copy
from functools import partial

import pytest
import torch
from fusedrl.estimators import heads
from fusedrl.estimators.calls import distribution
from fusedrl.estimators.heads import Deferred, DistributionHeads, built, diagonal_gaussian, log_prob
from fusedrl.losses import A2CLoss, ClipPPOLoss, CQLLoss, KLPENPPOLoss, REDQLoss, SACLoss
from fusedrl.losses.policy import ActionHeads, divergence, draw, entropy
from helpers_losses import ACTORS, GaussianParameters, collect, critic, diagonal_normal, gaussian_actor
from helpers_q import assert_compiles, qvalue_network, stochastic_actor, transitions
from tensordict import TensorDict
from tensordict.nn import (
    CompositeDistribution,
    InteractionType,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    set_interaction_type,
)
from torch import distributions as D
from torch import nn

torchrl_modules = pytest.importorskip("torchrl.modules")
IndependentNormal, TanhNormal = torchrl_modules.IndependentNormal, torchrl_modules.TanhNormal

LOW, HIGH = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([1.0, 1.0, 3.0])
CLOSE = {torch.float64: {"rtol": 1e-10, "atol": 1e-10}, torch.float32: {"rtol": 1e-5, "atol": 1e-5}}


def tanh_of_normal(loc, scale, **options):
    return D.TransformedDistribution(diagonal_normal(loc, scale), [D.TanhTransform(**options)])


def scaled_tanh(loc, scale):
    transforms = [D.TanhTransform(), D.AffineTransform(0, 2)]
    return D.TransformedDistribution(diagonal_normal(loc, scale), transforms)


def to_bounds_of(dtype):
    return lambda loc, scale: TanhNormal(loc, scale, low=LOW.to(dtype), high=HIGH.to(dtype))


RECOGNISED = {
    "independent": diagonal_normal,
    "tanh": tanh_of_normal,
    "independent_normal": IndependentNormal,
    "tanh_normal": TanhNormal,
    "tanh_normal_unsafe": lambda loc, scale: TanhNormal(loc, scale, safe_tanh=False),
    "tanh_normal_tanh_loc": lambda loc, scale: TanhNormal(loc, scale, tanh_loc=True),
    "tanh_normal_numbers": lambda loc, scale: TanhNormal(loc, scale, low=-2.0, high=3.0),
    "tanh_normal_integers": lambda loc, scale: TanhNormal(loc, scale, low=-2, high=3),
    "tanh_normal_tensors": lambda loc, scale: to_bounds_of(loc.dtype)(loc, scale),
    "tanh_normal_unsafe_tensors": lambda loc, scale: TanhNormal(
        loc, scale, low=LOW.to(loc.dtype), high=HIGH.to(loc.dtype), safe_tanh=False
    ),
}
recognised = pytest.mark.parametrize("name", RECOGNISED)


class OwnLogProb(D.Independent):
    def log_prob(self, value):
        return super().log_prob(value) + 1


class OwnTanhNormal(TanhNormal):
    def log_prob(self, value):
        return super().log_prob(value) + 1


class OwnNormal(D.Normal):
    def log_prob(self, value):
        return super().log_prob(value) + 1


def own_transform(loc, scale):
    class Own(D.TanhTransform):
        def log_abs_det_jacobian(self, x, y):
            return super().log_abs_det_jacobian(x, y) + 1

    return D.TransformedDistribution(diagonal_normal(loc, scale), [Own()])


def trained_bounds(loc, scale):
    return TanhNormal(loc, scale, low=LOW.to(loc.dtype).requires_grad_(), high=HIGH.to(loc.dtype))


def wider_bounds(loc, scale):
    """The distribution's actions are of their dtype."""
    return TanhNormal(loc.float(), scale.float(), low=LOW.double(), high=HIGH.double())


OTHER = {
    "subclass": lambda loc, scale: OwnLogProb(D.Normal(loc, scale), 1),
    "subclass_of_tanh_normal": OwnTanhNormal,
    "subclass_of_normal": lambda loc, scale: D.Independent(OwnNormal(loc, scale), 1),
    "own_transform": own_transform,
    "cached": lambda loc, scale: tanh_of_normal(loc, scale, cache_size=1),
    "two_transforms": scaled_tanh,
    "sigmoid": lambda loc, scale: D.TransformedDistribution(diagonal_normal(loc, scale), [D.SigmoidTransform()]),
    "validating": lambda loc, scale: D.Independent(D.Normal(loc, scale), 1, validate_args=True),
    "no_event": D.Normal,
    "two_event_dimensions": lambda loc, scale: D.Independent(D.Normal(loc, scale), 2),
    "tanh_normal_no_event": lambda loc, scale: TanhNormal(loc, scale, event_dims=0),
    "tanh_normal_two_event_dimensions": lambda loc, scale: TanhNormal(loc, scale, event_dims=2),
    "trained_bounds": trained_bounds,
    "wider_bounds": wider_bounds,
    "laplace": lambda loc, scale: D.Independent(D.Laplace(loc, scale), 1),
    "mixed_dtypes": lambda loc, scale: diagonal_normal(loc.float(), scale),
}


def parameters(batch=(64,), dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    loc, log_scale = torch.randn(2, *batch, 3, generator=generator, dtype=torch.float64).unbind(0)
    return [x.to(dtype).requires_grad_() for x in (loc / 2, (log_scale / 2 - 1).exp())]


def tolerance_of(name, dtype):
    # TorchRL keeps bounds that are numbers in float32, and takes the logarithm of their width in it.
    rounded = dtype == torch.float64 and name in ("tanh_normal_numbers", "tanh_normal_integers")
    return {"rtol": 1e-6, "atol": 1e-6} if rounded else CLOSE[dtype]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# --- policies whose distribution isn't built --------------------------------------------------------------------


def bounded(**bounds):
    return {key: torch.tensor(x, dtype=torch.float64) for key, x in bounds.items()}


# Distribution and the arguments that a policy gives it beside loc and scale.
DEFERRED = {
    "tanh_normal": (TanhNormal, {}),
    "tanh_normal_numbers": (TanhNormal, {"low": -2, "high": 3.0}),
    "tanh_normal_tensors": (TanhNormal, bounded(low=[-1.0, -2.0], high=[1.0, 0.5])),
    "independent_normal": (IndependentNormal, {}),
}
BUILT = {
    "subclass": (OwnTanhNormal, {}),
    "another_argument": (TanhNormal, {"tanh_loc": True}),
    "one_bound_a_tensor": (TanhNormal, bounded(low=-1.0)),
    "trained_bounds": (TanhNormal, {"low": torch.tensor(-2.0, requires_grad=True), "high": torch.tensor(1.0)}),
    "independent_normal_with_an_argument": (IndependentNormal, {"tanh_loc": True}),
    "of_torch": (diagonal_normal, {}),
}


def policy_of(name, **options):
    kind, arguments = (DEFERRED | BUILT)[name]
    return ProbabilisticTensorDictSequential(
        TensorDictModule(GaussianParameters(), ["observation"], ["loc", "scale"]),
        ProbabilisticTensorDictModule(
            ["loc", "scale"], ["action"], distribution_class=kind, distribution_kwargs=arguments, **options
        ),
    )


def of_policy(policy, data):
    with set_interaction_type(InteractionType.RANDOM):
        return distribution(policy, data)


def observations():
    return TensorDict({"observation": torch.randn(64, 4, dtype=torch.float64)}, [64])


@pytest.mark.parametrize("name", DEFERRED)
def test_what_is_asked_of_a_deferred_distribution_is_what_the_built_one_says(name):
    policy, data = policy_of(name), observations()
    action = policy.get_dist(data.copy()).rsample().detach()
    results = []
    for dist in (policy.get_dist(data.copy()), of_policy(policy, data)):
        torch.manual_seed(1)
        drawn, found = draw(dist)
        values = (log_prob(dist, action), drawn, found, entropy(dist, 2), entropy(dist, 1))
        results.append((*values, *torch.autograd.grad(sum(x.sum() for x in values), list(policy.parameters()))))
    assert type(dist) is Deferred
    assert "built" not in vars(dist)
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", DEFERRED)
def test_the_divergence_of_deferred_distributions_is_that_of_the_built_ones(name):
    policy, data, before = policy_of(name), observations(), observations()
    results = []
    for of in (lambda data: policy.get_dist(data.copy()), partial(of_policy, policy)):
        found = divergence(of(before), of(data), samples=1)
        results.append((found, *torch.autograd.grad(found.sum(), list(policy.parameters()))))
    assert (results[1][0] > 0).all()
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)


def test_the_divergence_of_policies_with_other_bounds_is_estimated():
    """They are of two modules, whose actions needn't be alike."""
    data = observations()
    old, new = (of_policy(policy_of(name), data) for name in ("tanh_normal", "tanh_normal_numbers"))
    found, expected = [], []
    for results, pair in ((found, (old, new)), (expected, (built(old), built(new)))):
        torch.manual_seed(3)
        results.append(divergence(*pair, samples=5))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", DEFERRED)
def test_a_deferred_distribution_has_all_attributes_of_the_built_one(name):
    policy, data = policy_of(name), observations()
    dist, own = of_policy(policy, data), policy.get_dist(data.copy())
    assert (dist.has_rsample, dist.batch_shape, dist.event_shape) == (True, own.batch_shape, own.event_shape)
    assert "built" not in vars(dist)
    assert type(built(dist)) is type(own)
    assert built(dist) is dist.built
    assert built(own) is own
    torch.testing.assert_close(dist.deterministic_sample, own.deterministic_sample)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = dist.no_such_thing


@pytest.mark.parametrize("name", BUILT)
def test_a_distribution_that_is_not_known_entirely_is_built(name):
    policy, data = policy_of(name), observations()
    dist, own = of_policy(policy, data), policy.get_dist(data.copy())
    assert type(dist) is type(own)
    action = own.rsample().detach()
    torch.testing.assert_close(log_prob(dist, action), own.log_prob(action), rtol=1e-6, atol=1e-6)


class OneScaleForAll(GaussianParameters):
    def forward(self, x):
        loc, scale = super().forward(x)
        return loc, scale[:1]


def test_parameters_that_a_distribution_broadcasts_are_left_to_it():
    policy, data = policy_of("tanh_normal"), observations()
    policy.module[0].module = OneScaleForAll()
    assert type(of_policy(policy, data)) is TanhNormal


def test_bounds_the_wrong_way_round_are_still_refused():
    policy = policy_of("tanh_normal_numbers")
    policy.module[-1].distribution_kwargs = {"low": 1.0, "high": -1.0}
    with pytest.raises(RuntimeError, match="strictly greater"):
        of_policy(policy, observations())


@pytest.mark.parametrize("name", DEFERRED)
@pytest.mark.parametrize("loss_class", [A2CLoss, ClipPPOLoss, KLPENPPOLoss])
def test_a_loss_builds_no_distribution_and_has_the_numbers_that_it_would_have(name, loss_class, monkeypatch):
    """To build one would wait for the device: TorchRL reads the bounds."""
    actor = policy_of(name, return_log_prob=True, default_interaction_type=InteractionType.RANDOM)
    data = collect(actor)
    value = critic()

    def run():
        torch.manual_seed(2)
        loss = loss_class(actor, value)  # a new one: the β of KLPENPPOLoss adapts
        found = loss(data.copy())
        total = sum(x for key, x in found.items() if key.startswith("loss_"))
        return found.detach().to_dict(), torch.autograd.grad(total, list(loss.parameters()))

    monkeypatch.setattr(heads, "_gaussian_of", lambda *_: None)
    expected = run()
    monkeypatch.undo()

    def refuse(*_, **__):
        raise AssertionError("a distribution was built")

    kind = DEFERRED[name][0]
    monkeypatch.setattr(kind, "__init__", refuse)
    torch.testing.assert_close(run(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("loss_class", [SACLoss, REDQLoss, CQLLoss])
def test_a_soft_actor_critic_builds_no_distribution(loss_class, monkeypatch):
    loss = loss_class(stochastic_actor(TanhNormal), qvalue_network(), target_entropy=-2.0)

    def refuse(*_, **__):
        raise AssertionError("a distribution was built")

    monkeypatch.setattr(TanhNormal, "__init__", refuse)
    assert all(x.isfinite().all() for x in loss(transitions()).values())


# --- recognised -----------------------------------------------------------------------------------------------------


@recognised
def test_a_gaussian_is_recognised(name):
    dist = RECOGNISED[name](*parameters())
    found = diagonal_gaussian(dist)
    root = dist
    while hasattr(root, "base_dist"):
        root = root.base_dist
    assert found.loc is root.loc
    assert found.scale is root.scale
    if "tensors" in name:  # not read, and not made anew
        assert found.squash[0] is dist.low
        assert found.squash[1] is dist.high


@recognised
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("batch", [(64,), (2, 3)])
def test_log_probabilities_and_gradients_are_the_distributions_own(name, dtype, batch):
    inputs = parameters(batch, dtype)
    action = RECOGNISED[name](*inputs).rsample().detach().requires_grad_()
    results = []
    for of in (lambda dist: dist.log_prob(action), lambda dist: log_prob(dist, action)):
        found = of(RECOGNISED[name](*inputs))
        results.append((found, *torch.autograd.grad(found.square().sum(), (*inputs, action))))
    for own, found in zip(*results, strict=True):
        # Gradients are as large as one over the scale squared; float32 leaves them five digits of that.
        size = own.abs().amax().clamp_min(1).detach()
        torch.testing.assert_close(found / size, own / size, **tolerance_of(name, dtype))


@recognised
@pytest.mark.parametrize("dtype", CLOSE)
def test_draws_are_the_distributions_own_for_a_seed(name, dtype):
    """The next random number too: as many are drawn."""
    inputs = parameters(dtype=dtype)
    weight = torch.randn(64, 3, dtype=dtype)

    def own(dist):
        action = dist.rsample()
        return action, dist.log_prob(action)

    results = []
    for drawn_from in (own, draw):
        torch.manual_seed(1)
        action, found = drawn_from(RECOGNISED[name](*inputs))
        following = torch.rand(())
        gradients = torch.autograd.grad((weight * action).sum() + 0.1 * found.square().sum(), inputs)
        results.append((action, found, *gradients, following))
    assert torch.equal(results[0][-1], results[1][-1])
    for theirs, ours in zip(*results, strict=True):
        size = theirs.abs().amax().clamp_min(1).detach()
        tolerance = tolerance_of(name, dtype)
        if dtype == torch.float32:  # their inverse of tanh loses digits towards the bounds, ours isn't taken
            tolerance = {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(ours / size, theirs / size, **tolerance)


@recognised
@pytest.mark.parametrize("samples", [1, 3])
def test_entropies_are_closed_or_the_mean_over_the_distributions_own_draws(name, samples):
    inputs = parameters()
    results = []
    for ours in (False, True):
        torch.manual_seed(1)
        dist = RECOGNISED[name](*inputs)
        if ours:
            found = entropy(dist, samples)
        elif isinstance(dist, D.TransformedDistribution):
            found = -dist.log_prob(dist.rsample((samples,))).mean(0)
        else:
            found = dist.entropy()
        results.append((found, *torch.autograd.grad(found.square().sum(), inputs, materialize_grads=True)))
    for own, found in zip(*results, strict=True):
        torch.testing.assert_close(found, own, **tolerance_of(name, torch.float64) | {"atol": 1e-6})


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("name", ["tanh_normal", "tanh_normal_tensors"])
def test_actions_at_the_bounds_are_clamped_as_tanh_normal_clamps_them(name, dtype):
    """Values and gradients, of which there the least digit of float64 decides the first or second."""
    inputs = parameters((1,), dtype)
    low, high = (-torch.ones(3), torch.ones(3)) if name == "tanh_normal" else (LOW, HIGH)
    results = []
    action = torch.stack([low, high, low - 1, high - 1e-9]).to(dtype).requires_grad_()
    inputs = [x.detach().expand(4, 3).clone().requires_grad_() for x in inputs]
    for of in (lambda dist: dist.log_prob(action), lambda dist: log_prob(dist, action)):
        found = of(RECOGNISED[name](*inputs))
        results.append((found, *torch.autograd.grad(found.sum(), (*inputs, action))))
    for own, found in zip(*results, strict=True):
        assert found.isfinite().all()
        torch.testing.assert_close(found, own, rtol=1e-3, atol=0)


def test_at_the_bounds_an_unsafe_tanh_is_finite_and_elsewhere_not_clamped():
    """TorchRL's and PyTorch's are infinite there; 1 − 3·10⁻⁷ lies inside of the margin of the safe one."""
    loc, scale = parameters((1,), torch.float32)
    inside = torch.full((1, 3), 1 - 3e-7)
    for name in ("tanh", "tanh_normal_unsafe"):
        dist = RECOGNISED[name](loc, scale)
        torch.testing.assert_close(log_prob(dist, inside), dist.log_prob(inside), rtol=1e-4, atol=0)
        assert log_prob(dist, torch.ones(1, 3)).isfinite().all()
        assert not dist.log_prob(torch.ones(1, 3)).isfinite().all()


@recognised
def test_a_recognised_distribution_is_not_asked(name, monkeypatch):
    dist = RECOGNISED[name](*parameters())
    action = dist.rsample()
    for cls in type(dist).__mro__:
        for method in ("log_prob", "rsample"):
            if method in vars(cls):
                monkeypatch.setattr(cls, method, None)
    log_prob(dist, action)
    draw(dist)


@pytest.mark.parametrize("value", [torch.zeros(7, 64, 3), torch.zeros(64, 3).long()])
def test_actions_of_another_shape_or_kind_are_the_distributions_own_matter(value):
    dist = diagonal_normal(*parameters())
    torch.testing.assert_close(log_prob(dist, value), dist.log_prob(value))


# --- others -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OTHER)
def test_other_distributions_keep_their_own_methods(name):
    dist = OTHER[name](*parameters())
    assert diagonal_gaussian(dist) is None
    torch.manual_seed(1)
    action = dist.rsample()
    own = dist.log_prob(action)
    torch.manual_seed(1)
    drawn, found = draw(OTHER[name](*parameters()))
    assert torch.equal(drawn, action)
    assert torch.equal(found, own)
    assert torch.equal(log_prob(dist, action), own)


def test_torchrl_is_told_by_name_and_module():
    class TanhNormal(D.TransformedDistribution):  # somebody's own
        pass

    loc, scale = parameters()
    assert diagonal_gaussian(TanhNormal(diagonal_normal(loc, scale), [D.TanhTransform()])) is None


# --- heads ------------------------------------------------------------------------------------------------------------


def composite(loc, scale):
    heads = {"a": {"loc": loc, "scale": scale}, "b": {"loc": 2 * loc, "scale": scale}}
    return CompositeDistribution(
        TensorDict(heads, loc.shape[:-1]),
        distribution_map={"a": TanhNormal, "b": diagonal_normal},
        name_map={"a": ("car", "a"), "b": ("car", "b")},
    )


def test_a_drawn_action_has_the_log_probability_that_comes_with_it():
    heads = ActionHeads(TanhNormal(*parameters()), "action", 1)
    actions, found = heads.draw()
    assert list(actions) == ["action"]
    assert found.shape == (64, 1)
    torch.testing.assert_close(heads.log_prob(actions), found, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(heads.log_prob(TensorDict(actions, [64])), found, rtol=1e-9, atol=1e-9)


def test_several_heads_are_drawn_and_add_up():
    heads = ActionHeads(composite(*parameters()), "unused", 1)
    torch.manual_seed(1)
    actions, found = heads.draw()
    assert list(actions) == [("car", "a"), ("car", "b")]
    torch.manual_seed(1)
    own = {key: head.rsample() for key, head in heads.heads.items()}
    torch.testing.assert_close(actions, own, rtol=1e-12, atol=1e-12)
    expected = sum(head.log_prob(own[key]) for key, head in heads.heads.items())
    torch.testing.assert_close(found[:, 0], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(heads.log_prob(actions), found, rtol=1e-9, atol=1e-9)


def test_dimensions_that_the_samples_do_not_have_add_up():
    """A team of five with one reward."""
    dist = composite(*parameters((64, 5)))
    heads = ActionHeads(dist, "unused", 1)
    actions, found = heads.draw()
    assert found.shape == (64, 1)
    assert actions["car", "a"].shape == (64, 5, 3)
    torch.testing.assert_close(heads.log_prob(actions), found, rtol=1e-9, atol=1e-9)


def test_the_only_part_is_the_total():
    heads = DistributionHeads(diagonal_normal(*parameters()), "action", 1)
    part = torch.randn(64, 1)
    assert heads.total([part]) is part


# --- in the losses ----------------------------------------------------------------------------------------------------


def tanh_normal(loc, scale):
    return TanhNormal(loc, scale, low=-2.0, high=2.0)


@pytest.mark.parametrize("distribution", [TanhNormal, tanh_normal, tanh_of_normal, diagonal_normal])
def test_losses_compile_whole_and_give_the_eager_numbers(distribution):
    actor = gaussian_actor(distribution)
    data = collect(actor)
    # While compiling, TanhNormal takes every bound for one that stretches, and computes with it in float32.
    assert_compiles(lambda: A2CLoss(copy.deepcopy(actor), critic()), data, rtol=1e-6, atol=1e-7)


def test_a_soft_actor_critic_compiles_whole_and_gives_the_eager_numbers():
    make = partial(SACLoss, stochastic_actor(TanhNormal), qvalue_network(), target_entropy=-2.0)
    assert_compiles(make, transitions(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("distribution", [TanhNormal, tanh_normal, tanh_of_normal, diagonal_normal])
def test_draws_and_entropies_compile_whole(distribution):
    actor = stochastic_actor(distribution)
    data = transitions()

    def objective(data):
        dist = actor.get_dist(data.copy())
        heads = ActionHeads(dist, "action", data.ndim)
        actions, found = heads.draw()
        (entropy,) = heads.entropies(2).values()
        return (actions["action"].square().sum(-1, keepdim=True) + found + heads.log_prob(data) - entropy).mean()

    results = []
    for function in (objective, torch.compile(objective, fullgraph=True, backend="aot_eager")):
        torch._dynamo.reset()
        torch.manual_seed(1)
        value = function(data)
        results.append((value, *torch.autograd.grad(value, list(actor.parameters()))))
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ACTORS)
def test_every_kind_of_policy_is_judged_as_its_distribution_does(name):
    actor = ACTORS[name]()
    data = collect(actor)
    dist = actor.get_dist(data.copy())
    heads = ActionHeads(dist, "action", data.ndim)
    expected = sum(head.log_prob(data[key]) for key, head in heads.heads.items())
    torch.testing.assert_close(heads.log_prob(data)[..., 0], expected, rtol=1e-12, atol=1e-12)


def test_a_policy_trained_by_the_density_of_its_actions_comes_to_them():
    """Maximum likelihood of actions that a squashed Gaussian drew: loc and scale are found again."""
    drawn, _ = draw(TanhNormal(torch.full((4096, 1), 0.5), torch.full((4096, 1), 0.7)))
    loc, log_scale = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.Adam([loc, log_scale], lr=0.05)
    for _ in range(150):
        dist = TanhNormal(loc.expand_as(drawn), log_scale.exp().expand_as(drawn))
        loss = -ActionHeads(dist, "action", 1).log_prob({"action": drawn}).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loc.item() == pytest.approx(0.5, abs=0.05)
    assert log_scale.exp().item() == pytest.approx(0.7, abs=0.05)


@pytest.mark.parametrize("shape", [(4,), (4, 1, 1), (1,)], ids=str)
@pytest.mark.parametrize("of", [D.Normal, lambda *x: D.Independent(D.Normal(*x), 1)], ids=["plain", "independent"])
def test_an_action_that_a_distribution_would_broadcast_is_refused(of, shape):
    loc = torch.zeros(4, 1)
    with pytest.raises(RuntimeError, match=r"'steer' has shape .*of actions of shape \(4, 1\)"):
        heads.log_prob(of(loc, torch.ones(4, 1)), torch.zeros(shape), "steer")
    assert heads.log_prob(of(loc, torch.ones(4, 1)), torch.zeros(3, 4, 1)).shape[:2] == (3, 4)


def test_what_belongs_to_the_dimensions_of_a_head_adds_up():
    parameters = TensorDict({"move": {"loc": torch.zeros(5, 3, 2), "scale": torch.ones(5, 3, 2)}}, [5])
    dist = CompositeDistribution(parameters, distribution_map={"move": D.Normal})
    action = torch.randn(5, 3, 2)
    found = DistributionHeads(dist, "move", 1).log_prob({"move": action})
    torch.testing.assert_close(found, D.Normal(0.0, 1.0).log_prob(action).sum((1, 2)).unsqueeze(-1))
