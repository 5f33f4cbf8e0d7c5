"""The commands of ``python -m memformer_pl``.

Commands that train and evaluate take a configuration and need Lightning: ``lightning_cli.py``. The others take a
checkpoint, or are about many runs; each is a module here with two functions, ``add_options`` and ``run``. A command
imports only what it needs, since importing takes longer than many commands.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from memformer_pl.errors import nearest

CONFIGURED = {
    "fit": "Train a model, from a configuration.",
    "validate": "Evaluate a checkpoint on the validation documents of a configuration.",
    "test": "Evaluate a checkpoint on the test documents of a configuration.",
    "analyze": "Report what the memory of a checkpoint does on held-out documents.",
}
USING = {
    "generate": "Read a prompt of any length, and continue it.",
    "predict": "Write the loss of every token of documents, as Parquet.",
    "evaluate": "Run tasks of the LM evaluation harness with a checkpoint.",
    "export": "Turn a checkpoint into a folder that loads without Lightning.",
}
SWEEPING = {
    "sweep": "Train every row of a table with every seed.",
    "tables": "Make tables and figures from the results of sweeps.",
    "compare": "Compare two runs: the bits per byte that one saves, document by document.",
}


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: By default those of the process.

    Raises:
        SystemExit: With 2 for invalid options or an invalid configuration; with 1 for unusable data or an unusable
            checkpoint; with 128 plus the number of the signal that ended the command.
    """
    words = sys.argv[1:] if args is None else list(args)
    known = [*CONFIGURED, *USING, *SWEEPING]
    if words and words[0] in (*USING, *SWEEPING):
        run(words[0], words[1:])
    elif words and (words[0] in CONFIGURED or (words[0] not in ("-h", "--help") and words[0].startswith("-"))):
        import_module("memformer_pl.cli.lightning_cli").main(args)
    elif words and not words[0].startswith("-"):
        near = nearest(words[0], known)
        _refuse(f"there is no command {words[0]!r}" + (f". Did you mean {near}?" if near else ""))
    elif words:
        print(_help(), end="")
    else:
        _refuse(f"a command is missing: one of {', '.join(known)}")


def run(name: str, words: Sequence[str]) -> None:
    """Run a command with a checkpoint, or one on many runs.

    Args:
        name: One of ``USING`` or ``SWEEPING``.
        words: The arguments that follow the name.
    """
    from memformer_pl.cli.options import Parser
    from memformer_pl.cli.user_errors import refuse
    from memformer_pl.errors import OptionError, UsageError

    command = import_module(f"memformer_pl.cli.{name}")
    parser = Parser(prog=f"python -m memformer_pl {name}", description={**USING, **SWEEPING}[name], allow_abbrev=False)
    command.add_options(parser)
    options = parser.parse_args(list(words))
    try:
        command.run(options, parser)
    except UsageError as error:
        refuse(error, code=2 if isinstance(error, OptionError) else 1)


def _help() -> str:
    parser = argparse.ArgumentParser(
        usage=f"python -m memformer_pl {{{','.join((*CONFIGURED, *USING, *SWEEPING))}}} ...",
        description="Train, evaluate and use models that read long documents segment by segment.",
        epilog="COMMAND --help says more.",
    )
    titles = ("commands with a configuration", "commands with a checkpoint", "commands on many runs")
    for title, commands in zip(titles, (CONFIGURED, USING, SWEEPING), strict=True):
        group = parser.add_argument_group(title)
        for name, does in commands.items():
            group.add_argument(name, help=does)
    return parser.format_help()


def _refuse(message: str) -> NoReturn:
    sys.stderr.write(f"error: {message}\n")
    sys.exit(2)
