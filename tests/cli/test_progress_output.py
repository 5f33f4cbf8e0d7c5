"""What ``fit`` prints of its progress and of its model, on a terminal and in a file."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Outcome

SHOWN = ["--trainer.enable_progress_bar=true", "--trainer.enable_model_summary=true"]
VALIDATED = ["--trainer.val_check_interval=2", "--trainer.check_val_every_n_epoch=null"]


def test_lines_replace_the_progress_bar_if_standard_output_is_not_a_terminal(
    command: Callable[..., Outcome], small: Path
) -> None:
    outcome = command("fit", "--config", small, *SHOWN, *VALIDATED)
    assert (outcome.code, outcome.errors) == (0, [])
    lines = outcome.output.splitlines()
    validated = [line.split("  ") for line in lines if line.endswith("bits/byte")]
    assert [step for step, _ in validated] == ["step 2 of 4", "step 4 of 4"]
    assert all(re.fullmatch(r"validation \d\.\d{3} bits/byte", told) for _, told in validated)
    assert not [line for line in lines if line.startswith("step 0 of 4")]
    assert "Epoch 0" not in outcome.output
    assert "\r" not in outcome.output
    assert "it/s" not in outcome.output


def test_a_terminal_gets_the_progress_bar(
    command: Callable[..., Outcome], small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    outcome = command("fit", "--config", small, *SHOWN, *VALIDATED)
    assert (outcome.code, outcome.errors) == (0, [])
    assert "it/s" in outcome.output
    assert "step 2 of 4" not in outcome.output


def test_the_summary_is_not_lightnings(
    command: Callable[..., Outcome], small: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outcome = command("fit", "--config", small, *SHOWN)
    assert "parameters; a lane carries" in outcome.output
    assert "a lane carries" in outcome.output
    for lightning in ("Total params", "Trainable params", "Modules in train mode", "FLOPs"):
        assert lightning not in outcome.output + caplog.text


def test_progress_and_summary_can_be_turned_off(command: Callable[..., Outcome], small: Path) -> None:
    outcome = command("fit", "--config", small, *VALIDATED)
    assert outcome.code == 0
    for line in ("a lane carries", "step 2 of 4", "Total params", "it/s"):
        assert line not in outcome.output


def test_a_progress_bar_in_the_configuration_stays(command: Callable[..., Outcome], small: Path) -> None:
    own = "--trainer.callbacks=[{class_path: TQDMProgressBar}]"
    outcome = command("fit", "--config", small, *SHOWN, *VALIDATED, own)
    assert (outcome.code, outcome.errors) == (0, [])
    assert "it/s" in outcome.output
    assert "step 2 of 4" not in outcome.output


def test_a_summary_in_the_configuration_stays(
    command: Callable[..., Outcome], small: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outcome = command("fit", "--config", small, *SHOWN, "--trainer.callbacks=[{class_path: ModelSummary}]")
    assert (outcome.code, outcome.errors) == (0, [])
    assert "Trainable params" in caplog.text  # Lightning logs its summary
    assert "a lane carries" not in outcome.output
