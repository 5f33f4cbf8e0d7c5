"""Every call of a script that a page, a configuration or a docstring tells to type is one that its parser accepts."""

import re
import runpy
import shlex
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonargparse
import pytest

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "experiments"
TOLD = [ROOT / "README.md", *(ROOT / "memformer_pl").rglob("*.md")]
TOLD += [path for kind in ("md", "yaml", "py") for path in EXPERIMENTS.rglob(f"*.{kind}")]


def calls(text: str) -> Iterator[str]:
    """The scripts that a text calls with their arguments, without comments and what a shell does with the output.

    A script in the middle of a sentence without arguments is only named.
    """
    joined = re.sub(r"\\\n(# *)?", " ", text)
    inline = [" ".join(code.split()) for code in re.findall(r"(?<!`)`(python experiments/[^`]+)`(?!`)", joined)]
    lines = re.findall(r"^(?:# *| {4,})(python experiments/.*)$", joined, flags=re.MULTILINE)
    for line in (*lines, *(code for code in inline if len(code.split()) > 2)):
        yield re.split("[#&|>]", line)[0].strip().removeprefix("python ")


CALLS = sorted({(call, str(path.relative_to(ROOT))) for path in TOLD for call in calls(path.read_text("utf-8"))})


class AcceptedError(Exception):
    """A parser has accepted the arguments."""


def test_calls_are_found_over_several_lines_and_end_before_a_comment() -> None:
    text = "#    python experiments/a.py X \\\n#        --b 2  # why\nas `python experiments/c.py\n  Y > z` says"
    text += " of `python experiments/d.py`"
    assert list(calls(text)) == ["experiments/a.py X  --b 2", "experiments/c.py Y"]


def test_calls_are_told() -> None:
    assert ("experiments/remember/curriculum.py Remember", "experiments/remember/README.md") in CALLS
    assert len(CALLS) > 50


@pytest.mark.parametrize(("call", "page"), CALLS, ids=lambda given: str(given))
def test_a_parser_accepts_the_call(call: str, page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script, *arguments = shlex.split(call)
    if "..." in arguments or not re.search("ArgumentParser|auto_cli", (ROOT / script).read_text("utf-8")):
        return

    def accepting(parse: Callable[..., Any]) -> Callable[..., Any]:
        def accepted(*args: Any, **kwargs: Any) -> None:
            parse(*args, **kwargs)
            raise AcceptedError

        return accepted

    for parser in (jsonargparse.ArgumentParser, ArgumentParser):
        monkeypatch.setattr(parser, "parse_args", accepting(parser.parse_args))
    monkeypatch.setattr("sys.argv", [script, *arguments])
    monkeypatch.syspath_prepend((ROOT / script).parent)
    monkeypatch.chdir(ROOT)
    with pytest.raises(AcceptedError):
        runpy.run_path(script, run_name="__main__")
