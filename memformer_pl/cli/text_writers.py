"""How ``generate`` writes texts as they come: for people, or for machines."""

import json
import sys
from abc import ABC, abstractmethod


class Writer(ABC):
    """Writes pieces of texts on standard output, in UTF-8, at once."""

    @abstractmethod
    def text(self, sample: int, piece: str) -> None:
        """What comes next in a text."""

    @abstractmethod
    def end(self, *, tokens: int, interrupted: bool) -> None:
        """All texts have ended, after so many tokens each."""

    def put(self, text: str) -> None:
        """Write now: what was written is seen, and kept whatever happens next.

        Raises:
            BrokenPipeError: Nobody reads it.
        """
        sys.stdout.buffer.write(text.encode(errors="replace"))
        sys.stdout.buffer.flush()


class Plain(Writer):
    """One text, and nothing but the text."""

    def text(self, sample: int, piece: str) -> None:
        """Write it."""
        del sample
        self.put(piece)

    def end(self, *, tokens: int, interrupted: bool) -> None:
        """End the line on a terminal."""
        del tokens, interrupted
        if sys.stdout.isatty():
            self.put("\n")


class OneAfterAnother(Writer):
    """Several texts, each of them whole, when all have ended; their numbers are told on standard error.

    Args:
        samples: How many.
    """

    def __init__(self, samples: int) -> None:
        self._pieces: list[list[str]] = [[] for _ in range(samples)]

    def text(self, sample: int, piece: str) -> None:
        """Keep it."""
        self._pieces[sample].append(piece)

    def end(self, *, tokens: int, interrupted: bool) -> None:
        """Write them all."""
        del tokens, interrupted
        for number, pieces in enumerate(self._pieces, start=1):
            sys.stderr.write(f"--- sample {number} of {len(self._pieces)}\n")
            sys.stderr.flush()
            self.put(f"{''.join(pieces)}\n")


class Lines(Writer):
    """Events as JSON, one in a line: each piece of a text as it comes, then the end of each text.

    Args:
        samples: How many texts.
    """

    def __init__(self, samples: int) -> None:
        self._samples = samples

    def text(self, sample: int, piece: str) -> None:
        """Write a line."""
        self._line({"event": "text", "sample": sample, "text": piece})

    def end(self, *, tokens: int, interrupted: bool) -> None:
        """Write a line for each text."""
        for sample in range(self._samples):
            self._line({"event": "end", "sample": sample, "tokens": tokens, "interrupted": interrupted})

    def _line(self, event: dict[str, object]) -> None:
        self.put(f"{json.dumps(event)}\n")
