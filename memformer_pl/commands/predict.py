"""The command ``predict``: what each token of documents costs, as a table in Parquet.

A document may be of any size: no more than a block of it is held, nor more of the table than a batch of rows.
"""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from jsonargparse import Namespace

from memformer_pl.commands.options import (
    Parser,
    add_checkpoint,
    add_device,
    counted,
    load_reader,
    progress,
    require_file,
)
from memformer_pl.data.files import Files
from memformer_pl.data.side_by_side import Step, steps
from memformer_pl.data.tokens import Tokenizer
from memformer_pl.recurrence import Reading, Segment, SegmentModel, like
from memformer_pl.sizes import LARGEST, require_sizes
from memformer_pl.whole_files import whole

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
        help="Files, folders or patterns. A row of a .jsonl, .json or .parquet is a document; so is every other file.",
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
        UsageError: The checkpoint or a document cannot be used; there is no table then.
    """
    try:
        require_sizes(most=LARGEST, lanes=options.lanes)
    except ValueError as mistake:
        parser.error(str(mistake))
    require_file(options, "out", parser)
    model, tokenizer = load_reader(options, parser)
    corpus = Files(paths=options.documents, field=options.field)
    with progress("reading", total=corpus.size()) as bar, whole(options.out) as path, Table(path, tokenizer) as table:
        documents = (
            (name, tokenizer.encode_blocks(counted(blocks, bar), name=name)) for name, blocks in corpus.streams()
        )
        for step, reading in readings(model, steps(documents, lanes=options.lanes, length=model.segment_length)):
            table.add(step, reading)
        table.finish()
    sys.stderr.write(f"{table.total.told(int(bar.tasks[0].completed))}\n")
    print(f"Written: {options.out}")


def readings(model: SegmentModel, read: Iterator[Step]) -> Iterator[tuple[Step, Reading]]:
    """What a model says about segments, each lane from where the one before has left it."""
    device = next(model.parameters()).device
    state, lanes = None, 0
    for step in read:
        segment = Segment._make(field if field is None else field.to(device) for field in step.segment)
        with torch.inference_mode():
            if state is None:
                state = model.initial_state(len(segment.starts))
            elif len(step.kept) < lanes:
                state = like(state, (field[step.kept] for field in state))
            reading, state = model(segment, state)
        lanes = len(step.kept)
        yield step, reading


class Total(NamedTuple):
    """What has been read."""

    documents: int = 0
    tokens: int = 0
    nats: float = 0.0

    def told(self, size: int) -> str:
        """It in words, for documents of so many bytes."""
        loss = self.nats / max(self.tokens, 1)
        return (
            f"{self.documents:,} documents, {self.tokens:,} tokens, {size:,} bytes: {loss:.4f} nats per token "
            f"(perplexity {math.exp(min(loss, 700.0)):.3f}), "
            f"{self.nats / math.log(2) / max(size, 1):.4f} bits per byte"
        )


class Table:
    """Writes a row for each token, inside ``with``.

    Args:
        path: Of the file.
        tokenizer: Says what the tokens stand for.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer) -> None:
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
        self._meanings = [tokenizer.bytes_of(token) for token in range(tokenizer.vocab)]
        self._file = pyarrow.parquet.ParquetWriter(path, self._schema)
        self._start_batch()

    def _start_batch(self) -> None:
        self._names: list[str] = []
        self._columns: list[list[np.ndarray]] = [[] for _ in self._schema]
        self._rows = 0

    def __enter__(self) -> "Table":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, step: Step, reading: Reading) -> None:
        """Append a row for each token of a step, lane by lane."""
        present = step.segment.present.numpy()
        counts = present.sum(1)
        token, loss, correct = (
            tensor.cpu().numpy()[present] for tensor in (step.segment.tokens, reading.losses, reading.correct)
        )
        document = np.repeat(np.arange(len(counts)) + len(self._names), counts)
        position = (np.array(step.firsts)[:, None] + np.arange(present.shape[1]))[present]
        for column, values in zip(self._columns, (document, position, token, token, loss, correct), strict=True):
            column.append(values)
        self._names.extend(step.names)
        self._rows += len(token)
        self.total = Total(
            self.total.documents + int(step.segment.starts.sum()),
            self.total.tokens + len(token),
            self.total.nats + float(loss.sum(dtype=np.float64)),
        )
        if self._rows >= ROWS:
            self.finish()

    def finish(self) -> None:
        """Write the rows that are kept."""
        if not self._rows:
            return
        document, position, token, _, loss, correct = (np.concatenate(column) for column in self._columns)
        arrays = (
            pyarrow.array(self._names, pyarrow.string()).take(pyarrow.array(document)),
            position,
            token.astype(np.int32),
            pyarrow.array(self._meanings, pyarrow.binary()).take(pyarrow.array(token)),
            loss.astype(np.float32),
            correct,
        )
        self._file.write_table(pyarrow.table(list(map(pyarrow.array, arrays)), schema=self._schema))
        self._start_batch()
