"""The symmetric logarithm, two-hot regression and the divergences of discrete latents, against what the papers say."""

import math

import pytest
import torch
from fusedrl.losses.functional.categorical_kl import (
    balanced_divergence,
    categorical_kl_balanced,
    categorical_kl_terms,
    divergence_terms,
)
from fusedrl.losses.functional.discrete_regression import (
    symexp,
    symexp_bins,
    symlog,
    two_hot_cross_entropy,
    two_hot_decode,
    two_hot_encode,
)
from torch.distributions import Categorical, kl_divergence

# A few roundings of the dtype; half of the mantissa's digits would be a mistake in the formula.
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-2},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE)
DOUBLE = {"dtype": torch.float64}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def two_hot_by_hand(x, bins):
    """The definition, for one number at a time."""
    weights = torch.zeros(len(bins), **DOUBLE)
    x = min(max(x, bins[0].item()), bins[-1].item())
    k = max(i for i in range(len(bins) - 1) if bins[i] <= x)
    weights[k + 1] = (x - bins[k]) / (bins[k + 1] - bins[k])
    weights[k] = 1 - weights[k + 1]
    return weights


# --- symlog and symexp ------------------------------------------------------------------------------------------


def test_symlog_is_the_signed_logarithm():
    x = torch.tensor([-1e6, -1.0, -1e-8, 0.0, 1e-8, 1.0, 1e6], **DOUBLE)
    expected = [math.copysign(math.log1p(abs(v)), v) for v in x.tolist()]
    torch.testing.assert_close(symlog(x), torch.tensor(expected, **DOUBLE), **TOLERANCE[torch.float64])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_symexp_undoes_symlog(dtype):
    x = torch.tensor([-1e4, -3.0, -1e-3, 0.0, 1e-3, 3.0, 1e4], dtype=dtype)
    torch.testing.assert_close(symexp(symlog(x)), x, **TOLERANCE[dtype])


@pytest.mark.parametrize("function", [symlog, symexp])
def test_gradient_is_one_at_zero_and_right_elsewhere(function):
    zero = torch.zeros(1, requires_grad=True)
    assert torch.autograd.grad(function(zero), zero)[0] == 1
    x = torch.randn(8, **DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(function, x)


@pytest.mark.parametrize("function", [symlog, symexp])
def test_infinity_stays_infinity(function):
    assert function(torch.tensor([-torch.inf, torch.inf])).tolist() == [-torch.inf, torch.inf]


# --- two-hot ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bins", [symexp_bins(255).double(), torch.tensor([-2.0, -1.5, 0.0, 4.0], **DOUBLE)])
def test_encoding_is_the_definition(bins):
    x = torch.cat([torch.randn(6, **DOUBLE), bins[[0, 1, -2, -1]], torch.tensor([1e12, -1e12, 300.0], **DOUBLE)])
    expected = torch.stack([two_hot_by_hand(v, bins) for v in x.tolist()])
    torch.testing.assert_close(two_hot_encode(x, bins), expected, **TOLERANCE[torch.float64])


@every_dtype
def test_mass_is_one_and_at_most_two_neighbours_have_it(dtype):
    x = (torch.randn(64) * 50).to(dtype)
    weights = two_hot_encode(x, symexp_bins(255))
    assert weights.dtype == dtype
    torch.testing.assert_close(weights.double().sum(-1), torch.ones(64, **DOUBLE), **TOLERANCE[dtype])
    assert (weights >= 0).all()
    used = weights != 0
    first, last = used.int().argmax(-1), 254 - used.flip(-1).int().argmax(-1)
    assert (last - first <= 1).all()


@every_dtype
def test_mass_is_exactly_at_the_end_beyond_the_support_and_on_a_bin(dtype):
    bins = torch.tensor([-2.0, 0.0, 1.0])
    x = torch.tensor([-torch.inf, -7.0, -2.0, 0.0, 1.0, 7.0, torch.inf], dtype=dtype)
    expected = torch.eye(3, dtype=dtype)[[0, 0, 0, 1, 2, 2, 2]]
    assert torch.equal(two_hot_encode(x, bins), expected)


def test_a_number_on_a_bin_moves_the_mean_as_one_between_bins_does():
    bins = torch.tensor([-2.0, -1.5, 0.0, 4.0], **DOUBLE)
    x = torch.tensor([-9.0, -2.0, -1.5, -1.0, 0.0, 3.0, 9.0], **DOUBLE, requires_grad=True)
    (slope,) = torch.autograd.grad((two_hot_encode(x, bins) * bins).sum(), x)
    assert slope.tolist() == [0, 1, 1, 1, 1, 1, 0]


def test_nan_is_not_turned_into_a_number():
    weights = two_hot_encode(torch.tensor([torch.nan, 0.0]), symexp_bins(5))
    assert weights[0].isnan().any()
    assert torch.equal(weights[1], torch.eye(5)[2])
    assert two_hot_cross_entropy(torch.zeros(1, 5), torch.tensor([torch.nan]), symexp_bins(5)).isnan().all()


def test_integers_are_encoded_in_floating_point():
    assert two_hot_encode(torch.tensor([0, 1]), torch.tensor([-1.0, 0.0, 4.0])).tolist() == [[0, 1, 0], [0, 0.75, 0.25]]


@every_dtype
def test_decoding_undoes_encoding(dtype):
    bins = torch.tensor([-4.0, -1.0, 0.0, 2.0, 8.0])
    x = torch.tensor([-3.0, -0.5, 0.0, 1.0, 7.0], dtype=dtype)
    torch.testing.assert_close(two_hot_decode(two_hot_encode(x, bins).log(), bins), x, **TOLERANCE[dtype])


@every_dtype
def test_equal_logits_decode_to_exactly_zero(dtype):
    logits = torch.full((3, 255), 0.3, dtype=dtype)
    assert torch.equal(two_hot_decode(logits, symexp_bins(255)), torch.zeros(3, dtype=dtype))


def test_decoding_is_the_mean_for_any_support():
    logits, bins = torch.randn(4, 7, **DOUBLE), torch.randn(7, **DOUBLE).sort().values
    torch.testing.assert_close(two_hot_decode(logits, bins), (logits.softmax(-1) * bins).sum(-1))


def test_cross_entropy_is_that_of_the_two_bins():
    logits, target, bins = torch.randn(4, 7, **DOUBLE), torch.randn(4, **DOUBLE), symexp_bins(7).double()
    expected = -(torch.stack([two_hot_by_hand(v, bins) for v in target.tolist()]) * logits.log_softmax(-1)).sum(-1)
    for shaped in (target, target.unsqueeze(-1)):
        torch.testing.assert_close(two_hot_cross_entropy(logits, shaped, bins), expected)


def test_cross_entropy_is_least_where_it_decodes_to_the_target():
    bins = symexp_bins(21).double()
    logits = two_hot_encode(torch.tensor([3.0], **DOUBLE), bins).clamp_min(1e-9).log().requires_grad_()
    (gradient,) = torch.autograd.grad(two_hot_cross_entropy(logits, torch.tensor([3.0], **DOUBLE), bins).sum(), logits)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-7)


def test_a_bin_that_is_ruled_out_and_not_needed_has_no_part():
    logits = torch.tensor([[0.0, 0.0, -torch.inf]], requires_grad=True)
    loss = two_hot_cross_entropy(logits, torch.tensor([-0.5]), torch.tensor([-1.0, 0.0, 1.0]))
    torch.testing.assert_close(loss.detach(), torch.tensor([math.log(2)]))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.equal(gradient, torch.zeros(1, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_reaches_as_far_as_the_support(dtype):
    logits = torch.zeros(2, 255, dtype=dtype)
    logits[:, 127] = 60.0
    target = torch.tensor([0.0, 60000.0], dtype=dtype)
    assert two_hot_decode(logits, symexp_bins(255)).isfinite().all()
    assert two_hot_cross_entropy(logits, target, symexp_bins(255)).isfinite().all()


def test_gradients_of_logits_and_target_are_right():
    bins = symexp_bins(9).double() / 1e6
    logits = torch.randn(3, 9, **DOUBLE, requires_grad=True)
    target = torch.randn(3, **DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: two_hot_cross_entropy(a, b, bins), (logits, target))
    assert torch.autograd.gradcheck(lambda a: two_hot_decode(a, bins), logits)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: two_hot_encode(torch.zeros(2), torch.zeros(1)), r"bins .* shape \(1,\)"),
        (lambda: two_hot_encode(torch.zeros(2), torch.zeros(3, 3)), r"bins .* shape \(3, 3\)"),
        (lambda: two_hot_decode(torch.zeros(2, 4), torch.arange(3.0)), r"\(2, 4\).* 3 bins"),
        (lambda: two_hot_decode(torch.zeros(()), torch.arange(3.0)), r"shape \(\).* 3 bins"),
        (lambda: two_hot_cross_entropy(torch.zeros(2, 4), torch.zeros(2), torch.arange(3.0)), r"\(2, 4\).* 3 bins"),
        (lambda: two_hot_cross_entropy(torch.zeros(2, 3), torch.zeros(5), torch.arange(3.0)), r"\(5,\)"),
        (lambda: two_hot_cross_entropy(torch.zeros(4, 2, 3), torch.zeros(2), torch.arange(3.0)), r"\(2,\)"),
        (lambda: symexp_bins(1), "at least 2, but is 1"),
        (lambda: categorical_kl_balanced(torch.zeros(2, 3, 4), torch.zeros(2, 3, 1)), r"\(2, 3, 1\)"),
        (lambda: categorical_kl_terms(torch.zeros(2, 3, 4), torch.zeros(1, 3, 4)), r"\(1, 3, 4\)"),
        (lambda: categorical_kl_terms(torch.zeros(4), torch.zeros(4)), r"\(4,\).* \[\*B, variables, classes\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


# --- divergences of discrete latents ----------------------------------------------------------------------------


def latents(*batch):
    return [torch.randn(*batch, 3, 4, **DOUBLE, requires_grad=True) for _ in range(2)]


def kl_of(posterior, prior):
    return kl_divergence(Categorical(logits=posterior), Categorical(logits=prior))


def test_balanced_divergence_is_the_weighted_sum_of_both_in_value_and_gradients():
    posterior, prior = latents(2, 5)
    expected = (
        0.7 * kl_of(posterior.detach(), prior).clamp_min(0.4) + 0.3 * kl_of(posterior, prior.detach()).clamp_min(0.4)
    ).mean()
    found = categorical_kl_balanced(posterior, prior, alpha=0.7, free_bits=0.4)
    torch.testing.assert_close(found, expected)
    for x in (posterior, prior):
        a, b = (torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in (found, expected))
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("unimix", [0.0, 0.1])
def test_the_two_terms_have_one_value_and_train_one_side_each(unimix):
    posterior, prior = latents(2, 5)
    mix = [((1 - unimix) * x.softmax(-1) + unimix / 4).log() for x in (posterior, prior)]
    expected = kl_of(*mix).sum(-1).clamp_min(0.9).mean()
    terms = categorical_kl_terms(posterior, prior, free_nats=0.9, unimix=unimix)
    for term, trained, constant in zip(terms, (prior, posterior), (posterior, prior), strict=True):
        torch.testing.assert_close(term, expected)
        gradient = torch.autograd.grad(term, (trained, constant), retain_graph=True, allow_unused=True)
        torch.testing.assert_close(gradient[0], torch.autograd.grad(expected, trained, retain_graph=True)[0])
        assert gradient[1] is None


def test_free_nats_belong_to_each_variable_or_to_their_sum():
    posterior, prior = torch.tensor([[[8.0, 0.0], [0.0, 0.0]]]), torch.zeros(1, 2, 2)
    one = kl_of(posterior, prior)[0, 0]
    torch.testing.assert_close(balanced_divergence(posterior, prior, 0.8, 0.5), torch.stack([(one + 0.5) / 2]))
    torch.testing.assert_close(divergence_terms(posterior, prior, 0.5, 0.0)[0], one.reshape(1))


def test_no_gradient_within_the_free_nats():
    posterior, prior = latents(2)
    loss = categorical_kl_balanced(posterior, prior, free_bits=100.0) + sum(
        categorical_kl_terms(posterior, prior, 100.0)
    )
    assert loss == 300
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (posterior, prior)))


def test_a_class_ruled_out_by_both_has_no_part():
    posterior = torch.tensor([[[1.0, 0.0, -torch.inf]]], requires_grad=True)
    prior = torch.tensor([[[0.0, 0.0, -torch.inf]]], requires_grad=True)
    expected = kl_of(posterior.detach()[..., :2], prior.detach()[..., :2]).squeeze()
    losses = [
        categorical_kl_balanced(posterior, prior, free_bits=0.0),
        *categorical_kl_terms(posterior, prior, 0.0, 0.0),
    ]
    for loss in losses:
        torch.testing.assert_close(loss.detach(), expected)
    assert all(g.isfinite().all() for g in torch.autograd.grad(sum(losses), (posterior, prior)))


@every_dtype
def test_the_divergence_keeps_the_dtype(dtype):
    posterior, prior = (x.detach().to(dtype) for x in latents(3))
    expected = kl_of(posterior.double(), prior.double())
    found = categorical_kl_balanced(posterior, prior, free_bits=0.0)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected.mean(), **TOLERANCE[dtype])
    assert all(x.dtype == dtype for x in categorical_kl_terms(posterior, prior))
