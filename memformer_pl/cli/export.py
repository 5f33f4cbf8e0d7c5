"""The command ``export``: a folder that others load without Lightning."""

from pathlib import Path

from jsonargparse import Namespace

from memformer_pl.atomic_write import require_apart
from memformer_pl.checkpoints.pretrained import FILES
from memformer_pl.cli.options import Parser, add_checkpoint, load_model


def add_options(parser: Parser) -> None:
    """What can be asked for."""
    add_checkpoint(parser)
    parser.add_argument("--out", required=True, type=str, help="The folder; it is made.")


def run(options: Namespace, parser: Parser) -> None:
    """Write the folder.

    Raises:
        UsageError: The checkpoint cannot be used, the folder is the one that is read, or it cannot be written.
    """
    del parser
    out = Path(options.out)
    require_apart("out", [out / name for name in FILES], read=[Path(options.ckpt_path)])
    load_model(options).save_pretrained(out)
    print(f"Written: {options.out}")
