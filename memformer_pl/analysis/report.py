"""The report: tables, figures and documents in one HTML file that needs nothing beside it."""

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
    "frozen": "frozen from the middle of a document on",
    "shuffled": "that of another document (shuffled)",
}

LEANING = (
    "More bits than as it is: so much does this model lean on its memory. That does not say whether memory pays, since "
    "a model trained without would have learned to do without."
)

NO_GRADIENT = (
    "There is no gradient through time to show: this model cuts it between segments, as those with a cache do, or no "
    "document has two whole segments."
)

VIEWER = (
    "The first {written} of its {read} segments, as they were written into memory; a bar stands behind each. Point at "
    "a token to see what it costs, into which slots it was written and which it reads. Choose a slot to see what each "
    "token gave it (its weight, mean over heads), or how much of that it still holds at the end of what is shown."
)


def page(body: Sequence[str], documents: Mapping[int, Mapping[str, object]]) -> str:
    """The whole file."""
    template = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    data = json.dumps(documents, separators=(",", ":")).replace("</", "<\\/")
    return template.replace("{{body}}", "\n".join(body)).replace("{{documents}}", data)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str) -> str:
    """A table; its first column has names."""
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return f"<table><caption>{escape(caption)}</caption>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def embedded(figure: Figure, caption: str) -> str:
    """A figure as part of the file, with what is to be seen in it. Where room is scarce it shrinks by a fifth."""
    stream = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # tokens of a script that the font lacks show a box
        figure.savefig(stream, format="svg", metadata={"Date": None})
    _, opening, drawing = stream.getvalue().partition("<svg")
    least = f'style="min-width: {0.8 * figure.get_figwidth():.2f}in"'
    return f"<figure>{opening} {least}{drawing}<figcaption>{escape(caption)}</figcaption></figure>"


def cost_table(
    ways: Sequence[str], bits: Float[np.ndarray, "W documents"], sizes: Float[np.ndarray, " documents"]
) -> str:
    """Bits per byte of every way, and how many more than with memory as it is."""
    rows = []
    for way, cost in zip(ways, bits, strict=True):
        more, error = paired_gain(cost, bits[0], sizes)
        compared = "" if way == "on" else f"{more:+.4f} ± {error:.4f}"
        rows.append((MEANINGS[way], f"{cost.sum() / sizes.sum():.4f}", compared))
    caption = "Bits per byte; more than as it is: mean over documents and its standard error"
    return table(("memory", "bits per byte", "more than as it is"), rows, caption=caption)


def kind_table(arrays: Mapping[str, np.ndarray]) -> str:
    """Shares of kinds in the middle of documents beside the paper's, and what slots of each kind are like."""
    there, kinds = middle_shares(arrays), prevailing(arrays["slots"])
    norms, angles = by_kind(arrays["norms"], kinds), by_kind(mean_angle(arrays), kinds)
    rows = []
    for place, kind in enumerate(KINDS):
        lives = arrays["half_life"][kinds == place]
        paper = "{:.0%} to {:.0%}".format(*PAPER[kind]) if kind in PAPER else ""
        life = format_half_life(float(np.median(lives))) if lives.size else ""
        means = (f"{mean[place]:.{digits}f}" if lives.size else "" for mean, digits in ((norms, 3), (angles, 0)))
        own = (f"{there[name][kind]:.1%}" for name in ("slots", "parts"))
        rows.append((kind, *own, paper, str(lives.size), life, *means))
    head = ("kind", "slots", "parts", "the paper", "slots mostly so", "half-life", "||v||", "from start")
    where = f"between {MIDDLE.start / TENTHS:.0%} and {MIDDLE.stop / TENTHS:.0%} of a document"
    caption = f"Shares {where}; median half-life in writes, mean length of v, mean degrees from where they began"
    return table(head, rows, caption=caption)


def rule() -> str:
    """How kinds are told apart."""
    low, high = BORDERS
    return (
        f"A slot is retaining at a step if it gives itself at least {high} of its attention, reading if less than "
        f"{low}, aggregating between: borders halfway between the paper's examples "
        f"({', '.join(map(str, EXAMPLES))}). Each head keeps or replaces a part of a slot by itself, so parts are "
        "counted as well; the self-weight of a slot is the mean over its parts. Half-life: writes after which half of "
        f"a slot's content is left, by its weights on itself, extrapolated beyond {GAPS[-1]:,}; forgetting comes on "
        "top."
    )


def verdict(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """Whether the shares are those of the paper, of slots and of parts; and how many slots hold next to nothing."""
    sentences = []
    for name, share in middle_shares(arrays).items():
        said = []
        for kind, (low, high) in PAPER.items():
            own = round(share[kind], 3)
            where = "as in" if low <= own <= high else "more than in" if own > high else "fewer than in"
            said.append(f"{own:.1%} are {kind}, {where} the paper ({low:.0%} to {high:.0%})")
        sentences.append(f"Of the {name} in the middle of documents, {' and '.join(said)}.")
    idle = int((mean_angle(arrays) < IDLE).sum())
    sentences.append(
        f"{idle} of {len(arrays['half_life'])} slots stay within {IDLE:.0f} degrees of where they began: such a slot "
        "retains its beginning, and next to nothing of the document."
    )
    return sentences


def head_table(arrays: Mapping[str, np.ndarray]) -> str:
    """What each head of the writer does: its mean self-weight, the shares of kinds among its parts, their half-life."""
    writes = arrays["slots"][:, 0].sum()
    kept = (arrays["retention"].sum(0) / max(writes, 1)).mean(-1)
    kinds = shares(arrays["parts"][MIDDLE].sum((0, 2)))
    lives = np.median(arrays["part_half_life"], axis=-1)
    rows = [
        (f"head {head}", f"{kept[head]:.3f}", *(f"{share:.1%}" for share in kinds[head]), format_half_life(float(lives[head])))
        for head in range(len(kept))
    ]
    head_row = ("", "mean self-weight", *KINDS, "median half-life")
    return table(head_row, rows, caption="Heads of the writer; shares in the middle of documents")
