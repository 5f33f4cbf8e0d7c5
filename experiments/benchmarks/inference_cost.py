"""Cost of reading and generating: after a long text against a short one, and Memformer against Transformer-XL.

    python experiments/benchmarks/inference_cost.py context        # after 1,000,000 tokens against 1,000; two minutes
    python experiments/benchmarks/inference_cost.py rivals         # equal width, a cache of 1,600; two minutes
    python experiments/benchmarks/inference_cost.py rivals --device cuda --lanes "[1,16]"

All cases take turns in one process, after a warm-up. Times are medians; ratios are taken round by round, with their
quartiles.
"""

from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jsonargparse import auto_cli
from measuring import Row, by_turns, now, ratio, report, resident, sizes_of, with_quartiles

from memformer_pl import models
from memformer_pl.contract import Segment, SegmentModel, state_bytes
from memformer_pl.inference.sampling import Sampling
from memformer_pl.inference.session import Session
from memformer_pl.models import Memformer, TransformerXL

PIECE = 4096
"""Tokens of a long text that are fed at once."""
KINDS = ("predict", "advance", "prefill", "decode")
"""The operations of a model that are timed."""


def fed(session: Session, *, tokens: int) -> Session:
    """Feed the session random tokens in each lane, and return it."""
    for start in range(0, tokens, PIECE):
        session.feed(torch.randint(session.model.vocab_size, (session.lanes, min(PIECE, tokens - start))))
    return session


def segment_of_tokens(session: Session, sampling: Sampling) -> None:
    """Generate as many tokens as a segment has."""
    for _ in range(session.model.segment_length):
        session.next(sampling)


def after_a_long_text(model: SegmentModel, *, short: int, long: int, rounds: int) -> dict[str, Any]:
    """Seconds per token of two sessions after texts of different length, alternating token by token, and resident bytes
    before and after the long text.

    Ratios are those of the median token of a segment, and of all tokens of a segment together.
    """
    sampling, early, late = Sampling(), fed(Session(model), tokens=short), fed(Session(model), tokens=short)
    for session in (early, late):
        for _ in range(3):
            segment_of_tokens(session, sampling)
    before = resident("VmRSS")
    start = now()
    fed(late, tokens=long - int(late.tokens_read))
    feeding = now() - start
    cases = {"short": partial(early.next, sampling), "long": partial(late.next, sampling)}
    by_token, length = by_turns(cases, repeats=rounds * model.segment_length), model.segment_length
    # by segment, since its first token pays for the whole segment
    segments = {name: [times[n : n + length] for n in range(0, len(times), length)] for name, times in by_token.items()}
    return {
        "feeding": feeding,
        "seconds": {name: median(times) for name, times in by_token.items()},
        "ratio": ratio(*([median(times) for times in segments[name]] for name in ("long", "short"))),
        "ratio_of_segments": ratio(*([sum(times) for times in segments[name]] for name in ("long", "short"))),
        "resident": [before, resident("VmRSS")],
    }


def context(
    names: list[str] = ["Memformer"],  # noqa: B006  # jsonargparse shows it in --help
    short: int = 1_000,
    long: int = 1_000_000,
    rounds: int = 101,
    dim: int = 128,
    layers: int = 4,
    segment_length: int = 64,
    device: str = "cpu",
    threads: int = 1,
    out: Path | None = None,
) -> None:
    """Compare time per token and resident memory of a session after ``long`` tokens with one after ``short``.

    Resident memory is that of the process, before and after the long text is read. All models have the same number of
    layers; Memformer has half as many encoder layers in addition.
    """
    torch.set_num_threads(threads)
    rows = []
    for name in names:
        torch.manual_seed(0)
        sizes = {"vocab_size": 256, "dim": dim, "heads": 4, "segment_length": segment_length}
        depth = {"encoder_layers": layers // 2, "decoder_layers": layers} if name == "Memformer" else {"layers": layers}
        kind = getattr(models, name)
        model = kind(**sizes_of(kind, sizes), **depth).to(device).eval()
        rows.append({"model": name, **after_a_long_text(model, short=short, long=long, rounds=rounds)})
    settings = {"dim": dim, "layers": layers, "segment_length": segment_length, "short": short, "long": long}
    report(rows, CONTEXT, settings={**settings, "rounds": rounds, "device": device, "threads": threads}, out=out)


def grown(row: Row) -> str:
    """Resident memory before and after the long text."""
    before, after = (each / 2**20 for each in row["resident"])
    return f"{before:.1f} -> {after:.1f} ({after / before:.4f})"


CONTEXT = {
    "model": lambda row: row["model"],
    "ms / token, short": lambda row: f"{1000 * row['seconds']['short']:.3f}",
    "long": lambda row: f"{1000 * row['seconds']['long']:.3f}",
    "ratio (quartiles)": lambda row: with_quartiles(row["ratio"], digits=3),
    "of whole segments": lambda row: with_quartiles(row["ratio_of_segments"], digits=3),
    "resident MiB": grown,
}


class Rival:
    """A model with a full memory, in the middle of a segment.

    Args:
        model: In evaluation mode.
        lanes: Texts that are read in parallel.
    """

    def __init__(self, model: SegmentModel, *, lanes: int) -> None:
        self.model, self.lanes = model, lanes
        device, shape = next(model.parameters()).device, (lanes, model.segment_length)
        tokens, starts = torch.randint(model.vocab_size, shape, device=device), torch.ones(lanes, device=device).bool()
        first = Segment(tokens, torch.ones_like(tokens).bool(), starts)
        self.segment = first._replace(document_start=~starts, continues=True)
        with torch.inference_mode():
            self.state = model.initial_state(lanes)
            for segment in (first, self.segment):
                self.state = model.advance(segment, self.state)
            if isinstance(model, TransformerXL):  # the content of the cache does not affect its cost
                cache = torch.randn_like(self.state.cache)
                self.state = self.state._replace(cache=cache, filled=torch.full_like(self.state.filled, cache.shape[2]))
            half = [field[:, : model.segment_length // 2] for field in self.segment[:2]]
            self.cache = model.decode(*half, model.prefill(self.state, lanes)[1])[1]

    @torch.inference_mode()
    def predict(self) -> None:
        """Compute the losses of a given segment."""
        self.model(self.segment, self.state)

    @torch.inference_mode()
    def advance(self) -> None:
        """Take a segment of a prompt into the state."""
        self.model.advance(self.segment, self.state)

    @torch.inference_mode()
    def prefill(self) -> None:
        """Prepare the first token of a segment."""
        self.model.prefill(self.state, self.lanes)

    @torch.inference_mode()
    def decode(self) -> None:
        """Process one token in the middle of a segment."""
        self.model.decode(self.segment.tokens[:, :1], self.segment.token_mask[:, :1], self.cache)

    def times(self, taken: dict[str, list[float]]) -> dict[str, list[float]]:
        """Add the time of a generated token, with its share of what is computed once per segment."""
        once = zip(taken["prefill"], taken["advance"], strict=True)
        shares = [(prefill + advance) / self.model.segment_length for prefill, advance in once]
        return {**taken, "token": [one + share for one, share in zip(taken["decode"], shares, strict=True)]}


def built(vocab_size: int, dim: int, layers: int, memory_length: int, segment_length: int) -> dict[str, SegmentModel]:
    """Transformer-XL with a cache, and Memformer with an equally deep decoder and four encoder layers in addition."""
    torch.manual_seed(0)
    sizes = {"vocab_size": vocab_size, "dim": dim, "heads": 8, "segment_length": segment_length}
    deep = {**sizes, "encoder_layers": 4, "decoder_layers": layers}
    return {
        f"Transformer-XL, memory {memory_length}": TransformerXL(**sizes, layers=layers, memory_length=memory_length),
        "Memformer, 1024 slots": Memformer(**deep, slots=1024),
        "Memformer, 64 slots": Memformer(**deep, slots=64),
    }


def rivals(
    lanes: list[int] = [1, 4],  # noqa: B006  # jsonargparse shows it in --help
    rounds: int = 7,
    vocab_size: int = 8192,
    dim: int = 512,
    layers: int = 16,
    memory_length: int = 1600,
    segment_length: int = 128,
    device: str = "cpu",
    threads: int = 1,
    out: Path | None = None,
) -> None:
    """Compare Transformer-XL's time with Memformer's, and the state of a lane.

    ``predict``: the losses of a given segment. ``advance``: a segment of a prompt, of which only the next state is
    needed. ``prefill``: what is computed before the first token of a segment is generated. ``decode``: a token in the
    middle of a segment. ``token``: a generated token, with its share of ``prefill`` and ``advance``.
    """
    torch.set_num_threads(threads)
    sizes = {"dim": dim, "layers": layers, "memory_length": memory_length, "segment_length": segment_length}
    rows = []
    for count in lanes:
        cases = {
            name: Rival(model.to(device).eval(), lanes=count) for name, model in built(vocab_size, **sizes).items()
        }
        works = {(name, kind): getattr(case, kind) for name, case in cases.items() for kind in KINDS}
        taken = by_turns(works, repeats=rounds)
        times = {name: case.times({kind: taken[name, kind] for kind in KINDS}) for name, case in cases.items()}
        base = next(iter(times.values()))
        for kind in (*KINDS, "token"):
            for name, case in cases.items():
                row = {"lanes": count, "what": kind, "model": name, "seconds": median(times[name][kind])}
                row["ratio"] = ratio(base[kind], times[name][kind])
                rows.append({**row, "state_bytes": state_bytes(case.state)})
    settings = {**sizes, "vocab_size": vocab_size, "rounds": rounds, "device": device, "threads": threads}
    settings["precision"] = "32-true"
    report(rows, RIVALS, settings=settings, out=out)


RIVALS = {
    "lanes": lambda row: str(row["lanes"]),
    "what": lambda row: row["what"],
    "model": lambda row: row["model"],
    "ms": lambda row: f"{1000 * row['seconds']:.1f}",
    "Transformer-XL's / this (quartiles)": lambda row: with_quartiles(row["ratio"], digits=3),
    "KiB carried": lambda row: f"{row['state_bytes'] / 1024:,.1f}",
}


if __name__ == "__main__":
    auto_cli([context, rivals])
