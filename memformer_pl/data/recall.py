"""Synthetic documents in which something is shown, noise passes, and what was shown is asked for."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from memformer_pl.data.corpora import Corpus, Document
from memformer_pl.sizes import require_sizes

CUE = ord("?")
LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", dtype=np.uint8)
DIGITS = np.frombuffer(b"0123456789", dtype=np.uint8)


class Recall(Corpus):
    """Copying: letters are shown at the beginning of a document, and asked for ``distance`` segments later.

    With 4 letters and segments of 8 bytes, this is a document of distance 4, one segment in each column::

        hmca4071  88213940  25506117  5521309?  hmca
        shown     noise     noise     cue       answer

    Only the answer is to be predicted (:attr:`Document.given`). It cannot be guessed: letters are drawn independently,
    so chance is one in ``letters``. The cue stands in the segment before the answer, since Memformer's decoder reaches
    memory only through what its encoder makes of the previous segment; so 2 is the least distance that takes a memory,
    and ``distance - 2`` segments of noise lie between what is shown and the cue. A token is meant to be a byte.

    Training documents have every distance from 2 to ``longest``, held-out ones each of ``tested``. Read from the
    shortest to the longest (``SegmentData(shortest_first=True)``), those for training are a curriculum.

    Args:
        segment_length: Bytes of a segment; must be that of the data.
        longest: The longest distance that is trained.
        nearest: Share of the training documents that have distance 2; the others share the rest equally.
        tested: Distances of the held-out documents.
        shown: Letters that are shown.
        letters: How many different ones there are; at most 26.
        examples: Training documents.
        questions: Held-out documents of each distance.
        seed: Of all documents.
    """

    def __init__(
        self,
        *,
        segment_length: int = 8,
        longest: int = 8,
        nearest: float = 0.6,
        tested: Sequence[int] = (2, 4, 8, 16, 32),
        shown: int = 4,
        letters: int = 16,
        examples: int = 50_000,
        questions: int = 128,
        seed: int = 0,
    ) -> None:
        require_sizes(shown=shown, letters=letters, examples=examples, questions=questions)
        require_sizes(least=2, longest=longest, **{f"tested[{n}]": distance for n, distance in enumerate(tested)})
        require_sizes(least=0, seed=seed)
        if not 0 <= nearest <= 1:
            raise ValueError(f"nearest must be a share from 0 to 1, got {nearest}")
        if shown >= segment_length:
            raise ValueError(f"a segment shows letters and a cue: shown must be below {segment_length=}, got {shown=}")
        if letters > len(LETTERS):
            raise ValueError(f"letters must be at most {len(LETTERS)}, got {letters}")
        self.segment_length, self.longest, self.nearest, self.tested = segment_length, longest, nearest, list(tested)
        self.shown, self.letters, self.examples, self.questions, self.seed = shown, letters, examples, questions, seed

    def documents(self) -> Iterator[Document]:
        """Those for training, then those that are held out, by distance."""
        random = np.random.default_rng(self.seed)
        for number in range(self.examples):
            near = self.longest == 2 or random.random() < self.nearest
            distance = 2 if near else int(random.integers(3, self.longest + 1))
            yield self._document(distance, f"question {number}", "train", random)
        for distance in self.tested:
            for number in range(self.questions):
                yield self._document(distance, f"held-out question {number}", "validation", random)

    def identity(self) -> Mapping[str, object]:
        """The arguments."""
        return {"corpus": "Recall", **vars(self)}

    def _document(self, distance: int, name: str, split: str, random: np.random.Generator) -> Document:
        given = random.choice(DIGITS, distance * self.segment_length)
        letters = random.choice(LETTERS[: self.letters], self.shown)
        given[: self.shown] = letters
        given[-1] = CUE
        content = np.concatenate((given, letters)).tobytes()
        return Document(content, name=f"{name} at distance {distance}", split=split, given=len(given))
