"""In chunks: the same numbers, without the square of scores and without the hidden layer of all tokens."""

import pytest
import torch
from models import LargestTensor, irregular, losses_of, transformer
from torch import Tensor, nn

from memformer_pl.contract import Segment
from memformer_pl.layers import BlockConfig, Rotation, TransformerBlock
from memformer_pl.layers.blockwise import chunks, forward_by_chunks
from memformer_pl.models import Transformer

close = torch.testing.assert_close

LONG, DIM, HIDDEN, LAYERS = 256, 32, 128, 2
SIZES = {"vocab_size": 400, "dim": DIM, "heads": 2, "ffn_dim": HIDDEN, "layers": LAYERS, "dropout": 0.0}


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 100])
def test_chunks_of_any_size_give_the_numbers_of_the_whole(chunk: int) -> None:
    plain, in_chunks = transformer(), transformer(chunk=chunk)
    for segment in irregular(3):
        (output, _), (other, _) = plain(segment, ()), in_chunks(segment, ())
        close(other.token_losses, output.token_losses, rtol=1e-12, atol=1e-14)
        assert torch.equal(other.correct, output.correct)
        output.token_losses.sum().backward()
        other.token_losses.sum().backward()
    for (name, parameter), other in zip(plain.named_parameters(), in_chunks.parameters(), strict=True):
        close(other.grad, parameter.grad, rtol=1e-11, atol=1e-13, msg=name)


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 7])
def test_four_tokens_by_hand(chunk: int) -> None:
    # Scores 1, 2, 3, 4 and values 10, 20, 30, 40: the last token reads 34.9265.
    layer = TransformerBlock(BlockConfig(dim=2, heads=1, ffn_dim=2, dropout=0.0)).double()
    layer.self_norm = nn.Identity()
    attention = layer.self_attention
    with torch.no_grad():
        for linear in (attention.to_query_key_value, attention.to_out, layer.ffn.down):
            linear.weight.zero_()
        layer.ffn.down.bias.zero_()
        query, key, value = attention.to_query_key_value.weight.split(2)
        query[0, 0] = 2**0.5 / 4  # the last token asks with sqrt(2), by which scores are divided
        key[0, 0] = value[1, 1] = 1
        attention.to_out.weight.copy_(torch.eye(2))
    x = torch.tensor([[[1, 10], [2, 20], [3, 30], [4, 40]]]).double()
    unturned = Rotation(torch.ones(1, 4, 1, 2), torch.zeros(1, 4, 1, 2))
    out = forward_by_chunks(layer, x, rotation=unturned, chunk=chunk, keep=lambda number, x: None)
    close(out[0, 0], torch.tensor([1, 20]).double())
    close(out[0, 3], torch.tensor([4, 40 + 34.9265]).double(), rtol=0, atol=1e-4)


def test_the_last_chunk_may_be_shorter() -> None:
    assert chunks(5, 2) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert chunks(2, 5) == [slice(0, 2)]


def long_segment(length: int) -> Segment:
    tokens = torch.randint(400, (1, length), generator=torch.Generator().manual_seed(0))
    return Segment(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.tensor([True]))


def backward(model: Transformer, length: int) -> None:
    output, _ = model(long_segment(length), ())
    output.token_losses.sum().backward()


def test_no_tensor_is_made_that_is_larger_than_the_queries_keys_and_values_of_a_layer() -> None:
    entries = []
    for chunk in (32, None):
        with LargestTensor() as largest:
            backward(Transformer(**SIZES, segment_length=LONG, chunk=chunk), LONG)
        entries.append(largest.entries)
    assert entries[0] == 3 * LONG * DIM
    assert entries[1] >= LONG * max(LONG, HIDDEN, 400)


def saved_bytes(length: int, *, chunk: int | None) -> int:
    """Bytes of all memory that is kept for the backward pass."""
    model, saved = Transformer(**SIZES, segment_length=length, chunk=chunk), {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that its place is not taken by another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output, _ = model(long_segment(length), ())
    assert output.token_losses.requires_grad
    return sum(nbytes for place, (nbytes, _) in saved.items() if place not in own)


def test_what_is_kept_for_the_backward_pass_grows_with_the_length_and_not_with_its_square() -> None:
    short, long = (saved_bytes(length, chunk=32) for length in (LONG, 2 * LONG))
    assert long < 2.2 * short
    assert long < 2 * LONG * 4 * DIM * 8 * LAYERS, "more than eight vectors for each token and layer"
    assert long < 0.25 * saved_bytes(2 * LONG, chunk=None)


def test_a_model_that_computes_in_chunks_takes_the_weights_of_one_that_does_not() -> None:
    model, other = transformer(), transformer(chunk=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    other.load_state_dict(model.state_dict())
    for a, b in zip(losses_of(model, irregular(2)), losses_of(other, irregular(2)), strict=True):
        close(a, b, rtol=1e-12, atol=1e-14)
