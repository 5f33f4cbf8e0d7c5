"""From the command line two processes do what one does: the same weights, memory and figures, however they start.

python -m pytest -m slow tests/training/test_ddp.py    # also by torchrun and by SLURM
"""

import csv
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from two_processes import LAUNCH, in_two_processes

from memformer_pl.checkpoints.format import KEY

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")

PROBE = '''
from pathlib import Path

import torch
from lightning import Callback


class KeepWeights(Callback):
    """Saves what each process ends with."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_end(self, trainer, pl_module):
        torch.save(pl_module.state_dict(), self.folder / f"rank{trainer.global_rank}.pt")
'''

CONFIG = """
model:
  accumulate_grad_batches: 2
  learning_rate: 0.01
  gradient_clip_val: 0.5
  model: {{init_args: {{dropout: 0.0}}}}
trainer:
  precision: 64-true
  max_steps: 5
  val_check_interval: 3
  callbacks:
    - class_path: ClosingReport
    - {{class_path: probe.KeepWeights, init_args: {{folder: {folder}}}}}
    - class_path: ModelCheckpoint
      init_args: {{dirpath: {folder}, filename: end, monitor: validation/bits_per_byte}}
  logger: {{init_args: {{name: {name}}}}}
"""


def configure(tmp_path: Path, name: str) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    path = folder / "config.yaml"
    path.write_text(CONFIG.format(folder=folder, name=name))
    return path


def weights(path: Path) -> Mapping[str, torch.Tensor]:
    content: Mapping[str, torch.Tensor] = torch.load(path, weights_only=True)
    return content


def report(folder: Path) -> list[list[float]]:
    with (folder / "version_0" / "documents.csv").open() as file:
        return [[float(value) for value in row] for row in list(csv.reader(file))[1:]]


@pytest.mark.parametrize(
    "launcher", ["slurm", *(pytest.param(name, marks=pytest.mark.slow) for name in ("torchrun", "lightning"))]
)
def test_two_ranks_end_where_one_rank_with_all_lanes_ends(
    command: Callable[..., Any], small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: str
) -> None:
    (tmp_path / "probe.py").write_text(PROBE)
    monkeypatch.syspath_prepend(tmp_path)
    assert command("fit", "--config", small, "--config", configure(tmp_path, "one")).code == 0
    stacked = ["--config", small, "--config", configure(tmp_path, "two")]
    printed = in_two_processes(*stacked, launcher=launcher, folder=tmp_path)
    one, *two = (weights(tmp_path / name) for name in ("one/rank0.pt", "two/rank0.pt", "two/rank1.pt"))
    for name, expected in one.items():
        assert torch.equal(two[0][name], two[1][name]), name
        torch.testing.assert_close(two[0][name], expected, rtol=0, atol=1e-12)
    checkpoints = [torch.load(tmp_path / name / "end.ckpt", weights_only=True) for name in ("one", "two")]
    assert list(checkpoints[0][KEY]["states"]) == [0, 1]
    torch.testing.assert_close(*(content[KEY]["states"] for content in checkpoints), rtol=0, atol=1e-12)
    assert len(checkpoints[1][KEY]["random"]) == 2
    tables = [torch.tensor(report(tmp_path / name), dtype=torch.float64) for name in ("two", "one")]
    torch.testing.assert_close(*tables, rtol=1e-9, atol=0)
    assert printed.count("What the model has learned") == 1
    assert printed.count("Initializing distributed: ") == 2
    if launcher == "lightning":
        assert "Warning" not in printed


@pytest.mark.slow
def test_a_run_that_blows_up_ends_in_one_line_on_two_ranks(small: Path, tmp_path: Path) -> None:
    given = ["--model.learning_rate", "1e30", "--model.max_skipped", "2", "--trainer.max_steps", "20"]
    printed = in_two_processes("--config", small, *given, folder=tmp_path, code=1)
    assert printed.count("error: skipped 2 steps in a row") == 1
    assert printed.count("skipped the step after") == 2
    assert "Traceback" not in printed


@pytest.mark.parametrize("script", sorted(LAUNCH.iterdir()), ids=lambda path: path.name)
def test_a_launch_script_is_one_that_bash_understands(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    assert os.access(script, os.X_OK)
