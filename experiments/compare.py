"""Compare two runs document by document: ``python experiments/compare.py RUN_A RUN_B``.

Each argument is the folder of a run that ended with the closing report (it holds ``documents.csv``). Prints what each
run needs for the documents that both have read, and how many bits per byte A saves against B: the mean over documents
and its standard error. The error is that of documents, not of seeds: two runs of one configuration differ as well.
"""

import csv
from pathlib import Path

import numpy as np
from jsonargparse import auto_cli

from memformer_pl.callbacks.closing_report import paired_gain
from memformer_pl.data.alignment import told_loss


def read(run: Path) -> dict[str, np.ndarray]:
    """The columns of a run's ``documents.csv``."""
    path = run if run.suffix == ".csv" else run / "documents.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


def main(run_a: Path, run_b: Path) -> None:
    """Print the comparison of two runs.

    Args:
        run_a: Folder of a run.
        run_b: Folder of the run to compare it with.

    Raises:
        ValueError: The runs have not read the same documents.
    """
    a, b = read(run_a), read(run_b)
    if not np.array_equal(a["sizes"], b["sizes"]):
        raise ValueError(f"{run_a} and {run_b} were not validated on the same documents")
    sizes = a["sizes"]
    gain, error = paired_gain(b["with_memory"], a["with_memory"], sizes)
    better = (a["with_memory"] < b["with_memory"]).mean()
    for name, run in (("A", a), ("B", b)):
        lost = told_loss(run["lost"].sum(), sizes.sum()) if "lost" in run else ""
        print(f"{name}: {run['with_memory'].sum() / sizes.sum():.4f} bits per byte{lost}")
    print(f"A saves {gain:.4f} ± {error:.4f} bits per byte, on {better:.0%} of {len(sizes)} documents")


if __name__ == "__main__":
    auto_cli(main, as_positional=True)
