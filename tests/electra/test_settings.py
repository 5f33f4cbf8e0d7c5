"""The script that trains all settings of ELECTRA: its commands, and the table that it makes of their logs."""

import sys
from pathlib import Path

import pytest
from conftest import Runner
from torch.utils.tensorboard import SummaryWriter

from memformer_pl.electra import cli

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "experiments" / "electra")
    monkeypatch.delitem(sys.modules, "settings", raising=False)


def write(folder: Path, *, steps: int, auc: float, seconds: float) -> None:
    """A log of a run."""
    with SummaryWriter(str(folder)) as log:
        log.add_scalar("train/bit", 0.5, 9, walltime=100.0)
        log.add_scalar("validation/auc", auc, steps - 1, walltime=100.0 + seconds)


def test_every_setting_is_a_command_that_the_parser_accepts(runner: Runner, tmp_path: Path) -> None:
    import settings

    printed = []
    for name in settings.SETTINGS:
        words = settings.command(name, 3, tmp_path, ["--print_config"])
        outcome = runner(cli.main)(*words[words.index("fit") :])
        assert outcome.code == 0, outcome.output
        assert "version: seed_3\n" in outcome.output
        printed.append(outcome.output)
    assert len(set(printed)) == 5


def test_a_table_has_means_and_errors_of_the_runs_that_are_done(tmp_path: Path) -> None:
    import settings

    write(tmp_path / "none" / "seed_0", steps=2000, auc=0.75, seconds=100)
    write(tmp_path / "none" / "seed_1", steps=2000, auc=0.85, seconds=200)
    write(tmp_path / "uniform" / "seed_0", steps=1000, auc=0.9, seconds=100)  # not done
    lines = settings.table(tmp_path, [0, 1, 2]).splitlines()
    assert lines[2] == "| no buffer | 0.8000 ± 0.0500 | 2,000 | 150 | 2 |"
    assert lines[4] == "| drawn alike |  | 2,000 |  | 0 |"
    assert len(lines) == 7
    page = (ROOT / "experiments" / "electra" / "README.md").read_text()
    assert settings.table(tmp_path / "nothing", [0]) in page
