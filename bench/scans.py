"""Returns, advantages and the bare recurrence: ours, TorchRL's vectorised functions, a compiled loop, accelerated-scan.

The loop over time is the reference that every arm is compared with, in float64, and what a user would write without
a library: as a peer it is compiled whole, anew for each shape, where compiling ends in reasonable time.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torchrl.objectives.value.functional as theirs
from fusedrl import kernels
from fusedrl.estimators import functional as ours
from fusedrl.kernels import reference
from torch import Tensor

from bench.cases import Arm, Case, Gradients, Outputs, nbytes

CPU_GRID = [
    (1, 128), (1, 1024), (1, 16384), (1, 131072), (16, 128), (64, 512),
    (256, 1024), (4096, 32), (4096, 128), (64, 4096), (65536, 32),
]  # fmt: skip
# Short horizons, and at least 2²⁴ elements with B ≫ T, with T ≫ B and in one row.
GPU_GRID = [(4096, 128), (32768, 8), (65536, 32), (524288, 32), (8192, 2048), (64, 1 << 18), (1, 1 << 24)]
SUITE_GRID = [(16, 128), (4096, 32), (64, 4096)]
BATCH_MAJOR, TIME_MAJOR = "[B, T]", "[T, B]"
LAYOUTS = (BATCH_MAJOR, TIME_MAJOR)

GAMMA, LMBDA = 0.99, 0.95
# The compiler unrolls the loop: seconds at a few steps, half a minute at 32 on a GPU, minutes at a few hundred.
COMPILED_STEPS = {"cuda": 8, "cpu": 32}
COMPILED_ON_CUDA = ("gae", "td_lambda", "reward_to_go", "reverse_scan")  # TD(1)'s loop is TD(λ)'s
LOOPED_STEPS = {"cuda": 128, "cpu": 4096}  # TorchRL's V-trace is a loop over time
# What of a large result is compared with the loop, which runs on the CPU, for seconds. Most results of a GPU are large,
# and where they have more than LONG steps, less of each is compared, in tenths of a second.
CHECKED_ROWS, CHECKED_STEPS = 64, 4096
LONG, LONG_ROWS = 1024, 8

Function = Callable[..., Any]


def vtrace_loop(log_pi: Tensor, log_mu: Tensor, v: Tensor, nv: Tensor, r: Tensor, d: Tensor, t: Tensor) -> Outputs:
    """Espeholt et al. 2018 (arXiv:1802.01561), equations 1 and 4 with both thresholds 1, one step per iteration."""
    zero = r.new_zeros(())
    next_value = torch.where(t, zero, nv)
    weight = (log_pi - log_mu).exp().clamp(max=1.0)
    error = torch.zeros_like(r[:, 0])
    next_target = next_value[:, -1]
    targets, advantages = [], []
    for i in reversed(range(r.shape[1])):
        ends = d[:, i] | t[:, i]
        delta = r[:, i] + GAMMA * next_value[:, i] - v[:, i]
        error = weight[:, i] * (delta + torch.where(ends, zero, GAMMA * error))
        next_target = torch.where(ends, next_value[:, i], next_target)
        advantages.append(weight[:, i] * (r[:, i] + GAMMA * next_target - v[:, i]))
        next_target = v[:, i] + error
        targets.append(next_target)
    return torch.stack(advantages[::-1], 1), torch.stack(targets[::-1], 1)


@dataclass(frozen=True)
class Operator:
    """A function of time: the names of its inputs (see `inputs`), and who computes it.

    ``saved`` are the inputs that its gradient can't do without; ``keeps_output`` says that it needs the output too.
    """

    inputs: tuple[str, ...]
    fusedrl: Function
    loop: Function
    torchrl: Function | None
    saved: tuple[str, ...]
    keeps_output: bool = False


_STEPS = ("next_value", "reward", "done", "terminated")
_ALONG = {"time_dim": -2}
OPERATORS = {
    "gae": Operator(
        ("value", *_STEPS),
        partial(ours.vec_generalized_advantage_estimate, GAMMA, LMBDA),
        partial(reference.gae, GAMMA, LMBDA, **_ALONG),
        partial(theirs.vec_generalized_advantage_estimate, GAMMA, LMBDA),
        saved=("done", "terminated"),
    ),
    "td_lambda": Operator(
        _STEPS,
        partial(ours.vec_td_lambda_return_estimate, GAMMA, LMBDA),
        partial(reference.td_lambda_return, GAMMA, LMBDA, **_ALONG),
        partial(theirs.vec_td_lambda_return_estimate, GAMMA, LMBDA),
        saved=("done", "terminated"),
    ),
    "td1": Operator(
        _STEPS,
        partial(ours.vec_td1_return_estimate, GAMMA),
        partial(reference.td_lambda_return, GAMMA, 1.0, **_ALONG),
        partial(theirs.vec_td1_return_estimate, GAMMA),
        saved=("done", "terminated"),
    ),
    "reward_to_go": Operator(
        ("reward", "done"),
        partial(ours.reward2go, gamma=GAMMA),
        partial(reference.reward_to_go, GAMMA, **_ALONG),
        partial(theirs.reward2go, gamma=GAMMA),
        saved=("done",),
    ),
    "vtrace": Operator(
        ("log_pi", "log_mu", "value", *_STEPS),
        partial(ours.vtrace_advantage_estimate, GAMMA),
        vtrace_loop,
        partial(theirs.vtrace_advantage_estimate, GAMMA),
        saved=("log_pi", "log_mu", "value", *_STEPS),
        keeps_output=True,
    ),
    "reverse_scan": Operator(
        ("coefficient", "increment"),
        partial(kernels.reverse_scan, **_ALONG),
        lambda coefficient, increment: reference.reward_to_go(
            coefficient, increment, torch.zeros_like(increment, dtype=torch.bool), **_ALONG
        ),
        None,
        saved=("coefficient",),
        keeps_output=True,
    ),
}


def inputs(
    names: Sequence[str],
    rows: int,
    steps: int,
    device: torch.device,
    layout: str = BATCH_MAJOR,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, ...]:
    """Tensors [B, T, 1], in memory [B, T] or [T, B]; trajectories of 50 steps, half of which are cut short."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (rows, steps) if layout == BATCH_MAJOR else (steps, rows)
    done = torch.rand(shape, generator=generator, device=device) < 0.02
    made = {"done": done, "terminated": done & (torch.rand(shape, generator=generator, device=device) < 0.5)}
    for name in names:
        if name == "coefficient":
            made[name] = torch.rand(shape, generator=generator, device=device).to(dtype)
        elif name not in made:
            scale = 0.3 if name.startswith("log_") else 1.0
            made[name] = (scale * torch.randn(shape, generator=generator, device=device)).to(dtype)
    return tuple((made[n] if layout == BATCH_MAJOR else made[n].t()).unsqueeze(-1) for n in names)


def checked(steps: int, device: torch.device) -> tuple[int, int]:
    """How many rows and steps at most are compared with the loop, of a result with ``steps`` steps."""
    return (LONG_ROWS, LONG) if device.type == "cuda" and steps > LONG else (CHECKED_ROWS, CHECKED_STEPS)


def case(
    name: str,
    rows: int,
    steps: int,
    device: torch.device,
    layout: str = BATCH_MAJOR,
    dtype: torch.dtype = torch.float32,
    *,
    peers: bool = True,
) -> Case:
    """``name`` on ``rows`` environments for ``steps`` steps; without ``peers`` the arm of ours alone."""
    operator = OPERATORS[name]
    data = inputs(operator.inputs, rows, steps, device, layout, dtype)
    part = checked(steps, device)
    outputs = as_tuple(operator.fusedrl(*data))
    leaves = [x for x in data if x.is_floating_point()]
    saved = [x for n, x in zip(operator.inputs, data, strict=True) if n in operator.saved]
    forward = nbytes((*data, *outputs))
    kept = outputs[:1] if operator.keeps_output else ()
    found = Case(
        name,
        {"B": rows, "T": steps},
        {"fusedrl": _arm(operator.fusedrl, data)},
        shown=partial(_shown, operator, part),
        expected=partial(_expected, operator, part, data),
        # Backward reads the gradient of the first output and what it can't do without, and writes a gradient per input.
        bytes_moved={"forward": forward, "both": forward + nbytes((outputs[0], *saved, *kept, *leaves))},
        layout=layout,
        tolerance=1e-3 if dtype in (torch.float32, torch.float64) else 5e-2,
    )
    if peers:
        _add_peers(found, operator, data)
    return found


def cases(device: torch.device) -> Iterator[Case]:
    """The grid of the published tables."""
    gpu = device.type == "cuda"
    for rows, steps in GPU_GRID if gpu else CPU_GRID:
        for layout in LAYOUTS if gpu else LAYOUTS[:1]:
            for name in OPERATORS:
                yield case(name, rows, steps, device, layout)


def as_tuple(outputs: Any) -> Outputs:
    """One output as a tuple of one."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _arm(function: Function, data: Sequence[Tensor]) -> Arm:
    leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in data]
    trained = [x for x in leaves if x.requires_grad]
    cotangent = torch.ones_like(trained[0])
    return Arm(lambda: as_tuple(function(*data)), lambda: as_tuple(function(*leaves)), trained, cotangent)


def _add_peers(found: Case, operator: Operator, data: Sequence[Tensor]) -> None:
    steps, kind = found.shape["T"], data[0].device.type
    if operator.torchrl is None:
        found.absent["torchrl"] = "TorchRL has no such function"
    elif found.name == "vtrace" and steps > LOOPED_STEPS[kind]:
        found.absent["torchrl"] = f"a loop over more than {LOOPED_STEPS[kind]} steps"
    else:
        found.arms["torchrl"] = _arm(operator.torchrl, data)
    if steps > COMPILED_STEPS[kind]:
        found.absent["compiled_loop"] = f"compiling a loop of more than {COMPILED_STEPS[kind]} steps takes too long"
    elif kind == "cuda" and found.name not in COMPILED_ON_CUDA:
        found.absent["compiled_loop"] = f"on a GPU only the loops of {', '.join(COMPILED_ON_CUDA)} are compiled"
    else:
        torch._dynamo.reset()  # what was compiled for other shapes counts towards the limit of recompilations
        found.arms["compiled_loop"] = _arm(torch.compile(operator.loop, dynamic=False, fullgraph=True), data)
    if found.name == "reverse_scan":
        for implementation in ("scalar", "warp"):
            arm = f"accelerated_scan_{implementation}"
            reason = _why_not_accelerated_scan(implementation, steps, data[0])
            if reason:
                found.absent[arm] = reason
            else:
                found.arms[arm] = _accelerated_scan(implementation, data)


def _why_not_accelerated_scan(implementation: str, steps: int, like: Tensor) -> str | None:
    if like.device.type != "cuda":
        return "accelerated-scan needs a CUDA device"
    if implementation == "warp" and (steps & (steps - 1) or not 32 <= steps <= 65536):
        return "accelerated-scan's warp takes powers of 2 from 32 to 65536 steps"
    try:
        import_module(f"accelerated_scan.{implementation}")
    except Exception as error:  # not installed, or its CUDA source couldn't be compiled here, for whatever reason
        return f"accelerated-scan can't be imported: {type(error).__name__}: {str(error).splitlines()[:1]}"
    return None


def _accelerated_scan(implementation: str, data: Sequence[Tensor]) -> Arm:
    """x_t = a_t x_{t−1} + b_t on contiguous [B, 1, T]: it gets its data turned around, and needn't turn it."""
    scan = import_module(f"accelerated_scan.{implementation}").scan
    turned = [x.flip(1).transpose(1, 2).contiguous() for x in data]
    return replace(_arm(scan, turned), restored=lambda x: x.transpose(1, 2).flip(1))


def _shown(operator: Operator, part: tuple[int, int], outputs: Outputs, gradients: Gradients) -> dict[str, Tensor]:
    """The end of the outputs, which depends on no other steps, and the start of the gradients.

    Of the steps whose gradients are expected only the first half are shown: what a gradient owes to steps that were
    cut off has died away there.
    """
    names = [n for n in operator.inputs if n not in ("done", "terminated")]
    rows, steps = part
    shown = {f"output {i}": x[:rows, -steps:] for i, x in enumerate(outputs)}
    for name, gradient in zip(names, gradients, strict=True):
        if gradient is not None:
            shown[f"the gradient of {name}"] = gradient[:rows, : steps // 2]
    return shown


def _expected(operator: Operator, part: tuple[int, int], data: Sequence[Tensor]) -> dict[str, Tensor]:
    rows, steps = part

    def precise(when: slice) -> list[Tensor]:
        few = [x.detach()[:rows, when].cpu() for x in data]
        return [x.double().requires_grad_() if x.is_floating_point() else x for x in few]

    with torch.no_grad():
        outputs = as_tuple(operator.loop(*precise(slice(-steps, None))))
    arguments = precise(slice(steps))
    first = as_tuple(operator.loop(*arguments))[0]
    leaves = [x for x in arguments if x.requires_grad]
    return _shown(
        operator, part, outputs, torch.autograd.grad(first, leaves, torch.ones_like(first), allow_unused=True)
    )
