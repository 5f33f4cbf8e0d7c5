"""Print how far each segment moves memory, and what becomes of a small disturbance: ``python
experiments/memory_stability.py RUN ...``.

Each run is the folder of a finished run (``runs/lead/memformer@0.008-.../seed_0``). Its model reads the validation
documents in double precision. Before each segment, a copy of the memory is disturbed in a random direction by a
millionth of its length, and both are carried over the segment; first segments of documents do not count. A memory that
moves by about its length is replaced by each segment; where disturbances grow, gradients through time grow, too.
"""

from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from loss_by_position import data_of, name_of
from torch import Tensor

from memformer_pl.checkpoints.pretrained import load_pretrained
from memformer_pl.contract import SegmentModel, State, as_state
from memformer_pl.data import Rollout
from memformer_pl.errors import UsageError
from memformer_pl.sweeps.markdown import as_markdown

SIZE = 1e-6
"""Length of the disturbance, divided by that of the memory."""
HEADS = ("run", "memory moves by", "a disturbance grows by", "at the 90th percentile", "at most")


def flat(state: State) -> Float[Tensor, "B _"]:
    """The real numbers that a lane carries, side by side."""
    return torch.cat([field.reshape(len(field), -1) for field in state if field.is_floating_point()], dim=1)


def disturbed(model: SegmentModel, state: State) -> State:
    """The state with its memory moved in a random direction."""
    size = flat(state).norm(dim=1).mean() * SIZE / flat(state).shape[1] ** 0.5
    noisy = (field + size * torch.randn_like(field) if field.is_floating_point() else field for field in state)
    return model.with_memory(state, as_state(state, noisy))


def segments(model: SegmentModel, rollouts: Iterator[Rollout]) -> Iterator[Float[np.ndarray, "2 B"]]:
    """For each segment, by what share of its length the memory of each lane moves, and by what factor a disturbance
    grows; of the lanes that are in mid-document."""
    state: State | None = None
    for rollout in rollouts:
        for segment, documents in zip(rollout.segments, rollout.documents, strict=True):
            before = model.initial_state(len(documents)) if state is None else state
            other = disturbed(model, before)
            state, moved = model.advance(segment, before), model.advance(segment, other)
            move = (flat(state) - flat(before)).norm(dim=1) / flat(before).norm(dim=1)
            growth = (flat(moved) - flat(state)).norm(dim=1) / (flat(other) - flat(before)).norm(dim=1)
            yield torch.stack((move, growth))[:, (documents >= 0) & ~segment.document_start].numpy()


def model_of(run: Path) -> SegmentModel:
    """The model of a run.

    Raises:
        UsageError: It has no memory.
    """
    model = load_pretrained(run / "checkpoints" / "last.ckpt").model.double()
    if not model.has_memory():
        raise UsageError(f"{run} has no memory: leave it out")
    return model


@torch.no_grad()
def main(runs: list[Path]) -> None:
    """Print a line for each run: medians over segments, and the largest growths."""
    models, lines = [model_of(run) for run in runs], []  # refused before minutes of reading
    for run, model in zip(runs, models, strict=True):
        torch.manual_seed(0)
        rollouts = iter(data_of(run)[1].val_dataloader())
        moves, growths = np.concatenate(list(segments(model, rollouts)), axis=1)
        figures = [np.median(moves), np.median(growths), np.quantile(growths, 0.9), growths.max()]
        lines.append([name_of(run), *(f"{figure:.2f}" for figure in figures)])
    print(as_markdown(HEADS, lines))


if __name__ == "__main__":
    parser = ArgumentParser(description=main.__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="run")
    main(**vars(parser.parse_args()))
