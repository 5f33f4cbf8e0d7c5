"""The README's code runs, and what it names exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_the_code_of_the_readme_runs(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMFORMER_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[block], f"README.md, block {block}", "exec"), {"__name__": "readme"})


def test_the_readme_has_code() -> None:
    assert len(BLOCKS) >= 2


def test_the_files_that_the_readme_names_exist() -> None:
    named = re.findall(r"\b(?:experiments|tests|notebooks|memformer_pl)/[\w./-]*\w", README)
    missing = [name for name in named if not (ROOT / name).exists()]
    assert named
    assert not missing


def test_each_command_of_the_readme_is_one_line_with_its_own_setup() -> None:
    commands = [line for line in README.splitlines() if line.startswith("python3.11")]
    assert len(commands) == 2
    assert all("-m venv" in command and "pip install" in command for command in commands)
