"""Choose the documents that are held out. Only their content decides; names and order of files do not matter."""

from hashlib import blake2b

import numpy as np
from jaxtyping import Int8, UInt64

from memformer_pl.data.corpora.corpus import SPLITS
from memformer_pl.errors import UsageError

TRAIN, VALIDATION, TEST = range(len(SPLITS))


def content_hash(content: bytes) -> int:
    """64-bit hash of the content, the same on every machine and in every run."""
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


def require_shares(*, validation: float, test: float) -> None:
    """Raise a ``UsageError`` unless both shares are at least 0 and leave documents to train on."""
    if not (validation >= 0 and test >= 0 and validation + test < 1):
        raise UsageError(f"validation and test must be at least 0 with a sum below 1, got {validation=} and {test=}")


def assign_splits(
    hashes: UInt64[np.ndarray, " documents"],
    given: Int8[np.ndarray, " documents"],
    *,
    validation: float,
    test: float,
) -> Int8[np.ndarray, " documents"]:
    """The split of every document, as an index into ``SPLITS``.

    Splits that the corpus brings are kept. The others are taken from ``train``: of its n distinct documents, sorted by
    their hashes, the first ``round(validation * n)`` are for validation and the next ones for test, at least one if the
    share is above 0. Equal documents stay in one split.

    Args:
        hashes: :func:`content_hash` of each document.
        given: The split that the corpus assigns to each document.
        validation: Share of the documents; ignored if the corpus brings a validation split.
        test: Likewise for test.

    Raises:
        UsageError: Nothing would be left to train on.
    """
    trained = given == TRAIN
    distinct, rank = np.unique(hashes[trained], return_inverse=True)
    shares = {VALIDATION: validation, TEST: test}
    sizes = [0 if (given == split).any() else _size(share, of=distinct.size) for split, share in shares.items()]
    if sum(sizes) >= distinct.size:
        raise UsageError(
            f"{distinct.size} distinct documents are too few to hold out {sum(sizes)} of them: add documents, or lower "
            f"the shares (0 holds out none), got {validation=} and {test=}"
        )
    splits = given.copy()
    ends = np.cumsum(sizes)
    splits[trained] = np.array([VALIDATION, TEST, TRAIN], dtype=np.int8)[np.searchsorted(ends, rank, side="right")]
    return splits


def _size(share: float, *, of: int) -> int:
    return max(round(share * of), 1) if share > 0 else 0
