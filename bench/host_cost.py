"""What a call costs on the host, without a GPU: estimators against a bare autograd.Function with a no-op kernel.

    python bench/host_cost.py            measure and print the table
    python bench/host_cost.py --write    ... and write bench/results/host_cost_cpu.json

Kernels are compiled for sm_90 by the real compiler and launched by Triton's own launcher, but the driver underneath
launches nothing (`driver.py`). What is left out is the same for both arms: what the driver does, and that outputs are
allocated by the CPU's allocator, not by CUDA's.

The bare function allocates the outputs that any implementation must, saves its inputs, and launches a kernel of three
pointers that does nothing, once forward and once backward, as one writes it: ``kernel[grid](...)``. The library's own
launches are planned ahead (`fusedrl.kernels.launching`), past that dispatch: it is part of what is compared.

Times are of the thread's own clock, which stands still while others have the processor (though they leave the caches
cold), and the arms take turns. What is compared is the median of the rounds' ratios.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    sys.exit("a kernel for the interpreter is not launched: unset TRITON_INTERPRET")

import torch
import triton
import triton.language as tl
from driver import pretend_that_there_is_a_gpu
from fusedrl.estimators import functional
from measuring import describe, rounded, write_results
from options import count
from rich.console import Console
from rich.table import Table
from torch import Tensor

SHAPE = (64, 128, 1)
LIMIT = 1.5  # times the bare function: the aim, on a machine that does nothing else


@triton.jit
def _nothing(x, y, z, n, BLOCK: tl.constexpr):
    pass


class _Bare(torch.autograd.Function):
    """Three inputs and ``outputs`` outputs, one launch each way."""

    @staticmethod
    def forward(ctx: Any, outputs: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*inputs)
        found = tuple([torch.empty_like(inputs[0]) for _ in range(outputs)])
        _nothing[(64,)](inputs[0], inputs[-1], found[0], 8192, BLOCK=512, num_warps=1)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        found = [torch.empty_like(x) for x in inputs]
        _nothing[(64,)](inputs[0], grads[0], found[0], 8192, BLOCK=512, num_warps=1)
        return None, *found


def cases() -> dict[str, tuple[Callable[..., Any], int, int]]:
    """Each functional as a function of its floating inputs, their number, and that of its outputs."""
    done = torch.zeros(SHAPE, dtype=torch.bool)
    terminated = done.clone()
    masks = done, terminated
    return {
        "vec_generalized_advantage_estimate": (
            lambda v, n, r: functional.vec_generalized_advantage_estimate(0.99, 0.95, v, n, r, *masks), 3, 2
        ),
        "vec_td_lambda_return_estimate": (
            lambda n, r: functional.vec_td_lambda_return_estimate(0.99, 0.95, n, r, *masks), 2, 1
        ),
        "vtrace_advantage_estimate": (
            lambda p, m, v, n, r: functional.vtrace_advantage_estimate(0.99, p, m, v, n, r, *masks), 5, 2
        ),
        "reward2go": (lambda r: functional.reward2go(r, done, 0.99), 1, 1),
    }  # fmt: skip


def arms(estimate: Callable[..., Any], inputs: int, outputs: int, mode: str) -> tuple[Callable[[], Any], ...]:
    """The estimator and the bare function, as functions of nothing."""
    leaves = [torch.randn(SHAPE).requires_grad_(mode != "forward, no gradient") for _ in range(inputs)]
    grads = [torch.randn(SHAPE) for _ in range(outputs)]

    def run(function: Callable[..., Any]) -> Callable[[], Any]:
        if mode != "forward + backward":
            return lambda: function(*leaves)

        def both() -> None:
            found = function(*leaves)
            torch.autograd.grad(found if isinstance(found, tuple) else (found,), leaves, grads)

        return both

    return run(estimate), run(lambda *leaves: _Bare.apply(outputs, *leaves))


def microseconds(run: Callable[[], Any], calls: int) -> float:
    """Of one call, over ``calls`` of them."""
    start = time.thread_time_ns()
    for _ in range(calls):
        run()
    return (time.thread_time_ns() - start) / 1e3 / calls


def measure(name: str, mode: str, rounds: int, calls: int) -> dict[str, Any]:
    """One row of the table."""
    pair = arms(*cases()[name], mode)
    for run in pair:
        microseconds(run, 20)  # compiles
    times = [tuple(microseconds(run, calls) for run in pair) for _ in range(rounds)]
    ours, bare = (statistics.median(x) for x in zip(*times, strict=True))
    ratio = statistics.median(mine / other for mine, other in times)
    return {"function": name, "mode": mode, "us": ours, "bare_us": bare, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the results file")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--rounds", type=count, default=25)
    parser.add_argument("--calls", type=count, default=400, help="per round and arm")
    arguments = parser.parse_args()
    pretend_that_there_is_a_gpu()
    torch.set_num_threads(1)
    modes = ("forward, no gradient", "forward", "forward + backward")
    rows = [measure(name, mode, arguments.rounds, arguments.calls) for name in cases() for mode in modes]
    if arguments.json:
        print(json.dumps(rows))
    else:
        view = Table("function", "mode", "µs", "bare µs", "ratio", title=f"host cost at {SHAPE}, limit {LIMIT}")
        for row in rows:
            view.add_row(row["function"], row["mode"], *(f"{row[k]:.2f}" for k in ("us", "bare_us", "ratio")))
        Console().print(view)
    if arguments.write:
        device = torch.device("cpu")
        results = {**describe(device), "shape": SHAPE, "limit": LIMIT, "rows": [rounded(row) for row in rows]}
        write_results(results, device, "host_cost_")


if __name__ == "__main__":
    main()
