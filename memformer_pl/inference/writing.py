"""Write texts with a session until a string appears or a number of tokens is reached."""

from collections.abc import Sequence

from memformer_pl.contract import SegmentModel
from memformer_pl.data.tokenizers.pieces import IncrementalDecoder
from memformer_pl.data.tokenizers.tokenizer import Tokenizer
from memformer_pl.errors import UsageError
from memformer_pl.inference.sampling import Sampling
from memformer_pl.inference.session import Session


def require_sessions(model: SegmentModel) -> None:
    """Refuse a model that cannot generate, before it reads a prompt in vain.

    Raises:
        UsageError: The model lacks ``prefill`` or ``decode``.
    """
    for name in ("prefill", "decode"):
        if getattr(type(model), name) is getattr(SegmentModel, name):
            raise UsageError(
                f"{type(model).__name__} cannot generate: it does not implement {name}(), which computes the logits of "
                "the next token; what does not generate works without it: predict, generate --length 0, scores"
            )


class Continuation:
    """A text that grows token by token, and ends before the first of some strings.

    Args:
        decoder: Decodes its tokens.
        until: Strings that end it, none of them empty. One may begin and end within tokens.
    """

    def __init__(self, decoder: IncrementalDecoder, *, until: Sequence[str]) -> None:
        self._decoder, self._until = decoder, tuple(until)
        self._longest = max(map(len, self._until), default=0)
        self.text = ""
        self.ended = False
        """Whether one of the strings has appeared; the text stops before it."""

    def add(self, token: int) -> None:
        """Add a token, unless the text has ended."""
        if not self.ended:
            self._extend(self._decoder.add(token))

    def finish(self) -> str:
        """The text, with what an incomplete character at its end is displayed as."""
        if not self.ended:
            self._extend(self._decoder.end())
        return self.text

    def _extend(self, piece: str) -> None:
        searched = max(len(self.text) - self._longest + 1, 0)
        self.text += piece
        found = [place for string in self._until if (place := self.text.find(string, searched)) >= 0]
        if found:
            self.text, self.ended = self.text[: min(found)], True


def write_until(
    session: Session, tokenizer: Tokenizer, sampling: Sequence[Sampling], *, until: Sequence[str], max_tokens: int
) -> list[str]:
    """Continue the text of each lane until one of some strings appears in what is written; it is left out.

    All lanes are read on until the last has ended.

    Args:
        session: Has read what comes before.
        tokenizer: Of its model.
        sampling: One for each lane.
        until: Strings that end a text, none of them empty.
        max_tokens: The most tokens of a text.
    """
    texts = [Continuation(tokenizer.incremental_decoder(), until=until) for _ in range(session.lanes)]
    for _ in range(max_tokens):
        for text, token in zip(texts, session.next(sampling).tolist(), strict=True):
            text.add(token)
        if all(text.ended for text in texts):
            break
    return [text.finish() for text in texts]
