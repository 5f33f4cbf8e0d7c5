r"""Count what one rollout makes the host launch: a yardstick that is the same on every machine, with a GPU or without.

    python experiments/benchmarks/operations.py --out experiments/results/operations.json

Memformer with 4 + 16 layers, horizon 8, dropout 0.1; the counts hardly depend on widths and lengths. ``eager`` counts
the computing operations that torch dispatches, views aside. ``compiled`` counts kernels that were generated for the
compiled regions, and the library calls and other operations beside them, in a profile; a profile sees a few operations
less, which is why it has a column for what is not compiled too. ``captured`` counts what Python calls for a rollout
whose gradient is a captured graph: its launch, and the copies around it. The checks of values, which run on a CPU only,
are left out. On a GPU, a dispatched operation is the launch of one kernel or a few.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from jsonargparse import auto_cli
from measuring import Row, report
from torch import Tensor
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from memformer_pl.contract import Segment, SegmentModel, SegmentOutput, State, detach
from memformer_pl.gradients.captured import CapturedGradient, with_one_flag
from memformer_pl.gradients.rollout import add_gradient
from memformer_pl.models import Memformer

T = TypeVar("T")
NOTHING = (
    "view _unsafe_view t transpose permute expand detach unsqueeze squeeze select slice split split_with_sizes alias "
    "unbind as_strided reshape chunk _reshape_alias lift_fresh diagonal promote_types"
)
VIEWS = frozenset(NOTHING.split())
"""Operations that compute nothing."""
GENERATED = "cpp_fused"
"""In the name of every kernel that is generated for a CPU."""


class Count(TorchDispatchMode):
    """Count the computing operations that are dispatched inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Count a call, and run it."""
        name = func._schema.name.split("::")[1]
        if name not in VIEWS:
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


class Case:
    """A Memformer in training, and a rollout whose documents start with the first segment.

    Args:
        encoder_layers: Its encoder layers.
        decoder_layers: Its decoder layers.
        horizon: Segments of the rollout.
    """

    def __init__(self, *, encoder_layers: int = 4, decoder_layers: int = 16, horizon: int = 8) -> None:
        torch.manual_seed(0)
        lanes, length, vocab = 4, 16, 256
        self.model: SegmentModel = Memformer(
            vocab_size=vocab,
            dim=64,
            heads=2,
            ffn_dim=128,
            encoder_layers=encoder_layers,
            decoder_layers=decoder_layers,
            slots=16,
            segment_length=length,
            dropout=0.1,
        ).train()
        every = torch.ones(lanes, length, dtype=torch.bool)
        self.segments = [
            Segment(
                tokens=torch.randint(vocab, (lanes, length)),
                token_mask=every,
                document_start=torch.full((lanes,), t == 0),
                continues=t > 0,
                seeds=torch.tensor([t]),
            )
            for t in range(horizon)
        ]
        self.divisor = torch.tensor(float(horizon * lanes * length))
        self.state: State = detach(self.model.initial_state(lanes))

    def rollout(self, gradient: str = "replay", group: int = 1) -> None:
        """Compute the gradient of the rollout."""
        self.model.zero_grad()
        self._gradient(self.segments, self.state, gradient, group)

    def captured(self, gradient: str, group: int) -> Callable[[], object]:
        """A function that computes the same by a graph, which does nothing here."""
        captured = CapturedGradient(self._gradient, self.model, recorder=lambda device: Idle())
        call = partial(captured, with_one_flag(self.segments), self.state, gradient, group)
        call()
        return call

    def _gradient(self, segments: Sequence[Segment], state: State, gradient: str, group: int) -> tuple[Tensor, State]:
        def cost(output: SegmentOutput) -> Tensor:
            return output.token_losses.sum() / self.divisor + output.auxiliary_loss

        with patch("memformer_pl.contract.checks.has_values", return_value=False):
            return add_gradient(self.model, cost, segments, state, gradient=gradient, decoder_group=group)


class Idle:
    """A recorder whose graphs do nothing when they are launched."""

    def run(self, function: Callable[[], object]) -> None:
        """Run a function."""
        function()

    def record(self, function: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """Run a function, and forget how."""
        return lambda: None, function()


def dispatched(work: Callable[[], object]) -> Counter[str]:
    """The computing operations that a function dispatches."""
    with Count() as count:
        work()
    return count.calls


def launched(work: Callable[[], object], known: Set[str]) -> Counter[str]:
    """Generated kernels and computing operations in a profile of a function; those inside another one do not count.

    Args:
        work: The function.
        known: Names of the operations that it dispatches when nothing is compiled.
    """
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        work()
    names = {event: _counted(event, known) for event in profiled.events() or []}
    outer = (name for event, name in names.items() if name and not any(names[each] for each in _around(event)))
    return Counter(outer)


def _counted(event: FunctionEvent, known: Set[str]) -> str | None:
    name = event.name.removeprefix("aten::")
    return "generated" if GENERATED in name else name if name in known else None


def _around(event: FunctionEvent) -> Iterator[FunctionEvent]:
    """The events that contain an event."""
    while (event := event.cpu_parent) is not None:
        yield event


def main(out: Path | None = None) -> None:
    """Print the counts, and write them to ``out`` as JSON and Markdown."""
    case = Case()
    ways = [("bptt", 1), ("replay", 1), ("replay", 2), ("replay", 8)]
    rows: list[Row] = []
    for gradient, group in ways:
        counted = dispatched(partial(case.rollout, gradient, group))
        rows.append(
            {"gradient": gradient, "group": group, "eager": counted.total(), "calls": dict(counted.most_common())}
        )
        row = rows[-1]
        row["captured"] = 1 + dispatched(case.captured(gradient, group)).total()
    known = {name for row in rows for name in row["calls"]}
    for row, (gradient, group) in zip(rows, ways, strict=True):
        row["profiled"] = launched(partial(case.rollout, gradient, group), known).total()
    torch._inductor.config.cpp.enable_kernel_profile = True
    for region in case.model.regions():
        region.compile(fullgraph=True)
    for row, (gradient, group) in zip(rows, ways, strict=True):
        work = partial(case.rollout, gradient, group)
        work()
        counted = launched(work, known)
        row |= {"compiled": counted.total(), "generated": counted["generated"]}
    report(rows, COLUMNS, settings={"layers": "4 + 16", "horizon": 8, "dropout": 0.1}, out=out)


COLUMNS = {
    "gradient": lambda row: row["gradient"] + (f", groups of {row['group']}" if row["group"] > 1 else ""),
    "eager": lambda row: f"{row['eager']:,}",
    "eager, in a profile": lambda row: f"{row['profiled']:,}",
    "compiled": lambda row: f"{row['compiled']:,}",
    "of them generated": lambda row: f"{row['generated']:,}",
    "captured": lambda row: f"{row['captured']:,}",
}

if __name__ == "__main__":
    auto_cli(main)
