"""Training a model that acts, from the command line: what is shown and logged, a resumed run, and two ranks."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import Outcome
from identical import assert_identical
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from two_processes import in_two_processes

from memformer_pl.checkpoints.format import KEY

pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
]
STEPS = 6


@pytest.fixture
def config(tmp_path: Path, pack_cache: Path) -> Path:
    """A run of a few seconds, with dropout."""
    path = tmp_path / "config.yaml"
    content = {
        "model": {
            "acting": {"group": 4, "discount": 0.9},
            "warmup_steps": 2,
            "model": {"class_path": "LSTM", "init_args": {"dim": 8, "layers": 1, "dropout": 0.1}},
        },
        "data": {
            "corpus": {
                "class_path": "Episodes",
                "init_args": {"environment": "RepeatFirstEasy", "policy": "random", "episodes": 32, "tested": 6},
            },
            "tokenizer": {"class_path": "Symbols", "init_args": {"vocab_size": 4}},
            **{"segment_length": 16, "horizon": 7, "batch_size": 8, "interleave": 1, "evaluation_batch_size": 4},
            **{"validation": 0.0, "test": 0.0, "cache": str(pack_cache)},
        },
        "trainer": {
            **{"accelerator": "cpu", "max_steps": STEPS, "val_check_interval": 3, "check_val_every_n_epoch": None},
            **{"num_sanity_val_steps": 0, "log_every_n_steps": 1, "precision": "64-true"},
            "callbacks": [
                {"class_path": "ProgressLines", "init_args": {"seconds": 0.0}},
                {"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 2, "save_top_k": -1}},
            ],
            "logger": {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": {"save_dir": str(tmp_path), "name": "runs", "version": "whole"},
            },
        },
    }
    path.write_text(yaml.safe_dump(content))
    return path


def checkpoint(tmp_path: Path, name: str, step: int) -> Path:
    (found,) = (tmp_path / "runs" / name / "checkpoints").glob(f"*step={step}.ckpt")
    return found


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_run_shows_and_logs_returns_and_goes_on_bit_for_bit(
    command: Callable[..., Outcome], config: Path, tmp_path: Path, epochs: int
) -> None:
    """Also in the middle of the epochs of a rollout."""
    several = f"--model.acting.epochs={epochs}"
    outcome = command("fit", "--config", config, several)
    assert outcome.code == 0
    assert " return  " in outcome.output
    assert "bits/byte" not in outcome.output
    assert outcome.output.count("validation -") + outcome.output.count("validation 0") == 2
    events = EventAccumulator(str(tmp_path / "runs" / "whole")).Reload()
    returns = [event.value for event in events.Scalars("train/return")]
    assert len(returns) == STEPS
    assert len(set(returns)) == STEPS // epochs
    assert ("train/clipped" in events.Tags()["scalars"]) == (epochs > 1)
    assert all(-1 <= value <= 1 for value in returns)
    validated = {name for name in events.Tags()["scalars"] if name.startswith("validation/")}
    assert validated == {"validation/return", "validation/loss"}  # its own draws are no text to be good at
    assert "train/bits_per_byte" not in events.Tags()["scalars"]

    again = ["--trainer.logger.init_args.version=resumed", f"--ckpt_path={checkpoint(tmp_path, 'whole', 2)}"]
    assert command("fit", "--config", config, several, *again).code == 0
    whole, resumed = (torch.load(checkpoint(tmp_path, name, STEPS), weights_only=True) for name in ("whole", "resumed"))
    for part in ("state_dict", "optimizer_states", KEY):
        assert_identical(resumed[part], whole[part])


def test_two_ranks_play_and_learn_what_one_does(command: Callable[..., Outcome], config: Path, tmp_path: Path) -> None:
    options = ("--model.model.init_args.dropout=0.0", "--model.acting.epochs=2", "--model.acting.clip=0.01")
    assert command("fit", "--config", config, *options).code == 0
    version = "--trainer.logger.init_args.version=two"
    in_two_processes("--config", config, *options, version, launcher="slurm", folder=tmp_path)
    one, two = (torch.load(checkpoint(tmp_path, name, STEPS), weights_only=True) for name in ("whole", "two"))
    torch.testing.assert_close(two["state_dict"], one["state_dict"], rtol=0, atol=1e-12)


def test_imitation_learns_what_reading_does_and_has_a_return(
    command: Callable[..., Outcome], config: Path, tmp_path: Path
) -> None:
    expert = "--data.corpus.policy=expert"
    whole = command("fit", "--config", config, expert, "--model.acting.imitate=true")
    assert whole.code == 0
    assert whole.output.count(" return\n") == 2
    reading = "--trainer.logger.init_args.version=reading"
    assert command("fit", "--config", config, expert, "--model.acting=null", reading).code == 0
    one, other = (torch.load(checkpoint(tmp_path, name, STEPS), weights_only=True) for name in ("whole", "reading"))
    assert_identical(one["state_dict"], other["state_dict"])
    logged, expected = (EventAccumulator(str(tmp_path / "runs" / name)).Reload() for name in ("whole", "reading"))
    assert set(logged.Tags()["scalars"]) - set(expected.Tags()["scalars"]) == {"validation/return"}
    losses, expected_losses = ([event.value for event in of.Scalars("validation/loss")] for of in (logged, expected))
    assert losses == expected_losses
    assert len({event.value for event in logged.Scalars("validation/return")}) == 2


def test_a_configuration_that_does_not_fit_is_refused_in_a_line(command: Callable[..., Outcome], config: Path) -> None:
    for given, message, *more in (
        ("--data.horizon=8", "set data.horizon to 7, got 8"),
        ("--model.acting.group=1", "group must be at least 2, got 1"),
        (
            "--model.accumulate_grad_batches=2",
            "acting.epochs above 1 needs accumulate_grad_batches=1, got 2",
            "--model.acting.epochs=2",
        ),
        ("--model.acting.group=3", "each process plays 8 lanes, which are not groups of 3"),
        ("--data.corpus.environment=RepeatFirstHrad", "Did you mean RepeatFirstHard?"),
        ("--data.tokenizer.vocab_size=3", "has the token 3, but vocab_size=3"),
    ):
        outcome = command("fit", "--config", config, given, *more)
        assert outcome.code in (1, 2)
        assert message in outcome.errors[0]


def test_a_best_checkpoint_can_follow_the_return(command: Callable[..., Outcome], config: Path) -> None:
    best = "{class_path: ModelCheckpoint, init_args: {monitor: validation/return, mode: max}}"
    assert command("fit", "--config", config, f"--trainer.callbacks+={best}", "--trainer.max_steps=3").code == 0
