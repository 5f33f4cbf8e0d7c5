"""The table of ``predict``: the losses of the evaluation, for documents of any size."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from tokenizer_kinds import KINDS, WIDE
from trained import learned, write_folder

from memformer_pl.data import Bytes, LaneLoader, PackedDocuments, Tokenizer
from memformer_pl.data.tokenizers import pieces
from memformer_pl.data.tokenizers.subwords import SerializedTokenizer
from memformer_pl.models import Memformer
from memformer_pl.training.task import SegmentTask

Command = Callable[..., Any]
TEXTS = ["for x in y:\n    pass\n" * 9, "", "a", "Ein Satz mit ä und 🤷. " * 15, "short one", "x" * 64]


@pytest.fixture(params=[Bytes, learned])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    built: Tokenizer = request.param()
    return built


@pytest.fixture
def model(tmp_path: Path, tokenizer: Tokenizer) -> Memformer:
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    return write_folder(tmp_path / "folder", tokenizer)


def words_of(folder: Path) -> list[object]:
    return ["--ckpt_path", folder / "folder", "--documents", folder / "texts", "--out", folder / "losses.parquet"]


def table(command: Command, folder: Path, *options: object) -> dict[str, list[Any]]:
    """What the command writes, in columns by document and position."""
    outcome = command("predict", *words_of(folder), *options)
    assert outcome.code == 0, outcome
    read = pyarrow.parquet.read_table(folder / "losses.parquet")
    columns: dict[str, list[Any]] = read.sort_by([("document", "ascending"), ("position", "ascending")]).to_pydict()
    return columns


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_losses_are_those_of_the_evaluation(
    command: Command, tmp_path: Path, tokenizer: Tokenizer, model: Memformer, batch_size: int
) -> None:
    found = table(command, tmp_path, "--batch_size", batch_size)
    encoded = [tokenizer.encode(text).astype(np.int64) for text in TEXTS]
    loader = LaneLoader(
        PackedDocuments.from_arrays(encoded),
        batch_size=2,
        segment_length=model.segment_length,
        horizon=3,
        shuffle=False,
    )
    nats, tokens, correct = SegmentTask(model=model).read_documents(loader, documents=len(TEXTS)).compute().numpy()
    for number in range(len(TEXTS)):
        name = str(tmp_path / "texts" / f"{number}.txt")
        rows = [row for row, document in enumerate(found["document"]) if document == name]
        assert [found["position"][row] for row in rows] == list(range(int(tokens[number])))
        assert [found["token"][row] for row in rows] == encoded[number].tolist()
        assert b"".join(found["bytes"][row] for row in rows).decode() == TEXTS[number]
        assert sum(found["loss"][row] for row in rows) == pytest.approx(nats[number], rel=1e-6)
        assert sum(found["correct"][row] for row in rows) == correct[number]
    assert len(found["loss"]) == tokens.sum()


def test_the_cost_of_all_documents_is_printed(command: Command, tmp_path: Path, model: Memformer) -> None:
    words = ["--ckpt_path", tmp_path / "folder", "--documents", *sorted((tmp_path / "texts").iterdir())]
    outcome = command("predict", *words, "--out", tmp_path / "losses.parquet")
    loss = pyarrow.parquet.read_table(tmp_path / "losses.parquet")["loss"].to_numpy()
    size = sum(len(text.encode()) for text in TEXTS)
    bits = loss.sum(dtype=np.float64) / np.log(2) / size
    assert f"5 documents, {len(loss):,} tokens, {size:,} bytes" in outcome.output
    assert f"{bits:.4f} bits per byte" in outcome.output


def test_blocks_and_batches_of_any_size_give_the_same_table(
    command: Command, tmp_path: Path, model: Memformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = table(command, tmp_path)
    monkeypatch.setattr(pieces, "BLOCK", 5)
    monkeypatch.setattr("memformer_pl.cli.predict.ROWS", 7)
    assert table(command, tmp_path) == expected
    assert pyarrow.parquet.ParquetFile(tmp_path / "losses.parquet").num_row_groups > 10


def test_a_row_of_a_table_is_a_document(command: Command, tmp_path: Path, model: Memformer) -> None:
    expected = table(command, tmp_path)
    for path in (tmp_path / "texts").iterdir():
        path.unlink()
    (tmp_path / "texts" / "all.jsonl").write_text("".join(f"{json.dumps({'body': text})}\n" for text in TEXTS))
    found = table(command, tmp_path, "--field", "body", "--batch_size", 1)
    assert set(found["document"]) == {f"{tmp_path / 'texts' / 'all.jsonl'}, line {n}" for n in (1, 3, 4, 5, 6)}
    for column in ("token", "bytes", "correct"):
        assert found[column] == expected[column]
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-6)


@pytest.mark.parametrize(
    ("given", "code", "told"),
    [
        (["--documents", "missing.txt"], 1, "there is no such file or directory, got path='missing.txt'"),
        (["--batch_size", "0"], 2, "batch_size must be at least 1, got 0"),
        (["--out", "."], 2, "out must be a file, but '.' is a folder"),
        (["--batchsize", "1"], 2, "there is no option 'batchsize'. Did you mean batch_size?"),
        (["--ckpt_path", "missing.ckpt"], 1, "there is no checkpoint 'missing.ckpt'"),
    ],
)
def test_invalid_input_is_refused_and_nothing_is_written(
    command: Command, tmp_path: Path, model: Memformer, given: list[str], code: int, told: str
) -> None:
    words = ["--ckpt_path", tmp_path / "folder", "--documents", tmp_path / "texts", "--out", tmp_path / "out" / "a"]
    outcome = command("predict", *words, *given)
    (line,) = outcome.errors
    assert outcome.code == code
    assert told in line
    assert not list(tmp_path.glob("out/*"))


def test_a_document_that_is_not_text_leaves_the_earlier_table(command: Command, tmp_path: Path) -> None:
    write_folder(tmp_path / "folder", learned())
    (tmp_path / "wrong.txt").write_bytes(b"right for long" * 100 + b"\xff")
    (tmp_path / "losses.parquet").write_text("of before")
    words = ["--ckpt_path", tmp_path / "folder", "--documents", tmp_path / "wrong.txt"]
    outcome = command("predict", *words, "--out", tmp_path / "losses.parquet")
    assert outcome.code == 1
    assert "wrong.txt is not UTF-8: byte 0xff at offset 1400" in outcome.errors[0]
    assert (tmp_path / "losses.parquet").read_text() == "of before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "losses.parquet", "wrong.txt"]


@pytest.mark.parametrize("kind", ["llama", "byte-level in a sequence", "byte-level with added tokens", "three words"])
def test_the_bytes_join_to_the_document_with_every_tokenizer_and_lost_bytes_are_reported(
    command: Command, tmp_path: Path, kind: str
) -> None:
    write_folder(tmp_path / "folder", SerializedTokenizer(text=KINDS[kind]().to_str()))
    text = f"the cat saw Zoë\n\n{WIDE} <end of text> a dog 🤷.  \n" * 9
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text(text)
    assert b"".join(table(command, tmp_path)["bytes"]).decode() == text
    told = command("predict", *words_of(tmp_path)).output
    assert ("% of the bytes cannot be restored from the tokens" in told) == (kind == "three words")
    generated = command("generate", "--ckpt_path", tmp_path / "folder", "--prompt", text, "--length", 20)
    assert generated.code == 0


def test_a_compressed_document_is_read_and_its_own_bytes_are_counted(
    command: Command, tmp_path: Path, model: Memformer
) -> None:
    expected = table(command, tmp_path)
    for path in list((tmp_path / "texts").iterdir()):
        path.with_suffix(".txt.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert {**table(command, tmp_path), "document": 0} == {**expected, "document": 0}
    assert f"{sum(len(text.encode()) for text in TEXTS):,} bytes: " in command("predict", *words_of(tmp_path)).output
