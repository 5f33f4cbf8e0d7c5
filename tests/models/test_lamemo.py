"""LaMemo: the running softmax by hand, its relation to Transformer-XL, how far memory looks ahead, and the cost."""

import math
from collections.abc import Iterator

import pytest
import torch
from models import VOCAB, full, irregular, lamemo, losses_of, make_segment, small, transformer_xl
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from memformer_pl.contract import Segment, detach
from memformer_pl.layers import RunningSoftmax, look_ahead, sinusoid
from memformer_pl.models import LaMemo, TransformerXL

close = torch.testing.assert_close


def twin(model: LaMemo) -> TransformerXL:
    """The Transformer-XL of the same weights."""
    xl = transformer_xl(memory_length=model.memory_length, layers=model.layers)
    xl.load_state_dict({name: t for name, t in model.state_dict().items() if not name.endswith("ahead_bias")})
    return xl


def test_what_was_read_and_what_is_read_now_are_merged_as_worked_out_by_hand() -> None:
    # a score of 0 before, one of ln 3 now: odds of 1 to 3, so a quarter of the one value and three of the other
    past = RunningSoftmax(torch.tensor([[[8.0, 0.0]]]), torch.zeros(1, 1, 1))
    ahead = RunningSoftmax(torch.tensor([[[0.0, 4.0]]]), torch.full((1, 1, 1), math.log(3)))
    context, log_sum = look_ahead.merge(past, ahead)
    close(context, torch.tensor([[[2.0, 3.0]]]))
    close(log_sum, torch.full((1, 1, 1), math.log(4)))


def test_heads_are_merged_each_by_its_own_sums() -> None:
    past = RunningSoftmax(torch.tensor([[[1.0, 1.0]]]), torch.tensor([[[0.0, 100.0]]]))
    ahead = RunningSoftmax(torch.tensor([[[2.0, 2.0]]]), torch.tensor([[[100.0, 0.0]]]))
    assert look_ahead.merge(past, ahead).context.tolist() == [[[2.0, 1.0]]]


def test_the_first_segment_is_that_of_a_transformer_xl_and_the_second_is_not() -> None:
    model = lamemo()
    pairs = list(zip(losses_of(model, full(2)), losses_of(twin(model), full(2)), strict=True))
    close(*pairs[0], rtol=1e-12, atol=0)
    assert not torch.allclose(*pairs[1])


def test_where_the_past_keeps_all_of_its_share_it_is_a_transformer_xl(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lamemo(layers=3)
    monkeypatch.setattr(look_ahead, "merge", lambda past, ahead: past)
    for a, b in zip(losses_of(model, irregular(5)), losses_of(twin(model), irregular(5)), strict=True):
        close(a, b, rtol=1e-11, atol=0)


def refreshed(model: LaMemo, segments: list[Segment]) -> Iterator[tuple[Tensor, Tensor]]:
    """The context and the sum of each cached token of one lane as one softmax over all keys that it has seen.

    A token has seen what was cached when it came, its segment up to itself, and what came behind it up to the first
    token of the present segment. What entered a layer never changes in the first.
    """
    seen: list[Tensor] = []
    hook = model.embedding.register_forward_hook(lambda table, args, x: seen.append(x[0].detach()))
    losses_of(model, segments)
    hook.remove()
    lengths = [int(segment.token_mask.sum()) for segment in segments]
    starts = [sum(lengths[:t]) for t in range(len(lengths))]
    layer, x = model.blocks[0], torch.cat([x[:n] for x, n in zip(seen, lengths, strict=True)])
    attention = layer.self_attention
    normed = layer.self_norm(x)
    query, key, value = (y[0] for y in attention.project(normed[None], normed[None]))
    for row in range(sum(lengths)):
        start = max(start for start in starts if start <= row)
        # those of the present segment have not looked ahead yet
        last = row if start == starts[-1] else starts[-1]
        places = torch.arange(max(0, start - model.memory_length), last + 1)
        r = attention.to_distance(sinusoid((places - row).abs(), dim=model.dim).double()).unflatten(1, (2, 4))
        bias = torch.where((places > row)[:, None, None], layer.ahead_bias[:, 0], attention.distance_bias[:, 0])
        by_content = torch.einsum("hk,hsk->hs", query[:, row] + attention.content_bias[:, 0], key[:, places])
        scores = (by_content + ((query[:, row] + bias) * r).sum(-1).T) / 2
        yield torch.einsum("hs,hsk->hk", scores.softmax(-1), value[:, places]).flatten(), scores.logsumexp(-1)


@pytest.mark.parametrize("lengths", [(5, 5, 5, 5), (5, 3, 5, 4), (1, 2, 5, 1, 5), (1,) * 6, (5, 1, 1, 5)])
def test_the_first_layer_reads_as_one_softmax_over_all_that_its_tokens_have_seen(lengths: tuple[int, ...]) -> None:
    model = lamemo(memory_length=9)
    segments = [make_segment([n], document_start=[int(t == 0)], seed=t) for t, n in enumerate(lengths)]
    state = model.initial_state(1)
    for segment in segments:
        state = detach(model(segment, state)[1])
    contexts, log_sums = (torch.stack(field) for field in zip(*refreshed(model, segments), strict=True))
    rows = min(9, sum(lengths))
    close(state.contexts[0, 0, 9 - rows :], contexts[-rows:], rtol=0, atol=1e-6)
    close(state.log_sums[0, 0, 9 - rows :], log_sums[-rows:], rtol=0, atol=1e-6)


def chances(model: LaMemo) -> Tensor:
    """The sum of the chances of all tokens that could be the first of the third segment: 1 where it is not known."""
    segments = [segment._replace(tokens=segment.tokens[:1].expand(VOCAB, -1)) for segment in full(3, lanes=VOCAB)]
    tokens = torch.cat((torch.arange(VOCAB)[:, None], segments[2].tokens[:, 1:]), dim=1)
    return (-losses_of(model, [*segments[:2], segments[2]._replace(tokens=tokens)])[2][:, 0]).exp().sum()


def test_memory_looks_as_far_ahead_as_it_can_without_a_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    close(chances(lamemo()), torch.ones(()).double(), rtol=1e-12, atol=0)
    monkeypatch.setattr(look_ahead, "AHEAD", 2)
    assert abs(chances(lamemo()) - 1) > 1e-6


def test_weights_learn_from_the_refreshing_of_memory() -> None:
    model, segments = lamemo(), full(2)
    _, state = model(segments[0], model.initial_state(2))
    assert not any(field.requires_grad for field in state)
    model(segments[1], state)[0].token_losses[:, 1:].sum().backward()
    assert model.blocks[0].ahead_bias.grad.any()


def flops(model: LaMemo, lanes: int = 1) -> int:
    state = model.initial_state(lanes)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(full(1, lanes=lanes)[0]._replace(document_start=torch.zeros(lanes).bool()), state)
    return counter.get_total_flops()


def test_the_cost_grows_linearly_with_the_length_of_memory() -> None:
    costs = [flops(small(LaMemo, layers=2, memory_length=rows)) for rows in (80, 160, 320)]
    assert costs[2] - costs[1] == 2 * (costs[1] - costs[0])


def test_a_state_counts_the_embeddings_and_for_each_layer_but_the_last_a_context_and_its_sums() -> None:
    state = lamemo(layers=3).initial_state(1)
    assert [field[0].numel() for field in state] == [7 * 8, 2 * 7 * 8, 2 * 7 * 2, 1, 1, 1]
