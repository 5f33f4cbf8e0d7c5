"""An invalid configuration is refused in one line, whatever is wrong with it; a valid one trains.

Each case puts one fault into a valid configuration: a wrong value, a missing or unknown option, a file that is not a
configuration, or a few changed characters. The default run takes a sample; ``pytest -m slow
tests/cli/test_fuzz_configs.py`` runs the others.
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

# odd configurations draw warnings, and a run may log where an earlier one has
pytestmark = pytest.mark.filterwarnings("ignore")

ENDS = {"max_steps": 1, "max_epochs": 1, "limit_train_batches": 1}
"""Options that end a run whose configuration may have lost its own."""


class Place(NamedTuple):
    """The folder in which the commands run; its files must not change."""

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
    """A corpus of a dozen texts, and the files of an earlier run in the folder of the logs."""
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
    """Run once more with the files of the earlier run moved away."""
    runs, aside = place.folder / "runs", place.folder.with_name("aside")
    runs.rename(aside)
    try:
        return run(command, *words)
    finally:
        shutil.rmtree(runs, ignore_errors=True)
        aside.rename(runs)


def remove_others(place: Place, before: frozenset[tuple[str, int, int]]) -> None:
    """Remove the files of a run."""
    for name, *_ in files_below(place.folder) - before - files_below(place.folder / "cache"):
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
    # only the length of an epoch shows some mistakes: by then the corpus is packed and the logger has begun a file
    after = files_below(place.folder)
    assert before <= after
    added = {name for name, *_ in after - before - files_below(place.folder / "cache")}
    assert not {name for name in added if not re.search(r"version_0/(events\.\S+|hparams\.yaml)$", name)}
    assert not added or "interval" in fault.name or "limit" in fault.name
