"""What reading and writing cost: after a long text against a short one, and Memformer against Transformer-XL.

    python experiments/benchmarks/inference_cost.py context        # after 1,000,000 tokens against 1,000; two minutes
    python experiments/benchmarks/inference_cost.py rivals         # equal width, a cache of 1,600; two minutes
    python experiments/benchmarks/inference_cost.py rivals --device cuda --lanes "[1,16]"

Everything takes turns in one process, after a warm-up. Times are medians, ratios are taken round by round, with their
quartiles.
"""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any, TypeVar

import torch
from jsonargparse import auto_cli
from measuring import sizes_of
from replay_cost import resident
from rich.console import Console
from rich.table import Table

from memformer_pl import models
from memformer_pl.models import Memformer, TransformerXL
from memformer_pl.recurrence import Segment, SegmentModel, state_bytes
from memformer_pl.sampling import Sampling
from memformer_pl.session import Session

K = TypeVar("K")

PIECE = 4096
"""Tokens of a long text that are fed at once."""


KINDS = ("read", "advance", "begin", "extend")
"""What is timed of a model by itself."""


def fed(session: Session, *, tokens: int) -> Session:
    """The session, after so many random tokens more in each lane."""
    for start in range(0, tokens, PIECE):
        session.feed(torch.randint(session.model.vocab, (session.lanes, min(PIECE, tokens - start))))
    return session


def seconds(work: Callable[[], object], device: str) -> float:
    """How long something takes."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def segment_of_tokens(session: Session, sampling: Sampling) -> None:
    """Generate as many tokens as a segment has."""
    for _ in range(session.model.segment_length):
        session.next(sampling)


def turns(cases: dict[K, Callable[[], object]], *, rounds: int, device: str) -> dict[K, list[float]]:
    """Seconds of each case, all by turns, every other round in the other order; the first round warms up."""
    taken: dict[K, list[float]] = {name: [] for name in cases}
    for n in range(rounds + 1):
        for name, work in list(cases.items())[:: 1 if n % 2 else -1]:
            time_taken = seconds(work, device)
            if n:
                taken[name].append(time_taken)
    return taken


def quartiles(ones: list[float], others: list[float]) -> list[float]:
    """Of how many times the others the ones are, round by round."""
    return quantiles([one / other for one, other in zip(ones, others, strict=True)], n=4)


def after_a_long_text(model: SegmentModel, *, short: int, long: int, rounds: int, device: str) -> dict[str, Any]:
    """Seconds of a token of two sessions that have read so much, by turns token by token; resident bytes before and
    after the long text.

    Ratios are those of the median token of a segment, and of all tokens of a segment together.
    """
    sampling, early, late = Sampling(), fed(model.open(), tokens=short), fed(model.open(), tokens=short)
    for session in (early, late):
        for _ in range(3):
            segment_of_tokens(session, sampling)
    before = resident("VmRSS")
    feeding = seconds(partial(fed, late, tokens=long - int(late.tokens_read)), device)
    cases = {"short": partial(early.next, sampling), "long": partial(late.next, sampling)}
    by_token, length = turns(cases, rounds=rounds * model.segment_length, device=device), model.segment_length
    # all tokens of a segment, of which one is the first and pays for all
    segments = {name: [times[n : n + length] for n in range(0, len(times), length)] for name, times in by_token.items()}
    return {
        "feeding": feeding,
        "seconds": {name: median(times) for name, times in by_token.items()},
        "ratio": quartiles(*([median(times) for times in segments[name]] for name in ("long", "short"))),
        "ratio_of_segments": quartiles(*([sum(times) for times in segments[name]] for name in ("long", "short"))),
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
        sizes = {"vocab": 256, "dim": dim, "heads": 4, "segment_length": segment_length}
        depth = {"encoder_layers": layers // 2, "decoder_layers": layers} if name == "Memformer" else {"layers": layers}
        kind = getattr(models, name)
        model = kind(**sizes_of(kind, sizes), **depth).to(device).eval()
        row = after_a_long_text(model, short=short, long=long, rounds=rounds, device=device)
        rows.append({"model": name, **row})
    columns = f"ms / token after {short:,}", f"after {long:,}", "ratio (quartiles)", "of whole segments", "resident MiB"
    table = Table("model", *columns)
    table.columns[0].no_wrap = True
    for row in rows:
        milliseconds = (f"{1000 * row['seconds'][which]:.3f}" for which in ("short", "long"))
        before, after = (each / 2**20 for each in row["resident"])
        grown = f"{before:.1f} -> {after:.1f} ({after / before:.4f})"
        table.add_row(
            row["model"], *milliseconds, *(as_ratio(row[name]) for name in ("ratio", "ratio_of_segments")), grown
        )
    Console(width=120).print(table)
    settings = {"dim": dim, "layers": layers, "segment_length": segment_length, "short": short, "long": long}
    write(out, {**settings, "rounds": rounds, "device": device, "threads": threads}, rows)


class Rival:
    """A model whose memory is full, in the middle of a segment, and what is timed of it.

    Args:
        model: In evaluation mode.
        lanes: Texts that are read side by side.
    """

    def __init__(self, model: SegmentModel, *, lanes: int) -> None:
        self.model, self.lanes = model, lanes
        device, shape = next(model.parameters()).device, (lanes, model.segment_length)
        tokens, starts = torch.randint(model.vocab, shape, device=device), torch.zeros(lanes, device=device).bool()
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
        self.model.extend(self.segment.tokens[:, :1], self.segment.present[:, :1], self.draft)

    def times(self, taken: dict[str, list[float]]) -> dict[str, list[float]]:
        """With those of a token that is written, its share of what is computed once for a segment included."""
        once = zip(taken["begin"], taken["advance"], strict=True)
        shares = [(begin + advance) / self.model.segment_length for begin, advance in once]
        return {**taken, "token": [one + share for one, share in zip(taken["extend"], shares, strict=True)]}


def built(vocab: int, dim: int, layers: int, memory_length: int, segment_length: int) -> dict[str, SegmentModel]:
    """Transformer-XL with a cache, and Memformer as deep in its decoder, with four encoder layers besides."""
    torch.manual_seed(0)
    sizes = {"vocab": vocab, "dim": dim, "heads": 8, "segment_length": segment_length}
    deep = {**sizes, "encoder_layers": 4, "decoder_layers": layers}
    return {
        f"Transformer-XL, memory {memory_length}": TransformerXL(**sizes, layers=layers, memory_length=memory_length),
        "Memformer, 1024 slots": Memformer(**deep, slots=1024),
        "Memformer, 64 slots": Memformer(**deep, slots=64),
    }


def rivals(
    lanes: list[int] = [1, 4],  # noqa: B006  # jsonargparse shows it in --help
    rounds: int = 7,
    vocab: int = 8192,
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
        cases = {name: Rival(model.to(device).eval(), lanes=count) for name, model in built(vocab, **sizes).items()}
        works = {(name, kind): getattr(case, kind) for name, case in cases.items() for kind in KINDS}
        taken = turns(works, rounds=rounds, device=device)
        times = {name: case.times({kind: taken[name, kind] for kind in KINDS}) for name, case in cases.items()}
        base = next(iter(times.values()))
        for kind in (*KINDS, "token"):
            for name, case in cases.items():
                row = {"lanes": count, "what": kind, "model": name, "seconds": median(times[name][kind])}
                ratio = quartiles(base[kind], times[name][kind])
                rows.append({**row, "ratio": ratio, "state_bytes": state_bytes(case.state)})
    table = Table("lanes", "what", "model", "ms", "Transformer-XL's / it (quartiles)", "KiB carried")
    for row in rows:
        figures = f"{1000 * row['seconds']:.1f}", as_ratio(row["ratio"]), f"{row['state_bytes'] / 1024:,.1f}"
        table.add_row(str(row["lanes"]), row["what"], row["model"], *figures)
    Console(width=120).print(table)
    write(out, {**sizes, "vocab": vocab, "rounds": rounds, "device": device, "threads": threads}, rows)


def as_ratio(quartiles: list[float]) -> str:
    """For a table."""
    low, middle, high = quartiles
    return f"{middle:.3f} ({low:.3f}-{high:.3f})"


def write(out: Path | None, settings: dict[str, object], rows: list[dict]) -> None:
    """As JSON, where it is wanted."""
    if out is not None:
        out.write_text(json.dumps({"settings": settings, "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    auto_cli([context, rivals])
