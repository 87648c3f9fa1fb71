"""What each loss's forward launches on a GPU, counted without one: kernels of ours, and PyTorch's operations.

    python -m bench.launches            a table
    python -m bench.launches --json     {loss: {library: launches}}

The Triton kernels run in the interpreter, in a process of its own since Triton decides for it when it is imported.
Networks and distributions are left out, as in `bench.losses.operations`, and so is what only allocates.
"""

import argparse
import json
import os
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import torch

from bench import tables

CPU = torch.device("cpu")


@cache
def counted() -> dict[str, dict[str, int]]:
    """The launches of each loss of either library, counted in another process.

    Some versions of Triton have an interpreter that fails with some of NumPy. Where there is a CUDA device the kernels
    are tested and timed without it: there nothing is counted then, and stderr says why.

    Raises:
        CalledProcessError: counting failed, and there is no CUDA device.

    """
    environment = os.environ | {"TRITON_INTERPRET": "1", "FUSEDRL_BACKEND": "triton"}
    command = [sys.executable, "-m", "bench.launches", "--json"]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode and torch.cuda.is_available():
        why = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        print(f"launches are not counted, Triton's interpreter fails here: {why}", file=sys.stderr)
        return {}
    sys.stderr.write(done.stderr)
    done.check_returncode()
    return json.loads(done.stdout)


def count() -> dict[str, dict[str, int]]:
    """The same, counted in this process, in which kernels are interpreted."""
    from triton.runtime.interpreter import GridExecutor

    from bench import counting, losses  # which import Triton

    found: dict[str, dict[str, int]] = {}
    for name in losses.LOSSES:
        for library in losses.LIBRARIES:
            loss, data = losses.build(name, library, CPU), losses.data(name, losses.BATCH, CPU)
            run = partial(loss, data)
            operations = counting.count(run, losses.hidden(), [(GridExecutor, "__call__")]).operations
            launches = sum(n for operation, n in operations.items() if "empty" not in operation)
            found.setdefault(name, {})[library] = launches
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table, of this process")
    if parser.parse_args().json:
        print(json.dumps(count()))
        return
    rows = [
        [f"`{name}`", str(x["fusedrl"]), str(x["torchrl"]), f"**{x['fusedrl'] / x['torchrl']:.2f}**"]
        for name, x in counted().items()
    ]
    print(tables.table(["launches, forward", "fusedrl", "TorchRL", "share"], rows))


if __name__ == "__main__":
    main()
