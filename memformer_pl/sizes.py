"""What a size may be. What is out of range is refused by name, before it fills memory or goes on without end."""

from memformer_pl.errors import UsageError

LARGEST = 1 << 20
"""More of anything is a slip of the finger."""
LARGEST_WINDOW = 1 << 28
"""Tokens of a window: at 8 bytes each they take 2 GiB."""


def require_sizes(*, least: int = 1, most: int = LARGEST, **sizes: int) -> None:
    """Raise a ``UsageError`` that names the first size below ``least`` or above ``most``, if there is one."""
    for name, size in sizes.items():
        if size < least:
            raise UsageError(f"{name} must be at least {least}, got {size}")
        if size > most:
            raise UsageError(f"{name} must be at most {most:,}, got {size}")


def require_window(*, lanes: int, interleave: int, horizon: int, segment_length: int) -> None:
    """Raise a ``UsageError`` where one of the sizes of a window cannot be, or they cannot be together."""
    require_sizes(lanes=lanes, segment_length=segment_length, horizon=horizon, interleave=interleave)
    require_sizes(**{"lanes * interleave": lanes * interleave})
    tokens = lanes * horizon * segment_length
    require_sizes(**{"lanes * horizon * segment_length": tokens}, most=LARGEST_WINDOW)
