"""Markdown tables of the suites' results."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bench.measuring import geometric_mean

Row = dict[str, Any]
TITLES = {
    "gae": "GAE",
    "td_lambda": "TD(λ)",
    "td1": "TD(1)",
    "reward_to_go": "reward-to-go",
    "vtrace": "V-trace",
    "reverse_scan": "the bare recurrence",
}
NONE = "–"


def of(suite: str, results: dict[str, Any]) -> str:
    """The tables of a suite."""
    on_gpu = any("fraction_of_copy_forward" in row for row in results["rows"])
    builders: dict[str, list[Callable[[list[Row]], str]]] = {
        "scans": [scans, gae_by_shape, *([bandwidth] if on_gpu else [])],
        "projection": [projection, *([bandwidth] if on_gpu else [])],
        "losses": [losses],
        "updates": [updates],
    }
    return "\n\n".join(build(results["rows"]) for build in builders[suite])


def scans(rows: list[Row]) -> str:
    """How many times faster than the peers each estimator is, over all shapes that both were measured at."""
    lines = []
    for name in dict.fromkeys(row["case"] for row in rows):
        cells = [TITLES[name]]
        for peer in ("torchrl", "compiled_loop", "accelerated_scan_scalar", "accelerated_scan_warp"):
            both = [row for row in rows if row["case"] == name and peer in row["arms"]]
            if not both:
                cells += [NONE, NONE]
                continue
            for direction in ("forward", "both"):
                ratios = {_place(row): speedup(row, peer, direction) for row in both}
                least = min(ratios, key=lambda shape: ratios[shape])
                mean = geometric_mean(ratios.values())
                cells.append(f"**{mean:.1f}** ({ratios[least]:.2g} at {least})" if len(both) > 1 else f"**{mean:.1f}**")
        lines.append(cells)
    head = ["their time / ours, geometric mean (least)"]
    for peer in ("TorchRL", "compiled loop", "accelerated-scan, Triton", "accelerated-scan, warp"):
        head += [f"{peer}, forward", "with backward"]
    return table(*_without_empty_columns(head, lines))


def gae_by_shape(rows: list[Row]) -> str:
    """GAE at each shape, in milliseconds."""
    lines = []
    for row in rows:
        if row["case"] == "gae" and "torchrl" in row["arms"]:
            cells = [_place(row)]
            for direction in ("forward", "both"):
                ours, theirs = (row["arms"][arm][f"{direction}_ms"] for arm in ("fusedrl", "torchrl"))
                cells.append(f"{_digits(ours)}, {_digits(theirs)}, **{theirs / ours:.1f}**")
            cells.append("{:.3g}, {:.3g}".format(*(row["arms"][arm]["peak_mib"] for arm in ("fusedrl", "torchrl"))))
            lines.append(cells)
    return table(
        ["GAE, B×T", "forward: ms, TorchRL ms, ×", "with backward: ms, TorchRL ms, ×", "peak MiB, TorchRL MiB"], lines
    )


def projection(rows: list[Row]) -> str:
    """The C51 loss at each batch size, forward and backward."""
    everyone = ("fusedrl", "operator", "torchrl", "compiled_textbook")
    lines = []
    for row in rows:
        ms = {arm: _digits(row["arms"][arm]["both_ms"]) for arm in everyone}
        lines.append(
            [
                str(row["B"]),
                f"{ms['fusedrl']}, {ms['torchrl']}, **{speedup(row, 'torchrl'):.1f}**",
                f"{ms['operator']}, **{speedup(row, 'torchrl', arm='operator'):.1f}**",
                f"{ms['compiled_textbook']}, **{speedup(row, 'compiled_textbook', arm='operator'):.1f}**",
                ", ".join(f"{row['arms'][arm]['peak_mib']:.3g}" for arm in everyone),
            ]
        )
    means = [
        geometric_mean(speedup(row, peer, arm=arm) for row in rows)
        for peer, arm in (("torchrl", "fusedrl"), ("torchrl", "operator"), ("compiled_textbook", "operator"))
    ]
    lines.append(["geometric mean", *(f"**{mean:.1f}**" for mean in means), ""])
    head = [
        "B",
        "loss module: ms, TorchRL ms, ×",
        "operator alone: ms, ×",
        "compiled textbook: ms, × (operator)",
        "peak MiB: module, operator, TorchRL, compiled",
    ]
    return table(head, lines)


def losses(rows: list[Row]) -> str:
    """What the libraries' own work takes, as the share of TorchRL's that ours is; launches only where counted."""
    lines = []
    for row in rows:
        ours, theirs = (row["arms"][arm]["both_ms"] for arm in ("fusedrl", "torchrl"))
        counted = [row["dispatched"][library] for library in ("fusedrl", "torchrl")]
        cells = [f"`{row['case']}`", f"{_digits(ours)}, {_digits(theirs)}, **{ours / theirs:.2f}**"]
        for kind in ("operations", "launches"):
            mine, peers = (x[kind] for x in counted)
            cells.append(NONE if mine is None or peers is None else f"{mine}, {peers}, **{mine / peers:.2f}**")
        lines.append([*cells, ", ".join(str(x["waits"]) for x in counted)])
    means = [f"**{geometric_mean(1 / speedup(row, 'torchrl') for row in rows):.2f}**"]
    for kind in ("operations", "launches"):
        both = [[row["dispatched"][library][kind] for library in ("fusedrl", "torchrl")] for row in rows]
        shares = [mine / peers for mine, peers in both if None not in (mine, peers)]
        means.append(f"**{geometric_mean(shares):.2f}**" if shares else NONE)
    lines.append(["geometric mean", *means, ""])
    head = [
        "",
        "forward + backward: ms, TorchRL ms, share",
        "operations, TorchRL's, share",
        "launches with the kernels, TorchRL's, share",
        "host reads, TorchRL's",
    ]
    return table(head, lines)


def updates(rows: list[Row]) -> str:
    """Whole updates, in one CUDA graph where there are any, whose memory isn't measured."""
    names = {"captured": "in a CUDA graph", "fusedrl": "eager"}
    there = {arm: words for arm, words in names.items() if any(arm in row["arms"] for row in rows)}
    lines = []
    for row in rows:
        cells = [row["case"].upper(), _shape(row)]
        for arm in there:
            ours, theirs = row["arms"][arm]["both_ms"], row["arms"]["torchrl"]["both_ms"]
            cells.append(f"{_digits(ours)}, {_digits(theirs)}, **{theirs / ours:.1f}**")
        peaks = [row["arms"][arm].get("peak_mib") for arm in (*there, "torchrl")]
        cells.append(", ".join(NONE if peak is None else f"{peak:.3g}" for peak in peaks))
        lines.append(cells)
    heads = [f"{words}: ms, TorchRL eager ms, ×" for words in there.values()]
    return table(["update", "batch", *heads, f"peak MiB: {', '.join(there.values())}, TorchRL"], lines)


def bandwidth(rows: list[Row]) -> str:
    """What each case takes on the device, and how near that is to a copy of as many bytes."""
    lines = [
        [
            TITLES.get(row["case"], row["case"]),
            _shape(row),
            row.get("layout", NONE),
            *(f"{_digits(row[f'{d}_device_us'])}, **{row[f'fraction_of_copy_{d}']:.0%}**" for d in ("forward", "both")),
        ]
        for row in rows
    ]
    head = [
        "",
        "shape",
        "memory",
        "forward: device µs, of the copy's bandwidth",
        "with backward: device µs, of the copy's",
    ]
    return table(head, lines)


def bandwidth_by_shape(rows: list[Row]) -> str:
    """What each case takes on the device, and its shares of a copy's bandwidth, a line for each shape and layout."""
    names = list(dict.fromkeys(row["case"] for row in rows))
    found = {(_shape(row), row["layout"], row["case"]): row for row in rows}
    lines = []
    for shape, layout in dict.fromkeys((_shape(row), row["layout"]) for row in rows):
        cells = [f"{shape} {layout}"]
        for name in names:
            row = found.get((shape, layout, name))
            cells.append(NONE if row is None else ", ".join(_share(row, d) for d in ("forward", "both")))
        lines.append(cells)
    return table(["device µs, of a copy's bandwidth: forward, with backward", *(TITLES[n] for n in names)], lines)


def _share(row: Row, direction: str) -> str:
    return f"{_digits(row[f'{direction}_device_us'])} **{row[f'fraction_of_copy_{direction}']:.0%}**"


def speedup(row: Row, peer: str, direction: str = "both", arm: str = "fusedrl") -> float:
    """How many times the peer's time is that of ``arm``."""
    return row["arms"][peer][f"{direction}_ms"] / row["arms"][arm][f"{direction}_ms"]


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rule = "|---" * len(head) + "|"
    return "\n".join([_line(head), rule, *(_line(cells) for cells in lines)])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _digits(time: float) -> str:
    """Three digits, and all before the point."""
    return f"{time:.3g}" if time < 1000 else f"{time:.0f}"


def _shape(row: Row) -> str:
    return "×".join(str(row[size]) for size in ("B", "T") if size in row)


def _place(row: Row) -> str:
    """The shape, and the layout if it isn't the usual one."""
    return f"{_shape(row)} [T, B]" if row.get("layout") == "[T, B]" else _shape(row)


def _without_empty_columns(head: list[str], lines: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    kept = [i for i in range(len(head)) if any(cells[i] != NONE for cells in lines)]
    return [head[i] for i in kept], [[cells[i] for i in kept] for cells in lines]
