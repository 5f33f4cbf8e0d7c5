"""A configuration that cannot be is refused in a line, whatever is wrong with it; one that can be trains.

Faults are put into a configuration that is right, one at a time: wrong values at every option, options that there are
not or that are missing, files that are no configuration, and texts with a few characters changed. The default run takes
a sample, ``pytest -m slow tests/test_fuzz_configs.py`` the others.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from config_faults import BASE, FAULTS, Fault
from conftest import Outcome
from fuzzing import files_below, run, some, the_error

# what is merely odd draws warnings, and a run may go where another has been
pytestmark = pytest.mark.filterwarnings("ignore")

ENDS = {"max_steps": 1, "max_epochs": 1, "limit_train_batches": 1}
"""What a run is told behind a configuration that may have lost its end."""


class Place(NamedTuple):
    """Where the commands run: what is there must stay as it is."""

    folder: Path
    names: dict[str, str]

    def write(self, name: str, text: str | bytes) -> Path:
        content = text.encode() if isinstance(text, str) else text
        for word, path in self.names.items():
            content = content.replace(word.encode(), path.encode())
        path = self.folder / name
        path.write_bytes(content)
        return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A corpus of a dozen texts, and what an earlier run has left where these would log to."""
    folder = tmp_path_factory.mktemp("configs")
    names = {"TEXTS": str(folder / "texts"), "CACHE": str(folder / "cache"), "RUNS": str(folder / "runs")}
    (folder / "texts").mkdir()
    for length in (1, 5, 17, 40, 64, 100, 123, 150, 211, 300, 400):
        (folder / "texts" / f"{length:03}.txt").write_text(("hello world, abc def\n" * 20)[:length])
    earlier = folder / "runs" / "run" / "version_0"
    (earlier / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "documents.csv", "checkpoints/last.ckpt"):
        (earlier / name).write_text("of an earlier run")
    place = Place(folder, names)
    place.write("base.yaml", BASE)
    return place


def run_elsewhere(command: Callable[..., Outcome], place: Place, words: list[str]) -> Outcome:
    """Run where nothing but an earlier run stands in the way, which is put aside meanwhile."""
    runs, aside = place.folder / "runs", place.folder.with_name("aside")
    runs.rename(aside)
    try:
        return run(command, *words)
    finally:
        shutil.rmtree(runs, ignore_errors=True)
        aside.rename(runs)


def remove_others(place: Place, kept: frozenset[tuple[str, int, int]]) -> None:
    """Remove what a run has left, which would stand in the way of the next one."""
    for name, *_ in files_below(place.folder) - kept - files_below(place.folder / "cache"):
        Path(name).unlink()


@pytest.mark.parametrize("fault", some(FAULTS, short=40))
def test_a_wrong_configuration_is_refused_in_a_line_and_nothing_is_lost(
    command: Callable[..., Outcome], place: Place, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    monkeypatch.chdir(place.folder)
    files = [] if fault.instead else [place.folder / "base.yaml"]
    if fault.text is not None:
        files.append(place.write("fault.yaml", fault.text))
    ends = [f"--trainer.{name}={most}" for name, most in ENDS.items() if not re.search(rf"\b{name}\b", fault.name)]
    before = files_below(place.folder)
    words = ["fit", *[f"--config={file}" for file in files], *ends, *fault.options]
    outcome = run(command, *words)
    if "is the checkpoint of another run" in outcome.output:
        assert before <= files_below(place.folder)
        outcome = run_elsewhere(command, place, words)
    if outcome.code == 0:
        assert not fault.must
        assert before <= files_below(place.folder)
        remove_others(place, before)
        return
    error = the_error(outcome)
    about_data = re.search(r"paths|cache|field|ckpt_path|save_dir|validation|test|\w+ \d+$", fault.name)
    assert outcome.code == 2 or (outcome.code == 1 and about_data)
    assert not fault.touched or any(str(word) in error for word in fault.touched)
    # what only the length of an epoch shows is refused late: the corpus is packed then, and the logger has begun a file
    after = files_below(place.folder)
    assert before <= after
    added = {name for name, *_ in after - before - files_below(place.folder / "cache")}
    assert not {name for name in added if not re.search(r"version_0/(events\.\S+|hparams\.yaml)$", name)}
    assert not added or "interval" in fault.name or "limit" in fault.name
