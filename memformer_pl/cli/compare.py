"""The command ``compare``: what one run needs and another does not, document by document.

Each run is the folder of one that ended with the closing report (it holds ``documents.csv``), or such a file. Told is
what each needs for the documents that both have read, and how many bits per byte A saves against B: the mean over
documents and its standard error. The error is that of documents, not of seeds: runs of one configuration differ too.
"""

import csv
from pathlib import Path

import numpy as np
from jsonargparse import Namespace

from memformer_pl.callbacks.closing_report import paired_gain
from memformer_pl.cli.options import Parser
from memformer_pl.data.tokenizers.alignment import told_loss
from memformer_pl.errors import UsageError

COLUMNS = ("sizes", "with_memory")


def add_options(parser: Parser) -> None:
    """What can be asked for."""
    parser.add_argument("run_a", type=str, metavar="RUN_A", help="Folder of a run, or its documents.csv.")
    parser.add_argument("run_b", type=str, metavar="RUN_B", help="The run to compare it with.")


def run(options: Namespace, parser: Parser) -> None:
    """Print the comparison.

    Raises:
        UsageError: The runs cannot be compared.
    """
    del parser
    a, b = (read(Path(path)) for path in (options.run_a, options.run_b))
    if not np.array_equal(a["sizes"], b["sizes"]):
        raise UsageError(f"{options.run_a} and {options.run_b} were not validated on the same documents")
    sizes = a["sizes"]
    gain, error = paired_gain(b["with_memory"], a["with_memory"], sizes)
    better = (a["with_memory"] < b["with_memory"]).mean()
    for name, columns in (("A", a), ("B", b)):
        lost = told_loss(columns["lost"].sum(), sizes.sum()) if "lost" in columns else ""
        print(f"{name}: {columns['with_memory'].sum() / sizes.sum():.4f} bits per byte{lost}")
    print(f"A saves {gain:.4f} ± {error:.4f} bits per byte, on {better:.0%} of {len(sizes)} documents")


def read(run: Path) -> dict[str, np.ndarray]:
    """Sizes and costs of the documents of a run, in the order of its ``documents.csv``.

    Raises:
        UsageError: There is no such file, or it is of something else.
    """
    path = run if run.suffix == ".csv" else run / "documents.csv"
    if not path.is_file():
        raise UsageError(f"there is no {path}: a run writes it at its end with --trainer.callbacks+=ClosingReport")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise UsageError(f"{path} has no documents")
    try:
        present = [name for name in (*COLUMNS, "lost") if name in COLUMNS or name in rows[0]]
        columns = {name: np.array([float(row[name]) for row in rows]) for name in present}
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} is not a closing report's, which has numbers for {', '.join(COLUMNS)}") from error
    return columns
