"""Which bytes of a text each of its tokens stands for, and how many bytes the tokens cannot restore.

A token stands for the characters that the tokenizer reports in its offsets, which refer to the text before
normalization; so lower-casing, ``##`` and ``▁`` do not matter. Three rules make the bytes of the tokens join to the
document, whatever the tokenizer drops:

- Text between two tokens belongs to the second one, and text after the last token to the last.
- A character that several tokens share is divided by the bytes that they stand for, if those are its bytes.
- If they are not, it belongs to the last of these tokens, and the others have no bytes.

One kind of tokenizer reports inexact offsets: byte pairs that drop a character in the middle of a word, whose later
offsets are then too small. The bytes of its tokens join to the document nevertheless.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Int64, Integer
from tokenizers import decoders, pre_tokenizers

BYTE = re.compile("<0x([0-9A-F]{2})>")
"""A token that stands for a byte, in a tokenizer that falls back to bytes."""
NO_TOKENS = np.empty(0, dtype=np.int64)


class Aligned(NamedTuple):
    """A part of a document and its tokens."""

    tokens: Integer[np.ndarray, " tokens"]
    sizes: Int64[np.ndarray, " tokens"]
    """Bytes of each token."""
    content: bytes
    """The bytes of all tokens, one after another."""
    lost: int = 0
    """How many of these bytes the tokens cannot restore, see :func:`count_missing_bytes`."""


class TokenBytes:
    """The bytes that each token of a tokenizer stands for, independent of its neighbours.

    Args:
        model: The tokenizer.
    """

    def __init__(self, model: tokenizers.Tokenizer) -> None:
        tree = json.loads(model.to_str())
        steps = _kinds([tree[step] for step in ("normalizer", "pre_tokenizer", "decoder")])
        self.byte_level = "ByteLevel" in steps
        """Whether tokens are written in the alphabet of bytes, by whichever step of the tokenizer."""
        self.joins = self.byte_level and (model.decoder is None or isinstance(model.decoder, decoders.ByteLevel))
        """Whether a text is simply the bytes of its tokens."""
        falls_back = bool(tree["model"].get("byte_fallback")) or "ByteFallback" in steps
        added = {number: token.content.encode() for number, token in model.get_added_tokens_decoder().items()}
        vocab = model.get_vocab(with_added_tokens=False).items()
        self.bytes = {
            number: _bytes_of(token, byte_level=self.byte_level, falls_back=falls_back) for token, number in vocab
        } | added
        self.unknown, self.unknown_text = _unknown(model, tree["model"])

    def join(self, tokens: Iterable[int]) -> bytes:
        """The bytes of tokens, one after another; none for a number that is not a token."""
        bytes_of = self.bytes
        return b"".join([bytes_of.get(token, b"") for token in tokens])

    def without_unknown(self, tokens: Sequence[int], text: str) -> list[int]:
        """The tokens without the unknown token, except as often as the text names it (``<unk>``)."""
        if self.unknown is None or self.unknown not in tokens:
            return list(tokens)
        named = text.count(self.unknown_text) if self.unknown_text else 0
        remaining = []
        for token in tokens:
            if token != self.unknown or named > 0:
                remaining.append(token)
                named -= token == self.unknown
        return remaining


def count_missing_bytes(before: str, after: str) -> int:
    """Count the bytes of the characters that occur more often in ``before`` than in ``after``, in any order.

    Nothing is missing if the texts are equal, or if ``after`` only adds characters. Lower-casing loses the capitals.
    """
    if before == after:
        return 0
    return sum(count * len(character.encode()) for character, count in (Counter(before) - Counter(after)).items())


def lost_bytes_note(lost: int | float, size: int | float) -> str:
    """The note that follows a bits-per-byte figure; empty if no byte is lost.

    Args:
        lost: Bytes that cannot be restored from the tokens.
        size: All bytes.
    """
    return f" ({100 * lost / size:.3g} % of the bytes cannot be restored from the tokens)" if lost else ""


def sizes_by_offsets(
    tokens: Sequence[int], offsets: Sequence[tuple[int, int]], text: str, token_bytes: TokenBytes
) -> Int64[np.ndarray, " tokens"]:
    """Bytes of the text that each token stands for, by the rules above, without the text after the last token.

    Args:
        tokens: Tokens of the text.
        offsets: First and last character (exclusive) of each token.
        text: The text that was encoded.
        token_bytes: Bytes of the tokens.
    """
    if not tokens:
        return NO_TOKENS
    starts, ends = np.clip(np.array(offsets, dtype=np.int64), 0, len(text)).T
    borders = np.maximum.accumulate(np.minimum(ends, np.append(starts[1:], ends[-1])))
    positions = _byte_positions(text)[borders]
    sizes = np.diff(positions, prepend=0)
    content = text.encode()
    for first, last in _runs(starts[1:] < np.maximum.accumulate(ends)[:-1]):
        shared = content[positions[first] - sizes[first] : positions[last]]
        if divided := _divide_by_bytes(
            shared, [token_bytes.bytes.get(token, b"") for token in tokens[first : last + 1]]
        ):
            sizes[first : last + 1] = divided
    return sizes


def without_gaps(parts: Iterable[Aligned]) -> Iterator[Aligned]:
    """Assign all bytes of a document to its tokens: text left over in one part goes to the next part.

    A part is held back until the next one arrives, because text left over at the end goes to the last token.
    """
    held: Aligned | None = None
    rest, lost = b"", 0
    for part in parts:
        lost += part.lost
        if not len(part.tokens):
            rest += part.content
            continue
        if held is not None:
            yield held
        sizes, end = part.sizes.copy(), int(part.sizes.sum())
        sizes[0] += len(rest)
        held = Aligned(part.tokens, sizes, rest + part.content[:end], lost)
        rest, lost = part.content[end:], 0
    if held is None:
        yield Aligned(NO_TOKENS, NO_TOKENS, b"", lost)
        return
    sizes = held.sizes.copy()
    sizes[-1] += len(rest)
    yield Aligned(held.tokens, sizes, held.content + rest, held.lost + lost)


def _divide_by_bytes(shared: bytes, expected: Sequence[bytes]) -> list[int] | None:
    """Sizes of tokens that share characters, if the bytes of all but the first end these characters; the first has the
    rest.
    """
    sizes, rest = [], shared
    for content in expected[:0:-1]:
        if not content or not rest.endswith(content):
            return None
        rest = rest[: -len(content)]
        sizes.append(len(content))
    return [len(rest), *reversed(sizes)]


def _runs(joined: np.ndarray) -> Iterator[tuple[int, int]]:
    """First and last index of each run of elements that are joined to their predecessor."""
    edges = np.flatnonzero(np.diff(joined.astype(np.int8), prepend=0, append=0))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def _byte_positions(text: str) -> Int64[np.ndarray, " boundaries"]:
    """Where each character begins in UTF-8, and where the last one ends."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    sizes = 1 + (codes > 0x7F).astype(np.int64) + (codes > 0x7FF) + (codes > 0xFFFF)
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])


def _kinds(tree: object) -> set[str]:
    """The types of all steps in a part of a ``tokenizer.json``."""
    if isinstance(tree, Mapping):
        kinds = {kind} if isinstance(kind := tree.get("type"), str) else set()
        return kinds.union(*map(_kinds, tree.values()))
    return set().union(*map(_kinds, tree)) if isinstance(tree, list) else set()


def _unknown(model: tokenizers.Tokenizer, tree: Mapping[str, object]) -> tuple[int | None, str | None]:
    """Number and name of the unknown token."""
    if isinstance(number := tree.get("unk_id"), int):
        return number, model.id_to_token(number)
    name = tree.get("unk_token")
    return (model.token_to_id(name), name) if isinstance(name, str) else (None, None)


# a byte is written as its own character if that is printable, else as one above 255
_ALPHABET = sorted(map(ord, pre_tokenizers.ByteLevel.alphabet()))
_PRINTABLE = [number for number in _ALPHABET if number < 256]
BYTE_OF = {
    chr(number): byte
    for number, byte in zip(_ALPHABET, _PRINTABLE + sorted(set(range(256)) - set(_PRINTABLE)), strict=True)
}


def _bytes_of(token: str, *, byte_level: bool, falls_back: bool) -> bytes:
    if byte_level and all(character in BYTE_OF for character in token):
        return bytes(BYTE_OF[character] for character in token)
    if falls_back and (byte := BYTE.fullmatch(token)):
        return bytes([int(byte[1], 16)])
    return token.encode()  # for example a special token in the vocabulary
