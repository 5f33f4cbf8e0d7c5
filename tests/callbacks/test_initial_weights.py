"""A run begins with the weights of another one, and with nothing else of it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Outcome
from lightning import LightningModule, Trainer
from models import memformer

from memformer_pl.callbacks import InitialWeights
from memformer_pl.checkpoints.format import read
from memformer_pl.checkpoints.pretrained import load_pretrained, save_pretrained
from memformer_pl.contract import SegmentModel
from memformer_pl.models import LSTM
from memformer_pl.training.task import SegmentTask

WHOLE_RUN = True
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_pretrained(folder / "checkpoints" / "last.ckpt").model.state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(weight, other[name]) for name, weight in one.items())


def test_a_run_starts_from_the_weights_of_another_and_resumes_with_its_own(
    command: Callable[..., Outcome], small: Path, tmp_path: Path
) -> None:
    def fit(name: str, steps: int, *options: str) -> Path:
        logger = [f"--trainer.logger.init_args.save_dir={tmp_path}", f"--trainer.logger.init_args.version={name}"]
        found = command("fit", f"--config={small}", f"--trainer.max_steps={steps}", *logger, *options)
        assert found.code == 0, found.output
        (checkpoint,) = (path for path in tmp_path.rglob("last.ckpt") if path.parent.parent.name == name)
        return checkpoint.parent.parent

    first = fit("first", 3)
    path = first / "checkpoints" / "last.ckpt"
    start = ["--trainer.callbacks+=InitialWeights", f"--trainer.callbacks.path={path}", "--seed_everything=5"]
    still = fit("still", 1, *start, "--model.learning_rate=1e-30", "--model.warmup_steps=0")
    assert same(weights(first), weights(still))
    content = read(still / "checkpoints" / "last.ckpt")
    assert isinstance(content, dict)
    assert content["global_step"] == 1
    second = fit("second", 2, *start, "--ckpt_path=last")
    halfway = weights(second)
    assert not same(weights(first), halfway)
    assert same(halfway, weights(fit("second", 2, *start, "--ckpt_path=last")))


def test_a_model_with_longer_segments_takes_the_weights_and_another_model_is_refused(tmp_path: Path) -> None:
    def begin(model: SegmentModel, stage: str = "fit") -> SegmentModel:
        InitialWeights(path=tmp_path).setup(Trainer(logger=False), SegmentTask(model=model), stage)
        return model

    given = LSTM(vocab_size=8, dim=4, segment_length=4)
    save_pretrained(given, tmp_path)
    assert same(given.state_dict(), begin(LSTM(vocab_size=8, dim=4, segment_length=6)).state_dict())
    untouched = LSTM(vocab_size=8, dim=4, segment_length=4)
    assert not same(given.state_dict(), begin(untouched, "validate").state_dict())
    with pytest.raises(ValueError, match=r"the weights of '.*' do not fit .* \(.*dim.*4.*6.*\): give both"):
        begin(LSTM(vocab_size=8, dim=6))
    with pytest.raises(ValueError, match=r"do not fit this run's model \(.*LSTM.*Memformer.*\): give both"):
        begin(memformer())


def test_what_is_not_a_task_or_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="InitialWeights needs a SegmentTask, got LightningModule"):
        InitialWeights(path=tmp_path).setup(Trainer(logger=False), LightningModule(), "fit")
    with pytest.raises(ValueError, match=r"there is no checkpoint '.*none.ckpt'"):
        InitialWeights(path=tmp_path / "none.ckpt").setup(Trainer(logger=False), SegmentTask(model=memformer()), "fit")
