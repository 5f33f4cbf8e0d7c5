"""Block-Recurrent Transformer: the update of the state vectors by hand, who sees whom, and the model without them."""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    LANES,
    LENGTH,
    VOCAB,
    block_recurrent,
    full,
    identities,
    irregular,
    losses_of,
    make_segment,
    shown,
    small,
    transformer,
)
from torch import Tensor

from memformer_pl.contract import Segment, detach
from memformer_pl.layers.block_recurrence import StateUpdate
from memformer_pl.models import BlockRecurrentTransformer, Transformer

close = torch.testing.assert_close
CONTRACT = Path(__file__).parents[1] / "contract" / "test_contract.py"


def update_by_hand(*, gate: float, states: int = 2) -> StateUpdate:
    """One head of width 2. Queries are twice what is read; ``z`` is what was found in the vectors plus ten times what
    was found in the tokens."""
    update = StateUpdate(dim=2, heads=1, states=states).double()
    with torch.no_grad():
        identities(update.to_queries)
        update.to_update.weight.copy_(torch.cat((torch.eye(2), 10 * torch.eye(2)), dim=1))
        update.to_update.bias.zero_()
        update.gate.fill_(gate)
    return update


def rows(*vectors: list[float]) -> Tensor:
    """Keys or values of one lane and one head."""
    return torch.tensor([[vectors]]).double()


def test_the_fixed_gate_by_hand() -> None:
    """g = sigmoid(log 3) = 3/4. All keys are alike, so a vector finds means: (3, 0) in the vectors, (0, 2) in the
    tokens; z = (3, 20). From (4, 8): (3 + 3/4, 6 + 5). From (0, 0): (3/4, 5)."""
    update = update_by_hand(gate=math.log(3))
    states, alike = torch.tensor([[[4.0, 8.0], [0.0, 0.0]]]).double(), rows([0.0, 0.0], [0.0, 0.0])
    of_states, of_tokens = (alike, rows([2.0, 0.0], [4.0, 0.0])), (alike, rows([0.0, 1.0], [0.0, 3.0]))
    after = update(states, states, of_states, of_tokens, torch.ones(1, 2).bool())
    close(after, torch.tensor([[[3.75, 11.0], [0.75, 5.0]]]).double())


def test_attention_of_a_state_vector_by_hand() -> None:
    """The query (sqrt 2, 0) scores the keys (log 3, 0) and (0, 5) by log 3 and 0: weights 3/4 and 1/4. With the gate
    closed to the old state, the next one is z: (8 * 3/4, 0) + 10 (0, 4 * 1/4)."""
    update = update_by_hand(gate=-torch.inf, states=1)
    identified = torch.tensor([[[math.sqrt(2), 0.0]]]).double()
    keys = rows([math.log(3), 0.0], [0.0, 5.0])
    of_states, of_tokens = (keys, rows([8.0, 0.0], [0.0, 0.0])), (keys, rows([0.0, 0.0], [0.0, 4.0]))
    seen = shown(update.weights), shown(update.token_weights)
    after = update(torch.full((1, 1, 2), 100.0).double(), identified, of_states, of_tokens, torch.ones(1, 2).bool())
    close(after, torch.tensor([[[6.0, 10.0]]]).double())
    for weights in seen:
        close(weights[0], rows([0.75, 0.25]))


def test_tokens_that_do_not_exist_are_not_seen_by_state_vectors() -> None:
    update = update_by_hand(gate=-torch.inf, states=1)
    states, keys = torch.zeros(1, 1, 2).double(), rows([0.0, 0.0], [0.0, 0.0], [0.0, 0.0])
    of_states = keys[:, :, :1], keys[:, :, :1]
    of_tokens = keys, rows([5.0, 0.0], [1.0, 0.0], [9.0, 0.0])
    after = update(states, states, of_states, of_tokens, torch.tensor([[True, True, False]]))
    close(after, torch.tensor([[[30.0, 0.0]]]).double())


def test_an_untrained_gate_keeps_three_quarters_and_writes_little() -> None:
    model = BlockRecurrentTransformer(vocab_size=VOCAB, dim=64, heads=4, layers=2, states=8, dropout=0.0)
    close(model.update.gate.sigmoid(), torch.full((64,), 0.7310586))
    assert 0.09 < model.update.initial.std() < 0.11
    assert 0.09 < model.update.to_update.weight.std() * 128**0.5 < 0.11
    assert 0.9 < model.update.identities.std() < 1.1


def test_state_vectors_that_are_equal_ask_for_different_things() -> None:
    model = block_recurrent()
    with torch.no_grad():
        model.update.initial.copy_(model.update.initial[:1].expand(3, -1))
    after = model(full(1)[0], model.initial_state(2))[1].states
    assert not torch.isclose(after[:, 0], after[:, 1]).all()
    with torch.no_grad():
        model.update.identities.copy_(model.update.identities[:1].expand(3, -1))
    after = model(full(1)[0], model.initial_state(2))[1].states
    close(after, after[:, :1].expand(-1, 3, -1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("layers", "recurrent"), [(1, 0), (2, 0), (3, 0), (4, 1), (12, 9)])
def test_the_third_layer_from_the_last_reads_the_state_vectors(layers: int, recurrent: int) -> None:
    blocks = block_recurrent(layers=layers).blocks
    assert [n for n, block in enumerate(blocks) if block.reads_states] == [recurrent]


def test_tokens_see_the_state_vectors_as_the_segment_before_left_them() -> None:
    """Other vectors change every loss of their segment; what a segment writes changes none of its own."""
    model, (first, second) = block_recurrent(), full(2)
    _, state = model(first, model.initial_state(2))
    other = state._replace(states=state.states.flip(1) + 1)
    assert (model(second, state)[0].token_losses != model(second, other)[0].token_losses).all()
    before = losses_of(model, [first, second])
    with torch.no_grad():
        model.update.to_update.weight.mul_(3)
        model.update.gate.sub_(2)
    after = losses_of(model, [first, second])
    assert torch.equal(after[0], before[0])
    assert (after[1] != before[1]).all()


class ReadsAhead(BlockRecurrentTransformer):
    """Reads what its own segment writes."""

    def _run_blocks(self, entering: Any, state: Any, *, blocks: int) -> Any:
        states = super()._run_blocks(entering, state, blocks=blocks)[2]
        return super()._run_blocks(entering, state._replace(states=states), blocks=blocks)


def reads_ahead() -> BlockRecurrentTransformer:
    return small(ReadsAhead, layers=4, states=3, window=7)


def gates_all() -> BlockRecurrentTransformer:
    """Multiplies what tokens read by a gate that is a mean over all tokens of the segment, as public code of another
    model (LM2) does."""
    model = block_recurrent()
    model.blocks[model.recurrent].state_attention.register_forward_hook(
        lambda module, args, update: update * args[0].mean(1, keepdim=True).sigmoid()
    )
    return model


def contract() -> Any:
    """The contract's own tests."""
    spec = importlib.util.spec_from_file_location("contract_tests", CONTRACT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("peeking", [reads_ahead, gates_all])
@pytest.mark.parametrize("t", range(3))
def test_the_contract_finds_a_peek_at_later_tokens_through_a_state_or_a_gate(
    peeking: Callable[[], BlockRecurrentTransformer], t: int
) -> None:
    check = contract().test_a_token_changes_no_loss_before_it_and_every_loss_behind_it_in_its_segment
    check(block_recurrent(), t)
    with pytest.raises(AssertionError):
        check(peeking(), t)


def blind(model: BlockRecurrentTransformer) -> BlockRecurrentTransformer:
    """The model without what it reads from state vectors."""
    with torch.no_grad():
        model.blocks[model.recurrent].state_attention.to_out.weight.zero_()
    return model


def twin(model: BlockRecurrentTransformer, **sizes: int) -> Transformer:
    """A Transformer of the same weights."""
    other = transformer(layers=4, **sizes)
    missing, unexpected = other.load_state_dict(model.state_dict(), strict=False)
    assert missing == []
    assert all(name.startswith("update.") or ".state_attention." in name for name in unexpected)
    return other


def pieces(document: Tensor, *lengths: int) -> list[Segment]:
    """One document ``[B, L]`` in segments of these lengths."""
    parts = document.split(lengths, dim=1)
    starts = [torch.full((len(document),), n == 0) for n in range(len(parts))]
    return [Segment(part, torch.ones_like(part).bool(), start) for part, start in zip(parts, starts, strict=True)]


@pytest.mark.parametrize("lengths", [(5, 5, 5, 3), (1, 5, 2, 5, 5), (2,) * 9])
def test_without_state_vectors_a_document_in_segments_costs_what_a_transformer_reads_at_once(
    lengths: tuple[int, ...],
) -> None:
    """Where the window holds the document; to rounding in single precision, in which rotations are."""
    document = torch.cat([segment.tokens for segment in full(4)], dim=1)[:, :18]
    model = blind(block_recurrent(window=17))
    whole = losses_of(twin(model, segment_length=18), pieces(document, 18))[0]
    close(torch.cat(losses_of(model, pieces(document, *lengths)), dim=1), whole, rtol=1e-6, atol=0)
    short = torch.cat(losses_of(blind(block_recurrent(window=3)), pieces(document, *lengths)), dim=1)
    assert not torch.allclose(short, whole)
    seeing = torch.cat(losses_of(block_recurrent(window=17), pieces(document, *lengths)), dim=1)
    assert (seeing != whole).all()


def test_without_state_vectors_and_window_a_first_segment_is_that_of_a_transformer() -> None:
    model = blind(block_recurrent(window=0))
    for segment in irregular(4):
        first = segment._replace(document_start=torch.ones(LANES).bool())
        close(losses_of(model, [first])[0], losses_of(twin(model), [first])[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize(("window", "reach"), [(0, 0), (5, 3)])
def test_a_window_reaches_back_by_one_segment_in_each_layer_and_state_vectors_to_the_first(
    window: int, reach: int
) -> None:
    """Of three layers. The last token of a segment is the first input of the next one, so another one is changed."""

    def changed(model: BlockRecurrentTransformer) -> list[bool]:
        segments = full(6)
        before = losses_of(model, segments)
        segments[0].tokens[:, 1] = (segments[0].tokens[:, 1] + 1) % VOCAB
        return [bool((a != b).any()) for a, b in zip(losses_of(model, segments), before, strict=True)]

    without = changed(blind(block_recurrent(layers=3, window=window)))
    assert without == [True] * (1 + reach) + [False] * (5 - reach)
    assert changed(block_recurrent(layers=3, window=window)) == [True] * 6


def test_the_gradient_crosses_segments_through_state_vectors_and_through_the_window() -> None:
    for build, reached in ((block_recurrent, [True] * 3), (lambda: blind(block_recurrent()), [False, True, True])):
        model, segments = build(), full(3)
        state = detach(model(segments[0], model.initial_state(2))[1])
        entering = [field.requires_grad_() for field in state[:3]]
        _, later = model(segments[1], state)
        loss = model(segments[2], later)[0].token_losses.sum()
        grads = torch.autograd.grad(loss, entering, allow_unused=True, materialize_grads=True)
        assert [bool(grad.any()) for grad in grads] == reached


def test_the_initial_state_vectors_are_learned_also_where_a_document_starts_in_the_middle() -> None:
    model = block_recurrent()
    state = detach(model(full(1)[0], model.initial_state(2))[1])
    for start, reached in (([0, 0], False), ([0, 1], True)):
        output, _ = model(make_segment([LENGTH, LENGTH], document_start=start), state)
        (grad,) = torch.autograd.grad(output.token_losses.sum(), model.update.initial)
        assert bool(grad.any()) == reached


def test_the_window_holds_keys_without_positions_of_the_last_tokens() -> None:
    model, segments = block_recurrent(window=7), irregular(2)
    state = model.initial_state(LANES)
    entered: list[Tensor] = []
    model.blocks[0].self_norm.register_forward_hook(lambda norm, args, x: entered.append(x.detach()))
    for segment in segments:
        _, state = model(segment, state)
    attention = model.blocks[0].self_attention
    rows = torch.cat([x[0] for x in entered])[-7:]
    key = (rows @ attention.to_query_key_value.weight[8:16].T).view(7, 2, 4).transpose(0, 1)
    close(state.keys[0, 0], key.detach(), rtol=1e-12, atol=1e-12)
    assert state.filled.tolist() == [7, 7, 4, 5]  # of 10, 8, 4 after a start, and 5 tokens


def test_a_lane_carries_state_vectors_and_keys_and_values_of_its_window() -> None:
    model = block_recurrent(dim=12, heads=3, layers=2, states=5, window=6)
    shapes = [[4, 5, 12], [4, 2, 3, 6, 4], [4, 2, 3, 6, 4], [4], [4]]
    assert [list(field.shape) for field in model.initial_state(4)] == shapes


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"states": 0}, "states must be at least 1, got 0"),
        ({"window": -1}, "window must be at least 0, got -1"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"dim": 6}, "need heads of an even width, got width=3"),
    ],
)
def test_impossible_sizes_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        block_recurrent(**sizes)
