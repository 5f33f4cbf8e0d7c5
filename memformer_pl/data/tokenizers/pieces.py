"""Texts of any length, of which no more than a piece is held: cut for a tokenizer, and put together again.

A tokenizer gives the pieces the tokens that it gives the whole, if it never joins a character that is no white space to
a space behind it, nor a letter or digit to the end of a line behind it. Byte-level byte pair encodings do not, nor do
others that split texts into words first. Where there is no such place in ``PIECE`` characters, as in Chinese, or where
a tokenizer does not split, the cut can change a few tokens beside it. Documents are packed by the same rule.
"""

import codecs
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Protocol, runtime_checkable

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from memformer_pl.errors import UsageError

PIECE = 1 << 16
"""Characters that are encoded as one: what a tokenizer needs in memory does not grow with a document."""
BLOCK = 1 << 16
"""Bytes that are read at once."""


def pieces(blocks: Iterable[str]) -> Iterator[str]:
    """A text in pieces of at most ``PIECE`` characters, the same ones however it comes in blocks.

    A piece ends as late as it can: before a space that follows no white space, or before the end of a line that
    follows a letter or digit; anywhere if there is neither.
    """
    rest = ""
    for block in blocks:
        rest, start = rest + block, 0
        while len(rest) - start > PIECE:
            end = _end(rest, start)
            yield rest[start:end]
            start = end
        rest = rest[start:]
    if rest:
        yield rest


def _end(text: str, start: int) -> int:
    for place in range(start + PIECE, start, -1):
        before, character = text[place - 1], text[place]
        if (character == " " and not before.isspace()) or (character == "\n" and before.isalnum()):
            return place
    return start + PIECE


def blocks_of(read: Callable[[int], bytes]) -> Iterator[bytes]:
    """What is in a file, given the way to read from it."""
    return iter(partial(read, BLOCK), b"")


def decoded(blocks: Iterable[bytes], *, name: str) -> Iterator[str]:
    """UTF-8 as text, wherever the blocks end.

    Args:
        blocks: Of one document.
        name: Of the document, for the error.

    Raises:
        UsageError: It is not UTF-8; says where.
    """
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    for block, final in _with_end(blocks):
        begun = len(decoder.getstate()[0])
        try:
            yield decoder.decode(block, final)
        except UnicodeDecodeError as error:
            wrong = f"byte {error.object[error.start]:#04x} at offset {offset - begun + error.start}"
            raise UsageError(
                f"{name} is not UTF-8: {wrong}; convert the file, or use the tokenizer Bytes, which reads any file"
            ) from None
        offset += len(block)


def _with_end(blocks: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    yield from ((block, False) for block in blocks)
    yield b"", True


@runtime_checkable
class Characters(Protocol):
    """Makes text of tokens as they come, for people to read: of each as much as is certain by then."""

    def add(self, token: int) -> str:
        """The characters that this token completes."""

    def end(self) -> str:
        """What was begun and not completed."""


class BytesOfTokens:
    """Text from tokens that stand for bytes, and may end within a character. What is no UTF-8 is replaced.

    Args:
        bytes_of: The bytes of a token.
    """

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """The characters that this token completes."""
        return self._decoder.decode(self._bytes_of(token))

    def end(self) -> str:
        """The replacement character, if a character was begun and not completed."""
        return self._decoder.decode(b"", True)


class TextOfTokens:
    """Text from tokens whose text depends on those before, as their own tokenizer puts it together.

    Args:
        tokenizer: Of the library ``tokenizers``.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._stream = tokenizer, DecodeStream(skip_special_tokens=False)

    def add(self, token: int) -> str:
        """The characters that this token completes."""
        return self._stream.step(self._tokenizer, token) or ""

    def end(self) -> str:
        """Nothing: the library does not say what was begun."""
        return ""
