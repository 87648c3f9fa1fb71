"""The benchmarks compare equals, refuse wrong results, and publish what they measured."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

pytest.importorskip("torchrl")

from bench import __main__ as command
from bench import (  # after the check
    cases,
    counting,
    launches,
    losses,
    measuring,
    projection,
    readme,
    scans,
    tables,
    updates,
)
from bench.__main__ import SUITES, measure
from bench.profile.__main__ import main as profile

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def _eager(monkeypatch):
    """What the compiled peers compute, without the half minute that compiling takes."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.usefixtures("_eager")
@pytest.mark.parametrize("layout", scans.LAYOUTS)
@pytest.mark.parametrize("steps", [1, 12, 37])
@pytest.mark.parametrize("name", scans.OPERATORS)
def test_the_scans_of_all_arms_are_the_loops(name, steps, layout) -> None:
    case = scans.case(name, 3, steps, CPU, layout)
    assert {*case.arms, *case.absent} >= {"fusedrl", "torchrl", "compiled_loop"}
    cases.refuse_if_wrong(case)


@pytest.mark.usefixtures("_eager")
def test_a_long_scan_is_compared_at_both_ends(monkeypatch) -> None:
    monkeypatch.setattr(scans, "CHECKED_STEPS", 1024)
    case = scans.case("vtrace", 2, 3000, CPU)
    assert case.wanted["output 0"].shape == (2, 1024, 1)
    assert case.wanted["the gradient of reward"].shape == (2, 512, 1)
    cases.refuse_if_wrong(case)


def test_of_a_long_scan_on_a_gpu_the_loop_takes_fewer_rows_and_steps() -> None:
    cuda = torch.device("cuda")
    assert scans.checked(4096, CPU) == scans.checked(128, cuda) == (64, 4096)
    assert scans.checked(4096, cuda) == (8, 1024)


@pytest.mark.usefixtures("_eager")
def test_on_a_gpu_loops_of_eight_steps_are_compiled_and_v_trace_loops_over_short_horizons(monkeypatch) -> None:
    monkeypatch.setattr(scans, "_why_not_accelerated_scan", lambda *_: "compiles its source, or isn't installed")
    found = {"compiled_loop": set(), "torchrl": set()}
    for rows, steps in scans.GPU_GRID:
        for name, operator in scans.OPERATORS.items():
            with FakeTensorMode():
                data = [torch.empty(rows, steps, 1, device="cuda") for _ in operator.inputs]
                case = cases.Case(name, {"B": rows, "T": steps}, {}, shown=dict, expected=dict, bytes_moved={})
                scans._add_peers(case, operator, data)
            for peer, some in found.items():
                assert (peer in case.arms) != (peer in case.absent)
                some |= {(name, steps)} if peer in case.arms else set()
    assert found["compiled_loop"] == {(name, 8) for name in ("gae", "td_lambda", "reward_to_go", "reverse_scan")}
    assert max(steps for name, steps in found["torchrl"] if name == "vtrace") == 128
    assert ("gae", 1 << 24) in found["torchrl"]


def test_the_c51_losses_transitions_know_their_device() -> None:
    data = projection.transitions(3, CPU)
    assert data.device == data["next"].device == CPU


@pytest.mark.usefixtures("_eager")
def test_the_categorical_losses_of_all_arms_agree_with_the_loop_over_atoms() -> None:
    case = projection.case(70, CPU)
    assert set(case.arms) == {"fusedrl", "operator", "torchrl", "compiled_textbook"}
    cases.refuse_if_wrong(case)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_a_loss_and_its_gradients_are_those_of_torchrl(name) -> None:
    case = losses.case(name, 8, CPU)
    assert sum(key.startswith("the gradient") for key in case.wanted) >= 4
    cases.refuse_if_wrong(case)


def wrong_value(outputs):
    return [outputs[0] * 1.01, *outputs[1:]]


def wrong_gradient(outputs):
    # The value stays, bit by bit, and its gradient is a hundredth larger.
    return [outputs[0] + 0.01 * (outputs[0] - outputs[0].detach()), *outputs[1:]]


def wrong_shape(outputs):
    return [outputs[0].unsqueeze(0), *outputs[1:]]


def not_a_number(outputs):
    return [outputs[0] * float("nan"), *outputs[1:]]


@pytest.mark.parametrize("defect", [wrong_value, wrong_gradient, not_a_number])
@pytest.mark.parametrize(
    "build",
    [
        lambda: scans.case("gae", 3, 7, CPU, peers=False),
        lambda: projection.case(5, CPU, peers=False),
        lambda: losses.case("DQNLoss", 5, CPU, peers=False),
    ],
    ids=["scan", "projection", "loss"],
)
def test_a_wrong_arm_is_not_timed(build, defect) -> None:
    case = build()
    name, arm = next(iter(case.arms.items()))
    case.arms["wrong"] = replace(arm, forward=lambda: defect(arm.forward()), recorded=lambda: defect(arm.recorded()))
    cases.refuse_if_wrong(case, [name])
    with pytest.raises(cases.WrongResult, match="wrong"):
        measure(case, CPU, 0.01)


def test_an_arm_whose_forward_alone_is_wrong_is_not_timed() -> None:
    case = scans.case("reward_to_go", 3, 7, CPU, peers=False)
    case.arms["fusedrl"] = replace(case.arms["fusedrl"], forward=lambda: wrong_shape(case.arms["fusedrl"].recorded()))
    with pytest.raises(cases.WrongResult, match="shape"):
        measure(case, CPU, 0.01)


@pytest.mark.parametrize("name", updates.UPDATES)
def test_an_update_leads_where_torchrls_does_and_is_not_timed_if_it_leads_elsewhere(name, monkeypatch) -> None:
    monkeypatch.setitem(updates.SIZES, "cpu", {"ppo": (8, 8), "sac": (32,)})
    case = updates.UpdateCase(name, CPU)
    updates.refuse_if_wrong(case)
    assert set(case.arms) | set(case.absent) == {"fusedrl", "torchrl", "captured"}
    update, run = case.arms["fusedrl"]
    learning_rate = update.optimizer.param_groups[0]["lr"]
    update.optimizer.param_groups[0]["lr"] = 1.05 * learning_rate
    with pytest.raises(cases.WrongResult, match="off by"):
        updates.measure(case, CPU, 0.01)
    update.optimizer.param_groups[0]["lr"] = learning_rate
    # The same again, although parameters and the optimiser's state have changed.
    torch.testing.assert_close(update.moved_by_one(run), update.moved_by_one(run), rtol=0, atol=0)


# What the forward of each may launch on a GPU beside networks and distributions. Fewer are welcome.
LAUNCHES = {
    "ClipPPOLoss": 7,
    "A2CLoss": 9,
    "DQNLoss": 7,
    "DistributionalDQNLoss": 7,
    "SACLoss": 8,
    "TD3Loss": 11,
    "REDQLoss": 19,
    "IQLLoss": 20,
}
# What the forward of each may ask of PyTorch on the `torch` backend, counted likewise.
OPERATIONS = {
    "ClipPPOLoss": 40,
    "A2CLoss": 9,
    "DQNLoss": 9,
    "DistributionalDQNLoss": 32,
    "SACLoss": 19,
    "TD3Loss": 16,
    "REDQLoss": 24,
    "IQLLoss": 24,
}


def test_no_loss_launches_more_on_a_gpu_than_it_has_to() -> None:
    if not launches.counted():
        pytest.skip("Triton's interpreter fails on this machine with a CUDA device")
    found = {name: x["fusedrl"] for name, x in launches.counted().items()}
    assert found.keys() == LAUNCHES.keys()
    assert {name: n for name, n in found.items() if n > LAUNCHES[name]} == {}


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_loss_asks_for_more_operations_than_it_has_to(name) -> None:
    ours, theirs = (losses.operations(name, library).operations.total() for library in ("fusedrl", "torchrl"))
    assert ours <= OPERATIONS[name]
    assert ours < theirs


def test_launches_that_cant_be_counted_are_missing_with_a_gpu_and_an_error_without(monkeypatch, capsys) -> None:
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback\nTypeError: only 0-dimensional arrays\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    count = launches.counted.__wrapped__
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert count() == {}
    assert "not counted, Triton's interpreter fails here: TypeError: only 0-d" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(subprocess.CalledProcessError):
        count()
    assert "Traceback" in capsys.readouterr().err


def test_the_table_of_losses_shows_launches_where_they_were_counted() -> None:
    arms = {"fusedrl": {"both_ms": 1.0}, "torchrl": {"both_ms": 2.0}}

    def row(name, launched):
        counts = [{"operations": 4, "launches": n, "waits": 0} for n in launched]
        return {"case": name, "arms": arms, "dispatched": dict(zip(("fusedrl", "torchrl"), counts, strict=True))}

    some = tables.losses([row("A", (1, 4)), row("B", (None, None))]).splitlines()
    assert some[-2] == "| `B` | 1, 2, **0.50** | 4, 4, **1.00** | – | 0, 0 |"
    assert some[-1] == "| geometric mean | **0.50** | **1.00** | **0.25** |  |"
    assert tables.losses([row("B", (None, None))]).endswith("| geometric mean | **0.50** | **1.00** | – |  |")


@pytest.fixture
def arm(monkeypatch):
    """Makes arms that take as many seconds as they say, and write down that they were called."""
    now, calls = [0.0], []
    monkeypatch.setattr(measuring, "timer", lambda: now[0])

    def make(name, seconds):
        def run() -> None:
            calls.append(name)
            now[0] += seconds

        return run

    make.calls = calls
    return make


def test_arms_take_turns_with_the_clock_and_a_slow_one_has_one_call(arm) -> None:
    times = measuring.seconds({"a": arm("a", 1e-3), "slow": arm("slow", 2.5), "b": arm("b", 2e-3)}, 0.06, 3)
    assert times == pytest.approx({"a": 1e-3, "slow": 2.5, "b": 2e-3})
    assert arm.calls.count("slow") == 1
    turns = [name for name, before in zip(arm.calls[1:], arm.calls, strict=False) if name != before]
    assert turns == ["slow", "b", "a", "b", "a", "b", "a", "b", "a", "b"]
    # Four to see how long a call takes, and rows of five milliseconds or a little more.
    assert 4 + 60 <= arm.calls.count("a") <= 4 + 60 + 3 * 5
    assert 4 + 30 <= arm.calls.count("b") <= 4 + 30 + 3 * 3


def test_an_arm_that_takes_more_than_its_budget_has_one_call_per_round(arm) -> None:
    assert measuring.seconds({"a": arm("a", 1.0)}, 0.5, 2) == {"a": 1.0}
    assert len(arm.calls) == 4 + 2


@pytest.mark.usefixtures("_eager")
def test_on_a_gpu_the_device_is_timed_for_our_own_arm_in_a_graph_and_for_the_faster_copy(monkeypatch) -> None:
    graphs = []
    monkeypatch.setattr(command, "captured", lambda run: graphs.append(run) or (lambda: None))
    times = cycle((6e-6, 9e-6, 8e-6, 6e-6, 8e-6, 9e-6))  # ours, and copies outside of a graph and in one
    monkeypatch.setattr(command, "device_seconds", lambda run: next(times))
    monkeypatch.setattr(command, "peak_bytes", lambda *_: 0)
    case = scans.case("gae", 2, 8, CPU)
    row = measure(case, SimpleNamespace(type="cuda"), 0.0, 1)
    assert graphs[::2] == [case.arms["fusedrl"].forward, case.arms["fusedrl"].both]
    assert len(graphs) == 4
    assert (row["forward_device_us"], row["both_device_us"]) == (6.0, 6.0)
    assert row["fraction_of_copy_forward"] == row["fraction_of_copy_both"] == round(8 / 6, 4)
    assert all({"forward_ms", "both_ms", "peak_mib"} == set(arm) for arm in row["arms"].values())
    assert "| GAE | 2×8 | [B, T] | 6, **133%** | 6, **133%** |" in tables.of("scans", {"rows": [row]})


def test_both_layouts_count_in_the_table_of_scans() -> None:
    def row(layout, theirs):
        arms = {
            arm: {"forward_ms": ms, "both_ms": ms, "peak_mib": 1} for arm, ms in (("fusedrl", 1), ("torchrl", theirs))
        }
        return {"case": "gae", "B": 2, "T": 8, "layout": layout, "arms": arms}

    rows = [row("[B, T]", 2.0), row("[T, B]", 8.0)]
    assert "**4.0** (2 at 2×8)" in tables.scans(rows)
    assert "| 2×8 [T, B] | 1, 8, **8.0** |" in tables.gae_by_shape(rows)


def test_an_update_in_a_graph_has_no_peak(monkeypatch) -> None:
    monkeypatch.setattr(updates, "refuse_if_wrong", lambda _: None)
    arms = dict.fromkeys(("fusedrl", "torchrl", "captured"), (None, partial(time.sleep, 1e-3)))
    row = updates.measure(SimpleNamespace(name="ppo", sizes=(4, 8), arms=arms), CPU, 0.0, 1)
    assert set(row["arms"]["captured"]) == {"both_ms"}
    assert "| –, 0, 0 |" in tables.updates([row])


def test_a_kernel_counts_as_one_operation_and_none_where_it_is_hidden() -> None:
    class Kernels:
        def launch(self) -> torch.Tensor:
            return torch.ones(2) + 1

        def distribution(self) -> torch.Tensor:
            return self.launch()

    kernels = Kernels()
    counted = counting.count(
        lambda: (kernels.launch() * 2, kernels.distribution()), [(Kernels, "distribution")], [(Kernels, "launch")]
    )
    assert counted.operations == {"kernel": 1, "mul": 1}


def test_what_a_call_dispatches_is_counted_by_kind() -> None:
    x = torch.arange(4.0)

    def run() -> None:
        y = (x + 1).view(2, 2).exp()
        y[y > 2].sum().item()

    found = counting.count(run)
    assert found.operations == {"add": 1, "exp": 1, "gt": 1, "index": 1, "sum": 1, "_local_scalar_dense": 1}
    assert found.views == {"view": 1}
    assert found.waits == {"index with a mask": 1, "_local_scalar_dense": 1}


def test_the_inside_of_our_operators_is_counted() -> None:
    case = scans.case("reward_to_go", 2, 64, CPU, peers=False)
    arm = case.arms["fusedrl"]
    forward, both = counting.count(arm.forward), counting.count(arm.both)
    assert forward.operations["mul"] >= 6  # one per doubling, of which 64 steps need six
    assert both.operations["mul"] >= 2 * forward.operations["mul"]
    assert not any("recurrence" in name for name in both.operations)


def test_what_is_hidden_is_not_counted() -> None:
    class Network(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x).tanh()

    network = Network(2, 2)
    found = counting.count(lambda: network(torch.ones(1, 2)).exp(), [(Network, "forward")])
    assert found.operations == {"ones": 1, "exp": 1}
    assert network(torch.ones(1, 2)).shape == (1, 2)


@pytest.mark.parametrize("library", losses.LIBRARIES)
def test_networks_and_distributions_are_left_out_of_a_losses_operations(library) -> None:
    some = losses.operations("SACLoss", library)
    everything = losses.operations("SACLoss", library, everything=True)
    assert {"tanh", "addmm", "normal", "normal_"} & set(everything.operations)
    assert not {"tanh", "addmm", "baddbmm", "softplus", "log1p", "normal", "normal_"} & set(some.operations)


@pytest.mark.usefixtures("_eager")
def test_results_come_back_from_their_file_as_the_tables_that_were_printed(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(measuring, "RESULTS", tmp_path)
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    built = {
        "scans": [scans.case("gae", 2, 8, CPU), scans.case("reverse_scan", 2, 8, CPU)],
        "projection": [projection.case(4, CPU)],
        "updates": [updates.UpdateCase("sac", CPU)],
        "losses": [losses.case("DQNLoss", 4, CPU)],
    }
    for suite, some in built.items():
        measured_by = SUITES[suite].measure
        results = measuring.describe(CPU) | {"rows": [measured_by(case, CPU, 0.01, 1) for case in some]}
        path = measuring.write_results(results, CPU, f"{suite}_")
        assert json.loads(path.read_text()) == results
        assert tables.of(suite, results) in readme.of_suite(suite)()
    ours, theirs = (results["rows"][0]["arms"][arm]["both_ms"] for arm in ("fusedrl", "torchrl"))
    assert f"**{ours / theirs:.2f}**" in tables.of("losses", results)


def test_a_gpus_results_fill_the_list_of_targets(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert readme.gpu_targets().count("not measured yet") == len(readme.TARGETS)
    arms = {"fusedrl": {"forward_ms": 0.0095, "both_ms": 0.02}, "torchrl": {"both_ms": 0.5}}
    rows = [
        {"case": "gae", "B": b, "T": t, "layout": layout, "arms": arms}
        | {"fraction_of_copy_forward": fraction, "fraction_of_copy_both": fraction / 2}
        for b, t, layout, fraction in [
            (4096, 128, "[B, T]", 0.3),
            (8192, 2048, "[B, T]", 0.9),
            (524288, 32, "[B, T]", 0.96),
            (1, 1 << 24, "[B, T]", 0.5),
            (65536, 32, "[T, B]", 0.8),
        ]
    ]
    (tmp_path / "scans_some_gpu.json").write_text(json.dumps({"machine": "Some GPU", "rows": rows}))
    arms = {"fusedrl": {"both_ms": 4.0}, "captured": {"both_ms": 1.0}, "torchrl": {"both_ms": 7.0}}
    row = {"case": "ppo", "B": 4096, "T": 32, "arms": arms}
    (tmp_path / "updates_some_gpu.json").write_text(json.dumps({"machine": "Some GPU", "rows": [row]}))
    table = readme.gpu_targets()
    assert "Some GPU" in table
    assert "7× at 4096×32" in table
    assert "B ≫ T: 90% to 96% forward, 45% to 48% with backward; T ≫ B: 50% to 50% forward" in table
    assert "9.5 µs [B, T]" in table
    assert "80% at 65536×32" in table
    assert table.count("not measured yet") == len(readme.TARGETS) - 4


def test_the_host_cost_table_has_a_row_for_each_function(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert readme.host_cost() == "Not measured yet."
    rows = [
        {"function": name, "mode": mode, "us": 30.0, "bare_us": 24.0, "ratio": 1.25}
        for name in ("gae", "td_lambda_return")
        for mode in ("forward", "forward + backward")
    ]
    of = {"machine": "a CPU", "threads": 1, "versions": {"torch": "2.13"}, "date": "2026-11-27", "commit": "abc"}
    (tmp_path / "host_cost_cpu.json").write_text(json.dumps({"rows": rows, **of}))
    head, _, *lines, _, state = readme.host_cost().splitlines()
    assert state == "(a CPU, 1 thread; torch 2.13; 2026-11-27 at abc.)"
    assert head == "| µs, bare µs, ratio | forward | forward + backward |"
    assert lines[0] == "| `gae` | 30.0, 24.0, **1.25** | 30.0, 24.0, **1.25** |"
    assert len(lines) == 2


def test_the_readme_has_a_place_for_every_generated_part() -> None:
    text = (ROOT / "README.md").read_text()
    with pytest.raises(ValueError, match="places"):
        readme.render(text.replace("<!-- bench: losses -->", ""))
    assert readme.render(text.replace("sm_90 takes", "sm_90 takes only")) == readme.render(text)


def test_the_profile_command_prints_a_table_and_writes_traces_and_a_roofline(tmp_path) -> None:
    command = [sys.executable, "-m", "bench.profile", "gae", "--device", "cpu", "--shape", "2x8", "3x16"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--budget", "0.01", "--output", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for words in ("2x8", "3x16", "fwd+bwd", "On a CPU", "no device time"):
        assert words in " ".join(done.stdout.split())
    for shape in ("2x8", "3x16"):
        for direction in ("forward", "both"):
            events = json.loads((tmp_path / f"gae-{shape}-{direction}.trace.json").read_text())["traceEvents"]
            assert sum(event.get("name") == "fusedrl::recurrence" for event in events) == 3
    assert (tmp_path / "gae.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["categorical", "DQNLoss"])
def test_losses_can_be_profiled(name, tmp_path, capsys) -> None:
    assert profile([name, "--shape", "4", "--budget", "0.01", "--output", str(tmp_path)]) == 0
    assert name in capsys.readouterr().out
    assert {p.name for p in tmp_path.iterdir()} == {
        f"{name}.png", f"{name}-4-forward.trace.json", f"{name}-4-both.trace.json"
    }  # fmt: skip


def test_profiles_with_other_options_have_files_of_their_own(tmp_path, capsys) -> None:
    for options in ([], ["--layout", "time-major", "--dtype", "float64"], ["--backend", "reference"]):
        assert profile(["td1", "--shape", "2x8", "--budget", "0.01", "--output", str(tmp_path), *options]) == 0
    names = ("td1", "td1-time-major-float64", "td1-reference")
    assert {p.name for p in tmp_path.glob("*.png")} == {f"{name}.png" for name in names}
    assert {p.name for p in tmp_path.glob("*-both*")} == {f"{name}-2x8-both.trace.json" for name in names}


def test_a_wrong_result_is_not_profiled(tmp_path, monkeypatch, capsys) -> None:
    operator = scans.OPERATORS["td1"]
    monkeypatch.setitem(scans.OPERATORS, "td1", replace(operator, fusedrl=lambda *x: 1.01 * operator.fusedrl(*x)))
    assert profile(["td1", "--shape", "2x8", "--output", str(tmp_path)]) == 1
    assert "is wrong by" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "say what to profile: gae, td_lambda"),
        (["gea", "--shape", "2x8"], "nothing named 'gea'"),
        (["SACLoss", "--shape", "8", "--dtype", "float64"], "SACLoss has no --dtype"),
        (["categorical", "--shape", "8", "--layout", "time-major"], "categorical has no --layout"),
        (["gae"], "needs --shape BxT"),
        (["gae", "--shape", "8"], "a shape is BxT, positive numbers such as 4096x128, not '8'"),
        (["gae", "--shape", "2x0"], "not '2x0'"),
        (["SACLoss", "--shape", "2x8"], "a shape is B, positive numbers such as 4096, not '2x8'"),
        (["gae", "--shape", "2x8", "--device", "tpu"], "--device: 'tpu' is neither cpu nor a CUDA device"),
        (["gae", "--shape", "2x8", "--device", "cuda:99"], "--device: 'cuda:99' is neither"),
        (["gae", "--shape", "2x8", "--budget", "0"], "--budget: '0' is not a positive number of seconds"),
        (["gae", "--shape", "2x8", "--budget", "nan"], "--budget: 'nan' is not"),
        (["gae", "--shape", "2x8", "--output", f"{__file__}/out"], "Not a directory"),
    ],
)
def test_what_cant_be_profiled_is_said(arguments, words, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        profile(arguments)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_everything_that_can_be_profiled_is_listed(capsys) -> None:
    assert profile(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(f"{name} --shape" in listed for name in (*scans.OPERATORS, "categorical", *losses.LOSSES))


def test_scripts_in_bench_find_the_profile_of_the_standard_library() -> None:
    source = "import sys; sys.path.insert(0, sys.argv[1]); import cProfile; cProfile.Profile(); cProfile.run('1')"
    subprocess.run([sys.executable, "-c", source, str(ROOT / "bench")], capture_output=True, check=True)


def test_suites_are_collected_only_where_they_are_asked_for() -> None:
    # Without what tells a worker of pytest-xdist that it is one.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "bench"]
    done = subprocess.run(
        [*command, "-k", "A2C and forward", "--benchmark-max-time=0.01", "--benchmark-min-rounds=1"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "2 passed" in done.stdout, done.stdout
    assert "benchmark 'A2CLoss 32, forward': 2 tests" in done.stdout
