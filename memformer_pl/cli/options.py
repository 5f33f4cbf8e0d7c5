"""The parser of the commands that use a trained model, and what they have in common."""

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

from memformer_pl.checkpoints.pretrained import Pretrained, load_pretrained
from memformer_pl.cli.user_errors import brief, explain
from memformer_pl.contract import SegmentModel
from memformer_pl.data.tokenizers.tokenizer import Tokenizer
from memformer_pl.errors import UsageError


class Parser(ArgumentParser):
    """Reports a mistake in a line, with the nearest option that would have been valid."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong, and exit with 2."""
        del ex
        if missing := re.search(r"argument (--\w+): expected (?:one|at least one) argument", message):
            message = f"{missing[1]} needs a value; one that begins with - is written {missing[1]}=VALUE"
        told = explain(message, own=[action.dest for action in self._actions], others=())
        sys.stderr.write(f"error: {brief(told)}\n")
        sys.exit(2)


def add_checkpoint(parser: Parser) -> None:
    """Which model is used."""
    parser.add_argument(
        "--ckpt_path", required=True, type=str, help="A checkpoint, or a folder that the command export has written."
    )
    parser.add_argument(
        "--model_module",
        type=str,
        help="The module with the class of the model, if that is your own: my_model for my_model.Rnn. Its code is run.",
    )


def add_device(parser: Parser) -> None:
    """Where the model computes."""
    parser.add_argument(
        "--device", type=str, help="Where the model computes, for example cuda:1; by default on a GPU if there is one."
    )


def add_tables(parser: Parser) -> None:
    """Which tables are meant, and where what was trained lies."""
    parser.add_argument(
        "tables", nargs="+", type=str, metavar="ROWS", help="Files of rows, or names such as recall/rows."
    )
    parser.add_argument("--runs", type=str, default="runs", help="Folder of logs and checkpoints.")


def require_file(options: Namespace, name: str, parser: Parser) -> None:
    """Refuse a folder where a file is to be written in the end."""
    if options[name] is not None and Path(options[name]).is_dir():
        parser.error(f"{name} must be a file, but {options[name]!r} is a folder")


def load_model(options: Namespace, *, device: torch.device | str = "cpu") -> Pretrained:
    """The model, and its tokenizer if it has one.

    Raises:
        UsageError: The checkpoint cannot be used, or the class of its model is not known.
    """
    if options.model_module is not None:
        # as for `python -m`, however this process was started
        sys.path.append(str(Path.cwd()))
    return load_pretrained(options.ckpt_path, device=device, model_module=options.model_module)


def load_reader(options: Namespace, parser: Parser) -> tuple[SegmentModel, Tokenizer]:
    """A model that reads text, where it is to compute.

    Raises:
        UsageError: The checkpoint cannot be used, or reads numbers that were made elsewhere.
    """
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        parser.error(f"device {name!r} cannot be used: {str(error).splitlines()[0]}")
    model, tokenizer = load_model(options, device=device)
    if tokenizer is None:
        raise UsageError(
            f"{options.ckpt_path!r} has no tokenizer: its model was trained on numbers, or with a tokenizer of your own"
        )
    return model, tokenizer


@contextmanager
def progress(description: str, *, total: int | None) -> Iterator[Progress]:
    """A bar on standard error that counts bytes, and goes when it is done. None where nobody would see it."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        bar.add_task(description, total=total)
        yield bar


def counted(blocks: Iterable[bytes], bar: Progress) -> Iterator[bytes]:
    """The same blocks, which are counted once they are read."""
    for block in blocks:
        yield block
        bar.advance(bar.task_ids[0], len(block))
