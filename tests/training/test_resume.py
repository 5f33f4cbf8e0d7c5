"""A run that goes on from a checkpoint is, bit for bit, the run that was never interrupted."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from identical import assert_identical
from lightning import Callback, Trainer
from models import ULTRA
from tasks import loader, small_memformer

from memformer_pl.checkpoints.format import KEY, read
from memformer_pl.data import Rollout
from memformer_pl.data.revisiting import Revisit
from memformer_pl.training.task import SegmentTask

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")

ROLLOUTS = 8
EPOCH = 6
"""Rollouts of an epoch."""


class Keeper(Callback):
    """Keeps a checkpoint after every rollout, which documents each rollout read, and the learning rates of each
    step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rollouts = 0
        self.documents: list[torch.Tensor] = []
        self.rates: list[list[float]] = []

    def on_train_start(self, trainer: Trainer, pl_module: SegmentTask) -> None:
        self.rollouts = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        trainer.optimizers[0].register_step_pre_hook(
            lambda optimizer, args, kwargs: self.rates.append([group["lr"] for group in optimizer.param_groups])
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: SegmentTask, outputs: object, batch: Rollout, batch_idx: int
    ) -> None:
        self.rollouts += 1
        self.documents.append(batch.documents)
        trainer.save_checkpoint(self.folder / f"{self.rollouts}.ckpt")


def run(
    folder: Path,
    *,
    accumulate: int = 1,
    checkpoint: Path | None = None,
    feed_forward: dict[str, Any] | None = None,
    revisit: Revisit | None = None,
) -> Keeper:
    """Train a model with dropout for eight rollouts, with a short validation after every third."""
    folder.mkdir(exist_ok=True)
    keeper = Keeper(folder)
    torch.manual_seed(0 if checkpoint is None else 99)
    trainer = Trainer(
        accelerator="cpu",
        precision="64-true",
        max_steps=ROLLOUTS // accumulate,
        val_check_interval=3,
        limit_val_batches=1,
        check_val_every_n_epoch=None,
        callbacks=[keeper],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = small_memformer(dropout=0.2, feed_forward=feed_forward)
    task = SegmentTask(model=model, warmup_steps=3, accumulate_grad_batches=accumulate)
    trainer.fit(task, loader(interleave=2, revisit=revisit), loader(shuffle=False), ckpt_path=checkpoint)
    return keeper


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Keeper]:
    """Runs that nothing interrupts: rollouts to a step -> what was kept."""
    assert len(loader(interleave=2)) == EPOCH
    return cache(lambda accumulate: run(tmp_path_factory.mktemp("whole"), accumulate=accumulate))


@pytest.mark.parametrize(
    ("rollouts", "accumulate"),
    [
        (2, 1),  # in the middle of an epoch
        (3, 1),  # where a validation is due
        (EPOCH, 1),  # at the end of an epoch
        (1, 2),  # between two rollouts of a step
        (3, 2),  # the same, where a validation is due
        (7, 2),  # the same, in the next epoch
    ],
)
def test_a_resumed_run_ends_where_an_uninterrupted_one_ends(
    whole: Callable[[int], Keeper], tmp_path: Path, rollouts: int, accumulate: int
) -> None:
    through = whole(accumulate)
    resumed = run(tmp_path, accumulate=accumulate, checkpoint=through.folder / f"{rollouts}.ckpt")
    assert_identical(resumed.documents, through.documents[rollouts:])
    got, expected = (read(keeper.folder / f"{ROLLOUTS}.ckpt") for keeper in (resumed, through))
    assert isinstance(got, dict)
    for entry in ("state_dict", "optimizer_states", "global_step", "epoch", KEY):
        assert_identical(got[entry], expected[entry], entry)
    loaders = [content["loops"]["fit_loop"]["state_dict"]["combined_loader"] for content in (got, expected)]
    assert_identical(*loaders, where="loaders")


@pytest.mark.parametrize(("rollouts", "accumulate"), [(2, 1), (5, 1), (5, 2)])
def test_lanes_that_revisit_documents_go_on_with_the_same_draws(tmp_path: Path, rollouts: int, accumulate: int) -> None:
    revisit = Revisit(share=0.5, size=4, longest=40)
    through = run(tmp_path / "through", accumulate=accumulate, revisit=revisit)
    checkpoint = through.folder / f"{rollouts}.ckpt"
    resumed = run(tmp_path / "resumed", accumulate=accumulate, checkpoint=checkpoint, revisit=revisit)
    assert_identical(resumed.documents, through.documents[rollouts:])
    drawn = torch.stack(resumed.documents)[:, :, 1]
    assert len(drawn[drawn >= 0].unique()) > 1
    got, expected = (read(keeper.folder / f"{ROLLOUTS}.ckpt") for keeper in (resumed, through))
    assert isinstance(got, dict)
    for entry in ("state_dict", "optimizer_states", KEY):
        assert_identical(got[entry], expected[entry], entry)
    assert len(torch.load(checkpoint, weights_only=True)[KEY]["revisits"]["outstanding"]) == 2


def test_a_learning_rate_that_falls_by_a_factor_of_its_own_goes_on_where_it_stopped(tmp_path: Path) -> None:
    option = {**ULTRA, "layers": [1]}
    through = run(tmp_path / "through", feed_forward=option)
    resumed = run(tmp_path / "resumed", checkpoint=through.folder / "3.ckpt", feed_forward=option)
    got, expected = (read(keeper.folder / f"{ROLLOUTS}.ckpt") for keeper in (resumed, through))
    assert isinstance(got, dict)
    for entry in ("state_dict", "optimizer_states", KEY):
        assert_identical(got[entry], expected[entry], entry)
    assert [own / rate for rate, _, own in through.rates] == pytest.approx(torch.linspace(4, 1, ROLLOUTS).tolist())
    assert resumed.rates == through.rates[3:]


def test_a_checkpoint_holds_everything_as_plain_tensors_and_numbers(whole: Callable[[int], Keeper]) -> None:
    for accumulate in (1, 2):
        content = torch.load(whole(accumulate).folder / "3.ckpt", weights_only=True)
        ours = content[KEY]
        assert ours["rollouts"] == 3
        assert ours["model"] == small_memformer(dropout=0.2).config()
        assert list(ours["states"]) == [0, 1]
        for state in ours["states"].values():
            assert [len(field) for field in state] == [2, 2]
            assert state[0].abs().sum() > 0
        assert bool(ours["gradients"][0]) == (accumulate == 2)


def test_without_the_random_stream_of_the_checkpoint_a_run_would_end_elsewhere(
    whole: Callable[[int], Keeper], tmp_path: Path
) -> None:
    """The test above would notice if one were not restored."""
    content = torch.load(whole(1).folder / "7.ckpt", weights_only=True)
    content[KEY]["random"][0] = (torch.Generator().manual_seed(1).get_state(), [], [])
    torch.save(content, tmp_path / "other.ckpt")
    other = run(tmp_path, checkpoint=tmp_path / "other.ckpt")
    got, expected = (read(keeper.folder / f"{ROLLOUTS}.ckpt") for keeper in (other, whole(1)))
    assert isinstance(got, dict)
    assert not torch.equal(got["state_dict"]["model.start"], expected["state_dict"]["model.start"])
