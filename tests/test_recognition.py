"""Arguments are recognised by their form, and nothing that a decision may depend on is left out of it."""

import gc
import weakref

import pytest
import torch
from fusedrl import kernels
from fusedrl.kernels import dispatch, recognition, scan_operators
from fusedrl.kernels.recognition import Recognition, items
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

MATRIX = torch.zeros(4, 5)


@pytest.fixture
def recognised() -> Recognition:
    """Knows one setting of a matrix, a number, nothing and a vector."""
    found = Recognition()
    found.remember("a", (MATRIX, 0.5, None, torch.zeros(3)), "known")
    return found


def test_others_of_the_same_form_are_recognised(recognised) -> None:
    matrix, vector = torch.randn(4, 5), torch.ones(3)
    tensors, found = recognised("a", [matrix, 0.25, None, vector])
    assert found == "known"
    assert tensors[0] is matrix
    assert tensors[1] is vector
    assert len(tensors) == 2


class Subclass(torch.Tensor):
    pass


OTHERS = {
    "another shape": torch.zeros(5, 4),
    "one dimension more": torch.zeros(4, 5, 1),
    "other strides": torch.zeros(5, 4).t(),
    "another dtype": MATRIX.double(),
    "another device": torch.zeros(4, 5, device="meta"),
    "a gradient is required": torch.zeros(4, 5, requires_grad=True),
    "a parameter": torch.nn.Parameter(MATRIX, requires_grad=False),
    "a subclass": MATRIX.as_subclass(Subclass),
    "negated memory": torch._neg_view(MATRIX),
    "no memory": torch._efficientzerotensor(4, 5),
    "a number": 0.5,
    "nothing": None,
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_form_is_not_recognised(recognised, name) -> None:
    vector = torch.zeros(3)
    assert recognised("a", (MATRIX, 0.5, None, vector))[1] == "known"
    tensors, found = recognised("a", (OTHERS[name], 0.5, None, vector))
    assert found is None
    assert tensors[-1] is vector
    recognised.remember("a", (OTHERS[name], 0.5, None, vector), name)
    assert recognised("a", (OTHERS[name], 0.25, None, vector))[1] == (None if name == "a subclass" else name)
    assert recognised("a", (MATRIX, 0.5, None, vector))[1] == "known"


def test_another_setting_and_other_types_are_not_recognised(recognised) -> None:
    vector = torch.zeros(3)
    assert recognised("b", (MATRIX, 0.5, None, vector))[1] is None
    assert recognised("a", (MATRIX, 1, None, vector))[1] is None
    assert recognised("a", (MATRIX, 0.5, vector, None))[1] is None
    assert recognised("a", (MATRIX, 0.5, None))[1] is None


def test_which_arguments_are_one_tensor_is_part_of_the_form() -> None:
    found, x, y, z = Recognition(), *torch.zeros(3, 4, 5)
    calls = {"xyz": (x, y, z), "xxz": (x, x, z), "xyx": (x, y, x), "xyy": (x, y, y), "xxx": (x, x, x)}
    for known, (name, call) in enumerate(calls.items()):
        assert [found("a", other)[1] for other in calls.values()][known:] == [None] * (5 - known)
        found.remember("a", call, name)
    for name, call in calls.items():
        tensors, known = found("a", call)
        assert known == name
        assert all(a is b for a, b in zip(tensors, call, strict=True))
    assert found("a", (y, y, x))[1] == "xxz"
    assert found("a", (x.t(), x.t(), y))[1] is None
    assert found("b", (x, x, z))[1] is None


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_modes_and_transforms_are_part_of_the_form(recognised) -> None:
    seen = []

    def look(*_: torch.Tensor) -> torch.Tensor:
        seen.append(recognised("a", (MATRIX, 0.5, None, torch.zeros(3)))[1])
        return torch.zeros(())

    with Mode():
        look()
    torch.func.grad(look)(torch.zeros(2))
    torch.func.vmap(look)(torch.zeros(2))
    with torch.inference_mode():
        look()
    assert seen == [None] * 4
    with torch.no_grad():
        look()
    assert seen[-1] == "known", "not the grad mode, which is a setting of who asks"


def test_the_latest_forms_of_a_setting_are_kept(monkeypatch) -> None:
    monkeypatch.setattr(recognition, "_MOST_FORMS", 3)
    found = Recognition()
    for n in range(5):
        found.remember("a", [torch.zeros(n)], n)
    assert [found("a", [torch.zeros(n)])[1] for n in range(5)] == [None, None, 2, 3, 4]


def test_settings_are_not_kept_without_bound(monkeypatch) -> None:
    monkeypatch.setattr(recognition, "_MOST_SETTINGS", 2)
    found = Recognition()
    for name in "abc":
        found.remember(name, [MATRIX], name)
    assert [found(name, [MATRIX])[1] for name in "abc"] == [None, None, "c"]


STRANGE = {
    "compressed": lambda: torch.zeros(4, 5).to_sparse_csr(),
    "sparse": lambda: torch.zeros(4, 5).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    "a subclass": lambda: torch.zeros(4, 5).as_subclass(Subclass),
    "fake": lambda: FakeTensorMode().from_tensor(torch.zeros(4, 5)),
}


@pytest.mark.filterwarnings("ignore:.*(Sparse|nested):UserWarning")
@pytest.mark.parametrize("name", STRANGE)
def test_what_has_no_strides_or_is_of_a_subclass_is_never_remembered(name) -> None:
    found = Recognition()
    for _ in range(2):
        tensors, known = found("a", [MATRIX, STRANGE[name]()])
        assert known is None
        assert len(tensors) == 2
        found.remember("a", tensors, "known")


def test_no_type_of_the_users_is_kept_alive() -> None:
    class Mine(torch.Tensor):
        pass

    class Number(float):
        pass

    found, types = Recognition(), [weakref.ref(Mine), weakref.ref(Number)]
    found.remember("a", [MATRIX.as_subclass(Mine), 0.5], "known")
    found.remember("a", [MATRIX, Number(0.5)], "known")
    found("a", [MATRIX.as_subclass(Mine), Number(0.5)])
    del Mine, Number
    gc.collect()
    assert [alive() for alive in types] == [None, None]


def test_no_tensor_is_kept_alive() -> None:
    found = Recognition()
    x = torch.zeros(3)
    alive = weakref.ref(x)
    found.remember("a", [x], "known")
    found("a", [x])
    del x
    gc.collect()
    assert alive() is None
    assert found("a", [torch.ones(3)])[1] == "known"


def test_without_the_guards_of_the_compiler_nothing_is_recognised(monkeypatch) -> None:
    monkeypatch.setattr(recognition, "TensorGuards", None)
    found = Recognition()
    found.remember("a", [MATRIX], "known")
    tensors, known = found("a", [MATRIX])
    assert known is None
    assert tensors[0] is MATRIX
    monkeypatch.setattr(scan_operators, "_checked_forms", found)
    done = torch.tensor([False, True])
    for _ in range(2):
        assert kernels.reward_to_go(0.5, torch.ones(2), done).tolist() == [1.5, 1]


def test_items() -> None:
    assert items([2, 0])("abc") == ("c", "a")
    assert items([1])("abc") == ("b",)
    assert items([])("abc") == ()


# -- what recognises ---------------------------------------------------------------------------------------------------


def steps(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    x = dict(zip(("value", "next_value", "reward"), torch.rand(3, 4, 5, dtype=dtype, device=device), strict=True))
    return x | {"done": torch.rand(4, 5, device=device) < 0.3, "terminated": torch.rand(4, 5, device=device) < 0.1}


ESTIMATES = {
    "gae": lambda gamma=0.9, **x: kernels.gae(gamma, 0.8, **x),
    "vtrace": lambda gamma=0.9, **x: kernels.vtrace(gamma, x["reward"].float() / 2, None, **x),
}


@pytest.mark.parametrize("estimate", ESTIMATES)
@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize(
    ("name", "wrong", "error"),
    [
        ("next_value", torch.rand(4, 1), "next_value has shape"),
        ("terminated", torch.rand(5, 4) < 0.1, "terminated has shape"),
        ("done", torch.zeros(4, 5, dtype=torch.bool, device="meta"), "done has shape"),
        ("gamma", torch.rand(3), "gamma has shape"),  # on the CPU, which is looked at later
    ],
)
def test_what_is_wrong_is_refused_after_any_number_of_right_calls(
    estimate, backend, name, wrong, error, device
) -> None:
    function, right = ESTIMATES[estimate], steps(device)
    with kernels.use_backend(backend):
        for _ in range(2):
            function(**right)
            with pytest.raises(RuntimeError, match=error):
                function(**right | {name: wrong})


@pytest.mark.parametrize("estimate", ESTIMATES)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_recognised_call_depends_on_what_is_not_in_the_form(estimate, backend, device) -> None:
    """Numbers, whether both masks are one tensor, whether gradients are recorded, and the backend."""
    function, x = ESTIMATES[estimate], steps(device, torch.float64)
    x["terminated"][1, 2], x["done"][1, 2] = False, True
    ways = [{}, {"gamma": 0.5}, {"terminated": x["done"]}, {"terminated": None}, {"time_dim": 0}]
    ways += [{"done": x["done"].double() * 2}, {"terminated": x["terminated"].double() * 2}]
    leaf = x["value"].clone().requires_grad_()

    def found(way: dict) -> list[torch.Tensor]:
        return [y.clone() for y in function(**x | way)]

    with kernels.use_backend("reference"):
        expected = [found(way) for way in ways]
    with kernels.use_backend(backend):
        for way, wanted in [*zip(ways, expected, strict=True)] * 2:
            for ours, reference in zip(found(way), wanted, strict=True):
                torch.testing.assert_close(ours, reference)
        for _ in range(2):
            with torch.no_grad():
                assert not any(y.requires_grad for y in function(**x | {"value": leaf}))
            assert all(y.requires_grad for y in function(**x | {"value": leaf}))
    with kernels.use_backend("verify"):
        found({})
    assert not torch.equal(expected[0][0], expected[2][0]), "or the masks make no difference"


@pytest.mark.parametrize("estimate", ESTIMATES)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_time_dim_that_is_no_integer_changes_nothing_for_those_that_are(estimate, backend, device) -> None:
    function, x = ESTIMATES[estimate], steps(device)
    with kernels.use_backend(backend):
        for _ in range(2):
            with pytest.raises(TypeError, match="time_dim must be an int"):
                function(**x, time_dim=1.0)
            last = function(**x, time_dim=1)[0]
        which = torch.tensor(1)
        torch.testing.assert_close(function(**x, time_dim=which)[0], last)
        which.fill_(0)
        torch.testing.assert_close(function(**x, time_dim=which)[0], function(**x, time_dim=0)[0])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_one_kind_of_scan_does_without_another_needs(backend, device) -> None:
    reward, done = torch.zeros(2, 5, device=device), torch.zeros(2, 5, dtype=torch.bool, device=device)
    for _ in range(2):
        kernels.td_lambda_return(0.9, 0.8, reward, reward, done, backend=backend)
        with pytest.raises(TypeError, match=r"^value must be a real tensor, but is None"):
            kernels.gae(0.9, 0.8, None, reward, reward, done, backend=backend)


@pytest.mark.parametrize("estimate", ESTIMATES)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_integers_are_of_the_default_dtype_of_the_call(estimate, backend, device) -> None:
    function, x = ESTIMATES[estimate], steps(device)
    x |= {name: (9 * x[name]).long() for name in ("value", "next_value", "reward")}
    before = torch.get_default_dtype()
    try:
        for _ in range(2):
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                torch.set_default_dtype(dtype)
                with kernels.use_backend("reference"):
                    expected = function(**x)[0]
                with kernels.use_backend(backend):
                    found = function(**x)[0]
                assert found.dtype == dtype
                torch.testing.assert_close(found, expected)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("estimate", ESTIMATES)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_tangent_is_refused_after_any_number_of_right_calls(estimate, backend, device) -> None:
    function, x = ESTIMATES[estimate], steps(device)
    with kernels.use_backend(backend), forward_ad.dual_level():
        dual = forward_ad.make_dual(x["value"], x["reward"])
        for _ in range(2):
            function(**x)
            with pytest.raises(RuntimeError, match=r"jvp|forward"):
                function(**x | {"value": dual})


def test_whether_an_operator_runs_plainly_is_remembered_of_its_tensors_alone() -> None:
    for _ in range(3):
        assert dispatch.runs_plainly("a", [MATRIX, 0.5])
        assert not dispatch.runs_plainly("a", [OTHERS["a subclass"], 0.5])
        assert not dispatch.runs_plainly("a", [OTHERS["negated memory"], 0.5])
        assert not dispatch.runs_plainly("a", [OTHERS["another device"], 0.5])
        with Mode():
            assert not dispatch.runs_plainly("a", [MATRIX, 0.5])
        with torch.profiler.profile():
            assert not dispatch.runs_plainly("a", [MATRIX, 0.5])


class FunctionMode(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_nothing_runs_plainly_where_functions_are_watched_traced_or_transformed() -> None:
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        assert not dispatch.runs_plainly("a", [MATRIX, 0.5])
        return 2 * x

    assert dispatch.runs_plainly("a", [MATRIX, 0.5])
    with FunctionMode():
        look(MATRIX)
    torch.jit.trace(look, MATRIX, check_trace=False)
    torch.func.vmap(look)(MATRIX)
    assert dispatch.runs_plainly("a", [MATRIX, 0.5])
    assert not dispatch.runs_plainly("a", [seen[-1], 0.5]), "nor of what has outlived a transform"


def test_a_negative_threshold_is_refused_after_any_number_of_right_calls(device) -> None:
    x = steps(device)
    for _ in range(2):
        ESTIMATES["vtrace"](**x)
        with pytest.raises(ValueError, match="c_thresh is -1"):
            kernels.vtrace(0.9, x["reward"], None, **x, c_thresh=-1.0)
