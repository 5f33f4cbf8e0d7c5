"""``python -m memformer_pl``."""

import signal
import sys
from types import FrameType


def stop(number: int, frame: FrameType | None) -> None:
    """End the process as a shell expects of a signal, and without a traceback."""
    sys.exit(128 + number)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    from memformer_pl.cli.main import main

    main()
