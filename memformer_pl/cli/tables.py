"""The command ``tables``: tables and figures of what sweeps have left."""

from pathlib import Path

from jsonargparse import Namespace

from memformer_pl.cli.options import Parser, add_tables
from memformer_pl.sweeps.tables import main


def add_options(parser: Parser) -> None:
    """What can be asked for."""
    add_tables(parser)
    parser.add_argument("--no-figures", action="store_true", help="Make tables alone.")


def run(options: Namespace, parser: Parser) -> None:
    """Write them."""
    del parser
    main(options.tables, runs=Path(options.runs), figures=not options.no_figures)
