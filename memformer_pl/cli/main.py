"""The commands of ``python -m memformer_pl``, and those of them that use what was trained.

Those that train and evaluate need a configuration and Lightning, and are in ``cli.py``. The others need a checkpoint,
or are about many runs: a module for each here, with the options that it adds to a parser and what it does with them.
Nothing is imported before it is known to be needed, since that takes longer than many a command.
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
    "generate": "Read a prompt of any length, and write on.",
    "predict": "Write what each token of documents costs, as Parquet.",
    "export": "Make a folder of a checkpoint, for others to load without Lightning.",
}
SWEEPING = {
    "sweep": "Train every row of a table with every seed.",
    "tables": "Make tables and figures of what sweeps have left.",
    "compare": "Tell how many bits one run saves against another, document by document.",
}


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: By default those of the process.

    Raises:
        SystemExit: With 2 for a mistake in the options or the configuration, with 1 for data or a checkpoint that
            cannot be used, with 128 and the number of the signal that ended the command.
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
    """Run a command that uses a trained model, or one about many runs.

    Args:
        name: One of ``USING`` or ``SWEEPING``.
        words: What follows it.
    """
    from memformer_pl.cli.options import Parser
    from memformer_pl.cli.user_errors import refuse
    from memformer_pl.errors import UsageError

    command = import_module(f"memformer_pl.cli.{name}")
    parser = Parser(prog=f"python -m memformer_pl {name}", description={**USING, **SWEEPING}[name], allow_abbrev=False)
    command.add_options(parser)
    options = parser.parse_args(list(words))
    try:
        command.run(options, parser)
    except UsageError as error:
        refuse(error, code=1)


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


def _refuse(told: str) -> NoReturn:
    sys.stderr.write(f"error: {told}\n")
    sys.exit(2)
