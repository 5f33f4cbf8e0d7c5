"""Streamed texts have the tokens of the whole text, and are decoded character by character."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from memformer_pl.data import BytePairs, Bytes, Document, Pydoc, Tokenizer
from memformer_pl.data.tokenizers import pieces as pieces_module
from memformer_pl.data.tokenizers.pieces import decoded, pieces
from memformer_pl.data.tokenizers.subwords import SerializedTokenizer, deserialize_tokenizer

# the split of GPT-4 and its successors: an end of a line stays with the characters before it, unless they are letters
# or digits
LATER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

words = st.text(min_size=1, max_size=8).filter(lambda word: not any(map(str.isspace, word)))
spaces = st.text(" \n\t\r\u2003\x1c", max_size=4)
# every word is followed by a space, and is shorter than a piece
texts = st.lists(st.tuples(words, spaces), max_size=12).map(lambda pairs: "".join(f"{w} {s}" for w, s in pairs))


@pytest.fixture(scope="module")
def byte_pairs() -> BytePairs:
    tokenizer = BytePairs(vocab_size=600)
    tokenizer.train(Pydoc().documents())
    return tokenizer


@pytest.fixture(scope="module")
def later(byte_pairs: BytePairs) -> SerializedTokenizer:
    """The same pairs, with a different split into words."""
    model = tokenizers.Tokenizer.from_str(byte_pairs.model.to_str())
    cut = pre_tokenizers.Split(tokenizers.Regex(LATER), "isolated")
    model.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    return SerializedTokenizer(text=model.to_str())


@pytest.fixture
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(pieces_module, "PIECE", 16)
    return 16


def cut(content: bytes, positions: Sequence[int]) -> list[bytes]:
    """Split the content into blocks that end at these positions."""
    ends = sorted({position % (len(content) + 1) for position in positions} | {len(content)})
    return [content[start:end] for start, end in zip([0, *ends], ends, strict=False)]


@settings(deadline=None)
@given(text=st.text() | texts, sizes=st.lists(st.integers(1, 20), min_size=1))
def test_pieces_do_not_depend_on_the_blocks_of_a_text(text: str, sizes: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces_module, "PIECE", 16)
        whole = list(pieces([text]))
        ends = np.cumsum(sizes * len(text))[: len(text)]
        blocks = [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=False)]
        assert list(pieces(blocks)) == whole
        assert "".join(whole) == text
        assert all(0 < len(piece) <= 16 for piece in whole)


@settings(deadline=None, max_examples=300)
@given(text=texts)
def test_pieces_have_the_tokens_of_the_whole(byte_pairs: BytePairs, later: SerializedTokenizer, text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces_module, "PIECE", 16)
        for tokenizer in (byte_pairs, later):
            whole = tokenizer.model.encode(text, add_special_tokens=False).ids
            assert tokenizer.encode(text).tolist() == whole


def test_a_cut_within_a_word_would_have_other_tokens(byte_pairs: BytePairs) -> None:
    whole, halves = byte_pairs.encode(" which").tolist(), [byte_pairs.encode(half).tolist() for half in (" wh", "ich")]
    assert [*halves[0], *halves[1]] != whole


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a word and another", ["a word and", " another"]),
        ("a word  and  another", ["a word  and", "  another"]),
        ("line.\nletters\nmore", ["line.\nletters", "\nmore"]),
        ("中" * 20, ["中" * 16, "中" * 4]),
        ("x" + " " * 30, ["x", " " * 16, " " * 14]),
        ("0123456789abcdef", ["0123456789abcdef"]),
        ("0123456789abcdef g", ["0123456789abcdef", " g"]),
    ],
)
def test_a_piece_ends_as_late_as_it_can(text: str, expected: list[str]) -> None:
    assert list(pieces([text])) == expected


@pytest.mark.usefixtures("short_pieces")
@settings(deadline=None)
@given(text=st.text() | texts, positions=st.lists(st.integers(0, 1000)))
@pytest.mark.parametrize("kind", [Bytes, BytePairs])
def test_a_stream_has_the_tokens_of_the_document(
    byte_pairs: BytePairs, kind: type[Tokenizer], text: str, positions: list[int]
) -> None:
    tokenizer: Tokenizer = byte_pairs if kind is BytePairs else Bytes()
    parts = list(tokenizer.encode_blocks(iter(cut(text.encode(), positions)), name="it"))
    (whole,) = tokenizer.encode_documents([Document(text.encode(), name="it")])
    assert [token for part in parts for token in part.tolist()] == whole.tolist()


def test_a_long_document_is_encoded_as_it_is_read(byte_pairs: BytePairs) -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield "ein Wort, 中文 und mehr ".encode()

    parts = byte_pairs.encode_blocks(endless(), name="endless")
    assert sum(len(next(parts)) for _ in range(2)) > 1000


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([b"abc\xffdef"], "byte 0xff at offset 3"),
        ([b"abc", b"", b"d\xff"], "byte 0xff at offset 4"),
        (["é".encode()[:1], b"a"], "byte 0xc3 at offset 0"),
        ([b"ab", "é".encode()[:1]], "byte 0xc3 at offset 2"),
        ([b"a" + "🤷".encode()[:2], "🤷".encode()[2:3] + b"b"], "byte 0xf0 at offset 1"),
    ],
)
def test_an_error_says_where_a_stream_is_not_utf8(blocks: list[bytes], message: str) -> None:
    with pytest.raises(ValueError, match=f"it is not UTF-8: {message}; convert the file"):
        list(decoded(blocks, name="it"))


@settings(deadline=None)
@given(text=st.text())
def test_text_is_decoded_token_by_token_in_whole_characters(byte_pairs: BytePairs, text: str) -> None:
    for tokenizer in (Bytes(), byte_pairs):
        tokens, decoder = tokenizer.encode(text).tolist(), tokenizer.incremental_decoder()
        assert b"".join(map(tokenizer.bytes_of, tokens)) == text.encode()
        written = [decoder.add(token) for token in tokens]
        assert "".join(written) + decoder.end() == text


def test_a_character_is_written_once_it_is_whole_and_replaced_if_it_never_is() -> None:
    decoder = Bytes().incremental_decoder()
    assert [decoder.add(byte) for byte in "é🤷".encode()] == ["", "é", "", "", "", "🤷"]
    assert [decoder.add(byte) for byte in (0xC3, 0x61, 0xFF, 0xF0)] == ["", "\ufffda", "\ufffd", ""]
    assert decoder.end() == "\ufffd"


def test_tokens_that_are_not_bytes_are_decoded_by_their_tokenizer() -> None:
    model = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "un": 1, "##like": 2, "##ly": 3, "it": 4}))
    model.pre_tokenizer, model.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    tokenizer = SerializedTokenizer(text=model.to_str())
    decoder = tokenizer.incremental_decoder()
    assert "".join(map(decoder.add, tokenizer.encode("unlikely it").tolist())) + decoder.end() == "unlikely it"
    assert tokenizer.bytes_of(2) == b"##like"


def test_a_special_token_has_its_text_and_an_unused_number_has_no_bytes(byte_pairs: BytePairs) -> None:
    model = tokenizers.Tokenizer.from_str(byte_pairs.model.to_str())
    model.add_special_tokens(["<|end|> é"])
    tokenizer = SerializedTokenizer(text=model.to_str())
    assert tokenizer.bytes_of(600) == "<|end|> é".encode()
    assert tokenizer.bytes_of(601) == Bytes().bytes_of(256) == b""


def test_a_serialized_tokenizer_is_restored(byte_pairs: BytePairs) -> None:
    for tokenizer in (Bytes(), byte_pairs):
        again = deserialize_tokenizer(tokenizer.serialize() or "")
        assert again.vocab_size == tokenizer.vocab_size
        assert again.encode("import this, é").tolist() == tokenizer.encode("import this, é").tolist()
    with pytest.raises(ValueError, match=r"the model's tokenizer is not a tokenizer\.json"):
        deserialize_tokenizer("Byte")
