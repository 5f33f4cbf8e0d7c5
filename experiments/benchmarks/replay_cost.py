r"""Time and peak memory of the gradient of one rollout against the horizon, for every gradient and every model.

    python experiments/benchmarks/replay_cost.py                            # Memformer, 4 + 8 layers
    python experiments/benchmarks/replay_cost.py --sizes.decoder_layers 16 --horizons "[8,32]"
    python experiments/benchmarks/replay_cost.py --models "[MemformerDecoder,RecurrentMemoryTransformer]" --memory false
    python experiments/benchmarks/replay_cost.py --gradients "[sparse_replay]" --horizons "[10000]" --repeats 0

Time: all ways take turns on the same rollout; ratios to ``bptt`` are taken pair by pair. Memory: each case runs in its
own process; the peak above what the model, its gradients and its data take before the first rollout. It includes the
stored states, which have a column of their own.

The paper's WikiText-103 model on a GPU, in bfloat16:

    python experiments/benchmarks/replay_cost.py --horizons "[8]" --groups "[2,4,8]" --sizes.device cuda \
        --sizes.bf16 true --sizes.decoder_layers 16 --sizes.dim 512 --sizes.heads 8 --sizes.slots 1024 \
        --sizes.segment_length 128 --sizes.vocab_size 32768 --sizes.lanes 32
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from flops import formula
from jsonargparse import auto_cli
from measuring import Row, by_turns, in_new_process, peak, ratio, report, resident, sizes_of, with_quartiles

from memformer_pl import models
from memformer_pl.contract import Segment, SegmentModel, SegmentOutput, State, detach, state_bytes
from memformer_pl.gradients.captured import CapturedGradient, with_one_flag
from memformer_pl.gradients.rollout import GRADIENTS, add_gradient

__all__ = ["Case", "Sizes", "main", "peak_of", "resident"]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a model and its rollout.

    Args:
        model: Name of its class.
        horizon: Segments of the rollout.
        encoder_layers: Encoder layers of a Memformer.
        decoder_layers: Decoder layers of a Memformer; other models have as many layers as both together.
        dim: Width.
        heads: Attention heads.
        slots: Slots, memory tokens, or cached tokens.
        segment_length: Tokens of a segment.
        lanes: Documents read in parallel.
        vocab_size: Size of the vocabulary.
        device: Device of the computation.
        bf16: Whether to autocast to bfloat16.
    """

    model: str = "Memformer"
    horizon: int = 4
    encoder_layers: int = 4
    decoder_layers: int = 8
    dim: int = 128
    heads: int = 4
    slots: int = 32
    segment_length: int = 64
    lanes: int = 4
    vocab_size: int = 256
    device: str = "cpu"
    bf16: bool = False

    def build(self) -> SegmentModel:
        """Build the untrained model, with dropout."""
        layers, n = self.encoder_layers + self.decoder_layers, self.slots
        options: dict[str, dict[str, int]] = {
            "Memformer": {"encoder_layers": self.encoder_layers, "decoder_layers": self.decoder_layers, "slots": n},
            "MemformerDecoder": {"layers": layers, "slots": n},
            "RecurrentMemoryTransformer": {"layers": layers, "memory_tokens": n},
            "AssociativeRecurrentMemoryTransformer": {"layers": layers, "memory_tokens": n},
            "MemoryTransformer": {"layers": layers, "memory_tokens": n},
            "Transformer": {"layers": layers},
            "TransformerXL": {"layers": layers, "memory_length": n},
            "CompressiveTransformer": {"layers": layers, "memory_length": n, "compressed_length": n},
            "LaMemo": {"layers": layers, "memory_length": n},
            "LSTM": {"layers": layers},
            "InfiniAttention": {"layers": layers},
            "BlockRecurrentTransformer": {"layers": layers, "states": n, "window": n},
            "GatedDeltaNet": {"layers": layers},
            "BMojo": {"layers": layers, "window": n, "stored": n},
            "StableHadamardMemory": {"layers": layers},
            "Titans": {"layers": layers, "memory_hidden": 2 * self.dim // self.heads},
        }
        kind = getattr(models, self.model)
        model: SegmentModel = kind(**sizes_of(kind, asdict(self)) | options[self.model])
        return model.to(self.device)


class Case:
    """A model, and a rollout of random tokens that begin a document."""

    def __init__(self, sizes: Sizes) -> None:
        torch.manual_seed(0)
        self.sizes, self.model = sizes, sizes.build()
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        lanes, device = sizes.lanes, sizes.device
        tokens = torch.randint(sizes.vocab_size, (sizes.horizon, lanes, sizes.segment_length), device=device)
        token_mask = torch.ones(tokens.shape[1:], dtype=torch.bool, device=device)
        seeds = torch.arange(sizes.horizon, device=device)
        self.segments = [
            Segment(
                each, token_mask, torch.full((lanes,), t == 0, device=device), continues=t > 0, seeds=seeds[t, None]
            )
            for t, each in enumerate(tokens)
        ]
        self.state = detach(self.model.initial_state(lanes))

    def rollout(self, gradient: str, group: int) -> None:
        """Compute the gradient of one rollout."""
        self._start()
        with self._precision():
            self._add(self.segments, self.state, gradient, group)

    def captured(self, gradient: str, group: int) -> Callable[[], None]:
        """A function that does the same by a CUDA graph."""
        captured = CapturedGradient(self._add, self.model)

        def rollout() -> None:
            self._start()
            with self._precision():
                captured(with_one_flag(self.segments), self.state, gradient, group)

        return rollout

    def _start(self) -> None:
        self.model.zero_grad(set_to_none=False)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.sizes.device, torch.bfloat16, enabled=self.sizes.bf16)

    def _add(self, segments: Sequence[Segment], state: State, gradient: str, group: int) -> tuple[torch.Tensor, State]:
        tokens = self.sizes.lanes * self.sizes.segment_length

        def cost(output: SegmentOutput) -> torch.Tensor:
            return output.token_losses.sum() / tokens + output.auxiliary_loss

        return add_gradient(self.model, cost, segments, state, gradient=gradient, decoder_group=group)

    def flops(self) -> int:
        """Operations of a rollout without recomputation: a backward pass costs two forward passes."""
        return 3 * self.sizes.horizon * formula(self.model, lanes=self.sizes.lanes)


def peak_of(sizes: dict[str, Any], gradient: str, group: int, threads: int) -> dict[str, int]:
    """Peak bytes above the start, and bytes of the states that replay stores."""
    torch.set_num_threads(threads)
    case = Case(Sizes(**sizes))
    states = case.sizes.horizon * case.sizes.lanes * state_bytes(case.state)
    return {"peak": peak(lambda: case.rollout(gradient, group), device=case.sizes.device), "states": states}


def rows_of(sizes: Sizes, ways: list[tuple[str, int]], *, repeats: int, threads: int, memory: bool) -> list[Row]:
    """A row for each way to compute the gradient of one model's rollout."""
    rows = [{"model": sizes.model, "horizon": sizes.horizon, "gradient": way, "group": group} for way, group in ways]
    if repeats:
        case = Case(sizes)
        works = {f"{way}, {group}": lambda way=way, group=group: case.rollout(way, group) for way, group in ways}
        for row, taken in zip(rows, (seconds := by_turns(works, repeats=repeats)).values(), strict=True):
            row |= {"seconds": median(taken), "flops_per_second": case.flops() / median(taken)}
            if "bptt, 1" in seconds and repeats > 1:
                row["ratio"] = ratio(taken, seconds["bptt, 1"])
    for row, (way, group) in zip(rows, ways, strict=True):
        if memory:
            row |= in_new_process(
                "replay_cost", "peak_of", sizes=asdict(sizes), gradient=way, group=group, threads=threads
            )
    return rows


def main(
    horizons: list[int] = [4, 16],  # noqa: B006  # jsonargparse shows it in --help
    models: list[str] = ["Memformer"],  # noqa: B006
    gradients: list[str] = list(GRADIENTS),  # noqa: B006
    groups: list[int] = [2, 8],  # noqa: B006
    sizes: Sizes = Sizes(),
    repeats: int = 7,
    threads: int = 1,
    memory: bool = True,
    out: Path | None = None,
) -> None:
    """Print a row for each model, horizon and way, and write them to ``out`` as JSON and Markdown."""
    torch.set_num_threads(threads)
    rows = []
    for model in models:
        grouped = [("replay", group) for group in groups if model == "Memformer" and "replay" in gradients]
        ways = [*((gradient, 1) for gradient in gradients), *grouped]
        for horizon in horizons:
            case = replace(sizes, model=model, horizon=horizon)
            rows += rows_of(case, ways, repeats=repeats, threads=threads, memory=memory)
    settings = {name: value for name, value in asdict(sizes).items() if name not in ("model", "horizon")}
    report(rows, COLUMNS, settings={**settings, "threads": threads, "repeats": repeats}, out=out)


COLUMNS = {
    "model": lambda row: row["model"],
    "horizon": lambda row: str(row["horizon"]),
    "gradient": lambda row: row["gradient"] + (f", groups of {row['group']}" if row["group"] > 1 else ""),
    "s / rollout": lambda row: f"{row['seconds']:.3f}" if "seconds" in row else "",
    "time / bptt (quartiles)": lambda row: with_quartiles(row["ratio"]) if "ratio" in row else "",
    "model GFLOP/s": lambda row: f"{row['flops_per_second'] / 1e9:.1f}" if "seconds" in row else "",
    "peak MiB": lambda row: f"{row['peak'] / 2**20:.1f}" if "peak" in row else "",
    "states MiB": lambda row: f"{row['states'] / 2**20:.1f}" if "peak" in row else "",
}

if __name__ == "__main__":
    auto_cli(main)
