"""Unreadable data are refused with an error that names the file; readable data are trained on.

Texts, tables, tokenizers and packed corpora get common faults, written by hand, and random changes of their bytes. The
default run takes a sample; ``pytest -m slow tests/data/test_fuzz_data.py`` takes all of them.
"""

import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from conftest import Outcome
from data_faults import FAULTS, LINES, TEXTS, Fault, by_chance, tokenizer_faults
from fuzzing import files_below, run, some, the_error

from memformer_pl.data import BytePairs, Files, Pack, pack

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run of one step on the folder ``corpus``."""
    (tmp_path / "corpus").mkdir()
    model = {"dim": 8, "heads": 2, "slots": 2, "encoder_layers": 1, "decoder_layers": 1}
    tree = {
        "model": {"model": {"class_path": "Memformer", "init_args": model}},
        "data": {
            "corpus": {"class_path": "Files", "init_args": {"paths": str(tmp_path / "corpus")}},
            "tokenizer": {"class_path": "BytePairs", "init_args": {"vocab_size": 256}},
            **{"segment_length": 8, "horizon": 2, "batch_size": 2, "interleave": 1, "validation": 0.0, "test": 0.0},
            "cache": str(tmp_path / "cache"),
        },
        "trainer": {
            **{"accelerator": "cpu", "max_steps": 1, "logger": False, "enable_checkpointing": False},
            **{"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": str(tmp_path / "run")},
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "config.yaml"


def refused(outcome: Outcome, folder: Path, *, code: int = 1) -> str:
    """The error of a command that refused its data and packed nothing."""
    assert outcome.code == code
    assert not files_below(folder / "cache")
    return the_error(outcome)


@pytest.mark.parametrize("fault", some(FAULTS, short=25))
def test_an_unreadable_file_is_named_and_a_readable_one_is_trained_on(
    command: Callable[..., Outcome], config: Path, tmp_path: Path, fault: Fault
) -> None:
    path = tmp_path / "corpus" / fault.file
    path.write_bytes(fault.content)
    # a second, valid file: an empty corpus is a different fault
    (tmp_path / "corpus" / "valid.txt").write_text("valid")
    outcome = run(command, "fit", "--config", config)
    if outcome.code == 0:
        assert fault.readable is not False
        return
    error = refused(outcome, tmp_path)
    assert fault.readable is not True
    assert str(path) in error
    assert fault.message in error
    # the position in the file, if the format has one
    assert path.suffix == ".parquet" or re.search(r"line \d+|row \d+|offset \d+", error)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_bytes_reads_any_content(command: Callable[..., Outcome], config: Path, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    for number in range(3):
        (tmp_path / "corpus" / f"{number}.txt").write_bytes(chance.randbytes(chance.randrange(1, 500)))
    assert run(command, "fit", "--config", config, "--data.tokenizer", "Bytes").code == 0
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    tokens = (folder / "train" / "tokens.bin").read_bytes()
    assert tokens == b"".join((tmp_path / "corpus" / f"{number}.txt").read_bytes() for number in range(3))


def nothing(folder: Path) -> str:
    return str(folder / "nothing.txt")


def link_to_nothing(folder: Path) -> str:
    (folder / "corpus" / "link.txt").symlink_to(folder / "gone.txt")
    return str(folder / "corpus")


def link_to_itself(folder: Path) -> str:
    (folder / "corpus" / "link.txt").symlink_to(folder / "corpus" / "link.txt")
    return str(folder / "corpus" / "*.txt")


def folder_like_a_table(folder: Path) -> str:
    (folder / "corpus" / "rows.jsonl").mkdir()
    return str(folder / "corpus" / "rows.jsonl")


def pipe(folder: Path) -> str:
    """Reading a pipe would block for ever."""
    os.mkfifo(folder / "corpus" / "pipe.txt")
    return str(folder / "corpus" / "pipe.txt")


def empty_files(folder: Path) -> str:
    for name in ("a.txt", "b.jsonl"):
        (folder / "corpus" / name).touch()
    return str(folder / "corpus")


def hidden_files(folder: Path) -> str:
    (folder / "corpus" / ".hidden").write_text("text")
    return str(folder / "corpus")


def too_few(folder: Path) -> str:
    (folder / "corpus" / "a.txt").write_text("text")
    (folder / "corpus" / "b.txt").write_text("text")
    return str(folder / "corpus")


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (nothing, "there is no such file or directory"),
        (lambda folder: str(folder / "corpus" / "*.txt"), "no file matches the pattern"),
        (lambda folder: str(folder / ("x" * 300)), "File name too long"),
        (lambda folder: f"{folder}/config.yaml/x", "there is no such file or directory"),
        (link_to_nothing, "link.txt' is a broken link"),
        (link_to_itself, "link.txt' is a broken link"),
        (folder_like_a_table, "the directory has no file in it"),
        (pipe, "there is no such file or directory"),
        (empty_files, "the corpus Files is empty"),
        (hidden_files, "the directory has no file in it"),
        (too_few, "1 distinct documents are too few to hold out 1 of them"),
    ],
)
def test_a_path_without_data_is_refused(
    command: Callable[..., Outcome], config: Path, tmp_path: Path, made: Callable[[Path], str], message: str
) -> None:
    paths = made(tmp_path)
    outcome = run(command, "fit", "--config", config, "--data.corpus.paths", paths, "--data.validation", "0.1")
    error = refused(outcome, tmp_path)
    assert message in error
    assert made is too_few or made is empty_files or paths[:200] in error


@pytest.mark.parametrize("fault", some(tokenizer_faults(), short=10))
def test_a_damaged_tokenizer_is_named_or_encodes_the_corpus(
    command: Callable[..., Outcome], config: Path, tmp_path: Path, fault: tuple[str, bytes]
) -> None:
    (tmp_path / "corpus" / "one.txt").write_text("".join(TEXTS))
    path = tmp_path / "tokenizer.json"
    path.write_bytes(fault[1])
    options = ["--data.tokenizer", "TokenizerFile", "--data.tokenizer.path", path]
    outcome = run(command, "fit", "--config", config, *options)
    if outcome.code == 0:
        return
    if "of the bytes of the train documents" in outcome.output:
        # the loss is known only after packing, and the pack is kept for a run with a larger max_lost
        assert outcome.code == 1
        assert "or set max_lost=" in the_error(outcome)
        return
    # the file is read when the model is built; its effect on text shows when the corpus is packed
    error = refused(
        outcome, tmp_path, code=2 if str(path) in outcome.output or "vocab_size must be" in outcome.output else 1
    )
    assert str(path) in error or "vocab_size must be at most" in error or "token" in error


class Packed(NamedTuple):
    """A corpus, its pack, and the content of every file of the pack."""

    corpus: Files
    folder: Path
    files: dict[str, bytes]

    def open(self) -> Pack:
        shares = {"validation": 0.2, "test": 0.2}
        return pack(self.corpus, BytePairs(vocab_size=270), cache=self.folder.parent, **shares)

    def content(self) -> dict[str, bytes]:
        found = (path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    folder = tmp_path_factory.mktemp("packed")
    (folder / "rows.jsonl").write_bytes(LINES)
    empty = Packed(Files(paths=str(folder / "rows.jsonl")), folder / "cache" / "none yet", {})
    written = empty._replace(folder=empty.open().folder)
    return written._replace(files=written.content())


FILES = [
    f"{split}/{name}"
    for split in ("train", "validation", "test")
    for name in ("tokens.bin", "offsets.npy", "bytes.npy")
]
DAMAGES = [
    (f"{file} {seed}", seed) for seed in range(20) for file in (*FILES, "tokenizer.json", "meta.json", "checksums.json")
]


@pytest.mark.parametrize("damage", some(DAMAGES, short=15))
def test_a_damaged_pack_is_packed_again_and_never_trained_on(packed: Packed, damage: tuple[str, int]) -> None:
    path = packed.folder / damage[0].split()[0]
    if damage[1]:
        path.write_bytes(by_chance(path.read_bytes(), damage[1])[1])
    else:
        path.unlink()
    opened = packed.open()
    assert packed.content() == packed.files
    assert opened.fingerprint == json.loads(packed.files["meta.json"])["fingerprint"]


def test_a_pack_that_another_run_reads_may_be_packed_again(packed: Packed) -> None:
    """A mapped file stays as it was after it is deleted."""
    reading = packed.open().train
    before = reading.tokens.tolist()
    (packed.folder / "meta.json").unlink()
    packed.open()
    assert reading.tokens.tolist() == before
