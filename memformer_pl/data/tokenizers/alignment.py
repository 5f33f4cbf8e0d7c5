"""Which bytes of a text each of its tokens stands for, and how many bytes no token brings back.

A token stands for the characters that the tokenizer says it was made of (its offsets, which are places in the text
before any normalizer), so lower-casing, a ``##`` or a ``▁`` changes nothing. Three rules make the bytes of the tokens
join to the document, whatever the tokenizer drops:

- What stands between two tokens belongs to the one behind it, and what stands behind the last token to the last.
- A character that several tokens share is cut by the bytes that they stand for, if those are its bytes.
- If they are not, it belongs to the last of them, and the others have no bytes.

One kind of tokenizer says places that are not exact: pairs (BPE) that drop a character in mid-word, behind which the
places of that word are too early. Their bytes join to the document all the same.
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
"""A token that stands for a byte, where a tokenizer falls back to bytes."""
NO_TOKENS = np.empty(0, dtype=np.int64)


class Aligned(NamedTuple):
    """A part of a document with the tokens that it became."""

    tokens: Integer[np.ndarray, " tokens"]
    sizes: Int64[np.ndarray, " tokens"]
    """Bytes of each token."""
    content: bytes
    """All of them, one after the other."""
    lost: int = 0
    """How many of them do not come back from the tokens, see :func:`missing`."""


class Meaning:
    """What the tokens of a tokenizer stand for, whatever stands beside them.

    Args:
        model: The tokenizer.
    """

    def __init__(self, model: tokenizers.Tokenizer) -> None:
        tree = json.loads(model.to_str())
        steps = _kinds([tree[step] for step in ("normalizer", "pre_tokenizer", "decoder")])
        self.of_bytes = "ByteLevel" in steps
        """Whether tokens are written in the alphabet of bytes: a step of the tokenizer makes it so, wherever it is."""
        self.joins = self.of_bytes and (model.decoder is None or isinstance(model.decoder, decoders.ByteLevel))
        """Whether a text is nothing but the bytes of its tokens."""
        falls_back = bool(tree["model"].get("byte_fallback")) or "ByteFallback" in steps
        added = {number: token.content.encode() for number, token in model.get_added_tokens_decoder().items()}
        known = model.get_vocab(with_added_tokens=False).items()
        self.bytes = {number: _bytes_of(token, self.of_bytes, falls_back) for token, number in known} | added
        self.unknown, self.unknown_text = _unknown(model, tree["model"])

    def join(self, tokens: Iterable[int]) -> bytes:
        """The bytes of tokens, one after the other; none for a number that is no token."""
        meaning = self.bytes
        return b"".join([meaning.get(token, b"") for token in tokens])

    def known(self, tokens: Sequence[int], text: str) -> list[int]:
        """The tokens without the unknown one, but for as many of it as the text says by its name (``<unk>``)."""
        if self.unknown is None or self.unknown not in tokens:
            return list(tokens)
        named = text.count(self.unknown_text) if self.unknown_text else 0
        kept = []
        for token in tokens:
            if token != self.unknown or named > 0:
                kept.append(token)
                named -= token == self.unknown
        return kept


def missing(before: str, after: str) -> int:
    """How many bytes of a text do not come back: those of the characters that ``after`` has fewer of, in any order.

    Nothing is missing if the two are equal, or if ``after`` has more than that; lower-casing loses the capitals.
    """
    if before == after:
        return 0
    return sum(many * len(character.encode()) for character, many in (Counter(before) - Counter(after)).items())


def told_loss(lost: int | float, size: int | float) -> str:
    """What is said behind a figure of bits per byte; nothing if nothing is lost.

    Args:
        lost: Bytes that do not come back from the tokens.
        size: Of how many.
    """
    return f" ({100 * lost / size:.3g} % of the bytes do not come back from the tokens)" if lost else ""


def sizes_by_offsets(
    tokens: Sequence[int], offsets: Sequence[tuple[int, int]], text: str, meaning: Meaning
) -> Int64[np.ndarray, " tokens"]:
    """Bytes of the text that each token stands for, by the rules above; what is behind the last token is left over.

    Args:
        tokens: Of the text.
        offsets: First and last character (exclusive) of each.
        text: What was encoded.
        meaning: Of the tokens.
    """
    if not tokens:
        return NO_TOKENS
    starts, ends = np.clip(np.array(offsets, dtype=np.int64), 0, len(text)).T
    borders = np.maximum.accumulate(np.minimum(ends, np.append(starts[1:], ends[-1])))
    places = _places(text)[borders]
    sizes = np.diff(places, prepend=0)
    content = text.encode()
    for first, last in _runs(starts[1:] < np.maximum.accumulate(ends)[:-1]):
        shared = content[places[first] - sizes[first] : places[last]]
        if own := _cut_by_bytes(shared, [meaning.bytes.get(token, b"") for token in tokens[first : last + 1]]):
            sizes[first : last + 1] = own
    return sizes


def without_gaps(parts: Iterable[Aligned]) -> Iterator[Aligned]:
    """The parts of a document, so that their tokens have all of its bytes: what is left over goes to the next part.

    A part is held back until there is another, since what is left over at the end goes to the last token.
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


def _cut_by_bytes(shared: bytes, own: Sequence[bytes]) -> list[int] | None:
    """Sizes of tokens that share characters, if all but the first end them as they should; the first has the rest."""
    sizes, rest = [], shared
    for meaning in own[:0:-1]:
        if not meaning or not rest.endswith(meaning):
            return None
        rest = rest[: -len(meaning)]
        sizes.append(len(meaning))
    return [len(rest), *reversed(sizes)]


def _runs(joined: np.ndarray) -> Iterator[tuple[int, int]]:
    """First and last of those in a row that are joined, each to the one before it."""
    edges = np.flatnonzero(np.diff(joined.astype(np.int8), prepend=0, append=0))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def _places(text: str) -> Int64[np.ndarray, " boundaries"]:
    """Where each character begins in UTF-8, and where the last one ends."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    sizes = 1 + (codes > 0x7F).astype(np.int64) + (codes > 0x7FF) + (codes > 0xFFFF)
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])


def _kinds(tree: object) -> set[str]:
    """The types of all steps in a part of a ``tokenizer.json``."""
    if isinstance(tree, Mapping):
        own = {kind} if isinstance(kind := tree.get("type"), str) else set()
        return own.union(*map(_kinds, tree.values()))
    return set().union(*map(_kinds, tree)) if isinstance(tree, list) else set()


def _unknown(model: tokenizers.Tokenizer, tree: Mapping[str, object]) -> tuple[int | None, str | None]:
    """Number and name of the token that stands for what a tokenizer does not know."""
    if isinstance(number := tree.get("unk_id"), int):
        return number, model.id_to_token(number)
    name = tree.get("unk_token")
    return (model.token_to_id(name), name) if isinstance(name, str) else (None, None)


# a byte is written as the character of its number where that can be seen, and as one above them where it cannot
_ALPHABET = sorted(map(ord, pre_tokenizers.ByteLevel.alphabet()))
_SEEN = [number for number in _ALPHABET if number < 256]
BYTE_OF = {
    chr(number): byte for number, byte in zip(_ALPHABET, _SEEN + sorted(set(range(256)) - set(_SEEN)), strict=True)
}


def _bytes_of(token: str, of_bytes: bool, falls_back: bool) -> bytes:
    if of_bytes and all(character in BYTE_OF for character in token):
        return bytes(BYTE_OF[character] for character in token)
    if falls_back and (byte := BYTE.fullmatch(token)):
        return bytes([int(byte[1], 16)])
    return token.encode()  # a special token that was trained in, say
