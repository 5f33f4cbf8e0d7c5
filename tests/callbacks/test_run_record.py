"""The record of a run says what was read and what came out, also of one that was interrupted."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from models import MODELS, memformer
from tasks import loader, small_memformer

from memformer_pl import SegmentData, SegmentTask
from memformer_pl.callbacks import RunRecord
from memformer_pl.data import Bytes, Files
from memformer_pl.models import Memformer
from memformer_pl.training.flops import count_flops


def record(folder: Path) -> dict[str, float]:
    (path,) = folder.rglob("record.json")
    written: dict[str, float] = json.loads(path.read_text())
    return written


def test_tokens_are_those_of_the_rollouts_and_metrics_those_of_the_last_validation(
    command: Callable[..., Outcome], small: Path, texts: Path, pack_cache: Path, tmp_path: Path
) -> None:
    often = ["--trainer.val_check_interval=2", "--trainer.check_val_every_n_epoch=null"]
    assert command("fit", f"--config={small}", "--trainer.callbacks=[RunRecord]", *often).code == 0
    found = record(tmp_path)
    data = SegmentData(
        corpus=Files(paths=str(texts)),
        tokenizer=Bytes(),
        segment_length=8,
        horizon=2,
        batch_size=4,
        interleave=2,
        validation=0.3,
        test=0.1,
        cache=pack_cache,
    )
    data.setup()
    rollouts = [rollout for rollout, _ in zip(data.train_dataloader(), range(4), strict=False)]
    assert found["tokens"] == sum(int(segment.token_mask.sum()) for rollout in rollouts for segment in rollout.segments)
    assert found["steps"] == 4
    assert found["seconds"] >= 0 < found["processor_seconds"]
    assert 0 < found["validation/loss"] < 8
    assert not any(name.startswith(("train/", "bits/", "tokens/")) for name in found)
    sizes = {"dim": 16, "heads": 2, "slots": 4, "encoder_layers": 1, "decoder_layers": 1}
    model = Memformer(vocab_size=256, segment_length=8, **sizes)
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert found["state_bytes"] == 4 * 16 * 4 + 8 * 8
    assert found["operations_per_token"] == count_flops(model) / 8


def test_a_test_adds_its_metrics(command: Callable[..., Outcome], small: Path, tmp_path: Path) -> None:
    words = [f"--config={small}", "--trainer.callbacks=[RunRecord]"]
    often = ["--trainer.val_check_interval=2", "--trainer.check_val_every_n_epoch=null"]
    assert command("fit", *words, *often).code == 0
    trained = record(tmp_path)
    assert command("fit", *words, *often, "--ckpt_path=last").code == 0  # a sweep that was stopped before the test
    assert record(tmp_path) == trained
    assert not any(name.startswith("test/") for name in trained)
    assert command("test", *words, "--ckpt_path=last").code == 0
    tested = record(tmp_path)
    assert trained.items() < tested.items()
    assert {name for name in tested if name not in trained} == {
        name.replace("validation/", "test/") for name in trained if name.startswith("validation/")
    }
    assert 1 < tested["test/perplexity"] != tested["validation/perplexity"]


def test_mfu_is_recorded_where_the_peak_is_known(command: Callable[..., Outcome], small: Path, tmp_path: Path) -> None:
    fit = ["fit", f"--config={small}", "--trainer.callbacks=[RunRecord]", "--trainer.max_steps=60"]
    assert command(*fit, "--model.peak_flops=1e9").code == 0
    found = record(tmp_path)
    flops = 3 * found["operations_per_token"] * found["tokens"]
    assert found["mfu"] == pytest.approx(flops / found["seconds"] / 1e9)
    assert command(*fit, f"--trainer.logger.init_args.save_dir={tmp_path / 'other'}").code == 0
    assert "mfu" not in record(tmp_path / "other")


def test_a_resumed_run_continues_its_counts(command: Callable[..., Outcome], small: Path, tmp_path: Path) -> None:
    fit = ["fit", f"--config={small}", "--trainer.callbacks=[RunRecord]", "--ckpt_path=last"]
    where = "--trainer.logger.init_args.save_dir"
    assert command(*fit, f"{where}={tmp_path / 'whole'}").code == 0
    for steps in (2, 4):
        assert command(*fit, f"{where}={tmp_path / 'parts'}", f"--trainer.max_steps={steps}").code == 0
    whole, parts = record(tmp_path / "whole"), record(tmp_path / "parts")
    assert parts["tokens"] == whole["tokens"]
    assert parts["processor_seconds"] >= 0.9 * record(tmp_path / "whole")["processor_seconds"] / 2


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization", "ignore:The dirpath has changed")
def test_a_run_that_resumes_in_the_middle_of_an_epoch_counts_all_that_was_read(tmp_path: Path) -> None:
    def run(folder: Path, *, resume: Path | None = None) -> dict[str, float]:
        options: dict[str, Any] = {"enable_progress_bar": False, "precision": "64-true", "log_every_n_steps": 1}
        kept = ModelCheckpoint(folder / "kept", "{step}", save_top_k=-1, every_n_train_steps=1)
        callbacks, logger = [RunRecord(), kept], CSVLogger(folder)
        trainer = Trainer(accelerator="cpu", max_epochs=2, callbacks=callbacks, logger=logger, **options)
        trainer.fit(SegmentTask(model=small_memformer()), loader(), loader(shuffle=False), ckpt_path=resume)
        return record(folder)

    whole = run(tmp_path / "whole")
    assert (
        run(tmp_path / "resumed", resume=tmp_path / "whole" / "kept" / "step=3.ckpt")["tokens"] == whole["tokens"] > 0
    )


def test_a_run_that_diverges_says_so_and_one_that_goes_on_does_not(
    command: Callable[..., Outcome], small: Path, tmp_path: Path
) -> None:
    often = ["--trainer.val_check_interval=2", "--trainer.check_val_every_n_epoch=null"]
    fit = ["fit", f"--config={small}", "--trainer.callbacks=[RunRecord]", "--ckpt_path=last", *often]
    assert command(*fit, "--trainer.max_steps=2").code == 0
    assert "diverged" not in record(tmp_path)
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    finite = checkpoint.read_bytes()
    assert command(*fit, "--trainer.max_steps=20", "--model.learning_rate=1e30", "--model.max_skipped=2").code == 1
    found = record(tmp_path)
    assert found["diverged"] is True
    assert found["tokens"] > 0
    assert not any("/" in name for name in found)
    checkpoint.write_bytes(finite)
    assert command(*fit, "--trainer.max_steps=4").code == 0
    assert "diverged" not in record(tmp_path)


def test_counting_leaves_every_part_in_its_own_mode() -> None:
    model = memformer().train()
    model.encoder.eval()  # as a user does who trains the rest
    modes = {name: part.training for name, part in model.named_modules()}
    count_flops(model)
    assert {name: part.training for name, part in model.named_modules()} == modes


@pytest.mark.parametrize("name", MODELS)
def test_counting_operations_leaves_a_model_and_the_random_stream_as_they_were(name: str) -> None:
    model = MODELS[name]().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    stream = torch.random.get_rng_state()
    one, two = count_flops(model), count_flops(model, lanes=2)
    assert 0 < one < two <= 2 * one
    assert count_flops(model, advance=True) <= one
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), stream)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Late(Callback):
    """Takes its time once training has ended."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        time.sleep(2.0)


def test_the_time_of_another_callback_at_the_end_is_not_that_of_training_and_a_second_fit_goes_on(
    tmp_path: Path,
) -> None:
    counted = RunRecord()
    options: dict[str, Any] = {"enable_checkpointing": False, "enable_progress_bar": False, "precision": "64-true"}
    trainer = Trainer(
        accelerator="cpu",
        max_steps=2,
        callbacks=[Late(), counted],
        logger=CSVLogger(tmp_path),
        log_every_n_steps=1,
        **options,
    )
    task = SegmentTask(model=small_memformer())
    trainer.fit(task, loader(), loader(shuffle=False))
    first = record(tmp_path)
    assert first["seconds"] < 2
    trainer.fit_loop.epoch_loop.max_steps = 4
    trainer.fit(task, loader(), loader(shuffle=False))
    second = record(tmp_path)
    assert (first["steps"], second["steps"]) == (2, 4)
    assert second["tokens"] > first["tokens"]
    assert second["processor_seconds"] >= first["processor_seconds"]


def test_a_trial_without_a_logger_leaves_the_record_of_an_earlier_run(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text("{}")
    options: dict[str, Any] = {"enable_progress_bar": False, "precision": "64-true", "default_root_dir": tmp_path}
    trainer = Trainer(accelerator="cpu", fast_dev_run=True, logger=False, callbacks=[RunRecord()], **options)
    trainer.fit(SegmentTask(model=small_memformer()), loader(), loader(shuffle=False))
    assert (tmp_path / "record.json").read_text() == "{}"


def test_another_module_is_refused() -> None:
    with pytest.raises(
        TypeError, match="RunRecord needs a SegmentTask or another Recorded module, got LightningModule"
    ):
        RunRecord().setup(
            Trainer(logger=False, enable_checkpointing=False, accelerator="cpu"), LightningModule(), "fit"
        )
