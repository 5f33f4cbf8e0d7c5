"""Analyze a model on validation documents: measure arrays, draw figures, compose a report."""

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from rich.progress import track

from memformer_pl.analysis import ablation, figures, report, samples, through_time, viewer
from memformer_pl.callbacks.attention_maps import chosen_maps, map_arrays
from memformer_pl.callbacks.slot_retention import SlotCounter, prevailing, slot_arrays
from memformer_pl.callbacks.traces import Recorder, Trace, choose
from memformer_pl.contract import SegmentModel
from memformer_pl.data import Images, LaneLoader, PackedDocuments, Rollout, Tokenizer

SHOWN = 3
"""Number of documents that are shown token by token by default."""
HORIZON = 8
"""Segments of a rollout; it does not affect the results."""


class Choice(NamedTuple):
    """What to show token by token. None stands for all layers or slots, and for ``SHOWN`` documents."""

    documents: Sequence[int] | None
    layers: Sequence[int] | None
    slots: Sequence[int] | None
    segments: int
    """Largest number of segments of a document, from its start."""


class Findings(NamedTuple):
    """Arrays of an analysis, by file. For a model without probes of a memory, ``slots`` and ``maps`` are empty.

    ``ablation``: ``ways``; ``bits`` ``[W, documents, P]`` and ``tokens`` ``[documents, P]`` by tenth; ``bytes`` of each
    document; ``bits_D`` ``[W, segments, L]`` of the tokens of a shown document D.
    ``slots``: as ``SlotRetention`` saves them. ``maps``: as ``AttentionMaps`` saves them.
    ``gradient``: ``norms`` ``[B, T, T]``; see :func:`~memformer_pl.analysis.through_time.gradient_norms`.
    ``images``: see :func:`~memformer_pl.analysis.samples.sample_images`; empty if the documents are not images.
    """

    ablation: dict[str, np.ndarray]
    slots: dict[str, np.ndarray]
    maps: dict[str, np.ndarray]
    gradient: dict[str, np.ndarray]
    images: dict[str, np.ndarray]

    @classmethod
    def load(cls, folder: Path) -> "Findings":
        """Read the files that :meth:`save` wrote."""
        files = {name: folder / f"{name}.npz" for name in cls._fields}
        return cls(**{name: dict(np.load(path)) if path.exists() else {} for name, path in files.items()})

    def save(self, folder: Path) -> None:
        """Write a compressed file for each group of arrays."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, arrays in self._asdict().items():
            if arrays:
                np.savez_compressed(folder / f"{name}.npz", **arrays)


class Drawn(NamedTuple):
    """A figure and its caption."""

    figure: Figure
    caption: str


def look(
    model: SegmentModel,
    documents: PackedDocuments,
    tokenizer: Tokenizer,
    *,
    segment_length: int,
    lanes: int,
    choice: Choice,
    images: Images | None = None,
) -> Findings:
    """Run the model over all documents in every way, record its slots, and measure gradients through time.

    Args:
        model: A model in evaluation mode.
        documents: Documents that it was not trained on.
        tokenizer: Their tokenizer.
        segment_length: Tokens in a segment, as in training.
        lanes: Number of lanes.
        choice: What to show token by token.
        images: The corpus, if the documents are images.

    Raises:
        OptionError: A chosen document, layer or slot does not exist.
    """
    segments = -(-documents.lengths // segment_length)
    shown = shown_documents(segments, choice)
    maps = chosen_maps(model, layers=choice.layers, slots=choice.slots, segments=choice.segments)
    loader = LaneLoader(
        documents, batch_size=min(lanes, len(documents)), segment_length=segment_length, horizon=HORIZON, shuffle=False
    )
    counter, traces = SlotCounter(shown), dict[int, Trace]()
    limits = {document: min(int(segments[document]), choice.segments) for document in shown}
    recorders = [Recorder(model, segments=dict(enumerate(segments.tolist())), finish=counter.add)]
    if maps is not None:
        recorders.append(Recorder(model, segments=limits, finish=traces.__setitem__, maps=maps))
    ways = ablation.ways_for(model, lanes=loader.batch_size)
    rollouts = {way: track(loader, f"{f'reading, memory {way}':24}") for way in ways}
    costs = ablation.costs(
        model, {**rollouts, "on": watched(rollouts["on"], recorders)}, segments=segments, shown=shown
    )
    norms = through_time.through_time(
        model,
        documents,
        segment_length=segment_length,
        track=lambda steps: track(steps, f"{'gradient through time':24}"),
    )
    return Findings(
        ablation={
            "ways": np.array(ways),
            "bits": costs.bits,
            "tokens": costs.tokens,
            "bytes": documents.bytes,
            **{f"bits_{document}": bits for document, bits in costs.shown.items()},
        },
        slots={} if counter.statistics is None else slot_arrays(counter.statistics, counter.traces, model),
        maps={} if maps is None else map_arrays(traces, tokenizer, layers=maps.layers, slots=maps.slots),
        gradient={"norms": norms},
        images={} if images is None else samples.sample_images(model, documents, images),
    )


def shown_documents(segments: np.ndarray, choice: Choice) -> list[int]:
    """The chosen documents, or those whose length is nearest to the number of segments to show."""
    if choice.documents is None:
        return [int(number) for number in np.argsort(np.abs(segments - choice.segments), kind="stable")[:SHOWN]]
    return choose("documents", choice.documents, len(segments))


def watched(rollouts: Iterable[Rollout], recorders: Sequence[Recorder]) -> Iterator[Rollout]:
    """Yield the same rollouts, with hooks attached while each is processed."""
    for rollout in rollouts:
        for recorder in recorders:
            recorder.start(rollout.documents)
        try:
            yield rollout
        finally:
            for recorder in recorders:
                recorder.stop()


def draw(findings: Findings) -> dict[str, Drawn]:
    """Draw all figures, keyed by title: those of all documents, then ``document D, ...``."""
    drawn, ways = {}, findings.ablation["ways"].tolist()
    costs = ablation.Costs(findings.ablation["bits"], findings.ablation["tokens"], {})
    drawn["loss by position"] = Drawn(
        figures.loss_by_position(ways, *ablation.by_position(costs)),
        "Left: bits per token over all documents. Right: additional bits compared with memory on, mean over documents "
        "and its standard error.",
    )
    if carries_gradient(findings):
        lanes, span, _ = findings.gradient["norms"].shape
        drawn["gradient by distance"] = Drawn(
            figures.gradient_by_distance(through_time.by_distance(findings.gradient["norms"])),
            "Gradient of the mean loss of a segment with respect to the memory before an earlier segment; distance 0 "
            f"is the segment itself. Exact back-propagation over {span} segments of {lanes} documents, after {span} "
            "segments without gradients.",
        )
    if findings.images:
        drawn["images"] = Drawn(
            samples.draw_images(findings.images),
            "Left: validation images. Right: images sampled from the model, pixel by pixel from the top left.",
        )
    if findings.slots:
        drawn["kinds over position"] = Drawn(
            figures.kinds_over_position(findings.slots),
            "Left: the first writes of a document. Right: by position in the document. Hatched: the shares that the "
            "paper reports for the middle of documents, of retaining slots (below) and reading slots (above).",
        )
        drawn["slots"] = Drawn(
            figures.slot_figures(findings.slots), "Left: each slot. Right: all slots, by position in the document."
        )
    for document in findings.maps["documents"].tolist() if findings.maps else ():
        drawn |= {f"document {document}, {name}": one for name, one in draw_document(findings, document).items()}
    return drawn


def carries_gradient(findings: Findings) -> bool:
    """Whether any loss has a gradient with respect to a memory."""
    return bool(np.nan_to_num(findings.gradient["norms"]).any())


def draw_document(findings: Findings, document: int) -> dict[str, Drawn]:
    """Draw the figures of a document."""
    maps, whole = findings.maps, findings.slots[f"retention_{document}"]
    retention, writing, reading, text = (
        maps[f"{name}_{document}"] for name in ("retention", "writing", "reading", "text")
    )
    write, rows = figures.example_rows(retention)
    drawn = {
        "one slot of each kind": Drawn(
            figures.attention_rows(retention, writing, text, slots=maps["slots"]),
            "Like the paper's Figure 6: each row is the attention of one slot in one head to itself and to the tokens "
            f"of a segment. {len(rows)} of 3 kinds occur at this write; a slot never attends to another slot.",
        ),
        "retention": Drawn(
            figures.retention_map(whole, name=f"document {document}"),
            "White: the slot is kept; black: it is replaced. Slots that keep most are at the top.",
        ),
    }
    if reading.size:
        drawn["reading"] = Drawn(
            figures.attention_grid(
                reading[write].astype(np.float32),
                text[write].tolist(),
                layers=maps["layers"].tolist(),
                slots=maps["slots"].tolist(),
            ),
            f"Attention of each position of segment {write} to memory, for each layer and head.",
        )
    return drawn


def compose(findings: Findings, drawn: dict[str, Drawn], *, subject: str) -> str:
    """Compose the HTML of the report."""
    ways, sizes = findings.ablation["ways"].tolist(), findings.ablation["bytes"].astype(np.float64)
    body = ["<h1>What memory does</h1>", f"<p>{escape(subject)}</p>"]

    def show(name: str) -> None:
        if name in drawn:
            body.append(report.embedded(*drawn[name]))

    if findings.images:
        body.append("<h2>Sampled images</h2>")
        show("images")
    body.append("<h2>What memory is worth</h2>")
    body.append(report.cost_table(ways, findings.ablation["bits"].sum(-1), sizes))
    body.append(f"<p>{escape(report.LEANING)}</p>")
    show("loss by position")
    show("gradient by distance")
    if len(ways) > 1 and not carries_gradient(findings):
        body.append(f"<p>{escape(report.NO_GRADIENT)}</p>")
    if not findings.slots:
        body.append("<p>The model has no probes of a writer, so there is nothing to show about slots.</p>")
        return report.page(body, {})
    body.append("<h2>What slots do</h2>")
    body += [f"<p>{escape(sentence)}</p>" for sentence in (*report.verdict(findings.slots), report.rule())]
    body += [report.kind_table(findings.slots), report.head_table(findings.slots)]
    show("kinds over position")
    show("slots")
    lives, kinds, documents = findings.slots["half_life"], prevailing(findings.slots["slots"]), {}
    slots = findings.maps["slots"]
    for document in findings.maps["documents"].tolist():
        bits = findings.ablation[f"bits_{document}"]
        documents[document] = viewer.view(findings.maps, document, bits, ways)
        read, written = len(bits[0]), len(findings.maps[f"text_{document}"])
        body.append(f"<h2>Document {document}</h2><p>{escape(report.VIEWER.format(written=written, read=read))}</p>")
        body.append(
            viewer.frame(document, slots.tolist(), lives[slots], kinds[slots].tolist(), has_reset="reset" in ways)
        )
        for name in ("one slot of each kind", "retention", "reading"):
            show(f"document {document}, {name}")
    return report.page(body, documents)
