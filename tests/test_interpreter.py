"""The functions of Triton's interpreter that the tests replace give the same numbers as Triton's own."""

import os

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels run on a device", allow_module_level=True)


@triton.jit
def _compose(a_first, b_first, a_second, b_second):
    return a_first * a_second, b_second + a_second * b_first


@triton.jit
def _maximum(first, second):
    return tl.maximum(first, second)


@triton.jit
def _place(row, column):
    return row * 8 + column


@triton.jit
def _scans(a, b, composed, greatest, AXIS: tl.constexpr, REVERSE: tl.constexpr):
    at = _place(tl.arange(0, 4)[:, None], tl.arange(0, 8)[None, :])
    _, y = tl.associative_scan((tl.load(a + at), tl.load(b + at)), AXIS, _compose, reverse=REVERSE)
    tl.store(composed + at, y)
    tl.store(greatest + at, tl.associative_scan(tl.load(b + at), AXIS, _maximum, reverse=REVERSE))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("reverse", [False, True])
def test_scans_are_what_tritons_own_are(axis, reverse, monkeypatch) -> None:
    import helpers_interpreter

    def scans() -> tuple[torch.Tensor, torch.Tensor]:
        composed, greatest = torch.full((2, 4, 8), torch.nan, dtype=torch.float64)
        _scans[(1,)](a, b, composed, greatest, AXIS=axis, REVERSE=reverse)
        return composed, greatest

    a, b = torch.randn(2, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    interpreter = helpers_interpreter.interpreter
    replaced = interpreter.ScanOps.generic_scan, interpreter.InterpretedFunction.__call__
    assert not set(replaced) & set(helpers_interpreter.TRITONS)
    found = scans()
    monkeypatch.setattr(interpreter.ScanOps, "generic_scan", helpers_interpreter.TRITONS[0])
    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", helpers_interpreter.TRITONS[1])
    monkeypatch.setattr(interpreter.interpreter_builder, "options", interpreter.InterpreterOptions())
    torch.testing.assert_close(found, scans(), rtol=1e-12, atol=1e-12)
    assert not torch.equal(found[0], b)
