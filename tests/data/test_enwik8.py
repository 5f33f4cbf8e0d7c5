"""enwik8 has the usual splits, and its pages are documents."""

from pathlib import Path

import pytest

from memformer_pl.data import Enwik8

PAGE = b"  <page>\n    <title>%d</title>\n  </page>\n"


def test_pages_are_documents_and_no_byte_is_dropped(tmp_path: Path) -> None:
    content = b"<mediawiki>\n" + b"".join(PAGE % number for number in range(100)) + b"</mediawiki>\n"
    (tmp_path / "enwik8").write_bytes(content)
    documents = list(Enwik8(path=str(tmp_path / "enwik8")).documents())
    assert b"".join(document.content for document in documents) == content
    sizes = {
        split: sum(len(document.content) for document in documents if document.split == split)
        for split in ("train", "validation", "test")
    }
    assert sizes["train"] == len(content) * 90 // 100
    assert sizes["validation"] == len(content) * 5 // 100
    heads, pages = documents[0], documents[1:90]
    assert heads.content == b"<mediawiki>\n"
    assert all(page.content == PAGE % number for number, page in enumerate(pages))


def test_another_file_is_another_corpus(tmp_path: Path) -> None:
    path = tmp_path / "enwik8"
    missing = Enwik8(path=str(path)).identity()
    path.write_bytes(b"one")
    one = Enwik8(path=str(path)).identity()
    path.write_bytes(b"other")
    assert len({str(identity) for identity in (missing, one, Enwik8(path=str(path)).identity())}) == 3


def test_the_error_for_a_missing_file_has_its_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read enwik8, got path='.*nowhere': No such file"):
        list(Enwik8(path=str(tmp_path / "nowhere")).documents())
