"""Writers of generated text: plain, one text after the other, or JSON lines."""

import json
import sys
from abc import ABC, abstractmethod


class Writer(ABC):
    """Write pieces of texts to standard output, in UTF-8, without buffering."""

    @abstractmethod
    def text(self, sample: int, piece: str) -> None:
        """Add a piece to a text."""

    @abstractmethod
    def end(self, *, tokens: int, interrupted: bool) -> None:
        """End all texts; each has so many tokens."""

    def put(self, text: str) -> None:
        """Write and flush.

        Raises:
            BrokenPipeError: The reader of standard output has gone.
        """
        sys.stdout.buffer.write(text.encode(errors="replace"))
        sys.stdout.buffer.flush()


class Plain(Writer):
    """Write one text as it is."""

    def text(self, sample: int, piece: str) -> None:
        """Write the piece."""
        del sample
        self.put(piece)

    def end(self, *, tokens: int, interrupted: bool) -> None:
        """End the line on a terminal."""
        del tokens, interrupted
        if sys.stdout.isatty():
            self.put("\n")


class OneAfterAnother(Writer):
    """Write several texts, one after the other, when all have ended; their numbers go to standard error.

    Args:
        samples: Number of texts.
    """

    def __init__(self, samples: int) -> None:
        self._pieces: list[list[str]] = [[] for _ in range(samples)]

    def text(self, sample: int, piece: str) -> None:
        """Keep the piece."""
        self._pieces[sample].append(piece)

    def end(self, *, tokens: int, interrupted: bool) -> None:
        """Write all texts."""
        del tokens, interrupted
        for number, pieces in enumerate(self._pieces, start=1):
            sys.stderr.write(f"--- sample {number} of {len(self._pieces)}\n")
            sys.stderr.flush()
            self.put(f"{''.join(pieces)}\n")


class Lines(Writer):
    """Write events as JSON lines: each piece of a text as it is generated, then the end of each text.

    Args:
        samples: Number of texts.
    """

    def __init__(self, samples: int) -> None:
        self._samples = samples

    def text(self, sample: int, piece: str) -> None:
        """Write a line for the piece."""
        self._line({"event": "text", "sample": sample, "text": piece})

    def end(self, *, tokens: int, interrupted: bool) -> None:
        """Write a line for each text."""
        for sample in range(self._samples):
            self._line({"event": "end", "sample": sample, "tokens": tokens, "interrupted": interrupted})

    def _line(self, event: dict[str, object]) -> None:
        self.put(f"{json.dumps(event)}\n")
