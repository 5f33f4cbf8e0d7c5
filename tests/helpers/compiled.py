"""Run a model with compiled blocks beside the same model without; a program, since compiling a function traces whatever
checks a test wraps around it.

    python tests/helpers/compiled.py in_double_precision memformer 0.2
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import models
import numpy as np
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import memformer_pl
from memformer_pl.contract import Segment, SegmentModel, SegmentOutput, detach
from memformer_pl.data.lanes import LaneLoader
from memformer_pl.data.packing.documents import PackedDocuments
from memformer_pl.gradients.rollout import add_gradient
from memformer_pl.layers.dropout import bits_at
from memformer_pl.models import Memformer, MemformerDecoder, StableHadamardMemory, TransformerXL
from memformer_pl.training.compilation import compile_regions

LENGTH, LANES, HORIZON = 16, 4, 5
SIZES = {"vocab_size": 256, "dim": 16, "heads": 2, "ffn_dim": 24, "segment_length": LENGTH}
ULTRA = {
    "class_path": "UltraMemory",
    "init_args": {"keys": 8, "key_dim": 4, "picks": 4, "value_dim": 8},
    "layers": [1, 2],
}
BUILDS: dict[str, Callable[..., SegmentModel]] = {
    "memformer": partial(Memformer, **SIZES, encoder_layers=2, decoder_layers=2, slots=4),
    "memformer with ultra memory": partial(
        Memformer, **SIZES, encoder_layers=2, decoder_layers=2, slots=4, feed_forward=ULTRA
    ),
    "memformer decoder": partial(MemformerDecoder, **SIZES, layers=2, slots=4),
    "transformer xl": partial(TransformerXL, **SIZES, layers=2, memory_length=20),
    "stable hadamard memory": partial(StableHadamardMemory, **SIZES, layers=2, draw=False),
}
Rollout = list[Segment]


class Outcome(NamedTuple):
    losses: Tensor
    grads: dict[str, Tensor]


def rollouts(count: int) -> list[Rollout]:
    """Rollouts of the sources of this package: real text, whose documents end anywhere."""
    texts = [path.read_bytes()[:3000] for path in sorted(Path(memformer_pl.__file__).parent.rglob("*.py"))]
    documents = PackedDocuments.from_arrays([np.frombuffer(text, dtype=np.uint8) for text in texts if text])
    loader = LaneLoader(documents, batch_size=LANES, segment_length=LENGTH, horizon=HORIZON, seed=1)
    seeds = torch.Generator().manual_seed(0)
    return [
        [segment._replace(seeds=torch.randint(1 << 62, (1,), generator=seeds)) for segment in rollout.segments]
        for rollout in islice(iter(loader), count)
    ]


def build(name: str, *, dropout: float, dtype: torch.dtype) -> SegmentModel:
    torch.manual_seed(0)
    return BUILDS[name](dropout=dropout).to(dtype)


def read(model: SegmentModel, read: list[Rollout], *, gradient: str, group: int = 1, bf16: bool = False) -> Outcome:
    """The losses of rollouts that follow each other, and the sum of their gradients."""

    def cost(output: SegmentOutput) -> Tensor:
        return output.token_losses.sum() / 100 + output.auxiliary_loss

    state, losses = detach(model.initial_state(LANES)), []
    for segments in read:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss, state = add_gradient(model, cost, segments, state, gradient=gradient, decoder_group=group)
        losses.append(loss)
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Outcome(torch.stack(losses), grads)


def difference(one: Outcome, other: Outcome) -> float:
    """The largest difference of a gradient, relative to its norm."""
    assert one.grads.keys() == other.grads.keys()
    return max(
        float((one.grads[name] - grad).norm() / grad.norm().clamp(min=1e-30)) for name, grad in other.grads.items()
    )


def in_double_precision(name: str, dropout: str) -> dict[str, float]:
    """Differences between compiled replay and a plain loop, in float64."""
    text = rollouts(3)
    plain = read(build(name, dropout=float(dropout), dtype=torch.float64), text, gradient="bptt")
    compiled = build(name, dropout=float(dropout), dtype=torch.float64)
    compile_regions(compiled)
    replayed = read(compiled, text, gradient="replay")
    return {"losses": float((replayed.losses / plain.losses - 1).abs().max()), "gradients": difference(replayed, plain)}


def of_contract(name: str) -> dict[str, float]:
    """Differences between compiled replay and a plain loop over an irregular rollout, for a model of ``models.py``."""

    def taken(compiled: bool) -> Outcome:
        model = models.MODELS[name]()
        if compiled:
            compile_regions(model)
        state, gradient = detach(model.initial_state(models.LANES)), "replay" if compiled else "bptt"
        loss, _ = add_gradient(model, models.cost, models.irregular(5), state, gradient=gradient)
        return Outcome(loss[None], {name: p.grad for name, p in model.named_parameters() if p.grad is not None})

    plain, replayed = taken(False), taken(True)
    return {"losses": float((replayed.losses / plain.losses - 1).abs().max()), "gradients": difference(replayed, plain)}


def drawn_in_a_block() -> dict[str, float]:
    """Difference between compiled and plain products of rows of a table that the compiled code draws."""
    torch.manual_seed(0)
    table, place = torch.randn(128, 4, 16), torch.full((2, 1), 16)

    def product(x: Tensor, y: Tensor, place: Tensor) -> Tensor:
        rows = bits_at(place.new_full((1, 1), 1), place + torch.arange(1, 4)) % len(table)
        for factors in (1 + torch.tanh(table[rows][..., None] * x[..., None, :])).unbind(1):
            y = torch.addcmul(y, factors, y)
        return y

    given = torch.randn(2, 3, 4, 16), torch.randn(2, 4, 16, 16), place
    return {"product": float((torch.compile(product, fullgraph=True)(*given) - product(*given)).abs().max())}


def in_bfloat16(dropout: str) -> dict[str, float]:
    """How far compiled replay in bfloat16 is from a plain loop in float32, and how far a plain loop in bfloat16 is."""
    text = rollouts(2)
    plain = build("memformer", dropout=float(dropout), dtype=torch.float32)
    exact = read(plain, text, gradient="bptt")
    plain.zero_grad()
    rounded = read(plain, text, gradient="bptt", bf16=True)
    compiled = build("memformer", dropout=float(dropout), dtype=torch.float32)
    compile_regions(compiled)
    replayed = read(compiled, text, gradient="replay", bf16=True)
    return {"compiled": difference(replayed, exact), "plain": difference(rounded, exact)}


def compiled_again(count: str) -> dict[str, object]:
    """What torch counts before and after many rollouts of ragged text, with and without groups."""
    text = rollouts(int(count))
    model = build("memformer", dropout=0.2, dtype=torch.float32)
    compile_regions(model)
    for group in (1, 2):  # five segments: two groups of two, and one of one
        read(model, text[:3], gradient="replay", group=group)
    before = dict(counters["stats"])
    for group in (1, 2):
        read(model, text, gradient="replay", group=group)
    kinds = sorted({segment.continues for segments in text for segment in segments})
    return {"before": before, "after": dict(counters["stats"]), "continues": kinds}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
