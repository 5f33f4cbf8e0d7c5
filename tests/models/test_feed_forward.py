"""Every model can have another feed-forward in some layers: what it then has, and what is refused."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    MODELS,
    ULTRA,
    Case,
    assert_same,
    full,
    irregular,
    memformer,
    outcome,
    outcome_in_groups,
    plain_loop,
    titans,
    train_on,
    transformer,
    transformer_xl,
)
from torch import nn

from memformer_pl.contract import Segment, SegmentModel
from memformer_pl.contract.config import Configured
from memformer_pl.errors import UsageError
from memformer_pl.gradients import replay_backward
from memformer_pl.layers import FeedForward, ProductKeys, UltraMemory
from memformer_pl.models import Memformer
from memformer_pl.training.flops import count_flops

WITHOUT = ("lstm", "llama", "llama with a window", "memformer with ultra memory", "transformer with ultra memory")
KINDS = {name: build for name, build in MODELS.items() if name not in WITHOUT}
# with the random weights that these tests draw, a memory of two layers diverges, as Titans may in a small model
KINDS["titans, memory as context"] = partial(titans, variant="mac", memory_hidden=0)
DENSE = {"class_path": "FeedForward", "init_args": {"hidden": 3}}
PRODUCT = {"class_path": "memformer_pl.layers.ProductKeys", "init_args": ULTRA["init_args"]}

ODD = {"rank": 3, "cores": 4, "expansion": 9, "keys": 5}


def feed_forwards(model: nn.Module) -> list[nn.Module]:
    """The feed-forward of each layer."""
    return [module for name, module in model.named_modules() if name.endswith(".ffn")]


def plain(segments: list[Segment], build: Callable[[], SegmentModel]) -> Callable[[], Case]:
    """A case from the initial state."""

    def case() -> Case:
        model = build()
        return train_on(model, segments, model.initial_state(len(segments[0].tokens)))

    return case


@pytest.mark.parametrize("build", KINDS.values(), ids=KINDS)
def test_every_model_can_have_another_feed_forward_in_a_layer_and_replay_is_still_exact(
    build: Callable[..., SegmentModel],
) -> None:
    model = build(feed_forward={**ULTRA, "layers": [0]})
    first, *others = feed_forwards(model)
    assert type(first) is UltraMemory
    assert {type(other) for other in others} <= {FeedForward}
    assert len(feed_forwards(model)) == len(feed_forwards(build()))
    case = plain(irregular(5), partial(build, feed_forward={**ULTRA, "layers": [0]}))
    assert_same(outcome(replay_backward, case), outcome(plain_loop, case))


@pytest.mark.parametrize("build", KINDS.values(), ids=KINDS)
def test_the_dense_feed_forward_as_a_choice_is_the_one_without(build: Callable[..., SegmentModel]) -> None:
    chosen = {"class_path": "FeedForward", "init_args": {"hidden": 12}, "layers": [0]}
    weights = [dict(model.named_parameters()) for model in (build(), build(feed_forward=chosen))]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_layers_of_memformer_count_through_encoder_and_decoder() -> None:
    model = memformer(feed_forward={**PRODUCT, "layers": [1, 2]})
    assert [type(layer) for layer in feed_forwards(model)] == [FeedForward, ProductKeys, ProductKeys, FeedForward]
    narrow = transformer(feed_forward={**DENSE, "layers": [1]})
    assert [layer.up.out_features for layer in feed_forwards(narrow)] == [12, 3]


def keep(note: list[tuple[bool, torch.Tensor]], _: nn.Module, __: object, picked: torch.Tensor) -> None:
    """Note whether there is a graph, and what is picked."""
    note.append((torch.is_grad_enabled(), picked))


@pytest.mark.parametrize("build", [memformer, transformer])
def test_both_passes_of_replay_pick_the_same_cells(build: Callable[..., SegmentModel]) -> None:
    """In single precision, where rounding could differ between a pass with a graph and one without."""
    sizes = {"keys": 8, "key_dim": 4, "picks": 5, "value_dim": 8}
    model = build(feed_forward={**ULTRA, "init_args": sizes, "layers": [0, 1]}).float()
    seen: dict[int, list[tuple[bool, torch.Tensor]]] = {}
    for n, layer in enumerate(feed_forwards(model)[:2]):
        note = seen.setdefault(n, [])
        layer.picked.register_forward_hook(partial(keep, note))
    # a Transformer has no state, so there the first pass takes whole steps
    advance = model.advance if isinstance(model, Memformer) else None
    replay_backward(*plain(irregular(5), lambda: model)()[1:4], advance=advance)
    for note in seen.values():
        ahead, again = ([picks for graph, picks in note if graph == with_graph] for with_graph in (False, True))
        assert len(again) == 5
        assert len(ahead) == 4
        assert all(torch.equal(*pair) for pair in zip(ahead, reversed(again), strict=False))


def test_the_loss_of_weights_alone_counts_once_for_each_segment_whatever_reads_them() -> None:
    segments, option = full(4), {**ULTRA, "layers": [1, 2]}
    model = memformer(feed_forward=option)
    with torch.no_grad():
        for layer in feed_forwards(model)[1:3]:
            layer.core_parts.copy_(torch.eye(2) / 2)
    once = sum(layer.weight_loss() for layer in feed_forwards(model)[1:3]).detach()
    torch.testing.assert_close(float(once), 2 * 1e-3 * 0.85**2)
    output, state = model(segments[0], model.initial_state(2))
    torch.testing.assert_close(output.auxiliary_loss.detach(), once)
    encoded = []
    for segment in segments[1:]:
        fields, state = model.advance_and_encode(segment, state)
        encoded.append(fields)
    torch.testing.assert_close(model.decode_encoded(segments[1:], encoded).auxiliary_loss.detach(), 3 * once)
    together = transformer_xl(feed_forward={**ULTRA, "layers": [0]})
    with torch.no_grad():
        feed_forwards(together)[0].core_parts.copy_(torch.eye(2).expand(2, 2, 2))
    alone = together(segments[0], together.initial_state(2))[0].auxiliary_loss.detach()
    read = together.forward_rollout(segments, together.initial_state(2))[0].auxiliary_loss.detach()
    torch.testing.assert_close(read, 4 * alone)
    torch.testing.assert_close(float(alone), 1e-3 * 1.85**2)


def test_decoding_in_groups_gives_the_same_loss_and_gradient() -> None:
    def build() -> SegmentModel:
        model = memformer(feed_forward={**ULTRA, "layers": [1, 2]})
        with torch.no_grad():
            for layer in feed_forwards(model)[1:3]:
                layer.core_parts.add_(torch.eye(2))
        return model

    case = plain(irregular(5), build)
    got, expected = outcome_in_groups(2, case), outcome(plain_loop, case)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-12, atol=0)
    for name, grad in expected.grads.items():
        torch.testing.assert_close(got.grads[name], grad, rtol=1e-9, atol=1e-12)


def test_a_model_keeps_the_option_as_it_was_given_and_is_rebuilt_from_it() -> None:
    option = {**PRODUCT, "layers": [1]}
    model = transformer(feed_forward=option)
    config = model.config()
    assert config["feed_forward"] == option
    assert transformer().config()["feed_forward"] is None
    rebuilt = Configured.from_config(config)
    assert [type(layer) for layer in feed_forwards(rebuilt)] == [FeedForward, ProductKeys]
    assert "feed_forward" in transformer().differences(config)[0]


ARGUMENTS: dict[str, Any] = ULTRA["init_args"]


@pytest.mark.parametrize("build", [memformer, transformer])
@pytest.mark.parametrize("chosen", [ULTRA, PRODUCT, DENSE, {**ULTRA, "init_args": {**ULTRA["init_args"], **ODD}}])
def test_the_operations_of_a_model_are_those_of_the_formula(
    build: Callable[..., SegmentModel], chosen: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "experiments" / "benchmarks")
    from flops import formula

    model = build(feed_forward={**chosen, "layers": [1]})
    assert count_flops(model, lanes=3) == formula(model, lanes=3)
    with pytest.raises(KeyError, match="TransformerXL with feed_forward"):
        formula(transformer_xl(feed_forward={**chosen, "layers": [1]}), lanes=3)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("UltraMemory", r"feed_forward must be null \(in Python None\), or have class_path, init_args, layers, got"),
        ({**ULTRA}, "feed_forward has no 'layers': add it"),
        ({**ULTRA, "layer": [1]}, "feed_forward must hold .*, got 'layer'; did you mean 'layers'"),
        (
            {**ULTRA, "layers": [1], "class_path": "UltraMemry"},
            "feed_forward.class_path must be one of FeedForward, ProductKeys, UltraMemory, got 'UltraMemry'; did you "
            "mean 'UltraMemory'",
        ),
        ({**ULTRA, "layers": [1], "class_path": "os.system"}, "class_path must be one of .*, got 'os.system'"),
        ({**ULTRA, "layers": [1], "class_path": 3}, "class_path must be one of .*, got 3"),
        ({**ULTRA, "layers": []}, r"feed_forward.layers must list the layers .*, such as \[1\], got \[\]"),
        ({**ULTRA, "layers": 1}, "feed_forward.layers must list the layers .* got 1"),
        ({**ULTRA, "layers": [2]}, "feed_forward.layers must hold numbers from 0 to 1, .* 2 layers, got 2"),
        ({**ULTRA, "layers": [1, 0, 1]}, r"feed_forward.layers must list each layer once, got \[1, 0, 1\]"),
        ({**ULTRA, "layers": [-1]}, "must hold numbers from 0 to 1, .*, got -1"),
        ({**ULTRA, "layers": [True]}, "must hold numbers from 0 to 1, .*, got True"),
        ({**ULTRA, "layers": [1], "init_args": None}, "init_args must hold keys, .* of UltraMemory, got None"),
        ({**ULTRA, "layers": [1], "init_args": {**ARGUMENTS, "pick": 1}}, "got 'pick'; did you mean 'picks'"),
        ({**ULTRA, "layers": [1], "init_args": {**ARGUMENTS, "dim": 8}}, "init_args must hold .*, got 'dim'"),
        ({**ULTRA, "layers": [1], "init_args": {"keys": 3}}, "feed_forward.init_args has no 'key_dim': add it"),
        ({**ULTRA, "layers": [1], "init_args": {**ARGUMENTS, "keys": "3"}}, "keys must be a whole number, got '3'"),
        ({**ULTRA, "layers": [1], "init_args": {**ARGUMENTS, "picks": 7}}, "picks must be at most .* = 6, got 7"),
        ({**DENSE, "layers": [1], "init_args": {"hidden": 0}}, "hidden must be at least 1, got 0"),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_an_option_that_does_not_fit_is_refused(option: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        transformer(feed_forward=option)
