"""Types of command-line options, for argparse: a value that can't be used is an error that names the option."""

from argparse import ArgumentTypeError

import torch


def count(text: str) -> int:
    """A number of times: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)


def seconds(text: str) -> float:
    """A time that is positive."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


def device(text: str) -> torch.device:
    """The CPU, or a CUDA device that there is."""
    kind, _, index = text.partition(":")
    there = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(kind, 0)
    if not (index or "0").isdecimal() or int(index or 0) >= there:
        raise ArgumentTypeError(f"{text!r} is neither cpu nor a CUDA device of this machine")
    return torch.device(text)
