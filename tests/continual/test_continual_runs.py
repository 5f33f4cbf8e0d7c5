"""Runs from the command line: every method, resumed runs, what is refused, and the shipped configurations."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import Outcome
from identical import assert_identical
from lightning import LightningModule, Trainer, seed_everything
from mnist import write_mnist

from memformer_pl.callbacks import LastCheckpoint
from memformer_pl.checkpoints.format import KEY
from memformer_pl.continual import command_line
from memformer_pl.continual.backbones import ConvNet
from memformer_pl.continual.exemplars import METHODS
from memformer_pl.continual.images import Digits
from memformer_pl.continual.sequence import TaskSequence
from memformer_pl.continual.task import ContinualTask
from memformer_pl.errors import DivergedError, OptionError
from memformer_pl.sweeps import rows
from memformer_pl.training.checkpoint_io import CheckpointFiles

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
ROWS = EXPERIMENTS / "continual" / "rows.yaml"
TOLD = [*(EXPERIMENTS / "continual").glob("*"), *(EXPERIMENTS.parent / "memformer_pl").rglob("*.md")]
pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual:UserWarning"),
    # frozen parts are in evaluation mode, also in a run that resumes
    pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode:UserWarning"),
]
BUDGET = 9_000


@pytest.fixture
def learn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> Callable[..., Outcome]:
    """Run the command line in this process."""
    monkeypatch.setattr("sys.argv", ["continual"])

    def run(*args: object) -> Outcome:
        code: int | str | None = 0
        try:
            command_line.main([str(arg) for arg in args])
        except SystemExit as stopped:
            code = stopped.code
        printed = "".join(capsys.readouterr()) + caplog.text
        return Outcome(code, [line for line in printed.splitlines() if line.startswith("error:")], printed)

    return run


def task(method: str = "memo", **options: Any) -> ContinualTask:
    keeps = METHODS[method].keeps == "exemplars"
    backbone = ConvNet(shallow=[4], deep=[6])
    return ContinualTask(backbone=backbone, method=method, budget=BUDGET if keeps else None, **options)


def digits(**options: Any) -> TaskSequence:
    given = {"tasks": [[0, 1], [2], [3, 4]], "per_class": 20, "tested_per_class": 5, "epochs": 2, "batch_size": 16}
    return TaskSequence(images=Digits(), **{**given, **options})


def fit(
    module: LightningModule,
    data: TaskSequence,
    folder: Path,
    *,
    plugins: Any = None,
    ckpt_path: Any = None,
    **options: Any,
) -> Trainer:
    seed_everything(0, verbose=False)
    trainer = Trainer(
        **{"max_epochs": 1, "callbacks": [LastCheckpoint(seconds=0.0)], "logger": False, **options},
        accelerator="cpu",
        plugins=plugins,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


class Copies(CheckpointFiles):
    """Keeps a copy of every file that is written, under its number of batches."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: object = None) -> None:
        super().save_checkpoint(checkpoint, path, storage_options)
        shutil.copy(path, Path(path).with_name(f"{checkpoint['global_step']}.copy"))


def final(folder: Path) -> dict[str, Any]:
    (path,) = folder.rglob("last.ckpt")
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_resumes_after_any_batch_ends_as_one_that_was_never_stopped(method: str, tmp_path: Path) -> None:
    whole = task(method)
    trainer = fit(whole, digits(), tmp_path / "whole", plugins=[Copies()])
    copies = sorted(tmp_path.rglob("*.copy"), key=lambda path: int(path.stem))
    steps = sum(trainer.datamodule.steps())  # type: ignore[attr-defined]
    assert [int(path.stem) for path in copies] == list(range(1, steps + 1))
    expected = final(tmp_path / "whole")
    assert len(expected[KEY]["continual"]["accuracies"]) == 3
    ends = [step for step in trainer.datamodule.steps()]  # type: ignore[attr-defined]
    # in the middle of the second task, around its end, and before the last batch
    for step in {ends[0] - 1, ends[0], ends[0] + 1, sum(ends[:2]), sum(ends[:2]) + 1, steps - 1}:
        folder, again = tmp_path / f"from_{step}", task(method)
        fit(again, digits(), folder, ckpt_path=tmp_path / "whole" / "checkpoints" / f"{step}.copy")
        assert again.accuracies == whole.accuracies
        found = final(folder)
        for part in ("state_dict", "optimizer_states", KEY, "TaskSequence"):
            assert_identical(found[part], expected[part], f"{step}/{part}")
