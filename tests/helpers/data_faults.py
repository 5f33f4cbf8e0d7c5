"""Files with one fault each: common faults written by hand, and bytes changed, dropped or doubled at random."""

import bz2
import gzip
import io
import json
import lzma
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet
import tokenizers

from memformer_pl.data import BytePairs, Document

TEXTS = [f"document {number}, and what it is about: {number * number}\n" for number in range(12)]
LINES = "".join(json.dumps({"text": text, "number": number}) + "\n" for number, text in enumerate(TEXTS)).encode()


def parquet(columns: dict[str, Any], **options: Any) -> bytes:
    written = io.BytesIO()
    pyarrow.parquet.write_table(pa.table(columns), written, **options)
    return written.getvalue()


TABLE = parquet({"text": TEXTS, "number": list(range(12))}, row_group_size=5)


class Fault(NamedTuple):
    """A file of a corpus, with something wrong in it."""

    name: str
    file: str
    content: bytes
    readable: bool | None = None
    """Whether the file can still be read; None if either is acceptable."""
    message: str = ""
    """What the error says besides the name of the file."""


def by_chance(content: bytes, seed: int) -> tuple[str, bytes]:
    """Return a description of a random change, and the changed content."""
    chance, changed = random.Random(seed), bytearray(content)
    position, size = chance.randrange(len(content)), chance.randint(1, 20)
    kind = chance.choice(["flipped", "truncated", "lost", "zeroed", "doubled", "inserted", "line"])
    if kind == "flipped":
        changed[position] ^= 1 << chance.randrange(8)
    elif kind == "truncated":
        del changed[position:]
    elif kind == "lost":
        del changed[position : position + size]
    elif kind == "zeroed":
        changed[position : position + size] = bytes(len(changed[position : position + size]))
    elif kind == "doubled":
        changed[position:position] = changed[position : position + size]
    elif kind == "inserted":
        changed[position:position] = chance.randbytes(size)
    else:
        changed[position:position] = chance.choice(
            [b"\n", b"null\n", b"\n{}\n", b"\n[]\n", b'{"text": 1}\n', b"\xff\n"]
        )
    return f"{kind} {seed}", bytes(changed)


def lines(*rows: object) -> bytes:
    return LINES + "".join(json.dumps(row) + "\n" for row in rows).encode()


def line_faults() -> Iterator[Fault]:
    """JSON lines that hold something other than a column of texts."""
    for name, readable, message, content in [
        ("line ends of Windows", True, "", LINES.replace(b"\n", b"\r\n")),
        ("no line end", True, "", LINES[:-1]),
        ("blank lines", True, "", LINES.replace(b"\n", b"\n\n  \n")),
        ("byte order mark", True, "", b"\xef\xbb\xbf" + LINES),
        ("a text that is null", True, "", lines({"text": None})),
        ("other columns differ", True, "", lines({"text": "a", "number": "x"}, {"text": "b", "more": [{"a": 1}]})),
        ("texts like dates", True, "", b"".join(b'{"text": "2020-01-%02d"}\n' % day for day in range(1, 20))),
        ("a line of a million letters", True, "", lines({"text": "x" * 10**6})),
        ("a number of 400 digits", True, "", lines({"text": "a", "number": 0})[:-3] + b"1" * 400 + b"}\n"),
        ("truncated line", False, "line 12, column 10: not valid JSON: Unterminated string", LINES[:-40]),
        ("a line that is null", False, "line 13 holds NoneType", lines(None)),
        ("a line that is a list", False, "line 13 holds list", lines(["text"])),
        ("a line that is a number", False, "line 13 holds int", lines(3)),
        ("a line that is text", False, "line 13 holds str", lines("text")),
        ("a text that is a number", False, "line 13: column field='text' holds int", lines({"text": 1})),
        ("a text that is a list", False, "line 13: column field='text' holds list", lines({"text": ["a"]})),
        ("a text that is an object", False, "line 13: column field='text' holds dict", lines({"text": {}})),
        ("a text that is true", False, "line 13: column field='text' holds bool", lines({"text": True})),
        ("a text that is NaN", False, "line 13: column field='text' holds float", LINES + b'{"text": NaN}'),
        ("a row without the column", False, "line 13 has no column field='text', only ['txt']", lines({"txt": "a"})),
        ("an empty row", False, "line 13 has no column field='text', only []", lines({})),
        (
            "an invalid character",
            False,
            "line 13: column field='text' holds an invalid char",
            LINES + b'{"text": "\\ud800"}',
        ),
        ("an unknown escape", False, "line 13, column 11: not valid JSON", LINES + b'{"text": "\\x"}'),
        ("latin-1", False, f"line 13 is not UTF-8: byte 0xe9 at offset {len(LINES) + 10}", LINES + b'{"text": "\xe9"}'),
        ("utf-16", False, "line 1 is not UTF-8: byte 0xff at offset 0", LINES.decode().encode("utf-16")),
        ("zeroes at the end", False, "line 13, column 1: not valid JSON", LINES + bytes(512)),
        ("text instead of JSON", False, "line 1, column 1: not valid JSON", b"hello\nworld\n"),
        ("single quotes", False, "line 1, column 2: not valid JSON", b"{'text': 'one'}\n"),
        ("commas between lines", False, "line 1, column", LINES.replace(b"}\n", b"},\n")),
        ("deep in a line", False, "line 13: cannot parse JSON", LINES + b"[" * 10**5),
        ("compressed", False, "line 1 is not UTF-8", gzip.compress(LINES)),
        ("compressed by bz2", False, "line 1", bz2.compress(LINES)),
        ("compressed by xz", False, "line 1 is not UTF-8", lzma.compress(LINES)),
        ("Parquet", False, "line 1 is not UTF-8", TABLE),
    ]:
        yield Fault(f"lines: {name}", "rows.jsonl", content, readable, message)


def table_faults() -> Iterator[Fault]:
    """Other tables that hold something other than a column of texts."""
    listed = json.dumps([json.loads(line) for line in LINES.splitlines()], indent=1).encode()
    for name, readable, message, content in [
        ("a list", True, "", listed),
        ("lines", True, "", LINES),
        ("a truncated list", False, "not valid JSON", listed[:-20]),
        ("a list with null", False, "row 13 holds NoneType", listed[:-2] + b", null]"),
        ("a list within an object", False, "row 1 has no column", b'{"data": ' + listed + b"}"),
        ("columns", False, "row 1: column field='text' holds list", b'{"text": ["one", "two"]}'),
        ("nothing", False, "line 1, column 1: not valid JSON", b""),
        ("latin-1", False, "is not UTF-8: byte 0xe9", listed[:-2] + b'"\xe9"]'),
    ]:
        yield Fault(f"json: {name}", "rows.json", content, readable, message)
    no_utf8 = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])
    for name, readable, message, content in [
        ("some texts are null", True, "", parquet({"text": [*TEXTS, None]})),
        ("large strings", True, "", parquet({"text": pa.array(TEXTS, pa.large_string())})),
        ("a dictionary", True, "", parquet({"text": pa.array(TEXTS).dictionary_encode()})),
        ("nothing", False, "", b""),
        ("truncated by a byte", False, "", TABLE[:-1]),
        ("truncated in the middle", False, "", TABLE[: len(TABLE) // 2]),
        ("the magic word alone", False, "", b"PAR1"),
        ("JSON lines", False, "", LINES),
        ("compressed", False, "", gzip.compress(TABLE)),
        ("no such column", False, "the file has no column field='text', only ['txt']", parquet({"txt": TEXTS})),
        ("no columns", False, "the file has no column field='text', only []", parquet({})),
        ("numbers", False, "row 1: column field='text' holds int", parquet({"text": [1, 2]})),
        ("bytes", False, "row 1: column field='text' holds bytes", parquet({"text": [b"a", b"\xff"]})),
        ("lists", False, "row 1: column field='text' holds list", parquet({"text": [["a"]]})),
        ("no UTF-8", False, "row 1 is not UTF-8", parquet({"text": no_utf8})),
    ]:
        yield Fault(f"parquet: {name}", "rows.parquet", content, readable, message)


def text_faults() -> Iterator[Fault]:
    """Odd texts, and files that are not text."""
    for name, readable, message, content in [
        ("one letter", True, "", b"a"),
        ("nul", True, "", b"a\0b" * 50),
        ("a byte order mark", True, "", b"\xef\xbb\xbftext"),
        ("no line ends", True, "", b"x" * 300_000),
        ("line ends alone", True, "", b"\r\n\r\r\n" * 50),
        ("no characters that are assigned", True, "", "\U000e0fff\ufffe".encode() * 20),
        ("latin-1", False, "is not UTF-8: byte 0xe9 at offset 3", b"caf\xe9"),
        ("utf-16", False, "is not UTF-8: byte 0xff at offset 0", "text".encode("utf-16")),
        ("an invalid character", False, "is not UTF-8: byte 0xc3 at offset 4", b"text\xc3"),
        ("compressed", False, "is not UTF-8", gzip.compress(b"text" * 50)),
        ("a surrogate", False, "is not UTF-8: byte 0xed at offset 0", b"\xed\xa0\x80"),
    ]:
        yield Fault(f"text: {name}", "one.txt", content, readable, message)


def chance_faults(count: int) -> Iterator[Fault]:
    """Tables, texts and random bytes."""
    for seed in range(count):
        file, content = [("rows.jsonl", LINES), ("rows.parquet", TABLE), ("one.txt", "".join(TEXTS).encode())][seed % 3]
        name, changed = by_chance(content, seed)
        yield Fault(f"{file}: {name}", file, changed)
    for seed in range(count // 10):
        yield Fault(f"bytes: {seed}", "one.bin", random.Random(seed).randbytes(seed * 17))


FAULTS = [*line_faults(), *table_faults(), *text_faults(), *chance_faults(300)]


def tokenizer_faults() -> list[tuple[str, bytes]]:
    """``tokenizer.json`` files with a value or a byte changed."""
    learned = BytePairs(vocab_size=300)
    learned.train([Document(text.encode(), name="") for text in TEXTS])
    words = tokenizers.models.WordLevel({"a": 0, "b": 9}, unk_token="a")
    right = [learned.model.to_str(), tokenizers.Tokenizer(words).to_str()]
    found: list[tuple[str, bytes]] = [
        *(("of no tokens", tokenizers.Tokenizer(model).to_str().encode()) for model in (tokenizers.models.BPE(),)),
        *((repr(text), text.encode()) for text in ("", "{}", "null", "[]", "3", "text")),
        ("deep", b"[" * 100_000),
        ("binary", bytes(range(256))),
    ]
    for seed in range(150):
        chance = random.Random(seed)
        tree = json.loads(right[seed % 2])
        entries: list[tuple[Any, Any]] = []
        todo = [tree]
        while todo:
            node = todo.pop()
            inner = list(node.items() if isinstance(node, dict) else enumerate(node))[:10]
            entries += [(node, name) for name, _ in inner]
            todo += [value for _, value in inner if isinstance(value, dict | list)]
        parent, name = chance.choice(entries)
        parent[name] = chance.choice([None, -1, 0, 10**9, 2**32, 2**40, "x", "", [], {}, True, [1], 1.5])
        found.append((f"{name}={parent[name]!r} {seed}", json.dumps(tree).encode()))
        found.append(by_chance(right[0].encode(), seed))
    return found
