"""The categorical loss and its projection: hand-computed cases, backends against the reference, semantics, errors."""

import math

import pytest
import torch
from fusedrl.kernels import VerificationError, categorical, categorical_projection, categorical_q_loss, use_backend
from helpers_categorical import BACKENDS, TOLERANCE, in_float64, problem
from helpers_launches import plan_with
from hypothesis import given, settings
from hypothesis import strategies as st

INF, NAN = math.inf, math.nan


@pytest.fixture(params=BACKENDS)
def any_backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn, the reference included: it too must meet the hand-computed numbers."""
    return request.param


def project(prob, support, reward, backend, device, *, terminated=False, gamma=1.0) -> list[float]:
    m = categorical_projection(
        torch.tensor([prob], dtype=torch.float64, device=device),
        torch.tensor(support, dtype=torch.float64, device=device),
        torch.tensor([reward], dtype=torch.float64, device=device),
        torch.tensor([terminated], device=device),
        gamma,
        backend=backend,
    )
    return m[0].tolist()


# --- hand-computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prob", "support", "reward", "gamma", "expected"),
    [
        # Every atom lands on an atom, l = u: algorithm 1 as printed would lose all mass.
        ([0.25, 0.5, 0.25], [-1.0, 0.0, 1.0], 0.0, 1.0, [0.25, 0.5, 0.25]),
        ([0.25, 0.5, 0.25], [-1.0, 0.0, 1.0], 1.0, 1.0, [0.0, 0.25, 0.75]),
        # Half way between atoms: each gives half to both sides, the last is clipped.
        ([0.25, 0.5, 0.25], [-1.0, 0.0, 1.0], 0.5, 1.0, [0.125, 0.375, 0.5]),
        # Everything beyond either end.
        ([0.25, 0.5, 0.25], [-1.0, 0.0, 1.0], 9.0, 1.0, [0.0, 0.0, 1.0]),
        ([0.25, 0.5, 0.25], [-1.0, 0.0, 1.0], -9.0, 1.0, [1.0, 0.0, 0.0]),
        ([0.25, 0.5, 0.25], [-1.0, 0.0, 1.0], INF, 1.0, [0.0, 0.0, 1.0]),
        ([0.25, 0.5, 0.25], [-1.0, 0.0, 1.0], -1e12, 1.0, [1.0, 0.0, 0.0]),
        # A support that isn't symmetric: 2 + ½·(0, 4, 8) = (2, 4, 6), that is b = (½, 1, 1½).
        ([0.2, 0.4, 0.4], [0.0, 4.0, 8.0], 2.0, 0.5, [0.1, 0.7, 0.2]),
        # Negative only: −1 + 0.5·(−4, −3, −2) = (−3, −2.5, −2).
        ([0.2, 0.4, 0.4], [-4.0, -3.0, -2.0], -1.0, 0.5, [0.0, 0.4, 0.6]),
        # γ = 0: all mass at the reward.
        ([0.25, 0.5, 0.25], [-1.0, 0.0, 1.0], 0.25, 0.0, [0.0, 0.75, 0.25]),
        # Three steps of γ = ½: the ends move to ∓1/8, a quarter of the way from 0 to the next atom.
        ([0.5, 0.0, 0.0, 0.0, 0.5], [-1.0, -0.5, 0.0, 0.5, 1.0], 0.0, 0.5**3, [0.0, 0.125, 0.75, 0.125, 0.0]),
    ],
)
def test_hand_computed_projections(any_backend, device, prob, support, reward, gamma, expected) -> None:
    assert project(prob, support, reward, any_backend, device, gamma=gamma) == pytest.approx(expected, abs=1e-12)


def test_a_terminal_step_puts_all_mass_at_the_reward(any_backend, device) -> None:
    found = project([NAN, INF, 0.1], [-1.0, 0.0, 1.0], 0.25, any_backend, device, terminated=True, gamma=NAN)
    assert found == pytest.approx([0.0, 0.75, 0.25], abs=1e-12)


def test_a_hand_computed_loss(any_backend, device) -> None:
    """Q(s', ·) = (0.2, −0.1), so a* = 0; r + ½·(−1, 0, 1) = (0, ½, 1); m = (0, 0.3 + 0.1, 0.1 + 0.5)."""
    next_prob = torch.tensor([[0.3, 0.4], [0.2, 0.3], [0.5, 0.3]], dtype=torch.float64, device=device)
    log_prob = torch.tensor([[0.5, 0.1], [0.3, 0.2], [0.2, 0.7]], dtype=torch.float64, device=device).log()
    loss, priority = categorical_q_loss(
        log_prob[None],
        torch.tensor([1], device=device),
        next_prob.log()[None],
        torch.tensor([-1.0, 0.0, 1.0], device=device),
        torch.tensor([0.5], device=device),
        torch.tensor([False], device=device),
        0.5,
        backend=any_backend,
    )
    assert loss.item() == pytest.approx(-0.4 * math.log(0.2) - 0.6 * math.log(0.7))
    assert torch.equal(loss, priority)


def test_the_online_network_chooses_and_the_target_evaluates(any_backend, device) -> None:
    """Online Q = (−1, 1): a* = 1, whose target mass lies at −1. The target alone would choose 0 with mass at 1."""
    eye = torch.tensor([[0.0, 1.0], [0.0, 0.0], [1.0, 0.0]], dtype=torch.float64, device=device)
    arguments = problem((1,), 3, 2, v_min=-1.0, v_max=1.0, device=device)
    arguments |= {"next_log_prob": eye.log()[None], "reward": torch.zeros(1, device=device), "gamma": 1.0}
    arguments |= {"terminated": torch.zeros(1, dtype=torch.bool, device=device)}
    taken = arguments["log_prob"][0, :, arguments["action"].item()]
    double, _ = categorical_q_loss(**arguments | {"next_online_log_prob": eye.flip(1).log()[None]}, backend=any_backend)
    single, _ = categorical_q_loss(**arguments | {"next_online_log_prob": None}, backend=any_backend)
    assert double.item() == pytest.approx(-taken[0].item())
    assert single.item() == pytest.approx(-taken[2].item())


@pytest.mark.parametrize("actions", [2, 3, 5, 8])
def test_the_first_of_equally_good_actions_is_taken(any_backend, device, actions) -> None:
    """Q is the same for all, bit by bit; the distributions differ."""
    narrow, wide = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.5, 0.0, 0.5])
    next_prob = torch.stack([torch.tensor([1.0, 0.0, 0.0]), wide, *[narrow] * (actions - 2)], -1)
    arguments = problem((1,), 3, actions, v_min=-1.0, v_max=1.0, double=False, device=device)
    arguments |= {"next_log_prob": next_prob.double().log()[None].to(device), "gamma": 1.0}
    arguments |= {"reward": torch.zeros(1, device=device), "terminated": torch.zeros(1, device=device)}
    loss, _ = categorical_q_loss(**arguments, backend=any_backend)
    taken = arguments["log_prob"][0, :, arguments["action"].item()]
    assert loss.item() == pytest.approx(-0.5 * (taken[0] + taken[2]).item())


# --- against the reference ----------------------------------------------------------------------------------------


@given(
    batch=st.sampled_from([(), (1,), (3,), (2, 2), (1, 2, 1)]),
    atoms=st.integers(2, 9) | st.sampled_from([33, 51, 65, 101]),
    actions=st.integers(1, 4) | st.sampled_from([6, 18]),
    bounds=st.sampled_from([(-2.0, 3.0), (-10.0, 10.0), (0.0, 1.0), (-7.0, -6.0)]),
    dtype=st.sampled_from(list(TOLERANCE)),
    gamma=st.sampled_from([0.0, 0.3, 0.99, 1.0, 2.5]),
    gamma_kind=st.sampled_from(["number", "0-d", "per sample", "one element"]),
    mask_dtype=st.sampled_from([torch.bool, torch.int64, torch.float32, torch.uint8]),
    action_dtype=st.sampled_from([torch.int64, torch.int32, torch.uint8]),
    double=st.booleans(),
    seed=st.integers(0, 100),
)
@settings(max_examples=50, deadline=None, derandomize=True)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_loss_gradient_and_projection_agree_with_the_reference(
    backend, device, batch, atoms, actions, bounds, dtype, gamma, gamma_kind, mask_dtype, action_dtype, double, seed
) -> None:
    v_min, v_max = bounds
    arguments = problem(
        batch, atoms, actions, v_min=v_min, v_max=v_max, dtype=dtype, device=device, double=double, seed=seed
    )
    shape = {"0-d": (), "per sample": batch, "one element": (1,) if batch else ()}
    if gamma_kind != "number":
        gamma = torch.full(shape[gamma_kind], gamma, device=device)
    arguments |= {"gamma": gamma, "terminated": 3 * arguments["terminated"].to(mask_dtype)}
    if mask_dtype == torch.bool:
        arguments["terminated"] = arguments["terminated"].bool()
    arguments["action"] = arguments["action"].to(action_dtype)
    results = []
    for name, given_arguments in ((backend, arguments), ("reference", in_float64(arguments))):
        loss, priority = categorical_q_loss(**given_arguments, backend=name)
        (gradient,) = torch.autograd.grad(loss.sum(), given_arguments["log_prob"])
        prob = given_arguments["next_log_prob"][..., 0].exp()
        bellman = (given_arguments[k] for k in ("support", "reward", "terminated", "gamma"))
        assert torch.equal(loss, priority)
        assert not priority.requires_grad
        results.append((loss.detach(), gradient, categorical_projection(prob, *bellman, backend=name)))
    size = results[1][0].abs().amax().clamp_min(1)  # of the loss; probabilities and gradients are at most 1
    for found, expected in zip(*results, strict=True):
        assert found.dtype == dtype
        assert found.shape == expected.shape
        assert (found.double() - expected).abs().max() <= 4 * TOLERANCE[dtype] * size


@pytest.mark.parametrize("atoms", [512, 300])
def test_many_atoms(backend, device, atoms) -> None:
    arguments = problem((2,), atoms, 2, dtype=torch.float32, device=device)
    loss, _ = categorical_q_loss(**arguments, backend=backend)
    expected, _ = categorical_q_loss(**in_float64(arguments), backend="reference")
    assert torch.allclose(loss.double(), expected, rtol=1e-4)  # 512 / 5 atoms per unit of value: 100 roundings of b


@pytest.mark.parametrize("gamma", [-0.5, 0.0, 0.01, 0.045, 0.3, 0.95, 1.0, 1.6])
@pytest.mark.parametrize("support_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bounds", [(-10.0, 10.0), (0.0, 1.0), (-60.0, -40.0)])
def test_atoms_land_where_the_reference_says_they_do(backend, device, bounds, support_dtype, gamma) -> None:
    """However many of them land near a target, and though a support of half precision isn't quite even."""
    support = torch.linspace(*bounds, 67).to(device, support_dtype)
    prob = torch.rand(12, 67, generator=torch.Generator().manual_seed(0)).softmax(-1).to(device)
    inside = torch.tensor([-0.8, -0.1, 0.0, 1e-4, 0.3, 0.5, 0.99, 1.0, 1.7], device=device)  # where z_0 lands
    moved = bounds[0] * (1 - gamma) + inside * (bounds[1] - bounds[0])
    reward = torch.cat([moved, torch.tensor([-INF, INF, 1e30], device=device)])
    ended = torch.zeros(12, dtype=torch.bool, device=device)
    m = categorical_projection(prob, support, reward, ended, gamma, backend=backend)
    expected = categorical_projection(
        prob.double(), support.double(), reward.double(), ended, gamma, backend="reference"
    )
    assert (m - expected).abs().max() < 5e-5


def test_a_program_may_have_several_samples(monkeypatch, device) -> None:
    from fusedrl.kernels import categorical_launch

    plan_with(monkeypatch, categorical_launch, _samples_of_program=lambda samples, processors: 4)
    arguments = problem((10,), 51, 3, device=device)
    found = categorical_q_loss(**arguments, backend="triton")[0]
    expected = categorical_q_loss(**arguments, backend="reference")[0]
    weight = torch.arange(10.0, dtype=torch.float64, device=device)
    gradients = [torch.autograd.grad(loss @ weight, arguments["log_prob"])[0] for loss in (found, expected)]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*gradients)
    projected = [
        categorical_projection(
            arguments["next_log_prob"][..., 0].exp(),
            *(arguments[name] for name in ("support", "reward", "terminated", "gamma")),
            backend=backend,
        )
        for backend in ("triton", "reference")
    ]
    torch.testing.assert_close(*projected)


@given(
    reward=st.floats(-30, 30),
    gamma=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    atoms=st.sampled_from([2, 51, 101]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=40, deadline=None, derandomize=True)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_mass_is_conserved(backend, device, reward, gamma, atoms, dtype) -> None:
    """Inside the support, at its atoms (reward 0.4·k and γ = 1 move atoms onto atoms) and beyond both ends."""
    prob = torch.rand(2, atoms, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prob = (prob / prob.sum(-1, keepdim=True)).to(device, dtype)
    support = torch.linspace(-10, 10, atoms, dtype=dtype, device=device)
    rewards = torch.tensor([reward, round(reward / 0.4) * 0.4], dtype=dtype, device=device)
    ended = torch.zeros(2, dtype=torch.bool, device=device)
    m = categorical_projection(prob, support, rewards, ended, gamma, backend=backend)
    assert (m >= 0).all()
    assert (m.sum(-1) - prob.sum(-1)).abs().max() <= (1e-6 if dtype == torch.float32 else 1e-14)


def test_results_are_bitwise_reproducible(backend, device) -> None:
    arguments = problem((64 if backend == "torch" else 6,), 51, 6, dtype=torch.float32, device=device)

    def run() -> tuple[torch.Tensor, ...]:
        loss, _ = categorical_q_loss(**arguments, backend=backend)
        return loss, *torch.autograd.grad(loss.mean(), arguments["log_prob"])

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_the_torch_backend_carries_nothing_from_tile_to_tile(monkeypatch, device) -> None:
    from fusedrl.kernels import categorical_vectorized

    arguments = problem((7,), 5, 3, device=device)
    whole, _ = categorical_q_loss(**arguments, backend="torch")
    monkeypatch.setattr(categorical_vectorized, "_TILE", 2 * 5 * 3)
    tiled, _ = categorical_q_loss(**arguments, backend="torch")
    assert torch.allclose(tiled, whole, rtol=1e-14)


def test_the_gather_form_that_the_torch_backend_runs_on_a_gpu_gives_the_same_numbers(monkeypatch) -> None:
    """Off the CPU it must not add by atomics; here the branch is taken by hand."""
    from fusedrl.kernels import categorical_vectorized

    arguments = problem((7,), 5, 3)
    scattered, _ = categorical_q_loss(**arguments, backend="torch")
    monkeypatch.setattr(categorical_vectorized, "_adds_in_order", lambda x: False)
    gathered, _ = categorical_q_loss(**arguments, backend="torch")
    assert torch.allclose(gathered, scattered, rtol=1e-14)


# --- semantics ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("double", [False, True])
def test_nothing_of_the_next_observation_of_a_terminal_step_is_read(any_backend, device, poison, double) -> None:
    arguments = problem((4,), double=double, device=device)
    terminated = torch.tensor([True, False, True, False], device=device)
    arguments |= {"terminated": terminated, "gamma": torch.full((4,), 0.9, device=device)}
    expected, _ = categorical_q_loss(**arguments, backend=any_backend)
    for name in ("next_log_prob", "next_online_log_prob"):
        if name in arguments:
            arguments[name] = torch.where(terminated[:, None, None], poison, arguments[name])
    arguments["gamma"] = torch.where(terminated, poison, arguments["gamma"])
    loss, _ = categorical_q_loss(**arguments, backend=any_backend)
    (gradient,) = torch.autograd.grad(loss.sum(), arguments["log_prob"])
    assert torch.equal(loss, expected)
    assert gradient.isfinite().all()


def test_a_nan_that_counts_is_not_hidden(any_backend, device) -> None:
    """In the reward, in the next distribution, in any action's Q-value, in the taken action's log-probability."""
    arguments = problem((5,), device=device, double=False)
    arguments["terminated"] = torch.zeros(5, dtype=torch.bool, device=device)
    reward, following = arguments["reward"].clone(), arguments["next_log_prob"].clone()
    log_prob = arguments["log_prob"].detach().clone()
    reward[0] = NAN
    following[1] = NAN
    following[2, 3, 1] = NAN
    log_prob[3, :, arguments["action"][3]] = NAN
    arguments |= {"reward": reward, "next_log_prob": following, "log_prob": log_prob}
    loss, _ = categorical_q_loss(**arguments, backend=any_backend)
    assert loss.isnan().tolist() == [True, True, True, True, False]


@pytest.mark.parametrize(
    ("support", "reward", "gamma", "expected"),
    [
        ([-1.0, 0.0, 1.0], 0.0, INF, None),  # ∞ · 0 in the middle
        ([-2.0, -1.0, 0.0], 0.0, -INF, None),  # and at an end
        ([-1.0, 0.5, 2.0], -INF, INF, None),  # −∞ + ∞
        ([-2.0, 1.0, 4.0], 0.5, INF, [0.25, 0.0, 0.75]),  # a return of ±∞ is clipped as any other is
        ([1.0, 2.0, 3.0], INF, INF, [0.0, 0.0, 1.0]),
    ],
)
def test_an_infinite_gamma_gives_nan_where_a_return_is_none(
    any_backend, device, support, reward, gamma, expected
) -> None:
    found = project([0.25, 0.25, 0.5], support, reward, any_backend, device, gamma=gamma)
    assert found == expected if expected else any(map(math.isnan, found))


def test_an_atom_without_mass_may_be_impossible(any_backend, device) -> None:
    """0 · log 0 is 0; where there is mass the cross-entropy is infinite."""
    arguments = problem((2,), 3, 1, v_min=-1.0, v_max=1.0, double=False, device=device)
    log_prob = torch.tensor([0.0, 0.0, -INF], dtype=torch.float64, device=device)[None, :, None].repeat(2, 1, 1)
    arguments |= {"log_prob": log_prob.requires_grad_(), "terminated": torch.ones(2, dtype=torch.bool, device=device)}
    arguments["reward"] = torch.tensor([-0.5, 0.5], device=device)
    loss, _ = categorical_q_loss(**arguments, backend=any_backend)
    (gradient,) = torch.autograd.grad(loss.sum(), log_prob)
    assert loss.tolist() == [0.0, INF]
    assert gradient[..., 0].tolist() == [[-0.5, -0.5, 0.0], [0.0, -0.5, -0.5]]


def test_an_impossible_next_atom_has_no_mass(any_backend, device) -> None:
    """Probability 0 is −∞ in the logarithm."""
    arguments = problem((1,), 3, 1, v_min=-1.0, v_max=1.0, double=False, device=device)
    next_log_prob = torch.tensor([0.0, -INF, -INF], device=device, dtype=torch.float64)[None, :, None]
    arguments |= {"next_log_prob": next_log_prob, "reward": torch.zeros(1, device=device), "gamma": 1.0}
    arguments["terminated"] = torch.zeros(1, device=device)
    loss, _ = categorical_q_loss(**arguments, backend=any_backend)
    assert loss.item() == pytest.approx(-arguments["log_prob"][0, 0, 0].item())


def test_integer_rewards_and_mixed_dtypes_compute_in_the_dtype_of_log_prob(any_backend, device) -> None:
    arguments = problem((3,), dtype=torch.float32, device=device)
    arguments["reward"] = torch.tensor([1, -1, 0], device=device)
    arguments["next_log_prob"] = arguments["next_log_prob"].bfloat16()
    arguments["support"] = arguments["support"].double()
    loss, _ = categorical_q_loss(**arguments, backend=any_backend)
    expected, _ = categorical_q_loss(**in_float64(arguments), backend="reference")
    assert loss.dtype == torch.float32
    assert torch.allclose(loss.double(), expected, rtol=1e-5)


def test_a_support_that_was_of_half_precision_keeps_all_mass(backend, device) -> None:
    """Its atoms lie as unevenly as before, but its dtype no longer says so."""
    support = torch.linspace(-10.0, 10.0, 51).to(device, torch.bfloat16).float()
    rewards = torch.linspace(-1.0, 1.0, 101, device=device)
    prob = torch.full((101, 51), 1 / 51, device=device)
    terminated = torch.zeros(101, dtype=torch.bool, device=device)
    m = categorical_projection(prob, support, rewards, terminated, 0.99, backend=backend)
    assert torch.allclose(m.sum(-1), torch.ones(101, device=device), rtol=TOLERANCE[torch.float32])


@pytest.mark.parametrize("make", [float, lambda g: torch.tensor(g, dtype=torch.float64)], ids=["number", "0-d"])
def test_gamma_keeps_float64_precision(backend, device, make) -> None:
    """γ = 1 − 2⁻⁴⁰ rounds to 1 in float32; the mass that it moves off the last atom is 2⁻⁴⁰·V_max/Δz."""
    found = project([0.0, 0.0, 1.0], [-1.0, 0.0, 1.0], 0.0, backend, device, gamma=make(1 - 2**-40))
    assert found[1] == 2**-40


def test_an_action_that_does_not_exist_reads_nothing(device) -> None:
    """The kernel says NaN; PyTorch's indexing raises."""
    arguments = problem((3,), device=device) | {"action": torch.tensor([7, -1, 1 << 32], device=device)}
    loss, _ = categorical_q_loss(**arguments, backend="triton")
    assert loss.isnan().all()
    if device.type == "cpu":
        with pytest.raises(RuntimeError, match="out of bounds"):
            categorical_q_loss(**arguments, backend="torch")


@pytest.mark.parametrize("batch", [(0,), (3, 0), (0, 2)])
def test_an_empty_batch_gives_an_empty_result(any_backend, device, batch) -> None:
    arguments = problem(batch, device=device)
    loss, priority = categorical_q_loss(**arguments, backend=any_backend)
    assert loss.shape == priority.shape == batch
    loss.sum().backward()
    assert arguments["log_prob"].grad.shape == arguments["log_prob"].shape


def test_inputs_are_not_written(any_backend, device) -> None:
    arguments = problem(device=device)
    before = {k: x.detach().clone() for k, x in arguments.items() if isinstance(x, torch.Tensor)}
    categorical_q_loss(**arguments, backend=any_backend)[0].sum().backward()
    assert all(torch.equal(arguments[k].detach(), x) for k, x in before.items())


# --- verify -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_verify_accepts_what_is_right(device, dtype) -> None:
    arguments = problem((3, 2), 51, 6, v_min=-10.0, v_max=10.0, dtype=dtype, device=device)
    loss, _ = categorical_q_loss(**arguments, backend="verify")
    loss.sum().backward()
    bellman = (arguments[k] for k in ("support", "reward", "terminated", "gamma"))
    categorical_projection(arguments["next_log_prob"][..., 0].exp(), *bellman, backend="verify")


def test_verify_accepts_either_of_two_actions_that_rounding_cannot_tell_apart(device) -> None:
    arguments = problem((8,), 51, 2, dtype=torch.float32, double=False, device=device)
    same = arguments["next_log_prob"][..., :1]
    arguments["next_log_prob"] = torch.cat([same, same.flip(1)], -1)
    arguments["support"] = torch.linspace(-1e-5, 1e-5, 51, device=device) + 1  # Q-values differ in the last digits
    categorical_q_loss(**arguments, backend="verify")


@pytest.mark.parametrize("broken", ["forward", "backward", "project"])
def test_verify_names_the_element_that_is_wrong(monkeypatch, device, broken) -> None:
    from fusedrl.kernels import categorical_operators
    from fusedrl.kernels.backend import fastest_backend

    arguments = problem((4,), device=device)
    module = categorical_operators.backend_module(fastest_backend(arguments["log_prob"]))
    right = getattr(module, broken)

    def wrong(*inputs):
        found = right(*inputs)
        (found[0] if isinstance(found, list) else found)[2] += 0.5
        return found

    monkeypatch.setattr(module, broken, wrong)
    bellman = [arguments[k] for k in ("support", "reward", "terminated", "gamma")]

    def run() -> None:
        if broken == "project":
            categorical_projection(arguments["next_log_prob"][..., 0].exp(), *bellman)
        else:
            categorical_q_loss(**arguments)[0].sum().backward()

    with use_backend("verify"), pytest.raises(VerificationError, match=r"at index \(2,"):
        run()


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"log_prob": torch.zeros(5)}, RuntimeError, r"log_prob has shape \(5,\).*\[\*batch, atoms, actions\]"),
        ({"log_prob": torch.zeros(4, 5, 3).long()}, RuntimeError, r"log_prob has .*torch.int64"),
        ({"next_log_prob": torch.zeros(4, 5, 2)}, RuntimeError, r"next_log_prob has shape \(4, 5, 2\).*\(4, 5, 3\)"),
        ({"next_online_log_prob": torch.zeros(5, 3)}, RuntimeError, r"next_online_log_prob has shape \(5, 3\)"),
        ({"next_log_prob": torch.zeros(4, 5, 3, device="meta")}, RuntimeError, "next_log_prob has .* on meta"),
        ({"action": torch.zeros(4, 1).long()}, RuntimeError, r"action has shape \(4, 1\).*batch has shape \(4,\)"),
        ({"action": [0]}, TypeError, "action must be a tensor"),
        ({"next_log_prob": None}, TypeError, "next_log_prob must be a tensor, but is None"),
        ({"support": (0.0, 1.0)}, TypeError, "support must be a tensor"),
        ({"gamma": "0.9"}, TypeError, "gamma must be a number"),
        ({"action": torch.zeros(4)}, TypeError, "action has dtype torch.float32"),
        ({"action": torch.zeros(4).bool()}, TypeError, "action has dtype torch.bool"),
        ({"reward": torch.zeros(4, 1)}, RuntimeError, r"reward has shape \(4, 1\).*batch has shape \(4,\)"),
        ({"terminated": torch.zeros(1)}, RuntimeError, r"terminated has shape \(1,\)"),
        ({"support": torch.zeros(4)}, RuntimeError, r"support has shape \(4,\).*5 atoms"),
        ({"support": torch.zeros(5, device="meta")}, RuntimeError, "support has .* on meta"),
        ({"gamma": torch.ones(4, 1)}, RuntimeError, r"gamma has shape \(4, 1\).*broadcast.*\(4,\)"),
        ({"gamma": torch.ones(4, device="meta")}, RuntimeError, "gamma is on meta"),
        ({"backend": "cuda"}, ValueError, "backend is 'cuda'"),
    ],
)
def test_a_bad_argument_is_named_before_anything_runs(monkeypatch, change, error, message) -> None:
    monkeypatch.setattr(categorical.categorical_operators, "backend_module", None)
    with pytest.raises(error, match=message):
        categorical_q_loss(**problem() | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prob": torch.zeros(())}, r"prob has shape \(\)"),
        ({"prob": torch.zeros(2, 3, dtype=torch.int64)}, "prob has .*torch.int64"),
        ({"prob": torch.zeros(2, 1), "support": torch.zeros(1)}, "2 or more"),
        ({"reward": torch.zeros(2, 1)}, r"reward has shape \(2, 1\)"),
    ],
)
def test_a_bad_argument_of_the_projection_is_named(change, message) -> None:
    arguments = {"prob": torch.zeros(2, 3), "support": torch.arange(3.0), "reward": torch.zeros(2)}
    with pytest.raises(RuntimeError, match=message):
        categorical_projection(**{"terminated": torch.zeros(2), "gamma": 0.9, **arguments, **change})


def test_a_network_without_actions_is_refused() -> None:
    with pytest.raises(RuntimeError, match="no action"):
        categorical_q_loss(
            **problem() | dict.fromkeys(("log_prob", "next_log_prob", "next_online_log_prob"), torch.zeros(4, 5, 0))
        )


@pytest.mark.parametrize("backend", ["torch", "verify"])
def test_autocast_does_not_choose_another_action(backend, device):
    arguments = problem((400,), atoms=51, v_min=-10.0, v_max=10.0, dtype=torch.float32, device=device)
    # Values of actions that bfloat16 doesn't tell apart.
    arguments["next_online_log_prob"] = (0.05 * arguments["next_log_prob"]).log_softmax(-2)
    wanted = categorical_q_loss(**arguments, backend=backend)
    with torch.autocast(device.type, torch.bfloat16):
        found = categorical_q_loss(**arguments, backend=backend)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reward", [torch.float32, torch.float64, torch.int64, "half"])
def test_a_loss_is_not_rounded_to_half_precision_where_only_the_networks_are(any_backend, device, half, reward) -> None:
    """As under autocast, where priorities of 8 bits would be the same for many samples."""
    arguments = problem((40,), 11, 3, dtype=half, device=device)
    arguments["reward"] = arguments["reward"].to(half if reward == "half" else reward)
    log_prob = arguments["log_prob"].detach().requires_grad_()
    loss, priority = categorical_q_loss(**arguments | {"log_prob": log_prob}, backend=any_backend)
    rounded = reward in ("half", torch.int64)
    assert loss.dtype == priority.dtype == (half if rounded else torch.float32)
    wide = {k: x.double() if isinstance(x, torch.Tensor) and x.dtype == half else x for k, x in arguments.items()}
    if not rounded:
        expected = categorical_q_loss(**wide, backend="reference")[0]
        torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(loss.sum(), log_prob)
    assert gradient.dtype == half
    assert gradient.any()
