"""The command ``compare``: compare two runs document by document.

A run is given by the folder that holds its ``documents.csv``, which ``ClosingReport`` writes, or by that file. The
command prints the bits per byte of each run, and how many A saves against B: the mean over documents and its standard
error. The error covers the choice of documents, not of seeds: two runs of one configuration differ too.
"""

import csv
from pathlib import Path

import numpy as np
from jsonargparse import Namespace

from memformer_pl.callbacks.closing_report import paired_gain
from memformer_pl.cli.options import Parser
from memformer_pl.data.tokenizers.alignment import lost_bytes_note
from memformer_pl.errors import UsageError

COLUMNS = ("sizes", "with_memory")


def add_options(parser: Parser) -> None:
    """Add the options of the command."""
    parser.add_argument("run_a", type=str, metavar="RUN_A", help="Folder of a run, or its documents.csv.")
    parser.add_argument("run_b", type=str, metavar="RUN_B", help="The run to compare it with.")


def run(options: Namespace, parser: Parser) -> None:
    """Print the comparison.

    Raises:
        UsageError: A run has no closing report, or the two were validated on different documents.
    """
    del parser
    a, b = (document_costs(Path(path)) for path in (options.run_a, options.run_b))
    if not np.array_equal(a["sizes"], b["sizes"]):
        raise UsageError(
            f"{options.run_a} and {options.run_b} were validated on different documents: "
            "compare runs whose data options are the same"
        )
    sizes = a["sizes"]
    gain, error = paired_gain(b["with_memory"], a["with_memory"], sizes)
    better = (a["with_memory"] < b["with_memory"]).mean()
    for name, columns in (("A", a), ("B", b)):
        lost = lost_bytes_note(columns["lost"].sum(), sizes.sum()) if "lost" in columns else ""
        print(f"{name}: {columns['with_memory'].sum() / sizes.sum():.4f} bits per byte{lost}")
    print(f"A saves {gain:.4f} ± {error:.4f} bits per byte, on {better:.0%} of {len(sizes)} documents")


def document_costs(run: Path) -> dict[str, np.ndarray]:
    """Read the columns of a run's ``documents.csv``: sizes in bytes, costs in bits, and lost bytes if it has them.

    Raises:
        UsageError: The file does not exist, is empty, or was not written by ``ClosingReport``.
    """
    path = run if run.suffix == ".csv" else run / "documents.csv"
    if not path.is_file():
        raise UsageError(f"there is no {path}: add --trainer.callbacks+=ClosingReport to a run to write it")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise UsageError(f"{path} has no documents")
    try:
        present = [name for name in (*COLUMNS, "lost") if name in COLUMNS or name in rows[0]]
        columns = {name: np.array([float(row[name]) for row in rows]) for name in present}
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{path} is not from a ClosingReport: it must have numbers in the columns {', '.join(COLUMNS)}"
        ) from error
    return columns
