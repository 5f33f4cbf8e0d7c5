"""What goes on around a trainer: checkpoints in another precision or without a trainer, several runs, wrong loaders."""

import io
import math
from collections.abc import Callable, Iterable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from models import LENGTH, lstm
from tasks import documents, loader, small_memformer, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from trainers import EPOCH, Run, bits_of, corpus, train, trainer_of

from memformer_pl.checkpoints.format import KEY, read
from memformer_pl.contract import Segment, SegmentModel, SegmentOutput
from memformer_pl.data import LaneLoader
from memformer_pl.errors import UsageError
from memformer_pl.models import Memformer
from memformer_pl.training.task import SegmentTask
from memformer_pl.training.trainer_checks import PRECISIONS

WHOLE_RUN = True  # see tests/conftest.py
pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization:UserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval:UserWarning"),
]


class Rotating(SegmentModel[tuple[Tensor, Tensor]]):
    """Carries a complex number and how many segments it has read; predicts from their sum what the next token is."""

    def __init__(self, *, vocab_size: int = 11, segment_length: int = LENGTH) -> None:
        super().__init__(vocab_size=vocab_size, segment_length=segment_length)
        self.table = nn.Embedding(vocab_size, 2)
        self.head = nn.Linear(2, vocab_size)

    def initial_state(self, lanes: int) -> tuple[Tensor, Tensor]:
        real = torch.zeros(lanes, 2, dtype=self.head.weight.dtype)
        number = torch.view_as_complex(real.float() if real.dtype == torch.bfloat16 else real)
        return number, torch.zeros(lanes, dtype=torch.int64)

    def step(self, segment: Segment, state: tuple[Tensor, Tensor]) -> tuple[SegmentOutput, tuple[Tensor, Tensor]]:
        number, count = state
        logits_BLV = self.head(torch.view_as_real(number).to(self.head.weight.dtype))[:, None].expand(
            -1, segment.tokens.shape[1], -1
        )
        losses = nn.functional.cross_entropy(logits_BLV.mT, segment.tokens, reduction="none") * segment.target_mask
        correct = (logits_BLV.argmax(-1) == segment.tokens) & segment.target_mask
        turned = number + torch.view_as_complex(self.table(segment.tokens).mean(1).to(number.real.dtype))
        return SegmentOutput(losses, correct, losses.new_zeros(())), (turned, count + 1)


class Keep(Callback):
    """Keeps a checkpoint after the third rollout, the first of two whose gradients make a step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, task: object, outputs: object, batch: object, index: int) -> None:
        if index == 2:
            trainer.save_checkpoint(self.path)


@pytest.fixture(scope="module")
def half_way(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The checkpoint of a run of three rollouts, by model and precision."""
    made: dict[tuple[str, str], Path] = {}

    def make(model: str, precision: str) -> Path:
        if (model, precision) not in made:
            folder = made[model, precision] = tmp_path_factory.mktemp("half_way")
            task = SegmentTask(model=MODELS[model](), accumulate_grad_batches=2)
            train(folder, Keep(folder / "last.ckpt"), task=task, max_steps=2, precision=precision)
        return made[model, precision] / "last.ckpt"

    return make


MODELS: dict[str, Callable[[], SegmentModel]] = {
    "memformer": lambda: small_memformer().float(),
    "lstm": lambda: lstm().float(),
    "complex": lambda: Rotating().float(),
}


@pytest.mark.parametrize(("before", "now"), list(permutations(PRECISIONS, 2)))
@pytest.mark.parametrize("model", MODELS)
def test_a_run_resumes_in_another_precision(
    half_way: Callable[[str, str], Path], tmp_path: Path, model: str, before: str, now: str
) -> None:
    task = SegmentTask(model=MODELS[model](), accumulate_grad_batches=2)
    run = train(tmp_path, task=task, precision=now, max_steps=4, resume=half_way(model, before))
    assert run.trainer.global_step == 4
    assert math.isfinite(float(run.trainer.callback_metrics["train/loss"]))
    carried = task._states["train", 0]
    with run.trainer.precision_plugin.forward_context():
        assert [field.dtype for field in carried] == [field.dtype for field in task.model.initial_state(1)]


def test_what_is_carried_on_is_what_was_carried_in_the_precision_of_now(
    half_way: Callable[[str, str], Path], tmp_path: Path
) -> None:
    class Entering(Callback):
        state: tuple[Tensor, ...] | None = None

        def on_train_batch_start(self, trainer: object, task: SegmentTask, *args: object) -> None:
            self.state = self.state or task._states["train", 0]

    entering, path = Entering(), half_way("memformer", "32-true")
    train(
        tmp_path,
        entering,
        task=SegmentTask(model=small_memformer().float(), accumulate_grad_batches=2),
        precision="64-true",
        resume=path,
    )
    content = read(path)
    assert isinstance(content, dict)
    assert entering.state is not None
    for now, before in zip(entering.state, content[KEY]["states"][0], strict=True):
        assert torch.equal(now, before.double() if before.is_floating_point() else before)


@pytest.fixture
def checkpoint(command: Callable[..., Any], small: Path, tmp_path: Path) -> Path:
    """Of a run from the command line of four steps, with options that are not the defaults."""
    given = ("--model.learning_rate", "0.05", "--model.gradient", "truncated", "--model.accumulate_grad_batches", "2")
    assert command("fit", "--config", small, *given).code == 0
    return tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt"


def test_a_task_is_loaded_from_its_checkpoint_alone(checkpoint: Path) -> None:
    task = SegmentTask.load_from_checkpoint(checkpoint)
    assert (task.gradient, task.accumulate_grad_batches) == ("truncated", 2)
    assert (task.optimization.learning_rate, task.optimization.warmup_steps) == (0.05, 2)
    content = torch.load(checkpoint, weights_only=True)
    assert task.model.config() == content[KEY]["model"]
    for name, weight in content["state_dict"].items():
        assert torch.equal(task.state_dict()[name], weight)
    other = SegmentTask.load_from_checkpoint(str(checkpoint), learning_rate=0.1, gradient_clip_val=2.0)
    assert (other.optimization.learning_rate, other.gradient_clip_val, other.gradient) == (0.1, 2.0, "truncated")


def test_a_task_is_loaded_into_a_model_that_is_given_if_it_fits(checkpoint: Path) -> None:
    sizes = {"vocab_size": 256, "segment_length": 8, "heads": 2, "slots": 4, "encoder_layers": 1, "decoder_layers": 1}
    model = Memformer(dim=16, **sizes)
    assert SegmentTask.load_from_checkpoint(checkpoint, model=model).model is model
    with pytest.raises(UsageError, match=r"holds another model, and cannot be loaded: dim \(was 16, is 8\)"):
        SegmentTask.load_from_checkpoint(checkpoint, model=Memformer(dim=8, **sizes))


def test_what_cannot_be_loaded_says_why(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="lerning_rate"):
        SegmentTask.load_from_checkpoint(checkpoint, lerning_rate=0.1)
    with pytest.raises(UsageError, match="there is no checkpoint"):
        SegmentTask.load_from_checkpoint(tmp_path / "none.ckpt")
    (tmp_path / "cut.ckpt").write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(UsageError, match="was cut short"):
        SegmentTask.load_from_checkpoint(tmp_path / "cut.ckpt", weights_only=False)
    torch.save({**torch.load(checkpoint, weights_only=True), "more": io.BytesIO()}, tmp_path / "code.ckpt")
    with pytest.raises(UsageError, match="nothing in it was run"):
        SegmentTask.load_from_checkpoint(tmp_path / "code.ckpt", weights_only=False)


def test_a_checkpoint_without_options_has_the_defaults(checkpoint: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    del content["hyper_parameters"]
    torch.save(content, checkpoint)
    task = SegmentTask.load_from_checkpoint(checkpoint)
    optimizer, _ = task.optimization.build(task, total_steps=1)
    assert (optimizer.defaults["lr"], task.gradient, task.gradient_clip_val) == (1e-3, "replay", 1.0)


def test_no_option_in_a_checkpoint_overrides_the_command_line(
    command: Callable[..., Any], small: Path, tmp_path: Path, checkpoint: Path
) -> None:
    given = ("--model.learning_rate", "0.9", "--model.warmup_steps", "0", "--trainer.max_steps", "6")
    assert (
        command(
            "fit", "--config", small, *given, "--ckpt_path", checkpoint, "--model.accumulate_grad_batches", "2"
        ).code
        == 0
    )
    events = EventAccumulator(str(tmp_path / "run" / "version_0")).Reload().Scalars("train/learning_rate")
    assert max(event.value for event in events) > 0.05


def test_what_is_read_outside_of_training_leaves_every_module_in_its_own_mode() -> None:
    task = SegmentTask(model=small_memformer(dropout=0.2)).train()
    task.model.writer.eval()  # as one that is frozen
    modes = [part.training for part in task.modules()]

    def broken() -> Iterable[object]:
        yield next(iter(loader(shuffle=False)))
        raise OSError("the disk is gone")

    task.read_documents(loader(shuffle=False), documents=8)
    assert [part.training for part in task.modules()] == modes
    with pytest.raises(OSError, match="the disk is gone"):
        task.read_documents(broken(), documents=8)  # type: ignore[arg-type]
    assert [part.training for part in task.modules()] == modes
    assert set(modes) == {True, False}


def test_the_same_task_is_trained_validated_and_tested_again_and_again(tmp_path: Path) -> None:
    once = train(tmp_path, max_epochs=1)
    for _ in range(2):
        trainer = trainer_of(tmp_path, once.seen, max_epochs=1)
        (validated,) = trainer.validate(once.task, loader(shuffle=False), verbose=False)
        (tested,) = trainer.test(once.task, loader(shuffle=False), verbose=False)
        assert validated["validation/bits_per_byte"] == tested["test/bits_per_byte"]
        assert validated["validation/bits_per_byte"] == pytest.approx(bits_of(None, once), rel=1e-6)
        once.seen.epochs.clear()
        trainer.fit(once.task, loader(), loader(shuffle=False))
        assert once.seen.rollouts == corpus(EPOCH)
    with pytest.raises(UsageError, match=r"trainer\.predict is not supported.*`python -m memformer_pl predict`"):
        trainer.predict(once.task, loader(shuffle=False))


def test_a_loader_that_was_read_from_is_overfitted_from_its_beginning_and_then_gone_on_with(tmp_path: Path) -> None:
    given = loader()
    assert len([rollout for rollout, _ in zip(given, range(1), strict=False)]) == 1
    task = SegmentTask(model=small_memformer())
    for options, expected in (
        ({"overfit_batches": 2, "max_epochs": 2}, corpus(2) * 2),
        ({"max_steps": 2}, corpus(4)[2:]),
    ):
        run = train(tmp_path, max_steps=0)
        trainer = trainer_of(tmp_path, run.seen, **options)
        trainer.fit(task, given, loader(shuffle=False))
        assert run.seen.rollouts == expected


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_overfitting_that_is_resumed_reads_what_it_would_have_read(tmp_path: Path, steps: int) -> None:
    kept = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    options = {"overfit_batches": 2, "max_steps": 5, "limit_val_batches": 0, "enable_checkpointing": True}
    whole = train(tmp_path, kept, **options)
    resumed = train(tmp_path, kept, resume=tmp_path / f"step={steps}.ckpt", **options)
    assert resumed.seen.rollouts == whole.seen.rollouts[steps:]
    assert torch.equal(weights(resumed.task), weights(whole.task))


def test_loaders_of_the_wrong_kind_are_refused_with_a_cure(tmp_path: Path) -> None:
    shared = LaneLoader(documents(), batch_size=2, segment_length=LENGTH, horizon=3, world_size=2)
    held_out = loader(shuffle=False)
    for train_on, validate_on, told in (
        (shared, held_out, "among 2 processes, but there are 1: give the trainer a SegmentData"),
        (held_out, held_out, r"training needs a LaneLoader\(shuffle=True\), got shuffle=False"),
        (loader(), loader(), r"validation and test need a LaneLoader\(shuffle=False\), got shuffle=True"),
    ):
        with pytest.raises(UsageError, match=told):
            trainer_of(tmp_path).fit(SegmentTask(model=small_memformer()), train_on, validate_on)
    with pytest.raises(TypeError, match="expected a LaneLoader, as SegmentData makes it, got a list"):
        trainer_of(tmp_path).fit(SegmentTask(model=small_memformer()), [loader(), loader()], held_out)


def test_a_validation_that_reads_no_target_has_no_metrics_and_stops_nothing(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    asking = documents()
    asking.prompt_lengths[:] = asking.lengths  # nothing is asked for
    held_out = LaneLoader(asking, batch_size=2, segment_length=LENGTH, horizon=3, shuffle=False)
    every = {"num_sanity_val_steps": 2, "check_val_every_n_epoch": None, "val_check_interval": 1}
    for options in ({"max_steps": 2}, {"fast_dev_run": 2}):
        trainer = trainer_of(tmp_path, **every, **options)
        trainer.fit(SegmentTask(model=small_memformer()), loader(), held_out)
        assert trainer.global_step == 2
        assert not [name for name in trainer.callback_metrics if name.startswith("validation")]
    assert "read no token that counts, so it has no metrics: raise trainer.limit_val_batches" in str(recwarn.list[-1])


@pytest.mark.filterwarnings("ignore:the validation read no token that counts:UserWarning")
@pytest.mark.parametrize("name", ["copy/memformer", "associative/memformer"])
@pytest.mark.parametrize("trial", [("--trainer.fast_dev_run", "2"), ("--trainer.max_steps", "1")])
def test_a_shipped_corpus_with_late_targets_passes_the_sanity_check_and_a_trial(
    command: Callable[..., Any], pack_cache: Path, tmp_path: Path, name: str, trial: tuple[str, str]
) -> None:
    shipped = Path(__file__).parents[2] / "experiments" / "recall" / f"{name}.yaml"
    fewer = [f"--data.corpus.init_args.{option}" for option in ("examples", "questions")]
    small = [*zip(fewer, ("60", "4"), strict=True), ("--data.cache", pack_cache), ("--data.evaluation_batch_size", "8")]
    small.append(("--trainer.val_check_interval", "1"))
    logs = ("--trainer.logger.init_args.save_dir", tmp_path)
    outcome = command("fit", "--config", shipped, *(word for pair in small for word in pair), *logs, *trial)
    assert outcome.code == 0
    assert not outcome.errors
    # the trial of two rollouts does not come to what is asked
    assert ("Accuracy by distance" in outcome.output) == ("--trainer.max_steps" in trial)
    assert "nan" not in outcome.output


def test_a_run_that_is_resumed_at_the_end_of_an_epoch_reads_on(tmp_path: Path) -> None:
    """Lightning puts a loader back in its place only where an epoch was left in the middle."""

    def fit(name: str, epochs: int, begins: Path | None = None) -> Run:
        keeper = ModelCheckpoint(dirpath=tmp_path / name, filename="{epoch}", save_top_k=-1)
        limits = {"limit_train_batches": 2, "limit_val_batches": 0, "enable_checkpointing": True}
        return train(tmp_path / name, keeper, resume=begins, max_epochs=epochs, **limits)

    whole = fit("whole", 3)
    fit("part", 1)
    rest = fit("part", 3, tmp_path / "part" / "epoch=0.ckpt")
    assert rest.seen.rollouts == whole.seen.rollouts[2:] == corpus(6)[2:]
    assert torch.equal(weights(rest.task), weights(whole.task))


def test_a_model_of_which_nothing_can_be_trained_is_refused(tmp_path: Path) -> None:
    task = SegmentTask(model=small_memformer().requires_grad_(False))
    with pytest.raises(UsageError, match="no parameter of the model requires a gradient"):
        train(tmp_path, task=task, max_steps=1)


def test_frozen_parameters_stay_and_the_others_learn(tmp_path: Path) -> None:
    model = small_memformer()
    model.embedding.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(tmp_path, task=SegmentTask(model=model), max_steps=2)
    assert torch.equal(model.embedding.weight, before["embedding.weight"])
    assert not torch.equal(model.start, before["start"])
