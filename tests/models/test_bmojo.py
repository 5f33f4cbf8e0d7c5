"""B'MOJO: cases by hand, which tokens are stored, what it is without a store and without fading."""

import math
from functools import partial
from pathlib import Path
from typing import Any, get_args

import jaxtyping
import pytest
import torch
from models import (
    LANES,
    LENGTH,
    assert_same,
    bmojo,
    cost,
    full,
    identities,
    irregular,
    losses_of,
    make_segment,
    outcome,
    plain_loop,
    shown,
    split_mix,
    train_on,
    untouched,
    whole_document,
)
from torch import Tensor, nn
from torch.nn import functional as F

from memformer_pl.contract import ABSENT, Segment, state_bytes
from memformer_pl.errors import LARGEST_WIDTH, UsageError
from memformer_pl.gradients.rollout import GRADIENTS
from memformer_pl.layers import BlockConfig, RotaryPositions
from memformer_pl.layers.eidetic_memory import (
    EideticAttention,
    EideticBlock,
    EideticCarried,
    FadingMemory,
    Picks,
    Rows,
    held_after_each,
)
from memformer_pl.layers.sliding_attention import SlidingAttention, Window
from memformer_pl.models import BMojo
from memformer_pl.training.flops import count_flops

close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
LAYERS, HEADS, WIDTH, DIM, WINDOW, STORED = 2, 2, 4, 8, 3, 2
PICKS = get_args(Picks)


def rows_by_hand(keys: list[float], values: list[float], distances: list[int]) -> Tensor:
    """Keys and values, of one head of width 2, of tokens at these distances from a query ``(sqrt(2), 0)`` at place 0,
    so that the scores are ``keys``."""
    turned = RotaryPositions(width=2, first=0, last=8)(torch.tensor([distances]))
    plain = torch.tensor([[key, 0.0] for key in keys])[None, :, None]
    return torch.cat((turned.turn(plain)[:, :, 0], torch.tensor([[value, 0.0] for value in values])[None]), dim=2)


@pytest.mark.parametrize(("steps", "stored", "expected"), [(1, False, 1.75), (2, False, 3.375), (2, True, 1.1875)])
def test_three_sources_in_one_softmax_by_hand(steps: int, stored: bool, expected: float) -> None:
    layer = EideticAttention(dim=2, heads=1, window=2, segment_length=1)
    identities(layer.to_query_key_value, layer.to_out)
    log = math.log
    rows = Rows(
        rows_by_hand([9, 0, log(3)], [9, 1, 2], [2, 1, 0]),
        rows_by_hand([9, 9, log(4)], [9, 9, 5], [4, 3, 2]),
        rows_by_hand([log(8)], [-1], [4]),
    )
    held = torch.tensor([[[True, False]]]) if stored else None
    out = layer.look(torch.tensor([[[2**0.5, 0.0]]]), rows, torch.tensor([steps]), held)
    torch.testing.assert_close(out[0, 0, 0], torch.tensor(expected), rtol=1e-6, atol=0)


def test_a_window_of_three_sees_three_tokens_and_three_faded_ones_before_them() -> None:
    layer = EideticAttention(dim=2, heads=1, window=3, segment_length=7)
    recent, faded = layer.visible(torch.tensor([0]), 7)[0].unflatten(1, (2, 10)).unbind(1)

    def seen(token: int) -> tuple[list[int], list[int]]:
        return (recent[token].nonzero()[:, 0] - 3).tolist(), (faded[token].nonzero()[:, 0] - 6).tolist()

    assert seen(6) == ([4, 5, 6], [1, 2, 3])
    assert seen(3) == ([1, 2, 3], [0])
    assert seen(1) == ([0, 1], [])


def block_of_one_value(*, window: int, stored: int) -> EideticBlock:
    """A block without norm whose two channels are alike: h = h / 2 + x / 2, y = h, and a prediction of y / 2."""
    config = BlockConfig(dim=2, heads=1, dropout=0.0)
    block = EideticBlock(config, window=window, stored=stored, picks="innovation", layer=0, segment_length=8)
    block.memory_norm = nn.Identity()  # type: ignore[assignment]
    nn.init.zeros_(block.fading.to_decay.weight)
    nn.init.zeros_(block.fading.to_decay.bias)
    identities(block.fading.to_hidden, block.fading.to_out)
    identities(block.predict, scale=0.5)
    return block


def begun(*, window: int, stored: int, dim: int = 2) -> EideticCarried:
    """What a block carries before a document."""
    rows = (torch.zeros(1, n, dim) for n in (window, 2 * window, stored))
    empty, errors = torch.full((1, stored), ABSENT), torch.zeros(1, stored + window)
    return EideticCarried(torch.zeros(1, dim), *rows, empty, errors, torch.zeros(1).long())


@pytest.mark.parametrize("length", [1, 2, 3, 6])
def test_errors_and_what_is_stored_by_hand(length: int) -> None:
    block, carried = block_of_one_value(window=2, stored=2), begun(window=2, stored=2)
    errors, held = shown(block.innovation), shown(block.held)
    x = torch.tensor([1.0, 1, 4, 1, 1, 1])[None, :, None].expand(1, 6, 2)
    stored = []
    for part in x.split(length, dim=1):
        places = torch.cat((carried.places, carried.steps[:, None] + torch.arange(length) - 2), dim=1)[0]
        _, (*fields, _) = block(part, carried, torch.ones(1, length).bool())
        carried = EideticCarried(*fields)
        stored += [places[seen].tolist() for seen in held.pop()[0]]
    expected = torch.tensor([1, 0.5625, 13.1406, 0.0352, 0.0244, 0.1077])
    torch.testing.assert_close(torch.cat(errors, dim=1)[0], expected, rtol=0, atol=5e-5)
    assert stored == [[], [], [0], [0, 1], [0, 2], [0, 2]]
    assert carried.places.tolist() == [[0, 2]]
    assert carried.stored[0, :, 0].tolist() == [1, 4]


def places_by_hand(errors: list[float], place: int, *, picks: str, layer: int, window: int, stored: int) -> list[int]:
    """The places of the tokens that a token at ``place`` sees as stored ones."""
    rank = {
        "innovation": lambda n: -errors[n],
        "first": lambda n: n,
        "recent": lambda n: -n,
        "random": lambda n: -split_mix(layer, n),
    }[picks]
    return sorted(sorted(range(place - window + 1), key=lambda n: (rank(n), n))[:stored])


def turned(x: Tensor, place: int) -> Tensor:
    """Vectors of a head at a place: each channel of the first half turns with one of the second."""
    angle = place * 10_000.0 ** -(torch.arange(0, WIDTH, 2) / WIDTH)
    a, b, cos, sin = *x.chunk(2), angle.cos(), angle.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin))


def faded_by_hand(layer: FadingMemory, x_LD: Tensor) -> list[Tensor]:
    """What a fading memory returns before each token and after the last."""
    hidden = torch.zeros(DIM).double()
    faded = [layer.to_out.weight @ hidden]
    for x in x_LD:
        decay = (layer.to_decay.weight @ x + layer.to_decay.bias).sigmoid()
        hidden = decay * hidden + (1 - decay) * (layer.to_hidden.weight @ x)
        faded.append(layer.to_out.weight @ hidden)
    return faded


def block_by_hand(block: EideticBlock, x_LD: Tensor) -> tuple[Tensor, list[Tensor], list[int]]:
    """What leaves a block, the errors of the prediction, and the places that the last token sees as stored."""
    layer, normed = block.attention, block.memory_norm(x_LD)
    before, *faded = faded_by_hand(block.fading, normed)
    errors, updates, places = [], [], list[int]()
    for n in range(len(normed) if block.predicts else 0):
        wrong = normed[n].detach() - block.predict.weight @ (faded[n - 1] if n else before).detach()
        errors.append(wrong.square().mean())

    def mapped(x: Tensor) -> Any:
        return (layer.to_query_key_value.weight @ x).view(3, HEADS, WIDTH)

    for n in range(len(normed)):
        plain = [float(error.detach()) for error in errors]
        sizes = {"window": block.window, "stored": block.stored}
        if block.stored:
            places = places_by_hand(plain, n, picks=block.picks, layer=block.layer, **sizes)
        found = []
        for h in range(HEADS):
            query, scores, values = mapped(normed[n])[0, h], [], []
            for other in range(max(n - 2 * block.window + 1, 0), n + 1):
                seen = normed[other] if other > n - block.window else faded[other]
                scores.append(turned(query, n) @ turned(mapped(seen)[1, h], other))
                values.append(mapped(seen)[2, h])
            for other in places:
                scores.append(turned(query, 2 * block.window) @ mapped(normed[other])[1, h])
                values.append(mapped(normed[other])[2, h])
            found.append((torch.stack(scores) / WIDTH**0.5).softmax(0) @ torch.stack(values))
        updates.append(layer.to_out.weight @ torch.cat(found))
    x = x_LD + torch.stack(updates)
    return x + block.ffn(block.ffn_norm(x)[None])[0], errors, places


def document(length: int) -> Segment:
    """One segment of one lane."""
    tokens = torch.randint(11, (1, length), generator=torch.Generator().manual_seed(3))
    return Segment(tokens, torch.ones_like(tokens).bool(), torch.tensor([True]))


@pytest.mark.parametrize("options", [{"stored": 0}, *({"picks": picks} for picks in PICKS)], ids=str)
def test_fourteen_tokens_and_their_gradients_by_the_equations(options: dict[str, Any]) -> None:
    model, segment = bmojo(segment_length=14, **options), document(14)
    x, errors, places = model.embedding(segment.tokens[:, :13])[0], [], []
    for block in model.blocks:
        x, missed, seen = block_by_hand(block, x)
        errors += missed
        places.append(seen)
    expected = F.cross_entropy(model.embedding.logits(x), segment.tokens[0], reduction="none")
    output, state = model(segment, model.initial_state(1))
    close(output.token_losses[0], expected)
    auxiliary = torch.stack(errors).mean() if errors else torch.zeros(()).double()
    close(output.auxiliary_loss, auxiliary)
    assert state.places[0].tolist() == (places if model.stored else [[], []])
    assert state.steps.tolist() == [[14, 14]]
    assert state.last.tolist() == [segment.tokens[0, 13]]
    parameters = list(model.parameters())
    close(
        torch.autograd.grad(cost(output), parameters),
        torch.autograd.grad(expected.sum() + auxiliary, parameters),
    )


@pytest.mark.parametrize("values", [2, 100])
def test_held_are_the_best_so_far_and_the_earlier_of_equals(values: int) -> None:
    """With many ties, and with few."""
    rows, priority = 3, torch.randint(values, (LANES, 20), generator=torch.Generator().manual_seed(0))
    places = torch.arange(20).expand(LANES, 20) - torch.tensor([0, 2, 5, 30])[:, None]
    held = held_after_each(priority, places.clamp(min=ABSENT), rows=rows)
    for lane in range(LANES):
        for time in range(20):
            come = [n for n in range(time + 1) if places[lane, n] >= 0]
            best = sorted(sorted(come, key=lambda n: (-int(priority[lane, n]), n))[:rows])
            assert held[lane, time].nonzero()[:, 0].tolist() == best


def test_with_a_fading_memory_that_returns_its_input_it_is_a_sliding_window_of_twice_the_size() -> None:
    (block,) = bmojo(stored=0, layers=1).blocks
    with torch.no_grad():
        block.fading.to_decay.weight.zero_()
        block.fading.to_decay.bias.fill_(-1000.0)
        block.ffn.down.weight.zero_()
        block.ffn.down.bias.zero_()
    identities(block.fading.to_hidden, block.fading.to_out)
    twin = SlidingAttention(dim=DIM, heads=HEADS, window=2 * WINDOW - 1, persistent=0, segment_length=LENGTH).double()
    twin.load_state_dict(block.attention.state_dict(), strict=False)
    nothing = torch.zeros(LANES, HEADS, 2 * WINDOW - 1, WIDTH).double()
    window = Window(nothing, nothing, torch.zeros(LANES).long())
    carried = tuple(field[:, 0] for field in bmojo(stored=0).initial_state(LANES)[:-1])
    for seed, lengths in enumerate([(5, 5, 2, 5), (5, 1, 5, 3), (5, 5, 5, 5), (2, 5, 1, 5)]):
        x = torch.randn(LANES, LENGTH, DIM, generator=torch.Generator().manual_seed(seed)).double()
        token_mask = torch.arange(LENGTH) < torch.tensor(lengths)[:, None]
        out, carried = block(x, carried, token_mask)
        update, window = twin.look(block.memory_norm(x), window, token_mask)
        close((out - x)[token_mask], update[token_mask])


@torch.no_grad()
def test_a_store_adds_nothing_until_the_first_token_leaves_the_window() -> None:
    model, plain, segment = bmojo(layers=1, segment_length=8), bmojo(layers=1, stored=0, segment_length=8), document(8)
    plain.load_state_dict(model.state_dict(), strict=False)
    (with_store,), (without,) = (losses_of(each, [segment]) for each in (model, plain))
    same = (with_store == without)[0].tolist()
    assert same == [True] * WINDOW + [False] * (8 - WINDOW)


def test_without_a_store_there_is_neither_a_prediction_nor_what_it_would_carry() -> None:
    model = bmojo(stored=0)
    assert not any("predict" in name for name, _ in model.named_parameters())
    output, state = model(full(1)[0], model.initial_state(2))
    assert output.auxiliary_loss == 0
    assert state.stored.numel() == state.places.numel() == state.errors.numel() == 0


@pytest.mark.parametrize("stored", [0, STORED, 20])
@pytest.mark.parametrize("picks", PICKS)
def test_a_document_in_segments_is_one_pass(picks: Picks, stored: int) -> None:
    segments, build = full(4), partial(bmojo, picks=picks, stored=stored)
    (together,) = losses_of(build(segment_length=4 * LENGTH), [whole_document(segments)])
    # rotations are in float32, and places count from the start of a segment
    close(torch.cat(losses_of(build(), segments), dim=1), together, rtol=1e-6, atol=1e-6)


def test_the_mean_error_of_a_document_does_not_depend_on_how_it_is_cut() -> None:
    segments = full(4)
    model, lost = bmojo(), []
    state = model.initial_state(2)
    for segment in segments:
        output, state = model(segment, state)
        lost.append(output.auxiliary_loss)
    long = bmojo(segment_length=4 * LENGTH)
    close(
        torch.stack(lost).mean(),
        long(whole_document(segments), long.initial_state(2))[0].auxiliary_loss,
        rtol=1e-6,
        atol=0,
    )


@pytest.mark.parametrize("options", [{"stored": 0}, *({"picks": picks} for picks in PICKS)], ids=str)
def test_so_are_its_gradients_so_nothing_that_is_carried_has_lost_its_graph(options: dict[str, Any]) -> None:
    model, segments, total = bmojo(**options), full(4), torch.zeros(()).double()
    state = model.initial_state(2)
    for segment in segments:
        output, state = model(segment, state)
        total = total + output.token_losses.sum()
    long = bmojo(segment_length=4 * LENGTH, **options)
    together = long(whole_document(segments), long.initial_state(2))[0].token_losses.sum()
    for name, parameter in model.named_parameters():
        if "predict" not in name:
            (apart,) = torch.autograd.grad(total, [parameter], retain_graph=True)
            (at_once,) = torch.autograd.grad(together, [long.get_parameter(name)], retain_graph=True)
            close(apart, at_once, rtol=1e-5, atol=1e-6 * float(at_once.abs().max()))


@pytest.mark.parametrize("picks", PICKS)
def test_what_is_carried_is_the_state_behind_the_last_token_that_is_there(picks: Picks) -> None:
    model, lengths = bmojo(picks=picks), (5, 1, 3, 4)
    ragged = make_segment(lengths)
    next_state = model.advance(ragged, model.initial_state(LANES))
    for lane, length in enumerate(lengths):
        tokens = ragged.tokens[lane : lane + 1, :length]
        alone = Segment(tokens, torch.ones_like(tokens).bool(), torch.tensor([True]))
        for got, expected in zip(next_state, model.advance(alone, model.initial_state(1)), strict=True):
            close(got[lane], expected[0])


@pytest.mark.parametrize("picks", PICKS)
def test_the_places_of_what_is_stored_are_those_of_the_rule(picks: Picks) -> None:
    model, segments = bmojo(picks=picks, stored=4), full(6, lanes=1)
    errors = [shown(block.innovation) for block in model.blocks]
    state = model.initial_state(1)
    for segment in segments:
        state = model(segment, state)[1]
    for layer in range(LAYERS):
        seen = torch.cat(errors[layer], dim=1)[0].tolist() if picks == "innovation" else []
        sizes = {"window": WINDOW, "stored": 4}
        assert state.places[0, layer].tolist() == places_by_hand(
            seen, 6 * LENGTH - 1, picks=picks, layer=layer, **sizes
        )


def test_places_by_chance_differ_between_layers_and_not_between_lanes() -> None:
    model = bmojo(picks="random", stored=4)
    state = model.initial_state(2)
    for segment in full(8):
        state = model.advance(segment, state)
    assert torch.equal(state.places[0], state.places[1])
    assert not torch.equal(state.places[0, 0], state.places[0, 1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("picks", ["innovation", "random"])
def test_both_passes_of_replay_store_the_same_tokens(picks: Picks, dtype: torch.dtype) -> None:
    """With the same numbers, bit for bit, and by what they are compared; so they see the same ones too."""
    torch.manual_seed(0)
    model = BMojo(
        vocab_size=11, dim=32, heads=4, layers=3, segment_length=16, window=8, stored=6, picks=picks, dropout=0.2
    ).to(dtype)
    segments, first, second = [], [], []
    for n in range(9):
        tokens, there = (
            torch.randint(11, (LANES, 16)),
            torch.arange(16) < torch.tensor([16, 16, 5 * n % 17, 16])[:, None],
        )
        starts = torch.tensor([n == 0, n == 0, n == 0, n % 4 == 0])
        segments.append(Segment(tokens, there, starts, seeds=torch.tensor([n])))

    def step(segment: Segment, state: Any) -> Any:
        output, after = model(segment, state)
        second.append([field.detach().clone() for field in after])
        return cost(output), after

    def advance(segment: Segment, state: Any) -> Any:
        first.append(model.advance(segment, state))
        return first[-1]

    GRADIENTS["replay"](step, segments, model.initial_state(LANES), advance=advance)
    assert len(first) >= 8
    assert int(first[-1].places.min()) >= 0
    assert len(first[-1].places.unique()) > 6
    for once, again in zip(first, reversed(second[-len(segments) :]), strict=False):
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("gradient", sorted(GRADIENTS))
@pytest.mark.parametrize("options", [{}, {"stored": 0}, {"picks": "recent"}], ids=str)
def test_every_gradient_but_truncated_gives_the_same(gradient: str, options: dict[str, Any]) -> None:
    def case() -> Any:
        model = bmojo(dropout=0.2, **options)
        return train_on(model, irregular(7), model.initial_state(LANES))

    got, expected = outcome(GRADIENTS[gradient], case), outcome(plain_loop, case)
    if gradient == "truncated":
        assert torch.equal(got.loss, expected.loss)
        name = "blocks.0.fading.to_hidden.weight"
        assert not torch.allclose(got.grads[name], expected.grads[name])
    else:
        assert_same(got, expected)


def test_the_gradient_reaches_through_all_that_is_carried_but_what_chooses() -> None:
    model, segments = bmojo(), full(4, lanes=1)
    state = model.initial_state(1)
    for segment in segments[:3]:
        state = model.advance(segment, state)
    carried = state._make(field.detach().requires_grad_(field.is_floating_point()) for field in state)
    held = [shown(block.held) for block in model.blocks]
    output, _ = model(segments[3], carried)
    hidden, recent, faded, stored = torch.autograd.grad(cost(output), carried[:4], retain_graph=True)
    assert hidden.any(2).all()
    for rows in (recent[:, :, 1:], faded[:, :, 1:]):
        assert rows.any(3).all()
    seen = torch.stack([of_layer[0][0, :, :STORED].any(0) for of_layer in held])
    assert seen.any(1).all()
    assert torch.equal(stored[0].any(2), seen)
    (errors,) = torch.autograd.grad(cost(output), [carried.errors], allow_unused=True)
    assert errors is None or not errors.any()


def test_the_prediction_learns_from_its_error_alone_and_nothing_else_does() -> None:
    model = bmojo()
    state = model.initial_state(2)
    losses = lost = torch.zeros(())
    for segment in full(4):
        output, state = model(segment, state)
        losses, lost = losses + output.token_losses.sum(), lost + output.auxiliary_loss
    names, parameters = zip(*model.named_parameters(), strict=True)
    by_losses = torch.autograd.grad(losses, parameters, allow_unused=True, retain_graph=True)
    by_errors = torch.autograd.grad(lost, parameters, allow_unused=True)
    assert lost > 0
    for name, loss_grad, error_grad in zip(names, by_losses, by_errors, strict=True):
        predicts = "predict" in name
        assert (loss_grad is None or not loss_grad.any()) == predicts
        assert (error_grad is not None and bool(error_grad.any())) == predicts


def test_absent_tokens_do_not_count_in_the_mean_error() -> None:
    model, ragged = bmojo(), make_segment([5, 2, 0, 1])
    errors = [shown(block.innovation) for block in model.blocks]
    output, _ = model(ragged, model.initial_state(LANES))
    there = torch.stack([seen[0][ragged.token_mask] for seen in errors])
    close(output.auxiliary_loss, there.mean())
    nothing, _ = model(make_segment([0] * LANES), model.initial_state(LANES))
    assert nothing.auxiliary_loss == 0


def test_a_token_is_known_for_as_long_as_the_state_is_carried() -> None:
    assert untouched(bmojo(), changed=0) == [False] * 5
    assert untouched(bmojo(), changed=2, token=LENGTH - 1) == [True, True, False, False, False]


def test_channels_begin_to_forget_within_two_to_512_tokens() -> None:
    memory = BMojo(vocab_size=5, dim=16, heads=2, layers=1).blocks[0].fading
    scales = 1 / (1 - memory.to_decay.bias.detach().double().sigmoid())
    torch.testing.assert_close(scales[[0, -1]], torch.tensor([2.0, 512]).double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(scales[1:] / scales[:-1], scales.new_full((15,), 256 ** (1 / 15)), rtol=1e-4, atol=0)


def test_an_absent_token_leaves_a_fading_memory_bit_for_bit() -> None:
    layer = bmojo().blocks[0].fading
    hidden, x = torch.randn(2, DIM).double(), torch.randn(2, LENGTH, DIM).double()
    there = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    _, after = layer(x, hidden, there)
    assert torch.equal(after[1], hidden[1])
    assert torch.equal(after[0], layer(x[:, :2], hidden, there[:, :2])[1][0])


@pytest.mark.parametrize(("picks", "errors"), [("innovation", STORED + WINDOW), ("recent", 0)])
def test_a_lane_carries_two_windows_and_what_is_stored(picks: Picks, errors: int) -> None:
    state = bmojo(layers=3, picks=picks).initial_state(2)
    assert state_bytes(state) == 3 * ((1 + 3 * WINDOW + STORED) * DIM + STORED + errors + 1) * 8 + 8
    assert state.last.tolist() == [ABSENT] * 2
    assert (state.places == ABSENT).all()


def test_what_chooses_is_in_single_precision_where_the_weights_are_in_half() -> None:
    model = bmojo().bfloat16()
    output, state = model(full(1)[0], model.initial_state(2))
    assert [field.dtype for field in state[:4]] == [torch.float32, *[torch.bfloat16] * 3]
    assert state.errors.dtype == torch.float32
    assert output.token_losses.isfinite().all()


def test_absent_tokens_draw_no_gradient_that_is_not_finite() -> None:
    model = bmojo()
    output, state = model(make_segment([1, 0, 2, 0]), model.initial_state(LANES))
    (cost(output) + state.hidden.sum() + state.recent.sum() + state.faded.sum() + state.stored.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_probes_show_weights_errors_and_what_is_held() -> None:
    model = bmojo()
    block = model.blocks[1]
    weights, errors, held = shown(block.attention.weights), shown(block.innovation), shown(block.held)
    model(make_segment([5, 2]), model.initial_state(2))
    assert weights[0].shape == (2, HEADS, LENGTH, 2 * (WINDOW + LENGTH) + STORED + LENGTH)
    close(weights[0].sum(3), torch.ones(2, HEADS, LENGTH).double())
    assert errors[0].shape == (2, LENGTH)
    assert held[0].shape == (2, LENGTH, STORED + LENGTH)
    assert held[0].sum(2)[0].tolist() == [0, 0, 0, 1, 2]


@pytest.mark.parametrize("options", [{}, {"stored": 0}, {"picks": "first"}], ids=str)
def test_its_operations_are_those_of_the_formula(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "experiments" / "benchmarks")
    from flops import formula

    model = bmojo(**options)
    assert count_flops(model, lanes=3) == formula(model, lanes=3)
    assert count_flops(model, lanes=3, advance=True) < count_flops(model, lanes=3)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"window": LARGEST_WIDTH + 1}, "window must be at most 16,777,216, got 16777217"),
        ({"stored": -1}, "stored must be at least 0, got -1"),
        ({"heads": 3}, "heads must divide dim, got heads=3 and dim=8"),
        ({"heads": 8}, "rotary positions need heads of an even width, got width=1: choose dim / heads even"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
    ],
)
def test_a_bad_option_is_refused_with_its_name_and_value(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        bmojo(**bad)


def test_another_rule_is_refused_with_those_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # its check of types would come first
    with pytest.raises(UsageError, match="picks must be one of innovation, first, random, recent, got 'surprise'"):
        bmojo(picks="surprise")
