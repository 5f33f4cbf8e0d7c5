r"""Peak memory and time of a gradient against the length of a text, for a decoder of transformers with random weights.

    python experiments/benchmarks/long_context.py                                                      # a small one
    python experiments/benchmarks/long_context.py --lengths "[4096]" --ways "[plain,replay/256]" --sizes.layers 8

Ways: ``plain``, one pass over the text; ``checkpointed``, the same after ``activation_checkpointing_enable()``;
``replay/N``, ``replay_backward`` in segments of N tokens with ``growing=2`` and an ``advance`` without the head; and
``whole/N``, the same without ``growing``, which stores a whole cache for each segment. A segment is shorter than the
text, or the way is left out. Every loss is taken from ``model(...).logits``, in one piece.

Time: where ``plain`` runs, all ways take turns on the same text, and ratios to it are taken pair by pair; elsewhere it
is that of the one run that measures memory. Memory: on a CPU each way runs in its own process; the peak above what the
model, its gradients and its text take before. A way that has needed more than ``limit`` GiB for a text, or has run out
of memory, is not tried with a longer one. Error: the largest relative error of the gradient of a weight tensor of a toy
of the same kind, against ``plain`` in float64, with as many segments as the text has, 16 at most.

On a CPU, torch's attention reads grouped keys as they are, with a mask or without. transformers repeats them for each
query head if there is a mask, as in every segment but the first, unless ``TRANSFORMERS_SDPA_FORCE_GQA`` is 1: it is set
here for a CPU, for all ways. On a GPU that would cost more, and it is left alone.
"""

import gc
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import transformers
from jsonargparse import auto_cli
from measuring import Row, by_turns, in_new_process, now, peak, ratio, report, with_quartiles
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from memformer_pl.gradients import replay_backward

OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a decoder and its text.

    Args:
        length: Tokens of the text.
        layers: Decoder layers.
        dim: Width.
        heads: Query heads.
        kv_heads: Heads of keys and values; each serves several query heads.
        hidden: Width inside of a feed-forward layer.
        vocab_size: Size of the vocabulary.
        device: Device of the computation.
        dtype: Of weights, activations and cache.
    """

    length: int = 4096
    layers: int = 8
    dim: int = 256
    heads: int = 8
    kv_heads: int = 2
    hidden: int = 768
    vocab_size: int = 32768
    device: str = "cpu"
    dtype: str = "float32"

    def build(self) -> Qwen2ForCausalLM:
        """Build the untrained decoder: rotary positions, SwiGLU, RMSNorm, one table for input and output."""
        config = Qwen2Config(
            vocab_size=self.vocab_size,
            hidden_size=self.dim,
            intermediate_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=self.length,
            tie_word_embeddings=True,
        )
        with torch.device(self.device):
            model = Qwen2ForCausalLM(config)
        return model.to(getattr(torch, self.dtype)).train()


TOY = {"layers": 2, "dim": 32, "heads": 4, "kv_heads": 2, "hidden": 48, "vocab_size": 64, "dtype": "float64"}


class Way(NamedTuple):
    """How the gradient of a text is computed."""

    kind: str
    """``plain``, ``checkpointed``, ``replay`` or ``whole``."""
    segment: int = 0
    """Tokens of a segment."""

    @classmethod
    def parse(cls, written: str) -> "Way":
        """Read a way as in ``replay/256``.

        Raises:
            ValueError: It is none.
        """
        kind, _, segment = written.partition("/")
        in_segments = kind in ("replay", "whole") and segment.isdecimal() and int(segment) > 0
        if not in_segments and written not in ("plain", "checkpointed"):
            raise ValueError(f"a way is plain, checkpointed, replay/N or whole/N with N tokens, got {written!r}")
        return cls(kind, int(segment or 0))

    def __str__(self) -> str:
        return f"{self.kind}/{self.segment}" if self.segment else self.kind


class Case:
    """A decoder and a text of random tokens."""

    def __init__(self, sizes: Sizes) -> None:
        if sizes.device == "cpu":
            os.environ["TRANSFORMERS_SDPA_FORCE_GQA"] = "1"
        torch.manual_seed(0)
        self.model = sizes.build()
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.tokens = torch.randint(sizes.vocab_size, (1, sizes.length + 1), device=sizes.device)

    def gradient(self, way: Way) -> None:
        """Compute the gradient of the mean loss of the text."""
        self.model.zero_grad(set_to_none=False)
        if way.segment:
            self._replay(way)
        else:
            self._one_pass(checkpointed=way.kind == "checkpointed")

    def _one_pass(self, *, checkpointed: bool) -> None:
        if checkpointed:
            self.model.activation_checkpointing_enable()
        try:
            logits = self.model(self.tokens[:, :-1], use_cache=False).logits
            self._loss(logits, self.tokens[:, 1:]).backward()
        finally:
            if checkpointed:
                self.model.activation_checkpointing_disable()

    def _replay(self, way: Way) -> None:
        model = self.model

        def step(segment: tuple[Tensor, Tensor], cache: DynamicCache) -> tuple[Tensor, DynamicCache]:
            inputs, targets = segment
            return self._loss(model(inputs, cache=cache, use_cache=True).logits, targets), cache

        def advance(segment: tuple[Tensor, Tensor], cache: DynamicCache) -> DynamicCache:
            model.model(segment[0], cache=cache, use_cache=True)
            return cache

        inputs, targets = (part.split(way.segment, 1) for part in (self.tokens[:, :-1], self.tokens[:, 1:]))
        segments = list(zip(inputs, targets, strict=True))
        growing = 2 if way.kind == "replay" else None
        replay_backward(step, segments, DynamicCache(config=model.config), advance=advance, growing=growing)

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        logits = logits.flatten(0, 1)
        precise = logits if logits.dtype == torch.float64 else logits.float()  # as the losses of transformers
        return cross_entropy(precise, targets.flatten(), reduction="sum") / (self.tokens.shape[1] - 1)


def error_of(way: Way, sizes: Sizes) -> float:
    """Largest relative error of the gradient of a weight tensor of the toy, against ``plain``."""
    count = min(-(-sizes.length // way.segment), 16) if way.segment else 1
    toy = Sizes(length=4 * count, device=sizes.device, **TOY)
    got, exact = (Case(toy) for _ in range(2))
    got.gradient(way._replace(segment=4 if way.segment else 0))
    exact.gradient(Way("plain"))
    pairs = zip(got.model.parameters(), exact.model.parameters(), strict=True)
    return max(float((a.grad - b.grad).norm() / b.grad.norm()) for a, b in pairs)


def once(sizes: dict[str, Any], way: str, threads: int) -> Row:
    """Peak bytes and seconds of one run; on a CPU in a new process."""
    torch.set_num_threads(threads)
    Case(Sizes(length=8, device=sizes["device"], **TOY)).gradient(Way.parse(way))  # loads what is loaded once
    return measured(Case(Sizes(**sizes)), Way.parse(way), sizes["device"])


def measured(case: Case, way: Way, device: str) -> Row:
    """Peak bytes and seconds of one run, or that the device has too little memory."""
    start = now()
    try:
        used = peak(partial(case.gradient, way), device=device)
    except torch.OutOfMemoryError:
        return {"failed": OUT_OF_MEMORY}
    return {"peak": used, "seconds": now() - start}


def rows_of(sizes: Sizes, ways: Sequence[Way], *, repeats: int, threads: int, memory: bool) -> list[Row]:
    """A row for each way to compute the gradient of a text."""
    rows = {way: {"length": sizes.length, "way": str(way), "error": error_of(way, sizes)} for way in ways}
    case = Case(sizes)
    for way, row in rows.items() if memory else ():
        if sizes.device == "cpu":
            row |= in_new_process("long_context", "once", sizes=asdict(sizes), way=str(way), threads=threads)
        else:
            row |= measured(case, way, sizes.device)
            gc.collect()
            torch.cuda.empty_cache()
    works = {way: partial(case.gradient, way) for way, row in rows.items() if "failed" not in row}
    if Way("plain") in works:
        for way, taken in (seconds := by_turns(works, repeats=repeats)).items():
            rows[way] |= {"seconds": median(taken), "ratio": ratio(taken, seconds[Way("plain")])}
    return list(rows.values())


def main(
    lengths: list[int] = [1024, 2048, 4096, 8192, 16384],  # noqa: B006  # jsonargparse shows it in --help
    ways: list[str] = [  # noqa: B006
        *["plain", "checkpointed"],
        *["replay/256", "replay/1024", "replay/4096", "whole/256", "whole/1024", "whole/4096"],
    ],
    sizes: Sizes = Sizes(),
    repeats: int = 5,
    threads: int = 1,
    memory: bool = True,
    limit: float = 2.5,
    out: Path | None = None,
) -> None:
    """Print a row for each length and way, and write them to ``out`` as JSON and Markdown. ``limit`` is in GiB."""
    torch.set_num_threads(threads)
    settings = {name: value for name, value in asdict(sizes).items() if name != "length"}
    settings |= {"threads": threads, "repeats": repeats, "limit": limit, "transformers": transformers.__version__}
    tried, rows = [Way.parse(way) for way in ways], []
    for length in sorted(lengths):
        here = [way for way in tried if way.segment < length]
        rows += (new := rows_of(replace(sizes, length=length), here, repeats=repeats, threads=threads, memory=memory))
        over = {row["way"] for row in new if "failed" in row or row.get("peak", 0) > limit * 2**30}
        tried = [way for way in tried if str(way) not in over]
        report(rows, COLUMNS, settings=settings, out=out)  # after each length: a job may run out of time


def in_words(way: str) -> str:
    """A way, for the table."""
    kind, segment = Way.parse(way)
    if not segment:
        return "plain pass" if kind == "plain" else "gradient checkpointing"
    return f"replay in segments of {segment:,}" + (", every cache whole" if kind == "whole" else "")


COLUMNS: dict[str, Callable[[Row], str]] = {
    "tokens": lambda row: f"{row['length']:,}",
    "way": lambda row: in_words(row["way"]),
    "error": lambda row: f"{row['error']:.0e}" if row["error"] else "",
    "peak MiB": lambda row: row.get("failed") or (f"{row['peak'] / 2**20:,.0f}" if "peak" in row else ""),
    "s": lambda row: f"{row['seconds']:.2f}" if "seconds" in row else "",
    "time / plain (quartiles)": lambda row: with_quartiles(row["ratio"]) if "ratio" in row else "",
}

if __name__ == "__main__":
    sys.exit(auto_cli(main))
