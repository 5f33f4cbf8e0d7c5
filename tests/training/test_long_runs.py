"""2,000 rollouts more take no more memory, open files or disk.

python -m pytest -m slow tests/training/test_long_runs.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PROBE = '''
import gc
import json
import os
from pathlib import Path

from lightning import Callback


class Sample(Callback):
    """Writes down what the process holds: resident memory, open files, and bytes on disk below the run's folder."""

    def __init__(self, folder: str, every: int) -> None:
        self.folder, self.every = Path(folder), every

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step % self.every:
            return
        gc.collect()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        disk = {str(p.relative_to(self.folder)): p.stat().st_size for p in self.folder.rglob("*") if p.is_file()}
        plan = len(trainer.train_dataloader._plan._begins)
        sample = {"rollouts": trainer.global_step, "resident": resident, "disk": disk, "plan": plan}
        sample["documents"] = len(trainer.train_dataloader.documents)
        sample["files"] = len(os.listdir("/proc/self/fd"))
        with (self.folder.parent / "samples.jsonl").open("a") as file:
            file.write(json.dumps(sample) + "\\n")
'''

CONFIG = """
trainer:
  max_steps: {rollouts}
  val_check_interval: 100
  check_val_every_n_epoch: null
  log_every_n_steps: 50
  enable_progress_bar: true
  callbacks:
    - {{class_path: probe.Sample, init_args: {{folder: {folder}, every: 250}}}}
    - class_path: ModelCheckpoint
      init_args:
        dirpath: {folder}/kept
        every_n_train_steps: 40
        save_top_k: 2
        save_last: true
        monitor: step
        mode: max
  logger: {{init_args: {{save_dir: {folder}}}}}
"""
WARM_UP, ROLLOUTS = 500, 2000


def test_nothing_grows_over_two_thousand_rollouts(small: Path, tmp_path: Path) -> None:
    """Many passes over the corpus, with validations, checkpoints, a progress bar and a log."""
    folder = tmp_path / "everything"
    folder.mkdir()
    (tmp_path / "probe.py").write_text(PROBE)
    (tmp_path / "long.yaml").write_text(CONFIG.format(folder=folder, rollouts=WARM_UP + ROLLOUTS))
    words = [sys.executable, "-m", "memformer_pl", "fit", "--config", small, "--config", tmp_path / "long.yaml"]
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    first, *_, last = samples = [sample for sample in samples if sample["rollouts"] >= WARM_UP]
    assert [first["rollouts"], last["rollouts"]] == [WARM_UP, WARM_UP + ROLLOUTS]
    # 512 bytes for each rollout would be noticed; measured were 0.12 MiB, of 384 MiB
    assert last["resident"] - first["resident"] < 2**20
    assert {sample["files"] for sample in samples} == {first["files"]}
    # passes end, and are forgotten: never more than are in the lanes and one pass that is dealt out
    assert max(sample["plan"] for sample in samples) <= 3 * samples[0]["documents"]
    kept = [{name: size for name, size in sample["disk"].items() if "tfevents" not in name} for sample in samples]
    assert {len(files) for files in kept} == {len(kept[0])}
    assert max(sum(files.values()) for files in kept) < 1.01 * sum(kept[0].values())
    # the log grows by what is logged: every 50 rollouts, and at every validation
    grown = sum(last["disk"].values()) - sum(first["disk"].values())
    assert grown < 64 * (ROLLOUTS // 50 * 10 + ROLLOUTS // 100 * 5)
