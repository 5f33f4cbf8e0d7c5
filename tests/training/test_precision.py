"""Every precision trains every parameter; in bfloat16 replay is as close to back-propagation as rounding allows."""

from collections.abc import Mapping
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from models import LENGTH, VOCAB, irregular, memformer, train_on
from torch import Tensor
from torch.nn import functional as F

from memformer_pl.contract import Segment, State, detach
from memformer_pl.data import LaneLoader
from memformer_pl.data.packing.documents import PackedDocuments
from memformer_pl.gradients.rollout import GRADIENTS
from memformer_pl.layers import output_from_logits
from memformer_pl.training.task import SegmentTask

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")

EPSILON = torch.finfo(torch.bfloat16).eps
"""A bfloat16 and its neighbour are so far apart, beside their size; rounding is off by half of it at most."""


class Gradients(Callback):
    """Keeps the gradients of the last step, and what is carried behind it."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: SegmentTask, optimizer: object) -> None:
        self.kept = {name: None if p.grad is None else p.grad.clone() for name, p in pl_module.named_parameters()}


class Saves(Callback):
    """Keeps a checkpoint after every rollout."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


QUIET: Mapping[str, Any] = {
    "accelerator": "cpu",
    "limit_val_batches": 0,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def loader() -> LaneLoader:
    random = torch.Generator().manual_seed(0)
    documents = [torch.randint(VOCAB, (length,), generator=random).numpy() for length in (31, 47, 60, 25)]
    return LaneLoader(PackedDocuments.from_arrays(documents), batch_size=2, segment_length=LENGTH, horizon=3)


@cache
def gradients(precision: str) -> Mapping[str, Tensor | None]:
    """Of the second rollout of a run; memory then holds what the first has written."""
    after = Gradients()
    trainer = Trainer(precision=precision, max_steps=2, callbacks=[after], **QUIET)
    trainer.fit(SegmentTask(model=memformer().float()), loader(), loader())
    return after.kept


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "bf16-true"])
def test_every_parameter_gets_a_gradient_in_every_precision(precision: str) -> None:
    kept = gradients(precision)
    assert [name for name, grad in kept.items() if grad is None] == []
    assert [name for name, grad in kept.items() if not grad.isfinite().all()] == []
    assert [name for name, grad in kept.items() if gradients("32-true")[name].any() and not grad.any()] == []
    assert sum(bool(grad.any()) for grad in kept.values()) > 0.95 * len(kept)


Rollout = tuple[Tensor, State, Mapping[str, Tensor]]


def rollout(name: str, precision: str, *, dropout: float) -> Rollout:
    """Loss, last state and gradients of five irregular segments."""
    model = memformer(dropout=dropout).float()
    model = model.bfloat16() if precision == "bf16-true" else model
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else nullcontext():
        case = train_on(model, irregular(5), detach(model.initial_state(4)))
        loss, state = GRADIENTS[name](case.step, case.segments, case.state, advance=case.advance)
    return loss, state, {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


def distance(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Length of the difference of all gradients together, beside their own."""
    assert list(got) == list(expected)
    lengths = [
        torch.stack([part.square().sum() for part in parts]).sum().sqrt()
        for parts in ([got[name] - expected[name] for name in got], expected.values())
    ]
    return float(lengths[0] / lengths[1])


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_replay_is_within_rounding_of_back_propagation_in_bfloat16(precision: str, dropout: float) -> None:
    """Both compute the same numbers in the same order within a segment; they add up the segments in another order.

    So losses and states are equal, and gradients differ as sums of five bfloat16 numbers do: together by less than half
    an epsilon, and each by less than bfloat16 itself costs it, against float32. How much the worst one differs depends
    on what dropout drops: over 24 draws 3.8e-3 to 8.7e-3, where an epsilon is 7.8e-3.
    """
    exact = rollout("bptt", "32-true", dropout=dropout)
    plain, replayed = (rollout(name, precision, dropout=dropout) for name in ("bptt", "replay"))
    assert all(torch.equal(a, b) for a, b in zip(replayed[1], plain[1], strict=True))
    torch.testing.assert_close(replayed[0], plain[0], rtol=1e-6, atol=0)
    apart = distance(replayed[2], plain[2])
    assert apart < EPSILON / 2
    assert apart < 0.5 * distance(plain[2], exact[2])
    for n, grad in plain[2].items():
        assert distance({n: replayed[2][n]}, {n: grad}) < distance({n: grad}, {n: exact[2][n]}), n
    assert distance(replayed[2], exact[2]) < 1.05 * distance(plain[2], exact[2])


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_rollout_of_one_segment_is_the_same_bit_for_bit_in_bfloat16(precision: str) -> None:
    model = memformer().bfloat16() if precision == "bf16-true" else memformer().float()
    grads = []
    for name in ("bptt", "replay"):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else nullcontext():
            case = train_on(model, irregular(1), detach(model.initial_state(4)))
            GRADIENTS[name](case.step, case.segments, case.state, advance=case.advance)
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert list(grads[0]) == list(grads[1])
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


def test_losses_of_tokens_are_at_least_single_precision_and_otherwise_those_of_the_logits() -> None:
    logits = torch.randn(2, LENGTH, VOCAB, dtype=torch.float64) * 3
    tokens = torch.randint(VOCAB, (2, LENGTH))
    segment = Segment(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.zeros(2, dtype=torch.bool))
    for dtype in (torch.float64, torch.float32):
        expected = F.cross_entropy(logits.to(dtype).flatten(0, 1), tokens.flatten(), reduction="none")
        assert torch.equal(output_from_logits(logits.to(dtype), segment).token_losses.flatten(), expected)
    rough = logits.bfloat16()
    losses = output_from_logits(rough, segment).token_losses
    assert losses.dtype == torch.float32
    assert torch.equal(losses, output_from_logits(rough.float(), segment).token_losses)
    assert not torch.equal(losses, losses.bfloat16().float())


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed", "bf16-true"])
def test_a_run_resumes_bit_for_bit_in_every_precision(tmp_path: Path, precision: str) -> None:
    """The model is built in float32: weights of a checkpoint must not pass through that on their way to float64."""
    for folder, begin in ((tmp_path / "whole", None), (tmp_path / "resumed", tmp_path / "whole" / "2.ckpt")):
        trainer = Trainer(precision=precision, max_steps=4, callbacks=[Saves(folder)], **QUIET)
        task = SegmentTask(model=memformer().float(), learning_rate=0.01, warmup_steps=0)
        trainer.fit(task, loader(), loader(), ckpt_path=begin)
    half, whole, resumed = (
        torch.load(tmp_path / name, weights_only=True)["state_dict"]
        for name in ("whole/2.ckpt", "whole/4.ckpt", "resumed/4.ckpt")
    )
    assert [name for name, value in whole.items() if not torch.equal(value, resumed[name])] == []
    assert not torch.equal(half["model.start"], whole["model.start"])
