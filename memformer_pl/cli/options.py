"""The parser of the commands without a configuration, and the options that they share."""

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from memformer_pl.checkpoints.pretrained import Pretrained, available_device, load_pretrained
from memformer_pl.cli.user_errors import brief, explain
from memformer_pl.contract import SegmentModel
from memformer_pl.data.tokenizers.tokenizer import Tokenizer
from memformer_pl.errors import OptionError, UsageError


class Parser(ArgumentParser):
    """Report a mistake in one line, with the nearest valid option."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong, and exit with 2."""
        del ex
        if missing := re.search(r"argument (--\w+): expected (?:one|at least one) argument", message):
            message = f"{missing[1]} needs a value; one that begins with - is written {missing[1]}=VALUE"
        explained = explain(message, here=[action.dest for action in self._actions], elsewhere=())
        sys.stderr.write(f"error: {brief(explained)}\n")
        sys.exit(2)


def add_checkpoint(parser: Parser) -> None:
    """Add the options that choose a trained model."""
    parser.add_argument(
        "--ckpt_path", required=True, type=str, help="A checkpoint, or a folder written by the command export."
    )
    parser.add_argument(
        "--model_module",
        type=str,
        help="The module of the model's class, if the class is your own: my_model for my_model.Rnn. It is imported.",
    )


def add_device(parser: Parser) -> None:
    """Add the option that chooses a device."""
    parser.add_argument(
        "--device", type=str, help="Device of the model, such as cuda:1; by default a GPU if there is one."
    )


def add_tables(parser: Parser) -> None:
    """Add the options that choose tables, and the folder of their runs."""
    parser.add_argument(
        "tables", nargs="+", type=str, metavar="ROWS", help="Files of rows, or names such as rivals/rows."
    )
    parser.add_argument("--runs", type=str, default="runs", help="Folder of logs and checkpoints.")


def require_file(options: Namespace, name: str, parser: Parser) -> None:
    """Refuse a folder as an output file."""
    if options[name] is not None and Path(options[name]).is_dir():
        parser.error(f"{name} must be a file, but {options[name]!r} is a folder")


def load_model(options: Namespace, *, device: torch.device | str = "cpu") -> Pretrained:
    """Load the model, and its tokenizer if it has one.

    Raises:
        UsageError: The checkpoint is unusable, or the class of its model is unknown.
    """
    if options.model_module is not None:
        # `python -m` adds it, other ways to start this process do not
        sys.path.append(str(Path.cwd()))
    return load_pretrained(options.ckpt_path, device=device, model_module=options.model_module)


def load_reader(options: Namespace, parser: Parser) -> tuple[SegmentModel, Tokenizer]:
    """Load a model of text and its tokenizer on the chosen device.

    Raises:
        UsageError: The checkpoint is unusable, or has no tokenizer.
    """
    try:
        device = available_device(options.device)
    except OptionError as mistake:
        parser.error(str(mistake))
    model, tokenizer = load_model(options, device=device)
    if tokenizer is None:
        raise UsageError(
            f"{options.ckpt_path!r} has no tokenizer: its model was trained on numbers, or with a tokenizer of your own"
        )
    return model, tokenizer


@contextmanager
def progress(description: str, *, total: int | None) -> Iterator[Progress]:
    """Show a bar on standard error that counts bytes and disappears at the end; nothing if that is not a terminal."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        bar.add_task(description, total=total)
        yield bar


def counted(blocks: Iterable[bytes], bar: Progress) -> Iterator[bytes]:
    """Pass blocks on, and advance the bar by the size of each after it was consumed."""
    for block in blocks:
        yield block
        bar.advance(bar.task_ids[0], len(block))
