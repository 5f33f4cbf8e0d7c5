"""The summary of a model: its parts, its state and its cost; and no column of zero FLOPs, as Lightning's has."""

import re
from pathlib import Path

import pytest
from lightning import Trainer
from models import MODELS
from tasks import small_memformer
from trainers import train

from memformer_pl.callbacks import SegmentModelSummary
from memformer_pl.contract import state_bytes
from memformer_pl.training.task import SegmentTask

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")


def summary_of(
    folder: Path, task: SegmentTask, capsys: pytest.CaptureFixture[str], **options: object
) -> tuple[dict[str, int], str]:
    """Parameters by part, and the line below the table."""
    options = {"enable_model_summary": True, "limit_val_batches": 0, "max_steps": 1, **options}
    train(folder, SegmentModelSummary(), task=task, **options)
    printed = capsys.readouterr().out
    parts = dict(re.findall(r"│ (\S+) +│ \w+ +│ +([\d,]+) │", printed))
    (line,) = [line for line in printed.splitlines() if "a lane carries" in line]
    assert "FLOPs" not in printed
    assert "Total params" not in printed
    return {name: int(number.replace(",", "")) for name, number in parts.items()}, line


def test_parts_and_the_total_are_those_of_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = SegmentTask(model=small_memformer())
    parts, line = summary_of(tmp_path, task, capsys)
    model = task.model
    for name, part in model.named_children():
        assert parts.pop(name, 0) == sum(parameter.numel() for parameter in part.parameters()), name
    assert parts == {"(direct)": sum(parameter.numel() for parameter in model.parameters(recurse=False))}
    total = sum(parameter.numel() for parameter in model.parameters())
    kibibytes = state_bytes(model.initial_state(1)) / 1024
    assert line == f"{total:,} parameters; a lane carries {kibibytes:.1f} KiB"


def test_the_state_is_measured_in_the_precision_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {}
    for precision in ("32-true", "64-true"):
        _, line = summary_of(tmp_path, SegmentTask(model=small_memformer().float()), capsys, precision=precision)
        sizes[precision] = float(line.split("carries ")[1].split()[0])
    assert sizes["32-true"] < sizes["64-true"]


def test_frozen_parameters_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small_memformer()
    model.embedding.requires_grad_(False)
    _, line = summary_of(tmp_path, SegmentTask(model=model), capsys)
    frozen = sum(parameter.numel() for parameter in model.embedding.parameters())
    assert f" parameters, {frozen:,} of them frozen; " in line


def test_the_summary_of_every_model_leaves_it_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", enable_model_summary=False, **quiet)
    for build in MODELS.values():
        model = build().train()
        SegmentModelSummary().on_fit_start(trainer, SegmentTask(model=model))
        assert model.training
        assert f"{sum(p.numel() for p in model.parameters()):,} parameters; " in capsys.readouterr().out


def test_other_ranks_print_no_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "is_global_zero", property(lambda trainer: False))
    train(tmp_path, SegmentModelSummary(), enable_model_summary=True, max_steps=1)
    assert "a lane carries" not in capsys.readouterr().out
