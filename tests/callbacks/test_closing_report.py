"""The words and figures that a run ends with."""

import bz2
import csv
import gzip
import lzma
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from tokenizer_kinds import word_level

from memformer_pl.callbacks import ClosingReport
from memformer_pl.callbacks.closing_report import (
    Costs,
    byte_pair_entropy,
    content,
    describe,
    paired_gain,
    xz,
)
from memformer_pl.data import BytePairs, Bytes, Copy, Files, Tokenizer, TokenizerFile
from memformer_pl.data.datamodule import SegmentData
from memformer_pl.errors import UsageError
from memformer_pl.models import Memformer
from memformer_pl.training.task import SegmentTask

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")


def model(slots: int = 2) -> Memformer:
    sizes = {"dim": 8, "heads": 2, "encoder_layers": 1, "decoder_layers": 1}
    return Memformer(vocab_size=256, segment_length=16, slots=slots, **sizes)


def run(
    folder: Path,
    texts: Path,
    cache: Path,
    *callbacks: Callback,
    slots: int = 2,
    shares: float = 0.3,
    tokenizer: Tokenizer | None = None,
    rate: float = 1e-3,
    **options: Any,
) -> Trainer:
    """Two steps on small documents, with a report at the end."""
    sizes = {"segment_length": 16, "horizon": 2, "batch_size": 3, "validation": shares, "test": 0.0, "max_lost": 0.9}
    data = SegmentData(corpus=Files(paths=str(texts)), tokenizer=tokenizer or Bytes(), cache=cache, **sizes)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=2,
        val_check_interval=2,
        logger=CSVLogger(folder, name=None, version=""),
        log_every_n_steps=1,
        callbacks=[ClosingReport(), *callbacks],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(SegmentTask(model=model(slots), learning_rate=rate, warmup_steps=0), datamodule=data)
    return trainer


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "documents.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_report_has_a_row_for_every_document_and_agrees_with_the_validation(
    tmp_path: Path, texts: Path, pack_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = run(tmp_path, texts, pack_cache, precision="bf16-mixed")
    table = rows(tmp_path)
    originals = {path.stat().st_size: path.read_bytes() for path in texts.iterdir()}
    assert list(table[0]) == ["document", "sizes", "with_memory", "memory_reset", "gzip", "bzip2", "xz"]
    assert len(table) == 4
    for row in table:
        original = originals[int(float(row["sizes"]))]
        assert float(row["gzip"]) == 8 * len(gzip.compress(original, 9))
        assert float(row["bzip2"]) == 8 * len(bz2.compress(original, 9))
        assert float(row["xz"]) == 8 * len(lzma.compress(original, preset=9))
    bits, size = (sum(float(row[name]) for row in table) for name in ("with_memory", "sizes"))
    assert bits / size == pytest.approx(float(trainer.callback_metrics["validation/bits_per_byte"]), rel=1e-6)
    longest = max(table, key=lambda row: float(row["sizes"]))
    assert longest["with_memory"] != longest["memory_reset"]
    printed = " ".join(capsys.readouterr().out.split())
    assert "Reading 4 held-out documents" in printed
    for words in ("What the model has learned", "memory reset at every segment", "Memory saves this model"):
        assert words in printed
    assert f"{bits / size:.3f}" in printed


def three_words(folder: Path) -> Tokenizer:
    """Writes documents, of which this tokenizer loses a third."""
    (folder / "texts").mkdir()
    for number in range(9):
        (folder / "texts" / f"{number}.txt").write_text("the cat saw the number " * 9 + str(number))
    word_level(["the", "cat", "saw"]).save(str(folder / "words.json"))
    return TokenizerFile(path=str(folder / "words.json"))


def test_what_the_tokenizer_loses_is_told_beside_every_figure(
    tmp_path: Path, pack_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = three_words(tmp_path)
    trainer = run(tmp_path / "run", tmp_path / "texts", pack_cache, tokenizer=tokenizer)
    table = rows(tmp_path / "run")
    share = sum(float(row["lost"]) for row in table) / sum(float(row["sizes"]) for row in table)
    assert 0.25 < share < 0.45
    assert float(trainer.callback_metrics["validation/lost_bytes"]) == pytest.approx(share, rel=1e-6)
    assert float(trainer.callback_metrics["train/lost_bytes"]) == pytest.approx(share, abs=0.02)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"The tokenizer loses {share:.2%} of the bytes" in printed


def test_of_documents_that_are_read_in_part_what_the_tokenizer_loses_is_counted_in_part(
    tmp_path: Path, pack_cache: Path
) -> None:
    tokenizer = three_words(tmp_path)
    words = {"tokenizer": tokenizer, "shares": 0.6}
    run(tmp_path / "whole", tmp_path / "texts", pack_cache, **words)
    run(tmp_path / "limited", tmp_path / "texts", pack_cache, limit_val_batches=1, **words)
    whole = {row["document"]: row for row in rows(tmp_path / "whole")}
    table = rows(tmp_path / "limited")
    assert 0 < len(table) < len(whole)
    assert any(float(row["sizes"]) < float(whole[row["document"]]["sizes"]) for row in table)
    for row in table:
        share = float(row["sizes"]) / float(whole[row["document"]]["sizes"])
        assert float(row["lost"]) == pytest.approx(share * float(whole[row["document"]]["lost"]))


def test_a_model_without_memory_is_read_once(
    tmp_path: Path, texts: Path, pack_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, texts, pack_cache, slots=0)
    assert list(rows(tmp_path)[0]) == ["document", "sizes", "with_memory", "gzip", "bzip2", "xz"]
    printed = capsys.readouterr().out
    assert "What the model has learned" in printed
    assert "emory" not in printed


@pytest.mark.filterwarnings("ignore:Total length of `LaneLoader` across ranks is zero")
def test_without_validation_there_is_no_report(
    tmp_path: Path, texts: Path, pack_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, texts, pack_cache, shares=0.0)
    assert not (tmp_path / "documents.csv").exists()
    assert "What the model has learned" not in capsys.readouterr().out


@pytest.mark.parametrize("limit", [1, 2, 0.5])
def test_a_report_is_limited_as_the_validation_is_and_says_so(
    tmp_path: Path, texts: Path, pack_cache: Path, capsys: pytest.CaptureFixture[str], limit: float
) -> None:
    whole, limited = tmp_path / "whole", tmp_path / "limited"
    run(whole, texts, pack_cache)
    trainer = run(limited, texts, pack_cache, limit_val_batches=limit)
    printed = " ".join(capsys.readouterr().out.split())
    (rollouts,), of = trainer.num_val_batches, len(trainer.val_dataloaders)
    assert rollouts < of
    assert printed.count(f"limited to {rollouts} of {of} rollouts") == 2
    sizes = {row["document"]: float(row["sizes"]) for row in rows(whole)}
    table = rows(limited)
    assert all(0 < float(row["sizes"]) <= sizes[row["document"]] for row in table)
    assert any(float(row["sizes"]) < sizes[row["document"]] for row in table)
    bits, size = (sum(float(row[name]) for row in table) for name in ("with_memory", "sizes"))
    assert bits / size == pytest.approx(float(trainer.callback_metrics["validation/bits_per_byte"]), rel=1e-6)
    originals = {path.stat().st_size: path.read_bytes() for path in texts.iterdir()}
    for row in table:
        beginning = originals[int(sizes[row["document"]])][: int(float(row["sizes"]))]
        assert float(row["gzip"]) == 8 * len(gzip.compress(beginning, 9))


@pytest.mark.parametrize("options", [{"limit_val_batches": 0}, {"fast_dev_run": True}])
def test_a_report_on_nothing_or_of_a_trial_run_is_not_written(
    tmp_path: Path, texts: Path, pack_cache: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any]
) -> None:
    run(tmp_path, texts, pack_cache, **options)
    assert not list(tmp_path.rglob("documents.csv"))
    assert ("limited to 1 of" in capsys.readouterr().out) == ("fast_dev_run" in options)


def test_a_report_is_about_the_weights_that_are_kept(tmp_path: Path, texts: Path, pack_cache: Path) -> None:
    """An average of the weights takes their place when training ends, after callbacks that stand before it."""
    trainer = run(tmp_path, texts, pack_cache, EMAWeightAveraging(decay=0.5), rate=0.1)
    bits, size = (sum(float(row[name]) for row in rows(tmp_path)) for name in ("with_memory", "sizes"))
    assert bits / size == pytest.approx(float(trainer.callback_metrics["validation/bits_per_byte"]), rel=1e-6)


def test_documents_with_prompts_have_no_report(tmp_path: Path) -> None:
    recall = Copy(segment_length=4, shown=2, examples=20, questions=2, longest=2, tested=[2])
    sizes = {"segment_length": 4, "horizon": 2, "batch_size": 2, "validation": 0.0, "test": 0.0}
    data = SegmentData(corpus=recall, tokenizer=Bytes(), cache=tmp_path / "cache", **sizes)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", max_steps=1, callbacks=[ClosingReport()], **quiet)
    with pytest.raises(UsageError, match="these have prompts, which cost nothing: use AccuracyByDistance"):
        trainer.fit(SegmentTask(model=model()), datamodule=data)


class Interrupt(Callback):
    """Does what Ctrl-C does, after the first rollout."""

    def on_train_batch_end(self, *args: object) -> None:
        raise KeyboardInterrupt


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Lightning ignores Ctrl-C from the first one on."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("interruptible")
def test_a_run_that_is_interrupted_ends_without_a_report(
    tmp_path: Path, texts: Path, pack_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, texts, pack_cache, Interrupt())
    assert stopped.value.code == 1
    assert not (tmp_path / "documents.csv").exists()
    assert "What the model has learned" not in capsys.readouterr().out


def test_a_run_that_cannot_be_reported_on_is_refused_at_the_start() -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    for module in (SegmentTask(model=model()), LightningModule()):
        with pytest.raises(TypeError, match="ClosingReport needs a SegmentTask, and a SegmentData"):
            ClosingReport().setup(trainer, module, "fit")


@pytest.mark.parametrize("text", ["plain words, more plain words ", "dé à vu, 漢字 \r\n\t\0"])
def test_the_bytes_of_a_document_come_back_from_its_tokens(tmp_path: Path, text: str) -> None:
    (tmp_path / "corpus").mkdir()
    expected = (text * 9).encode()
    (tmp_path / "corpus" / "a.txt").write_bytes(expected)
    learned = SegmentData(
        corpus=Files(paths=str(tmp_path / "corpus")),
        tokenizer=BytePairs(vocab_size=270),
        validation=0.0,
        test=0.0,
        cache=tmp_path / "cache",
    )
    learned.setup()
    learned.tokenizer.save(tmp_path)
    assert content(learned.train_dataloader(), learned.tokenizer, 0) == expected
    from_file = TokenizerFile(path=str(tmp_path / "tokenizer.json"))
    assert content(learned.train_dataloader(), from_file, 0) == expected


def test_the_entropy_of_byte_pairs_by_hand() -> None:
    assert byte_pair_entropy([b"ababab"]) == 0  # the next byte is certain
    assert byte_pair_entropy([b"aab"]) == 1  # after a, an a or a b
    assert byte_pair_entropy([b"ab", b"ac"]) == 1  # pairs do not reach from one document into the next
    assert byte_pair_entropy([b"aaab", b"\xff\x00"]) == pytest.approx((np.log2(3) * 1 + np.log2(1.5) * 2) / 4)
    assert byte_pair_entropy([b"", b"x"]) == 0


def test_a_paired_gain_by_hand() -> None:
    worse, better, sizes = np.array([8.0, 10.0]), np.array([4.0, 4.0]), np.array([2.0, 2.0])
    assert paired_gain(worse, better, sizes) == pytest.approx((2.5, 0.5))
    mean, error = paired_gain(worse[:1], better[:1], sizes[:1])
    assert mean == 2
    assert np.isnan(error)


def test_xz_needs_no_more_than_the_command_does() -> None:
    random = np.random.default_rng(0)
    for length in (0, 1, 5000, 50_000):
        text = random.integers(65, 70, length, dtype=np.uint8).tobytes()
        assert len(xz(text)) == len(lzma.compress(text, preset=9))
        assert lzma.decompress(xz(text)) == text


def test_only_what_was_computed_counts_as_memory() -> None:
    assert model().has_memory()
    assert not model(slots=0).has_memory()
    assert all(field.dtype == torch.int64 for field in model(slots=0).initial_state(1) if field.numel())


def test_the_report_weighs_documents_by_their_size() -> None:
    two = np.array([100.0, 300.0])
    costs = Costs(np.arange(2), two, two * [2, 6], two * [3, 6], two * 4, two * 5, two * 7, byte_pairs=3.5)
    table, *lines = describe(costs)
    cells = dict(zip(*(list(column.cells) for column in table.columns), strict=True))
    assert list(cells.values()) == ["5.000", "5.250", "4.000", "5.000", "7.000", "3.500"]
    assert "On 2 documents" in lines[0]
    assert "0.5000 ± 0.5000 bits per byte" in lines[1]
