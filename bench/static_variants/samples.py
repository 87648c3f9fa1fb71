"""The losses over samples: PPO's clipped surrogate and the critic's loss; backward is a product of PyTorch's."""

from collections.abc import Iterable, Mapping
from itertools import product
from typing import Any, NamedTuple

import torch
from fusedrl.kernels import samples_launch
from fusedrl.kernels.ppo_kernel import clip_ppo_kernel
from fusedrl.kernels.value_loss_kernel import value_loss_kernel
from triton.backends.compiler import GPUTarget

from .compiling import COMPUTE, Strided, compile_as_launched, named

_PROCESSORS = 132
_MANY, _ONE_PROGRAM = 1 << 20, 1 << 10

# What is given besides the tensors that have to be.
_INPUTS = {
    "clip_ppo": ("required inputs", "normalized", "all inputs"),
    "value_loss": ("required inputs", "all inputs"),
}


class OfSamples(NamedTuple):
    """A phase of a loss's kernel; the element is a sample.

    The instructions include those that merge what all programs have found, which are once per program.
    """

    loss: str  # "clip_ppo" or "value_loss"
    phase: str  # "count", "losses" or, of one program, "count and losses"
    inputs: str  # "required inputs", "normalized" (clip_ppo's advantages are), or "all inputs"
    dtype: str
    # From here on what few specialisations differ in.
    samples: int = _MANY
    stride: int = 1
    scalars: str = "fp32"  # in tensors, if all inputs are there
    distance: str = "smooth_l1"
    reduction: str = "mean"
    slope: bool = True
    explained_variance: bool = True

    @property
    def name(self) -> str:
        """The row's name in the table."""
        return named(self, 4)

    @property
    def minimum_bytes(self) -> None:
        """None: what programs leave for each other is moved as well."""
        return None

    def compile(self, target: GPUTarget) -> tuple[Any, float]:
        """The compiled kernel, and the elements of a tile that a thread owns."""
        of_samples, of_batch = self._sample(self.dtype), "*" + self.dtype
        precise = COMPUTE[self.dtype]
        parts = samples_launch.division(
            self.samples, samples_launch.TILE_BYTES * 8 // precise.primitive_bitwidth, _PROCESSORS
        )
        laid_out = torch.empty(0, device="meta").as_strided((self.samples,), (self.stride,))
        arguments = {
            "slope": self._sample(str(precise)) if self.slope else None,
            "loss": None if self.reduction == "none" else of_batch,
            "loss_of_sample": of_samples if self.reduction == "none" else None,
            "workspace": f"*{precise}",
            "samples": self.samples,
            "tiles": parts.tiles,
            "COUNTS": "count" in self.phase,
            "MEAN": self.reduction == "mean",
            "DTYPE": precise,
            "INDEX": samples_launch.index_type([laid_out], parts),
            "BLOCK": parts.block,
            "POWER": parts.power,
        }
        if self.inputs == "all inputs":
            arguments |= {"weights": of_samples, "mask": self._sample("u1")}
        more, kernel = {
            "clip_ppo": (self._clip_ppo, clip_ppo_kernel),
            "value_loss": (self._value_loss, value_loss_kernel),
        }[self.loss]
        compiled = compile_as_launched(kernel, arguments | more(of_samples, of_batch), target, samples_launch.WARPS)
        return compiled, parts.block / (samples_launch.WARPS * target.warp_size)

    def _sample(self, dtype: str) -> Strided:
        return Strided("*" + dtype, (self.stride,))

    def _clip_ppo(self, of_samples: Strided, of_batch: str) -> Mapping[str, Any]:
        """Its own arguments."""
        given = self.inputs == "all inputs"
        scalar = "*" + self.scalars if given else None
        return {
            **dict.fromkeys(("log_prob", "old_log_prob", "advantage"), of_samples),
            "proximal_log_prob": of_samples if given else None,
            **dict.fromkeys(("clip_low", "clip_high", "max_ratio"), "fp64"),
            **dict.fromkeys(("clip_low_tensor", "clip_high_tensor", "max_ratio_tensor"), scalar),
            **dict.fromkeys(("kl_approx", "clip_fraction", "ess", "greatest_ratio", "mean_ratio"), of_batch),
            "SURROGATE": "losses" in self.phase,
            "NORMALIZE": self.inputs != "required inputs",
            "CAPPED": given,
        }

    def _value_loss(self, of_samples: Strided, of_batch: str) -> Mapping[str, Any]:
        """Likewise."""
        given = self.inputs == "all inputs"
        scalar = "*" + self.scalars if given else None
        return {
            **dict.fromkeys(("value", "value_target"), of_samples),
            "old_value": of_samples if given else None,
            **dict.fromkeys(("clip", "coefficient", "smallest_variance"), "fp64"),
            **dict.fromkeys(("clip_tensor", "coefficient_tensor"), scalar),
            "clip_fraction": of_batch if given else None,
            "explained_variance": of_batch if self.explained_variance else None,
            "LOSSES": "losses" in self.phase,
            "KIND": self.distance,
        }


def variants() -> Iterable[OfSamples]:
    """The losses with least and with all inputs, in float32 and bfloat16, and the count that all inputs need."""
    for loss in _INPUTS:
        yield OfSamples(loss, "losses", "required inputs", "fp32")
        yield OfSamples(loss, "count", "all inputs", "fp32")
        for dtype in ("fp32", "bf16"):
            yield OfSamples(loss, "losses", "all inputs", dtype)


def specialisations() -> Iterable[OfSamples]:
    """Every phase with all that can be given, in every dtype; then with all inputs what changes one thing."""
    in_table = set(variants())
    for loss, choices in _INPUTS.items():
        for dtype, inputs in product(("fp32", "bf16", "fp64"), choices):
            counted = inputs != "required inputs"
            for phase in ("count", "losses", "count and losses") if counted else ("losses",):
                samples = _ONE_PROGRAM if phase == "count and losses" else _MANY
                variant = OfSamples(loss, phase, inputs, dtype, samples=samples)
                if variant not in in_table:
                    yield variant
        base = OfSamples(loss, "losses", "all inputs", "fp32")
        # A stride of 4096 takes offsets of 64 bits.
        yield from (base._replace(stride=stride) for stride in (2, 4096))
        yield from (base._replace(samples=samples) for samples in (1, _MANY - 7))
        yield base._replace(slope=False)
        yield base._replace(reduction="none")
        yield base._replace(scalars="fp64")
        yield base._replace(dtype="fp16", scalars="bf16")
    critic = OfSamples("value_loss", "losses", "all inputs", "fp32")
    yield from (critic._replace(distance=distance) for distance in ("l1", "l2"))
    yield critic._replace(distance="l2", dtype="fp64")
    yield critic._replace(explained_variance=False)
