"""The command ``predict``: write the loss of every token of documents, as a table in Parquet.

The bytes of a document's tokens join to the document, whatever the tokenizer drops or changes;
``data/tokenizers/alignment.py`` assigns them. A document without tokens has no row.

Documents may be of any size: at most a block of one is in memory, and a batch of rows of the table.
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
from memformer_pl.contract import SegmentModel, SegmentOutput, as_state
from memformer_pl.data.corpora.files import Files
from memformer_pl.data.streaming import SegmentBatch, batch_segments
from memformer_pl.data.tokenizers.alignment import Aligned, lost_bytes_note
from memformer_pl.errors import LARGEST, UsageError, require_sizes
from memformer_pl.training.metrics import perplexity

ROWS = 1 << 15
"""Rows that are written together."""


def add_options(parser: Parser) -> None:
    """Add the options of the command."""
    add_checkpoint(parser)
    parser.add_argument(
        "--documents",
        required=True,
        nargs="+",
        type=str,
        help="Files, folders or patterns. Each row of a table (.jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow, "
        ".feather) and each other file is a document. Files that end in .gz, .bz2, .xz or .zst are decompressed.",
    )
    parser.add_argument(
        "--out",
        required=True,
        type=str,
        help="The table: document, position, token, bytes, loss in nats, and whether the likeliest token was correct.",
    )
    parser.add_argument("--field", type=str, default="text", help="The column of a table that holds the text.")
    parser.add_argument(
        "--batch_size", type=int, default=8, help="Documents to read in parallel; their rows alternate in the table."
    )
    add_device(parser)


def run(options: Namespace, parser: Parser) -> None:
    """Read the documents, write the table, and print what all documents cost.

    Raises:
        UsageError: The checkpoint or a document is unusable, or writing fails. The table is then not written.
    """
    try:
        require_sizes(most=LARGEST, batch_size=options.batch_size)
    except ValueError as mistake:
        parser.error(str(mistake))
    require_file(options, "out", parser)
    corpus = Files(paths=options.documents, field=options.field)
    require_not_read(Path(options.out), corpus, checkpoint=options.ckpt_path)
    model, tokenizer = load_reader(options, parser)
    with progress("reading", total=corpus.size()) as bar, atomic_write(options.out) as path, Table(path) as table:
        documents = (
            (name, table.count_lost(tokenizer.align_blocks(counted(blocks, bar), name=name)))
            for name, blocks in corpus.document_blocks()
        )
        batches = batch_segments(documents, lanes=options.batch_size, segment_length=model.segment_length)
        for batch, output in outputs(model, batches):
            table.add(batch, output)
        table.finish()
    sys.stderr.write(f"{table.total.summary(int(bar.tasks[0].completed))}\n")
    print(f"Written: {options.out}")


def require_not_read(out: Path, corpus: Files, *, checkpoint: str) -> None:
    """Refuse a table that would replace a document or the checkpoint, or be read as a document the next time.

    Raises:
        UsageError: It would be or do so.
    """
    written = (out, partial_of(out))
    require_apart("out", written, read=[Path(checkpoint)])
    for path in written:
        if corpus.would_read(path):
            raise UsageError(f"out={str(out)!r} is, or would be, one of the documents: write the table elsewhere")


def outputs(model: SegmentModel, read: Iterator[SegmentBatch]) -> Iterator[tuple[SegmentBatch, SegmentOutput]]:
    """Run a model over batches of segments; the state of each lane continues from batch to batch."""
    device = next(model.parameters()).device
    state, lanes = None, 0
    for batch in read:
        segment = batch.segment.to(device)
        with torch.inference_mode():
            if state is None:
                state = model.initial_state(len(segment.document_start))
            elif len(batch.previous_lanes) < lanes:
                state = as_state(state, (field[batch.previous_lanes] for field in state))
            output, state = model(segment, state)
            state = model.compact(state)
        lanes = len(batch.previous_lanes)
        yield batch, output


class Total(NamedTuple):
    """Sums over all documents."""

    documents: int = 0
    tokens: int = 0
    nats: float = 0.0
    lost: int = 0
    """Bytes that decoding the tokens does not restore."""

    def summary(self, size: int) -> str:
        """One line, for documents of so many bytes."""
        loss = self.nats / max(self.tokens, 1)
        return (
            f"{self.documents:,} documents, {self.tokens:,} tokens, {size:,} bytes: {loss:.4f} nats per token "
            f"(perplexity {perplexity(loss):.3f}), "
            f"{self.nats / math.log(2) / max(size, 1):.4f} bits per byte{lost_bytes_note(self.lost, size)}"
        )


class Table:
    """Write a row for each token; a context manager.

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

    def count_lost(self, parts: Iterable[Aligned]) -> Iterator[Aligned]:
        """Pass the parts of a document on, and count their lost bytes."""
        for part in parts:
            self.total = self.total._replace(lost=self.total.lost + part.lost)
            yield part

    def add(self, batch: SegmentBatch, output: SegmentOutput) -> None:
        """Append a row for each token of a batch, lane by lane."""
        token_mask = batch.segment.token_mask.numpy()
        counts = token_mask.sum(1)
        token, loss, correct = (
            tensor.cpu().numpy()[token_mask] for tensor in (batch.segment.tokens, output.token_losses, output.correct)
        )
        document = np.repeat(np.arange(len(counts)) + len(self._names), counts)
        position = (np.array(batch.firsts)[:, None] + np.arange(token_mask.shape[1]))[token_mask]
        sizes = np.concatenate([part.sizes for part in batch.parts])
        for column, values in zip(self._columns, (document, position, token, sizes, loss, correct), strict=True):
            column.append(values)
        self._contents.extend(part.content for part in batch.parts)
        self._names.extend(batch.names)
        self._rows += len(token)
        self.total = Total(
            self.total.documents + int(batch.segment.document_start.sum()),
            self.total.tokens + len(token),
            self.total.nats + float(loss.sum(dtype=np.float64)),
            self.total.lost,
        )
        if self._rows >= ROWS:
            self.finish()

    def finish(self) -> None:
        """Write the remaining rows."""
        if not self._rows:
            return
        document, position, token, sizes, loss, correct = (np.concatenate(column) for column in self._columns)
        arrays = (
            pyarrow.array(self._names, pyarrow.string()).take(pyarrow.array(document)),
            position,
            token.astype(np.int32),
            _split(b"".join(self._contents), sizes),
            loss.astype(np.float32),
            correct,
        )
        with writing(self._path):
            self._file.write_table(pyarrow.table(list(map(pyarrow.array, arrays)), schema=self._schema))
        self._start_batch()


def _split(content: bytes, sizes: np.ndarray) -> pyarrow.Array:
    """Split the content into consecutive pieces of these sizes."""
    offsets = np.concatenate(([0], np.cumsum(sizes)))
    if offsets[-1] > np.iinfo(np.int32).max:  # one token may cover gigabytes that the tokenizer drops
        raise UsageError(f"a token covers {sizes.max():,} bytes, more than a table can hold: use another tokenizer")
    buffers = [None, pyarrow.py_buffer(offsets.astype(np.int32)), pyarrow.py_buffer(content)]
    return pyarrow.Array.from_buffers(pyarrow.binary(), len(sizes), buffers)
