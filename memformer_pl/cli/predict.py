"""The command ``predict``: what each token of documents costs, as a table in Parquet.

The bytes of a document's tokens join to the document, whatever the tokenizer drops or changes: ``data/alignment.py``
says which bytes are whose. A document of which no token is made has no row.

A document may be of any size: no more than a block of it is held, nor more of the table than a batch of rows.
"""

import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from jsonargparse import Namespace

from memformer_pl.atomic_write import atomic_write, partial_of, require_apart, writing
from memformer_pl.cli.options import (
    Parser,
    add_checkpoint,
    add_device,
    counted,
    load_reader,
    progress,
    require_file,
)
from memformer_pl.contract import Segment, SegmentModel, SegmentOutput, as_state
from memformer_pl.data.corpora.files import Files
from memformer_pl.data.streaming import Step, steps
from memformer_pl.data.tokenizers.alignment import Aligned, told_loss
from memformer_pl.errors import LARGEST, UsageError, require_sizes
from memformer_pl.training.metrics import perplexity

ROWS = 1 << 15
"""Rows that are written at once."""


def add_options(parser: Parser) -> None:
    """What can be asked for."""
    add_checkpoint(parser)
    parser.add_argument(
        "--documents",
        required=True,
        nargs="+",
        type=str,
        help="Files, folders or patterns. A row of a table is a document (.jsonl, .ndjson, .json, .csv, .tsv, "
        ".parquet, .arrow, .feather); so is every other file. What also ends in .gz, .bz2, .xz or .zst is unpacked.",
    )
    parser.add_argument(
        "--out",
        required=True,
        type=str,
        help="The table: document, position, token, bytes, loss in nats, and whether the likeliest token was right.",
    )
    parser.add_argument("--field", type=str, default="text", help="The column of a table that holds the text.")
    parser.add_argument(
        "--lanes", type=int, default=8, help="Documents that are read side by side; their rows take turns."
    )
    add_device(parser)


def run(options: Namespace, parser: Parser) -> None:
    """Read the documents, write the table, and tell what they cost together.

    Raises:
        UsageError: The checkpoint or a document cannot be used, or the table not be written; there is none then.
    """
    try:
        require_sizes(most=LARGEST, lanes=options.lanes)
    except ValueError as mistake:
        parser.error(str(mistake))
    require_file(options, "out", parser)
    corpus = Files(paths=options.documents, field=options.field)
    require_not_read(Path(options.out), corpus, checkpoint=options.ckpt_path)
    model, tokenizer = load_reader(options, parser)
    with progress("reading", total=corpus.size()) as bar, atomic_write(options.out) as path, Table(path) as table:
        documents = (
            (name, table.losing(tokenizer.align_blocks(counted(blocks, bar), name=name)))
            for name, blocks in corpus.streams()
        )
        for step, output in outputs(model, steps(documents, lanes=options.lanes, length=model.segment_length)):
            table.add(step, output)
        table.finish()
    sys.stderr.write(f"{table.total.told(int(bar.tasks[0].completed))}\n")
    print(f"Written: {options.out}")


def require_not_read(out: Path, corpus: Files, *, checkpoint: str) -> None:
    """Refuse a table that would take the place of a document or of the checkpoint, or be read as a document next time.

    Raises:
        UsageError: It would.
    """
    written = (out, partial_of(out))
    require_apart("out", written, read=[Path(checkpoint)])
    for path in written:
        if corpus.would_read(path):
            raise UsageError(
                f"out={str(out)!r} is, or would be, one of the documents that are read: write the table elsewhere"
            )


def outputs(model: SegmentModel, read: Iterator[Step]) -> Iterator[tuple[Step, SegmentOutput]]:
    """What a model says about segments, each lane from where the one before has left it."""
    device = next(model.parameters()).device
    state, lanes = None, 0
    for step in read:
        segment = Segment._make(field if field is None else field.to(device) for field in step.segment)
        with torch.inference_mode():
            if state is None:
                state = model.initial_state(len(segment.document_start))
            elif len(step.kept) < lanes:
                state = as_state(state, (field[step.kept] for field in state))
            output, state = model(segment, state)
        lanes = len(step.kept)
        yield step, output


class Total(NamedTuple):
    """What has been read."""

    documents: int = 0
    tokens: int = 0
    nats: float = 0.0
    lost: int = 0
    """Bytes that do not come back from the tokens."""

    def told(self, size: int) -> str:
        """It in words, for documents of so many bytes."""
        loss = self.nats / max(self.tokens, 1)
        return (
            f"{self.documents:,} documents, {self.tokens:,} tokens, {size:,} bytes: {loss:.4f} nats per token "
            f"(perplexity {perplexity(loss):.3f}), "
            f"{self.nats / math.log(2) / max(size, 1):.4f} bits per byte{told_loss(self.lost, size)}"
        )


class Table:
    """Writes a row for each token, inside ``with``.

    Args:
        path: Of the file.
    """

    def __init__(self, path: Path) -> None:
        self.total = Total()
        kinds = {
            "document": pyarrow.string(),
            "position": pyarrow.int64(),
            "token": pyarrow.int32(),
            "bytes": pyarrow.binary(),
            "loss": pyarrow.float32(),
            "correct": pyarrow.bool_(),
        }
        self._schema = pyarrow.schema(kinds.items())
        self._path = path
        with writing(path):
            self._file = pyarrow.parquet.ParquetWriter(path, self._schema)
        self._start_batch()

    def _start_batch(self) -> None:
        self._names: list[str] = []
        self._columns: list[list[np.ndarray]] = [[] for _ in self._schema]
        self._contents: list[bytes] = []
        self._rows = 0

    def __enter__(self) -> "Table":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with writing(self._path):
            self._file.close()

    def losing(self, parts: Iterable[Aligned]) -> Iterator[Aligned]:
        """The same parts of a document; counts what does not come back from their tokens."""
        for part in parts:
            self.total = self.total._replace(lost=self.total.lost + part.lost)
            yield part

    def add(self, step: Step, output: SegmentOutput) -> None:
        """Append a row for each token of a step, lane by lane."""
        token_mask = step.segment.token_mask.numpy()
        counts = token_mask.sum(1)
        token, loss, correct = (
            tensor.cpu().numpy()[token_mask] for tensor in (step.segment.tokens, output.token_losses, output.correct)
        )
        document = np.repeat(np.arange(len(counts)) + len(self._names), counts)
        position = (np.array(step.firsts)[:, None] + np.arange(token_mask.shape[1]))[token_mask]
        sizes = np.concatenate([part.sizes for part in step.parts])
        for column, values in zip(self._columns, (document, position, token, sizes, loss, correct), strict=True):
            column.append(values)
        self._contents.extend(part.content for part in step.parts)
        self._names.extend(step.names)
        self._rows += len(token)
        self.total = Total(
            self.total.documents + int(step.segment.document_start.sum()),
            self.total.tokens + len(token),
            self.total.nats + float(loss.sum(dtype=np.float64)),
            self.total.lost,
        )
        if self._rows >= ROWS:
            self.finish()

    def finish(self) -> None:
        """Write the rows that are kept."""
        if not self._rows:
            return
        document, position, token, sizes, loss, correct = (np.concatenate(column) for column in self._columns)
        arrays = (
            pyarrow.array(self._names, pyarrow.string()).take(pyarrow.array(document)),
            position,
            token.astype(np.int32),
            _cut(b"".join(self._contents), sizes),
            loss.astype(np.float32),
            correct,
        )
        with writing(self._path):
            self._file.write_table(pyarrow.table(list(map(pyarrow.array, arrays)), schema=self._schema))
        self._start_batch()


def _cut(content: bytes, sizes: np.ndarray) -> pyarrow.Array:
    """The content as an array of bytes, one after the other, of these sizes."""
    offsets = np.concatenate(([0], np.cumsum(sizes)))
    if offsets[-1] > np.iinfo(np.int32).max:  # one token may stand for gigabytes that the tokenizer drops
        raise UsageError(f"a token stands for {sizes.max():,} bytes, which is more than a table can hold")
    buffers = [None, pyarrow.py_buffer(offsets.astype(np.int32)), pyarrow.py_buffer(content)]
    return pyarrow.Array.from_buffers(pyarrow.binary(), len(sizes), buffers)
