"""Every corpus yields all of its documents unchanged, or raises an error that says what is wrong."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from memformer_pl.data import Corpus, Files, Hub, Pydoc, Stdlib, WikiText
from memformer_pl.data.corpora.wikitext import articles


@pytest.fixture(autouse=True)
def _hub_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def contents(corpus: Corpus) -> list[bytes]:
    return [document.content for document in corpus.documents()]


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> None:
    path.write_text("".join(json.dumps({field: text, "number": 1}) + "\n" for text in texts))


def write_parquet(path: Path, texts: list[str | None], field: str = "text") -> None:
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pa.table({field: texts, "number": [1] * len(texts)}), path, row_group_size=2)


def test_pydoc_has_its_topics() -> None:
    documents = list(Pydoc().documents())
    assert len(documents) > 70
    assert sum(len(document.content) for document in documents) > 400_000
    assert "pydoc topic 'while'" in {document.name for document in documents}


def test_stdlib_has_sources_and_neither_tests_nor_packages_nor_pydoc() -> None:
    names = [document.name for document in Stdlib().documents()]
    assert len(names) > 400
    assert names == sorted(names)
    assert any(name.endswith("heapq.py") for name in names)
    assert not [name for name in names if "/test/" in name or "site-packages" in name or "pydoc_data" in name]


@pytest.mark.parametrize("corpus", [Pydoc(), Stdlib()])
def test_embedded_corpora_are_text_and_the_same_when_read_again(corpus: Corpus) -> None:
    documents = list(corpus.documents())
    assert all(document.text().encode() == document.content for document in documents)
    assert documents == list(corpus.documents())
    assert json.dumps(corpus.identity()) == json.dumps(corpus.identity())


def test_a_text_file_is_a_document_byte_for_byte(tmp_path: Path) -> None:
    odd = b"\xff\xfe one\r\ntwo\rthree\n\x00"
    (tmp_path / "odd.txt").write_bytes(odd)
    assert contents(Files(paths=[str(tmp_path / "odd.txt")])) == [odd]


def test_a_row_of_a_table_is_a_document(tmp_path: Path) -> None:
    texts = ["one\r\n", "", "zwölf", "2020-01-01"]
    write_jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "b.json").write_text(json.dumps([{"text": text} for text in texts]))
    write_parquet(tmp_path / "c.parquet", [*texts[:3], None])
    expected = [text.encode() for text in texts]
    for name in ("a.jsonl", "b.json"):
        assert contents(Files(paths=str(tmp_path / name))) == expected
    assert contents(Files(paths=str(tmp_path / "c.parquet"))) == [*expected[:3], b""]


def test_another_column_can_be_read(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["one"], field="body")
    write_parquet(tmp_path / "b.parquet", ["two"], field="body")
    assert contents(Files(paths=str(tmp_path), field="body")) == [b"one", b"two"]


def test_directories_and_globs_are_read_by_path_and_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "deep/er/c.py", "[1].jsonl", ".hidden", ".git/config", "empty.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("" if name == "empty.jsonl" else json.dumps({"text": name}))
    everything = [b"[1].jsonl", b'{"text": "a.md"}', b'{"text": "b.txt"}', b'{"text": "deep/er/c.py"}']
    assert contents(Files(paths=[str(tmp_path)])) == everything
    assert contents(Files(paths=[f"{tmp_path}/**/*", f"{tmp_path}/b.txt", f"{tmp_path}/*.md"])) == everything
    assert contents(Files(paths=[f"{tmp_path}/*.txt", f"{tmp_path}/[1].jsonl"])) == [everything[0], everything[2]]


def test_a_changed_file_makes_another_corpus(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = Files(paths=[str(path)]).identity()
    assert Files(paths=[str(path)]).identity() == before
    path.write_text("three")
    assert Files(paths=[str(path)]).identity() != before


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing.txt", "there is no such file or directory"),
        ("nothing", "the directory has no file in it"),
        ("*.txt", "no file matches the pattern"),
    ],
)
def test_the_error_for_a_path_without_files_has_the_path(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=reason) as error:
        contents(Files(paths=[str(tmp_path / name)]))
    assert repr(str(tmp_path / name)) in str(error.value)


def test_an_empty_list_of_paths_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got paths=\[\]"):
        Files(paths=[])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_the_error_for_a_missing_column_lists_the_existing_ones(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.json":
        path.write_text(json.dumps([{"body": "one", "number": 1}]))
    else:
        (write_parquet if name == "a.parquet" else write_jsonl)(path, ["one"], field="body")
    with pytest.raises(ValueError, match=r"no column field='text', only \['body', 'number'\]") as error:
        contents(Files(paths=[str(path)]))
    assert name in str(error.value)


def test_a_column_that_does_not_hold_text_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["one"])
    with pytest.raises(ValueError, match="column field='number' holds int, not text"):
        contents(Files(paths=str(tmp_path), field="number"))


@pytest.mark.parametrize("rows", [1, 200_000])
def test_the_error_for_json_lines_that_are_not_utf8_has_the_offset(tmp_path: Path, rows: int) -> None:
    good = b'{"text": "' + b"x" * 50 + b'"}\n'
    (tmp_path / "a.jsonl").write_bytes(good * rows + b'{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=rf"a\.jsonl.*not UTF-8: byte 0xff at offset {len(good) * rows + 10}"):
        contents(Files(paths=str(tmp_path)))


def test_the_error_for_invalid_json_lines_has_the_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"\n')
    with pytest.raises(ValueError, match=r"cannot read '.*a\.jsonl': line 1, column 15: not valid JSON: Expecting ','"):
        contents(Files(paths=str(tmp_path)))


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    for split in ("train", "validation", "test"):
        write_parquet(tmp_path / "set" / f"{split}-00000.parquet", [f"{split} {row}" for row in range(5)])
    return tmp_path / "set"


def test_a_data_set_comes_with_its_own_splits(hub: Path) -> None:
    documents = list(Hub(path=str(hub)).documents())
    assert [document.split for document in documents] == ["train"] * 5 + ["validation"] * 5 + ["test"] * 5
    assert all(document.text().startswith(document.split) for document in documents)


def test_a_changed_local_data_set_makes_another_corpus(hub: Path) -> None:
    before = Hub(path=str(hub)).identity()
    write_parquet(hub / "train-00001.parquet", ["more"])
    assert Hub(path=str(hub)).identity() != before


def test_the_error_for_a_missing_column_of_a_data_set_has_its_name(hub: Path) -> None:
    with pytest.raises(ValueError, match=r"no column field='body', only \['number', 'text'\]"):
        contents(Hub(path=str(hub), field="body"))


def test_the_error_for_a_missing_data_set_has_its_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot load the data set '.*missing'"):
        contents(Hub(path=str(tmp_path / "missing")))


WIKITEXT = ["", " = One = \n", "", " text\n", "", " = = Section = = \n", "", " = no heading = \n", " = One of it\n", ""]


def test_articles_begin_at_headings_of_the_first_level_and_no_line_is_dropped() -> None:
    lines = [*WIKITEXT, " = Two = 2 = \n", "", " more\n"]
    first, second, third = articles(lines)
    assert first == ""
    assert second == "".join(WIKITEXT)
    assert third == " = Two = 2 = \n more\n"
    assert list(articles([])) == []


def test_wikitext_of_a_hub_is_read_as_articles(tmp_path: Path) -> None:
    write_parquet(tmp_path / "set" / "train.parquet", [*WIKITEXT, " = Two = \n", "", " more\n"])
    corpus = WikiText(path=str(tmp_path / "set"), name=None)
    assert [text.strip()[:9] for text in contents(corpus)] == [b"", b"= One = \n", b"= Two = \n"]
