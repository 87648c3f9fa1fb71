"""Returns and advantages side by side with TorchRL's vectorised functions, in one process.

    python bench/returns.py                  measure on the CPU, or on the CUDA device if there is one
    python bench/returns.py --write          ... and write bench/results/cpu.json, and from it the README's table,
                                             or bench/results/<gpu>.json
    python bench/returns.py --table FILE     print a results file as a Markdown table

On a GPU two more arms run: a compiled loop over time, and a device-to-device copy, whose bandwidth is the ceiling that
the fraction of each kernel refers to. A result is compared with the reference before it is timed.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("RL_WARNINGS", "False")
sys.path.insert(0, str(Path(__file__).parent))  # for those who load this file by its path, as the tests do

import torch
import torchrl.objectives.value.functional as peer
from fusedrl import kernels
from fusedrl.estimators import functional as ours
from measuring import describe, geometric_mean, rounded, seconds, write_readme, write_results
from rich.console import Console
from rich.progress import track
from torch import Tensor

CPU_GRID = [
    (1, 128), (1, 1024), (1, 16384), (1, 131072), (16, 128), (64, 512),
    (256, 1024), (4096, 32), (4096, 128), (64, 4096), (65536, 32),
]  # fmt: skip
GPU_GRID = [(4096, 128), (65536, 32), (8192, 2048), (1, 1 << 24)]
GAMMA, LMBDA = 0.99, 0.95

# name: (ours, TorchRL's), of (value, next value, reward, done, terminated); tensors that a call reads and writes
Estimate = Callable[..., Any]
ESTIMATORS: dict[str, tuple[Estimate, Estimate]] = {
    "GAE": (
        lambda v, nv, r, d, t: ours.vec_generalized_advantage_estimate(GAMMA, LMBDA, v, nv, r, d, t),
        lambda v, nv, r, d, t: peer.vec_generalized_advantage_estimate(GAMMA, LMBDA, v, nv, r, d, t),
    ),
    "TD(λ)": (
        lambda v, nv, r, d, t: ours.vec_td_lambda_return_estimate(GAMMA, LMBDA, nv, r, d, t),
        lambda v, nv, r, d, t: peer.vec_td_lambda_return_estimate(GAMMA, LMBDA, nv, r, d, t),
    ),
    "TD(1)": (
        lambda v, nv, r, d, t: ours.vec_td1_return_estimate(GAMMA, nv, r, d, t),
        lambda v, nv, r, d, t: peer.vec_td1_return_estimate(GAMMA, nv, r, d, t),
    ),
}
BYTES_PER_STEP = {"GAE": 5 * 4 + 2, "TD(λ)": 3 * 4 + 2, "TD(1)": 3 * 4 + 2}  # forward, float32 and two bool masks


def inputs(rows: int, steps: int, device: torch.device, *, time_major: bool, grad: bool) -> tuple[Tensor, ...]:
    """Value, next value, reward, done, terminated: [B, T, 1], in memory [B, T] or [T, B]; trajectories of 50 steps."""
    generator = torch.Generator(device).manual_seed(0)

    def layout(x: Tensor) -> Tensor:
        return (x.t() if time_major else x).unsqueeze(-1)

    shape = (steps, rows) if time_major else (rows, steps)
    floats = [layout(torch.randn(shape, generator=generator, device=device)).requires_grad_(grad) for _ in range(3)]
    done = layout(torch.rand(shape, generator=generator, device=device) < 0.02)
    terminated = done & layout(torch.rand(shape, generator=generator, device=device) < 0.5)
    return (*floats, done, terminated)


def with_backward(estimate: Estimate, arguments: tuple[Tensor, ...]) -> Callable[[], None]:
    """Forward and backward to all inputs that want gradients; GAE through the advantage, as a policy loss would."""
    leaves = [x for x in arguments if x.requires_grad]
    output = _first(estimate(*arguments))
    grad = torch.ones_like(output)

    def run() -> None:
        torch.autograd.grad(_first(estimate(*arguments)), leaves, grad, allow_unused=True)

    return run


def refuse_if_wrong(name: str, arguments: tuple[Tensor, ...]) -> None:
    """Compare ours with the reference loop in float64, on at most 64 rows and 4096 steps."""
    few = tuple(x.detach()[:64, -4096:] for x in arguments)
    with kernels.use_backend("reference"):
        expected = _first(ESTIMATORS[name][0](*(x.double() if x.is_floating_point() else x for x in few)))
    found = _first(ESTIMATORS[name][0](*arguments)).detach()[:64, -4096:]
    error = (found.double() - expected).abs().max().item()
    if not error < 1e-3 * max(1.0, expected.abs().max().item()):
        sys.exit(f"{name} is wrong by {error} on {tuple(arguments[0].shape)}: not timed")


def compiled_loop() -> Estimate:
    """The GAE loop over time, compiled: what a user would write without this library."""

    @torch.compile(dynamic=False)
    def loop(v: Tensor, nv: Tensor, r: Tensor, d: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        delta = r + GAMMA * nv * ~t - v
        keep = GAMMA * LMBDA * ~(d | t)
        advantage = torch.empty_like(delta)
        last = torch.zeros_like(delta[:, 0])
        for i in reversed(range(delta.shape[1])):
            last = delta[:, i] + keep[:, i] * last
            advantage[:, i] = last
        return advantage, advantage + v

    return loop


def measure(device: torch.device, budget: float) -> list[dict[str, Any]]:
    """One row for each shape, layout and estimator."""
    gpu = device.type == "cuda"
    loop = compiled_loop() if gpu else None
    cases = [
        (b, t, major) for b, t in (GPU_GRID if gpu else CPU_GRID) for major in ((False, True) if gpu else (False,))
    ]
    rows = []
    for b, t, time_major in track(cases, description="measuring", console=Console(stderr=True)):
        plain = inputs(b, t, device, time_major=time_major, grad=False)
        trained = inputs(b, t, device, time_major=time_major, grad=True)
        for name, (mine, theirs) in ESTIMATORS.items():
            refuse_if_wrong(name, plain)
            row: dict[str, Any] = {"estimator": name, "B": b, "T": t, "layout": "[T, B]" if time_major else "[B, T]"}
            arms: dict[str, Callable[[], Any]] = {
                "fusedrl": partial(mine, *plain),
                "torchrl": partial(theirs, *plain),
            }
            if gpu:
                source = torch.empty(b * t * BYTES_PER_STEP[name] // 2, dtype=torch.uint8, device=device)
                target = torch.empty_like(source)
                arms["copy"] = partial(target.copy_, source)
                if loop is not None and name == "GAE" and t <= 128:  # compile time grows with T: 15 s at 256
                    arms["compiled_loop"] = partial(loop, *plain)
            for arm, time in seconds(arms, device, budget).items():
                row[f"{arm}_ms"] = time * 1e3
            both = {"fusedrl": with_backward(mine, trained), "torchrl": with_backward(theirs, trained)}
            for arm, time in seconds(both, device, budget).items():
                row[f"{arm}_backward_ms"] = time * 1e3
            row["speedup"] = row["torchrl_ms"] / row["fusedrl_ms"]
            row["speedup_backward"] = row["torchrl_backward_ms"] / row["fusedrl_backward_ms"]
            if gpu:
                row["bytes"] = b * t * BYTES_PER_STEP[name]
                row["fraction_of_copy"] = row["copy_ms"] / row["fusedrl_ms"]
            rows.append(rounded(row))
    return rows


def markdown(results: dict[str, Any]) -> str:
    """The results as the table of the README."""
    rows = results["rows"]
    names = list(ESTIMATORS)
    head = [f"{n}: ms, TorchRL ms, ×" for n in names] + [f"{n} + backward ×" for n in names]
    lines = ["| B×T | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for key in dict.fromkeys((r["B"], r["T"], r["layout"]) for r in rows):
        found = {r["estimator"]: r for r in rows if (r["B"], r["T"], r["layout"]) == key}
        cells = [
            f"{found[n]['fusedrl_ms']:.3g}, {found[n]['torchrl_ms']:.3g}, **{found[n]['speedup']:.1f}**" for n in names
        ]
        cells += [f"{found[n]['speedup_backward']:.1f}" for n in names]
        lines.append(f"| {key[0]}×{key[1]} | " + " | ".join(cells) + " |")
    means = [
        geometric_mean(r[f] for r in rows if r["estimator"] == n)
        for f in ("speedup", "speedup_backward")
        for n in names
    ]
    lines.append("| geometric mean | " + " | ".join(f"**{m:.1f}**" for m in means) + " |")
    return "\n".join(lines)


def _first(x: Any) -> Tensor:
    return x[0] if isinstance(x, tuple) else x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the results file")
    parser.add_argument("--table", type=Path, help="print this results file and measure nothing")
    parser.add_argument("--budget", type=float, default=0.5, help="seconds per arm and case on a CPU")
    arguments = parser.parse_args()
    if arguments.table:
        print(markdown(json.loads(arguments.table.read_text())))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = describe(device) | {"rows": measure(device, arguments.budget)}
    print(markdown(results))
    slowest = min(results["rows"], key=lambda r: r["speedup"])
    print(f"\nslowest point, forward: {slowest['speedup']:.2f}× ({slowest['estimator']} {slowest['B']}×{slowest['T']})")
    if arguments.write:
        path = write_results(results, device)
        if device.type == "cpu":
            write_readme(path.name, markdown(results))


if __name__ == "__main__":
    main()
