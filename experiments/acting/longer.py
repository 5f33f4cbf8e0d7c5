"""Play longer games than those of training: ``python experiments/acting/longer.py TABLE RUNS --environments NAME ...``.

Each row of the table is loaded with every seed, from the folder of runs in which ``sweep`` trained it. Prints the
return in each environment, mean and standard error over seeds, in 64 episodes that are the same for all.
"""

from argparse import ArgumentParser
from pathlib import Path

import torch

from memformer_pl import SegmentTask
from memformer_pl.acting.environments import TokenEnvironment
from memformer_pl.acting.playing import play
from memformer_pl.contract import SegmentModel
from memformer_pl.sweeps import rows, tables
from memformer_pl.sweeps.runner import Run


def mean_return(model: SegmentModel, name: str, *, episodes: int) -> float:
    """The mean return of a model in held-out episodes."""
    environments = [TokenEnvironment(name) for _ in range(episodes)]
    random = torch.Generator().manual_seed(0)
    uniform = torch.rand(episodes, environments[0].steps, generator=random, dtype=torch.float64)
    played = play(model, environments, range(10**6, 10**6 + episodes), uniform)
    return float(played.returns.mean())


def main(name: str, runs: Path, *, environments: list[str], episodes: int, double: bool) -> None:
    """Print a line for each row of a table that has results.

    Args:
        name: A file of rows, or the name of a shipped one.
        runs: Folder of runs.
        environments: Names.
        episodes: Number of episodes in each.
        double: Whether to play in double precision: where that changes a return, a memory overflows or is rounded.
    """
    table = rows.read(name)
    print(f"| row | seeds | {' | '.join(environments)} |\n|{'---|' * (2 + len(environments))}")
    for outcome in (outcome for outcome in tables.outcomes(table).values() if outcome.ended):
        returns = []
        for seed in outcome.ended:
            checkpoint = Run(table, outcome.row, seed, runs).checkpoint
            model = SegmentTask.load_from_checkpoint(checkpoint, map_location="cpu").model.eval()
            model = model.double() if double else model
            returns.append([mean_return(model, environment, episodes=episodes) for environment in environments])
        cells = (tables.spread(values).formatted(3) for values in zip(*returns, strict=True))
        print(f"| {outcome.row.title} | {len(returns)} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", metavar="TABLE")
    parser.add_argument("runs", type=Path)
    parser.add_argument("--environments", nargs="+", required=True)
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--double", action="store_true")
    main(**vars(parser.parse_args()))
