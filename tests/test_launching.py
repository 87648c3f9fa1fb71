"""Launches that are planned once for each form of their arguments, with a kernel that only notes what it gets."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from fusedrl.kernels import launching
from fusedrl.kernels.launching import Launch, Launcher, Number, Plan, Workspace, scalar, scalar_arguments, strided


class Kernel:
    """Has the arguments x, y, s, t and w, and notes them."""

    arg_names = ("x", "y", "s", "t", "w", "BLOCK")
    pre_run_hooks = ()
    __name__ = "kernel"

    def __init__(self) -> None:
        self.launched = []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launched.append((grid, arguments, options))


@pytest.fixture
def kernel():
    return Kernel()


@pytest.fixture
def planned(kernel):
    """A launcher of x, y and a scalar, and the settings for which it has planned."""
    settings = []

    def plan(setting, x, y, s):
        settings.append(setting)
        if setting == "impossible":
            return None
        workspace = Workspace(3, torch.float64, zeros=True)
        arguments = [strided(x), y, *scalar_arguments(s), workspace]
        return Plan([Launch(kernel, len(x), arguments, BLOCK=block) for block in (1, 2)], [workspace])

    return Launcher(plan), settings


def test_a_call_launches_on_its_own_tensors_and_numbers(kernel, planned) -> None:
    launcher, settings = planned
    for number in (0.5, 0.25):
        x, y = torch.randn(2, 4, 5)
        assert launcher("a", x, y, number)
        first, second = kernel.launched[-2:]
        for grid, (given_x, given_y, given_number, tensor, workspace), options in (first, second):
            assert grid == (4,)
            assert given_x[0] is x
            assert given_x[1:] == (5, 1)
            assert given_y is y
            assert given_number == number
            assert tensor is None
            assert workspace.dtype == torch.float64
            assert workspace.tolist() == [0, 0, 0]
            assert options["BLOCK"] == (1 if options is first[2] else 2)
        assert first[1][4] is second[1][4], "the launches of a call share their workspace"
    assert settings == ["a"]
    assert kernel.launched[0][1][4] is not kernel.launched[2][1][4]


def test_a_tensor_that_is_passed_twice_may_be_two_in_the_next_call(kernel, planned) -> None:
    launcher, settings = planned
    x, y = torch.randn(2, 4, 5)
    launcher("a", x, x, 0.5)
    launcher("a", x, y, 0.5)
    assert settings == ["a"]
    assert kernel.launched[-1][1][0][0] is x
    assert kernel.launched[-1][1][1] is y


FIRST, SECOND = torch.zeros(2, 4, 5)
FORMS = {
    "another setting": ("b", FIRST, SECOND, 0.5),
    "another dtype": ("a", FIRST, FIRST.double(), 0.5),
    "another shape": ("a", torch.zeros(5, 4), torch.zeros(5, 4), 0.5),
    "another shape of the second": ("a", FIRST, torch.zeros(5), 0.5),
    "other strides": ("a", torch.zeros(5, 4).t(), FIRST, 0.5),
    "strides alike in sum": ("a", FIRST, torch.zeros(5, 4).t(), 0.5),
    "nothing": ("a", FIRST, None, 0.5),
    "a tensor for the number": ("a", FIRST, SECOND, torch.tensor(0.5)),
    "no number": ("a", FIRST, SECOND, None),
}


@pytest.mark.parametrize("name", FORMS)
def test_another_form_is_planned_anew(planned, name) -> None:
    launcher, settings = planned
    launcher("a", FIRST, SECOND, 0.5)
    for _ in range(2):
        launcher(*FORMS[name])
        launcher("a", FIRST, SECOND, 0.75)
    assert settings == ["a", FORMS[name][0]]


def test_all_forms_are_told_from_one_another(kernel, planned) -> None:
    launcher, settings = planned
    for _ in range(2):
        for setting, *arguments in FORMS.values():
            launcher(setting, *arguments)
            given = kernel.launched[-1][1]
            assert given[0][0] is arguments[0]
            assert given[0][1:] == arguments[0].stride()
            assert given[1] is arguments[1]
    assert len(settings) == len(FORMS)


def test_where_there_is_no_plan_nothing_is_launched(kernel, planned) -> None:
    launcher, settings = planned
    assert not launcher("impossible", FIRST, SECOND, 0.5)
    assert not launcher("impossible", FIRST, SECOND, 0.5)
    assert settings == ["impossible"]
    assert kernel.launched == []


def test_what_is_neither_tensor_nor_float_is_refused(kernel, planned) -> None:
    launcher, _ = planned
    for number in (1, "1"):
        with pytest.raises(TypeError, match="a launch takes tensors, floats and None, but got "):
            launcher("a", FIRST, SECOND, number)
    assert kernel.launched == []


def test_plans_are_not_kept_without_bound(planned, monkeypatch) -> None:
    monkeypatch.setattr(launching, "_MOST_PLANS", 2)
    launcher, settings = planned
    for name in "abca":
        launcher(name, FIRST, SECOND, 0.5)
    assert settings == ["a", "b", "c", "a"]
    launcher("c", FIRST, SECOND, 0.5)
    assert settings == ["a", "b", "c", "a"]


def test_plans_can_be_forgotten(planned) -> None:
    launcher, settings = planned
    launcher("a", FIRST, SECOND, 0.5)
    Launcher.forget()
    launcher("a", FIRST, SECOND, 0.5)
    assert settings == ["a", "a"]


@pytest.mark.parametrize(
    "arguments",
    [lambda x, y, s: [y, x, s], lambda x, y, s: [x, s, None], lambda x, y, s: [x, y, 0.5], lambda x, y, s: [x, x, s]],
    ids=["in another order", "one is missing", "a number that is fixed", "one twice"],
)
@pytest.mark.parametrize("twice", [False, True])
def test_a_plan_that_takes_other_arguments_is_refused(kernel, arguments, twice) -> None:
    def plan(_, x, y, s):
        return Plan([Launch(kernel, 1, [*arguments(x, y, s), None, None], BLOCK=1)])

    x = torch.zeros(3)
    with pytest.raises(RuntimeError, match="planned by plan don't take what the call brings"):
        Launcher(plan)(None, x, x if twice else torch.zeros(3), 0.5)
    assert kernel.launched == []


def test_a_plan_keeps_no_tensor_alive(kernel) -> None:
    def plan(_, x):
        return Plan([Launch(kernel, 1, [strided(x), None, None, None, None], BLOCK=1)])

    launcher = Launcher(plan)
    x = torch.zeros(3)
    users = torch._C._storage_Use_Count(x.untyped_storage()._cdata)
    launcher(None, x)
    kernel.launched.clear()
    assert torch._C._storage_Use_Count(x.untyped_storage()._cdata) == users


def test_a_scalar_of_any_type_is_a_number_or_a_tensor() -> None:
    like = torch.zeros(2)
    assert type(scalar(1, like)) is float
    assert type(scalar(True, like)) is float
    assert scalar(None, like) is None
    tensor = torch.tensor(0.5, dtype=torch.float64)
    assert scalar(tensor, like) is tensor


def test_a_scalar_goes_where_the_tensors_are() -> None:
    like = torch.zeros(2, device="meta")
    assert scalar(torch.tensor(0.5), like).device == like.device


def test_a_kernel_gets_a_number_and_a_tensor_of_which_one_counts() -> None:
    x = torch.zeros(())
    assert scalar_arguments(0.5) == (0.5, None)
    assert scalar_arguments(None) == (0.0, None)
    assert scalar_arguments(x) == (0.0, x)
    assert scalar_arguments(x, 0, 0) == (0.0, (x, 0, 0))


# --- past Triton's dispatch -------------------------------------------------------------------------------------


class Compiled:
    """What Triton launched: a binary for a GPU, which notes what it is run with."""

    function, packed_metadata = "binary", "metadata"

    def __init__(self, backend) -> None:
        self.metadata = SimpleNamespace(target=SimpleNamespace(backend=backend))
        self.ran = []

    def run(self, *arguments) -> None:
        self.ran.append(arguments)


class CompiledKernel(Kernel):
    backend = "cuda"

    def __getitem__(self, grid):
        def dispatch(*arguments, **options):
            self.launched.append(Compiled(self.backend))
            return self.launched[-1]

        return dispatch


@pytest.fixture
def on_gpu(monkeypatch):
    """A kernel that was compiled, and a launch of it on x, y and a number."""
    monkeypatch.setattr(launching, "_is_known", True)
    monkeypatch.setattr(launching, "current_device", lambda: -1)  # that of tensors on a CPU
    monkeypatch.setattr(launching, "current_stream", lambda device: f"stream of {device}")
    kernel = CompiledKernel()
    return kernel, Launch(kernel, 4, [strided(FIRST), SECOND, Number(), None, 2.0], BLOCK=8)


def test_what_triton_launched_is_launched_again_on_other_tensors_and_numbers(on_gpu) -> None:
    kernel, launch = on_gpu
    launch(-1, [FIRST, SECOND], [0.5])
    (compiled,) = kernel.launched
    for number in (0.25, 0.75):
        x, y = torch.zeros(2, 4, 5)
        launch(-1, [x, y], [number])
        grid_and_hooks = (4, 1, 1, "stream of -1", "binary", "metadata", None, None, None)
        assert compiled.ran.pop() == (*grid_and_hooks, (x.data_ptr(), 5, 1), y.data_ptr(), number, None, 2.0, 8)
    assert kernel.launched == [compiled]


def test_addresses_that_16_does_not_divide_have_a_binary_of_their_own(on_gpu) -> None:
    kernel, launch = on_gpu
    memory = torch.zeros(64, dtype=torch.float64)
    whole, odd = memory[:20].view(4, 5), memory[1:21].view(4, 5)
    assert whole.data_ptr() % 16 == 0
    forms = [(whole, whole), (odd, whole), (whole, odd), (odd, odd)]
    for given in forms:
        launch(-1, given, [0.5])
    assert len(kernel.launched) == len(forms)
    for (x, y), compiled in zip(forms, list(kernel.launched), strict=True):
        launch(-1, [x, y], [0.5])
        assert compiled.ran[0][9][0] == x.data_ptr()
        assert compiled.ran[0][10] == y.data_ptr()
    assert len(kernel.launched) == len(forms)


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (launching, "_is_known", False),
        (launching, "current_device", lambda: 1),
        (launching._runtime, "launch_enter_hook", print),
        (launching._runtime, "launch_exit_hook", print),
        (CompiledKernel, "pre_run_hooks", (print,)),
        (CompiledKernel, "backend", "hip"),
    ],
)
def test_triton_dispatches_what_only_it_knows_to_launch(on_gpu, monkeypatch, owner, name, value) -> None:
    kernel, launch = on_gpu
    monkeypatch.setattr(owner, name, value)
    for _ in range(2):
        launch(-1, [FIRST, SECOND], [0.5])
    assert len(kernel.launched) == 2
    assert not any(compiled.ran for compiled in kernel.launched)
