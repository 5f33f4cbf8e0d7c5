"""The README's code runs, links of every page lead somewhere, and the two front pages stay short."""

import re
import subprocess
from pathlib import Path

import pages
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = pages.blocks("README.md")
SKIPPED = {".git", ".venv", "runs", "node_modules"}
PAGES = [path for path in sorted(ROOT.rglob("*.md")) if not SKIPPED & set(path.relative_to(ROOT).parts)]


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_the_code_of_the_readme_runs(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMFORMER_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[block], f"README.md, block {block}", "exec"), {"__name__": "readme"})


@pytest.mark.filterwarnings(
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:Using ModelCheckpoint with manual optimization",
    "ignore:Checkpoint directory .* exists and is not empty",
)
@pytest.mark.parametrize("page", ["gradients/README.md", "gradients/tbptt_in_lightning.md"])
def test_the_code_of_a_page_runs_from_top_to_bottom(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pages.run(f"memformer_pl/{page}")


def test_the_readme_has_code() -> None:
    assert len(BLOCKS) == 3


def test_the_files_that_the_readme_names_exist() -> None:
    named = re.findall(r"\b(?:experiments|tests|notebooks|memformer_pl)/[\w./-]*\w", README)
    missing = [name for name in named if not (ROOT / name).exists()]
    assert named
    assert not missing


def test_each_command_of_the_readme_is_one_line_with_its_own_setup() -> None:
    commands = [line for line in README.splitlines() if line.startswith("python3.11")]
    assert len(commands) == 2
    assert all("-m venv" in command and "pip install" in command for command in commands)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_and_picture_of_a_page_exists(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)[^)]*\)", text) + re.findall(r"<img[^>]*src=\"([^\"]+)\"", text)
    for target in targets:
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("page", ["README.md", "experiments/README.md"])
def test_the_front_pages_have_at_most_150_lines(page: str) -> None:
    assert len((ROOT / page).read_text(encoding="utf-8").splitlines()) <= 150


BANNED = re.compile(r"(?<!there )is[ ]no |cannot be[ ]had|by[ ]name|who[ ]knows", flags=re.IGNORECASE)
"""Phrases of a translated English. The brackets keep this file from matching itself."""
ENDINGS = ["*.py", "*.md", "*.yaml", "*.ipynb", "*.toml", "*.sh"]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="a source archive does not say which files are tracked")
def test_no_tracked_text_has_a_banned_phrase() -> None:
    listed = subprocess.run(["git", "ls-files", "-z", *ENDINGS], cwd=ROOT, capture_output=True, text=True, check=True)
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():
            for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1):
                found += [f"{name}:{number}: {phrase[0]}" for phrase in BANNED.finditer(line)]
    assert not found
