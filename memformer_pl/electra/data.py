"""Examples of equal length, cut from the documents of a corpus."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from lightning import LightningDataModule
from torch import Tensor

from memformer_pl.data.corpora.corpus import Corpus
from memformer_pl.data.packing.documents import PackedDocuments
from memformer_pl.data.packing.pack import Pack, pack
from memformer_pl.data.tokenizers.subwords import BytePairs
from memformer_pl.data.tokenizers.tokenizer import Tokenizer
from memformer_pl.errors import UsageError, require_sizes


class Examples:
    """Yields batches of examples. The batches of training are a function of their number and the seed.

    A document is cut into whole examples; what is left at its end is not read. Of a shuffled pass, the examples that
    fill no batch are not read either.

    Args:
        documents: A split.
        length: Tokens of an example.
        batch_size: Examples of a batch.
        seed: Seed of the shuffled passes; None for one pass in order, whose last batch may be smaller.
    """

    def __init__(self, documents: PackedDocuments, *, length: int, batch_size: int, seed: int | None) -> None:
        starts = [np.arange(a, b - length + 1, length) for a, b in zip(*_bounds(documents), strict=True)]
        self._tokens, self._firsts = documents.tokens, np.concatenate([*starts, np.empty(0, dtype=np.int64)])
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.next = 0
        """Number of the next batch of training."""

    def __len__(self) -> int:
        """Batches of a pass."""
        rounded = self.batch_size - 1 if self.seed is None else 0
        return (len(self._firsts) + rounded) // self.batch_size

    def __iter__(self) -> Iterator[Int[Tensor, "B L"]]:
        """Yield the rest of a pass."""
        if self.seed is None:
            for batch in range(len(self)):
                yield self._read(self._firsts[batch * self.batch_size : (batch + 1) * self.batch_size])
            return
        done, begin = divmod(self.next, len(self))
        order = np.random.default_rng((self.seed, done)).permutation(self._firsts)
        for batch in range(begin, len(self)):
            self.next += 1
            yield self._read(order[batch * self.batch_size : (batch + 1) * self.batch_size])

    def state_dict(self) -> dict[str, int]:
        """The number of the next batch."""
        return {"next": self.next}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue with that batch."""
        self.next = state["next"]

    def _read(self, firsts: np.ndarray) -> Int[Tensor, "B L"]:
        index = firsts.astype(np.int64)[:, None] + np.arange(self.length)
        return torch.from_numpy(self._tokens[index].astype(np.int64))


class ElectraData(LightningDataModule):
    """Examples for training and validation.

    Args:
        corpus: Source of the documents.
        tokenizer: Turns documents into tokens; by default 2,048 byte pairs.
        length: Tokens of an example.
        batch_size: Examples that the generator reads in a step.
        validation: Share of the documents held out, if the corpus has no validation split of its own.
        seed: Seed of the order of the examples, and of what is masked, replaced and drawn.
        cache: Folder of packed corpora; by default ``$MEMFORMER_CACHE``, else the user's cache directory.

    Raises:
        UsageError: A size or a share is out of range.
    """

    def __init__(
        self,
        *,
        corpus: Corpus,
        tokenizer: Tokenizer | None = None,
        length: int = 64,
        batch_size: int = 32,
        validation: float = 0.1,
        seed: int = 0,
        cache: str | Path | None = None,
    ) -> None:
        super().__init__()
        require_sizes(length=length, batch_size=batch_size)
        require_sizes(least=0, seed=seed)
        self.corpus, self.tokenizer = corpus, tokenizer if tokenizer is not None else BytePairs()
        self.length, self.batch_size, self.validation = length, batch_size, validation
        self.seed, self.cache = seed, cache
        self._pack: Pack | None = None

    @property
    def vocab_size(self) -> int:
        """Number of token numbers."""
        return self.tokenizer.vocab_size

    def prepare_data(self) -> None:
        """Pack the corpus, unless an earlier run has."""
        self._pack = pack(self.corpus, self.tokenizer, validation=self.validation, test=0.0, cache=self.cache)

    def setup(self, stage: str | None = None) -> None:
        """Check that both splits have a batch.

        Raises:
            UsageError: One has none.
        """
        for name, loader in {"training": self.train_dataloader(), "validation": self.val_dataloader()}.items():
            if not len(loader):
                raise UsageError(
                    f"the {name} documents make no batch of {self.batch_size} examples: choose a smaller "
                    "data.length or data.batch_size, or another data.validation"
                )

    def train_dataloader(self) -> Examples:
        """The training examples, in a new order in every pass."""
        return self._examples("train", seed=self.seed)

    def val_dataloader(self) -> Examples:
        """The held-out examples, always in the same order."""
        return self._examples("validation", seed=None)

    def _examples(self, split: str, *, seed: int | None) -> Examples:
        if self._pack is None:
            raise RuntimeError("the corpus is not open: call prepare_data() first")
        return Examples(getattr(self._pack, split), length=self.length, batch_size=self.batch_size, seed=seed)


def _bounds(documents: PackedDocuments) -> tuple[np.ndarray, np.ndarray]:
    return documents.offsets[:-1], documents.offsets[1:]
