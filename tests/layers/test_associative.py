"""A memory that begins associative: tokens look one token back, and find slots by what followed them."""

import pytest
import torch
from torch import Tensor

from memformer_pl.layers import RotaryPositions, attention_weights
from memformer_pl.layers.associative import look_back_vectors
from memformer_pl.models import Memformer


def first_attention(model: Memformer, tokens: Tensor) -> Tensor:
    """The attention of the first layer of the encoder: lanes, heads, queries, keys; START is not among them."""
    x, layer = model._embed(tokens), model.encoder[0]
    query, (keys, _) = layer.self_attention.project(layer.self_norm(x), model.rotary.span(-x.shape[1], 0))
    return attention_weights(query, keys, None)[:, :, 1:, 1:]


@pytest.mark.parametrize(("dim", "heads"), [(32, 2), (64, 4)])
def test_the_first_head_alone_begins_by_looking_one_token_back(dim: int, heads: int) -> None:
    tokens = torch.randint(256, (200, 8))
    began = Memformer(vocab_size=256, dim=dim, heads=heads, slots=4, segment_length=8, associative=True)
    weights = first_attention(began, tokens).diagonal(offset=-1, dim1=2, dim2=3).mean((0, 2))
    assert weights[0] > 0.4
    assert (weights[1:] < 0.2).all()


def test_a_key_is_nearest_where_it_stands_one_token_before() -> None:
    positions = RotaryPositions(width=16, first=0, last=8)
    query, key = look_back_vectors(positions)
    rotation = positions.span(0, 9)
    turned = [rotation.turn(vector.expand(1, 9, 1, 16))[0, :, 0] for vector in (query, key)]
    products = turned[0] @ turned[1].T
    assert (products[1:].argmax(1) == torch.arange(8)).all()
    # three pairs of length 3.5 in phase
    torch.testing.assert_close(products.diagonal(offset=-1), torch.full((8,), 3 * 3.5**2))


@pytest.mark.parametrize(("associative", "found"), [(True, True), (False, False)])
def test_a_token_begins_to_look_for_what_followed_on_a_token_like_it(associative: bool, found: bool) -> None:
    torch.manual_seed(1)
    sizes = {"vocab_size": 256, "dim": 64, "heads": 2, "encoder_layers": 2, "segment_length": 4, "dropout": 0.0}
    model = Memformer(**sizes, slots=4, associative=associative).eval()
    keys, values = torch.rand(400, 128).argsort(1)[:, :2], torch.randint(128, 256, (400, 2))
    state = model.initial_state(400)._replace(previous=torch.stack((keys, values), dim=2).flatten(1))
    written = model.writer.to_value(
        model._encode(state, None, full=False).x[:, [2, 4]]
    )  # a slot for each value, as if it held no more
    looking, layer = model._embed(keys)[:, 1:], model.encoder[1]
    reader = layer.memory_reader
    query = reader.attention.to_query(layer.memory_norm(looking)).unflatten(-1, (2, -1)).transpose(1, 2)
    weights = attention_weights(query, reader.keys_values(written)[0], None).mean((0, 1))
    assert (weights.diagonal().mean().item() > 0.55) is found


def test_a_model_still_begins_as_its_twin_without_memory() -> None:
    model = Memformer(vocab_size=8, dim=8, heads=2, slots=3, segment_length=4, associative=True)
    assert not any(layer.memory_reader.attention.to_out.weight.any() for layer in model.encoder)


def test_without_slots_only_the_encoder_begins_so() -> None:
    model = Memformer(vocab_size=8, dim=8, heads=2, slots=0, segment_length=4, associative=True)
    assert model.encoder[0].self_norm.bias.norm().item() == pytest.approx(4.0)
    assert not model.encoder[1].self_norm.bias.any()
