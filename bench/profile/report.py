"""A profile as a table on the terminal and as a roofline."""

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from bench.profile.measures import Measurement

WORDS = {"forward": "forward", "both": "forward + backward"}
SHORT = {"forward": "fwd", "both": "fwd+bwd"}
ON_CPU = (
    "On a CPU nothing is launched, so that ops are counted instead: the operators that PyTorch dispatches, "
    "those inside our own operators too, views aside. There is no device time, and the host's takes its place in the "
    "bandwidth. Host syncs are operators that would make the host wait if the tensors were on a GPU."
)
ON_GPU = (
    "Host time is what passes until a call returns; launches are kernels, copies and fills; device time is the sum of "
    "theirs."
)
BYTES = (
    "MiB is what has to be moved at least: every input read once, every output written once. The copy is one of as "
    "many bytes, measured here: {}."
)


def show(title: str, found: Sequence[Measurement], console: Console) -> None:
    """Print the table, and what its columns mean on this machine."""
    on_gpu = found[0].device_us is not None
    columns = (
        "shape", "", "host µs", "launches" if on_gpu else "ops", "syncs", "device µs", "MiB", "GB/s", "of copy",
    )  # fmt: skip
    table = Table(title=title, box=SIMPLE, pad_edge=False, collapse_padding=True)
    for column in columns:
        table.add_column(column, justify="left" if column in ("shape", "") else "right", no_wrap=True)
    for x in found:
        table.add_row(
            x.shape,
            SHORT[x.direction],
            f"{x.host_us:.1f}",
            f"{x.launches:g}",
            str(x.waits.total()),
            "–" if x.device_us is None else f"{x.device_us:.1f}",
            f"{x.bytes_moved / 2**20:.3g}",
            f"{x.gigabytes_per_second:.3g}",
            f"{x.fraction_of_copy:.1%}",
        )
    console.print(table)
    for name in dict.fromkeys(name for x in found for name in x.waits):
        console.print(f"syncs: {', '.join(f'{x.waits[name]} {name} {SHORT[x.direction]} at {x.shape}' for x in found)}")
    console.print(ON_GPU if on_gpu else ON_CPU)
    copies = dict.fromkeys(
        f"{x.copied_gigabytes_per_second:.3g} GB/s for {x.bytes_moved / 2**20:.3g} MiB" for x in found
    )
    console.print(BYTES.format(", ".join(copies)))


def roofline(title: str, found: Sequence[Measurement], path: Path) -> bool:
    """Draw the bandwidth over the bytes moved, below what a copy of as many bytes gets.

    Returns:
        False if matplotlib isn't installed, and nothing was drawn.

    """
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")  # before pyplot is imported: a PNG needs no display
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    roof = sorted((x.bytes_moved / 2**20, x.copied_gigabytes_per_second) for x in found)
    axes.plot(*zip(*roof, strict=True), "k--", marker="_", label="copy of as many bytes")
    # Labels are slanted, so that those of neighbours don't overlap: of the forward pass above, of both below.
    above, below = {"ha": "left", "va": "bottom"}, {"ha": "right", "va": "top"}
    for direction, marker, offset, place in (("forward", "o", 4, above), ("both", "s", -4, below)):
        points = sorted((x.bytes_moved / 2**20, x) for x in found if x.direction == direction)
        axes.plot(
            [moved for moved, _ in points], [x.gigabytes_per_second for _, x in points], marker=marker,
            label=WORDS[direction],
        )  # fmt: skip
        for moved, x in points:
            label = f"{x.shape}: {x.fraction_of_copy:.1%}"
            at = {"xy": (moved, x.gigabytes_per_second), "xytext": (offset, offset), "textcoords": "offset points"}
            axes.annotate(label, **at, **place, rotation=45, rotation_mode="anchor", fontsize=8)
    axes.margins(x=0.15, y=0.25)  # for the labels
    axes.set(xscale="log", yscale="log", xlabel="MiB moved at least", ylabel="GB/s", title=title)
    axes.grid(which="both", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True
