"""Benchmarks: what is measured, how, and the tables made of it.

    python -m bench [SUITE …] [--write]     measure against peers, in turns, print tables, write bench/results/
    python -m bench.readme [--check]        make the README's tables from bench/results/
    python -m bench.profile NAME …          one operator or loss: host, launches, syncs, device, bytes, trace, roofline
    pytest bench                            the same cases under pytest-benchmark: every arm and direction on its own

Figures that are published come from the first, whose arms take turns, so that a busy machine slows all of them alike.
They are wall times of a call in a row of them; on a GPU there is also the device's time, of our own arms alone.
pytest-benchmark finishes one arm before it starts the next; it is there to compare two states of this repository
(``--benchmark-save``, ``--benchmark-compare``).

`scans`, `projection`, `losses` and `updates` hold the cases of the four suites, `cases` what a case is and how it is
checked: none is timed before its results, gradients included, agree with a reference.
"""

import os

# Before torch and torchrl are imported: their notices about profiling and about what they deprecate.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("RL_WARNINGS", "False")
