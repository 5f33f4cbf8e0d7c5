"""Sessions: token by token they equal the whole forward pass, however the text is cut and wherever it is saved."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from models import (
    BOUNDED,
    LENGTH,
    MODELS,
    VOCAB,
    block_recurrent,
    compressive,
    full,
    lamemo,
    memformer,
    memformer_decoder,
    memory_transformer,
    recurrent_memory,
    small,
    transformer,
    transformer_xl,
)
from planted import Planted
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from memformer_pl.contract import DecodingCache, Segment, SegmentModel, select_lanes
from memformer_pl.inference.sampling import Sampling
from memformer_pl.inference.session import Session

Build = Callable[..., SegmentModel]

ALL: dict[str, Build] = {
    **MODELS,
    "transformer with relative positions": partial(transformer, positions="relative"),
    "memformer decoder without slots": partial(memformer_decoder, slots=0),
    "memory transformer without memory": partial(memory_transformer, memory_tokens=0),
    "recurrent memory transformer without memory": partial(recurrent_memory, memory_tokens=0),
    "transformer xl without cache": partial(transformer_xl, memory_length=0),
    "transformer xl with a cache of many segments": partial(transformer_xl, memory_length=17),
    "compressive transformer without compressed rows": partial(compressive, compressed_length=0),
    "lamemo without cache": partial(lamemo, memory_length=0),
    "lamemo of one layer": partial(lamemo, layers=1),
    "block-recurrent transformer without a window": partial(block_recurrent, window=0),
}
"""Every model, and every way to leave a part of one out."""

EXACT = {torch.float32: 1e-5, torch.float64: 1e-10}
CASES = [
    *(pytest.param(build, torch.float64, id=name) for name, build in ALL.items()),
    *(pytest.param(build, torch.float32, id=f"{name}, float32") for name, build in MODELS.items()),
]
PROMPTS = (0, 3, LENGTH, LENGTH + 1, 3 * LENGTH + 2)


def text(length: int, *, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


def expected(model: SegmentModel, tokens: Tensor) -> Tensor:
    """Log-probabilities ``[T+1, V]`` of the forward pass before each of ``tokens`` ``[1, T]`` and after them."""
    state, log_probs = model.initial_state(LENGTH * VOCAB), []
    tokens = torch.nn.functional.pad(tokens, (0, LENGTH - tokens.shape[1] % LENGTH))
    with torch.no_grad():
        for n, part in enumerate(tokens.split(LENGTH, dim=1)):
            lanes = part.repeat(LENGTH * VOCAB, 1).view(LENGTH, VOCAB, LENGTH)
            for place in range(LENGTH):  # each token of the vocabulary at each place, in a lane of its own
                lanes[place, :, place] = torch.arange(VOCAB)
            token_mask = torch.ones(LENGTH * VOCAB, LENGTH).bool()
            starts = torch.full((LENGTH * VOCAB,), n == 0)
            losses = model(Segment(lanes.flatten(0, 1), token_mask, starts), state)[0].token_losses
            state = model.advance(Segment(part.repeat(LENGTH * VOCAB, 1), token_mask, starts), state)
            log_probs.append(-losses.view(LENGTH, VOCAB, LENGTH).diagonal(dim1=0, dim2=2).T)
    return torch.cat(log_probs)


def fed(model: SegmentModel, tokens: Tensor, *pieces: int) -> Session:
    """A session that has read ``tokens``, in pieces of these lengths and the rest."""
    session, start = Session(model, lanes=len(tokens)), 0
    for piece in (*pieces, tokens.shape[1]):
        session.feed(tokens[:, start : start + piece])
        start += piece
    return session


def ragged(texts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Texts side by side, and which of their tokens exist; absent ones hold an invalid number."""
    lengths = torch.tensor([each.shape[1] for each in texts])
    token_mask = torch.arange(int(lengths.max())) < lengths[:, None]
    tokens = torch.full(token_mask.shape, -7)
    tokens[token_mask] = torch.cat(texts, dim=1)[0]
    return tokens, token_mask


def bits(session: Session, *, tokens: int) -> list[Tensor]:
    """The log-probabilities of a session while it generates."""
    sampling, log_probs = Sampling(seed=5), []
    for _ in range(tokens):
        log_probs.append(session.log_probs)
        session.next(sampling)
    return log_probs


@pytest.fixture(params=MODELS)
def build(request: pytest.FixtureRequest) -> Build:
    return MODELS[request.param]


@pytest.fixture
def model(build: Build) -> SegmentModel:
    return build().eval()


@pytest.mark.parametrize(("build", "precision"), CASES)
def test_token_by_token_a_session_equals_the_forward_pass_across_four_borders(
    build: Build, precision: torch.dtype
) -> None:
    model, tokens = build().to(precision).eval(), text(4 * LENGTH + 3)
    session, log_probs = Session(model), []
    for token in tokens[0]:
        log_probs.append(session.log_probs[0])
        session.feed(token.view(1, 1))
    wanted = expected(model, tokens)[: len(log_probs)]
    torch.testing.assert_close(torch.stack(log_probs), wanted, rtol=0, atol=EXACT[precision])
    assert wanted.dtype is precision


@pytest.mark.parametrize(("build", "precision"), CASES)
def test_prompts_of_any_length_side_by_side_equal_each_alone(build: Build, precision: torch.dtype) -> None:
    model = build().to(precision).eval()
    texts = [text(length, seed=length) for length in PROMPTS]
    session, log_probs, sampling = Session(model, lanes=len(texts)), [], Sampling(seed=1)
    session.feed(*ragged(texts))
    assert session.tokens_read.tolist() == list(PROMPTS)
    for _ in range(LENGTH + 2):  # lanes reach the ends of their segments at different times
        log_probs.append(session.log_probs)
        drawn = session.next(sampling)
        texts = [torch.cat((each, token.view(1, 1)), dim=1) for each, token in zip(texts, drawn, strict=True)]
    for lane, (prompt, each) in enumerate(zip(PROMPTS, texts, strict=True)):
        wanted = expected(model, each)[prompt : prompt + LENGTH + 2]
        got = torch.stack([one[lane] for one in log_probs])
        torch.testing.assert_close(got, wanted, rtol=0, atol=EXACT[precision])


@pytest.mark.parametrize("pieces", [(), (2, 3, 0, 1, 5), (7, 6), (4, 1, 1)])
def test_pieces_do_not_matter(model: SegmentModel, pieces: tuple[int, ...]) -> None:
    tokens = text(3 * LENGTH - 1)
    wanted, session, start = expected(model, tokens), Session(model), 0
    for piece in (*pieces, tokens.shape[1]):  # log_probs in between, so that decoding continues from a cache
        session.feed(tokens[:, start : start + piece])
        start += piece
        torch.testing.assert_close(session.log_probs[0], wanted[session.tokens_read[0]], rtol=0, atol=1e-10)
    torch.testing.assert_close(fed(model, tokens, *pieces).log_probs, session.log_probs, rtol=0, atol=1e-10)


def test_probabilities_sum_to_one(model: SegmentModel) -> None:
    session = Session(model, lanes=2)
    for _ in range(2 * LENGTH):
        torch.testing.assert_close(session.log_probs.exp().sum(1), torch.ones(2).double(), rtol=1e-12, atol=0)
        session.next(Sampling())


def test_sessions_and_lanes_share_nothing(model: SegmentModel) -> None:
    weights = [tensor.clone() for tensor in model.state_dict().values()]
    attributes = dict(vars(model))
    alone = bits(fed(model, text(7).repeat(2, 1)), tokens=9)
    first, second = (fed(model, text(7, seed=seed).repeat(2, 1)) for seed in (0, 1))
    log_probs, kept = [], []
    sampling, other = Sampling(seed=5), Sampling(seed=6)
    for _ in range(9):
        log_probs.append(first.log_probs)
        kept.append(log_probs[-1].clone())
        second.next(other)
        assert torch.equal(first.log_probs, log_probs[-1])
        first.next(sampling)
    assert all(torch.equal(a, b) for a, b in zip(log_probs, alone, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(log_probs, kept, strict=True)), "earlier log_probs have been edited"
    assert all(torch.equal(a, b) for a, b in zip(weights, model.state_dict().values(), strict=True))
    assert vars(model) == attributes


def test_a_lane_is_independent_of_the_others(model: SegmentModel) -> None:
    first, second = (fed(model, torch.cat((text(13), text(13, seed=seed))), 6, 2).log_probs for seed in (1, 2))
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


def test_a_session_is_repeated_for_several_texts_after_one_prompt(model: SegmentModel) -> None:
    prompt = fed(model, text(13))
    before = prompt.log_probs
    session = prompt.repeated(3)
    assert session.tokens_read.tolist() == [13] * 3
    torch.testing.assert_close(session.log_probs, before.expand(3, -1), rtol=0, atol=1e-10)
    session.feed(*ragged([text(0), text(4, seed=1), text(3, seed=2)]))
    wanted = expected(model, torch.cat((text(13), text(4, seed=1)), dim=1))[17]
    torch.testing.assert_close(session.log_probs[1], wanted, rtol=0, atol=1e-10)
    assert torch.equal(prompt.log_probs, before)
    with pytest.raises(ValueError, match="only a session of one lane can be repeated, this one has 3"):
        session.repeated(2)


@pytest.mark.parametrize(("build", "precision"), CASES)
def test_scores_are_those_of_the_forward_pass_however_the_texts_are_cut(build: Build, precision: torch.dtype) -> None:
    model = build().to(precision).eval()
    texts = [text(3 * LENGTH - 1), text(LENGTH + 2, seed=1), text(2 * LENGTH, seed=2)]
    session, losses, correct = Session(model, lanes=3), [[], [], []], [[], [], []]
    for piece in ((2, 0, LENGTH), (0, 4, 0), (3 * LENGTH, 3 * LENGTH, 1), (0, 0, LENGTH)):
        starts = session.tokens_read.tolist()
        parts = [each[:, start : start + more] for each, start, more in zip(texts, starts, piece, strict=True)]
        scores = session.score(*ragged(parts))
        assert scores.token_losses.dtype == torch.float64
        for lane, part in enumerate(parts):
            losses[lane].append(scores.token_losses[lane, : part.shape[1]])
            correct[lane].append(scores.correct[lane, : part.shape[1]])
            assert not scores.token_losses[lane, part.shape[1] :].any()
            assert not scores.correct[lane, part.shape[1] :].any()
    assert session.tokens_read.tolist() == [each.shape[1] for each in texts]
    for lane, each in enumerate(texts):
        wanted = expected(model, each)[: each.shape[1]]
        token_losses = -wanted.gather(1, each.T)[:, 0].double()
        torch.testing.assert_close(torch.cat(losses[lane]), token_losses, rtol=0, atol=EXACT[precision])
        assert torch.equal(torch.cat(correct[lane]), wanted.argmax(1) == each[0])


def test_a_session_goes_on_after_it_has_scored_as_after_it_was_fed(model: SegmentModel) -> None:
    fed_alone, scored = Session(model, lanes=2), Session(model, lanes=2)
    for part in (ragged([text(3), text(8, seed=1)]), ragged([text(4, seed=2), text(0)])):
        fed_alone.feed(*part)
        scored.score(*part)
        torch.testing.assert_close(scored.log_probs, fed_alone.log_probs, rtol=0, atol=1e-10)
    assert torch.equal(scored.next(Sampling(seed=1)), fed_alone.next(Sampling(seed=1)))


def test_a_whole_segment_that_is_scored_passes_the_model_once() -> None:
    model = memformer().eval()
    calls: list[str] = []
    for name, layers in (("encoder", model.encoder), ("decoder", model.decoder)):
        layers[0].register_forward_hook(lambda *_, name=name: calls.append(name))
    Session(model).score(text(4 * LENGTH))
    assert (calls.count("encoder"), calls.count("decoder")) == (4, 4)


def test_sessions_are_joined_and_their_lanes_selected(model: SegmentModel) -> None:
    prompts = [text(13), text(4, seed=1), text(2 * LENGTH, seed=2)]
    alone = [fed(model, prompt) for prompt in prompts]
    before = [session.log_probs for session in alone]
    joined = Session.joined([alone[2], Session.joined([alone[0], alone[1]])])
    torch.testing.assert_close(joined.log_probs, torch.cat([before[n] for n in (2, 0, 1)]), rtol=0, atol=1e-10)
    session = joined.select([1, 1, 2])
    assert session.tokens_read.tolist() == [13, 13, 4]
    torch.testing.assert_close(session.log_probs, torch.cat([before[n] for n in (0, 0, 1)]), rtol=0, atol=1e-10)
    session.feed(*ragged([text(0), text(4, seed=1), text(6, seed=2)]))
    wanted = expected(model, torch.cat((text(13), text(4, seed=1)), dim=1))[17]
    torch.testing.assert_close(session.log_probs[1], wanted, rtol=0, atol=1e-10)
    assert joined.tokens_read.tolist() == [10, 13, 4]
    assert all(torch.equal(session.log_probs, one) for session, one in zip(alone, before, strict=True))


@pytest.mark.parametrize("lanes", [[2], [0, -1]])
def test_a_lane_that_is_not_there_cannot_be_selected(lanes: list[int]) -> None:
    with pytest.raises(
        ValueError, match=f"lanes must be at least 0 and below 2, the lanes of this session: {lanes[-1]}"
    ):
        Session(memformer().eval(), lanes=2).select(lanes)


def test_with_a_sampling_for_each_lane_a_lane_draws_what_it_draws_alone() -> None:
    model = memformer().eval()
    together, alone = Session(model, lanes=3), Session(model)
    several, one = (
        [Sampling(seed=seed, repetition_penalty=2.0) for seed in range(3)],
        Sampling(seed=1, repetition_penalty=2.0),
    )
    drawn = [(together.next(several)[1], alone.next(one)[0]) for _ in range(3 * LENGTH)]
    assert all(a == b for a, b in drawn)


def test_a_session_saved_and_loaded_at_every_token_continues_bit_for_bit(model: SegmentModel, tmp_path: Path) -> None:
    path = tmp_path / "there" / "memory.safetensors"

    def log_probs(*, saved: bool) -> list[Tensor]:
        session, sampling, all_said = Session(model, lanes=3), Sampling(seed=2), []
        session.feed(*ragged([text(3), text(13, seed=1), text(7, seed=2)]))
        for step in range(9):
            if step != 2:  # tokens may be fed without a look at log_probs
                all_said.append(session.log_probs)
            session.next(sampling)
            if step in (1, 4):  # lanes that began together part, and one waits
                session.feed(*ragged([text(0), text(5 - step), text(1)]))
            if saved:
                session.save(path)
                session = Session.load(model, path)
        assert session.tokens_read.tolist() == [12, 27, 18]
        return all_said

    assert all(torch.equal(a, b) for a, b in zip(log_probs(saved=False), log_probs(saved=True), strict=True))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("build", BOUNDED.values(), ids=BOUNDED.keys())
def test_a_token_costs_the_same_however_much_was_read(build: Build) -> None:
    session, costs = Session(build().eval()), []
    for more in (4 * LENGTH, 20 * LENGTH):
        session.feed(text(more))
        _ = session.log_probs
        with FlopCounterMode(display=False) as counter:
            bits(session, tokens=LENGTH)
        costs.append(counter.get_total_flops())
    # the first time caches are full already
    assert costs[0] == costs[1] > 0


@pytest.mark.parametrize(
    ("build", "few", "many"),
    [
        (memformer, {"slots": 3}, {"slots": 300}),
        (memformer_decoder, {"slots": 3}, {"slots": 300}),
        (recurrent_memory, {"memory_tokens": 3}, {"memory_tokens": 300}),
        (memory_transformer, {"memory_tokens": 3}, {"memory_tokens": 300}),
        (transformer_xl, {"memory_length": 3}, {"memory_length": 300}),
        (compressive, {"compressed_length": 3}, {"compressed_length": 300}),
        (lamemo, {"memory_length": 3}, {"memory_length": 300}),
        (block_recurrent, {"states": 3, "window": 3}, {"states": 300, "window": 300}),
    ],
)
def test_the_prefix_of_a_segment_passes_no_linear_map_for_each_token(
    build: Build, few: dict[str, int], many: dict[str, int]
) -> None:
    def maps(**sizes: int) -> int:
        """Operations of linear maps by one token in the middle of a segment."""
        model = build(**sizes).eval()
        rows: list[int] = []
        hooks = [
            module.register_forward_hook(lambda module, args, out: rows.append(out.numel() * module.in_features))
            for module in model.modules()
            if isinstance(module, torch.nn.Linear)
        ]
        session = fed(model, text(LENGTH + 2))
        _ = session.log_probs
        assert sum(rows) > 0
        rows.clear()
        session.feed(text(1))
        _ = session.log_probs
        [hook.remove() for hook in hooks]
        return sum(rows)

    assert maps(**few) == maps(**many) > 0


def test_whole_segments_of_a_prompt_are_not_predicted() -> None:
    model = memformer().eval()
    calls: list[str] = []
    for name, layers in (("encoder", model.encoder), ("decoder", model.decoder)):
        layers[0].register_forward_hook(lambda *_, name=name: calls.append(name))
    session = fed(model, text(4 * LENGTH + 2), 3, 9)
    assert calls == ["encoder"] * 4
    _ = session.log_probs
    assert calls == ["encoder"] * 5 + ["decoder"] * 2  # START, and the two tokens of the unfinished segment


def test_a_cache_leaves_the_state_as_it_was_and_lanes_of_two_can_be_chosen(model: SegmentModel) -> None:
    state = model.initial_state(2)
    for segment in full(3):
        state = model.advance(segment, state)
    before = [field.clone() for field in state]
    one, other = (text(2, seed=seed).repeat(2, 1) for seed in (1, 2))
    token_mask = torch.ones(2, 2).bool()

    def cache_of(tokens: Tensor) -> DecodingCache:
        return model.decode(tokens, token_mask, model.prefill(state, 2)[1])[1]

    mixed = select_lanes(torch.tensor([True, False]), cache_of(one), cache_of(other))
    log_probs = [model.decode(one, token_mask, cache)[0] for cache in (mixed, cache_of(one), cache_of(other))]
    assert not any(logits.requires_grad for logits in log_probs)
    assert torch.equal(log_probs[0], torch.stack((log_probs[1][0], log_probs[2][1])))
    assert not torch.equal(log_probs[1], log_probs[2])
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))


def test_bfloat16_is_close_also_where_precision_changes_on_the_way(build: Build) -> None:
    exact, rounded, mixed = build().eval(), build().bfloat16().eval(), build().float().eval()
    tokens = text(4 * LENGTH + 3)
    wanted = expected(exact, tokens)[tokens.shape[1]]
    error = (expected(rounded, tokens)[tokens.shape[1]] - wanted).abs().max()
    session = fed(mixed, tokens[:, :-2])
    with torch.autocast("cpu", torch.bfloat16):
        _ = session.log_probs
        session.feed(tokens[:, -2:-1])
        _ = session.log_probs
    session.feed(tokens[:, -1:])
    for log_probs in (fed(rounded, tokens).log_probs, session.log_probs):
        assert log_probs.dtype is torch.float32
        # about as far off as the forward pass is
        assert (log_probs - wanted).abs().max() < 2 * error + 0.05


def test_the_default_random_stream_is_left_alone(model: SegmentModel) -> None:
    before = torch.get_rng_state()
    bits(fed(model, text(7)), tokens=3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", ["advance", "prefill", "decode"])
def test_an_interruption_leaves_nothing_half_done(
    model: SegmentModel, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, untouched = (fed(model, text(13).repeat(2, 1)) for _ in range(2))
    step = getattr(model, method)

    def interrupted(*args: object) -> object:
        monkeypatch.setattr(model, method, step)
        step(*args)
        raise KeyboardInterrupt

    drawn = [sampling(each)[0] for sampling in [Sampling(seed=5)] for each in bits(untouched, tokens=LENGTH)]
    _ = session.log_probs
    monkeypatch.setattr(model, method, interrupted)
    with pytest.raises(KeyboardInterrupt):
        bits(session, tokens=LENGTH)
    tokens = torch.cat((text(13), torch.stack(drawn)[None, :]), dim=1)[:, : int(session.tokens_read[0])]
    torch.testing.assert_close(session.log_probs[0], expected(model, tokens)[tokens.shape[1]], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("tokens", "token_mask", "message"),
    [
        ([[1, 2]], None, r"tokens must be whole numbers of the shape \[2, T\], got \[1, 2\]"),
        ([[1, VOCAB], [1, 1]], None, f"tokens must be at least 0 and below vocab_size={VOCAB}, got {VOCAB}"),
        ([[1, 1], [1, -1]], None, f"tokens must be at least 0 and below vocab_size={VOCAB}, got -1"),
        ([[1, 1], [1, 1]], [[1, 1], [0, 1]], "token_mask must be True at the left"),
    ],
)
def test_bad_tokens_are_refused_and_the_session_is_unchanged(
    tokens: list[list[int]], token_mask: list[list[int]] | None, message: str
) -> None:
    session = fed(memformer().eval(), text(7).repeat(2, 1))
    before = session.log_probs
    mask = None if token_mask is None else torch.tensor(token_mask).bool()
    with pytest.raises(ValueError, match=message):
        session.feed(torch.tensor(tokens), mask)
    assert session.tokens_read.tolist() == [7, 7]
    assert torch.equal(session.log_probs, before)


def test_a_model_in_training_mode_is_refused_and_left_there() -> None:
    model = memformer()
    message = r"the model is in training mode, which applies dropout: call model.eval\(\) first"
    with pytest.raises(ValueError, match=message):
        Session(model)
    session = Session(model.eval())
    model.train()
    with pytest.raises(ValueError, match=message):
        session.feed(text(1))
    with pytest.raises(ValueError, match=message):
        _ = session.log_probs
    assert model.training


def test_lanes_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="lanes must be at least 1, got 0"):
        Session(memformer().eval(), lanes=0)


def test_a_model_without_prefill_and_decode_says_so() -> None:
    session = Session(Planted(vocab_size=VOCAB, segment_length=LENGTH).eval())
    with pytest.raises(TypeError, match="Planted does not support sessions: it implements no prefill and decode"):
        _ = session.log_probs


def test_a_larger_cache_may_be_opened_by_the_same_weights() -> None:
    weights = transformer_xl(memory_length=7).state_dict()
    model = small(type(transformer_xl()), layers=2, memory_length=12).eval()
    model.load_state_dict(weights)
    tokens = text(4 * LENGTH + 1)
    torch.testing.assert_close(
        fed(model, tokens).log_probs[0], expected(model, tokens)[tokens.shape[1]], rtol=0, atol=1e-10
    )
