"""Files are read according to their endings, or refused with a remedy."""

import bz2
import gzip
import io
import json
import logging
import lzma
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet
import pytest
from data_faults import by_chance

from memformer_pl.data import Enwik8, Files, Hub
from memformer_pl.errors import UsageError

TEXTS = ['the first, "quoted"', "zwölf\r\n\nlines", "", "2020-01-01"]
LINES = "".join(f"{json.dumps({'text': text, 'number': 1})}\n" for text in TEXTS).encode()
TABLE = pa.table({"text": TEXTS, "number": list(range(4))})


def packed(kind: str, content: bytes) -> bytes:
    if kind != "zst":
        return {"gz": gzip, "bz2": bz2, "xz": lzma}[kind].compress(content)
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


def ipc(kind: Callable[..., Any]) -> bytes:
    written = io.BytesIO()
    with kind(written, TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=2)
    return written.getvalue()


def parquet() -> bytes:
    written = io.BytesIO()
    pyarrow.parquet.write_table(TABLE, written)
    return written.getvalue()


def feather(version: int) -> bytes:
    written = io.BytesIO()
    pyarrow.feather.write_feather(TABLE, written, version=version)
    return written.getvalue()


def separated(mark: str) -> bytes:
    rows = [["number", "text"], *(["1", text] for text in TEXTS)]
    quoted = (mark.join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows)
    return "".join(f"{line}\n" for line in quoted).encode()


def contents(path: Path, field: str = "text") -> list[bytes]:
    return [document.content for document in Files(paths=str(path), field=field).documents()]


TABLES = {
    "rows.jsonl": LINES,
    "rows.ndjson": LINES,
    "rows.json": json.dumps([json.loads(line) for line in LINES.splitlines()]).encode(),
    "rows.csv": separated(","),
    "rows.tsv": separated("\t"),
    "rows.parquet": parquet(),
    "rows.arrow": ipc(pa.ipc.new_file),
    "stream.arrow": ipc(pa.ipc.new_stream),
    "rows.feather": feather(2),
}


@pytest.mark.parametrize("name", TABLES)
def test_every_table_is_read_by_its_ending_in_capitals_or_not(tmp_path: Path, name: str) -> None:
    for written in (name, name.upper(), f"v1.0 {name.title()}"):
        (tmp_path / written).write_bytes(TABLES[name])
        assert contents(tmp_path / written) == [text.encode() for text in TEXTS]


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zst"])
def test_compressed_files_are_read_according_to_the_inner_ending(tmp_path: Path, kind: str) -> None:
    for name in ("rows.jsonl", "rows.ndjson", "rows.json", "rows.csv"):
        (tmp_path / f"{name}.{kind}").write_bytes(packed(kind, TABLES[name]))
        assert contents(tmp_path / f"{name}.{kind}") == [text.encode() for text in TEXTS]
    book = b"a book, \xff\x00 " * 30_000
    for name in (f"book.txt.{kind}", f"book.{kind}", f"BOOK.TXT.{kind.upper()}"):
        (tmp_path / name).write_bytes(packed(kind, book[:99]) + packed(kind, book[99:]))  # one after the other
        assert contents(tmp_path / name) == [book]
        assert Files(paths=str(tmp_path / name)).size() is None


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zst"])
@pytest.mark.parametrize("damage", ["truncated", "another", "empty"])
@pytest.mark.parametrize("name", ["rows.jsonl", "book.txt"])
def test_the_error_for_a_damaged_compressed_file_has_its_path(
    tmp_path: Path, kind: str, damage: str, name: str
) -> None:
    whole = packed(kind, LINES)
    path = tmp_path / f"{name}.{kind}"
    path.write_bytes({"truncated": whole[:-5], "another": LINES, "empty": b""}[damage])
    with pytest.raises(ValueError, match=rf"cannot read '{path}': \w"):
        contents(path)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("texts.zip", "unpack it, and pass the folder"),
        ("rows.jsonl.ZIP", "unpack it"),
        ("texts.tar", "unpack it"),
        ("texts.tar.gz", "unpack it"),
        ("texts.tar.zst", "unpack it"),
        ("texts.tgz", "unpack it"),
        ("book.txt.lz4", "decompress it"),
        ("book.txt.Z", "decompress it"),
        ("rows.xlsx", "save the table as .jsonl, .csv or .parquet"),
        ("rows.parquet.gz", "decompress the file"),
        ("rows.arrow.zst", "decompress the file"),
    ],
)
def test_unsupported_formats_are_refused_with_a_remedy(tmp_path: Path, name: str, remedy: str) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(ValueError, match=f"cannot read '.*{name}'") as refused:
        contents(tmp_path)
    assert remedy in str(refused.value)


@pytest.mark.parametrize(
    "start",
    [gzip.compress(b"a"), bz2.compress(b"a"), parquet(), TABLES["rows.arrow"]],
    ids=["gzip", "bzip2", "parquet", "arrow"],  # gzip writes the time: workers would not agree on the cases
)
def test_a_file_that_looks_like_another_format_is_read_byte_for_byte_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, start: bytes
) -> None:
    (tmp_path / "a.txt").write_bytes(start)
    (tmp_path / "b.txt").write_bytes(bytes(range(256)))
    corpus = Files(paths=str(tmp_path))
    for _ in range(2):
        assert [document.content for document in corpus.documents()] == [start, bytes(range(256))]
    assert caplog.text.count("is read byte for byte because of its name") == 1
    assert str(tmp_path / "a.txt") in caplog.text


def test_a_text_causes_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.txt").write_text("PK, a text")
    (tmp_path / "empty.txt").touch()
    with caplog.at_level(logging.DEBUG):
        assert contents(tmp_path) == [b"PK, a text", b""]
    assert not caplog.text
    assert Files(paths=str(tmp_path)).size() == 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"number,body\n1,one\n", "line 2 has no column field='text', only ['body', 'number']"),
        (b"text,number\none\n", "line 2 has 1 columns, but the header has 2"),
        (b"text,number\none,1,2\n", "line 2 has 3 columns, but the header has 2"),
        (b"text,text\none,1\n", "line 1 names a column twice"),
        (b'text,number\n"one"x,1\n', "line 2: not valid CSV"),
        (b'text,number\none,1\n"two', "line 3: not valid CSV"),
        (b"text\n\xe9\n", "the file is not UTF-8: byte 0xe9 at or after line 1"),
        ("text\none\n".encode("utf-16"), "the file is not UTF-8"),
    ],
)
def test_the_error_for_an_invalid_csv_file_has_the_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "rows.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read '.*rows\.csv'") as refused:
        contents(tmp_path)
    assert message in str(refused.value)


def test_a_csv_file_may_have_long_texts_a_byte_order_mark_and_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b"\xef\xbb\xbftext,n\r\n" + b"x" * 300_000 + b",1\r\n\r\n,2\r\n")
    assert contents(tmp_path) == [b"x" * 300_000, b""]
    (tmp_path / "rows.csv").write_bytes(b"")
    assert contents(tmp_path) == []


def test_a_column_with_a_dot_in_its_name_is_read_beside_a_struct(tmp_path: Path) -> None:
    columns = {"meta": [{"text": "a part", "more": 1}], "meta.text": ["the column"], "other": [{"meta.text": "no"}]}
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "rows.parquet")
    assert contents(tmp_path, field="meta.text") == [b"the column"]
    pyarrow.parquet.write_table(pa.table({"meta": columns["meta"]}), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"no column field='meta\.text', only \['meta'\]"):
        contents(tmp_path, field="meta.text")


@pytest.mark.parametrize("name", ["rows.arrow", "stream.arrow"])
def test_an_arrow_file_with_a_changed_byte_is_read_or_refused(tmp_path: Path, name: str) -> None:
    for seed in range(150):
        (tmp_path / name).write_bytes(by_chance(TABLES[name], seed)[1])
        with suppress(UsageError):  # any other exception is a bug, and Arrow's own checks abort the process
            contents(tmp_path)


def test_an_old_feather_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.feather").write_bytes(b"FEA1" + bytes(60))
    with pytest.raises(ValueError, match=r"cannot read '.*rows\.feather'"):
        contents(tmp_path)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("run[1]/*.txt", "write [[]1] for the name [1]"),
        ("*", "add /**/* to read the files in them"),
        ("run*/*.md", "no file matches the pattern"),
    ],
)
def test_a_pattern_that_matches_no_file_is_refused_with_a_remedy(tmp_path: Path, pattern: str, message: str) -> None:
    (tmp_path / "run[1]").mkdir()
    (tmp_path / "run[1]" / "a.txt").write_text("one")
    with pytest.raises(ValueError, match=r"no file matches the pattern|matches directories, but no file") as refused:
        contents(tmp_path / pattern)
    assert message in str(refused.value)
    assert contents(tmp_path / "run[[]1]" / "*.txt") == contents(tmp_path / "run[1]") == [b"one"]


def test_a_data_set_with_texts_like_dates_is_refused_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"text": "2020-01-01"}\n' * 9)
    with pytest.raises(ValueError, match=r"holds datetime, not text: .* read the files with the corpus Files"):
        list(Hub(path=str(tmp_path / "set")).documents())
    assert contents(tmp_path / "set") == [b"2020-01-01"] * 9


def test_enwik8_as_a_zip_file_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "enwik8.zip", "w") as archive:
        archive.writestr("enwik8", "<mediawiki>")
    with pytest.raises(ValueError, match=r"enwik8\.zip' is a zip file: unpack it"):
        list(Enwik8(path=str(tmp_path / "enwik8.zip")).documents())
