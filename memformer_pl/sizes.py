"""What a size may be. What is out of range is refused by name, before it fills memory or goes on without end."""

LARGEST = 1 << 20
"""More of anything is a slip of the finger."""


def require_sizes(*, least: int = 1, **sizes: int) -> None:
    """Raise a ``ValueError`` that names the first size below ``least`` or above ``LARGEST``, if there is one."""
    for name, size in sizes.items():
        if size < least:
            raise ValueError(f"{name} must be at least {least}, got {size}")
        if size > LARGEST:
            raise ValueError(f"{name} must be at most {LARGEST:,}, got {size}")
