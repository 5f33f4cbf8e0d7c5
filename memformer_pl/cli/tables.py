"""The command ``tables``: make tables and figures from the results of sweeps."""

from pathlib import Path

from jsonargparse import Namespace

from memformer_pl.cli.options import Parser, add_tables
from memformer_pl.sweeps.tables import main


def add_options(parser: Parser) -> None:
    """Add the options of the command."""
    add_tables(parser)
    parser.add_argument("--no-figures", action="store_true", help="Make tables only.")


def run(options: Namespace, parser: Parser) -> None:
    """Write tables and figures."""
    del parser
    main(options.tables, runs=Path(options.runs), figures=not options.no_figures)
