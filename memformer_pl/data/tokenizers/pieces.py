"""Texts of any length in pieces: split for a tokenizer, and decoded token by token.

The pieces have the tokens of the whole text if the tokenizer never joins a character other than white space to a space
after it, nor a letter or digit to the end of a line after it. Byte-level byte pairs satisfy this, and so do other
tokenizers that first split texts into words. If ``PIECE`` characters contain no such position, as in Chinese, or if a
tokenizer does not split into words, the border can change a few tokens beside it. Packing uses the same pieces.
"""

import codecs
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Protocol, runtime_checkable

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from memformer_pl.errors import UsageError

PIECE = 1 << 16
"""Characters that are encoded at once, so that the memory of a tokenizer does not grow with a document."""
BLOCK = 1 << 16
"""Bytes that are read at once."""


def pieces(blocks: Iterable[str]) -> Iterator[str]:
    """Split a text into pieces of at most ``PIECE`` characters; the result does not depend on how the text is cut into
    blocks.

    A piece ends as late as possible: before a space that follows no white space, or before the end of a line that
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
    for end in range(start + PIECE, start, -1):
        before, character = text[end - 1], text[end]
        if (character == " " and not before.isspace()) or (character == "\n" and before.isalnum()):
            return end
    return start + PIECE


def blocks_of(read: Callable[[int], bytes]) -> Iterator[bytes]:
    """The content of a file in blocks, given its ``read`` method."""
    return iter(partial(read, BLOCK), b"")


def decoded(blocks: Iterable[bytes], *, name: str) -> Iterator[str]:
    """Decode UTF-8 from blocks that may end within a character.

    Args:
        blocks: Content of one document.
        name: Name of the document, for the error.

    Raises:
        UsageError: The document is not UTF-8; says where.
    """
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    for block, final in _with_end(blocks):
        begun = len(decoder.getstate()[0])
        try:
            yield decoder.decode(block, final)
        except UnicodeDecodeError as error:
            reason = f"byte {error.object[error.start]:#04x} at offset {offset - begun + error.start}"
            raise UsageError(
                f"{name} is not UTF-8: {reason}; convert the file, or use the tokenizer Bytes, which reads any file"
            ) from None
        offset += len(block)


def _with_end(blocks: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    yield from ((block, False) for block in blocks)
    yield b"", True


@runtime_checkable
class IncrementalDecoder(Protocol):
    """Decodes tokens to text one at a time, for display: returns each character as soon as it is certain."""

    def add(self, token: int) -> str:
        """Return the characters that this token completes."""

    def end(self) -> str:
        """Return the text of an incomplete character."""


class BytesDecoder:
    """Decodes tokens that stand for bytes and may end within a character. Invalid UTF-8 is replaced.

    Args:
        bytes_of: Returns the bytes of a token.
    """

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """Return the characters that this token completes."""
        return self._decoder.decode(self._bytes_of(token))

    def end(self) -> str:
        """Return the replacement character if the last character is incomplete."""
        return self._decoder.decode(b"", True)


class TextDecoder:
    """Decodes tokens whose text depends on the tokens before, with their own tokenizer.

    Args:
        tokenizer: A tokenizer of the library ``tokenizers``.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._stream = tokenizer, DecodeStream(skip_special_tokens=False)

    def add(self, token: int) -> str:
        """Return the characters that this token completes."""
        return self._stream.step(self._tokenizer, token) or ""

    def end(self) -> str:
        """Return nothing: the library does not report incomplete characters."""
        return ""
