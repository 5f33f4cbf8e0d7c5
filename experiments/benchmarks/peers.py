r"""Other libraries beside this package: time, peak memory, and error of the gradient of one rollout.

    pip install -e '.[peers]'
    python experiments/benchmarks/peers.py                                          # every library that is installed
    python experiments/benchmarks/peers.py --sizes.segments 32 --models "[RecurrentMemoryTransformer]" --dropouts "[0]"

Time: all ways of one kind of model take turns; ratios are taken pair by pair. Memory: each way runs in its own process;
the peak above what the model, its gradients and its data take before. Error: the distance of the gradient from that of
one backward through the loss of all segments, with the same weights and the same seed before both, divided by its
norm, for the weight tensor where it is largest; in double precision. A library that is not installed is a row that
says so; one without dropout has rows at 0 only.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jsonargparse import auto_cli
from measuring import Row, by_turns, in_new_process, peak, ratio, report, with_quartiles
from peer_libraries import LIBRARIES, Sizes, Way
from torch import Tensor

from memformer_pl import models
from memformer_pl.contract import Segment, SegmentModel, SegmentOutput, detach
from memformer_pl.gradients.rollout import add_gradient

DEFAULT = Sizes()
TINY = Sizes(segments=2, lanes=1, segment_length=8, vocab_size=16, dim=16, heads=2, layers=2, slots=4)
"""Run before memory is measured, since a library may load more code at its first call."""


def our_model(sizes: Sizes, dropout: float, *, model: str) -> SegmentModel:
    """A model of this package."""
    half, slots, length = sizes.layers // 2, sizes.slots, sizes.segment_length
    options: dict[str, dict[str, int]] = {
        "Memformer": {"encoder_layers": half, "decoder_layers": sizes.layers - half, "slots": slots},
        "RecurrentMemoryTransformer": {"layers": sizes.layers, "memory_tokens": slots},
        "TransformerXL": {"layers": sizes.layers, "memory_length": length},
        "CompressiveTransformer": {
            "layers": sizes.layers,
            "memory_length": length,
            "compressed_length": length // 4,
        },
    }
    built: SegmentModel = getattr(models, model)(
        vocab_size=sizes.vocab_size,
        dim=sizes.dim,
        heads=sizes.heads,
        segment_length=length,
        dropout=dropout,
        **options[model],
    )
    return built


def our_segments(tokens: Tensor, sizes: Sizes) -> list[Segment]:
    """The rollout, which begins a document in every lane."""
    lanes, length = sizes.lanes, sizes.segment_length
    mask = torch.ones(lanes, length, dtype=torch.bool)
    each = tokens.split(length, 1)[: sizes.segments]
    return [Segment(part, mask, torch.full((lanes,), t == 0), continues=t > 0) for t, part in enumerate(each)]


def our_cost(output: SegmentOutput, sizes: Sizes) -> Tensor:
    """A segment's part of the mean over all tokens of the rollout."""
    tokens = sizes.segments * sizes.lanes * sizes.segment_length
    return output.token_losses.sum() / tokens + output.auxiliary_loss / sizes.segments


def our_gradient(model: SegmentModel, tokens: Tensor, sizes: Sizes, *, gradient: str, grouped: bool = False) -> None:
    """A gradient of this package; a grouped one decodes all segments at once."""
    add_gradient(
        model,
        partial(our_cost, sizes=sizes),
        our_segments(tokens, sizes),
        detach(model.initial_state(sizes.lanes)),
        gradient=gradient,
        decoder_group=sizes.segments if grouped else 1,
    )


def our_loss(model: SegmentModel, tokens: Tensor, sizes: Sizes) -> Tensor:
    """The plain loop."""
    total, state = torch.zeros(()), detach(model.initial_state(sizes.lanes))
    for segment in our_segments(tokens, sizes):
        output, state = model(segment, state)
        total = total + our_cost(output, sizes)
    return total


def our_way(model: str, gradient: str, *, grouped: bool = False) -> Way:
    """A gradient of a model of this package."""
    return Way(
        model=model,
        library="this package",
        module="memformer_pl",
        called=f"{gradient}, all segments in one group" if grouped else gradient,
        build=partial(our_model, model=model),
        train=partial(our_gradient, gradient=gradient, grouped=grouped),
        loss=our_loss,
    )


OURS = [
    our_way("Memformer", "replay"),
    our_way("Memformer", "replay", grouped=True),
    our_way("Memformer", "bptt"),
    our_way("RecurrentMemoryTransformer", "replay"),
    our_way("RecurrentMemoryTransformer", "bptt"),
    our_way("TransformerXL", "truncated"),
    our_way("TransformerXL", "truncated", grouped=True),
    our_way("TransformerXL", "bptt"),
    our_way("CompressiveTransformer", "truncated"),
    our_way("CompressiveTransformer", "bptt"),
]
"""Ways of this package. ``truncated`` is exact for models that detach their cache."""
MODELS = list(dict.fromkeys(way.model for way in OURS))


def ways() -> list[Way]:
    """All ways: ours, then those of the other libraries."""
    return OURS + LIBRARIES


@dataclass
class Case:
    """A way with an untrained model and a rollout of random tokens."""

    way: Way
    sizes: Sizes
    dropout: float
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.tokens = self.sizes.tokens()
        self.model = self.way.build(self.sizes, self.dropout).to(self.dtype).train()
        for parameter in self.model.parameters():
            # some weights are zero at first, and then others get no gradient
            parameter.data += 0.02 * torch.randn_like(parameter)
            parameter.grad = torch.zeros_like(parameter)

    def rollout(self) -> None:
        """Compute the gradient of one rollout, as the library does it."""
        self.model.zero_grad(set_to_none=False)
        if self.way.train is None:
            self.way.loss(self.model, self.tokens, self.sizes).backward()
        else:
            self.way.train(self.model, self.tokens, self.sizes)

    def plain_rollout(self) -> None:
        """Compute it by one backward through all segments."""
        self.way.loss(self.model, self.tokens, self.sizes).backward()

    def gradient(self, work: Callable[[], None]) -> list[Tensor]:
        """The gradient of each weight tensor after ``work``, which starts from a seed of its own."""
        torch.manual_seed(1)
        work()
        return [parameter.grad for parameter in self.model.parameters()]


def error(way: Way, sizes: Sizes, dropout: float) -> float | None:
    """Largest relative error of the gradient of a weight tensor; None where one backward computes all gradients."""
    if way.train is None:
        return None
    # two models, since a rollout may change one
    case, plain = (Case(way, sizes, dropout, torch.float64) for _ in range(2))
    got, exact = case.gradient(case.rollout), plain.gradient(plain.plain_rollout)
    # a tensor that hardly matters is compared with all of them, since its gradient may be nothing but rounding
    least = 1e-6 * torch.stack([each.norm() for each in exact]).norm()
    return max(float((a - b).norm() / b.norm().clamp(min=least)) for a, b in zip(got, exact, strict=True))


def untrained(case: Case) -> int:
    """Number of weights in tensors that get no gradient in a second rollout."""
    case.rollout()
    case.rollout()
    return sum(p.numel() for p in case.model.parameters() if not p.grad.any())


def peak_of(called: str, library: str, model: str, sizes: dict[str, Any], dropout: float, threads: int) -> int:
    """Peak bytes of a rollout above the start."""
    torch.set_num_threads(threads)
    (way,) = (p for p in ways() if (p.called, p.library, p.model) == (called, library, model))
    Case(way, TINY, dropout).rollout()
    return peak(Case(way, Sizes(**sizes), dropout).rollout, device="cpu")


def row_of(way: Way, sizes: Sizes, dropout: float) -> tuple[Row, Case | None]:
    """A row with all but time and memory, and the case if it can be timed; ``problem`` says why not."""
    row: Row = {"model": way.model, "library": way.library, "called": way.called, "dropout": dropout}
    if find_spec(way.module) is None:
        return row | {"problem": "not installed"}, None
    if way not in OURS:
        row["version"] = version(way.library)
    try:
        case = Case(way, sizes, dropout)
        row["weights"] = sum(p.numel() for p in case.model.parameters())
        row |= {"untrained": untrained(case), "error": error(way, sizes, dropout)}
    except Exception as exception:
        if way in OURS:
            raise
        return row | {"problem": f"{type(exception).__name__}: {exception}"}, None
    return row, case


def rows_of(model: str, sizes: Sizes, dropout: float, *, repeats: int, threads: int, memory: bool) -> list[Row]:
    """A row for each way of one kind of model."""
    ways_here = [way for way in ways() if way.model == model and (way.dropout or not dropout)]
    rows, cases = zip(*(row_of(way, sizes, dropout) for way in ways_here), strict=True)
    works = {n: case.rollout for n, case in enumerate(cases) if case is not None}
    for n, taken in (seconds := by_turns(works, repeats=repeats)).items() if repeats else ():
        rows[n]["seconds"] = median(taken)
        if repeats > 1:
            rows[n]["ratios"] = {p.called: ratio(seconds[m], taken) for m, p in enumerate(ways_here) if p in OURS}
    for n in works if memory else ():
        names = {name: rows[n][name] for name in ("called", "library", "model")}
        rows[n]["peak"] = in_new_process(
            "peers", "peak_of", **names, sizes=asdict(sizes), dropout=dropout, threads=threads
        )
    return list(rows)


def main(
    models: list[str] = MODELS,
    dropouts: list[float] = [0.0, 0.1],  # noqa: B006  # jsonargparse shows it in --help
    sizes: Sizes = DEFAULT,
    repeats: int = 7,
    threads: int = 1,
    memory: bool = True,
    out: Path | None = None,
) -> None:
    """Print a row for each way of our models and their peers, and write them to ``out`` as JSON and Markdown."""
    torch.set_num_threads(threads)
    rows: list[Row] = []
    for model in models:
        for dropout in dropouts:
            rows += rows_of(model, sizes, dropout, repeats=repeats, threads=threads, memory=memory)
    report(rows, COLUMNS, settings={**asdict(sizes), "threads": threads, "repeats": repeats}, out=out)


def error_of(row: Row) -> str:
    """The error of the gradient, or why there is none."""
    if "problem" in row:
        return str(row["problem"]).splitlines()[0][:80]
    return "one backward" if row["error"] is None else f"{row['error']:.0e}" if row["error"] else "0"


def ratio_of(row: Row, *called: str) -> str:
    """Ratio of the time of one of our ways to that of the row."""
    ratios = row.get("ratios", {})
    return next((with_quartiles(ratios[each]) for each in called if each in ratios), "")


COLUMNS = {
    "nearest of ours": lambda row: row["model"],
    "way": lambda row: f"{row['library']} {row.get('version', '')}".rstrip() + f": {row['called']}",
    "dropout": lambda row: f"{row['dropout']:g}",
    "weights": lambda row: f"{row['weights']:,}" if "weights" in row else "",
    "without gradient": lambda row: f"{row['untrained']:,}" if "untrained" in row else "",
    "error": error_of,
    "s": lambda row: f"{row['seconds']:.3f}" if "seconds" in row else "",
    "replay / it": lambda row: ratio_of(row, "replay", "truncated"),
    "bptt / it": lambda row: ratio_of(row, "bptt"),
    "MiB": lambda row: f"{row['peak'] / 2**20:.1f}" if "peak" in row else "",
}

if __name__ == "__main__":
    auto_cli(main)
