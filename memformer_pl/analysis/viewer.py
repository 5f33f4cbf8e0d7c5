"""View of a document token by token, for the report: the bits of a token, and the slots that hold it or that it reads.

T  writes     L  tokens in a segment     M  slots     H  heads     N  layers     S  positions that read memory
"""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from jaxtyping import Float

from memformer_pl.callbacks.slot_retention import KINDS

TOP = 3
"""Number of slots that are named for a token."""
LONGEST = 10_000
"""Longest half-life, in writes, that is shown as a number: no longer document was read."""


def held(retention: Float[np.ndarray, "T H M"], writing: Float[np.ndarray, "T H M L"]) -> Float[np.ndarray, "T M L"]:
    """Share of each token in the final content of a slot: its weight when it was written, times the later self-weights
    of the slot, averaged over heads. With the share of the initial value, these sum to 1 for each slot.

    The shares are attention weights: lengths of values and forgetting are not included.
    """
    later = np.cumprod(np.concatenate((np.ones_like(retention[:1]), retention[:0:-1])), axis=0)[::-1]
    return np.asarray((later[..., None] * writing.astype(np.float64)).mean(1))


def view(
    arrays: Mapping[str, np.ndarray], document: int, bits: Float[np.ndarray, "W segments L"], ways: Sequence[str]
) -> dict[str, object]:
    """The data of a document for the page of the report, ready for JSON.

    Args:
        arrays: Arrays that ``AttentionMaps`` saves.
        document: One of the documents in them.
        bits: Bits of each token, by way.
        ways: Names of the rows of ``bits``.
    """
    text, retention = arrays[f"text_{document}"], arrays[f"retention_{document}"]
    writing, reading = (arrays[f"{name}_{document}"].astype(np.float32) for name in ("writing", "reading"))
    writes, length = text.shape
    wrote, kept = writing.mean(1), held(retention, writing)
    slots = arrays["slots"]
    costs = {"on": "bits", "reset": "bits_reset"}
    none = np.zeros((writes, length, len(slots)))
    reads = reading.mean((1, 2))[:, -length:] if reading.size else none
    return {
        "slots": slots.tolist(),
        "text": text.tolist(),
        **{costs[way]: bits[ways.index(way), :writes].round(2).tolist() for way in costs if way in ways},
        "wrote": packed(wrote),
        "most_wrote": most(wrote).tolist(),
        "held": packed(kept),
        "most_held": most(kept).tolist(),
        "writes": top(wrote.swapaxes(1, 2), slots),
        "reads": top(reads, slots),
    }


def most(weights: Float[np.ndarray, "T M L"]) -> Float[np.ndarray, " M"]:
    """Largest weight of each slot."""
    return np.asarray(weights.max((0, 2)).round(4))


def packed(weights: Float[np.ndarray, "T M L"]) -> str:
    """Encode weights as base64, with a byte for each: 255 is the largest weight of the slot."""
    largest = weights.max((0, 2), keepdims=True)
    return b64encode((255 * weights / np.where(largest > 0, largest, 1)).round().astype(np.uint8).tobytes()).decode()


def top(weights: Float[np.ndarray, "T L M"], slots: np.ndarray) -> list[list[list[tuple[int, float]]]]:
    """The slots with the largest weights for each token, without those below 0.01."""
    order = np.argsort(-weights, axis=-1, kind="stable")[..., :TOP]
    values = np.take_along_axis(weights, order, -1)
    pairs = zip(slots[order].tolist(), values.tolist(), strict=True)
    return [
        [
            [(slot, round(weight, 2)) for slot, weight in zip(*token, strict=True) if weight >= 0.01]
            for token in zip(*row, strict=True)
        ]
        for row in pairs
    ]


def frame(
    document: int, slots: Sequence[int], lives: Float[np.ndarray, " slots"], kinds: Sequence[int], *, has_reset: bool
) -> str:
    """The HTML of the view of a document.

    Args:
        document: Number of the document.
        slots: Numbers of the slots.
        lives: Half-lives of these slots.
        kinds: Most frequent kind of each slot.
        has_reset: Whether the bits with memory reset are known, to compare with.
    """
    order = np.argsort(-lives, kind="stable").tolist()
    options = [
        ("saved", "bits that memory saves (blue) or costs (brown), full colour from 2 bits" if has_reset else "nothing")
    ]
    for way, verb in {"held": "held at the end by", "wrote": "written into"}.items():
        for index in order:
            description = f"mostly {KINDS[kinds[index]]}, half-life {format_half_life(lives[index])}"
            options.append((f"{way} {index}", f"{verb} slot {slots[index]} ({description})"))
    listed = "".join(f'<option value="{value}">{escape(name)}</option>' for value, name in options)
    return (
        f'<div id="document-{document}"><p><label>Colour: <select>{listed}</select></label></p>'
        '<div class="viewer"><pre></pre><div class="card">Point at a token.</div></div></div>'
    )


def format_half_life(life: float) -> str:
    """A half-life in writes, rounded for display."""
    if not np.isfinite(life):
        return "infinite"
    if life > LONGEST:
        return f"over {LONGEST:,}"
    return f"{life:,.0f}" if life >= 10 else f"{life:.1f}"
