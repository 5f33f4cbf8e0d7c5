"""Many texts are scored as each alone, and a beginning that they share passes the model once."""

from collections.abc import Callable
from weakref import WeakSet

import pytest
import torch
from models import LENGTH, MODELS, VOCAB, memformer
from torch import Tensor

from memformer_pl.contract import Segment, SegmentModel
from memformer_pl.inference.sampling import Sampling
from memformer_pl.inference.session import Session
from memformer_pl.inference.shared_beginnings import Text, read_texts


def tokens_of(length: int, *, seed: int) -> Tensor:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


HEAD, OTHER = tokens_of(3 * LENGTH + 2, seed=0), tokens_of(2 * LENGTH, seed=1)


def after(head: Tensor, length: int, *, seed: int) -> Text:
    """A continuation of a head that alone is scored."""
    return Text(torch.cat((head, tokens_of(length, seed=seed))), len(head))


TEXTS = [
    *(after(HEAD, length, seed=length) for length in (1, 2, 3, 9, 3)),
    *(after(OTHER, length, seed=length) for length in (1, LENGTH, 7)),
    Text(HEAD, 0),
    Text(tokens_of(1, seed=9), 0),
    Text(OTHER, len(OTHER)),
    Text(tokens_of(0, seed=9), 0),
]


def one_pass(model: SegmentModel, text: Text) -> tuple[float, bool]:
    """The loss of a text's scored tokens, segment by segment in a batch of one, and whether all are the likeliest."""
    state, nats, greedy = model.initial_state(1), 0.0, True
    with torch.no_grad():
        for start in range(0, len(text.tokens), LENGTH):
            tokens = text.tokens[None, start : start + LENGTH]
            there = torch.ones_like(tokens).bool()
            output, state = model(Segment(tokens, there, torch.tensor([start == 0])), state)
            first = max(text.scored - start, 0)
            nats += float(output.token_losses[0, first:].sum())
            greedy = greedy and bool(output.correct[0, first:].all())
    return nats, greedy


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("lanes", [1, 3, 8])
def test_a_score_is_that_of_one_pass_over_the_text_alone(build: Callable[..., SegmentModel], lanes: int) -> None:
    model = build().eval()
    read = {each.text: each for each in read_texts(model, TEXTS, lanes=lanes)}
    assert sorted(read) == list(range(len(TEXTS)))
    for number, text in enumerate(TEXTS):
        nats, greedy = one_pass(model, text)
        assert read[number].nats == pytest.approx(nats, abs=1e-10)
        assert read[number].greedy == greedy
        assert read[number].session.tokens_read.tolist() == [len(text.tokens)]


def continued(model: SegmentModel, tokens: Tensor, length: int) -> Tensor:
    """The tokens, and the most likely ones behind them."""
    (read,) = read_texts(model, [Text(tokens, len(tokens))], lanes=1)
    likeliest = [read.session.next(Sampling(temperature=0.0)) for _ in range(length)]
    return torch.cat((tokens, *likeliest))


def test_a_continuation_is_greedy_if_each_token_is_the_likeliest() -> None:
    model = memformer().eval()
    greedy = continued(model, HEAD, 2 * LENGTH)
    texts = [Text(greedy, len(HEAD))]
    for place in (0, 1, LENGTH, 2 * LENGTH - 1):  # one token is another, all behind it are the likeliest again
        before = greedy[: len(HEAD) + place + 1].clone()
        before[-1] = (before[-1] + 1) % VOCAB
        texts.append(Text(continued(model, before, 2 * LENGTH - 1 - place), len(HEAD)))
    found = {each.text: each.greedy for each in read_texts(model, texts, lanes=2)}
    assert found == {0: True, 1: False, 2: False, 3: False, 4: False}


class Counted:
    """How many tokens pass a model, and how many of them are predicted."""

    def __init__(self, model: SegmentModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read = self.predicted = 0
        step, advance_step = model.step, model.advance_step

        def counted_step(segment: Segment, state: object) -> object:
            self.read += int(segment.token_mask.sum())
            self.predicted += int(segment.token_mask.sum())
            return step(segment, state)

        def counted_advance(segment: Segment, state: object) -> object:
            self.read += int(segment.token_mask.sum())
            return advance_step(segment, state)

        monkeypatch.setattr(model, "step", counted_step)
        monkeypatch.setattr(model, "advance_step", counted_advance)


@pytest.mark.parametrize("lanes", [1, 8])
def test_whole_segments_of_a_shared_beginning_are_read_once_and_not_predicted(
    monkeypatch: pytest.MonkeyPatch, lanes: int
) -> None:
    model = memformer().eval()
    counted = Counted(model, monkeypatch)
    head = tokens_of(20 * LENGTH + 2, seed=3)
    items = [torch.cat((head, tokens_of(2 * LENGTH, seed=seed))) for seed in range(4)]
    choices = [after(item, 3, seed=seed) for item in items for seed in (7, 8, 9)]
    list(read_texts(model, choices, lanes=lanes))
    # the head; two segments an item, the first of which begins with the rest of the head; five tokens a choice, of
    # which two are the end of the item
    assert counted.read == 20 * LENGTH + 4 * 2 * LENGTH + 4 * 3 * LENGTH
    assert counted.predicted == 4 * 3 * LENGTH


def test_equal_texts_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = memformer().eval()
    counted = Counted(model, monkeypatch)
    read = list(read_texts(model, [Text(HEAD, 0)] * 3, lanes=2))
    assert len({each.nats for each in read}) == 1
    assert len(read) == 3
    assert counted.read == len(HEAD)


def test_few_copies_of_a_state_exist_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: WeakSet[Session] = WeakSet()
    build = Session.__init__

    def counted(session: Session, model: SegmentModel, *, lanes: int = 1) -> None:
        build(session, model, lanes=lanes)
        alive.add(session)

    monkeypatch.setattr(Session, "__init__", counted)
    texts = [Text(tokens_of(6 * LENGTH, seed=seed), 6 * LENGTH - 1) for seed in range(100)]
    texts += [Text(torch.cat((text.tokens[: 5 * LENGTH], OTHER)), 5 * LENGTH) for text in texts]
    most = max(len(alive) for _ in read_texts(memformer().eval(), texts, lanes=4))
    assert 4 < most <= 20


def test_weights_that_are_not_finite_are_refused() -> None:
    model = memformer().eval()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="a loss is NaN: the model's weights are not finite"):
        list(read_texts(model, TEXTS, lanes=2))


def test_a_model_in_training_mode_and_lanes_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the model is in training mode.*call model.eval\(\) first"):
        list(read_texts(memformer().train(), TEXTS, lanes=2))
    with pytest.raises(ValueError, match="lanes must be at least 1, got 0"):
        list(read_texts(memformer().eval(), TEXTS, lanes=0))
