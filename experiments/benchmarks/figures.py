"""Draw the figures of the benchmarks from their JSON in ``experiments/results``.

    python experiments/benchmarks/figures.py                          # writes cost_*.png into experiments/results

``cost_horizon``: time and peak memory of a rollout against the horizon, for every gradient. ``cost_models``: speed and
state of every model. ``cost_sizes``: time against the length of a cache, and peak memory against the vocabulary.
Bars are quartiles. Needs matplotlib (the extra ``analysis``).
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from jsonargparse import auto_cli
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter
from measuring import Row

RESULTS = Path(__file__).parents[1] / "results"
STYLES = list(
    zip(("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999"), "osD^vPX", strict=True)
)
MIB = 2**20


def rows_of(results: Path, name: str) -> list[Row]:
    """The rows of one benchmark."""
    rows: list[Row] = json.loads((results / f"{name}.json").read_text())["rows"]
    return rows


def logarithmic(axes: Axes, ticks: Sequence[int], *, up: Sequence[float] = ()) -> None:
    """Make both axes logarithmic, with plain numbers as ticks at the measured values."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator([float(tick) for tick in ticks]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    if up:
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_locator(FixedLocator(up))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.25)


def horizon(results: Path) -> Figure:
    """Time and peak memory of a rollout, for every gradient."""
    figure, (time, memory) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    ways: dict[str, list[Row]] = {}
    for row in rows_of(results, "replay_cost_horizons"):
        name = f"{row['gradient']}, groups of {row['group']}" if row["group"] > 1 else row["gradient"]
        ways.setdefault(name, []).append(row)
    for (name, rows), (colour, marker) in zip(ways.items(), STYLES, strict=False):
        horizons = [row["horizon"] for row in rows]
        low, middle, high = zip(*(row["ratio"] for row in rows), strict=True)
        spread = [
            [m - edge for m, edge in zip(middle, low, strict=True)],
            [edge - m for m, edge in zip(middle, high, strict=True)],
        ]
        line = "--" if name == "sparse_replay" else "-"  # coincides with replay where memory is small
        look = {"color": colour, "marker": marker, "markersize": 4.5, "linewidth": 1.5, "linestyle": line}
        time.errorbar(horizons, middle, yerr=spread, capsize=2, elinewidth=0.8, label=name, **look)
        memory.plot(horizons, [row["peak"] / MIB for row in rows], **look)
    ticks = sorted({row["horizon"] for rows in ways.values() for row in rows})
    logarithmic(time, ticks)
    logarithmic(memory, ticks, up=(64, 128, 256, 512, 1024, 2048))
    time.set(xlabel="segments of a rollout", ylabel="time / time of bptt", ylim=(0.8, None))
    memory.set(xlabel="segments of a rollout", ylabel="peak memory, MiB")
    figure.legend(loc="outside right upper", frameon=False, fontsize=9, title="gradient")
    return figure


def models(results: Path) -> Figure:
    """Speed of reading and training, and size of the state, for every model."""
    figure, panels = plt.subplots(1, 3, figsize=(9, 3.4), layout="constrained", sharey=True)
    rows = rows_of(results, "step_cost")[::-1]
    figures: dict[str, Callable[[Row], float]] = {
        "tokens read per second": lambda row: row["tokens_per_second_read"],
        "tokens trained on per second": lambda row: row["tokens_per_second_train"],
        "state of a lane, KiB": lambda row: row["state_bytes"] / 1024,
    }
    for axes, (label, figure_of), (colour, _) in zip(panels, figures.items(), STYLES, strict=False):
        values = [figure_of(row) for row in rows]
        names = [row["model"].replace("quickstart", "memformer").replace("_", " ") for row in rows]
        bars = axes.barh(names, values, color=colour)
        axes.bar_label(bars, [f"{value:,.0f}" for value in values], padding=3, fontsize=8)
        axes.set(xlabel=label, xlim=(0, 1.3 * max(values)))
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.xaxis.set_major_locator(plt.MaxNLocator(3))
    return figure


def sizes(results: Path) -> Figure:
    """Time of a segment against the length of a cache, and peak memory of a rollout against the vocabulary."""
    figure, (time, memory) = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
    lengths: list[int] = []
    for n, row in enumerate(rows_of(results, "memory_length")):
        colour, marker = STYLES[n // 2]
        lengths = [int(length) for length in row["seconds"]]
        milliseconds = [1000 * seconds for seconds in row["seconds"].values()]
        name = f"{row['model']}, {'trained on' if row['kind'] == 'train' else 'read'}"
        line = "--" if row["kind"] == "train" else "-"
        time.plot(lengths, milliseconds, line, color=colour, marker=marker, markersize=4.5, linewidth=1.5, label=name)
    logarithmic(time, lengths, up=(64, 128, 256, 512, 1024))
    time.set(xlabel="cached tokens", ylabel="time of a segment, ms")
    time.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    splits: dict[str, list[Row]] = {}
    for row in rows_of(results, "loss_cost"):
        splits.setdefault(row["logits"], []).append(row)
    for (name, rows), (colour, marker) in zip(splits.items(), STYLES, strict=False):
        vocabs, peaks = [row["vocab_size"] for row in rows], [row["peak"] / MIB for row in rows]
        memory.plot(vocabs, peaks, color=colour, marker=marker, markersize=4.5, linewidth=1.5, label=f"logits {name}")
    logarithmic(
        memory, sorted({row["vocab_size"] for rows in splits.values() for row in rows}), up=(128, 256, 512, 1024)
    )
    memory.set(xlabel="vocabulary", ylabel="peak memory of a rollout, MiB")
    memory.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return figure


FIGURES = {"cost_horizon": horizon, "cost_models": models, "cost_sizes": sizes}


def main(results: Path = RESULTS, out: Path = RESULTS) -> None:
    """Draw every figure into the folder ``out``."""
    matplotlib.use("Agg")
    for name, draw in FIGURES.items():
        figure = draw(results)
        figure.savefig(out / f"{name}.png", dpi=120)
        plt.close(figure)


if __name__ == "__main__":
    auto_cli(main)
