"""MQAR: what is shown, where it is asked for, and that only the values asked for are predicted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Outcome

from memformer_pl.callbacks.accuracy_by_distance import distances
from memformer_pl.data import MQAR, Bytes, Corpus, Document, LaneLoader, PackedDocuments, Symbols, pack
from memformer_pl.data.tokenizers.subwords import deserialize_tokenizer

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")


def corpus(**sizes: Any) -> MQAR:
    return MQAR(**{"trained": [(48, 4, 40)], "tested": [(96, 8, 30), (24, 2, 20)], "vocab_size": 64, **sizes})


def packed(corpus: MQAR, cache: Path) -> PackedDocuments:
    tokenizer = Symbols(vocab_size=corpus.vocab_size)
    return pack(corpus, tokenizer, validation=0.0, test=0.0, cache=cache).validation


def oracle(tokens: list[int], *, prompt: int, answers: list[int], key_length: int) -> list[int]:
    """What a dictionary of all that is shown gives for the key before each answer."""
    unit, known = key_length + 1, {}
    for at in range(0, prompt, unit):
        known[tuple(tokens[at : at + key_length])] = tokens[at + key_length]
    return [known[tuple(tokens[at - key_length : at])] for at in answers]


@pytest.mark.parametrize("updates", [0, 2])
@pytest.mark.parametrize("key_length", [1, 2])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_dictionary_answers_everything_right_and_each_key_is_asked_once(
    updates: int, key_length: int, seed: int
) -> None:
    unit, changed = key_length + 1, 0
    for document in corpus(updates=updates, key_length=key_length, seed=seed).documents():
        tokens = np.frombuffer(document.content, dtype="<u2").tolist()
        pairs, prompt = len(document.answers), document.prompt_length // 2
        assert (len(tokens), pairs) in {(48, 4), (96, 8), (24, 2)}
        assert prompt == (pairs + updates) * unit
        answers = [begin // 2 for begin, _ in document.answers]
        assert all(end - begin == 2 for begin, end in document.answers)
        assert all((at - prompt) % unit == key_length and at >= prompt for at in answers)
        found = oracle(tokens, prompt=prompt, answers=answers, key_length=key_length)
        assert found == [tokens[at] for at in answers]
        asked = [tuple(tokens[at - key_length : at]) for at in answers]
        shown = [tuple(tokens[at : at + key_length]) for at in range(0, prompt, unit)]
        assert len(set(asked)) == pairs
        assert set(asked) == set(shown)
        assert all(1 <= part < 32 for key in shown for part in key)
        values = tokens[key_length:prompt:unit]
        assert len(set(values)) == len(values)
        assert all(32 <= value < 64 for value in values)
        first = dict(reversed(list(zip(shown, values, strict=True))))
        changed += sum(first[key] != value for key, value in zip(asked, found, strict=True))
    assert changed == (40 + 30 + 20) * updates  # each new value is another one, and counts


def test_a_document_by_hand() -> None:
    """One pair and no room but for its question: the document is the pair twice."""
    (_, document) = MQAR(trained=[(4, 1, 1)], tested=[(4, 1, 1)], vocab_size=4).documents()
    key, *values = np.frombuffer(document.content, dtype="<u2").tolist()
    assert key == 1  # the only key below 4 // 2 that is not 0
    assert values == [values[0], 1, values[0]]
    assert values[0] in (2, 3)
    assert (document.prompt_length, document.answers, document.split) == (4, ((6, 8),), "validation")


def test_both_tokens_of_a_key_are_needed() -> None:
    """Four keys are the four cells of a grid: each of their tokens belongs to two of them."""
    for document in corpus(key_length=2, tested=[(24, 4, 20)]).documents():
        shown = np.frombuffer(document.content[: document.prompt_length], dtype="<u2").reshape(-1, 3)
        for part in (0, 1):
            assert np.unique(shown[:, part], return_counts=True)[1].tolist() == [2, 2]


@pytest.mark.parametrize(("power", "weight"), [(0.01, 2**-0.99), (1.0, 1.0)])
def test_gaps_follow_the_power_law(power: float, weight: float) -> None:
    """One pair in six tokens: gaps 0 and 1, with weights 1 and 2 ** (power - 1)."""
    *documents, _ = corpus(trained=[(6, 1, 4000)], tested=[(6, 1, 1)], power=power).documents()
    near = np.mean([document.answers == ((6, 8),) for document in documents[:4000]])
    assert near == pytest.approx(1 / (1 + weight), abs=0.03)  # four standard errors


def test_documents_depend_on_the_arguments_alone_and_held_out_ones_not_on_training() -> None:
    assert list(corpus().documents()) == list(corpus().documents())
    assert list(corpus(seed=1).documents()) != list(corpus().documents())
    assert corpus(seed=1).identity() != corpus().identity() == corpus().identity()
    held_out, others = (
        [document for document in each.documents() if document.split == "validation"]
        for each in (corpus(), corpus(trained=[(24, 2, 3)]))
    )
    assert held_out == others
    training = {document.content for document in corpus(trained=[(96, 8, 30)]).documents() if document.split == "train"}
    assert not training & {document.content for document in held_out}


@pytest.mark.parametrize("segment_length", [16, 24, 64])
def test_only_the_values_asked_for_are_predicted_however_documents_are_cut(segment_length: int, tmp_path: Path) -> None:
    documents = packed(corpus(), tmp_path)
    loader = LaneLoader(documents, batch_size=3, segment_length=segment_length, horizon=2, shuffle=False)
    predicted: dict[int, list[int]] = {}
    for rollout in loader:
        for segment, read, firsts in zip(rollout.segments, rollout.documents, rollout.firsts, strict=True):
            for lane, at in segment.target_mask.nonzero().tolist():
                predicted.setdefault(int(read[lane]), []).append(int(firsts[lane]) + at)
    held_out = [document for document in corpus().documents() if document.split == "validation"]
    assert predicted == {n: [begin // 2 for begin, _ in document.answers] for n, document in enumerate(held_out)}
    last = torch.tensor([95 // segment_length] * 30 + [23 // segment_length] * 20)
    assert torch.equal(distances(loader), last)


class Marked(Corpus):
    """Documents of bytes, with answers or without."""

    def __init__(self, *documents: Document) -> None:
        self.all = documents

    def documents(self) -> Any:
        return iter(self.all)

    def identity(self) -> dict[str, object]:
        return {"all": [[*document._replace(content=document.content.hex())] for document in self.all]}


def test_documents_with_answers_and_without_lie_in_one_corpus(tmp_path: Path) -> None:
    some = Document(b"abcdefgh", name="some", prompt_length=2, answers=((3, 4), (4, 6)))
    all_behind, whole = Document(b"ijklm", name="all", prompt_length=3), Document(b"nop", name="whole")
    sizes: dict[str, Any] = {"validation": 0.0, "test": 0.0}
    documents = pack(Marked(all_behind, some, whole), Bytes(), cache=tmp_path, **sizes).train
    assert documents.has_answers.tolist() == [False, True, False]
    loader = LaneLoader(documents, batch_size=1, segment_length=4, horizon=1, shuffle=False)
    texts = {0: b"", 1: b"", 2: b""}
    for rollout in loader:
        (segment,), ((document,),) = rollout.segments, rollout.documents.tolist()
        texts[document] += bytes(segment.tokens[segment.target_mask].tolist())
    assert texts == {0: b"lm", 1: b"def", 2: b"nop"}
    plain = pack(Marked(all_behind, some._replace(answers=()), whole), Bytes(), cache=tmp_path, **sizes).train
    assert plain.fingerprint != documents.fingerprint
    assert not plain.answers.size


@pytest.mark.parametrize("answers", [((1, 3),), ((4, 3),), ((3, 3),), ((3, 5), (4, 6)), ((7, 9),)])
def test_answers_out_of_place_are_refused(answers: tuple[tuple[int, int], ...], tmp_path: Path) -> None:
    wrong = Document(b"abcdefgh", name="wrong", prompt_length=2, answers=answers)
    with pytest.raises(ValueError, match="wrong: answers must lie in order between the prompt and the end"):
        pack(Marked(wrong), Bytes(), validation=0.0, test=0.0, cache=tmp_path)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"trained": [(47, 4, 1)]}, r"trained\[0\] .* multiple of 2, .*: 46 or 48, got \[47, 4, 1\]"),
        ({"tested": [(64, 4, 1), (64, 4, 0)]}, r"tested\[1\] must be .* at least 1, got \[64, 4, 0\]"),
        ({"trained": [(14, 4, 1)]}, r"too few to show 4 pairs and 0 updates .*: use at least 16 tokens, .*14, 4, 1"),
        ({"trained": [(16, 4, 1)], "updates": 1}, "4 pairs and 1 updates .* use at least 18 tokens"),
        ({"trained": [(128, 32, 1)]}, r"vocabulary of at least 66 tokens, .* got \[128, 32, 1\] and vocab_size=64"),
        ({"key_length": 2, "trained": [(1536, 256, 1)]}, "vocabulary of at least 512 tokens"),
        ({"updates": 3}, r"tested\[1\] has 2 keys to show again, got updates=3: use fewer"),
        ({"key_length": 3}, "key_length must be at most 2, got 3"),
        ({"power": 0.0}, "power must be above 0, got 0.0"),
        ({"vocab_size": 3}, "vocab_size must be at least 4, got 3"),
        ({"vocab_size": 65537}, "vocab_size must be at most 65,536, got 65537"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_impossible_arguments_are_refused(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        corpus(**sizes)


@pytest.mark.parametrize(
    "sizes", [{"trained": [(124, 31, 2)]}, {"updates": 2, "trained": [(12, 2, 2)]}, {"key_length": 2, "vocab_size": 20}]
)
def test_sizes_at_their_limits_give_documents(sizes: dict[str, Any]) -> None:
    assert all(document.answers for document in corpus(**sizes).documents())


def test_symbols_are_numbers_of_two_bytes() -> None:
    tokenizer = deserialize_tokenizer(Symbols(vocab_size=300).serialize())
    (tokens,) = tokenizer.encode_documents([Document(bytes([44, 0, 43, 1]), name="some")])
    assert (tokens.tolist(), tokenizer.vocab_size, tokenizer.decode(tokens)) == ([44, 299], 300, "44 299 ")
    assert tokenizer.bytes_of_all(tokens) == bytes([44, 0, 43, 1]) == b"".join(map(tokenizer.bytes_of, (44, 299)))
    assert tokenizer.bytes_of(300) == b""
    (aligned,) = tokenizer.align_blocks([bytes([44, 0, 43]), bytes([1])], name="some")
    assert aligned[1].tolist() == [2, 2]
    decoder = tokenizer.incremental_decoder()
    assert decoder.add(3) + decoder.add(299) + decoder.end() == "3 299 "
    with pytest.raises(ValueError, match="odd has 3 bytes, but a token of Symbols has two: use the tokenizer Bytes"):
        tokenizer.encode_documents([Document(b"abc", name="odd")])
    with pytest.raises(ValueError, match="large has the token 300, but vocab_size=300: give the tokenizer the vocab"):
        tokenizer.encode_documents([Document(bytes([44, 1]), name="large")])
    with pytest.raises(ValueError, match="vocab_size must be at most 65,536, got 70000"):
        Symbols(vocab_size=70000)
    assert type("Own", (Symbols,), {})(vocab_size=4).serialize() is None


def test_the_experiment_takes_a_step(command: Callable[..., Outcome], tmp_path: Path, pack_cache: Path) -> None:
    small = ["--data.batch_size=2", "--model.model=LSTM", "--model.model.dim=16"]
    documents = ["--data.corpus.trained=[[64,4,20]]", "--data.corpus.tested=[[64,4,2],[256,16,2]]"]
    steps = ["--trainer.max_steps=1", "--trainer.val_check_interval=1", "--trainer.num_sanity_val_steps=0"]
    quietly = ["--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1"]
    where = [f"--data.cache={pack_cache}", f"--trainer.logger.init_args.save_dir={tmp_path}"]
    config = f"--config={EXPERIMENTS / 'recall' / 'mqar' / 'base.yaml'}"
    outcome = command("fit", config, *small, *documents, *steps, *quietly, *where)
    assert outcome.code == 0
    found = [line.split() for line in outcome.output.splitlines() if "│" in line and "." in line]
    assert [row[1] for row in found[-2:]] == ["3", "15"]
