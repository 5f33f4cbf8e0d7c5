"""The command ``export``: a folder that others load without Lightning."""

from jsonargparse import Namespace

from memformer_pl.commands.options import Parser, add_checkpoint, load_model


def add_options(parser: Parser) -> None:
    """What can be asked for."""
    add_checkpoint(parser)
    parser.add_argument("--out", required=True, type=str, help="The folder; it is made.")


def run(options: Namespace, parser: Parser) -> None:
    """Write the folder."""
    del parser
    load_model(options).save_pretrained(options.out)
    print(f"Written: {options.out}")
