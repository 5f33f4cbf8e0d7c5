"""From a model and held-out documents to arrays, figures and a report."""

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
"""Documents that are shown token by token, unless they are chosen."""
HORIZON = 8


class Choice(NamedTuple):
    """What is shown token by token. None is all, of documents a few."""

    documents: Sequence[int] | None
    layers: Sequence[int] | None
    slots: Sequence[int] | None
    segments: int
    """The most of a document, from its beginning."""


class Findings(NamedTuple):
    """What was found: the arrays of each file, by the names of the files. Without probes of a memory, no slots and maps.

    ``ablation``: ``ways``; ``bits`` ``[W, documents, P]`` and ``tokens`` ``[documents, P]`` by tenth; ``bytes`` of each
    document; ``bits_D`` ``[W, segments, L]`` of the tokens of a shown document D.
    ``slots``: as ``SlotRetention`` saves them. ``maps``: as ``AttentionMaps`` saves them.
    ``gradient``: ``norms`` ``[B, T, T]``, see :func:`~memformer_pl.analysis.through_time.gradient_norms`.
    ``images``: see :func:`~memformer_pl.analysis.samples.sample_images`; nothing where documents are no images.
    """

    ablation: dict[str, np.ndarray]
    slots: dict[str, np.ndarray]
    maps: dict[str, np.ndarray]
    gradient: dict[str, np.ndarray]
    images: dict[str, np.ndarray]

    @classmethod
    def load(cls, folder: Path) -> "Findings":
        """What :meth:`save` wrote."""
        files = {name: folder / f"{name}.npz" for name in cls._fields}
        return cls(**{name: dict(np.load(path)) if path.exists() else {} for name, path in files.items()})

    def save(self, folder: Path) -> None:
        """Write a compressed file for each."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, arrays in self._asdict().items():
            if arrays:
                np.savez_compressed(folder / f"{name}.npz", **arrays)


class Drawn(NamedTuple):
    """A figure, and what is to be seen in it."""

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
    """Read all documents in every way, follow what slots do, and take the gradient through time.

    Args:
        model: In evaluation mode.
        documents: That it has not been trained on.
        tokenizer: To show tokens with.
        segment_length: As in training.
        lanes: Read side by side.
        choice: What is shown token by token.
        images: The corpus, where the documents are images.

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
    """The chosen documents, or those whose length is next to what is shown of one."""
    if choice.documents is None:
        return [int(place) for place in np.argsort(np.abs(segments - choice.segments), kind="stable")[:SHOWN]]
    return choose("documents", choice.documents, len(segments))


def watched(rollouts: Iterable[Rollout], recorders: Sequence[Recorder]) -> Iterator[Rollout]:
    """The same rollouts, each watched while it is read."""
    for rollout in rollouts:
        for recorder in recorders:
            recorder.start(rollout.documents)
        try:
            yield rollout
        finally:
            for recorder in recorders:
                recorder.stop()


def draw(findings: Findings) -> dict[str, Drawn]:
    """All figures, by name: those of all documents, then ``document D, ...``."""
    drawn, ways = {}, findings.ablation["ways"].tolist()
    costs = ablation.Costs(findings.ablation["bits"], findings.ablation["tokens"], {})
    drawn["loss by position"] = Drawn(
        figures.loss_by_position(ways, *ablation.by_position(costs)),
        "Left: all documents together. Right: how many bits more than with memory on; mean over documents and its "
        "standard error.",
    )
    if carries_gradient(findings):
        lanes, span, _ = findings.gradient["norms"].shape
        drawn["gradient by distance"] = Drawn(
            figures.gradient_by_distance(through_time.by_distance(findings.gradient["norms"])),
            "How much the mean loss of a segment depends on the memory with which an earlier one was entered; 0 is its "
            f"own. Exact back-propagation over {span} segments of {lanes} documents, after {span} segments without.",
        )
    if findings.images:
        drawn["images"] = Drawn(
            samples.draw_images(findings.images),
            "Left: held-out images. Right: drawn by the model, pixel after pixel from the top left, each by chance as "
            "likely as the model says.",
        )
    if findings.slots:
        drawn["kinds over position"] = Drawn(
            figures.kinds_over_position(findings.slots),
            "Left: the first writes of a document. Right: over its course. Hatched: where the paper has the border of "
            "retaining (below) and that of reading (above) in the middle of documents.",
        )
        drawn["slots"] = Drawn(
            figures.slot_figures(findings.slots), "Left: each slot. Right: all slots, by position in the document."
        )
    for document in findings.maps["documents"].tolist() if findings.maps else ():
        drawn |= {f"document {document}, {name}": one for name, one in draw_document(findings, document).items()}
    return drawn


def carries_gradient(findings: Findings) -> bool:
    """Whether any loss has a gradient in a memory."""
    return bool(np.nan_to_num(findings.gradient["norms"]).any())


def draw_document(findings: Findings, document: int) -> dict[str, Drawn]:
    """The figures of a document."""
    maps, whole = findings.maps, findings.slots[f"retention_{document}"]
    retention, writing, reading, text = (
        maps[f"{name}_{document}"] for name in ("retention", "writing", "reading", "text")
    )
    write, rows = figures.example_rows(retention)
    drawn = {
        "one slot of each kind": Drawn(
            figures.attention_rows(retention, writing, text, slots=maps["slots"]),
            "The paper's Figure 6: each row is the attention of one slot, in one head, over itself and the tokens of a "
            f"segment. {len(rows)} of 3 kinds are there at this write; a slot never attends to another slot.",
        ),
        "retention": Drawn(
            figures.retention_map(whole, name=f"document {document}"),
            "White keeps all, black is written anew; slots that keep most at the top.",
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
            f"What each position of segment {write} reads from memory, for each layer and head.",
        )
    return drawn


def compose(findings: Findings, drawn: dict[str, Drawn], *, subject: str) -> str:
    """The report."""
    ways, sizes = findings.ablation["ways"].tolist(), findings.ablation["bytes"].astype(np.float64)
    body = ["<h1>What memory does</h1>", f"<p>{escape(subject)}</p>"]

    def show(name: str) -> None:
        if name in drawn:
            body.append(report.embedded(*drawn[name]))

    if findings.images:
        body.append("<h2>What it draws</h2>")
        show("images")
    body.append("<h2>What memory is worth</h2>")
    body.append(report.cost_table(ways, findings.ablation["bits"].sum(-1), sizes))
    body.append(f"<p>{escape(report.LEANING)}</p>")
    show("loss by position")
    show("gradient by distance")
    if len(ways) > 1 and not carries_gradient(findings):
        body.append(f"<p>{escape(report.NO_GRADIENT)}</p>")
    if not findings.slots:
        body.append("<p>The model shows nothing of a memory: it has no probes of a writer.</p>")
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
        body.append(viewer.frame(document, slots.tolist(), lives[slots], kinds[slots].tolist(), spared="reset" in ways))
        for name in ("one slot of each kind", "retention", "reading"):
            show(f"document {document}, {name}")
    return report.page(body, documents)
