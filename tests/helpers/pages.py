"""The Python blocks of a page whose blocks build on each other."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[2]


def blocks(page: str) -> list[str]:
    """The source of each block of a page, named from the root."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)


def run(page: str, *, train: bool = True) -> SimpleNamespace:
    """Run the blocks of a page in order, in one namespace; return the names that they leave.

    Args:
        page: The page.
        train: Whether to run those that train with a trainer of Lightning too.
    """
    names: dict[str, Any] = {"__name__": Path(page).stem}
    for number, block in enumerate(blocks(page)):
        if train or ".fit(" not in block:
            exec(compile(block, f"{page}, block {number}", "exec"), names)
    return SimpleNamespace(**names)
