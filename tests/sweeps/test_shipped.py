"""Shipped configurations are found from any folder; a file comes first."""

import re
import shlex
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import Outcome

from memformer_pl.cli.main import CONFIGURED, SWEEPING, USING
from memformer_pl.cli.options import Parser
from memformer_pl.errors import UsageError
from memformer_pl.sweeps import rows, shipped

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "experiments"
TOLD = [ROOT / "README.md", *(ROOT / "memformer_pl").rglob("*.md"), *ROOT.glob("notebooks/*.ipynb")]
TOLD += [path for kind in ("md", "yaml", "sh") for path in EXPERIMENTS.rglob(f"*.{kind}")]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_every_configuration_of_the_repository_has_a_name() -> None:
    tasks = set((EXPERIMENTS / shipped.HARNESS).glob("*.yaml"))
    assert len(tasks) == 3
    assert {shipped.config(name) for name in shipped.names()} == set(EXPERIMENTS.rglob("*.yaml")) - tasks
    assert {"quickstart", "models/lstm", "table1/digits/rows"} < set(shipped.names())


@pytest.mark.parametrize("name", ["quickstart", "models/lstm", "recall/copy/memformer", "quickstart.yaml"])
def test_a_name_is_found_from_any_folder(name: str) -> None:
    assert shipped.find(name) == EXPERIMENTS / f"{name.removesuffix('.yaml')}.yaml"


def test_a_file_comes_first_and_a_folder_does_not(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "quickstart").mkdir()
    assert shipped.find("models/lstm") == EXPERIMENTS / "models" / "lstm.yaml"
    assert shipped.find("quickstart") == EXPERIMENTS / "quickstart.yaml"
    (tmp_path / "models" / "lstm").touch()
    (tmp_path / "quickstart.yaml").touch()
    assert shipped.find("models/lstm") == Path("models/lstm")
    assert shipped.find("quickstart.yaml") == Path("quickstart.yaml")
    assert shipped.find("quickstart.yaml", beside=tmp_path / "models") == EXPERIMENTS / "quickstart.yaml"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("quikstart", "there is no file 'quikstart', and no shipped .* has this name. Did you mean quickstart[?]"),
        ("lstm", "Did you mean models/lstm[?]"),
        ("model/lstm", "Did you mean models/lstm[?]"),
        ("experiments/stdlib.yaml", "Did you mean stdlib[?]"),
        ("memformer", "Did you mean recall/associative/memformer or recall/copy/memformer[?]"),
        ("table3", "There are table3/wikitext103"),
        ("../pyproject", "There are no_memory, quickstart, stdlib, watch, and more in acting/, continual/, corpora/, "),
        ("nothing.yaml", "There are no_memory, quickstart"),
        ("", "the name of the file is empty"),
        (".", "'.' is a folder"),
        (str(ROOT), "is a folder"),
    ],
)
def test_what_is_neither_is_refused_with_the_nearest_names(
    given: str, said: str, command: Callable[..., Outcome]
) -> None:
    with pytest.raises(UsageError, match=said):
        shipped.find(given)
    outcome = command("fit", f"--config={given}")
    (line,) = outcome.errors
    assert outcome.code == 2
    assert line.startswith("error: config: ")
    assert re.search(said, line)
    assert len(line) < 300


def test_config_takes_a_name_only() -> None:
    with pytest.raises(UsageError, match=r"no shipped .* 'quickstart.yaml'. Did you mean quickstart\?"):
        shipped.config("quickstart.yaml")


def test_names_stack_on_files_and_on_each_other(command: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("trainer: {max_steps: 7}\n")
    names = ["quickstart", "no_memory", "watch", "mine.yaml", "{trainer: {val_check_interval: 3}}"]
    outcome = command("fit", *(f"--config={name}" for name in names), "--print_config")
    assert outcome.code == 0
    for option in ("slots: 0", "version: no_memory", "callbacks.SlotRetention", "max_steps: 7", "check_interval: 3"):
        assert option in outcome.output


def told_commands(path: Path) -> Iterator[list[str]]:
    """The words of every command of the package that a text tells to type."""
    text = re.sub(r"\\n|\\$|\n(#|\s*#)?\s*", " ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for told in re.findall(r"python -m memformer_pl ([^`]*?)(?:`|&&| # |(?=python)|$)", text):
        yield [word.rstrip(",.;:)") for word in told.split()]


def is_placeholder(word: str) -> bool:
    return word == "..." or re.fullmatch("[A-Z_]+", word) is not None


@pytest.mark.parametrize("path", TOLD, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_that_is_told_exists_and_names_what_is_shipped(path: Path) -> None:
    for words in told_commands(path):
        if words[0].startswith(("-", "{")):
            continue
        assert words[0] in (*CONFIGURED, *USING, *SWEEPING)
        for before, word in pairwise(words):
            if before == "--config" and not is_placeholder(word):
                shipped.config(word)
            if before in ("sweep", "tables") and not is_placeholder(word):
                assert rows.read(word).rows


def complete_commands(page: Path) -> Iterator[str]:
    """Every command of the package in the code of a page, without comments and what a shell does with its output."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    fenced = re.findall(r"```\w*\n(.*?)```", text, flags=re.DOTALL)
    rest = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", rest)]
    for line in (*"\n".join(fenced).splitlines(), *re.findall(r"^ {4}(.*)$", rest, flags=re.MULTILINE), *inline):
        yield from (found.strip() for found in re.findall(r"python -m memformer_pl ([^#&|>]*)", line))


COMMANDS = sorted(
    {(found, page.relative_to(ROOT)) for page in TOLD if page.suffix == ".md" for found in complete_commands(page)}
)


@pytest.mark.parametrize(("told", "page"), COMMANDS, ids=lambda given: str(given))
def test_every_command_of_a_page_is_one_that_the_parser_accepts(
    told: str, page: Path, command: Callable[..., Outcome]
) -> None:
    words = shlex.split(told)
    if "..." in words or "FILE" in words or len(words) == 1 or words[0].startswith("{"):
        return
    if words[0] in CONFIGURED:
        outcome = command(*words, "--print_config")
        assert outcome.code == 0, outcome.errors
    else:
        parser = Parser(prog=words[0])
        import_module(f"memformer_pl.cli.{words[0]}").add_options(parser)
        parser.parse_args(words[1:])


def test_commands_are_told() -> None:
    told = {words[0] for path in TOLD for words in told_commands(path)}
    assert {"fit", "validate", "analyze", "generate", "predict", "export", "sweep", "tables", "compare"} <= told
    assert ["sweep", "recall/copy/rows"] in list(told_commands(EXPERIMENTS / "recall" / "copy" / "rows.yaml"))


@pytest.mark.parametrize("path", TOLD, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_configuration_is_named_by_its_place_in_the_repository(path: Path) -> None:
    assert not re.findall(r"--config[ =]experiments/", path.read_text(encoding="utf-8"))
