"""The passes over a corpus while it is packed: decide on the splits, learn a tokenizer, write the tokens.

Documents stream. What is held is 17 bytes for each of them, and one batch of text.
"""

from array import array
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import zip_longest
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
"""The most training text that a tokenizer learns from."""
BATCH_BYTES = 1_000_000
"""Text that is encoded at once; a longer document is encoded alone."""


class Survey(NamedTuple):
    """What is remembered of every document that is not empty."""

    hashes: UInt64[np.ndarray, " documents"]
    sizes: Int64[np.ndarray, " documents"]
    """In bytes of text."""
    splits: Int8[np.ndarray, " documents"]
    """Indices into ``SPLITS``."""


def survey(corpus: Corpus, progress: Progress, *, validation: float, test: float) -> Survey:
    """Read every document once, and decide which split it belongs to.

    Raises:
        UsageError: There are no documents, or too few of them.
    """
    task = progress.add_task("reading", total=None)
    hashes, sizes, given = array("Q"), array("q"), array("b")
    for document in _nonempty(corpus):
        hashes.append(content_hash(document.content))
        sizes.append(len(document.content))
        given.append(SPLITS.index(document.split))
        progress.advance(task, len(document.content))
    if not hashes:
        raise UsageError(f"the corpus {type(corpus).__name__} is empty: no document in it has any content")
    progress.update(task, total=sum(sizes))
    hash_of = np.array(hashes, dtype=np.uint64)
    splits = assign_splits(hash_of, np.array(given, dtype=np.int8), validation=validation, test=test)
    return Survey(hash_of, np.array(sizes, dtype=np.int64), splits)


def learn(tokenizer: Tokenizer, corpus: Corpus, known: Survey, progress: Progress) -> None:
    """Let a tokenizer learn from training documents."""
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
            parts = [part for document in batch for part in _parts(document)]
            encoded = tokenizer.encode_documents(parts)
            lost = tokenizer.lost(parts, encoded)
            for place, document in enumerate(batch):
                prompt, rest = encoded[2 * place : 2 * place + 2]
                writers[next(splits)].add(
                    np.concatenate((prompt, rest)),
                    text=document.content,
                    name=document.name,
                    prompt_length=len(prompt),
                    lost=sum(lost[2 * place : 2 * place + 2]),
                )
        return {split: writer.finish() for split, writer in zip(SPLITS, writers, strict=True)}


def _to_learn_from(known: Survey) -> Bool[np.ndarray, " documents"]:
    """Training documents by their hashes, until they hold enough: where they stand in the corpus is of no effect."""
    train = np.flatnonzero(known.splits == TRAIN)
    train = train[np.argsort(known.hashes[train], kind="stable")]
    before = np.cumsum(known.sizes[train]) - known.sizes[train]
    chosen = np.zeros(known.splits.size, dtype=bool)
    chosen[train[before < LEARNING_BYTES]] = True
    return chosen


def _nonempty(corpus: Corpus) -> Iterator[Document]:
    return (document for document in corpus.documents() if document.content)


def _again(corpus: Corpus, known: Survey) -> Iterator[Document]:
    """The documents that were surveyed, in the same order.

    Raises:
        UsageError: They are others now.
    """
    for document, expected in zip_longest(_nonempty(corpus), known.hashes):
        if document is None or expected is None or content_hash(document.content) != expected:
            where = document.name if document is not None else "its end"
            raise UsageError(f"the corpus changed while it was packed, at {where}: run again")
        yield document


def _parts(document: Document) -> tuple[Document, Document]:
    """The prompt of a document, and what the model is to predict: no token belongs to both."""
    prompt, rest = document.content[: document.prompt_length], document.content[document.prompt_length :]
    return document._replace(content=prompt), document._replace(content=rest)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in groups of at least ``BATCH_BYTES``, the last one aside."""
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
