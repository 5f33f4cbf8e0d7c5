"""Tokenizers are lossless, and learn the same from the same documents."""

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from memformer_pl.data import BytePairs, Bytes, Document, Pydoc, Tokenizer, TokenizerFile
from memformer_pl.data.tokenizers.pieces import PIECE
from memformer_pl.data.tokenizers.subwords import PIECES

ODD = [
    "",
    " leading and trailing \n",
    "one\r\ntwo\rthree\n\n\n",
    "tabs\tand\x00nulls\x7f",
    "naïve café, 中文, עברית, 🤷🏽‍♀️, \u200b\ufeff\u2028",
    "<|endoftext|> <s> [UNK] Ġ Ċ",
    "e\u0301 is not é",
]


@pytest.fixture(scope="module")
def byte_pairs() -> BytePairs:
    tokenizer = BytePairs(vocab_size=600)
    tokenizer.train(Pydoc().documents())
    return tokenizer


@pytest.fixture(params=["Bytes", "BytePairs", "TokenizerFile"])
def tokenizer(request: pytest.FixtureRequest, byte_pairs: BytePairs, tmp_path: Path) -> Tokenizer:
    byte_pairs.save(tmp_path)
    path = str(tmp_path / "tokenizer.json")
    return {"Bytes": Bytes(), "BytePairs": byte_pairs, "TokenizerFile": TokenizerFile(path=path)}[request.param]


@pytest.mark.parametrize("text", ODD)
def test_odd_text_is_restored(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert (tokens < tokenizer.vocab_size).all()


@settings(deadline=None)
@given(text=st.text())
def test_any_text_is_restored_from_byte_pairs(byte_pairs: BytePairs, text: str) -> None:
    assert byte_pairs.decode(byte_pairs.encode(text)) == text


def test_a_document_of_many_pieces_is_restored_among_short_ones(tokenizer: Tokenizer) -> None:
    long = "🤷 is four bytes, " * (PIECE * PIECES // 10)
    documents = [Document(text.encode(), name="") for text in ("a", long, "", "b")]
    assert [tokenizer.decode(tokens) for tokens in tokenizer.encode_documents(documents)] == ["a", long, "", "b"]


def test_any_bytes_are_restored_from_bytes() -> None:
    content = bytes(range(256)) + b"\r\n\xff\xfe"
    (tokens,) = Bytes().encode_documents([Document(content, name="")])
    assert tokens.tobytes() == content


def test_byte_pairs_do_not_depend_on_the_order_of_documents(byte_pairs: BytePairs) -> None:
    again = BytePairs(vocab_size=600)
    again.train(reversed(list(Pydoc().documents())))
    assert again.model.to_str() == byte_pairs.model.to_str()


def test_byte_pairs_are_shorter_than_bytes_and_as_many_as_asked_for(byte_pairs: BytePairs) -> None:
    text = next(Pydoc().documents()).text()
    assert len(byte_pairs.encode(text)) < len(Bytes().encode(text)) / 2
    assert byte_pairs.model.get_vocab_size() == byte_pairs.vocab_size == 600


def test_an_untrained_tokenizer_says_so() -> None:
    with pytest.raises(RuntimeError, match="is not trained yet"):
        BytePairs().encode("text")


def test_fewer_byte_pairs_than_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="got vocab_size=255"):
        BytePairs(vocab_size=255)


def test_the_error_for_a_document_that_is_not_utf8_has_its_name_and_the_offset(byte_pairs: BytePairs) -> None:
    broken = Document(b"abc\xff", name="broken.txt")
    for method in (byte_pairs.encode_documents, BytePairs().train):
        with pytest.raises(ValueError, match=r"broken.txt is not UTF-8: byte 0xff at offset 3"):
            method([broken])


def test_truncation_and_padding_of_a_tokenizer_file_are_not_used(byte_pairs: BytePairs, tmp_path: Path) -> None:
    model = tokenizers.Tokenizer.from_str(byte_pairs.model.to_str())
    model.enable_truncation(2)
    model.enable_padding(length=50)
    model.save(str(tmp_path / "short.json"))
    tokenizer = TokenizerFile(path=str(tmp_path / "short.json"))
    np.testing.assert_array_equal(tokenizer.encode("a longer text"), byte_pairs.encode("a longer text"))


def test_the_error_for_a_missing_or_invalid_tokenizer_file_has_its_path(tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text("{}")
    with pytest.raises(ValueError, match=r"is not a tokenizer\.json"):
        _ = TokenizerFile(path=str(other)).vocab_size
    with pytest.raises(ValueError, match=r"no tokenizer file '.*missing.json'"):
        _ = TokenizerFile(path=str(tmp_path / "missing.json")).vocab_size


def test_the_vocabulary_of_a_tokenizer_file_covers_numbers_beyond_its_size(tmp_path: Path) -> None:
    path = tmp_path / "gaps.json"
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 9}, unk_token="a")).save(str(path))
    assert TokenizerFile(path=str(path)).vocab_size == 10
