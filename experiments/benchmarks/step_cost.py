"""Cost of a step of each model: parameters, floating-point operations, bytes of state, tokens per second.

    python experiments/benchmarks/step_cost.py                        # the quickstart, and all of experiments/models
    python experiments/benchmarks/step_cost.py --repeats 0            # without times

Every configuration of ``experiments/models`` is stacked on the base, and the model is built as by the command line.
Operations per token of one segment are counted by torch and by the formulas of ``flops.py``, together with the share
that leads to the next state, which replay computes twice. Time: all models take turns on the same rollout of random
tokens, after a warm-up; times are medians. Training uses the gradient of the configuration.
"""

from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import yaml
from flops import formula
from jsonargparse import auto_cli
from measuring import Row, by_turns, report, sizes_of

from memformer_pl import models
from memformer_pl.contract import Segment, SegmentModel, SegmentOutput, detach, state_bytes
from memformer_pl.gradients.rollout import add_gradient
from memformer_pl.sweeps.rows import stack
from memformer_pl.training.flops import count_flops

EXPERIMENTS = Path(__file__).parents[1]


class Run(NamedTuple):
    """A model, and how an experiment feeds it."""

    model: SegmentModel
    gradient: str
    lanes: int
    horizon: int
    device: str = "cpu"

    def rollout(self) -> list[Segment]:
        """Random tokens, the same for every model with the same vocabulary."""
        shape = (self.horizon, self.lanes, self.model.segment_length)
        tokens = torch.randint(self.model.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        token_mask = torch.ones(shape[1:], dtype=torch.bool, device=self.device)
        starts = [torch.full((self.lanes,), t == 0, device=self.device) for t in range(self.horizon)]
        return [Segment(each, token_mask, start) for each, start in zip(tokens, starts, strict=True)]

    def read(self) -> None:
        """Read a rollout, as in evaluation."""
        state = self.model.initial_state(self.lanes)
        with torch.no_grad():
            for segment in self.rollout():
                state = self.model(segment, state)[1]

    def train(self) -> None:
        """Compute the gradient of a rollout."""

        def cost(output: SegmentOutput) -> torch.Tensor:
            return output.token_losses.mean() + output.auxiliary_loss

        self.model.zero_grad(set_to_none=False)
        state = detach(self.model.initial_state(self.lanes))
        add_gradient(self.model, cost, self.rollout(), state, gradient=self.gradient)


def build(*configs: Path, device: str = "cpu") -> Run:
    """The model of stacked configurations. Sizes inherited from the base that its class does not accept are dropped."""
    config = stack(*(yaml.safe_load(path.read_text()) for path in configs))
    task, data = config["model"], config["data"]
    kind = getattr(models, task["model"]["class_path"])
    sizes = {"vocab_size": data["tokenizer"]["init_args"]["vocab_size"], "segment_length": data["segment_length"]}
    sizes |= sizes_of(kind, task["model"]["init_args"])
    torch.manual_seed(0)
    return Run(kind(**sizes).to(device), task["gradient"], data["batch_size"], data["horizon"], device)


def runs_on(base: Path, *, device: str = "cpu") -> dict[str, Run]:
    """The base, and every configuration of ``experiments/models`` stacked on it, with their names as keys."""
    others = {path.stem: build(base, path, device=device) for path in sorted((EXPERIMENTS / "models").glob("*.yaml"))}
    return {base.stem: build(base, device=device), **others}


def costs(run: Run) -> dict[str, float]:
    """What can be counted without a clock."""
    model, lanes = run.model, run.lanes
    counted = count_flops(model, lanes=lanes)
    tokens = lanes * model.segment_length
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "state_bytes": state_bytes(model.initial_state(1)),
        "flops_per_token": counted / tokens,
        "flops_per_token_by_formula": formula(model, lanes=lanes) / tokens,
        "share_of_next_state": count_flops(model, lanes=lanes, advance=True) / counted,
    }


def speeds(runs: dict[str, Run], *, repeats: int) -> dict[str, Row]:
    """Tokens per second of reading and of training; all models take turns."""
    works = {f"{name} {kind}": getattr(run, kind) for name, run in runs.items() for kind in ("read", "train")}
    seconds = {work: median(taken) for work, taken in by_turns(works, repeats=repeats).items()}
    tokens = {name: run.horizon * run.lanes * run.model.segment_length for name, run in runs.items()}
    return {
        name: {f"tokens_per_second_{kind}": tokens[name] / seconds[f"{name} {kind}"] for kind in ("read", "train")}
        for name in runs
    }


def main(
    base: Path = EXPERIMENTS / "quickstart.yaml",
    repeats: int = 5,
    threads: int = 1,
    device: str = "cpu",
    out: Path | None = None,
) -> None:
    """Print a row for each model, and write them to ``out`` as JSON and Markdown."""
    torch.set_num_threads(threads)
    runs = runs_on(base, device=device)
    times = speeds(runs, repeats=repeats) if repeats else {}
    rows = [{"model": name, **costs(run), **times.get(name, {})} for name, run in runs.items()]
    report(
        rows, COLUMNS, settings={"base": base.name, "threads": threads, "repeats": repeats, "device": device}, out=out
    )


COLUMNS = {
    "model": lambda row: row["model"],
    "parameters": lambda row: f"{row['parameters']:,}",
    "KiB carried": lambda row: f"{row['state_bytes'] / 1024:.1f}",
    "MFLOP / token": lambda row: f"{row['flops_per_token'] / 1e6:.3f}",
    "by formula": lambda row: f"{row['flops_per_token_by_formula'] / 1e6:.3f}",
    "next state": lambda row: f"{row['share_of_next_state']:.2f}",
    "read / s": lambda row: f"{row['tokens_per_second_read']:,.0f}" if "tokens_per_second_read" in row else "",
    "trained / s": lambda row: f"{row['tokens_per_second_train']:,.0f}" if "tokens_per_second_read" in row else "",
}

if __name__ == "__main__":
    auto_cli(main)
