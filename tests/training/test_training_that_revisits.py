"""Training with lanes that read documents again: the losses that they are drawn by, and the command line."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome
from identical import assert_identical
from models import full
from tape import Tape
from tasks import documents, loader, small_memformer, weights
from torch import Tensor, nn
from trainers import trainer_of

from memformer_pl.contract import SegmentOutput, checks, detach
from memformer_pl.data import LaneLoader
from memformer_pl.data.revisiting import Revisit
from memformer_pl.gradients import captured
from memformer_pl.gradients.captured import with_one_flag
from memformer_pl.gradients.rollout import GRADIENTS, add_gradient
from memformer_pl.models import TransformerXL
from memformer_pl.training.task import SegmentTask

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")
HALF = Revisit(share=0.5, size=6, longest=40)


def cost(output: SegmentOutput) -> Tensor:
    return output.token_losses.sum()


@pytest.mark.parametrize(
    ("model", "options"),
    [
        *((small_memformer, {"gradient": name}) for name in GRADIENTS),
        (small_memformer, {"gradient": "replay", "decoder_group": 2}),
        (None, {"gradient": "truncated", "decoder_group": 2}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_every_gradient_keeps_the_losses_of_every_segment_and_stays_what_it_is(
    model: Callable[[], Any] | None, options: dict[str, Any]
) -> None:
    sizes = {"vocab_size": 11, "segment_length": 6, "dim": 8, "heads": 2, "layers": 2, "dropout": 0.0}
    reader = model() if model else TransformerXL(**sizes, memory_length=12).double()
    segments, state = full(5), detach(reader.initial_state(2))
    grads, found = [], []
    for keeps in (False, True):
        kept: dict[int, tuple[Tensor, Tensor]] = {}

        def keep(t: int, *losses: Tensor, kept: dict[int, Any] = kept) -> None:
            kept[t] = losses

        reader.zero_grad()
        add_gradient(reader, cost, segments, state, **options, keep=keep if keeps else None)
        grads.append([parameter.grad for parameter in reader.parameters()])
        found.append(kept)
    assert_identical(*grads)
    assert found[0] == {}
    assert sorted(found[1]) == list(range(5))
    with torch.no_grad():
        for t, segment in enumerate(segments):
            output, state = reader(segment, state)
            torch.testing.assert_close(found[1][t], (output.token_losses, output.auxiliary_loss))


def test_a_captured_rollout_returns_its_own_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, by a stand-in for a CUDA graph: the losses are a result of the graph, not those of its recording."""
    monkeypatch.setattr(checks, "has_values", lambda tensor: False)
    monkeypatch.setattr(captured, "WARM_UPS", 1)
    task = SegmentTask(model=small_memformer())
    task._hears = True
    graph = captured.CapturedGradient(task._add_gradient, task.model, recorder=Tape)
    found = []
    for rollout, _ in zip(loader(), range(3), strict=False):
        segments, state = with_one_flag(rollout.with_seeds().segments), detach(task.model.initial_state(2))
        lane_losses = [call(segments, state, torch.tensor(5.0), 1)[2] for call in (graph, task._add_gradient)]
        assert torch.equal(lane_losses[0], lane_losses[1])
        found.append(lane_losses[0])
    assert found[0].shape == (3, 2, 2)
    assert not torch.equal(found[0], found[1])


def fit(folder: Path, given: LaneLoader, *, steps: int = 12, **options: Any) -> SegmentTask:
    torch.manual_seed(0)
    task = SegmentTask(model=small_memformer(), **options)
    trainer_of(folder, max_steps=steps, limit_val_batches=0).fit(task, given, loader(shuffle=False))
    return task


@pytest.mark.parametrize("gradient", ["replay", "checkpointed"])
def test_a_document_is_weighed_by_its_mean_loss(tmp_path: Path, gradient: str) -> None:
    """Weights that stay as they are give a document the loss that an evaluation gives it."""
    given = loader(interleave=2, revisit=Revisit(share=0.5, size=6, priority="loss", longest=40))
    task = fit(tmp_path, given, gradient=gradient, optimizer=partial(torch.optim.SGD, lr=0.0))
    evaluation = loader(shuffle=False)
    nats, tokens, _ = task.read_documents(evaluation, documents=len(documents())).compute()
    assert given.revisits is not None
    assert len(given.revisits.weights) == 6
    for document, weight in given.revisits.weights.items():
        assert weight == pytest.approx(float(nats[document] / tokens[document]), rel=1e-12)


def test_the_loss_difference_of_weights_that_stay_is_nothing_at_the_second_visit(tmp_path: Path) -> None:
    given = loader(interleave=2, revisit=Revisit(share=0.5, size=8, longest=40))
    fit(tmp_path, given, optimizer=partial(torch.optim.SGD, lr=0.0), steps=40)
    assert given.revisits is not None
    assert max(given.revisits.weights.values()) == pytest.approx(0, abs=1e-12)


def test_a_share_of_nothing_is_the_very_same_run(tmp_path: Path) -> None:
    plain, none, half = (
        weights(fit(tmp_path, loader(interleave=2, revisit=revisit))) for revisit in (None, Revisit(share=0.0), HALF)
    )
    assert torch.equal(plain, none)
    assert not torch.equal(plain, half)


def test_a_rollout_that_is_not_finite_is_skipped_and_weighs_nothing(tmp_path: Path) -> None:
    given = loader(interleave=2, revisit=HALF)

    class Overflow(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * float("nan")

    task = SegmentTask(model=small_memformer(), max_skipped=100)
    nn.utils.parametrize.register_parametrization(task.model.embedding, "weight", Overflow(), unsafe=True)
    trainer_of(tmp_path, max_epochs=1, limit_val_batches=0).fit(task, given, loader(shuffle=False))
    assert given.revisits is not None
    assert given.revisits.weights == {}


@pytest.mark.parametrize("priority", ["loss_difference", "loss", "uniform"])
def test_every_priority_runs_from_the_command_line(
    command: Callable[..., Outcome], small: Path, tmp_path: Path, priority: str
) -> None:
    revisit = (f"--data.revisit={{share: 0.5, size: 4, priority: {priority}}}", "--data.horizon=8")
    outcome = command("fit", "--config", small, *revisit)
    assert outcome.code == 0, outcome.output
    checkpoint = tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt"
    again = command("fit", "--config", small, *revisit, "--ckpt_path=last", "--trainer.max_steps=6")
    assert again.code == 0, again.output
    content = torch.load(checkpoint, weights_only=True)
    assert content["global_step"] == 6
    assert len(content["memformer_pl"]["revisits"]["buffer"]["keys"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.revisit={share: 1.0}"], "revisit.share must be at least 0 and below 1, got 1.0"),
        (["--data.revisit={share: 0.3}"], "revisit.share 0.3 of batch_size 4 is 1.2 lanes"),
        (["--data.revisit={share: 0.5, size: 3}"], "2 in each of 2 groups, got 3"),
        (["--data.revisit={share: 0.5, longest: 99}"], "more than revisit.longest 99: raise it"),
        (["--data.revisit={priority: best}"], "best"),
        (["--data.revisit={share: 0.5}", "--trainer.overfit_batches=2"], "cannot repeat rollouts (overfit_batches)"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(
    command: Callable[..., Outcome], small: Path, options: list[str], message: str
) -> None:
    outcome = command("fit", "--config", small, *options)
    assert outcome.code in (1, 2)
    assert message in outcome.errors[0]


def test_a_checkpoint_of_a_run_without_the_option_is_not_continued_with_it(
    command: Callable[..., Outcome], small: Path
) -> None:
    assert command("fit", "--config", small).code == 0
    outcome = command("fit", "--config", small, "--data.revisit={share: 0.5}", "--ckpt_path=last")
    assert outcome.code == 1
    assert "data settings differ from the checkpoint: revisit (was None, is " in outcome.errors[0]
