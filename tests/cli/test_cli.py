"""The command line: stacked configurations, checkpoints, and what it prints."""

import csv
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning import Callback, LightningModule, Trainer
from rich.progress import Progress
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from memformer_pl.callbacks.progress import Speed, Stage, short_number

# the configuration names the folder of logs, so that a second run writes where the first one did
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")

Command = Callable[..., Any]

KEPT = """
trainer:
  callbacks:
    - class_path: ModelCheckpoint
      init_args: {{dirpath: {folder}, every_n_train_steps: 2, save_top_k: -1, save_last: true, filename: "{{step}}"}}
    - class_path: ClosingReport
"""


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A configuration that keeps checkpoints in a known folder, and ends with a report."""
    path = tmp_path / "kept.yaml"
    path.write_text(KEPT.format(folder=tmp_path / "kept"))
    return path


def logged(folder: Path) -> Mapping[str, Mapping[int, float]]:
    """What a run has logged to TensorBoard: for each metric, its values by step."""
    events = EventAccumulator(str(folder)).Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def printed_config(command: Command, *args: object) -> str:
    outcome = command("fit", *args, "--print_config")
    assert outcome.code == 0
    return outcome.output


def test_stacked_files_and_the_command_line_merge_deeply_and_the_last_wins(
    command: Command, small: Path, tmp_path: Path
) -> None:
    (tmp_path / "wider.yaml").write_text(
        "model: {model: {init_args: {dim: 32, slots: 6}}}\ntrainer: {logger: {init_args: {name: wide}}}"
    )
    options = ["--config", small, "--config", tmp_path / "wider.yaml", "--model.model.init_args.slots", "7"]
    config = yaml.safe_load(printed_config(command, *options))
    chosen = config["model"]["model"]["init_args"]
    assert (chosen["dim"], chosen["heads"], chosen["slots"]) == (32, 2, 7)
    assert config["trainer"]["logger"]["init_args"]["name"] == "wide"
    assert config["trainer"]["logger"]["init_args"]["save_dir"] == str(tmp_path)
    assert config["trainer"]["max_steps"] == 4


def test_a_printed_configuration_can_be_given_back(command: Command, small: Path, tmp_path: Path) -> None:
    printed = printed_config(command, "--config", small)
    (tmp_path / "printed.yaml").write_text(printed)
    assert printed_config(command, "--config", tmp_path / "printed.yaml") == printed
    outcome = command("fit", "--config", tmp_path / "printed.yaml", "--trainer.max_steps", "1")
    assert (outcome.code, outcome.errors) == (0, [])
    saved = tmp_path / "run" / "version_0" / "config.yaml"
    assert yaml.safe_load(saved.read_text())["trainer"]["max_steps"] == 1
    assert "vocab_size" not in yaml.safe_load(printed)["model"]["model"]["init_args"]


def test_validate_and_test_from_a_checkpoint_find_what_the_run_reported(
    command: Command, small: Path, kept: Path, tmp_path: Path
) -> None:
    base = ["--config", small, "--config", kept]
    assert command("fit", *base).code == 0
    with (tmp_path / "run" / "version_0" / "documents.csv").open() as file:
        rows = list(csv.DictReader(file))
    reported = sum(float(row["with_memory"]) for row in rows) / sum(float(row["sizes"]) for row in rows)
    for name, split in {"validate": "validation", "test": "test"}.items():
        path = tmp_path / "kept" / "step=4.ckpt"
        outcome = command(name, *base, "--ckpt_path", path, "--trainer.logger.init_args.name", name)
        assert (outcome.code, outcome.errors) == (0, [])
        figures = logged(tmp_path / name / "version_0")
        assert {f"{split}/{figure}" for figure in ("loss", "perplexity", "accuracy", "bits_per_byte")} <= set(figures)
        if split == "validation":
            (bits,) = figures["validation/bits_per_byte"].values()
            assert bits == pytest.approx(reported, rel=1e-6)


def test_validation_without_resets_has_other_metrics(command: Command, small: Path, tmp_path: Path) -> None:
    assert command("fit", "--config", small).code == 0
    found = {}
    for reset in ("documents", "never"):
        options = ["--data.reset", reset, "--data.evaluation_batch_size", "1", "--trainer.logger.init_args.name", reset]
        path = tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt"
        assert command("validate", "--config", small, "--ckpt_path", path, *options).code == 0
        found[reset] = logged(tmp_path / reset / "version_0")
    by_token, by_word = (f"validation/{name}" for name in ("perplexity", "word_perplexity"))
    assert set(found["never"]) == set(found["documents"]) >= {by_token, by_word}
    assert found["never"][by_token] != found["documents"][by_token]


def test_a_checkpoint_overrides_neither_the_configuration_nor_the_command_line(
    command: Command, small: Path, kept: Path, tmp_path: Path
) -> None:
    """Lightning lets the checkpoint win silently (PL#21455), and the optimizer's state brings its rate and decay."""
    base = ["--config", small, "--config", kept, "--trainer.max_steps", "6"]
    assert command("fit", *base).code == 0
    other = ["--model.learning_rate", "0.5", "--model.weight_decay", "0.25", "--trainer.logger.init_args.name", "other"]
    outcome = command("fit", *base, "--ckpt_path", tmp_path / "kept" / "step=4.ckpt", *other)
    assert (outcome.code, outcome.errors) == (0, [])
    rates = [logged(tmp_path / name / "version_0")["train/learning_rate"] for name in ("run", "other")]
    assert list(rates[1]) == [4, 5]
    assert all(rates[1][step] == pytest.approx(500 * rates[0][step]) for step in rates[1])
    saved = yaml.safe_load((tmp_path / "other" / "version_0" / "config.yaml").read_text())
    assert saved["model"]["learning_rate"] == 0.5
    resumed = torch.load(tmp_path / "kept" / "last.ckpt", weights_only=True)
    assert [group["weight_decay"] for group in resumed["optimizer_states"][0]["param_groups"]] == [0.25, 0.0]


def test_ckpt_path_last_finds_the_last_checkpoint(command: Command, small: Path, kept: Path, tmp_path: Path) -> None:
    base = ["--config", small, "--config", kept]
    assert command("fit", *base).code == 0
    more = ["--ckpt_path", "last", "--trainer.max_steps", "6", "--trainer.logger.init_args.name", "more"]
    outcome = command("fit", *base, *more)
    assert (outcome.code, outcome.errors) == (0, [])
    assert list(logged(tmp_path / "more" / "version_0")["train/loss"]) == [4, 5]


def test_help_says_what_an_option_means(command: Command) -> None:
    assert (
        "{fit,validate,test,analyze,generate,predict,evaluate,export,sweep,tables,compare}" in command("--help").output
    )
    words = " ".join(command("fit", "--help").output.split())
    assert "python -m memformer_pl" in words
    assert "How the gradient of a rollout is computed" in words
    assert "Segments between two optimizer steps" in words
    assert "Weight decay falls on the weights of linear maps" not in words
    assert re.search(r"--model.gradient \{replay,sparse_replay,bptt,checkpointed,truncated\}", words)


def on_a_terminal(words: list[object]) -> tuple[int, str, str]:
    """Run a command whose standard output is a terminal; returns its exit code, standard output and standard error."""
    environment = {**os.environ, "COLUMNS": "100", "TERM": "xterm"}
    terminal, inside = pty.openpty()
    process = subprocess.Popen(list(map(str, words)), stdout=inside, stderr=subprocess.PIPE, env=environment)
    os.close(inside)
    written = bytearray()
    with open(terminal, "rb", buffering=0) as output, suppress(OSError):  # noqa: PTH123 - Linux ends a terminal by EIO
        while block := output.read(1 << 16):
            written += block
    _, errors = process.communicate(timeout=120)
    return process.returncode, written.decode(), errors.decode()


def test_a_run_prints_progress_in_a_line_and_a_report_and_no_warning(small: Path, kept: Path) -> None:
    """In a process of its own, on a terminal of 100 columns."""
    words = [sys.executable, "-m", "memformer_pl", "fit", "--config", small, "--config", kept]
    code, *printed = on_a_terminal([*words, "--trainer.enable_progress_bar", "true"])
    assert code == 0
    plain, warned = (re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", text) for text in printed)
    for noise in ("Warning", "warn(", "deprecated", "Tip:", "error:"):
        assert noise not in plain + warned
    bars, report = plain.split("What the model has learned")
    assert "this model, memory reset at every segment" in report
    assert "Epoch" not in report
    lines = bars.replace("\r", "\n").splitlines()
    last = [line for line in lines if line.startswith("Epoch 0") and "step: 4" in line][-1]
    assert re.search(r"4/\d+ .*it/s +step: 4 bits/byte: \d\.\d{3} tokens/s: [\d,.]+ *$", last)
    assert len(last) <= 100


def test_the_progress_bar_writes_numbers_briefly() -> None:
    assert [short_number(value) for value in (0.12345, 99.5, 123.4, 12345.6)] == ["0.123", "99.500", "123", "12,346"]
    progress = Progress(disable=True)
    progress.add_task("Epoch 3/-2", total=4)
    (task,) = progress.tasks
    assert Stage().render(task).plain == "Epoch 3   "
    assert Speed().render(task).plain == "0.00it/s"


class Logs(Callback):
    """A user's callback that logs a metric of its own."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log("mine", 1.0)


def test_a_metric_that_a_callback_logs_can_be_monitored(command: Command, small: Path) -> None:
    stopping = "{class_path: EarlyStopping, init_args: {monitor: %s}}"
    often = ["--trainer.val_check_interval=2", "--trainer.check_val_every_n_epoch=null"]
    mine = f"--trainer.callbacks=[{{class_path: {__name__}.Logs}}, {stopping % 'mine'}]"
    slots = f"--trainer.callbacks=[{{class_path: SlotRetention}}, {stopping % 'slots/degrees_from_start'}]"
    for n, callbacks in enumerate((mine, slots)):
        outcome = command(*("fit", "--config", small, *often, callbacks, f"--trainer.logger.init_args.version={n}"))
        assert (outcome.code, outcome.errors) == (0, [])
    wrong = command("fit", "--config", small, f"--trainer.callbacks=[{stopping % 'slots/degrees_from_start'}]")
    (line,) = wrong.errors
    assert (
        "no metric 'slots/degrees_from_start' is logged that could be monitored: choose one of validation/loss" in line
    )


@pytest.mark.parametrize("name", ["validate", "test"])
def test_metrics_of_an_untrained_model_draw_a_warning(command: Command, small: Path, name: str) -> None:
    with pytest.warns(UserWarning, match=f"{name} has no --ckpt_path: the metrics are those of an untrained model"):
        assert command(name, "--config", small).code == 0


class LastCheckpoint(Callback):
    """A user's callback that shares only its name with ours."""


class MyProgressBar(Callback):
    """Likewise."""


def test_callbacks_are_known_by_what_they_are_and_not_by_their_names(
    command: Command, small: Path, tmp_path: Path
) -> None:
    own = f"[{{class_path: {__name__}.LastCheckpoint}}, {{class_path: {__name__}.MyProgressBar}}]"
    outcome = command(
        "fit",
        "--config",
        small,
        f"--trainer.callbacks={own}",
        "--trainer.enable_progress_bar=true",
        "--trainer.val_check_interval=2",
        "--trainer.check_val_every_n_epoch=null",
    )
    assert (outcome.code, outcome.errors) == (0, [])
    assert "bits/byte" in outcome.output
    assert list(tmp_path.rglob("last.ckpt"))


def test_whole_numbers_stay_whole_in_a_process_of_its_own(small: Path) -> None:
    options = ["--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1", "--trainer.overfit_batches=1"]
    words = [sys.executable, "-m", "memformer_pl", "fit", "--config", str(small), *options, "--print_config"]
    printed = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120).stdout
    trainer = yaml.safe_load(printed)["trainer"]
    for name in ("limit_train_batches", "limit_val_batches", "overfit_batches"):
        assert (type(trainer[name]), trainer[name]) == (int, 1)


def test_a_validation_leaves_the_configuration_of_the_run_and_none_is_written_where_no_run_has_a_folder(
    command: Command, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command("fit", "--config", small).code == 0
    folder = tmp_path / "run" / "version_0"
    before = (folder / "config.yaml").read_bytes()
    last = folder / "checkpoints" / "last.ckpt"
    assert command("validate", "--config", small, "--ckpt_path", last, "--data.evaluation_batch_size", "2").code == 0
    assert (folder / "config.yaml").read_bytes() == before
    assert yaml.safe_load((folder / "config_validate.yaml").read_text())["data"]["evaluation_batch_size"] == 2
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert command("validate", "--config", small, "--ckpt_path", last, "--trainer.logger", "false").code == 0
    assert list(Path().iterdir()) == []
