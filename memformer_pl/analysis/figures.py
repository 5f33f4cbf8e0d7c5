"""Draw saved arrays as matplotlib figures, without a window or a back end.

Colours are grey levels and blues that keep their order in black and white; lines also differ in their marks.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from memformer_pl.callbacks.slot_retention import (
    EXAMPLES,
    KINDS,
    MIDDLE,
    PAPER,
    TENTHS,
    kind_of,
    prevailing,
    shares,
)

WEIGHTS = "gray_r"
"""White for 0, black for 1; equal steps look equal, also in print."""
PLATE = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1}
STYLES = ("-o", "--s", ":^", "-.D")
DARK, MIDDLING, LIGHT = "#0b2a4a", "#2f6fa8", "#c3d9ea"
INKS = (LIGHT, MIDDLING, DARK)
"""Colours of retaining, aggregating and reading."""
INK_OF_WAY = (DARK, "#b3541e", MIDDLING, "#6b6b6b")
MARKS = str.maketrans({"\n": "↵", "\t": "⇥"})
LONGEST = 10
"""Largest number of characters of a token's label."""


def example_rows(
    retention: Float[np.ndarray, "T H M"],
) -> tuple[int, list[tuple[int, int]]]:
    """Choose a write, and for each kind in it the part of a slot (head, slot) that is most like the paper's example.

    The write is the one with the most kinds in the middle half of the document, and of these the most central.
    """
    writes = len(retention)
    kinds_T = [len(np.unique(kind_of(weights))) for weights in retention]
    middle = range(writes // 4, writes - writes // 4)
    best = min(middle, key=lambda write: (-kinds_T[write], abs(write - writes // 2)))
    self_weight_HM = retention[best]
    chosen = []
    for kind, example in enumerate(EXAMPLES):
        distance = np.where(kind_of(self_weight_HM) == kind, np.abs(self_weight_HM - example), np.inf)
        if np.isfinite(distance.min()):
            head, slot = np.unravel_index(distance.argmin(), distance.shape)
            chosen.append((int(head), int(slot)))
    return best, chosen


def attention_rows(
    retention: Float[np.ndarray, "T H M"],
    writing: Float[np.ndarray, "T H M L"],
    text: np.ndarray,
    *,
    slots: Int[np.ndarray, " M"],
) -> Figure:
    """Draw the paper's Figure 6: the attention of one slot of each kind at one write, to itself and to the tokens."""
    write, rows = example_rows(retention)
    self_weights = np.zeros((len(rows), len(rows)))
    self_weights[np.diag_indices(len(rows))] = [retention[write, head, slot] for head, slot in rows]
    tokens = np.array([writing[write, head, slot] for head, slot in rows], dtype=np.float64)
    token_mask = text[write] != ""
    weights = np.concatenate((self_weights, tokens[:, token_mask]), axis=1)
    labels = [f"slot {slots[slot]}" for _, slot in rows] + [visible(token) for token in text[write][token_mask]]
    figure = Figure(figsize=(max(6.0, 1.5 + 0.42 * len(labels)), 1.3 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(weights, cmap=WEIGHTS, vmin=0, vmax=1, aspect="auto")
    for down, row in enumerate(weights):
        for right, weight in enumerate(row):
            if weight >= 0.005:
                ink, label = "white" if weight > 0.55 else "black", f"{weight:.2f}"[1:] if weight < 0.995 else "1"
                axes.text(right, down, label, ha="center", va="center", color=ink, size=8)
    axes.axvline(len(rows) - 0.5, color="black", linewidth=1)
    kinds = kind_of(retention[write])
    names = [f"slot {slots[slot]}, head {head}\n{KINDS[kinds[head, slot]]}" for head, slot in rows]
    axes.set_yticks(range(len(rows)), names, size=9)
    axes.set_xticks(range(len(labels)), labels, rotation=60, ha="right", rotation_mode="anchor", size=9)
    axes.set_title(f"attention of slots while segment {write} is written", size=10)
    figure.colorbar(image, ax=axes, label="weight", fraction=0.03, pad=0.01)
    return figure


def attention_grid(
    reading: Float[np.ndarray, "N H S M"], text: Sequence[str], *, layers: Sequence[int], slots: Sequence[int]
) -> Figure:
    """Draw the attention of each position to memory at one write, with a row for each layer and a column for each head.

    Args:
        reading: Weights at one write. The last positions are the tokens, after those that the model prepends.
        text: The tokens.
        layers: Numbers of the layers.
        slots: Numbers of the slots.
    """
    rows, heads, positions, _ = reading.shape
    labels = ["(start)"] * (positions - len(text)) + [visible(token) for token in text]
    size = (2.0 + 1.9 * heads, 0.8 + rows * max(1.6, 0.16 * positions))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, heads, squeeze=False, sharex=True, sharey=True)
    for (row, head), axes in np.ndenumerate(grid):
        image = axes.imshow(reading[row, head], cmap=WEIGHTS, vmin=0, vmax=float(reading.max()), aspect="auto")
        axes.set_title(f"layer {layers[row]}, head {head}", size=9)
        axes.set_yticks(range(positions), labels, size=7)
        ticks = np.unique(np.linspace(0, len(slots) - 1, min(len(slots), 5)).astype(int))
        axes.set_xticks(ticks, [str(slots[tick]) for tick in ticks], size=8)
    figure.supxlabel("slot", size=9)
    figure.colorbar(image, ax=grid, label="weight", fraction=0.03, pad=0.01)
    return figure


def retention_map(retention: Float[np.ndarray, "T H M"], *, name: str) -> Figure:
    """Draw the self-weight of each slot at each write, white for 1, with the slots that keep most at the top."""
    heat = retention.mean(1).T
    order = np.argsort(-heat.mean(1), kind="stable")
    figure = Figure(figsize=(8.0, float(np.clip(0.9 + 0.14 * len(heat), 2.2, 7.0))), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(heat[order], cmap=WEIGHTS.removesuffix("_r"), vmin=0, vmax=1, aspect="auto")
    step = -(-len(order) // 40)
    axes.set_yticks(range(0, len(order), step), [str(slot) for slot in order[::step]], size=7)
    axes.set(xlabel="segment that is written", ylabel="slot")
    axes.set_title(name, size=10)
    figure.colorbar(image, ax=axes, label="weight on itself (mean over heads)", fraction=0.03, pad=0.01)
    return figure


def kinds_over_position(arrays: Mapping[str, np.ndarray]) -> Figure:
    """Draw the shares of kinds among slots and among parts, in the first writes and by tenth of the document.

    Args:
        arrays: Arrays that ``SlotRetention`` saves.
    """
    figure = Figure(figsize=(8.0, 5.2), layout="constrained")
    grid = figure.subplots(2, 2, sharey=True, width_ratios=(1, 1.4))
    names = ("slots (mean over heads)", "parts of slots (heads separately)")
    all_counts = (arrays["slots"].sum(1), arrays["parts"].sum((1, 2)))
    span = (MIDDLE.start / TENTHS, MIDDLE.stop / TENTHS)
    for row, (name, counts) in enumerate(zip(names, all_counts, strict=True)):
        first = shares(arrays["first"][:, row])
        first = first[np.isfinite(first[:, 0])]
        _stack(grid[row, 0], np.arange(len(first)) + 1.0, first)
        _stack(grid[row, 1], (np.arange(TENTHS) + 0.5) / TENTHS, shares(counts))
        for low, high, mark in ((*PAPER["retaining"], "paper: retaining"), (*PAPER["reading"], "paper: reading")):
            bottom, top = (low, high) if mark.endswith("retaining") else (1 - high, 1 - low)
            grid[row, 1].fill_between(span, bottom, top, facecolor="white", edgecolor="black", hatch="////", alpha=0.7)
            grid[row, 1].text(span[1] + 0.015, (bottom + top) / 2, mark, va="center", size=8, bbox=PLATE)
        grid[row, 0].set_ylabel(f"share of {name}".replace(" (", "\n("), size=9)
    grid[1, 0].set_xlabel("write")
    grid[1, 1].set_xlabel("position in the document")
    grid[0, 0].legend(loc="lower left", fontsize=8, framealpha=1)
    return figure


def _stack(axes: Axes, x: Float[np.ndarray, " x"], share: Float[np.ndarray, "x 3"]) -> None:
    known = np.isfinite(share).all(1)
    axes.stackplot(x[known], share[known].T, labels=KINDS, colors=INKS, edgecolor="black", linewidth=0.4)
    axes.set(ylim=(0, 1))
    if known.sum() > 1:
        axes.set_xlim(x[known].min(), x[known].max())


def slot_figures(arrays: Mapping[str, np.ndarray]) -> Figure:
    """Draw the half-life of slots against the length of ``v``, and their angle to the initial value by position.

    Args:
        arrays: Arrays that ``SlotRetention`` saves.
    """
    figure = Figure(figsize=(8.0, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    lives, kinds = arrays["half_life"], prevailing(arrays["slots"])
    finite = lives[np.isfinite(lives)]
    highest = 10 * finite.max() if finite.size and finite.max() > 0 else 10.0
    norms = arrays["norms"] if arrays["norms"].size else np.zeros_like(lives)
    for kind, (mark, ink) in enumerate(zip("osD", INKS, strict=True)):
        chosen = kinds == kind
        if not chosen.any():
            continue
        shown = np.clip(np.where(np.isfinite(lives), lives, highest), 0.1, None)[chosen]
        left.scatter(norms[chosen], shown, marker=mark, color=ink, edgecolor="black", linewidth=0.5, label=KINDS[kind])
    if not np.isfinite(lives).all():
        left.axhline(highest, color="black", linewidth=0.5, linestyle=":")
        left.annotate("no loss", (0.02, highest), xycoords=("axes fraction", "data"), size=8, va="bottom")
    left.set(yscale="log", xlabel="length of the forgetting vector v", ylabel="half-life in writes")
    left.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(KINDS), fontsize=8, title="mostly", title_fontsize=8
    )
    counts = arrays["slots"].sum(-1)
    known = (counts > 0).all(1)  # if documents are short, some tenths have no write
    angle = np.degrees(arrays["angle"][known] / counts[known])
    x = (np.flatnonzero(known) + 0.5) / TENTHS
    low, middle, high = np.quantile(angle, (0.1, 0.5, 0.9), axis=1)
    right.fill_between(x, low, high, color=LIGHT, label="four fifths of the slots")
    right.plot(x, middle, "-o", color=DARK, markersize=4, label="median slot")
    right.set(xlabel="position in the document", ylabel="degrees from the initial value", ylim=(0, None))
    right.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, fontsize=8)
    return figure


def loss_by_position(
    ways: Sequence[str],
    pooled: Float[np.ndarray, "W P"],
    more: Float[np.ndarray, "W P"],
    error: Float[np.ndarray, "W P"],
) -> Figure:
    """Draw bits per token by position in the document, and the difference to memory on.

    Args:
        ways: Names of the rows; the others are compared with the first.
        pooled: Bits per token over all documents together.
        more: Mean over documents of the difference to the first row.
        error: Standard error of that mean.
    """
    figure = Figure(figsize=(8.0, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    x = (np.arange(TENTHS) + 0.5) / TENTHS
    for w, way in enumerate(ways):
        style, ink = STYLES[w], INK_OF_WAY[w]
        left.plot(x, pooled[w], style, color=ink, markersize=4, label=f"memory {way}")
        if w:
            shift = 0.012 * (w - (len(ways) - 1) / 2)
            right.errorbar(x + shift, more[w], error[w], fmt=style, color=ink, markersize=4, capsize=2)
    right.axhline(0, color="black", linewidth=0.8)
    left.set(xlabel="position in the document", ylabel="bits per token", xlim=(0, 1))
    right.set(xlabel="position in the document", ylabel="additional bits per token", xlim=(0, 1))
    figure.legend(loc="outside upper center", ncols=len(ways), fontsize=8)
    return figure


def gradient_by_distance(quartiles: Float[np.ndarray, "3 T"]) -> Figure:
    """Draw the gradient of a loss with respect to the memory n segments before, on a logarithmic scale."""
    low, middle, high = quartiles
    distance = np.arange(len(middle))
    figure = Figure(figsize=(8.0, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.fill_between(distance, low, high, color=LIGHT, label="half of all segments")
    axes.plot(distance, middle, "-o", color=DARK, markersize=4, label="median")
    axes.set(xlabel="segments between the memory and the loss", ylabel="norm of d loss / d memory, nats")
    if (low > 0).all():
        axes.set_yscale("log")
        for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis(FuncFormatter(lambda value, place: f"{value:g}"))
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.legend(fontsize=8)
    return figure


def visible(token: str) -> str:
    """A token as a short label, with marks for tabs, line ends and spaces."""
    marked = re.sub(" {3,}", lambda spaces: f"␣{len(spaces[0])}", token.translate(MARKS))
    marked = marked.replace(" ", "␣")
    return (marked if len(marked) <= LONGEST else marked[: LONGEST - 1] + "…").replace("$", r"\$")
