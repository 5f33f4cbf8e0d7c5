"""The data of a run, with and without a trainer."""

from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from memformer_pl.data import BytePairs, Bytes, Files, Pydoc, Rollout, Stdlib, TokenizerFile
from memformer_pl.data.datamodule import SegmentData

pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def pydoc(cache: Path, *, lanes: int = 4, seed: int = 0, validation: float = 0.05, test: float = 0.05) -> SegmentData:
    sizes = {"segment_length": 512, "horizon": 4, "batch_size": lanes, "seed": seed}
    return SegmentData(corpus=Pydoc(), tokenizer=Bytes(), validation=validation, test=test, cache=cache, **sizes)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def test_setup_alone_is_enough_outside_a_trainer(tmp_path: Path) -> None:
    data = SegmentData(corpus=Pydoc(), segment_length=32, horizon=3, batch_size=5, cache=tmp_path)
    data.setup()
    rollout = next(iter(data.train_dataloader()))
    assert len(rollout.segments) == 3
    assert rollout.segments[0].tokens.shape == (5, 32)
    assert rollout.segments[0].document_start.all()
    first = data.packed.train.document(int(rollout.documents[0, 0]))[:32]
    assert data.tokenizer.decode(rollout.segments[0].tokens[0]) == data.tokenizer.decode(first)
    assert data.vocab_size == 2048
    assert data.bytes_per_token > 2


def test_the_vocabulary_is_known_before_anything_is_packed(tmp_path: Path) -> None:
    assert SegmentData(corpus=Stdlib(), tokenizer=BytePairs(vocab_size=300), cache=tmp_path).vocab_size == 300
    assert SegmentData(corpus=Stdlib(), tokenizer=Bytes(), cache=tmp_path).vocab_size == 256


def test_a_loader_before_setup_says_to_call_setup(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="call setup"):
        pydoc(tmp_path).train_dataloader()


def test_held_out_documents_have_their_own_batch_size_and_are_never_shuffled(cache: Path) -> None:
    data = SegmentData(
        corpus=Pydoc(), tokenizer=Bytes(), batch_size=4, evaluation_batch_size=2, validation=0.2, cache=cache
    )
    data.setup()
    for loader, documents in (
        (data.val_dataloader(), data.packed.validation),
        (data.test_dataloader(), data.packed.test),
    ):
        first, second = list(loader), list(loader)
        assert first[0].segments[0].tokens.shape[0] == 2
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        assert sum(int(segment.token_mask.sum()) for rollout in first for segment in rollout.segments) == len(
            documents.tokens
        )


def test_without_resets_the_held_out_documents_are_one_stream_and_training_still_resets(cache: Path) -> None:
    sizes = {"segment_length": 512, "evaluation_batch_size": 1, "validation": 0.2, "test": 0.2}
    data = SegmentData(corpus=Pydoc(), tokenizer=Bytes(), cache=cache, reset="never", **sizes)
    data.setup()
    for loader in (data.val_dataloader(), data.test_dataloader()):
        segments = [segment for rollout in loader for segment in rollout.segments]
        assert sum(int(segment.document_start) for segment in segments) == 1
        read = torch.cat([segment.tokens[segment.token_mask] for segment in segments])
        assert read.tolist() == loader.documents.tokens.tolist()
    rollouts = list(data.train_dataloader())
    starts = sum(int(segment.document_start.sum()) for rollout in rollouts for segment in rollout.segments)
    assert starts >= len(data.packed.train)


def test_documents_shorter_than_a_segment_are_read_and_empty_ones_are_skipped(tmp_path: Path) -> None:
    texts = {"empty.txt": "", "short.txt": "ab", "long.txt": "c" * 70}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    sizes = {"segment_length": 32, "horizon": 2, "batch_size": 1, "interleave": 1}
    data = SegmentData(
        corpus=Files(paths=f"{tmp_path}/*.txt"),
        tokenizer=Bytes(),
        validation=0.0,
        test=0.0,
        cache=tmp_path / "cache",
        **sizes,
    )
    data.setup()
    read = [segment.tokens[segment.token_mask] for rollout in data.train_dataloader() for segment in rollout.segments]
    assert sorted(bytes(torch.cat(read).tolist())) == sorted(b"ab" + b"c" * 70)


@pytest.mark.parametrize("name", ["segment_length", "horizon", "batch_size", "evaluation_batch_size"])
def test_sizes_below_one_are_refused_by_the_constructor(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        SegmentData(corpus=Stdlib(), **{name: 0})


def test_shares_that_leave_nothing_to_train_on_are_refused_by_the_constructor() -> None:
    with pytest.raises(ValueError, match=r"got validation=0\.5 and test=0\.5"):
        SegmentData(corpus=Stdlib(), validation=0.5, test=0.5)


@pytest.mark.parametrize(
    ("corpus", "tokenizer", "expected"),
    [
        ("Stdlib", "Bytes", (Stdlib, Bytes)),
        ("Pydoc", {"class_path": "BytePairs", "init_args": {"vocab_size": 300}}, (Pydoc, BytePairs)),
        (
            {"class_path": "Files", "init_args": {"paths": ["a/*.txt"]}},
            {"class_path": "TokenizerFile", "init_args": {"path": "tokenizer.json"}},
            (Files, TokenizerFile),
        ),
        ({"class_path": "memformer_pl.data.Files", "init_args": {"paths": "a/*.txt"}}, None, (Files, BytePairs)),
    ],
)
def test_corpus_and_tokenizer_are_chosen_by_class_name(
    corpus: object, tokenizer: object, expected: tuple[type, type]
) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(SegmentData, "data")
    config = parser.parse_object({"data": {"corpus": corpus, "tokenizer": tokenizer, "cache": "somewhere"}})
    data = parser.instantiate(config).data
    assert (type(data.corpus), type(data.tokenizer)) == expected
    assert parser.dump(config) == parser.dump(parser.parse_string(parser.dump(config)))


class Watching(LightningModule):
    """Sums the tokens that it reads, and records which documents it reads in which step."""

    def __init__(self) -> None:
        super().__init__()
        self.total = torch.nn.Parameter(torch.zeros(()))
        self.trained: list[torch.Tensor] = []
        self.validated: list[torch.Tensor] = []

    def training_step(self, rollout: Rollout) -> torch.Tensor:
        self.trained.append(rollout.documents)
        read = torch.stack([segment.tokens[segment.token_mask].sum() for segment in rollout.segments])
        return self.total * read.float().mean() * 1e-5

    def validation_step(self, rollout: Rollout) -> None:
        self.validated.append(rollout.documents)

    def test_step(self, rollout: Rollout) -> None:
        raise AssertionError("the test split is empty")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, *, steps: int, limit: int | None = None) -> Trainer:
    checkpoints = ModelCheckpoint(folder, every_n_train_steps=5, save_top_k=-1, filename="{step}")
    return Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        limit_train_batches=limit,
        callbacks=[checkpoints],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


@pytest.mark.parametrize(("limit", "step"), [(None, 15), (7, 15), (7, 35)])
def test_a_resumed_run_reads_the_same_rollouts(tmp_path: Path, cache: Path, limit: int | None, step: int) -> None:
    through, resumed = Watching(), Watching()
    trainer(tmp_path, steps=80, limit=limit).fit(through, datamodule=pydoc(cache))
    checkpoint = tmp_path / f"{step=}.ckpt"
    trainer(tmp_path, steps=80, limit=limit).fit(resumed, datamodule=pydoc(cache), ckpt_path=checkpoint)
    torch.testing.assert_close(resumed.trained, through.trained[step:], rtol=0, atol=0)
    assert torch.equal(resumed.total, through.total)


def test_a_checkpoint_of_another_geometry_is_refused_before_any_training(tmp_path: Path, cache: Path) -> None:
    trainer(tmp_path, steps=5).fit(Watching(), datamodule=pydoc(cache))
    model = Watching()
    with pytest.raises(ValueError, match=r"cannot resume: .*: batch_size \(was 4, is 2\), seed \(was 0, is 1\)"):
        trainer(tmp_path, steps=9).fit(
            model, datamodule=pydoc(cache, lanes=2, seed=1), ckpt_path=tmp_path / "step=5.ckpt"
        )
    assert not model.trained


def test_a_trainer_fits_without_held_out_documents_and_refuses_to_evaluate(tmp_path: Path, cache: Path) -> None:
    data = pydoc(cache, validation=0.0, test=0.0)
    trainer(tmp_path, steps=2).fit(Watching(), datamodule=data)
    for name in ("validate", "test"):
        with pytest.raises(ValueError, match=f"cannot {name}: the split is empty; .* got .*'{name[:4]}.*': 0.0"):
            getattr(trainer(tmp_path, steps=2), name)(Watching(), datamodule=data)


def test_more_lanes_than_documents_cause_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "texts").mkdir()
    for name in "abcd":
        (tmp_path / "texts" / f"{name}.txt").write_text(name * 500)
    for interleave, warned in ((3, True), (2, False)):
        caplog.clear()
        data = SegmentData(
            corpus=Files(paths=str(tmp_path / "texts")),
            tokenizer=Bytes(),
            segment_length=8,
            horizon=2,
            batch_size=2,
            interleave=interleave,
            validation=0.0,
            test=0.0,
            cache=tmp_path,
        )
        data.setup()
        data.train_dataloader()
        assert ("read 6 documents in parallel, but there are only 4" in caplog.text) == warned
