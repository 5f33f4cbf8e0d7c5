"""Optimizer steps that the host does not wait for.

The host enqueues a rollout and its step, and reads the results of both when the device has the next rollout to compute:
the queue of the device never runs empty. Until then only the device knows whether the step is finite, and skips it
otherwise (``nonfinite.py``). The host counts each step as taken; if it learns that one was skipped, it restores its
counts before the next step. So weights, moments, learning rates, counts and checkpoints are those of a loop that waits.
Only a callback that reads ``trainer.global_step`` right after a skipped step finds it counted; it can call
:meth:`Stepping.settle` first.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Float, Float64, Int
from lightning import Callback
from lightning.pytorch import callbacks as lightnings
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loops.progress import _ReadyCompletedTracker
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from memformer_pl.data.lanes import require_lane_loader
from memformer_pl.training.arriving import Arriving
from memformer_pl.training.distributed import sum_gradients
from memformer_pl.training.figures import Figures, Moment
from memformer_pl.training.nonfinite import RolloutRecord, Verdict
from memformer_pl.training.optimizer import falling_rates, skipped_unless, skips_on_device
from memformer_pl.training.resume import Resumable

LANE_LOSSES = "lane_losses"


class Step(NamedTuple):
    """An optimizer step whose outcome the host does not know yet."""

    verdict: Verdict
    number: int
    """Number of steps taken before."""
    rate: float
    """Learning rate."""
    uncount: Callable[[], None] | None
    """Restores what the host has counted with the step; None if it has waited to see whether to take it."""


class Pending(NamedTuple):
    """A rollout whose results the host has not read yet."""

    arriving: Arriving
    moment: Moment
    seconds: float | None
    step: Step | None
    """None if further rollouts belong to the step."""
    figures: Sequence[str]
    """Names of further results."""


class Stepping(Resumable):
    """A module that takes optimizer steps, and reads a rollout's results while the device computes the next one."""

    gradient_clip_val: float

    def reset_run(self) -> None:
        """Discard the state of an earlier run."""
        super().reset_run()
        self._pending: Pending | None = None
        self._figures: Figures | None = None
        self._clock: float | None = None

    def end_rollout(
        self,
        record: RolloutRecord,
        figures: Mapping[str, Tensor],
        lane_losses: Float64[Tensor, "T 2 B"] | None,
        *,
        loss: Float[Tensor, ""],
        tokens: Int[Tensor, ""],
        lanes_reset: Float[Tensor, ""],
    ) -> None:
        """Read the results of the rollout before, then take a step if this rollout completes one.

        Args:
            record: The rollout.
            figures: Further results, to be logged under their names.
            lane_losses: Nats and targets of each segment and lane of all ranks, for a loader that hears them.
            loss: Nats per target, over all ranks.
            tokens: Tokens read, over all ranks.
            lanes_reset: Lanes that were reset after the rollout, over all ranks.
        """
        self._guard.watch(record, lanes_reset)
        self._rollouts += 1
        self.settle()
        now, before = time.perf_counter(), self._clock
        self._clock = now
        step = self._step() if self._rollouts % self.accumulate_grad_batches == 0 else None
        results = {**figures, "loss": loss, "tokens": tokens}
        if lane_losses is not None:
            results[LANE_LOSSES] = lane_losses
        if step is not None:
            results |= {"norm": step.verdict.norm, "finite": step.verdict.finite}
        seconds = None if before is None else now - before
        self._pending = Pending(Arriving(**results), Moment.now(self.trainer), seconds, step, list(figures))
        if self._observed():
            self.settle()

    def settle(self) -> bool:
        """Wait for the results of the latest rollout, count its step, and publish its figures.

        Returns:
            Whether the step was skipped. It is collective if so.

        Raises:
            DivergedError: Too many steps in a row were skipped.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return False
        arrived, step = pending.arriving.wait(), pending.step
        if (lane_losses := arrived.pop(LANE_LOSSES, None)) is not None:
            require_lane_loader(self.trainer.train_dataloader).hear(lane_losses)
        results = {name: float(value) for name, value in arrived.items()}
        figures = {name: results[name] for name in pending.figures}
        if step is not None:
            self._count(step, finite=bool(results["finite"]))
            skipped = float(self._guard.skipped)
            figures |= {"gradient_norm": results["norm"], "learning_rate": step.rate, "skipped": skipped}
        assert self._figures is not None
        loss, tokens = results["loss"], results["tokens"]
        self._figures.publish(pending.moment, loss=loss, tokens=tokens, seconds=pending.seconds, further=figures)
        return step is not None and not results["finite"]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning does not save, once the latest step is counted."""
        if self.settle():  # what Lightning has collected counts a step that was skipped
            weights_only = "optimizer_states" not in checkpoint
            checkpoint.update(self.trainer._checkpoint_connector.dump_checkpoint(weights_only))
        else:
            super().on_save_checkpoint(checkpoint)

    def on_validation_model_zero_grad(self) -> None:
        """Read the results of the latest rollout; keep the gradients of a step that is still accumulating, which
        Lightning would clear."""
        self.settle()

    def on_train_epoch_end(self) -> None:
        """Read the results of the last rollout."""
        self.settle()

    def _step(self) -> Step:
        """Enqueue a step. The host waits for an optimizer that cannot skip one on the device."""
        wrapped, scheduler = self.optimizers(), self.lr_schedulers()
        assert isinstance(wrapped, LightningOptimizer)
        advancing = scheduler if isinstance(scheduler, LRScheduler) else None
        if isinstance(scheduler, ReduceLROnPlateau):  # it advances with validations
            advancing = None
        optimizer, number, rate = wrapped.optimizer, self.global_step, float(wrapped.param_groups[0]["lr"])
        sum_gradients(self.parameters())
        verdict, uncount = self._guard.judge(self), None
        on_device = skips_on_device(optimizer)
        if on_device:
            progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
            uncount = capture_counts(optimizer, advancing, (progress.total, progress.current))
        if on_device or verdict.finite:
            nn.utils.clip_grads_with_norm_(self.parameters(), self.gradient_clip_val, verdict.norm)
            skipping = skipped_unless(verdict.finite, optimizer) if on_device else nullcontext()
            with skipping, falling_rates(optimizer, step=number, total_steps=self.trainer.max_steps):
                wrapped.step()
            if advancing is not None:
                advancing.step()
        wrapped.zero_grad()
        return Step(verdict, number, rate, uncount)

    def _count(self, step: Step, *, finite: bool) -> None:
        """Count a step whose outcome is known."""
        if finite:
            self._guard.take()
            return
        if step.uncount is not None:
            step.uncount()
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)
        documents = require_lane_loader(self.trainer.train_dataloader).documents
        with self.trainer.precision_plugin.forward_context():  # a callback may have asked, outside of it
            self._guard.skip(self.model, step.verdict, step=step.number, documents=documents, folder=folder)

    def _observed(self) -> bool:
        """Whether something looks at the latest rollout before the next one is computed: metrics must exist after the
        first, and a validation, a checkpoint or the end must count its step."""
        trainer, loop = self.trainer, self.trainer.fit_loop
        assert self._figures is not None
        assert loop._data_fetcher is not None
        return (
            not self._figures.latest
            or trainer.is_last_batch
            or 0 < trainer.max_steps <= trainer.global_step
            or loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
            or any(looks_at(callback, trainer.global_step) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        )


def capture_counts(
    optimizer: Optimizer, scheduler: LRScheduler | None, progress: Sequence[_ReadyCompletedTracker]
) -> Callable[[], None]:
    """Capture what the host is about to count in a step; return a function that restores it.

    Args:
        optimizer: Its options, such as the learning rate, which a schedule sets for the next step.
        scheduler: The schedule that advances with the step.
        progress: Lightning's counts of steps.
    """
    options = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    schedule = {} if scheduler is None else deepcopy(scheduler.state_dict())

    def uncount() -> None:
        if scheduler is not None:
            scheduler.load_state_dict(schedule)
        for group, before in zip(optimizer.param_groups, options, strict=True):
            group.update(before)
        for count in progress:
            count.increment_by(-1)

    return uncount


def looks_at(callback: Callback, step: int) -> bool:
    """Whether a callback of Lightning's uses the weights and the number of the step that was just taken."""
    every = getattr(callback, "_every_n_train_steps", 0) if isinstance(callback, lightnings.ModelCheckpoint) else 0
    averages = isinstance(callback, getattr(lightnings, "WeightAveraging", ()))
    return averages or (every > 0 and step % every == 0)
