"""The losses of action values: target, ensemble and policy; backward is a product of PyTorch's."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import triton.language as tl
from fusedrl.kernels import action_value_kernel, action_value_launch
from fusedrl.kernels.action_value_problem import SQUARE
from fusedrl.kernels.checks import MEAN, NONE
from fusedrl.kernels.distances import SMOOTH_L1
from triton.backends.compiler import GPUTarget

from .compiling import COMPUTE, Strided, compile_as_launched, named

_MEMBERS = 2
_MANY = 1 << 20


class ActionValue(NamedTuple):
    """A kernel of two members' values, with the derivatives where there are some; the element is a sample.

    The instructions include those that add up what all programs have found, which are once per program.
    """

    kernel: str  # "target", "ensemble" or "policy"
    inputs: str  # "required inputs" or "all inputs": the entropy of a target, mask and weights of the others
    dtype: str
    # From here on what few specialisations differ in.
    reduction: str = MEAN
    programs: str = "many"  # or "one"

    @property
    def name(self) -> str:
        """The row's name in the table."""
        return f"action_value {named(self, 3)}"

    @property
    def minimum_bytes(self) -> None:
        """None: the loop over members is in the code once."""
        return None

    def compile(self, target: GPUTarget) -> tuple[Any, float]:
        """The compiled kernel, and the elements of a tile that a thread owns."""
        precise = COMPUTE[self.dtype]
        given, computed = "*" + self.dtype, f"*{precise}"
        block = action_value_launch._TILE_BYTES * 8 // precise.primitive_bitwidth
        samples = _MANY if self.programs == "many" else block
        values, row, mask = Strided(given, (samples, 1)), Strided(given, (1,)), Strided("*u1", (1,))
        weighed = self.inputs == "all inputs"
        counted = weighed and self.reduction == MEAN
        # One program needs no other's sums, and an ensemble's losses of samples aren't added up.
        summed = self.programs == "many" and not (self.kernel == "ensemble" and self.reduction == NONE)
        arguments = {
            **dict.fromkeys(("values", "next_values"), values),
            **dict.fromkeys(("reward", "target"), row),
            "terminated": mask,
            "log_prob": row if weighed or self.kernel == "policy" else None,
            "mask": mask if weighed else None,
            "weights": row if weighed else None,
            **dict.fromkeys(("gamma", "alpha", "scale", "sample_scale"), "fp64"),
            **dict.fromkeys(("value_target", "next_value", "loss", "priority", "entropy"), given),
            **dict.fromkeys(("slopes", "value_slopes", "log_prob_slopes"), computed),
            "reciprocal": computed if counted else None,
            "partials": computed if summed else None,
            "arrivals": "*i32" if summed else None,
            "samples": samples,
            "members": _MEMBERS,
            "LOSS_FUNCTION": SMOOTH_L1,
            "PRIORITY": SQUARE,
            "PER_MEMBER": False,
            "REDUCTION": self.reduction,
            "COUNT": counted,
            "DTYPE": precise,
            "INDEX": tl.int32,
            "BLOCK": block,
            "PROGRAMS": action_value_launch._PROGRAMS,
        }
        kernel = getattr(action_value_kernel, f"{self.kernel}_kernel")
        compiled = compile_as_launched(kernel, arguments, target, action_value_launch._WARPS)
        return compiled, block / (action_value_launch._WARPS * target.warp_size)


def variants() -> Iterable[ActionValue]:
    """All kernels with least and with all inputs in float32, and with all in bfloat16."""
    for kernel in ("target", "ensemble", "policy"):
        yield ActionValue(kernel, "required inputs", "fp32")
        for dtype in ("fp32", "bf16"):
            yield ActionValue(kernel, "all inputs", dtype)


def specialisations() -> Iterable[ActionValue]:
    """All kernels in every dtype, of one program as well, which needs no other's sums; and losses of each sample."""
    in_table = set(variants())
    for dtype in ("fp32", "bf16", "fp64"):
        every = [ActionValue("target", inputs, dtype) for inputs in ("required inputs", "all inputs")]
        for kernel in ("ensemble", "policy"):
            every += [
                ActionValue(kernel, inputs, dtype, programs=programs)
                for inputs in ("required inputs", "all inputs")
                for programs in ("many", "one")
            ]
            every.append(ActionValue(kernel, "all inputs", dtype, reduction=NONE))
        yield from (variant for variant in every if variant not in in_table)
