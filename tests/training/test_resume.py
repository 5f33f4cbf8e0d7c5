"""A run that goes on from a checkpoint is, bit for bit, the run that was never interrupted."""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Callback, Trainer
from models import LENGTH, VOCAB, memformer

from memformer_pl.checkpoints.format import KEY, read
from memformer_pl.data import LaneLoader, Rollout
from memformer_pl.data.packing.documents import PackedDocuments
from memformer_pl.models import Memformer
from memformer_pl.training.task import SegmentTask

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")

WINDOWS = 8
EPOCH = 6
"""Windows of an epoch."""


class Keeper(Callback):
    """Keeps a checkpoint after every rollout, and which documents each rollout read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rollouts = 0
        self.documents: list[torch.Tensor] = []

    def on_train_start(self, trainer: Trainer, pl_module: SegmentTask) -> None:
        self.rollouts = trainer.fit_loop.epoch_loop.total_batch_idx + 1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: SegmentTask, outputs: object, batch: Rollout, batch_idx: int
    ) -> None:
        self.rollouts += 1
        self.documents.append(batch.documents)
        trainer.save_checkpoint(self.folder / f"{self.rollouts}.ckpt")


def small() -> Memformer:
    return memformer(encoder_layers=1, decoder_layers=1, dropout=0.2)


def loader(*, shuffle: bool = True) -> LaneLoader:
    random = np.random.default_rng(0)
    documents = [random.integers(VOCAB, size=length) for length in (31, 1, 17, 40, 8, 23, 12, 5)]
    packed = PackedDocuments.from_arrays(documents)
    return LaneLoader(
        packed, batch_size=2, segment_length=LENGTH, horizon=3, shuffle=shuffle, interleave=2 if shuffle else 1
    )


def run(folder: Path, *, accumulate: int = 1, checkpoint: Path | None = None) -> Keeper:
    """Train a model with dropout for eight rollouts, with a short validation after every third."""
    folder.mkdir(exist_ok=True)
    keeper = Keeper(folder)
    torch.manual_seed(0 if checkpoint is None else 99)
    trainer = Trainer(
        accelerator="cpu",
        precision="64-true",
        max_steps=WINDOWS // accumulate,
        val_check_interval=3,
        limit_val_batches=1,
        check_val_every_n_epoch=None,
        callbacks=[keeper],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    task = SegmentTask(model=small(), warmup_steps=3, accumulate_grad_batches=accumulate)
    trainer.fit(task, loader(), loader(shuffle=False), ckpt_path=checkpoint)
    return keeper


def assert_same(got: object, expected: object, where: str = "") -> None:
    """Equal, entry by entry, and bit for bit."""
    assert type(got) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert torch.equal(got, expected), where
    elif isinstance(expected, Mapping):
        assert list(got) == list(expected), where
        for key, value in expected.items():
            assert_same(got[key], value, f"{where}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(got) == len(expected), where
        for place, value in enumerate(expected):
            assert_same(got[place], value, f"{where}/{place}")
    else:
        assert got == expected, where


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Keeper]:
    """Runs that nothing interrupts: rollouts to a step -> what was kept."""
    assert len(loader()) == EPOCH
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
    assert_same(resumed.documents, through.documents[rollouts:])
    got, expected = (read(keeper.folder / f"{WINDOWS}.ckpt") for keeper in (resumed, through))
    assert isinstance(got, dict)
    for entry in ("state_dict", "optimizer_states", "global_step", "epoch", KEY):
        assert_same(got[entry], expected[entry], entry)
    loaders = [content["loops"]["fit_loop"]["state_dict"]["combined_loader"] for content in (got, expected)]
    assert_same(*loaders, where="loaders")


def test_a_checkpoint_holds_everything_as_plain_tensors_and_numbers(whole: Callable[[int], Keeper]) -> None:
    for accumulate in (1, 2):
        content = torch.load(whole(accumulate).folder / "3.ckpt", weights_only=True)
        ours = content[KEY]
        assert ours["rollouts"] == 3
        assert ours["model"] == small().config()
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
    got, expected = (read(keeper.folder / f"{WINDOWS}.ckpt") for keeper in (other, whole(1)))
    assert isinstance(got, dict)
    assert not torch.equal(got["state_dict"]["model.start"], expected["state_dict"]["model.start"])
