"""The Lightning task: steps, rates and figures, on small models and documents that are made."""

import math
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from models import LENGTH, MODELS, VOCAB, outcome, train_on
from tasks import LENGTHS, documents, loader, small_memformer, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from memformer_pl.contract import Segment
from memformer_pl.data import LaneLoader
from memformer_pl.gradients.rollout import GRADIENTS, add_gradient
from memformer_pl.models import Memformer
from memformer_pl.training.lr_schedule import lr_factor
from memformer_pl.training.optimizer import parameter_groups
from memformer_pl.training.task import SegmentTask

pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization:UserWarning"),
]


SIZES: dict[str, Any] = {"batch_size": 2, "segment_length": LENGTH, "horizon": 3}


def fit(task: SegmentTask, *, steps: int = 3, validate: bool = False, **options: Any) -> Trainer:
    """Train from a fixed random stream; in double precision, as the models of the tests are, unless told otherwise."""
    defaults: dict[str, Any] = {"precision": "64-true", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    limits = {"limit_val_batches": 1.0 if validate else 0, "check_val_every_n_epoch": None, "val_check_interval": 1}
    trainer = Trainer(accelerator="cpu", max_steps=steps, **{**defaults, **quiet, **limits, **options})
    torch.manual_seed(0)
    trainer.fit(task, loader(), loader(shuffle=False))
    return trainer


class Gradients(Callback):
    """Keeps the gradients that every step of the optimizer is taken with."""

    def __init__(self) -> None:
        self.kept: list[Mapping[str, Tensor | None]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: SegmentTask, optimizer: object) -> None:
        grads = {name: p.grad for name, p in pl_module.named_parameters()}
        self.kept.append({name: None if grad is None else grad.clone() for name, grad in grads.items()})


def total_norm(gradients: Mapping[str, Tensor | None]) -> float:
    return math.sqrt(sum(float((grad**2).sum()) for grad in gradients.values() if grad is not None))


@pytest.mark.parametrize(
    "options",
    [{"gradient": "bptt"}, {"gradient": "checkpointed"}, {"gradient": "sparse_replay"}, {"decoder_group": 2}],
    ids=lambda options: "=".join(map(str, *options.items())),
)
def test_every_exact_gradient_gives_the_same_weights(options: dict[str, Any]) -> None:
    replayed, other = (SegmentTask(model=small_memformer(dropout=0.2), **given) for given in ({}, options))
    before = weights(replayed)
    for task in (replayed, other):
        fit(task)
    torch.testing.assert_close(weights(other), weights(replayed), rtol=1e-10, atol=1e-12)
    assert (weights(replayed) - before).abs().max() > 1e-5


def test_a_truncated_gradient_gives_other_weights() -> None:
    replayed, other = (SegmentTask(model=small_memformer(), gradient=name) for name in ("replay", "truncated"))
    for task in (replayed, other):
        fit(task)
    assert (weights(other) - weights(replayed)).abs().max() > 1e-5


def test_the_gradient_is_that_of_the_mean_loss_of_the_rollout() -> None:
    kept = Gradients()
    fit(SegmentTask(model=small_memformer(), gradient_clip_val=1e9), steps=1, callbacks=[kept])
    segments = next(iter(loader())).segments
    tokens = sum(int(segment.token_mask.sum()) for segment in segments)
    model = small_memformer()
    expected = outcome(GRADIENTS["bptt"], lambda: train_on(model, segments, model.initial_state(2)))
    for name, grad in expected.grads.items():
        got = kept.kept[0][f"model.{name}"]
        assert (grad is None) == (got is None)
        if grad is not None:
            torch.testing.assert_close(got, grad / tokens, rtol=1e-10, atol=1e-14)


def test_clipping_bounds_the_norm_of_all_gradients_together() -> None:
    free, clipped = Gradients(), Gradients()
    fit(SegmentTask(model=small_memformer(), gradient_clip_val=1e9), steps=1, callbacks=[free])
    fit(SegmentTask(model=small_memformer(), gradient_clip_val=0.01), callbacks=[clipped])
    assert total_norm(free.kept[0]) > 0.1
    assert [total_norm(gradients) for gradients in clipped.kept] == pytest.approx([0.01] * 3, rel=1e-3)
    shrunk = 0.01 / total_norm(free.kept[0])
    for name, grad in free.kept[0].items():
        if grad is not None:
            torch.testing.assert_close(clipped.kept[0][name], grad * shrunk, rtol=1e-3, atol=1e-9)


def test_accumulating_averages_the_gradients_of_rollouts() -> None:
    together, alone = Gradients(), Gradients()
    fit(
        SegmentTask(model=small_memformer(), gradient_clip_val=1e9, accumulate_grad_batches=2),
        steps=1,
        callbacks=[together],
    )
    # a rate so low that the second rollout meets the weights of the first
    fit(SegmentTask(model=small_memformer(), gradient_clip_val=1e9, learning_rate=1e-14), steps=2, callbacks=[alone])
    for name, grad in together.kept[0].items():
        if grad is not None:
            first, second = (gradients[name] for gradients in alone.kept)
            first = torch.zeros_like(grad) if first is None else first
            torch.testing.assert_close(grad, (first + second) / 2, rtol=1e-8, atol=1e-11)


def test_steps_are_rollouts_and_checkpoints_and_the_end_count_them(tmp_path: Path) -> None:
    for accumulate in (1, 2):
        folder = tmp_path / str(accumulate)
        kept = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, filename="{step}")
        task = SegmentTask(model=small_memformer(), accumulate_grad_batches=accumulate)
        trainer = fit(task, steps=4, callbacks=[kept], enable_checkpointing=True)
        assert trainer.global_step == 4
        assert trainer.fit_loop.epoch_loop.total_batch_idx + 1 == 4 * accumulate
        assert sorted(path.name for path in folder.iterdir()) == ["step=2.ckpt", "step=4.ckpt"]


def test_no_module_has_a_name_that_checkpoints_look_for_and_none_carries_a_buffer() -> None:
    """ModelCheckpoint inspects the first; DDP's first forward would overwrite the second with those of rank 0."""
    task = SegmentTask(model=small_memformer())
    fit(task, steps=1)
    assert [
        name for name, part in task.named_modules() if hasattr(part, "saved_models") or hasattr(part, "layer")
    ] == []
    carried = {field.data_ptr() for state in task._states.values() for field in state}
    assert carried
    assert not carried & {buffer.data_ptr() for buffer in task.buffers()}


def test_matrices_decay_and_nothing_else() -> None:
    task = SegmentTask(model=small_memformer(dropout=0.1))
    groups = [{id(p) for p in group["params"]} for group in parameter_groups(task)]
    assert not groups[0] & groups[1]
    assert groups[0] | groups[1] == {id(p) for p in task.parameters()}
    decayed = {name for name, parameter in task.named_parameters() if id(parameter) in groups[0]}
    for name, parameter in task.named_parameters():
        left_out = "norm" in name or name.endswith(("bias", "start", "anchors", "forgetting"))
        assert (name in decayed) == (parameter.dim() == 2 and not left_out), name
    assert {"model.embedding.weight", "model.writer.to_query.weight"} <= decayed


def test_decay_shrinks_the_first_group_and_leaves_the_second() -> None:
    # with a gradient clipped to nothing, only decay is left
    task = SegmentTask(
        model=small_memformer(), learning_rate=0.1, warmup_steps=0, weight_decay=0.5, gradient_clip_val=1e-30
    )
    before = {name: parameter.detach().clone() for name, parameter in task.named_parameters()}
    fit(task, steps=1)
    shrunk = {id(p) for p in parameter_groups(task)[0]["params"]}
    for name, parameter in task.named_parameters():
        expected = before[name] * (0.95 if id(parameter) in shrunk else 1.0)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-9, atol=1e-12)


def test_the_learning_rate_rises_linearly_and_falls_along_a_cosine_to_a_tenth() -> None:
    assert [lr_factor(step, warmup_steps=3, total_steps=0) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert lr_factor(0, warmup_steps=0, total_steps=10) == 1.0
    assert lr_factor(5, warmup_steps=0, total_steps=10) == pytest.approx(0.55)
    assert lr_factor(10, warmup_steps=0, total_steps=10) == pytest.approx(0.1)
    assert lr_factor(12, warmup_steps=0, total_steps=10) == pytest.approx(0.1)
    assert lr_factor(1, warmup_steps=3, total_steps=4) == pytest.approx(0.5 * (0.55 + 0.45 * math.sqrt(0.5)))


def test_validation_in_between_does_not_affect_training() -> None:
    alone, interrupted = (SegmentTask(model=small_memformer(dropout=0.2), accumulate_grad_batches=2) for _ in range(2))
    fit(alone)
    # before the first rollout and after every one, in the midst of a step too
    fit(interrupted, validate=True, num_sanity_val_steps=2, limit_val_batches=2)
    assert torch.equal(weights(alone), weights(interrupted))


def losses_by_hand(model: Memformer) -> list[tuple[float, int]]:
    """Nats and right answers of each document, read one by one in a lane of its own."""
    costs = []
    model.eval()
    for place, length in enumerate(LENGTHS):
        tokens = torch.from_numpy(documents().document(place))
        state, nats, correct = model.initial_state(1), 0.0, 0
        for first in range(0, length, LENGTH):
            piece = tokens[None, first : first + LENGTH]
            segment = Segment(piece, torch.ones_like(piece, dtype=torch.bool), torch.tensor([first == 0]))
            with torch.no_grad():
                output, state = model(segment, state)
            nats, correct = nats + float(output.token_losses.sum()), correct + int(output.correct.sum())
        costs.append((nats, correct))
    return costs


def test_validation_and_test_find_what_a_loop_over_the_documents_finds() -> None:
    model = small_memformer(dropout=0.2)
    nats, correct = (sum(column) for column in zip(*losses_by_hand(model), strict=True))
    trainer = Trainer(accelerator="cpu", precision="64-true", logger=False, enable_progress_bar=False)
    tokens = sum(LENGTHS)
    for lanes, horizon in ((3, 2), (20, 4)):
        given = loader(lanes=lanes, horizon=horizon, shuffle=False)
        for run, name in ((trainer.validate, "validation"), (trainer.test, "test")):
            (found,) = run(SegmentTask(model=model), given, verbose=False)
            assert found[f"{name}/loss"] == pytest.approx(nats / tokens, rel=1e-6)
            assert found[f"{name}/perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-6)
            assert found[f"{name}/accuracy"] == pytest.approx(correct / tokens)
            # made documents have a byte for each token
            assert found[f"{name}/bits_per_byte"] == pytest.approx(nats / math.log(2) / tokens, rel=1e-6)


def test_a_validation_that_stops_early_counts_the_bytes_that_it_has_read() -> None:
    model = small_memformer()
    limited = {"limit_val_batches": 2, "precision": "64-true", "logger": False, "enable_progress_bar": False}
    given = loader(shuffle=False)
    (found,) = Trainer(accelerator="cpu", **limited).validate(SegmentTask(model=model), given, verbose=False)
    assert found["validation/bits_per_byte"] == pytest.approx(found["validation/loss"] / math.log(2), rel=1e-6)


def test_documents_are_read_alike_inside_and_outside_a_trainer_and_forgetting_is_felt() -> None:
    model = small_memformer(dropout=0.2)
    task, given = SegmentTask(model=model).train(), loader(lanes=3, shuffle=False)
    losses = task.read_documents(given, documents=len(LENGTHS)).compute()
    assert task.training
    torch.testing.assert_close(losses[0], torch.tensor([nats for nats, _ in losses_by_hand(model)]).double())
    assert losses[1].tolist() == list(LENGTHS)
    forgetful = task.read_documents(given, documents=len(LENGTHS), reset_memory=True).compute()
    # the first segment is read from nothing and the second writes first: memory is of use from the third on
    short = torch.tensor(LENGTHS) <= 2 * LENGTH
    assert torch.equal(forgetful[0][short], losses[0][short])
    assert (forgetful[0][~short] != losses[0][~short]).all()


def test_without_resets_the_state_is_carried_over_the_borders_of_documents() -> None:
    model, split = small_memformer(), documents()
    stream = LaneLoader(split, batch_size=1, segment_length=LENGTH, horizon=3, shuffle=False, reset="never")
    found = SegmentTask(model=model).read_documents(stream, documents=len(LENGTHS)).compute()[0]
    state, by_hand = model.initial_state(1), []
    for number in range(len(LENGTHS)):
        nats = 0.0
        for tokens in torch.from_numpy(split.document(number)).split(LENGTH):
            segment = Segment(tokens[None], torch.ones(1, len(tokens), dtype=torch.bool), torch.tensor([False]))
            output, state = model.eval()(segment, state)
            nats += float(output.token_losses.detach().sum())
        by_hand.append(nats)
    assert found.tolist() == pytest.approx(by_hand, rel=1e-12)
    reset = SegmentTask(model=model).read_documents(loader(shuffle=False), documents=len(LENGTHS)).compute()[0]
    assert torch.isclose(found, reset, rtol=1e-12).tolist() == [True] + [False] * (len(LENGTHS) - 1)


def test_a_rollout_continues_nothing_without_a_state_to_continue_from() -> None:
    """A loader may have been read from before the run begins."""
    task, given = SegmentTask(model=small_memformer()), LaneLoader(documents([60] * 4), **SIZES)
    first, second = islice(given, 2)
    assert [segment.continues for rollout in (first, second) for segment in rollout.segments] == [False] + [True] * 5
    anew, state = task._enter(second, None)
    assert [segment.continues for segment in anew.segments] == [False, True, True]
    assert all(map(torch.equal, state, task.model.initial_state(2)))
    assert task._enter(second, state)[0] is second


def test_every_segment_of_training_has_a_seed_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def spy(model: Memformer, cost: Any, segments: Sequence[Segment], *args: Any, **options: Any) -> Any:
        seeds.extend(int(segment.seeds) for segment in segments if segment.seeds is not None)
        return add_gradient(model, cost, segments, *args, **options)

    monkeypatch.setattr("memformer_pl.training.task.add_gradient", spy)
    fit(SegmentTask(model=small_memformer()), steps=3)
    first = list(seeds)
    fit(SegmentTask(model=small_memformer()), steps=3)
    assert len(set(first)) == len(first) == 9
    assert seeds[9:] == first  # of the same random stream


def test_everything_is_logged_for_tensorboard_and_the_bar_shows_bits_per_byte(tmp_path: Path) -> None:
    kept, task = Gradients(), SegmentTask(model=small_memformer(), gradient_clip_val=1e9, warmup_steps=3)
    logger = TensorBoardLogger(tmp_path, name=None, version="")
    options = {"logger": logger, "log_every_n_steps": 1, "callbacks": [kept]}
    trainer = fit(task, steps=4, validate=True, val_check_interval=2, **options)
    events = EventAccumulator(str(tmp_path)).Reload()
    logged = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    train = ("loss", "perplexity", "bits_per_byte", "gradient_norm", "tokens_per_second", "learning_rate", "skipped")
    validation = ("loss", "perplexity", "bits_per_byte", "accuracy")
    expected = {f"train/{name}" for name in train} | {f"validation/{name}" for name in validation}
    assert set(logged) == expected | {"epoch", "hp_metric"}  # the last by Lightning, beside the options of the task
    assert all(len(logged[f"validation/{name}"]) == 2 for name in validation)
    loss, bits = logged["train/loss"], logged["train/bits_per_byte"]
    assert loss[0] == pytest.approx(math.log(VOCAB), rel=0.5)
    assert bits == pytest.approx([value / math.log(2) for value in loss], rel=1e-5)
    assert logged["train/perplexity"] == pytest.approx([math.exp(value) for value in loss], rel=1e-5)
    assert logged["train/gradient_norm"] == pytest.approx([total_norm(grads) for grads in kept.kept], rel=1e-5)
    rates = [1e-3 * lr_factor(step, warmup_steps=3, total_steps=4) for step in range(4)]
    assert logged["train/learning_rate"] == pytest.approx(rates, rel=1e-5)
    assert trainer.progress_bar_metrics["bits/byte"] == pytest.approx(bits[-1], rel=1e-5)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_the_logged_loss_is_that_of_tokens_without_the_auxiliary_loss(gradient: str) -> None:
    model = MODELS["compressive transformer"]()
    segments, state, nats, auxiliary = next(iter(loader())).segments, model.initial_state(2), 0.0, 0.0
    for segment in segments:
        with torch.no_grad():
            output, state = model(segment, state)
        nats, auxiliary = nats + float(output.token_losses.sum()), auxiliary + float(output.auxiliary_loss)
    task = SegmentTask(model=MODELS["compressive transformer"](), gradient=gradient)
    logged = fit(task, steps=1).callback_metrics["train/loss"]
    assert auxiliary > 0.01
    assert float(logged) == pytest.approx(nats / sum(int(segment.target_mask.sum()) for segment in segments), rel=1e-6)


def test_the_time_of_a_validation_does_not_count_as_training() -> None:
    trainer = fit(SegmentTask(model=small_memformer()), steps=2, validate=True)
    # a validation stands between any two rollouts, so no two rollouts give a speed
    assert "train/tokens_per_second" not in trainer.callback_metrics


def test_every_parameter_gets_a_gradient_in_bfloat16() -> None:
    kept = Gradients()
    sizes = {"dim": 8, "heads": 2, "encoder_layers": 2, "decoder_layers": 1, "slots": 3, "dropout": 0.1}
    model = Memformer(vocab_size=VOCAB, segment_length=LENGTH, **sizes)
    # memory is read from zero at the start, so the way to it opens with the first step
    fit(SegmentTask(model=model, warmup_steps=0), steps=2, callbacks=[kept], precision="bf16-mixed")
    assert not [name for name, grad in kept.kept[-1].items() if grad is None or not grad.abs().max() > 0]


def test_a_task_begins_each_fit_with_nothing_carried() -> None:
    task = SegmentTask(model=small_memformer())
    fit(task, steps=2)
    carried = task._states["train", 0]
    fit(task, steps=1)
    assert not torch.equal(task._states["train", 0][0], carried[0])
    assert task._rollouts == 1
