"""The Lightning data module: pack a corpus once, and give each process its lanes."""

import logging
from pathlib import Path
from typing import Literal

from lightning import LightningDataModule, Trainer

from memformer_pl.data.corpora.corpus import Corpus
from memformer_pl.data.lanes import LaneLoader, require_rollout_size
from memformer_pl.data.packing.documents import PackedDocuments
from memformer_pl.data.packing.pack import MAX_LOST, Pack, pack, require_max_lost
from memformer_pl.data.packing.splits import require_shares
from memformer_pl.data.revisiting import Revisit
from memformer_pl.data.tokenizers.subwords import BytePairs
from memformer_pl.data.tokenizers.tokenizer import Tokenizer
from memformer_pl.errors import OptionError, UsageError, require_sizes

log = logging.getLogger(__name__)


class SegmentData(LightningDataModule):
    """Rollouts of segments for training, validation and test.

    Outside a trainer, call :meth:`setup` and iterate over :meth:`train_dataloader`. The first run packs the corpus.

    Args:
        corpus: Source of the documents.
        tokenizer: Turns documents into tokens; by default 2,048 byte pairs.
        segment_length: Tokens of a segment; the last segment of a document may be shorter.
        horizon: Segments between two optimizer steps.
        batch_size: Documents that a training rollout reads in parallel (lanes), over all processes.
        interleave: Groups of ``batch_size`` lanes that take turns in training, so that consecutive rollouts read
            different documents. With small rollouts, a model learns to use memory only if this is above 1.
        shortest_first: Whether the first pass through the training documents goes from the shortest to the longest, as
            a curriculum. Later passes are shuffled.
        evaluation_batch_size: Lanes in validation and test; by default ``batch_size``.
        reset: When memory is reset in validation and test. ``documents``: at the start of each document. ``never``:
            each lane reads its share of the split in order, as one stream, and carries its memory across documents;
            with ``evaluation_batch_size`` 1 the whole split is one stream, as Transformer-XL evaluates WikiText-103.
            Training always resets at the start of a document.
        revisit: Let a share of the lanes of training read whole documents again, drawn by weight from those that the
            other lanes have finished; by default every lane reads the next document.
        validation: Share of the documents held out for validation, if the corpus has no validation split of its own.
        test: Share of the documents held out for test, likewise.
        seed: Seed of the order of the training documents.
        cache: Folder of packed corpora; by default ``$MEMFORMER_CACHE``, else the user's cache directory.
        max_lost: The largest share of the bytes of a split (0 to 1) that the tokenizer may lose. Lost bytes cannot be
            restored from the tokens, yet bits per byte count them; the share is reported beside every such metric.

    Raises:
        UsageError: A size or a share is out of range.
    """

    def __init__(
        self,
        *,
        corpus: Corpus,
        tokenizer: Tokenizer | None = None,
        segment_length: int = 64,
        horizon: int = 8,
        batch_size: int = 16,
        interleave: int = 4,
        shortest_first: bool = False,
        evaluation_batch_size: int | None = None,
        reset: Literal["documents", "never"] = "documents",
        revisit: Revisit | None = None,
        validation: float = 0.05,
        test: float = 0.05,
        seed: int = 0,
        cache: str | Path | None = None,
        max_lost: float = MAX_LOST,
    ) -> None:
        super().__init__()
        evaluation_batch_size = evaluation_batch_size if evaluation_batch_size is not None else batch_size
        require_rollout_size(
            batch_size=batch_size, interleave=interleave, horizon=horizon, segment_length=segment_length
        )
        require_sizes(evaluation_batch_size=evaluation_batch_size)
        require_rollout_size(
            batch_size=evaluation_batch_size, interleave=1, horizon=horizon, segment_length=segment_length
        )
        require_shares(validation=validation, test=test)
        require_max_lost(max_lost)
        if revisit is not None:
            revisit.lanes(batch_size=batch_size, interleave=interleave)
        if seed < 0:
            raise UsageError(f"seed must be at least 0, got {seed}")
        self.corpus = corpus
        self.tokenizer = tokenizer if tokenizer is not None else BytePairs()
        self.segment_length = segment_length
        self.horizon = horizon
        self.batch_size = batch_size
        self.interleave = interleave
        self.shortest_first = shortest_first
        self.evaluation_batch_size = evaluation_batch_size
        self.reset: Literal["documents", "never"] = reset
        self.revisit = revisit
        self.shares = {"validation": validation, "test": test}
        self.seed = seed
        self.cache = cache
        self.max_lost = max_lost
        self._pack: Pack | None = None
        self._prepared: Pack | None = None

    def prepare_data(self) -> None:
        """Pack the corpus, unless an earlier run has."""
        self._prepared = self._packed()

    def setup(self, stage: str | None = None) -> None:
        """Open the packed corpus; ``tokenizer`` is then the trained one.

        Raises:
            UsageError: The split of this stage has no documents, or the run would write into its corpus.
        """
        # prepare_data has opened the pack in this process: do not verify it, or warn of lost bytes, a second time
        self._pack, self._prepared = self._prepared or self._packed(), None
        self.tokenizer = self._pack.tokenizer
        for name, documents in {"validate": self._pack.validation, "test": self._pack.test}.items():
            if stage == name and not len(documents):
                raise UsageError(
                    f"cannot {name}: the split is empty; raise its share of the documents, got {self.shares}"
                )
        if self.trainer:
            self._require_apart(self.trainer)
        if self.trainer and not len(self._pack.validation):
            self.trainer.limit_val_batches = 0  # otherwise Lightning warns of an empty loader

    def train_dataloader(self) -> LaneLoader:
        """The training documents without end, in a new order in every pass."""
        documents, parallel = self.packed.train, self.batch_size * self.interleave
        if parallel > len(documents):
            log.warning(
                "batch_size=%d and interleave=%d read %d documents in parallel, but there are only %d: several lanes "
                "will read the same document; use fewer lanes",
                self.batch_size,
                self.interleave,
                parallel,
                len(documents),
            )
        loader = self._loader(documents, batch_size=self.batch_size, interleave=self.interleave, shuffle=True)
        if self.trainer:
            require_interval(self.trainer, rollouts=len(loader))
        return loader

    def val_dataloader(self) -> LaneLoader:
        """The validation documents, always in the same order."""
        return self._evaluation_loader(self.packed.validation)

    def test_dataloader(self) -> LaneLoader:
        """The test documents, always in the same order."""
        return self._evaluation_loader(self.packed.test)

    @property
    def packed(self) -> Pack:
        """The splits ``train``, ``validation`` and ``test``.

        Raises:
            RuntimeError: :meth:`setup` was not called.
        """
        if self._pack is None:
            raise RuntimeError("the corpus is not open: call setup() first")
        return self._pack

    @property
    def vocab_size(self) -> int:
        """Number of token numbers. Known before the corpus is packed."""
        return self.tokenizer.vocab_size

    @property
    def fingerprint(self) -> str:
        """Hash of the tokens and of the documents of every split."""
        return self.packed.fingerprint

    @property
    def bytes_per_token(self) -> float:
        """Mean bytes of text per training token."""
        return self.packed.train.bytes_per_token

    def _require_apart(self, trainer: Trainer) -> None:
        """Refuse a run that writes into its corpus: the next run would read checkpoints as documents."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        writes = trainer.loggers or trainer.checkpoint_callbacks
        if writes and self.corpus.would_read(folder / "checkpoints" / "last.ckpt"):
            raise UsageError(
                f"the run would write into {str(folder)!r}, a folder of its corpus: set "
                "trainer.default_root_dir, or select the documents with a pattern such as 'folder/**/*.txt'"
            )

    def _packed(self) -> Pack:
        return pack(self.corpus, self.tokenizer, cache=self.cache, max_lost=self.max_lost, **self.shares)

    def _evaluation_loader(self, documents: PackedDocuments) -> LaneLoader:
        return self._loader(documents, batch_size=self.evaluation_batch_size, interleave=1, shuffle=False)

    def _loader(self, documents: PackedDocuments, *, batch_size: int, interleave: int, shuffle: bool) -> LaneLoader:
        return LaneLoader(
            documents,
            batch_size=batch_size,
            segment_length=self.segment_length,
            horizon=self.horizon,
            interleave=interleave,
            seed=self.seed,
            shuffle=shuffle,
            shortest_first=self.shortest_first,
            reset="documents" if shuffle else self.reset,
            revisit=self.revisit if shuffle else None,
            rank=self.trainer.global_rank if self.trainer else 0,
            world_size=self.trainer.world_size if self.trainer else 1,
        )


def require_interval(trainer: Trainer, *, rollouts: int) -> None:
    """Refuse a validation that no epoch of so many rollouts would come to.

    Raises:
        OptionError: Says which interval, and what to set instead.
    """
    limit, interval = trainer.limit_train_batches, trainer.val_check_interval
    read = min(rollouts, limit) if isinstance(limit, int) else int(rollouts * limit)
    if trainer.check_val_every_n_epoch is not None and isinstance(interval, int) and interval > read > 0:
        raise OptionError(
            f"trainer.val_check_interval is {interval}, but an epoch has {read} rollouts: lower it to {read} or less, "
            "or set trainer.check_val_every_n_epoch to null to count rollouts across epochs"
        )
