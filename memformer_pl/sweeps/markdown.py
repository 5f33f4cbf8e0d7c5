"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def as_markdown(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; a bar or a line break within a cell does not end it.

    Args:
        heads: The first line.
        lines: The cells of each line below it.
    """
    cells = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(map(_within_cell, line)) + " |" for line in cells)


def _within_cell(text: str) -> str:
    return " ".join(text.replace("|", r"\|").splitlines())
