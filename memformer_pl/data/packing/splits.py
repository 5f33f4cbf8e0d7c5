"""Which documents are held out. Content decides, so neither the names of files nor their order matter."""

from hashlib import blake2b

import numpy as np
from jaxtyping import Int8, UInt64

from memformer_pl.data.corpora.corpus import SPLITS
from memformer_pl.errors import UsageError

TRAIN, VALIDATION, TEST = range(len(SPLITS))


def content_hash(content: bytes) -> int:
    """64 bits that are the same for the same content, on every machine and in every run."""
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


def require_shares(*, validation: float, test: float) -> None:
    """Raise a ``UsageError`` unless both shares are at least 0 and leave one to train on."""
    if not (validation >= 0 and test >= 0 and validation + test < 1):
        raise UsageError(f"validation and test must be shares whose sum is below 1, got {validation=} and {test=}")


def assign_splits(
    hashes: UInt64[np.ndarray, " documents"],
    given: Int8[np.ndarray, " documents"],
    *,
    validation: float,
    test: float,
) -> Int8[np.ndarray, " documents"]:
    """The split of every document, as an index into ``SPLITS``.

    Splits that the corpus brings stay as they are. Those that it does not bring are cut from ``train``: of its n
    distinct documents in the order of their hashes, the first ``round(validation * n)`` are for validation, the next
    ones for the test; at least one where the share is above 0. Equal documents stay together.

    Args:
        hashes: :func:`content_hash` of each document.
        given: The split that each comes with.
        validation: Share of the documents; of no effect where the corpus brings such a split.
        test: Likewise.

    Raises:
        UsageError: Nothing would be left to train on.
    """
    trained = given == TRAIN
    distinct, place = np.unique(hashes[trained], return_inverse=True)
    shares = {VALIDATION: validation, TEST: test}
    sizes = [0 if (given == split).any() else _size(share, of=distinct.size) for split, share in shares.items()]
    if sum(sizes) >= distinct.size:
        raise UsageError(
            f"{distinct.size} distinct documents are too few to hold out {sum(sizes)} of them: add documents, or lower "
            f"the shares (0 holds out none), got {validation=} and {test=}"
        )
    splits = given.copy()
    ends = np.cumsum(sizes)
    splits[trained] = np.array([VALIDATION, TEST, TRAIN], dtype=np.int8)[np.searchsorted(ends, place, side="right")]
    return splits


def _size(share: float, *, of: int) -> int:
    return max(round(share * of), 1) if share > 0 else 0
