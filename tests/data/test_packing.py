"""A corpus is packed once, completely or not at all, and split by the content of its documents."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import tracemalloc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from tokenizer_kinds import byte_level, word_level

from memformer_pl.data import BytePairs, Bytes, Corpus, Document, Files, Pack, Tokenizer, TokenizerFile, pack
from memformer_pl.data.packing import pack as pack_module
from memformer_pl.data.packing.documents import count_words
from memformer_pl.data.packing.splits import assign_splits, content_hash
from memformer_pl.errors import UsageError


class Given(Corpus):
    """Documents made up by a test; counts how often they were read."""

    def __init__(self, contents: Sequence[bytes], splits: Sequence[str] | None = None) -> None:
        self.contents = contents
        self.splits = splits or ["train"] * len(contents)
        self.reads = 0

    def documents(self) -> Iterator[Document]:
        self.reads += 1
        for number, (content, split) in enumerate(zip(self.contents, self.splits, strict=True)):
            yield Document(content, name=f"document {number}", split=split)

    def identity(self) -> Mapping[str, object]:
        return {"corpus": [content.hex() for content in self.contents], "splits": self.splits}


WORDS = [f"the number {number} and what follows it: {number * number}\r\n".encode() for number in range(40)]


def packed(corpus: Corpus, cache: Path, *, tokenizer: Tokenizer | None = None, validation: float = 0.1) -> Pack:
    return pack(corpus, tokenizer or Bytes(), validation=validation, test=validation, cache=cache)


def contents(result: Pack, split: str) -> list[bytes]:
    documents = getattr(result, split)
    return [documents.document(index).tobytes() for index in range(len(documents))]


def every_content(result: Pack) -> list[bytes]:
    return [content for split in ("train", "validation", "test") for content in contents(result, split)]


def test_an_unknown_split_is_refused_with_the_document_that_has_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="document 1: split must be one of train, validation, test, got 'valid'"):
        packed(Given(WORDS, ["train", "valid", *["train"] * 38]), tmp_path)


def test_packed_documents_are_restored(tmp_path: Path) -> None:
    odd = [b"\xff\xfe invalid", b"a", b"", b"\r\n\x00", *WORDS]
    result = packed(Given(odd), tmp_path)
    assert sorted(every_content(result)) == sorted(content for content in odd if content)
    assert [len(result.train), len(result.validation), len(result.test)] == [35, 4, 4]
    np.testing.assert_array_equal(result.train.lengths, result.train.bytes)


def test_documents_keep_their_names_and_a_pack_without_names_is_packed_again(tmp_path: Path) -> None:
    result = packed(Given([b"", *WORDS]), tmp_path)
    for split in ("train", "validation", "test"):
        expected = [f"document {WORDS.index(content) + 1}" for content in contents(result, split)]
        documents = getattr(result, split)
        assert documents.names(range(len(documents))) == dict(enumerate(expected))
        assert documents.names({1}) == {1: expected[1]}
    (result.folder / "train" / "names.txt").unlink()
    assert packed(Given([b"", *WORDS]), tmp_path).train.names({1}) == result.train.names({1}) != {}


class Prompted(Given):
    """The same documents with a prompt of nine bytes."""

    def documents(self) -> Iterator[Document]:
        yield from (document._replace(prompt_length=9) for document in super().documents())

    def identity(self) -> Mapping[str, object]:
        return {**super().identity(), "prompt_length": 9}


@pytest.mark.parametrize("tokenizer", [Bytes(), BytePairs(vocab_size=300)])
def test_the_prompt_of_a_document_ends_with_a_token_and_changes_the_fingerprint(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    plain, prompted = (packed(kind(WORDS), tmp_path, tokenizer=tokenizer) for kind in (Given, Prompted))
    assert not plain.train.prompt_lengths.any()
    assert plain.train.fingerprint != prompted.train.fingerprint
    for index, prompt_length in enumerate(prompted.train.prompt_lengths.tolist()):
        tokens = prompted.train.document(index)
        assert prompted.tokenizer.decode(tokens[:prompt_length]) == "the numbe"
        assert prompted.tokenizer.decode(tokens[prompt_length:]).startswith("r ")
        assert prompted.tokenizer.decode(tokens) == plain.tokenizer.decode(plain.train.document(index))


@pytest.mark.parametrize("name", ["BytePairs", "TokenizerFile"])
def test_subwords_decode_to_the_text_and_bytes_are_counted(tmp_path: Path, name: str) -> None:
    corpus = Given(["naïve café, 中文".encode() * 5, *WORDS])
    learned = packed(corpus, tmp_path, tokenizer=BytePairs(vocab_size=300))
    file = TokenizerFile(path=str(learned.folder / "tokenizer.json"))
    result = learned if name == "BytePairs" else packed(corpus, tmp_path, tokenizer=file)
    for documents in (result.train, result.validation, result.test):
        texts = [result.tokenizer.decode(documents.document(index)) for index in range(len(documents))]
        assert {text.encode() for text in texts} <= set(corpus.contents)
        assert [len(text.encode()) for text in texts] == documents.bytes.tolist()
    assert result.train.bytes_per_token == result.train.bytes.sum() / result.train.lengths.sum() > 1.5
    assert result.train.tokens.dtype == np.uint16


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", 0),
        (b" \n = Heading = \n \n one word , and <unk> \n", 8 + 4),
        (b"no end of a line", 5),
        (b"tab\tand\r\nreturn\x0b\x0cfeed", 4 + 1),
        ("ein\u00a0Wort, 中文".encode(), 2),
        (b"\n\n\n", 3),
    ],
)
def test_words_are_counted_with_the_ends_of_lines(text: bytes, words: int) -> None:
    assert count_words(text) == words == len(text.split()) + text.count(b"\n")


def test_words_of_every_document_are_packed(tmp_path: Path) -> None:
    result = packed(Given([b"a b\nc", *WORDS]), tmp_path, tokenizer=BytePairs(vocab_size=300))
    for split in ("train", "validation", "test"):
        documents = getattr(result, split)
        texts = [result.tokenizer.decode(documents.document(index)).encode() for index in range(len(documents))]
        assert documents.words.tolist() == [len(text.split()) + text.count(b"\n") for text in texts]


def test_byte_pairs_are_learned_from_the_training_split_alone(tmp_path: Path) -> None:
    held_out = b"zq" * 5000
    corpus = Given([*WORDS, held_out, b"ordinary"], splits=["train"] * 40 + ["validation", "test"])
    result = packed(corpus, tmp_path, tokenizer=BytePairs(vocab_size=400))
    assert result.validation.lengths.tolist() == [len(held_out)]


def test_the_tokenizer_that_is_passed_is_not_changed(tmp_path: Path) -> None:
    tokenizer = BytePairs(vocab_size=300)
    assert packed(Given(WORDS), tmp_path, tokenizer=tokenizer).tokenizer is not tokenizer
    with pytest.raises(RuntimeError, match="is not trained yet"):
        tokenizer.encode("text")


def test_a_second_run_reads_no_document_and_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first = packed(Given(WORDS), tmp_path, tokenizer=BytePairs(vocab_size=300))
    assert "packing" in capfd.readouterr().err
    corpus = Given(WORDS)
    second = packed(corpus, tmp_path, tokenizer=BytePairs(vocab_size=300))
    assert corpus.reads == 0
    assert capfd.readouterr() == ("", "")
    assert (first.folder, first.fingerprint) == (second.folder, second.fingerprint)
    np.testing.assert_array_equal(first.tokenizer.encode("the number"), second.tokenizer.encode("the number"))


def test_another_corpus_tokenizer_or_share_is_packed_separately(tmp_path: Path) -> None:
    results = [
        packed(Given(WORDS), tmp_path),
        packed(Given(WORDS[1:]), tmp_path),
        packed(Given(WORDS), tmp_path, tokenizer=BytePairs(vocab_size=256)),
        packed(Given(WORDS), tmp_path, validation=0.2),
    ]
    assert len({result.folder for result in results}) == len({result.fingerprint for result in results}) == 4


def test_the_cache_may_be_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMFORMER_CACHE", str(tmp_path / "elsewhere"))
    assert pack(Given(WORDS), Bytes(), validation=0.0, test=0.0).folder.parent == tmp_path / "elsewhere"


def test_splits_do_not_depend_on_the_order_of_documents(tmp_path: Path) -> None:
    forward, backward = packed(Given(WORDS), tmp_path), packed(Given(WORDS[::-1]), tmp_path)
    for split in ("train", "validation", "test"):
        assert contents(forward, split) == contents(backward, split)[::-1]


def test_splits_share_no_content_even_if_documents_are_equal(tmp_path: Path) -> None:
    result = packed(Given(WORDS * 3), tmp_path)
    splits = [set(contents(result, split)) for split in ("train", "validation", "test")]
    assert [len(split) for split in splits] == [32, 4, 4]
    assert len(set.union(*splits)) == 40
    assert len(every_content(result)) == 120


def test_splits_of_a_corpus_are_kept_and_others_are_taken_from_train(tmp_path: Path) -> None:
    result = packed(Given(WORDS, splits=["validation"] * 10 + ["train"] * 30), tmp_path)
    assert contents(result, "validation") == WORDS[:10]
    assert (len(result.train), len(result.test)) == (27, 3)


def test_a_share_of_zero_holds_out_nothing(tmp_path: Path) -> None:
    result = packed(Given(WORDS), tmp_path, validation=0.0)
    assert (len(result.train), len(result.validation), len(result.test)) == (40, 0, 0)


def test_a_small_share_holds_out_one_document() -> None:
    hashes = np.array([content_hash(content) for content in WORDS], dtype=np.uint64)
    splits = assign_splits(hashes, np.zeros(40, dtype=np.int8), validation=0.001, test=0.0)
    assert np.bincount(splits).tolist() == [39, 1]


@pytest.mark.parametrize("empty", [[], [b"", b""]])
def test_an_empty_corpus_is_refused(tmp_path: Path, empty: list[bytes]) -> None:
    with pytest.raises(ValueError, match="the corpus Given is empty"):
        packed(Given(empty), tmp_path)


def test_a_corpus_too_small_to_be_split_is_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 distinct documents are too few to hold out 2") as error:
        packed(Given([b"one", b"two", b"two"]), tmp_path)
    assert "0 holds out none" in str(error.value)


@pytest.mark.parametrize(("validation", "test"), [(-0.1, 0.1), (0.5, 0.5), (0.1, float("nan"))])
def test_shares_that_leave_nothing_to_train_on_are_refused(tmp_path: Path, validation: float, test: float) -> None:
    with pytest.raises(ValueError, match="must be at least 0 with a sum below 1, got validation="):
        pack(Given(WORDS), Bytes(), validation=validation, test=test, cache=tmp_path)


def test_the_error_for_a_file_that_is_not_utf8_has_its_path_and_no_pack_is_left(tmp_path: Path) -> None:
    for number, content in enumerate([*WORDS, b"fine until \xe9 here"]):
        (tmp_path / f"{number}.txt").write_bytes(content)
    corpus = Files(paths=f"{tmp_path}/*.txt")
    with pytest.raises(ValueError, match=r"40\.txt is not UTF-8: byte 0xe9 at offset 11; convert the file"):
        packed(corpus, tmp_path / "cache", tokenizer=BytePairs())
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert b"fine until \xe9 here" in every_content(packed(corpus, tmp_path / "cache"))


def test_a_corpus_that_changes_while_it_is_packed_is_refused(tmp_path: Path) -> None:
    class Changing(Given):
        def documents(self) -> Iterator[Document]:
            yield from super().documents()
            yield Document(b"%d" % self.reads, name="the counter")

    with pytest.raises(ValueError, match="changed while it was packed, at the counter"):
        packed(Changing(WORDS), tmp_path)


@pytest.mark.parametrize("damage", ["more", "less", "flipped", "gone", "empty", "everything gone"])
@pytest.mark.parametrize("name", ["train/tokens.bin", "train/offsets.npy", "test/bytes.npy", "meta.json"])
def test_a_damaged_pack_is_packed_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    result = packed(Given(WORDS), tmp_path)
    before, path = every_content(result), result.folder / name
    content = path.read_bytes()
    if damage == "everything gone":
        shutil.rmtree(result.folder)
        result.folder.mkdir()
    elif damage == "gone":
        path.unlink()
    else:
        flipped = bytes([content[0] ^ 1]) + content[1:]
        path.write_bytes({"more": content + b"m", "less": content[:-1], "flipped": flipped, "empty": b""}[damage])
    again = packed(Given(WORDS), tmp_path)
    assert "is damaged: packing it again" in caplog.text
    assert (every_content(again), again.fingerprint) == (before, result.fingerprint)
    assert path.read_bytes() == content
    caplog.clear()
    packed(Given(WORDS), tmp_path)
    assert not caplog.text


def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The packs that are compared with their checksums from now on."""
    compared: list[Path] = []
    checksums = pack_module._checksums

    def watched(folder: Path) -> dict[str, str]:
        compared.append(folder)
        return checksums(folder)

    monkeypatch.setattr(pack_module, "_checksums", watched)
    return compared


def test_a_pack_is_compared_with_its_checksums_only_if_a_file_has_changed_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = packed(Given(WORDS), tmp_path).folder
    compared = reads(monkeypatch)
    packed(Given(WORDS), tmp_path)
    packed(Given(WORDS), tmp_path)
    assert compared == [folder] * 2  # written so recently that a change might leave the times as they are
    monkeypatch.setattr(pack_module, "SETTLED", 0.0)
    packed(Given(WORDS), tmp_path)
    packed(Given(WORDS), tmp_path)
    packed(Given(WORDS), tmp_path)
    assert compared == [folder] * 3
    tokens = folder / "train" / "tokens.bin"
    content, status = tokens.read_bytes(), tokens.stat()
    tokens.write_bytes(content)  # the same content
    packed(Given(WORDS), tmp_path)
    packed(Given(WORDS), tmp_path)
    assert compared == [folder] * 4
    tokens.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    os.utime(tokens, ns=(status.st_atime_ns, status.st_mtime_ns))  # and the time of the change is hidden
    packed(Given(WORDS), tmp_path)
    assert "is damaged: packing it again" in caplog.text
    assert tokens.read_bytes() == content


@pytest.mark.parametrize("record", ["", "{}", "[1]", "null", "\0"])
def test_a_damaged_record_of_comparisons_counts_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: str
) -> None:
    monkeypatch.setattr(pack_module, "SETTLED", 0.0)
    folder = packed(Given(WORDS), tmp_path).folder
    packed(Given(WORDS), tmp_path)
    folder.with_suffix(".verified").write_text(record)
    compared = reads(monkeypatch)
    packed(Given(WORDS), tmp_path)
    assert compared == [folder]
    shutil.rmtree(folder)
    folder.with_suffix(".verified").write_text(record)
    assert len(packed(Given(WORDS), tmp_path).train) == 32


PACKER = """
    import os, sys, time
    from pathlib import Path
    from memformer_pl.data import Bytes, Corpus, Document, pack

    class Slow(Corpus):
        reads = 0

        def documents(self):
            self.reads += 1
            for number in range(20):
                if self.reads == 2 and number == 10 and "stop" in sys.argv:
                    Path(sys.argv[1], "ready").touch()
                    time.sleep(60)
                yield Document(b"document %d" % number, name="")

        def identity(self):
            return {}

    print(pack(Slow(), Bytes(), validation=0, test=0, cache=Path(sys.argv[1], "cache")).train.fingerprint)
"""


def packer(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(PACKER), str(folder), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def kill_in_the_middle(folder: Path) -> None:
    with packer(folder, "stop") as process:
        deadline = time.monotonic() + 60
        while not (folder / "ready").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)


def folders(folder: Path) -> list[str]:
    return sorted(path.suffix for path in (folder / "cache").iterdir() if path.is_dir())


def test_a_killed_pack_is_not_used_and_two_later_processes_at_once_both_get_the_corpus(tmp_path: Path) -> None:
    kill_in_the_middle(tmp_path)
    assert folders(tmp_path) == [".partial"]
    with packer(tmp_path) as one, packer(tmp_path) as other:
        assert one.communicate()[0] == other.communicate()[0] != ""
    assert folders(tmp_path) == [""]


def test_leftovers_of_a_killed_process_are_removed_and_a_pack_being_written_is_not(tmp_path: Path) -> None:
    left, written = tmp_path / "left.partial", tmp_path / "written.partial"
    for folder in (left, written):
        (folder / "train").mkdir(parents=True)
    with FileLock(tmp_path / "written.lock"):
        packed(Given(WORDS), tmp_path)
    assert not left.exists()
    assert written.exists()


class Generated(Corpus):
    """``size`` million bytes of text in documents of 100 kB, generated on the fly."""

    def __init__(self, size: int) -> None:
        self.size = size

    def documents(self) -> Iterator[Document]:
        for number in range(self.size * 10):
            random = np.random.default_rng(number)
            yield Document(random.integers(97, 123, size=100_000, dtype=np.uint8).tobytes(), name="")

    def identity(self) -> Mapping[str, object]:
        return {"size": self.size}


def peak_of_packing(size: int, cache: Path) -> int:
    tracemalloc.start()
    try:
        packed(Generated(size), cache)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_of_packing_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    small, large = (peak_of_packing(size, tmp_path) for size in (4, 40))
    assert large < 1.1 * small


def three_words(folder: Path) -> TokenizerFile:
    word_level(["number", "follows"]).save(str(folder / "words.json"))
    return TokenizerFile(path=str(folder / "words.json"))


def test_too_lossy_a_tokenizer_is_refused_on_every_call(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    corpus, tokenizer, shares = Given(WORDS), three_words(tmp_path), {"validation": 0.1, "test": 0.0}
    for _ in range(2):  # the second time it is packed already
        with pytest.raises(
            UsageError, match=r"TokenizerFile loses 6\d\.\d % of the bytes of the train .*max_lost=0\.\d"
        ):
            pack(corpus, tokenizer, cache=tmp_path / "cache", **shares)
    for _ in range(2):
        caplog.clear()
        result = pack(corpus, tokenizer, cache=tmp_path / "cache", max_lost=0.8, **shares)
        for split in ("train", "validation"):
            assert f"% of the bytes of the {split} documents: they cannot be restored" in caplog.text
        assert "of the test documents" not in caplog.text
    assert corpus.reads == 2  # by the first of the four
    summary = json.loads((result.folder / "meta.json").read_text())["splits"]["train"]
    assert summary["lost"] == result.train.lost.sum()
    assert result.train.lost_share == summary["lost"] / summary["bytes"] == pytest.approx(0.66, abs=0.05)
    with pytest.raises(UsageError, match="max_lost must be from 0 to 1, got max_lost=2"):
        pack(corpus, tokenizer, cache=tmp_path / "cache", max_lost=2.0, **shares)


def test_a_lossless_tokenizer_causes_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for tokenizer in (Bytes(), BytePairs(vocab_size=300)):
        result = packed(Given(["naïve café".encode(), *WORDS]), tmp_path, tokenizer=tokenizer)
        assert not result.train.lost.any()
    byte_level().save(str(tmp_path / "byte_level.json"))
    packed(Given(WORDS), tmp_path, tokenizer=TokenizerFile(path=str(tmp_path / "byte_level.json")))
    assert not caplog.text


def test_documents_without_tokens_cause_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    corpus, options = Given([b" \n", *WORDS]), {"validation": 0.0, "test": 0.0, "max_lost": 1.0}
    pack(corpus, three_words(tmp_path), cache=tmp_path / "cache", **options)
    assert "left out 1 train documents: the tokenizer TokenizerFile finds no token in them" in caplog.text
