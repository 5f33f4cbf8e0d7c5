"""With every tokenizer, the bytes of a document's tokens join to the document, and lost bytes are counted."""

import random
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import KINDS, LINES, LOSSLESS, WIDE, word_level
from tokenizers import Tokenizer as Model
from tokenizers import models, normalizers, pre_tokenizers

from memformer_pl.data import Bytes, Document, GreyValues, Tokenizer
from memformer_pl.data.tokenizers import pieces
from memformer_pl.data.tokenizers.alignment import count_missing_bytes
from memformer_pl.data.tokenizers.subwords import SerializedTokenizer

ODD = st.text("abcThe saw ct\n\t .,'<>0x😀🤷🏽中文éëﬁ½İ\u0301\u200b\x00▁Ġ½")
SENTENCES = st.lists(st.sampled_from([*LINES[0].split(), " ", "\n", "<m>", "<end of text>", WIDE, "<unk>", "é"]))
TEXTS = st.text() | ODD | SENTENCES.map(" ".join)


@cache
def built(kind: str) -> SerializedTokenizer:
    return SerializedTokenizer(text=KINDS[kind]().to_str())


def aligned(tokenizer: Tokenizer, content: bytes, size: int = 7) -> tuple[list[int], list[bytes], int]:
    """Tokens of a document that comes in blocks, the bytes of each token, and the number of lost bytes."""
    blocks = [content[start : start + size] for start in range(0, len(content), size)]
    tokens, contents, lost = [], [], 0
    for part in tokenizer.align_blocks(iter(blocks), name="it"):
        assert len(part.tokens) == len(part.sizes)
        assert part.sizes.sum() == len(part.content)
        ends = part.sizes.cumsum()
        contents += [part.content[end - count : end] for end, count in zip(ends, part.sizes, strict=True)]
        tokens += part.tokens.tolist()
        lost += part.lost
    return tokens, contents, lost


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=60)
@given(text=TEXTS, piece=st.sampled_from([5, 16, 1 << 16]))
def test_the_bytes_of_the_tokens_join_to_the_document(kind: str, text: str, piece: int) -> None:
    tokenizer = built(kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE", piece)
        (whole,) = tokenizer.encode_documents([Document(text.encode(), name="it")])
        tokens, contents, lost = aligned(tokenizer, text.encode())
    assert tokens == whole.tolist()
    assert b"".join(contents) == (text.encode() if tokens else b"")
    assert 0 <= lost <= len(text.encode())


@pytest.mark.parametrize("kind", LOSSLESS)
@settings(deadline=None, max_examples=60)
@given(text=ODD | SENTENCES.map(" ".join))
def test_a_lossless_tokenizer_loses_nothing(kind: str, text: str) -> None:
    if "llama" in kind:  # it writes a space as that character, and may not tell whether a text begins with one
        text = f"x{text}".replace("▁", "_")
    tokenizer = built(kind)
    (tokens,) = tokenizer.encode_documents([Document(text.encode(), name="it")])
    assert tokenizer.count_lost_bytes([Document(text.encode(), name="it")], [tokens]) == [0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE", 16)
        assert aligned(tokenizer, text.encode())[2] == 0


def by_hand(kind: str) -> SerializedTokenizer:
    """Tokenizers whose tokens do not depend on how training breaks ties."""
    if kind in KINDS:
        return built(kind)
    if kind == "word pieces by hand":
        model = Model(models.WordPiece({"[UNK]": 0, "the": 1, "zoe": 2, "##s": 3}, unk_token="[UNK]"))
        model.normalizer, model.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    else:
        model = Model(
            models.BPE({"c": 0, "a": 1, "ca": 2, "t</w>": 3, "a</w>": 4}, [("c", "a")], end_of_word_suffix="</w>")
        )
        model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return SerializedTokenizer(text=model.to_str())


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("llama", "a b\né", ["a", " ", "b", "\n", b"\xc3", b"\xa9"]),
        ("llama by metaspace", "é a", ["", b"\xc3", b"\xa9", " a"]),
        ("three words", "a cat  saw\n", ["a", " cat", "  saw\n"]),
        ("word pieces by hand", "The  ZOËs dog\n", ["The", "  ZOË", "s", " dog\n"]),
        (
            "pairs by hand",
            " cat \u0416 a\ncat",
            [" ca", "t", " \u0416 a", "\nca", "t"],
        ),  # a letter unknown
    ],
)
def test_the_bytes_of_each_token_by_hand(kind: str, text: str, expected: list[str | bytes]) -> None:
    wanted = [part.encode() if isinstance(part, str) else part for part in expected]
    assert aligned(by_hand(kind), text.encode())[1] == wanted


@pytest.mark.parametrize("kind", [kind for kind in LOSSLESS if "byte-level" in kind])
def test_a_byte_level_token_has_its_own_bytes(kind: str) -> None:
    tokenizer, text = built(kind), " The 中文 cat\n🤷🏽 saw \x00é"
    tokens, contents, _ = aligned(tokenizer, text.encode())
    assert contents == [tokenizer.bytes_of(token) for token in tokens]
    assert len(contents) < len(text.encode())


@pytest.mark.parametrize(
    ("before", "after", "lost"),
    [
        ("", "", 0),
        ("Zoë", "Zoë", 0),
        ("Zoë", "zoe", 3),
        ("it's", "it ' s", 0),
        ("a\n\nb", "a b", 2),
        ("中文", "", 6),
        ("aab", "ab", 1),
    ],
)
def test_missing_bytes_by_hand(before: str, after: str, lost: int) -> None:
    assert count_missing_bytes(before, after) == lost


def lost_share(tokenizer: Tokenizer, text: str) -> float:
    document = Document(text.encode(), name="it")
    return tokenizer.count_lost_bytes([document], tokenizer.encode_documents([document]))[0] / len(document.content)


def test_the_share_of_lost_bytes_is_small_in_lower_case_and_near_one_with_three_words() -> None:
    text = LINES[0].replace("\n", " ") * 20
    assert lost_share(built("word pieces in lower case"), text) == pytest.approx(0.07, abs=0.02)
    assert lost_share(built("pairs with an end of words"), text) < 0.15
    assert lost_share(built("pairs without accents"), text) < 0.06
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghij", k=5)) for _ in range(100)]
    few = SerializedTokenizer(text=word_level(words[:2]).to_str())
    assert lost_share(few, " ".join(chance.choices(words, k=500))) > 0.95


def test_an_unknown_word_is_restored_only_if_the_text_names_it() -> None:
    tokenizer = SerializedTokenizer(text=word_level(["the", "cat"]).to_str())
    tokenizer.model.add_special_tokens(["<unk>"])
    assert lost_share(tokenizer, "the <unk> cat") == 0
    assert lost_share(tokenizer, "the dog cat") == pytest.approx(3 / 11, abs=0.1)


def test_bytes_and_grey_values_lose_nothing() -> None:
    content = bytes(range(256))
    for tokenizer in (Bytes(), GreyValues()):
        tokens, contents, lost = aligned(tokenizer, content)
        assert (bytes(tokens), b"".join(contents), lost) == (content, content, 0)
        assert tokenizer.count_lost_bytes(
            [Document(content, name="")], tokenizer.encode_documents([Document(content, name="")])
        ) == [0]


@pytest.mark.parametrize("kind", ["byte-level with added tokens", "byte-level in a sequence", "byte-level, no decoder"])
def test_special_tokens_of_any_characters_have_bytes(kind: str) -> None:
    tokenizer = built(kind)
    for number, token in tokenizer.model.get_added_tokens_decoder().items():
        assert tokenizer.bytes_of(number) == token.content.encode()
    text = f"The <end of text> cat saw {WIDE} line\nbreak é"
    tokens, decoder = tokenizer.encode(text), tokenizer.incremental_decoder()
    assert "".join(map(decoder.add, tokens.tolist())) + decoder.end() == text
    assert tokenizer.decode(tokens) == text
