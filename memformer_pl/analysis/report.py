"""The report: tables, figures and documents in one self-contained HTML file."""

import io
import json
import warnings
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from memformer_pl.analysis.viewer import format_half_life
from memformer_pl.callbacks.closing_report import paired_gain
from memformer_pl.callbacks.slot_retention import (
    BORDERS,
    EXAMPLES,
    GAPS,
    IDLE,
    KINDS,
    MIDDLE,
    PAPER,
    TENTHS,
    by_kind,
    mean_angle,
    middle_shares,
    prevailing,
    shares,
)

MEANINGS = {
    "on": "as it is (on)",
    "reset": "reset at every segment",
    "frozen": "frozen from the middle of the document",
    "shuffled": "of another document (shuffled)",
}

LEANING = (
    "The additional bits show how much this model relies on its memory. They do not show whether memory pays, since a "
    "model trained without memory would have learned to do without."
)

NO_GRADIENT = (
    "There is no gradient through time to show: this model does not carry gradients between segments, such as models "
    "with a cache, or no document has two whole segments."
)

VIEWER = (
    "The first {written} of its {read} segments, as they were written into memory; a bar ends each. Point at a token "
    "to see its bits, the slots that it was written into and those that it reads. Choose a slot to see the weight of "
    "each token in it (mean over heads), when it was written or at the end of the shown part."
)


def page(body: Sequence[str], documents: Mapping[int, Mapping[str, object]]) -> str:
    """The whole page."""
    template = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    data = json.dumps(documents, separators=(",", ":")).replace("</", "<\\/")
    return template.replace("{{body}}", "\n".join(body)).replace("{{documents}}", data)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str) -> str:
    """An HTML table, with names in the first column."""
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return f"<table><caption>{escape(caption)}</caption>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def embedded(figure: Figure, caption: str) -> str:
    """Embed a figure and its caption in the page. On narrow screens it shrinks by up to a fifth."""
    stream = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # characters that the font lacks are drawn as boxes
        figure.savefig(stream, format="svg", metadata={"Date": None})
    _, opening, drawing = stream.getvalue().partition("<svg")
    least = f'style="min-width: {0.8 * figure.get_figwidth():.2f}in"'
    return f"<figure>{opening} {least}{drawing}<figcaption>{escape(caption)}</figcaption></figure>"


def cost_table(
    ways: Sequence[str], bits: Float[np.ndarray, "W documents"], sizes: Float[np.ndarray, " documents"]
) -> str:
    """Table of the bits per byte of every way, and of the difference to memory as it is."""
    rows = []
    for way, cost in zip(ways, bits, strict=True):
        mean, error = paired_gain(cost, bits[0], sizes)
        difference = "" if way == "on" else f"{mean:+.4f} ± {error:.4f}"
        rows.append((MEANINGS[way], f"{cost.sum() / sizes.sum():.4f}", difference))
    caption = "Bits per byte; difference to memory as it is: mean over documents and its standard error"
    return table(("memory", "bits per byte", "difference"), rows, caption=caption)


def kind_table(arrays: Mapping[str, np.ndarray]) -> str:
    """Table of the shares of kinds in the middle of documents, those of the paper, and properties of each kind."""
    found, kinds = middle_shares(arrays), prevailing(arrays["slots"])
    norms, angles = by_kind(arrays["norms"], kinds), by_kind(mean_angle(arrays), kinds)
    rows = []
    for index, kind in enumerate(KINDS):
        lives = arrays["half_life"][kinds == index]
        paper = "{:.0%} to {:.0%}".format(*PAPER[kind]) if kind in PAPER else ""
        life = format_half_life(float(np.median(lives))) if lives.size else ""
        means = (f"{mean[index]:.{digits}f}" if lives.size else "" for mean, digits in ((norms, 3), (angles, 0)))
        measured = (f"{found[name][kind]:.1%}" for name in ("slots", "parts"))
        rows.append((kind, *measured, paper, str(lives.size), life, *means))
    head = ("kind", "slots", "parts", "the paper", "mostly of this kind", "half-life", "||v||", "from start")
    where = f"between {MIDDLE.start / TENTHS:.0%} and {MIDDLE.stop / TENTHS:.0%} of a document"
    caption = (
        f"Shares {where}; median half-life in writes, mean length of v, mean angle in degrees to the initial value"
    )
    return table(head, rows, caption=caption)


def rule() -> str:
    """How kinds are defined."""
    low, high = BORDERS
    return (
        f"At a write, a slot is retaining if its weight on itself is at least {high}, reading if it is below {low}, "
        "and aggregating in between: borders halfway between the paper's examples "
        f"({', '.join(map(str, EXAMPLES))}). Each head keeps or replaces its part of a slot independently, so parts "
        "are counted as well; the self-weight of a slot is the mean over its parts. Half-life: number of writes after "
        f"which half of a slot's content is left according to its self-weights, extrapolated beyond {GAPS[-1]:,}; "
        "forgetting is not included."
    )


def verdict(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """Sentences that compare the shares with the paper, and count the slots that hold almost nothing."""
    sentences = []
    for name, share in middle_shares(arrays).items():
        comparisons = []
        for kind, (low, high) in PAPER.items():
            measured = round(share[kind], 3)
            where = "as in" if low <= measured <= high else "more than in" if measured > high else "fewer than in"
            comparisons.append(f"{measured:.1%} are {kind}, {where} the paper ({low:.0%} to {high:.0%})")
        sentences.append(f"Of the {name} in the middle of documents, {' and '.join(comparisons)}.")
    idle = int((mean_angle(arrays) < IDLE).sum())
    sentences.append(
        f"{idle} of {len(arrays['half_life'])} slots stay within {IDLE:.0f} degrees of their initial values: they "
        "retain these, and almost nothing of the document."
    )
    return sentences


def head_table(arrays: Mapping[str, np.ndarray]) -> str:
    """Table of the heads of the writer: mean self-weight, shares of kinds among their parts, median half-life."""
    writes = arrays["slots"][:, 0].sum()
    self_weights = (arrays["retention"].sum(0) / max(writes, 1)).mean(-1)
    kinds = shares(arrays["parts"][MIDDLE].sum((0, 2)))
    lives = np.median(arrays["part_half_life"], axis=-1)
    rows = [
        (
            f"head {head}",
            f"{self_weights[head]:.3f}",
            *(f"{share:.1%}" for share in kinds[head]),
            format_half_life(float(lives[head])),
        )
        for head in range(len(self_weights))
    ]
    head_row = ("", "mean self-weight", *KINDS, "median half-life")
    return table(head_row, rows, caption="Heads of the writer; shares in the middle of documents")
