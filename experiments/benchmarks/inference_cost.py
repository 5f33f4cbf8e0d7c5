"""What reading and writing cost: after a long text against a short one, and Memformer against Transformer-XL.

    python experiments/benchmarks/inference_cost.py context        # after 1,000,000 tokens against 1,000; two minutes
    python experiments/benchmarks/inference_cost.py rivals         # equal width, a cache of 1,600; two minutes
    python experiments/benchmarks/inference_cost.py rivals --device cuda --lanes "[1,16]"

Everything takes turns in one process, after a warm-up. Times are medians, ratios are taken round by round, with their
quartiles.
"""

from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jsonargparse import auto_cli
from measuring import Row, by_turns, now, ratio, report, resident, sizes_of, told

from memformer_pl import models
from memformer_pl.contract import Segment, SegmentModel, state_bytes
from memformer_pl.inference.sampling import Sampling
from memformer_pl.inference.session import Session
from memformer_pl.models import Memformer, TransformerXL

PIECE = 4096
"""Tokens of a long text that are fed at once."""


KINDS = ("read", "advance", "begin", "extend")
"""What is timed of a model by itself."""


def fed(session: Session, *, tokens: int) -> Session:
    """The session, after so many random tokens more in each lane."""
    for start in range(0, tokens, PIECE):
        session.feed(torch.randint(session.model.vocab_size, (session.lanes, min(PIECE, tokens - start))))
    return session


def segment_of_tokens(session: Session, sampling: Sampling) -> None:
    """Generate as many tokens as a segment has."""
    for _ in range(session.model.segment_length):
        session.next(sampling)


def after_a_long_text(model: SegmentModel, *, short: int, long: int, rounds: int) -> dict[str, Any]:
    """Seconds of a token of two sessions that have read so much, by turns token by token; resident bytes before and
    after the long text.

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
    # all tokens of a segment, of which one is the first and pays for all
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
    """Time of a token, and resident memory, of a session after ``long`` tokens against one after ``short``.

    Resident memory is that of the process, before the long text is read and after it. All models have as many layers;
    Memformer's encoder has half as many besides.
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
    """Resident memory before the long text and after it."""
    before, after = (each / 2**20 for each in row["resident"])
    return f"{before:.1f} -> {after:.1f} ({after / before:.4f})"


CONTEXT = {
    "model": lambda row: row["model"],
    "ms / token, short": lambda row: f"{1000 * row['seconds']['short']:.3f}",
    "long": lambda row: f"{1000 * row['seconds']['long']:.3f}",
    "ratio (quartiles)": lambda row: told(row["ratio"], digits=3),
    "of whole segments": lambda row: told(row["ratio_of_segments"], digits=3),
    "resident MiB": grown,
}


class Rival:
    """A model whose memory is full, in the middle of a segment, and what is timed of it.

    Args:
        model: In evaluation mode.
        lanes: Texts that are read side by side.
    """

    def __init__(self, model: SegmentModel, *, lanes: int) -> None:
        self.model, self.lanes = model, lanes
        device, shape = next(model.parameters()).device, (lanes, model.segment_length)
        tokens, starts = torch.randint(model.vocab_size, shape, device=device), torch.zeros(lanes, device=device).bool()
        self.segment = Segment(tokens, torch.ones_like(tokens).bool(), starts)
        with torch.inference_mode():
            self.state = model.initial_state(lanes)
            for _ in range(2):
                self.state = model.advance(self.segment, self.state)
            if isinstance(model, TransformerXL):  # what is cached does not matter to its cost
                rows = torch.randn_like(self.state.cache)
                self.state = self.state._replace(cache=rows, filled=torch.full_like(self.state.filled, rows.shape[2]))
            half = [field[:, : model.segment_length // 2] for field in self.segment[:2]]
            self.draft = model.extend(*half, model.begin(self.state, lanes)[1])[1]

    @torch.inference_mode()
    def read(self) -> None:
        """Predict a segment that is given."""
        self.model(self.segment, self.state)

    @torch.inference_mode()
    def advance(self) -> None:
        """Read a segment of a prompt."""
        self.model.advance(self.segment, self.state)

    @torch.inference_mode()
    def begin(self) -> None:
        """Look at what stands in front of a segment, before its first token is written."""
        self.model.begin(self.state, self.lanes)

    @torch.inference_mode()
    def extend(self) -> None:
        """Read a token in the middle of a segment."""
        self.model.extend(self.segment.tokens[:, :1], self.segment.token_mask[:, :1], self.draft)

    def times(self, taken: dict[str, list[float]]) -> dict[str, list[float]]:
        """With those of a token that is written, its share of what is computed once for a segment included."""
        once = zip(taken["begin"], taken["advance"], strict=True)
        shares = [(begin + advance) / self.model.segment_length for begin, advance in once]
        return {**taken, "token": [one + share for one, share in zip(taken["extend"], shares, strict=True)]}


def built(vocab_size: int, dim: int, layers: int, memory_length: int, segment_length: int) -> dict[str, SegmentModel]:
    """Transformer-XL with a cache, and Memformer as deep in its decoder, with four encoder layers besides."""
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
    """Transformer-XL's time against Memformer's, and bytes carried by a lane.

    ``read``: a segment that is given is predicted. ``advance``: a segment of a prompt, of which only the next state is
    wanted. ``begin``: what is computed before the first token of a segment is written. ``extend``: a token in the
    middle of a segment. ``token``: one that is written, with its share of ``begin`` and ``advance``.
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
    report(rows, RIVALS, settings=settings, out=out)


RIVALS = {
    "lanes": lambda row: str(row["lanes"]),
    "what": lambda row: row["what"],
    "model": lambda row: row["model"],
    "ms": lambda row: f"{1000 * row['seconds']:.1f}",
    "Transformer-XL's / it (quartiles)": lambda row: told(row["ratio"], digits=3),
    "KiB carried": lambda row: f"{row['state_bytes'] / 1024:,.1f}",
}


if __name__ == "__main__":
    auto_cli([context, rivals])
