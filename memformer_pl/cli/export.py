"""The command ``export``: turn a checkpoint into a folder that loads without Lightning."""

from pathlib import Path

from jsonargparse import Namespace

from memformer_pl.atomic_write import require_apart
from memformer_pl.checkpoints.pretrained import FILES
from memformer_pl.cli.options import Parser, add_checkpoint, load_model


def add_options(parser: Parser) -> None:
    """Add the options of the command."""
    add_checkpoint(parser)
    parser.add_argument("--out", required=True, type=str, help="The folder to create.")


def run(options: Namespace, parser: Parser) -> None:
    """Write the folder.

    Raises:
        UsageError: The checkpoint is unusable, the folder holds it, or writing fails.
    """
    del parser
    out = Path(options.out)
    require_apart("out", [out / name for name in FILES], read=[Path(options.ckpt_path)])
    load_model(options).save_pretrained(out)
    print(f"Written: {options.out}")
