"""Optimizers and learning-rate schedules chosen by class, on the command line and in a file."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import Outcome
from refusals import refused

SGD = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.1"]
STEPS = ["--model.lr_scheduler", "torch.optim.lr_scheduler.StepLR", "--model.lr_scheduler.step_size", "5"]
NO_ADAMW = ["--model.learning_rate", "null", "--model.weight_decay", "null"]
NO_WARMUP = ["--model.warmup_steps", "null"]
SGD_IN_A_FILE = {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}}
STEPS_IN_A_FILE = {"lr_scheduler": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 5}}}


@pytest.fixture
def fit(
    command: Callable[..., Outcome], tmp_path: Path, pack_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Outcome]:
    """Two steps of the quickstart with a narrow model on a small corpus."""
    monkeypatch.chdir(tmp_path)
    model = ["--model.model.init_args.dim=16", "--model.model.init_args.slots=4"]
    data = ["--data.corpus=Pydoc", "--data.tokenizer=Bytes", "--data.batch_size=2", "--data.interleave=1"]
    trainer = ["--trainer.max_steps=2", "--trainer.callbacks=[]", "--trainer.limit_val_batches=0"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    cache = f"--data.cache={pack_cache}"
    return lambda *words: command("fit", "--config=quickstart", *model, *data, cache, *trainer, *quiet, *words)


def checkpoint(folder: Path) -> dict[str, object]:
    (path,) = folder.rglob("last.ckpt")
    loaded: dict[str, object] = torch.load(path, weights_only=True)
    return loaded


def in_a_file(folder: Path, **options: object) -> list[str]:
    (folder / "own.yaml").write_text(yaml.safe_dump({"model": options}))
    return ["--config", str(folder / "own.yaml")]


@pytest.mark.parametrize("written", ["command line", "file"])
def test_another_optimizer_trains(fit: Callable[..., Outcome], tmp_path: Path, written: str) -> None:
    shorthand = {"learning_rate": None, "weight_decay": None}
    words = [*SGD, *NO_ADAMW] if written == "command line" else in_a_file(tmp_path, **SGD_IN_A_FILE, **shorthand)
    outcome = fit(*words)
    assert (outcome.code, outcome.errors) == (0, [])
    (state,) = checkpoint(tmp_path)["optimizer_states"]
    decayed, others = state["param_groups"]
    assert {"momentum", "nesterov"} < set(decayed)
    assert (decayed["initial_lr"], decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0, 0.0)


@pytest.mark.parametrize("written", ["command line", "file"])
def test_another_schedule_trains(fit: Callable[..., Outcome], tmp_path: Path, written: str) -> None:
    words = [*STEPS, *NO_WARMUP]
    if written == "file":
        words = in_a_file(tmp_path, **STEPS_IN_A_FILE, warmup_steps=None)
    outcome = fit(*words)
    assert (outcome.code, outcome.errors) == (0, [])
    (state,) = checkpoint(tmp_path)["lr_schedulers"]
    assert (state["step_size"], state["last_epoch"], state["_last_lr"]) == (5, 2, [4e-3, 4e-3])


def test_both_go_together_and_a_written_configuration_can_be_read_again(
    fit: Callable[..., Outcome], tmp_path: Path
) -> None:
    outcome = fit(*SGD, *NO_ADAMW, *STEPS, *NO_WARMUP)
    assert (outcome.code, outcome.errors) == (0, [])
    (saved,) = tmp_path.rglob("config.yaml")
    chosen = yaml.safe_load(saved.read_text())["model"]
    assert chosen["optimizer"]["class_path"] == "torch.optim.SGD"
    assert chosen["lr_scheduler"]["init_args"]["step_size"] == 5
    again = fit("--config", saved, "--trainer.max_steps=1", "--trainer.logger.init_args.version=again")
    assert (again.code, again.errors) == (0, [])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model.optimizer", "torch.optim.SDG"], "there is no class 'torch.optim.SDG'. Did you mean SGD?"),
        (["--model.optimizer", "torch.optm.SGD"], "there is no class 'torch.optm.SGD'. Did you mean SGD?"),
        (["--model.optimizer", "AdmW"], "there is no class 'AdmW'. Did you mean AdamW?"),
        (["--model.optimizer", "torch.nn.Linear"], "model.optimizer: torch.nn.Linear is not a subclass of Optimizer"),
        ([*SGD, "--model.optimizer.momentm", "0.9"], "there is no option 'momentm'. Did you mean momentum?"),
        (
            ["--model.lr_scheduler", "torch.optim.lr_scheduler.StepRL"],
            "there is no class 'torch.optim.lr_scheduler.StepRL'. Did you mean StepLR?",
        ),
        (["--model.lr_scheduler", "torch.optim.lr_scheduler.StepLR"], "step_size"),
        (SGD, "learning_rate=0.004 has no effect beside optimizer: set learning_rate to null"),
        (STEPS, "warmup_steps=40 has no effect beside lr_scheduler: set warmup_steps to null"),
    ],
)
def test_a_mistyped_class_or_option_is_refused_in_a_line(
    fit: Callable[..., Outcome], words: list[str], expected: str
) -> None:
    assert expected in refused(fit(*words), code=2)


@pytest.mark.parametrize("path", ["torch.optim.SDG", "torch.optm.SGD"])
def test_a_mistyped_class_in_a_file_is_refused_in_a_line(
    fit: Callable[..., Outcome], tmp_path: Path, path: str
) -> None:
    words = in_a_file(tmp_path, optimizer={"class_path": path, "init_args": {"lr": 0.1}})
    line = refused(fit(*words), code=2)
    assert f"own.yaml: model.optimizer: there is no class '{path}'. Did you mean SGD?" in line
