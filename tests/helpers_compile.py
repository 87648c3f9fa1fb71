"""How often `torch.compile` compiles, and why: the checks that every public loss, estimator and function must pass."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._dynamo.utils import clear_compilation_metrics, get_compilation_metrics

# What the default compiler does, which takes operations apart and computes some anew, but for writing the code.
DECOMPOSED = "aot_eager_decomp_partition"
# The same float64 operations, reordered at most.
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


class Compilations:
    """What the compiler did since this was made, from its own records: backends see some graphs more than once."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        clear_compilation_metrics()

    def new(self) -> list[str]:
        """Why each compilation since the last call was made: the guard that failed, and where it comes from."""
        # A backward graph that is compiled when it first runs has a record of its own under the forward graph's id.
        found = {m.compile_id: m for m in reversed(get_compilation_metrics())}
        clear_compilation_metrics()
        return [m.recompile_reason or f"{m.co_name} of {m.co_filename} for the first time" for m in found.values()]


def assert_compiles_once_more_at_most(
    eager: Callable[[Any], Any],
    compiled: Callable[[Any], Any],
    first: Any,
    *others: Any,
    change: Callable[[], None] | None = None,
    prepare: Callable[[int], None] = lambda _: None,
    recompiles: int = 1,
) -> None:
    """The numbers of ``compiled`` are those of ``eager``, and it is compiled for the first data and for the second.

    That is: not again when it is called again, nor after ``change``, nor for data of a third size.

    Args:
        eager: from data to nested dicts and sequences of tensors.
        compiled: the same around what `torch.compile` returned. Not called before.
        first: data.
        others: more data, each of another size.
        change: gives other values to what is to be no part of the compiled code, for ``eager`` and for ``compiled``.
        prepare: called with 0, 1, … before the first, second … of ``others`` is used.
        recompiles: how many compilations the first of ``others`` may cost.

    """
    compilations = Compilations()

    def run(data: Any, allowed: int, occasion: str) -> Any:
        wanted = eager(data)
        torch.testing.assert_close(compiled(data), wanted, **CLOSE)
        new = compilations.new()
        assert len(new) <= allowed, f"compiled {len(new)} times {occasion}, because:\n" + "\n\n".join(new)
        return wanted

    before = run(first, 1, "for the first call")
    run(first, 0, "for the same call again")
    if change is not None:
        change()
        assert differs(run(first, 0, "for other coefficients"), before), "nothing depends on what was changed"
    for i, data in enumerate(others):
        prepare(i)
        run(data, recompiles if i == 0 else 0, f"for data of another size, number {i + 2}")


def traced_once(module: torch.nn.Module) -> torch.nn.Module:
    """``module``, whose 0-d float64 buffers (γ, λ) are float32 from now on: half the time to compile, on a CPU.

    There the compiler first takes such a tensor for a Python number and then traces all anew. `test_every_estimator`
    compiles with γ and λ as they are kept.
    """
    for part in module.modules():
        for name, x in part.named_buffers(recurse=False):
            if x.ndim == 0 and x.dtype == torch.float64:
                part._buffers[name] = x.float()  # to assign one writes it in place
    return module


def differs(a: Any, b: Any) -> bool:
    """Whether any tensor of one structure isn't that of the other."""
    if isinstance(a, torch.Tensor):
        return not torch.equal(a, b)
    pairs = ((a[key], b[key]) for key in a) if isinstance(a, dict) else zip(a, b, strict=True)
    return any(differs(x, y) for x, y in pairs)


def gradient(outputs: Iterable[torch.Tensor], inputs: Iterable[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Of a sum of all outputs that have one, each with a weight of its own, with respect to ``inputs``.

    One backward pass, as compiled code wants it: a second would need buffers that the first has reused.
    """
    inputs = list(inputs)
    differentiable = [x for x in outputs if x.requires_grad]
    if not inputs or not differentiable:
        return ()
    weights = [torch.arange(1, x.numel() + 1, device=x.device).view(x.shape).to(x.dtype).sqrt() for x in differentiable]
    total = sum((i + 1.25) * (x * w).sum() for i, (x, w) in enumerate(zip(differentiable, weights, strict=True)))
    return torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)
