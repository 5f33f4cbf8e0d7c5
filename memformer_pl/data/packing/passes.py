"""The passes over a corpus while it is packed: choose the splits, train the tokenizer, write the tokens.

Documents are streamed. Only numbers, about 60 bytes for each document, and one batch of text are in memory.
"""

from array import array
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import islice, zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int8, Int64, UInt64
from rich.progress import Progress, TaskID

from memformer_pl.data.corpora.corpus import SPLITS, Corpus, Document
from memformer_pl.data.packing.documents import DocumentWriter, Summary
from memformer_pl.data.packing.splits import TRAIN, assign_splits, content_hash
from memformer_pl.data.tokenizers.tokenizer import Tokenizer
from memformer_pl.errors import UsageError

LEARNING_BYTES = 64_000_000
"""A tokenizer learns from whole training documents until they have so much text."""
BATCH_BYTES = 1_000_000
"""Text that is encoded at once; a longer document is encoded alone."""


class Survey(NamedTuple):
    """What is stored about every document that is not empty."""

    hashes: UInt64[np.ndarray, " documents"]
    sizes: Int64[np.ndarray, " documents"]
    """Bytes of text."""
    splits: Int8[np.ndarray, " documents"]
    """Indices into ``SPLITS``."""


def survey(corpus: Corpus, progress: Progress, *, validation: float, test: float) -> Survey:
    """Read every document once, and choose its split.

    Raises:
        UsageError: There are no documents, or too few of them; or one has an unknown split.
    """
    task = progress.add_task("reading", total=None)
    hashes, sizes, splits_given = array("Q"), array("q"), array("b")
    for document in _nonempty(corpus):
        hashes.append(content_hash(document.content))
        sizes.append(len(document.content))
        if document.split not in SPLITS:
            raise UsageError(f"{document.name}: split must be one of {', '.join(SPLITS)}, got {document.split!r}")
        splits_given.append(SPLITS.index(document.split))
        progress.advance(task, len(document.content))
    if not hashes:
        raise UsageError(f"the corpus {type(corpus).__name__} is empty: none of its documents has any content")
    progress.update(task, total=sum(sizes))
    hash_of = np.array(hashes, dtype=np.uint64)
    splits = assign_splits(hash_of, np.array(splits_given, dtype=np.int8), validation=validation, test=test)
    return Survey(hash_of, np.array(sizes, dtype=np.int64), splits)


def learn(tokenizer: Tokenizer, corpus: Corpus, known: Survey, progress: Progress) -> None:
    """Train the tokenizer on training documents."""
    chosen = _to_learn_from(known)
    size = int(known.sizes[chosen].sum())
    task = progress.add_task("learning tokens", total=size)
    documents = (document for document, is_chosen in zip(_again(corpus, known), chosen, strict=True) if is_chosen)
    tokenizer.train(_counted(documents, progress, task))
    progress.update(task, completed=size)


def encode(
    tokenizer: Tokenizer, corpus: Corpus, known: Survey, progress: Progress, *, folder: Path, dtype: str
) -> dict[str, Summary]:
    """Write every document into the subfolder of its split."""
    task = progress.add_task("packing", total=int(known.sizes.sum()))
    splits = iter(known.splits)
    with ExitStack() as stack:
        writers = [stack.enter_context(DocumentWriter(folder / split, dtype=dtype)) for split in SPLITS]
        for batch in _batches(_counted(_again(corpus, known), progress, task)):
            parts = [_parts(document) for document in batch]
            flat = [part for own in parts for part in own]
            encoded = tokenizer.encode_documents(flat)
            pieces, lost = iter(encoded), iter(tokenizer.count_lost_bytes(flat, encoded))
            for document, own in zip(batch, parts, strict=True):
                tokens = list(islice(pieces, len(own)))
                ends = np.cumsum([len(piece) for piece in tokens])
                writers[next(splits)].add(
                    np.concatenate(tokens),
                    text=document.content,
                    name=document.name,
                    prompt_length=int(ends[0]),
                    answers=list(zip(ends[1:-1:2].tolist(), ends[2::2].tolist(), strict=True)),
                    lost=sum(islice(lost, len(own))),
                )
        return {split: writer.finish() for split, writer in zip(SPLITS, writers, strict=True)}


def _to_learn_from(known: Survey) -> Bool[np.ndarray, " documents"]:
    """Choose training documents by their hashes until they hold enough text, so that their order does not matter."""
    train = np.flatnonzero(known.splits == TRAIN)
    train = train[np.argsort(known.hashes[train], kind="stable")]
    before = np.cumsum(known.sizes[train]) - known.sizes[train]
    chosen = np.zeros(known.splits.size, dtype=bool)
    chosen[train[before < LEARNING_BYTES]] = True
    return chosen


def _nonempty(corpus: Corpus) -> Iterator[Document]:
    return (document for document in corpus.documents() if document.content)


def _again(corpus: Corpus, known: Survey) -> Iterator[Document]:
    """The surveyed documents, in the same order.

    Raises:
        UsageError: The documents have changed.
    """
    for document, expected in zip_longest(_nonempty(corpus), known.hashes):
        if document is None or expected is None or content_hash(document.content) != expected:
            where = document.name if document is not None else "its end"
            raise UsageError(f"the corpus changed while it was packed, at {where}: run again")
        yield document


def _parts(document: Document) -> list[Document]:
    """The prompt of a document and the rest, which is to be predicted: no token belongs to both.

    With answers, the rest is what precedes the first one, the first one, what lies before the second, and so on.

    Raises:
        UsageError: The answers overlap, are empty, or reach into the prompt or beyond the end.
    """
    borders = [document.prompt_length, *(border for answer in document.answers for border in answer)]
    if document.answers and not (
        borders == sorted(borders)
        and borders[-1] <= len(document.content)
        and all(begin < end for begin, end in document.answers)
    ):
        raise UsageError(
            f"{document.name}: answers must lie in order between the prompt and the end, and not be empty, got "
            f"{document.answers} with a prompt of {document.prompt_length} of {len(document.content)} bytes"
        )
    stretches = zip([0, *borders], [*borders, len(document.content)], strict=True)
    return [document._replace(content=document.content[begin:end]) for begin, end in stretches]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in groups of at least ``BATCH_BYTES``, except for the last group."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.content)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _counted(documents: Iterable[Document], progress: Progress, task: TaskID) -> Iterator[Document]:
    for document in documents:
        yield document
        progress.advance(task, len(document.content))
