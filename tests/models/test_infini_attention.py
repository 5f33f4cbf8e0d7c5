"""Infini-attention: what memory returns, by hand; what the model is without memory; what is read, and what written."""

import pytest
import torch
from models import LANES, LENGTH, VOCAB, full, infini_attention, irregular, losses_of, make_segment, shown, transformer
from torch import Tensor, nn

from memformer_pl.contract import State, detach
from memformer_pl.layers import BlockConfig, Positions
from memformer_pl.layers.compressive_memory import (
    CompressiveAttention,
    CompressiveBlock,
    Stored,
    features,
    recall,
)
from memformer_pl.models import InfiniAttention, Transformer

close = torch.testing.assert_close


def attention(*, delta: bool) -> CompressiveAttention:
    return CompressiveAttention(dim=2, heads=1, delta=delta).double()


def nothing() -> Stored:
    return Stored(torch.zeros(1, 1, 2, 2).double(), torch.zeros(1, 1, 2).double())


def written(layer: CompressiveAttention, stored: Stored, pairs: list[tuple[list[float], list[float]]]) -> Stored:
    """Memory after a segment with these keys and values."""
    keys, values = (torch.tensor(vectors).double()[None, None] for vectors in zip(*pairs, strict=True))
    return layer.write(keys, values, stored, torch.ones(1, len(pairs)).bool())


def read(stored: Stored, *queries: list[float]) -> Tensor:
    """What memory returns for each query."""
    return recall(features(torch.tensor(queries).double()[None, None]), stored)[0][0, 0]


def test_features_are_elu_plus_one() -> None:
    close(features(torch.tensor([[[[2.0, 0.0, -1.0, -100.0]]]])), torch.tensor([[[[3.0, 1.0, 0.3678795, 0.0]]]]))


@pytest.mark.parametrize("delta", [False, True])
def test_one_stored_pair_is_returned_for_every_query(delta: bool) -> None:
    stored = written(attention(delta=delta), nothing(), [([0.3, -2.0], [6.0, -1.0])])
    found = read(stored, [0.3, -2.0], [-5.0, 4.0], [0.0, 0.0], [9.0, -9.0])
    close(found, torch.tensor([[6.0, -1.0]]).double().expand(4, 2), rtol=1e-12, atol=0)


def test_two_pairs_are_mixed_by_their_features_by_hand() -> None:
    """Keys (0, 1) and (1, 0) have the features (1, 2) and (2, 1); M = [[1*4 + 2*7, 0], [2*4 + 1*7, 0]], z = (3, 3). The
    query (0, 2) has the features (1, 3): (18 + 3 * 15) / (3 + 9) = 5.25."""
    stored = written(attention(delta=False), nothing(), [([0.0, 1.0], [4.0, 0.0]), ([1.0, 0.0], [7.0, 0.0])])
    close(stored.values[0, 0], torch.tensor([[18.0, 0.0], [15.0, 0.0]]).double())
    close(stored.keys[0, 0], torch.tensor([3.0, 3.0]).double())
    close(read(stored, [0.0, 2.0]), torch.tensor([[5.25, 0.0]]).double())


@pytest.mark.parametrize(("delta", "values", "returned"), [(False, [10.0, 20.0], 5.0), (True, [6.0, 12.0], 3.0)])
def test_a_key_written_again_by_hand(delta: bool, values: list[float], returned: float) -> None:
    """The key (0, 1) has the features (1, 2). With 4, then 6 as its value: M is 10 times them, or, less the 4 that
    memory already returns, 6 times; z is twice them. So neither rule returns 6, and the delta rule is further off."""
    layer = attention(delta=delta)
    first = written(layer, nothing(), [([0.0, 1.0], [4.0, 0.0])])
    second = written(layer, first, [([0.0, 1.0], [6.0, 0.0])])
    close(second.values[0, 0, :, 0], torch.tensor(values).double())
    close(second.keys[0, 0], torch.tensor([2.0, 4.0]).double())
    close(read(second, [0.0, 1.0]), torch.tensor([[returned, 0.0]]).double())


def test_by_the_delta_rule_of_the_paper_a_pair_that_is_written_again_is_returned_by_half() -> None:
    """The matrix already holds the value and stays as it is, and the sum of the keys doubles all the same."""
    layer = attention(delta=True)
    first = written(layer, nothing(), [([0.0, 1.0], [4.0, 2.0])])
    again = written(layer, first, [([0.0, 1.0], [4.0, 2.0])])
    close(again.values, first.values)
    close(again.keys, 2 * first.keys)
    close(read(again, [0.0, 1.0]), torch.tensor([[2.0, 1.0]]).double())


def test_tokens_of_a_segment_do_not_correct_each_other() -> None:
    """Both are compared with memory before the segment, so the matrix holds their sum."""
    layer = attention(delta=True)
    twice = written(layer, nothing(), [([0.0, 1.0], [4.0, 0.0])] * 2)
    close(twice.values, written(attention(delta=False), nothing(), [([0.0, 1.0], [4.0, 0.0])] * 2).values)


def test_absent_tokens_are_not_written() -> None:
    layer = attention(delta=True)
    stored = written(layer, nothing(), [([0.5, 1.0], [4.0, 3.0])])
    keys, values = torch.randn(2, 1, 1, 3, 2).double()
    some = layer.write(keys, values, stored, torch.tensor([[True, False, False]]))
    close(some.values, layer.write(keys[:, :, :1], values[:, :, :1], stored, torch.ones(1, 1).bool()).values)
    none = layer.write(keys, values, stored, torch.zeros(1, 3).bool())
    assert torch.equal(none.values, stored.values)
    assert torch.equal(none.keys, stored.keys)


def test_an_empty_memory_returns_zeros_with_gradients_that_are_finite() -> None:
    query = torch.randn(1, 1, 3, 2).double().requires_grad_()
    stored = Stored(*(field.requires_grad_() for field in nothing()))
    found, which = recall(features(query), stored)
    assert not found.any()
    assert not which.any()
    grads = torch.autograd.grad(found.sum(), (query, *stored))
    assert all(grad.isfinite().all() for grad in grads)


def test_the_gate_mixes_local_attention_and_memory_by_hand() -> None:
    """One token sees itself: its value is (2, 4). Memory holds (6, 0). A gate of sigmoid(log 3) = 3/4 gives (5, 1)."""
    block = CompressiveBlock(BlockConfig(dim=2, heads=1, dropout=0.0), delta=True).double()
    layer = block.self_attention
    with torch.no_grad():
        layer.gate.fill_(torch.tensor(3.0).log())
        layer.to_out.weight.copy_(torch.eye(2))
    stored = written(layer, nothing(), [([0.3, -2.0], [6.0, 0.0])])
    query, key, value = torch.randn(1, 1, 1, 2), torch.randn(1, 1, 1, 2), torch.tensor([[[[2.0, 4.0]]]])
    model = infini_attention(dim=2, heads=1)
    at = Positions(rotation=model.rotary.span(-1, 0), causal=True)
    mixed = layer.mix(query.double(), (key.double(), value.double()), at, stored)
    close(mixed, torch.tensor([[[5.0, 1.0]]]).double())


def with_gates(model: InfiniAttention, gate: float) -> InfiniAttention:
    with torch.no_grad():
        for block in model.blocks:
            block.self_attention.gate.fill_(gate)
    return model


def twin(model: InfiniAttention) -> Transformer:
    """A Transformer of the same weights."""
    other = transformer()
    missing, unexpected = other.load_state_dict(model.state_dict(), strict=False)
    assert missing == []
    assert [name.rpartition(".")[2] for name in unexpected] == ["gate"] * 2
    return other


def starting_with(model: Transformer, token: int) -> Transformer:
    """The same Transformer with a token in the place of START."""
    with torch.no_grad():
        model.embedding.start.copy_(model.embedding.vectors(torch.tensor([[token]]))[0, 0])
    return model


@pytest.mark.parametrize("delta", [False, True])
def test_with_closed_gates_it_is_a_transformer_of_the_same_weights_that_begins_with_the_last_token(delta: bool) -> None:
    model, segments = with_gates(infini_attention(delta=delta), -torch.inf), full(4, lanes=1)
    losses = losses_of(model, segments)
    assert torch.equal(losses[0], losses_of(twin(model), segments[:1])[0])
    for t in range(1, 4):
        last = int(segments[t - 1].tokens[0, -1])
        expected = losses_of(starting_with(twin(model), last), segments[t : t + 1])[0]
        close(losses[t], expected, rtol=1e-12, atol=0)


def test_in_a_first_segment_it_is_that_transformer_whatever_the_gates() -> None:
    model, segments = with_gates(infini_attention(), 3.0), irregular(4)
    for segment in segments:
        first = segment._replace(document_start=torch.ones(LANES).bool())
        assert torch.equal(losses_of(model, [first])[0], losses_of(twin(model), [first])[0])


def test_with_open_gates_local_attention_is_left_out() -> None:
    """Then each token reads memory alone: the tokens before it in its segment change nothing."""
    model, segments = with_gates(infini_attention(), torch.inf), full(3)
    before = losses_of(model, segments)
    other = segments[2].tokens.clone()
    other[:, :2] = (other[:, :2] + 1) % VOCAB
    after = losses_of(model, [*segments[:2], segments[2]._replace(tokens=other)])
    close(after[2][:, 3:], before[2][:, 3:], rtol=1e-12, atol=0)
    assert (after[2][:, :3] != before[2][:, :3]).all()


def test_memory_reaches_back_to_the_first_segment() -> None:
    model = infini_attention()
    segments = full(6)
    before = losses_of(model, segments)[5]
    segments[0].tokens[:, 1] = (segments[0].tokens[:, 1] + 1) % VOCAB
    assert (losses_of(model, segments)[5] != before).all()


def test_memory_does_not_know_the_order_of_what_it_holds_in_one_layer() -> None:
    """Keys for memory have no positions: with one layer, the tokens of a segment may change places."""
    model = infini_attention(layers=1)
    one, two, behind = full(3)
    order = torch.tensor([2, 0, 3, 1, 4])  # the last token stays the first input of the next segment
    pair = [
        losses_of(model, [one, two._replace(tokens=tokens), behind])[2] for tokens in (two.tokens, two.tokens[:, order])
    ]
    close(*pair, rtol=1e-12, atol=0)


def gradient_of_early_tokens(model: InfiniAttention, state: State, *, later: int) -> Tensor:
    """The gradient of a later loss in the state."""
    segments, entering = full(later), tuple(field for field in state if field.is_floating_point())
    for segment in segments:
        output, state = model(segment._replace(document_start=torch.zeros(2).bool()), state)
    (reached, *_) = torch.autograd.grad(output.token_losses.sum(), entering)
    return reached


def test_the_gradient_crosses_segments() -> None:
    model = infini_attention()
    state = detach(model(full(1)[0], model.initial_state(2))[1])
    state = state._replace(values=state.values.requires_grad_(), keys=state.keys.requires_grad_())
    assert (gradient_of_early_tokens(model, state, later=4).flatten(2).abs().amax(2) > 0).all()


@pytest.mark.parametrize("delta", [False, True])
def test_what_a_probe_shows_is_what_memory_returns(delta: bool) -> None:
    model, (first, second) = infini_attention(delta=delta, layers=1), full(2)
    probe = model.blocks[0].self_attention.read
    assert isinstance(probe, nn.Module)
    _, state = model(first, model.initial_state(2))
    seen = shown(probe)
    model(second, state)
    x = model.embedding(second.tokens[:, :-1], state.last)
    query, _ = model.blocks[0].self_attention.project(model.blocks[0].self_norm(x))
    weighed = features(query)
    expected = torch.einsum("bhlk,bhkv->bhlv", weighed, state.values[:, 0])
    expected = expected / torch.einsum("bhlk,bhk->bhl", weighed, state.keys[:, 0])[..., None]
    close(seen[0], expected.detach(), rtol=1e-12, atol=1e-12)


def test_memory_is_at_least_float32() -> None:
    """In bfloat16, sums over a long document would stop growing."""
    model = infini_attention().bfloat16()
    state = model.initial_state(1)
    assert [field.dtype for field in state] == [torch.float32, torch.float32, torch.int64]
    assert [field.dtype for field in model(make_segment([LENGTH]), state)[1]] == [field.dtype for field in state]


def test_a_lane_carries_a_matrix_and_a_vector_for_each_head() -> None:
    model = infini_attention(dim=12, heads=3, layers=2)
    assert [list(field.shape) for field in model.initial_state(4)] == [[4, 2, 3, 4, 4], [4, 2, 3, 4], [4]]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"dim": 9}, "heads must divide dim, got heads=2 and dim=9"),
        ({"dim": 6}, "need heads of an even width, got width=3"),
    ],
)
def test_impossible_sizes_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        infini_attention(**sizes)
