"""Play longer games than those of training: ``python experiments/acting/longer.py RUNS --environments NAME ...``.

``RUNS`` is the folder of a sweep; each row is loaded with every seed. Prints the return in each environment, mean and
standard error over seeds, in 64 episodes that are the same for all.
"""

from argparse import ArgumentParser
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from memformer_pl import SegmentTask
from memformer_pl.acting.environments import TokenEnvironment
from memformer_pl.acting.playing import play
from memformer_pl.contract import SegmentModel


def mean_return(model: SegmentModel, name: str, *, episodes: int) -> float:
    """The mean return of a model in held-out episodes."""
    environments = [TokenEnvironment(name) for _ in range(episodes)]
    random = torch.Generator().manual_seed(0)
    uniform = torch.rand(episodes, environments[0].steps, generator=random, dtype=torch.float64)
    played = play(model, environments, range(10**6, 10**6 + episodes), uniform)
    return float(played.returns.mean())


def main(runs: Path, environments: list[str], episodes: int) -> None:
    """Print a row of a table for each row of a sweep.

    Args:
        runs: Folder of ``ROW-HASH/seed_N/``, as a sweep leaves it.
        environments: Names.
        episodes: Number of episodes in each.
    """
    found: dict[str, list[list[float]]] = defaultdict(list)
    for checkpoint in sorted(runs.rglob("last.ckpt")):
        row, _, _ = checkpoint.relative_to(runs).parts[0].rpartition("-")  # a hash of its configuration follows
        model = SegmentTask.load_from_checkpoint(checkpoint, map_location="cpu").model.eval()
        found[row].append([mean_return(model, name, episodes=episodes) for name in environments])
    print(f"| row | seeds | {' | '.join(environments)} |\n|{'---|' * (2 + len(environments))}")
    for row, returns in found.items():
        means, seeds = np.mean(returns, axis=0), len(returns)
        errors = np.std(returns, axis=0, ddof=1) / seeds**0.5 if seeds > 1 else np.full(len(means), np.nan)
        cells = (f"{mean:.3f} ± {error:.3f}" for mean, error in zip(means, errors, strict=True))
        print(f"| {row} | {seeds} | {' | '.join(cells)} |")


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--environments", nargs="+", required=True)
    parser.add_argument("--episodes", type=int, default=64)
    main(**vars(parser.parse_args()))
