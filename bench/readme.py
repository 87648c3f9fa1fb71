"""Make what the README says about speed from the results files.

    python -m bench.readme            write it
    python -m bench.readme --check    exit with 1 if it doesn't say what the results files say

Each generated part stands between the markers ``<!-- bench: NAME -->`` and ``<!-- end -->``.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from typing import Any

from bench import tables
from bench.measuring import RESULTS

README = RESULTS.parent.parent / "README.md"
OPEN = "not measured yet"
LARGE = 1 << 24  # elements, from where a scan is to be as fast as memory
BANDWIDTH_OF = ("gae", "td_lambda", "vtrace")


def render(text: str) -> str:
    """``text`` with every generated part as the results files have it.

    Raises:
        ValueError: a part has no place in the text, or a place has no part.

    """
    found = re.findall(r"<!-- bench: ([\w-]+) -->", text)
    if sorted(found) != sorted(PARTS):
        raise ValueError(f"the README has places for {sorted(found)}, but the parts are {sorted(PARTS)}")
    for name, part in PARTS.items():
        pattern = rf"(<!-- bench: {name} -->\n).*?(<!-- end -->)"
        content = part()
        text = re.sub(pattern, lambda m, content=content: f"{m[1]}{content}\n{m[2]}", text, count=1, flags=re.DOTALL)
    return text


def of_suite(suite: str) -> Callable[[], str]:
    """The tables of a suite on the CPU."""

    def part() -> str:
        results = load(f"{suite}_cpu")
        if results is None:
            return OPEN.capitalize() + "."
        threads = f"{results['threads']} thread{'s' if results['threads'] > 1 else ''}"
        return f"{tables.of(suite, results)}\n\n({results['machine']}, {threads}; {_state(results)}.)"

    return part


def _state(results: dict[str, Any]) -> str:
    """Of what the results are: versions, and the state of the code."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    commit = f" at {results['commit']}" if results["commit"] else ""
    return f"{versions}; {results['date']}{commit}"


def static_kernels() -> str:
    """What GAE's kernel costs, read from the machine code."""
    stored = load("static_kernels")
    assert stored is not None
    costs = []
    for layout in ("contiguous time", "time-major"):
        name = f"gae, recurrence, {layout}, whole row, fp32"
        (row,) = (r for r in stored["kernels"] if r["kernel"] == name and r["target"] == "sm_90")
        costs.append("{instructions_per_element} instructions and {shuffles_per_element} shuffles".format_map(row))
    spills = sum(row["spill_bytes"] > 0 for row in stored["kernels"])
    return (
        f"GAE forward in float32 on sm_90 takes {costs[0]} per element with contiguous time, {costs[1]} time-major; "
        f"{spills or 'none'} of the {len(stored['kernels'])} kernels in the table spill{'s' if spills < 2 else ''}."
    )


def host_cost() -> str:
    """What a call costs the host, as `bench/host_cost.py` found it."""
    results = load("host_cost_cpu")
    if results is None:
        return OPEN.capitalize() + "."
    modes = list(dict.fromkeys(row["mode"] for row in results["rows"]))
    lines = []
    for function in dict.fromkeys(row["function"] for row in results["rows"]):
        found = {row["mode"]: row for row in results["rows"] if row["function"] == function}
        cells = [f"{x['us']:.1f}, {x['bare_us']:.1f}, **{x['ratio']:.2f}**" for x in map(found.get, modes) if x]
        lines.append([f"`{function}`", *cells])
    state = f"({results['machine']}, {results['threads']} thread; {_state(results)}.)"
    return f"{tables.table(['µs, bare µs, ratio', *modes], lines)}\n\n{state}"


def gpu_targets() -> str:
    """What is aimed at on GPUs, and what was measured on each that there are results of."""
    machines = sorted({p.stem.partition("_")[2] for p in RESULTS.glob("*_*.json")} & gpus())
    lines = []
    for target, wanted, measured in TARGETS:
        cells = [measured(machine) or OPEN for machine in machines] or [OPEN]
        lines.append([target, wanted, *cells])
    names = [(load(f"scans_{m}") or {}).get("machine", m) for m in machines] or ["measured"]
    return tables.table(["H100 or H200", "target", *names], lines)


def of_gpus(suite: str, text: Callable[[str, dict[str, Any]], str]) -> str:
    """What ``text`` says of each GPU that a suite was measured on, from its name and the results."""
    found = [text(machine, results) for machine in sorted(gpus()) if (results := load(f"{suite}_{machine}"))]
    return "\n\n".join(found) or f"{OPEN.capitalize()}."


def gpu_scans() -> str:
    """Scans on each GPU that there are results of: against peers, and against a copy where they are large."""

    def text(machine: str, results: dict[str, Any]) -> str:
        shares = tables.bandwidth_by_shape(_large(machine))
        state = "; ".join((results["machine"], _state(results), *_copies(results)))
        return f"{tables.scans(results['rows'])}\n\n{shares}\n\n({state}.)"

    return of_gpus("scans", text)


def _copies(results: dict[str, Any]) -> list[str]:
    """How the copies were timed, where that isn't what `bench.__main__` does, as the results say."""
    directions = {"forward": "forward", "both": "with backward"}
    found = [results["copies"]] if "copies" in results else []
    found += [
        f"the copy beside {row['case']} {words} is {row[key]}"
        for row in results["rows"]
        for direction, words in directions.items()
        if (key := f"copy_{direction}") in row
    ]
    return list(dict.fromkeys(found))


def gpu_updates() -> str:
    """Whole updates on each GPU that there are results of."""

    def text(_: str, results: dict[str, Any]) -> str:
        return f"{tables.updates(results['rows'])}\n\n({results['machine']}; {_state(results)}.)"

    return of_gpus("updates", text)


def gpu_losses() -> str:
    """What losses take on each GPU that there are results of."""

    def text(_: str, results: dict[str, Any]) -> str:
        shares = [1 / tables.speedup(row, "torchrl") for row in results["rows"]]
        return (
            f"{len(shares)} losses on tiny networks, eager, forward and backward: {min(shares):.0%} to "
            f"{max(shares):.0%} of TorchRL's time ({results['machine']}; {_state(results)})."
        )

    return of_gpus("losses", text)


def gpus() -> set[str]:
    """The names of the GPUs that a suite was measured on."""
    suites = ("scans", "projection", "losses", "updates")
    return {p.stem.partition("_")[2] for s in suites for p in RESULTS.glob(f"{s}_*.json")} - {"cpu"}


def load(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def _scan_rows(machine: str, *names: str) -> list[dict[str, Any]]:
    return [row for row in (load(f"scans_{machine}") or {"rows": []})["rows"] if row["case"] in names]


def _large_scans(machine: str) -> str | None:
    found = []
    for words, rows in (
        ("B ≫ T", [r for r in _large(machine) if r["B"] > r["T"]]),
        ("T ≫ B", [r for r in _large(machine) if r["B"] < r["T"]]),
    ):
        if rows:
            shares = {d: [r[f"fraction_of_copy_{d}"] for r in rows] for d in ("forward", "both")}
            forward, both = (f"{min(x):.0%} to {max(x):.0%}" for x in shares.values())
            found.append(f"{words}: {forward} forward, {both} with backward")
    return "; ".join(found) or None


def _large(machine: str) -> list[dict[str, Any]]:
    return [r for r in _scan_rows(machine, *BANDWIDTH_OF) if r["B"] * r["T"] >= LARGE]


def _gae_call(machine: str) -> str | None:
    rows = [r for r in _scan_rows(machine, "gae") if (r["B"], r["T"]) == (4096, 128)]
    return ", ".join(f"{r['arms']['fusedrl']['forward_ms'] * 1e3:.3g} µs {r['layout']}" for r in rows) or None


def _short_horizons(machine: str) -> str | None:
    rows = [r for r in _scan_rows(machine, "gae") if r["B"] >= 32768 and r["T"] <= 32 and r["layout"] == "[T, B]"]
    return ", ".join(f"{r['fraction_of_copy_forward']:.0%} at {r['B']}×{r['T']}" for r in rows) or None


def _categorical(machine: str) -> str | None:
    found = []
    for row in (load(f"projection_{machine}") or {"rows": []})["rows"]:
        if row["B"] == 4096:
            module, operator = (tables.speedup(row, "torchrl", arm=arm) for arm in ("fusedrl", "operator"))
            device, theirs = row["both_device_us"], row["arms"]["torchrl"]["both_ms"]
            found.append(f"{module:.3g}× eager, {operator:.3g}× the operator alone")
            found.append(f"in a CUDA graph {device:.3g} µs on the device, TorchRL eager {theirs:.3g} ms")
    return "; ".join(found) or None


def _update(machine: str) -> str | None:
    rows = [r for r in (load(f"updates_{machine}") or {"rows": []})["rows"] if r["case"] == "ppo"]
    return ", ".join(f"{tables.speedup(r, 'torchrl', arm='captured'):.3g}× at {r['B']}×{r['T']}" for r in rows) or None


TARGETS: list[tuple[str, str, Callable[[str], str | None]]] = [
    (
        "GAE, TD(λ) and V-trace, device time, at least 16M elements, either layout",
        "90% of a copy's bandwidth, 85% with backward",
        _large_scans,
    ),
    ("a call of GAE, eager, 4096×128", "at most 12 µs", _gae_call),
    ("GAE, short horizons, time-major", "80% of a copy's bandwidth, or launch-bound", _short_horizons),
    ("C51 loss, forward and backward, against TorchRL's, B = 4096", "20×", _categorical),
    ("PPO update in a CUDA graph against TorchRL's eager one, 4096 environments", "6×", _update),
]
PARTS = {
    "scans": of_suite("scans"),
    "projection": of_suite("projection"),
    "losses": of_suite("losses"),
    "updates": of_suite("updates"),
    "host-cost": host_cost,
    "static": static_kernels,
    "gpu": gpu_targets,
    "gpu-scans": gpu_scans,
    "gpu-updates": gpu_updates,
    "gpu-losses": gpu_losses,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m bench.readme", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, and fail if something would change")
    check = parser.parse_args(arguments).check
    text = README.read_text()
    new = render(text)
    if check and new != text:
        sys.exit("README.md doesn't say what bench/results/ says: run python -m bench.readme")
    README.write_text(new)


if __name__ == "__main__":
    main()
