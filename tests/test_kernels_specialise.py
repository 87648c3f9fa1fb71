"""Every way in which a launch specialises the kernel's arguments compiles for a GPU, without one at hand."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

COMPILE = """
import itertools
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fusedrl.kernels.scan import scan_kernel

FLOATS = ("reward", "value", "next_value", "y", "target", "grad_y", "grad_target", "grad_gamma", "grad_lmbda",
          "grad_reward", "grad_value", "grad_next_value")

def compile_with(*, steps, rows, inner, index, contiguous, adjoint, scalars, kind, split=1, compose=False):
    constants = {"KIND": kind, "ADJOINT": adjoint, "DTYPE": tl.float32, "INDEX": index, "TILE_ROWS": 4,
                 "TIME_IS_CONTIGUOUS": contiguous, "TILE_LANES": 8, "COMPOSE": compose, "SPLIT": split,
                 "SPLIT_POWER": triton.next_power_of_2(split)}
    names = {"reward", "value", "next_value", "done", "terminated", "y", "target"}
    if adjoint:
        names = (names - {"reward", "target"}) | set(FLOATS[5:])
    if kind == "scan":
        names -= {"value", "next_value", "terminated", "target", "grad_target", "grad_lmbda", "grad_value",
                  "grad_next_value", "done"}
    signature, fixed = {}, {}
    for i, name in enumerate(scan_kernel.arg_names):
        if name in names:
            signature[name] = ("*u1" if name in ("done", "terminated") else "*fp32", "i64", "i32", "i32")
        elif name in ("gamma", "lmbda"):
            signature[name] = "fp64"
        elif name in ("gamma_tensor", "lmbda_tensor") and scalars == "0-d":
            signature[name] = ("*fp64", "constexpr", "constexpr", "constexpr")
            fixed |= {(i, j): None for j in (1, 2, 3)}
        elif name in ("gamma_tensor", "lmbda_tensor") and scalars == "per step":
            signature[name] = ("*fp32", "i32", "i32", "i32")
        elif name == "compositions" and split > 1:
            signature[name] = "*fp32"
        elif name in ("rows", "inner", "steps") and dict(rows=rows, inner=inner, steps=steps)[name] != 1:
            signature[name] = "i32"
        else:
            signature[name] = "constexpr"
            fixed[i,] = {"rows": 1, "inner": 1, "steps": 1, **constants}.get(name)
    source = ASTSource(scan_kernel, signature=signature, constexprs=fixed)
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})

base = dict(steps=9, rows=7, inner=1, index=tl.int32, contiguous=True, adjoint=False, scalars="number", kind="gae")
changes = [dict(steps=1), dict(rows=1), dict(rows=1, steps=1), dict(inner=3, contiguous=False),
           dict(index=tl.int64), dict(index=tl.int64, contiguous=False), dict(scalars="0-d"), dict(scalars="per step"),
           dict(scalars="0-d", adjoint=True), dict(scalars="per step", adjoint=True, kind="td_lambda"),
           dict(rows=1, split=8, compose=True), dict(rows=1, split=8, index=tl.int64),
           dict(split=8, contiguous=False, adjoint=True), dict(kind="scan", scalars="per step"),
           dict(kind="scan", scalars="per step", adjoint=True), dict(kind="scan", contiguous=False, scalars="0-d")]
for change in changes:
    compile_with(**{**base, **change})
print(len(changes))
"""


def test_every_specialisation_compiles() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "16"
