"""The command ``sweep``: train every row of a table with every seed."""

import os
import sys
from pathlib import Path

from jsonargparse import Namespace

from memformer_pl.cli.options import Parser, add_tables
from memformer_pl.errors import UsageError


def add_options(parser: Parser) -> None:
    """Add the options of the command."""
    add_tables(parser)
    parser.add_argument("--only", nargs="+", type=str, default=[], metavar="ROW", help="Rows to train; by default all.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[], help="Seeds; by default those of each table.")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="Runs at once; 1 where they share a GPU."
    )
    parser.add_argument("--threads", type=int, default=1, help="Threads of each run.")
    parser.add_argument(
        "--options",
        nargs="+",
        type=str,
        default=[],
        metavar="NAME=VALUE",
        help="Options for every run, such as trainer.accelerator=gpu. A change of them does not train a row again.",
    )


def run(options: Namespace, parser: Parser) -> None:
    """Train the rows.

    Raises:
        UsageError: A table is invalid, or the system has no ``fcntl``.
        SystemExit: With 1 if a run is left to train.
    """
    for name in ("workers", "threads"):
        if options[name] < 1:
            parser.error(f"{name} must be at least 1, got {options[name]}")
    if wrong := [option for option in options.options if "=" not in option]:
        parser.error(f"options must be written NAME=VALUE, got {wrong[0]!r}")
    try:
        from memformer_pl.sweeps.runner import main
    except ModuleNotFoundError as missing:
        if missing.name != "fcntl":
            raise
        raise UsageError(
            "sweep locks its runs with fcntl, which this system lacks: use Linux, macOS or WSL"
        ) from missing
    names = ("tables", "only", "seeds", "workers", "threads", "options")
    if not main(runs=Path(options.runs), **{name: options[name] for name in names}):
        sys.exit(1)
