"""What a size may be. A class asks for its own, since nobody else knows what its numbers mean."""

from memformer_pl.errors import UsageError

LARGEST = 1 << 20
"""Of parts that are made one by one, such as layers, and of lanes: more would go on without end."""
LARGEST_WIDTH = 1 << 24
"""Of an axis of a tensor: beyond, products of two overflow before memory ends."""
LARGEST_WINDOW = 1 << 28
"""Tokens of a window: at 8 bytes each they take 2 GiB."""


def require_sizes(*, least: int = 1, most: int | None = None, **sizes: int) -> None:
    """Raise a ``UsageError`` that names the first size below ``least`` or above ``most``, if there is one."""
    for name, size in sizes.items():
        if size < least:
            raise UsageError(f"{name} must be at least {least}, got {size}")
        if most is not None and size > most:
            raise UsageError(f"{name} must be at most {most:,}, got {size}")


def require_window(*, lanes: int, interleave: int, horizon: int, segment_length: int) -> None:
    """Raise a ``UsageError`` where one of the sizes of a window cannot be, or they cannot be together."""
    require_sizes(lanes=lanes, segment_length=segment_length, horizon=horizon, interleave=interleave)
    require_sizes(most=LARGEST, **{"lanes * interleave": lanes * interleave})
    tokens = lanes * horizon * segment_length
    require_sizes(most=LARGEST_WINDOW, **{"lanes * horizon * segment_length": tokens})
