"""The curves of training have the points of the logs, seed by seed."""

import runpy
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

SCRIPT = Path(__file__).parents[2] / "experiments" / "curves.py"


def log(folder: Path, bits: dict[int, float]) -> None:
    """Write the validations of a run; TensorBoard counts steps from 0."""
    with SummaryWriter(str(folder)) as writer:
        for step, value in bits.items():
            writer.add_scalar("validation/bits_per_byte", value, step - 1)


def test_rows_are_compared_seed_by_seed_at_the_steps_that_all_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, twin = tmp_path / "memory-0a", tmp_path / "no_memory-0b"
    log(ours / "seed_0", {5: 2.0, 10: 1.5})
    log(ours / "seed_1", {5: 2.5, 10: 2.0})
    log(ours / "seed_2", {5: 3.0})  # still in training
    log(twin / "seed_0", {5: 2.25, 10: 2.0})
    log(twin / "seed_1", {5: 2.75, 10: 2.25})
    runpy.run_path(str(SCRIPT))["main"](tmp_path / "out.png", [ours, twin])
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.splitlines() == [
        "| steps | memory | no memory | memory saves |",
        "| --- | --- | --- | --- |",
        "| 5 | 2.5000 ± 0.2887 | 2.5000 ± 0.2500 | 0.2500 ± 0.0000 |",
        "| 10 |  | 2.1250 ± 0.1250 | 0.3750 ± 0.1250 |",
    ]


def test_a_single_run_has_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log(tmp_path / "memory", {5: 2.0})
    log(tmp_path / "no_memory", {5: 2.25})
    runpy.run_path(str(SCRIPT))["main"](tmp_path / "out.png", [tmp_path / "memory", tmp_path / "no_memory"])
    assert capsys.readouterr().out.splitlines()[-1] == "| 5 | 2.0000 | 2.2500 | 0.2500 |"


def test_a_folder_without_validations_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run has no validation/bits_per_byte: train with validation"):
        runpy.run_path(str(SCRIPT))["main"](tmp_path / "out.png", [tmp_path / "run"])
