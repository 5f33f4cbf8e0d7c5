"""Two processes do what one does: the same weights, the same memory, the same figures."""

import csv
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from memformer_pl.checkpoints import KEY

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
model: {{accumulate: 2, learning_rate: 0.01, clip: 0.5, model: {{init_args: {{dropout: 0.0}}}}}}
trainer:
  precision: 64-true
  max_steps: 3
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


def in_two_processes(*args: object, path: Path) -> str:
    """Run the command line on two ranks; whatever happens, no process is left behind."""
    words = [sys.executable, "-m", "memformer_pl", *map(str, args)]
    words += ["--trainer.strategy", "ddp", "--trainer.devices", "2"]
    paths = os.pathsep.join([str(path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths}
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(words, env=environment, start_new_session=True, **streams) as process:
        try:
            printed, _ = process.communicate(timeout=150)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 0, printed
    return str(printed)


def weights(path: Path) -> Mapping[str, torch.Tensor]:
    content: Mapping[str, torch.Tensor] = torch.load(path, weights_only=True)
    return content


def report(folder: Path) -> list[list[float]]:
    with (folder / "version_0" / "documents.csv").open() as file:
        return [[float(value) for value in row] for row in list(csv.reader(file))[1:]]


def test_two_ranks_end_where_one_rank_with_all_lanes_ends(
    command: Callable[..., Any], small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "probe.py").write_text(PROBE)
    monkeypatch.syspath_prepend(tmp_path)
    assert command("fit", "--config", small, "--config", configure(tmp_path, "one")).code == 0
    printed = in_two_processes("fit", "--config", small, "--config", configure(tmp_path, "two"), path=tmp_path)
    one, *two = (weights(tmp_path / name) for name in ("one/rank0.pt", "two/rank0.pt", "two/rank1.pt"))
    for name, expected in one.items():
        assert torch.equal(two[0][name], two[1][name]), name
        torch.testing.assert_close(two[0][name], expected, rtol=1e-10, atol=1e-10)
    checkpoints = [torch.load(tmp_path / name / "end.ckpt", weights_only=True) for name in ("one", "two")]
    assert list(checkpoints[0][KEY]["states"]) == [0, 1]
    torch.testing.assert_close(*(content[KEY]["states"] for content in checkpoints), rtol=1e-10, atol=1e-10)
    assert len(checkpoints[1][KEY]["random"]) == 2
    assert torch.tensor(report(tmp_path / "two")).numpy() == pytest.approx(
        torch.tensor(report(tmp_path / "one")).numpy(), rel=1e-6
    )
    assert printed.count("What the model has learned") == 1
    assert "Warning" not in printed
