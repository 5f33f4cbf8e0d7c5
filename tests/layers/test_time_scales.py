"""How long the heads of an untrained writer keep a slot: for their time scales, and where they cannot, they say so."""

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import small
from torch import Tensor
from torch.nn import functional as F

from memformer_pl.contract import Segment
from memformer_pl.errors import UsageError
from memformer_pl.layers import SlotWriter
from memformer_pl.layers.memory import head_init, time_scales
from memformer_pl.models import Memformer, MemformerDecoder
from memformer_pl.sweeps import rows

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
KINDS = {"Memformer": Memformer, "MemformerDecoder": MemformerDecoder}
BASES = {  # what else is stacked on
    "recall/copy": "recall/copy/memformer.yaml",
    "recall/associative": "recall/associative/memformer.yaml",
    "facts": "facts/base.yaml",
    "remember": "remember/base.yaml",
    "table1/stdlib": "table1/digits/base.yaml",
    "table1/digits": "table1/digits/base.yaml",
    "table1/mnist": "table1/mnist/base.yaml",
    "table2/wikitext103": "table2/wikitext103/base.yaml",
    "table3": "table3/wikitext103.yaml",
}


def shipped() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every configuration in ``experiments/`` on what it is stacked on, and every row of every table."""
    for path in sorted(EXPERIMENTS.rglob("*.yaml")):
        folder = path.parent.relative_to(EXPERIMENTS).as_posix()
        if folder in ("evaluate", "continual", "electra"):  # tasks of the harness, and configurations of other programs
            continue
        if path.name == "rows.yaml":
            yield from ((f"{folder} {row.name}", row.stacked) for row in rows.read(path).rows)
        else:
            base = EXPERIMENTS / BASES.get(folder, "stdlib.yaml")
            stacked = rows.stack(*(yaml.safe_load(each.read_text()) for each in (base, path)))
            yield f"{folder} {path.stem}", stacked


def writers() -> dict[str, dict[str, Any]]:
    """Of all that is shipped, what a writer and what it writes depend on; once each, by the first that has it."""
    found: dict[str, dict[str, Any]] = {}
    for name, config in shipped():
        model, data = config["model"]["model"], config["data"]
        kind, options = model["class_path"], model["init_args"]
        if kind not in KINDS or options.get("slots") == 0:
            continue
        tokenizer = data["tokenizer"]
        vocab_size = 256 if tokenizer == "Bytes" else next(iter(tokenizer["init_args"].values()))
        # slots do not see each other, and an untrained encoder reads none: as many as give a median
        others = {"segment_length": data["segment_length"], "vocab_size": vocab_size, "slots": 64, "dropout": 0.0}
        takes = ("dim", "heads", "writer_heads", "time_scale", "writer_time_scale", "associative")
        takes += ("encoder_layers",) if kind == "Memformer" else ("layers",)
        own = {name: float(size) if "time_scale" in name else size for name, size in options.items() if name in takes}
        given = own | others | {"kind": kind}
        if kind == "MemformerDecoder":
            given.pop("associative", None)
        if given not in found.values():
            found[name] = given
    return found


def build(options: dict[str, Any], seed: int) -> Memformer | MemformerDecoder:
    """An untrained model; its decoder does not affect writing."""
    kind, options = KINDS[options["kind"]], {name: value for name, value in options.items() if name != "kind"}
    torch.manual_seed(seed)
    return kind(**options, **({"decoder_layers": 1} if kind is Memformer else {})).eval()


@torch.no_grad()
def lives(model: Memformer | MemformerDecoder, segments: int, *, encoded: bool) -> Tensor:
    """The segments after which 1/e is left of what each part of a slot held at first ``[H, N]``, or infinity.

    Args:
        model: Untrained.
        segments: How many are written, of random tokens.
        encoded: By the model. Else each token is a random vector of its own.
    """
    seen: list[Tensor] = []
    model.writer.retention.register_forward_hook(lambda probe, args, value: seen.append(value.double()))
    state, length = model.initial_state(1), model.segment_length
    present = torch.ones(1, length, dtype=torch.bool)
    for t in range(segments + 1):
        if encoded:
            segment = Segment(torch.randint(model.vocab_size, (1, length)), present, torch.tensor([t == 0]))
            state = model.advance(segment, state)
        else:
            vectors = F.layer_norm(torch.randn(1, length, model.dim), (model.dim,))
            state = state._replace(memory=model.memory_norm(model.writer(state.memory, vectors, present)))
    lost_TBHM = -torch.stack(seen[1:]).clamp(min=1e-30).log()  # a Memformer has nothing to write at first
    sum_TBHM = lost_TBHM.cumsum(0)
    whole_BHM = (sum_TBHM < 1).sum(0)  # segments before the one that takes the rest
    there = whole_BHM.clamp(max=segments - 1)[None]
    part_BHM = 1 + ((1 - sum_TBHM.gather(0, there)) / lost_TBHM.gather(0, there))[0]
    return torch.where(whole_BHM < segments, whole_BHM + part_BHM, math.inf).transpose(0, 1).flatten(1)


def told(options: dict[str, Any]) -> float:
    """The time scale that a writer is built with."""
    return float(options.get("writer_time_scale") or options.get("time_scale", 32.0))


def ratios(options: dict[str, Any], *, encoded: bool) -> Tensor:
    """How long each head keeps beside its time scale ``[H]``: the median of all slots of several initialisations."""
    scale = told(options)
    models = (build(options, seed) for seed in range(3 if options["dim"] >= 512 else 5))
    all_HN = torch.cat([lives(model, math.ceil(3 * scale), encoded=encoded) for model in models], dim=1)
    return all_HN.median(1).values / time_scales(scale, heads=len(all_HN))


WRITERS = writers()
FEW = 16
"""With fewer tokens than these, an untrained encoder gives the writer too few different vectors."""
WIDE = 512
"""Configurations of at least this width take minutes."""


def test_there_are_writers_of_every_kind() -> None:
    assert sum(options["kind"] == "Memformer" for options in WRITERS.values()) >= 15
    assert sum(options["kind"] == "MemformerDecoder" for options in WRITERS.values()) >= 3


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if options["dim"] >= WIDE else ()) for name, options in WRITERS.items()],
)
def test_every_head_of_every_shipped_configuration_keeps_a_slot_for_its_time_scale_within_a_factor_of_three(
    name: str,
) -> None:
    """A Memformer against what its encoder makes of random tokens; the decoder-only model against unrelated vectors,
    since its untrained layers make tokens much alike, as its docstring says. So is a Memformer that knows only a few
    tokens: untrained, it scores them all alike, and keeps its slots for longer than its time scale."""
    options = WRITERS[name]
    encoded = options["kind"] == "Memformer" and options["vocab_size"] >= FEW
    ratio_H = ratios(options, encoded=encoded)
    print(f"{name}: {[round(ratio, 2) for ratio in ratio_H.tolist()]}")
    assert ratio_H.min() > 1 / 3
    assert ratio_H.max() < 3


def test_no_shipped_configuration_has_heads_that_are_too_narrow() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in WRITERS.values():
            build(options | {"slots": 1}, seed=0)


def test_a_single_head_has_the_time_scale_itself_and_several_have_shorter_ones_too() -> None:
    assert time_scales(32.0, heads=1).tolist() == pytest.approx([32.0])
    assert time_scales(32.0, heads=2).tolist() == pytest.approx([2.0, 32.0])
    assert time_scales(32.0, heads=5).tolist() == pytest.approx([2.0, 4.0, 8.0, 16.0, 32.0])


def retention(writer: SlotWriter, *, tokens: int) -> Tensor:
    """The median retention of each head ``[H]``, by unrelated tokens."""
    seen: list[Tensor] = []
    writer.retention.register_forward_hook(lambda probe, args, value: seen.append(value.detach()))
    dim = writer.norm.normalized_shape[0]
    vectors = F.layer_norm(torch.randn(64, tokens, dim), (dim,))
    writer(F.normalize(torch.randn(64, 64, dim), dim=-1), vectors, torch.ones(64, tokens, dtype=torch.bool))
    return seen[0].transpose(0, 1).flatten(1).median(1).values


def writer(*, heads: int, segment_length: int, time_scale: float = 32.0, dim: int = 64) -> SlotWriter:
    torch.manual_seed(0)
    return SlotWriter(dim=dim, heads=heads, temperature=0.25, segment_length=segment_length, time_scale=time_scale)


def test_a_single_head_keeps_as_much_as_the_last_of_several() -> None:
    alone, several = (retention(writer(heads=heads, segment_length=16), tokens=16) for heads in (1, 4))
    assert alone[0] > 0.9
    assert several[0] < 0.9 < several[-1]


def test_heads_that_a_cosine_of_one_does_not_suffice_for_are_sharper_and_the_slower_the_sharper() -> None:
    init = head_init(time_scales(32.0, heads=4), width=8, tokens=8)
    assert (init.cosine[:2] < 1).all()
    assert init.sharpness[:2].tolist() == [3.0, 3.0]
    assert init.cosine[2:].tolist() == [1.0, 1.0]
    assert 3 < init.sharpness[2] < init.sharpness[3] < 6
    torch.testing.assert_close(init.lifetime.float(), time_scales(32.0, heads=4), rtol=1e-4, atol=0)


def test_sharper_heads_keep_longer_than_those_that_are_clamped() -> None:
    narrow = writer(heads=4, segment_length=8, dim=32)
    sharp = retention(narrow, tokens=8)
    with torch.no_grad():
        narrow.to_key.weight[-8:] *= (
            3.0 / head_init(time_scales(32.0, heads=4), width=8, tokens=8).sharpness[-1].float()
        )
    assert (1 - retention(narrow, tokens=8)[-1]) > 1.5 * (1 - sharp[-1])


@pytest.mark.parametrize(
    ("heads", "segment_length", "time_scale", "told"),
    [
        (8, 64, 32.0, r"writer_heads=8 of width 8 .* 64 tokens.* 8 of them .*head 8 for 1\.28 segments, not 32"),
        (16, 8, 2.0, r"writer_heads=16 of width 4 .* 8 tokens.*head 16 for .* segments, not 2"),
        (32, 1024, 1.0, r"writer_heads=32 of width 2 .* 1024 tokens.*head 32 for .* segments, not 1"),
    ],
)
def test_heads_that_cannot_keep_for_their_time_scale_say_so(
    heads: int, segment_length: int, time_scale: float, told: str
) -> None:
    with pytest.warns(UserWarning, match=told):
        writer(heads=heads, segment_length=segment_length, time_scale=time_scale)


def test_models_warn_of_narrow_heads_too_and_not_where_there_is_no_writer() -> None:
    for kind in (Memformer, MemformerDecoder):
        with pytest.warns(UserWarning, match="lower writer_heads, or raise dim"):
            kind(vocab_size=8, dim=32, heads=2, writer_heads=16, segment_length=64)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            kind(vocab_size=8, dim=32, heads=2, writer_heads=16, segment_length=64, slots=0)


@pytest.mark.parametrize("time_scale", [1e9, 1e300])
def test_a_time_scale_beyond_single_precision_is_a_slot_that_keeps_all(time_scale: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        endless = writer(heads=1, segment_length=8, time_scale=time_scale, dim=512)
    assert endless.to_key.weight.isfinite().all()
    assert retention(endless, tokens=8)[0] == 1


def test_the_writer_may_have_a_time_scale_of_its_own() -> None:
    sizes: dict[str, Any] = {"slots": 3, "writer_heads": 1}
    for kind in (Memformer, MemformerDecoder):
        both, own, short = (
            small(kind, **sizes, **times)
            for times in (
                {"time_scale": 512.0},
                {"time_scale": 512.0, "writer_time_scale": 32.0},
                {"time_scale": 32.0},
            )
        )
        assert torch.equal(own.writer.to_key.weight, short.writer.to_key.weight)
        assert not torch.equal(own.writer.to_key.weight, both.writer.to_key.weight)
        assert torch.equal(own.memory_norm.bias, both.memory_norm.bias)
        assert not torch.equal(own.memory_norm.bias, short.memory_norm.bias)


@pytest.mark.parametrize("kind", [Memformer, MemformerDecoder])
@pytest.mark.parametrize("slots", [0, 3])
def test_a_writers_own_time_scale_is_refused_by_its_name(kind: type[Memformer | MemformerDecoder], slots: int) -> None:
    with pytest.raises(UsageError, match=r"writer_time_scale must be at least 1 segment and finite, got 0\.5"):
        kind(vocab_size=8, dim=8, heads=2, slots=slots, writer_time_scale=0.5)
