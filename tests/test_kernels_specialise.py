"""Every way in which a launch specialises the kernels' arguments compiles for a GPU, without one at hand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

COMPILE = """
import itertools
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fusedrl.kernels.scan_kernel import scan_kernel

FLOATS = ("reward", "value", "next_value", "y", "target", "grad_y", "grad_target", "grad_gamma", "grad_lmbda",
          "grad_reward", "grad_value", "grad_next_value")

def compile_with(*, steps, rows, inner, index, contiguous, adjoint, scalars, kind, split=1, compose=False):
    constants = {"KIND": kind, "ADJOINT": adjoint, "DTYPE": tl.float32, "INDEX": index, "TILE_ROWS": 4,
                 "TIME_IS_CONTIGUOUS": contiguous, "TILE_LANES": 8, "COMPOSE": compose, "PARTS": 1, "SPLIT": split,
                 "SPLIT_POWER": triton.next_power_of_2(split), "BLOCKS": 1}
    names = {"reward", "value", "next_value", "done", "terminated", "y", "target"}
    if adjoint:
        names = (names - {"reward", "target"}) | set(FLOATS[5:])
    if kind == "scan":
        names -= {"value", "next_value", "terminated", "target", "grad_target", "grad_lmbda", "grad_value",
                  "grad_next_value", "done"}
    signature, fixed = {}, {}
    for i, name in enumerate(scan_kernel.arg_names):
        if name in names:
            pointer = "*u1" if name in ("done", "terminated") else "*fp32"
            # One tensor is laid out otherwise than all the others.
            signature[name] = (pointer, "i64", "i32", "i32") if name == "done" else (pointer,)
        elif name == "layout":
            signature[name] = ("i64", "i32", "i32")
        elif name in ("gamma", "lmbda"):
            signature[name] = "fp64"
        elif name in ("gamma_tensor", "lmbda_tensor") and scalars == "0-d":
            signature[name] = ("*fp64", "i32")
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
"""


CATEGORICAL = """
import sys
sys.path.insert(0, sys.argv[1])
import triton.language as tl
from static_variants import Strided, compile_as_launched
from triton.backends.compiler import GPUTarget
from fusedrl.kernels import categorical_kernel
from fusedrl.kernels.categorical_launch import tiling

def compile_with(*, kernel, atoms, actions, strides, member, index, gamma, double, keep, action_type, mask_type, dtype):
    tile = tiling(atoms, actions, 8 if dtype == "fp64" else 4, sources=32)
    compute = tl.float64 if dtype == "fp64" else tl.float32
    pointer = "*" + dtype
    dense = len(strides) == 3 and strides[0] == atoms * actions
    distribution = Strided(pointer, tuple(map(tl.constexpr, strides)) if dense else strides)
    gammas = {"number": None, "0-d": Strided("*fp64", (0,)), "per sample": Strided("*fp32", (member,))}
    projected = None if not keep else pointer if kernel == "projection" else f"*{compute}"
    compile_as_launched(getattr(categorical_kernel, kernel + "_kernel"), {
        "log_prob": distribution, "next_log_prob": distribution, "found": distribution,
        "next_online_log_prob": distribution if double else None, "prob": Strided(pointer, strides[:2]),
        "action": Strided(action_type, (member,)), "support": Strided("*fp32", (member,)),
        "reward": Strided(pointer, (member,)), "terminated": Strided(mask_type, (member,)),
        "grad": Strided(pointer, (member,)), "gamma": "fp64", "gamma_tensor": gammas[gamma], "loss": pointer,
        "projected": projected, "samples": 7, "ATOMS": atoms, "ACTIONS": actions, "DTYPE": compute, "INDEX": index,
        "ACTIONS_POWER": tile.actions_power, "TILE_ATOMS": tile.atoms, "TARGETS": tile.targets, "SOURCES": tile.sources,
        "UNEVEN": 2.0**-22, "ROUNDING": 2.0**-19, "SAMPLES": 4,
    }, GPUTarget("cuda", 90, 32), warps=1)

base = dict(atoms=5, actions=3, strides=(15, 3, 1), member=1, index=tl.int32, gamma="number", double=False, keep=True,
            action_type="*i64", mask_type="*u1", dtype="fp32")
changes = [dict(double=True), dict(keep=False), dict(actions=1, strides=(5, 1, 1)), dict(strides=(15, 1, 5)),
           dict(strides=(1, 21, 7)), dict(strides=(0, 3, 1), member=0), dict(index=tl.int64), dict(gamma="0-d"),
           dict(gamma="per sample", member=3), dict(action_type="*u8", mask_type="*fp32"), dict(mask_type="*i64"),
           dict(dtype="bf16", gamma="0-d"), dict(dtype="fp64", gamma="0-d"), dict(atoms=2, actions=2),
           dict(atoms=64, actions=16, strides=(1024, 16, 1))]
for change in changes:
    compile_with(**{**base, "kernel": "loss", **change})
for change in [{}, dict(index=tl.int64), dict(actions=1, strides=(5, 1, 1)), dict(member=0), dict(dtype="fp16")]:
    compile_with(**{**base, "kernel": "gradient", **change})
for change in [dict(strides=(5, 1)), dict(strides=(1, 7), gamma="0-d"), dict(gamma="per sample"), dict(dtype="bf16")]:
    compile_with(**{**base, "kernel": "projection", **change})
"""


@pytest.mark.parametrize("source", [COMPILE, CATEGORICAL], ids=["scan", "categorical"])
def test_every_specialisation_compiles(source) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    bench = str(Path(__file__).parent.parent / "bench")
    result = subprocess.run(
        [sys.executable, "-c", source, bench], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
