"""Tokens per second of one and of several processes, and what they communicate per rollout.

    python experiments/benchmarks/scaling.py                          # two processes of one thread each

Rollouts of random tokens of a configuration: gradient, sum over processes as in training, optimizer step. One process
alone and all together take turns in the same processes; times are wall-clock. Together, each process has as many lanes
as the single one (``more lanes``), or they share its lanes (``same lanes``).
"""

import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jsonargparse import auto_cli
from measuring import Row, ratio, report, with_quartiles
from step_cost import EXPERIMENTS, Run, build
from torch import Tensor, distributed, multiprocessing

from memformer_pl.training.distributed import sum_gradients, sum_over_ranks
from memformer_pl.training.optimizer import Optimization


class Traffic:
    """Counts the calls of :func:`torch.distributed.all_reduce`, and their bytes."""

    def __init__(self) -> None:
        self.messages: list[int] = []
        self._send = distributed.all_reduce

    def __call__(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Count the message, and send it."""
        self.messages.append(tensor.numel() * tensor.element_size())
        return self._send(tensor, *args, **kwargs)


def rollouts_of(run: Run, optimizer: torch.optim.Optimizer, *, rollouts: int, together: bool) -> None:
    """Take ``rollouts`` optimizer steps."""
    for _ in range(rollouts):
        if together:
            tokens = run.lanes * run.horizon * run.model.segment_length
            sum_over_ranks(torch.tensor([tokens, tokens]))  # targets, and all that are read
        run.train()
        if together:
            sum_gradients(run.model.parameters())
            sum_over_ranks(torch.zeros(3))  # two losses, and the lanes that were reset
        optimizer.step()


def run_rank(rank: int, ranks: int, folder: str, base: Path, rollouts: int, repeats: int, device: str) -> None:
    """The work of one process; the first one writes seconds and messages into the folder."""
    torch.set_num_threads(1)
    rank_device = f"cuda:{rank}" if device == "cuda" else device
    backend = "nccl" if device == "cuda" else "gloo"
    distributed.init_process_group(backend, init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    distributed.all_reduce = traffic = Traffic()
    run = build(base, device=rank_device)
    optimizer, _ = Optimization(None, None, None, None, None).build(run.model, total_steps=1)
    shared = run._replace(lanes=run.lanes // ranks)
    cases = {"one": (run, False), "more lanes": (run, True), "same lanes": (shared, True)}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    messages: dict[str, list[int]] = {}
    for repeat in range(repeats + 1):
        for name, (each, together) in cases.items():
            distributed.barrier()
            traffic.messages.clear()
            start = time.perf_counter()
            if together or rank == 0:
                rollouts_of(each, optimizer, rollouts=rollouts, together=together)
            if device == "cuda":
                torch.cuda.synchronize()
            messages[name] = traffic.messages[: len(traffic.messages) // rollouts]
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps({"seconds": seconds, "messages": messages}))
    distributed.destroy_process_group()


def main(
    base: Path = EXPERIMENTS / "quickstart.yaml",
    ranks: int = 2,
    rollouts: int = 3,
    repeats: int = 9,
    device: str = "cpu",
    out: Path | None = None,
) -> None:
    """Print a row for one process and for all, and write them to ``out`` as JSON and Markdown."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(run_rank, (ranks, folder, base, rollouts, repeats, device), nprocs=ranks)
        found = json.loads(Path(folder, "found.json").read_text())
    run, alone = build(base), found["seconds"]["one"]
    tokens = rollouts * run.lanes * run.horizon * run.model.segment_length
    rows: list[Row] = []
    for name, taken in found["seconds"].items():
        more = ranks if name == "more lanes" else 1
        row = {"case": name, "ranks": 1 if name == "one" else ranks, "lanes": run.lanes * more}
        speed = [more * quartile for quartile in ratio(alone, taken)]
        rows.append(row | {"tokens_per_second": more * tokens / median(taken), "speed": speed, **sent(found, name)})
    report(rows, COLUMNS, settings={"base": base.name, "rollouts": rollouts, "device": device, "threads": 1}, out=out)


def sent(found: dict[str, Any], name: str) -> Row:
    """Messages per rollout: those of the gradients, and the small ones."""
    messages = found["messages"][name]
    large = [size for size in messages if size > 1024]
    return {"gradient_messages": len(large), "gradient_bytes": sum(large), "other_bytes": sum(messages) - sum(large)}


COLUMNS = {
    "case": lambda row: row["case"],
    "processes": lambda row: str(row["ranks"]),
    "lanes in all": lambda row: str(row["lanes"]),
    "tokens / s": lambda row: f"{row['tokens_per_second']:,.0f}",
    "times one (quartiles)": lambda row: with_quartiles(row["speed"]),
    "sums of gradients / rollout": lambda row: str(row["gradient_messages"]),
    "bytes": lambda row: f"{row['gradient_bytes']:,}",
    "other bytes": lambda row: str(row["other_bytes"]),
}

if __name__ == "__main__":
    auto_cli(main)
