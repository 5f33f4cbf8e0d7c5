"""A document token by token, for the report: what each token costs, which slots hold it, and which it reads.

T  writes     L  tokens in a segment     M  slots     H  heads     N  layers     S  positions that read memory
"""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from jaxtyping import Float

from memformer_pl.callbacks.slot_retention import KINDS

TOP = 3
"""Slots that are named for a token."""
LONGEST = 10_000
"""Writes: a half-life that is longer is not told, since nothing so long was read."""


def held(retention: Float[np.ndarray, "T H M"], writing: Float[np.ndarray, "T H M L"]) -> Float[np.ndarray, "T M L"]:
    """How much of what a slot holds at the end is each token: the mean over heads of its weight when it was written,
    times the slot's weights on itself since. With what is left of the beginning these sum to 1 for each slot.

    Weights are counted, not lengths of values, and forgetting is left out.
    """
    later = np.cumprod(np.concatenate((np.ones_like(retention[:1]), retention[:0:-1])), axis=0)[::-1]
    return np.asarray((later[..., None] * writing.astype(np.float64)).mean(1))


def view(
    arrays: Mapping[str, np.ndarray], document: int, bits: Float[np.ndarray, "W segments L"], ways: Sequence[str]
) -> dict[str, object]:
    """What the report's page needs of a document, ready for JSON.

    Args:
        arrays: As ``AttentionMaps`` saves them.
        document: One of those that are in it.
        bits: Of each token, by way of reading.
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
    """The largest weight of each slot."""
    return np.asarray(weights.max((0, 2)).round(4))


def packed(weights: Float[np.ndarray, "T M L"]) -> str:
    """A byte for each weight, 255 for the largest of the slot, as base64."""
    largest = weights.max((0, 2), keepdims=True)
    return b64encode((255 * weights / np.where(largest > 0, largest, 1)).round().astype(np.uint8).tobytes()).decode()


def top(weights: Float[np.ndarray, "T L M"], slots: np.ndarray) -> list[list[list[tuple[int, float]]]]:
    """The slots with the largest weights at each token; those below a hundredth are left out."""
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
    document: int, slots: Sequence[int], lives: Float[np.ndarray, " some"], kinds: Sequence[int], *, spared: bool
) -> str:
    """The HTML that a document is shown in.

    Args:
        document: Its number.
        slots: Their numbers.
        lives: Half-lives of those slots.
        kinds: What each is most often.
        spared: Whether there is a reading with memory reset to compare with.
    """
    order = np.argsort(-lives, kind="stable").tolist()
    options = [
        ("spared", "bits that memory spares (blue) or costs (brown), 2 and more in full" if spared else "nothing")
    ]
    for way, verb in {"held": "held at the end of this by", "wrote": "written into"}.items():
        for place in order:
            like = f"mostly {KINDS[kinds[place]]}, half-life {format_half_life(lives[place])}"
            options.append((f"{way} {place}", f"{verb} slot {slots[place]} ({like})"))
    listed = "".join(f'<option value="{value}">{escape(name)}</option>' for value, name in options)
    return (
        f'<div id="document-{document}"><p><label>Colour: <select>{listed}</select></label></p>'
        '<div class="viewer"><pre></pre><div class="card">Point at a token.</div></div></div>'
    )


def format_half_life(life: float) -> str:
    """A half-life in writes, as it reads well."""
    if not np.isfinite(life):
        return "infinite"
    if life > LONGEST:
        return f"over {LONGEST:,}"
    return f"{life:,.0f}" if life >= 10 else f"{life:.1f}"
