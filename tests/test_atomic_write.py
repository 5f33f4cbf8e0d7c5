"""No command overwrites its input, under whatever name, and a failed write is reported in one line."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from trained import write_folder

from memformer_pl.atomic_write import atomic_write
from memformer_pl.data import Bytes, Corpus, Files, Hub, pack
from memformer_pl.data.corpora.paths import covers, matches
from memformer_pl.data.packing.documents import DocumentWriter
from memformer_pl.errors import UsageError

Command = Callable[..., Any]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a model, documents, and other names of them."""
    write_folder(tmp_path / "model", Bytes())
    (tmp_path / "docs" / "deep").mkdir(parents=True)
    for name in ("only.txt", "docs/a.txt", "docs/deep/b.txt", "docs/taken.partial"):
        (tmp_path / name).write_text(f"the only copy of {name}")
    (tmp_path / "link.txt").symlink_to("only.txt")
    (tmp_path / "same.txt").hardlink_to(tmp_path / "only.txt")
    (tmp_path / "linked").symlink_to("docs", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(outcome: Any, here: Path, before: dict[str, bytes]) -> str:
    """The line of a command that has changed nothing."""
    assert outcome.code in (1, 2), outcome
    (line,) = outcome.errors
    assert "Traceback" not in outcome.output
    assert everything(here) == before
    return str(line)


@pytest.mark.parametrize(
    ("documents", "out"),
    [
        (["only.txt"], "only.txt"),
        (["only.txt"], "./docs/../only.txt"),
        (["only.txt"], "link.txt"),
        (["only.txt"], "same.txt"),
        (["link.txt"], "only.txt"),
        (["docs"], "docs/losses.parquet"),
        (["docs"], "docs/new/losses.parquet"),
        (["docs"], "linked/losses.parquet"),
        (["linked"], "docs/losses.parquet"),
        (["docs/*"], "docs/losses.parquet"),
        (["only.txt", "docs/**/*.txt"], "docs/deep/new.txt"),
        (["docs/**"], "docs/x/y/new.parquet"),
        (["docs/taken.partial"], "docs/taken"),
        (["."], "losses.parquet"),
        (["only.txt"], "model/model.safetensors"),
        (["only.txt"], "model/config.json"),
    ],
)
def test_predict_does_not_write_over_what_it_reads(
    command: Command, here: Path, documents: list[str], out: str
) -> None:
    before = everything(here)
    outcome = command("predict", "--ckpt_path", "model", "--documents", *documents, "--out", out)
    line = refused(outcome, here, before)
    assert "out=" in line or "out would" in line
    assert "one of the documents" in line or "an input" in line


@pytest.mark.parametrize(
    ("documents", "out"),
    [
        (["docs/*.txt"], "docs/losses.parquet"),
        (["docs"], "docs/.token_losses.parquet"),
        (["docs/*"], "docs/new/losses.parquet"),
        (["docs"], "docs2/losses.parquet"),
        (["only.txt"], "losses.parquet"),
    ],
)
def test_predict_writes_beside_what_it_reads(command: Command, here: Path, documents: list[str], out: str) -> None:
    for _ in range(2):  # a table of before is replaced, and not read
        assert command("predict", "--ckpt_path", "model", "--documents", *documents, "--out", out).code == 0
    names = set(pyarrow.parquet.read_table(out)["document"].to_pylist())
    assert names == {str(path) for pattern in documents for path in matches(pattern)}


@pytest.mark.parametrize(
    ("options", "out"),
    [
        (["--prompt_file", "only.txt"], "only.txt"),
        (["--prompt_file", "only.txt"], "same.txt"),
        (["--prompt_file", "docs/taken.partial"], "docs/taken"),
        ([], "model/model.safetensors"),
        ([], "model/tokenizer.json/../config.json"),
    ],
)
def test_generate_does_not_write_over_what_it_reads(command: Command, here: Path, options: list[str], out: str) -> None:
    (here / "model" / "tokenizer.json").mkdir()
    before = everything(here)
    outcome = command("generate", "--ckpt_path", "model", "--length", "1", *options, "--save_memory", out)
    assert "save_memory would overwrite" in refused(outcome, here, before)


def test_generate_does_not_write_over_its_standard_input(
    command: Command, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = everything(here)
    with (here / "only.txt").open("rb") as file, io.TextIOWrapper(file) as text:
        monkeypatch.setattr("sys.stdin", text)
        words = ["--ckpt_path", "model", "--length", "1", "--prompt_file", "-", "--save_memory", "same.txt"]
        assert "save_memory would overwrite" in refused(command("generate", *words), here, before)


def test_a_memory_may_take_the_place_of_the_one_that_was_read(command: Command, here: Path) -> None:
    words = ["--ckpt_path", "model", "--length", "3"]
    assert command("generate", *words, "--prompt", "a text", "--save_memory", "memory").code == 0
    before = (here / "memory").read_bytes()
    assert command("generate", *words, "--memory", "memory", "--save_memory", "memory").code == 0
    assert (here / "memory").read_bytes() != before
    shutil.copy("memory", "other.partial")
    outcome = command("generate", *words, "--memory", "other.partial", "--save_memory", "other")
    assert "save_memory would overwrite 'other.partial'" in refused(outcome, here, everything(here))


@pytest.mark.parametrize("out", ["model", "./docs/../model", "alias", "copy"])
def test_export_does_not_write_over_what_it_reads(command: Command, here: Path, out: str) -> None:
    (here / "alias").symlink_to("model", target_is_directory=True)
    (here / "copy").mkdir()
    (here / "copy" / "model.safetensors").symlink_to(here / "model" / "model.safetensors")
    before = everything(here)
    assert "out would overwrite" in refused(command("export", "--ckpt_path", "model", "--out", out), here, before)
    assert command("export", "--ckpt_path", "model", "--out", "model/deeper").code == 0


def test_a_cache_in_the_folder_of_the_corpus_is_refused(tmp_path: Path) -> None:
    for number in range(9):
        (tmp_path / f"{number}.txt").write_text(f"document {number}")
    corpora: list[Corpus] = [Files(paths=str(tmp_path)), Files(paths=f"{tmp_path}/**/*"), Hub(path=str(tmp_path))]
    before = everything(tmp_path)
    for corpus in corpora:
        with pytest.raises(UsageError, match=r"the cache '.*' is among the files of the corpus"):
            pack(corpus, Bytes(), validation=0.0, test=0.0, cache=tmp_path / "cache")
    assert everything(tmp_path) == before
    fitting = Files(paths=f"{tmp_path}/*.txt")
    assert len(pack(fitting, Bytes(), validation=0.0, test=0.0, cache=tmp_path / "cache").train) == 9


def test_a_run_and_an_analysis_in_the_folder_of_the_corpus_are_refused(command: Command, small: Path) -> None:
    (small.parent / "corpus").mkdir()
    for number in range(9):
        (small.parent / "corpus" / f"{number}.txt").write_text(f"document {number} " * 9)
    folder = small.parent / "corpus"
    words = ["--config", small, "--data.corpus.paths", folder]
    outcome = command("fit", *words, "--trainer.logger.save_dir", folder)
    assert outcome.code != 0
    assert "a folder of its corpus" in outcome.output
    assert not list(folder.rglob("*.ckpt"))
    assert command("fit", *words).code == 0
    (last,) = small.parent.rglob("last.ckpt")
    outcome = command("analyze", *words, "--ckpt_path", last, "--out", folder / "analysis")
    assert outcome.code != 0
    assert "is among the files of the corpus" in outcome.output
    assert not (folder / "analysis").exists()


@pytest.mark.parametrize(
    "pattern", ["docs", "docs/*", "docs/**", "docs/**/*.txt", "*/a.txt", "d[o]cs/?.txt", "docs/a.txt"]
)
def test_what_a_pattern_covers_is_what_it_matches(here: Path, pattern: str) -> None:
    (here / "docs" / ".hidden").mkdir()
    for name in ("docs/.a.txt", "docs/.hidden/a.txt", "docs/deep/c.md"):
        (here / name).write_text("text")
    matched = {path.resolve() for path in matches(pattern)}
    for path in here.rglob("*"):
        if path.is_file():
            assert covers(pattern, path) == (path.resolve() in matched), path


def no_space(*given: object, **options: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("place", ["nowhere/x", "only.txt/x"])
def test_a_place_that_cannot_be_written_is_named(command: Command, here: Path, place: str) -> None:
    (here / "nowhere").touch()
    before = everything(here)
    common = ["--ckpt_path", "model"]
    for words in (
        ["predict", *common, "--documents", "docs", "--out", place],
        ["generate", *common, "--length", "1", "--save_memory", place],
        ["export", *common, "--out", place],
    ):
        line = refused(command(*words), here, before)
        assert f"cannot write '{place}'" in line


@pytest.mark.parametrize(
    "called", ["pyarrow.parquet.ParquetWriter", "pyarrow.parquet.ParquetWriter.write_table", "os.fsync"]
)
def test_a_full_disk_ends_predict_in_a_line(
    command: Command, here: Path, monkeypatch: pytest.MonkeyPatch, called: str
) -> None:
    before = everything(here)
    monkeypatch.setattr(called, no_space)
    outcome = command("predict", "--ckpt_path", "model", "--documents", "docs", "--out", "out.parquet")
    line = refused(outcome, here, before)
    assert "cannot write 'out.parquet" in line
    assert "No space left on device" in line


def test_a_full_disk_ends_packing_in_a_line_and_leaves_nothing(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DocumentWriter, "add", no_space)
    with pytest.raises(UsageError, match=r"cannot pack the corpus into .*try another cache.*No space left"):
        pack(Files(paths=str(texts)), Bytes(), validation=0.1, test=0.1, cache=tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_an_error_of_the_body_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("of before")
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "file"):
        (tmp_path / "gone").read_text()
    assert everything(tmp_path) == {"file": b"of before"}


@pytest.mark.parametrize("option", ["--prompt", "--prompt_file", "--save_memory"])
def test_a_value_that_begins_with_a_dash_is_said_to_need_an_equals_sign(
    command: Command, here: Path, option: str
) -> None:
    outcome = command("generate", "--ckpt_path", "model", option, "--length", "3")
    assert outcome.code == 2
    assert f"one that begins with - is written {option}=VALUE" in outcome.errors[0]
    assert command("generate", "--ckpt_path", "model", "--prompt=--length", "--length", "3").code == 0
