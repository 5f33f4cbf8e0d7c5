"""Texts end before a string, wherever the borders of tokens are."""

from collections.abc import Sequence

import pytest
import torch
from models import memformer
from tokenizer_kinds import llama
from trained import learned

from memformer_pl.data import Bytes, Tokenizer
from memformer_pl.data.tokenizers.subwords import SerializedTokenizer
from memformer_pl.inference import Sampling, Session
from memformer_pl.inference.writing import Continuation, write_until

TOKENIZERS = {"Bytes": Bytes, "BytePairs": learned, "llama": lambda: SerializedTokenizer(text=llama().to_str())}


@pytest.mark.parametrize("build", TOKENIZERS.values(), ids=TOKENIZERS.keys())
@pytest.mark.parametrize(
    ("text", "until", "kept"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["o th"], "one tw"),
        ("one two three", ["three", "wo"], "one t"),
        ("one two three", ["e"], "on"),
        ("one two three", ["four", "three two"], "one two three"),
        ("one two three", [], "one two three"),
        ("naïve café 🤷 au lait", ["🤷"], "naïve café "),
        ("naïve café 🤷 au lait", ["é 🤷 a"], "naïve caf"),
        ("aaab", ["aab"], "a"),
        ("a\n\nb", ["\n\n"], "a"),
    ],
)
def test_a_text_ends_before_the_first_string_over_borders_of_tokens(
    build: type[Tokenizer], text: str, until: Sequence[str], kept: str
) -> None:
    tokenizer = build()
    continuation = Continuation(tokenizer.incremental_decoder(), until=until)
    tokens = tokenizer.encode(text).tolist()
    for token in tokens:
        continuation.add(token)
    assert continuation.finish() == kept
    assert continuation.ended == (kept != text)


def test_it_ends_as_soon_as_a_string_is_there() -> None:
    continuation = Continuation(Bytes().incremental_decoder(), until=["two"])
    ended = []
    for token in b"one two three":
        continuation.add(token)
        ended.append(continuation.ended)
    assert ended == [False] * 6 + [True] * 7
    assert continuation.text == "one "


def test_an_incomplete_character_at_the_end_is_replaced_and_may_end_a_text() -> None:
    for until, text in (([], "a�"), (["�"], "a")):
        continuation = Continuation(Bytes().incremental_decoder(), until=until)
        for token in "aé".encode()[:-1]:
            continuation.add(token)
        assert continuation.finish() == text


def test_lanes_are_written_until_each_has_ended_or_has_its_tokens() -> None:
    # tokens of 7 bits, so that all text is valid
    model, prompts = memformer(vocab_size=128).eval(), torch.tensor([list(b"one"), list(b"two")])
    session, again = Session(model, lanes=2), Session(model, lanes=2)
    session.feed(prompts)
    again.feed(prompts)
    sampling = [Sampling(seed=1), Sampling(seed=2)]
    drawn = torch.stack([again.next(sampling) for _ in range(9)], dim=1)
    whole = [Bytes().decode(lane.tolist()) for lane in drawn]
    until = [whole[0][4:6]]
    wanted = [text.partition(until[0])[0] for text in whole]
    sampling = [Sampling(seed=1), Sampling(seed=2)]
    assert write_until(session, Bytes(), sampling, until=until, max_tokens=9) == wanted
    assert len(wanted[0]) == 4
