"""Entry point of ``python -m memformer_pl``."""

import signal
import sys
from types import FrameType


def stop(number: int, frame: FrameType | None) -> None:
    """End the process with the exit code that shells expect after a signal, without a traceback."""
    sys.exit(128 + number)


def end_with_code_of_signals() -> None:
    """End the process that way from now on; to be called before imports, which take seconds."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


if __name__ == "__main__":
    end_with_code_of_signals()
    from memformer_pl.cli.main import main

    main()
