"""Train and evaluate any segment model in Lightning: one rollout of segments is one optimizer step."""

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Float64
from lightning import Callback
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import LRSchedulerConfigType, OptimizerLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from memformer_pl.acting.policy_gradient import Acting, Player, acts
from memformer_pl.contract import Segment, SegmentModel, SegmentOutput, State, detach
from memformer_pl.data.corpora.corpus import Split
from memformer_pl.data.lanes import LaneLoader, Rollout, require_lane_loader
from memformer_pl.errors import LARGEST_WIDTH, UsageError, require_sizes
from memformer_pl.gradients.captured import CapturedGradient, require_capturable, with_one_flag
from memformer_pl.gradients.rng import RandomState
from memformer_pl.gradients.rollout import add_gradient, check_gradient
from memformer_pl.training import checkpoint_io
from memformer_pl.training.compilation import compile_regions, require_regions, uncompiled
from memformer_pl.training.distributed import concat_over_ranks, sum_over_ranks, unsynchronized
from memformer_pl.training.figures import Figures
from memformer_pl.training.metrics import DocumentLosses, compute_metrics, evaluation_mode
from memformer_pl.training.nonfinite import RolloutRecord, reset_nonfinite
from memformer_pl.training.optimizer import (
    LRSchedulerCallable,
    Optimization,
    OptimizerCallable,
    reduce_on_plateau,
)
from memformer_pl.training.records import SegmentRecord
from memformer_pl.training.run_folder import check_folder
from memformer_pl.training.stepping import Stepping
from memformer_pl.training.trainer_checks import check_cuda_graph, check_data, check_loader, check_trainer_arguments


class SegmentTask(Stepping, SegmentRecord):
    """Train a segment model on rollouts, with any gradient, and evaluate it on whole documents.

    Optimization is manual: the chosen gradient makes all backward calls of a rollout, and gradients are summed over
    processes once, before they are clipped. Training, validation and test each carry their own state.

    The default optimizer is AdamW. Its learning rate rises linearly, then falls along a cosine to a tenth at the
    trainer's ``max_steps``; without ``max_steps`` it stays at its highest. Weight decay applies to matrices, not to
    norms, biases, slots and gates; see ``optimizer.py``.

    Args:
        model: The model to train.
        gradient: How the gradient of a rollout is computed; see ``gradients/README.md``.
        decoder_group: Number of segments that run in one batch: with ``replay`` their decoders (Memformer), with
            ``truncated`` each layer of a Transformer-XL. The same gradient in less time, with the memory of that many
            segments.
        compile_blocks: Whether to compile each block of the model with ``torch.compile``, for training.
        cuda_graph: Whether to record the gradient of a rollout as one CUDA graph; see ``gradients/captured.py``. Needs
            a GPU and a single process.
        learning_rate: Highest learning rate of AdamW; default 1e-3.
        warmup_steps: Number of steps on which the learning rate rises; default 100.
        weight_decay: Weight decay of AdamW; default 0.01.
        optimizer: Another optimizer, with its own ``lr`` and ``weight_decay``.
        lr_scheduler: Another learning-rate schedule. It advances with each optimizer step; a ``ReduceLROnPlateau``
            with each validation.
        learning_rate_factors: Factors of the learning rate for patterns of names of parameters in a checkpoint, such as
            ``{"model.writer.*": 3.0}``.
        gradient_clip_val: Largest norm of all gradients together; infinite for no clipping.
        accumulate_grad_batches: Number of rollouts whose gradients are averaged for one step.
        max_skipped: End the run after this many skipped steps in a row. A step is skipped if its loss, its gradient or
            a state in it is not finite.
        acting: Play episodes of the corpus :class:`~memformer_pl.acting.corpus.Episodes` instead of reading them, and
            follow the gradient of their return. A checkpoint does not store it.
        peak_flops: FLOP/s of a device in the precision of the run, to show which share of it training uses (MFU). By
            default that of the data sheet, for devices in ``training/flops.py``; for others no share is shown.
    """

    def __init__(
        self,
        *,
        model: SegmentModel,
        gradient: Literal["replay", "sparse_replay", "bptt", "checkpointed", "truncated"] = "replay",
        decoder_group: int = 1,
        compile_blocks: bool = False,
        cuda_graph: bool = False,
        learning_rate: float | None = None,
        warmup_steps: int | None = None,
        weight_decay: float | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        learning_rate_factors: dict[str, float] | None = None,
        gradient_clip_val: float = 1.0,
        accumulate_grad_batches: int = 1,
        max_skipped: int = 5,
        acting: Acting | None = None,
        peak_flops: float | None = None,
    ) -> None:
        super().__init__()
        check_gradient(model, gradient=gradient, decoder_group=decoder_group)
        if compile_blocks:
            require_regions(model)
        if cuda_graph:
            require_capturable(model, gradient=gradient)
        require_sizes(most=LARGEST_WIDTH, accumulate_grad_batches=accumulate_grad_batches)
        require_sizes(max_skipped=max_skipped)
        if not gradient_clip_val > 0:
            raise UsageError(f"gradient_clip_val must be above 0, got {gradient_clip_val}")
        if peak_flops is not None and not 0 < peak_flops < math.inf:
            raise UsageError(f"peak_flops must be above 0, got {peak_flops}")
        config = model.config()  # raises now, not at the first checkpoint, if the model lacks one of its arguments
        self.automatic_optimization = False
        self.model = model
        self.gradient, self.decoder_group = gradient, decoder_group
        self.compile_blocks, self.cuda_graph = compile_blocks, cuda_graph
        self.gradient_clip_val, self.accumulate_grad_batches = gradient_clip_val, accumulate_grad_batches
        self.max_skipped, self.acting, self.peak_flops = max_skipped, acting, peak_flops
        factors = learning_rate_factors or {}
        self.optimization = Optimization(learning_rate, warmup_steps, weight_decay, optimizer, lr_scheduler, factors)
        self.optimization.check()
        # an explicit dict: what LightningCLI would add makes it build the model of a checkpoint on its own
        self.save_hyperparameters(
            {
                "model": config,
                "gradient": gradient,
                "decoder_group": decoder_group,
                "compile_blocks": compile_blocks,
                "cuda_graph": cuda_graph,
                "learning_rate": learning_rate,
                "warmup_steps": warmup_steps,
                "weight_decay": weight_decay,
                "learning_rate_factors": factors,
                "gradient_clip_val": gradient_clip_val,
                "accumulate_grad_batches": accumulate_grad_batches,
                "max_skipped": max_skipped,
            }
        )
        self.reset_run()

    def reset_run(self) -> None:
        """Discard the state of an earlier run."""
        super().reset_run()
        self._losses: dict[str, DocumentLosses] = {}
        self._returns: Tensor | None = None
        self._captured: CapturedGradient[..., tuple[Tensor, State, Tensor | None]] | None = None
        self._hears = False

    def configure_callbacks(self) -> list[Callback]:
        """Check the trainer, in the first hook that Lightning calls; returns no callbacks.

        Raises:
            UsageError: An argument of the trainer, or a callback, is not supported; or ``cuda_graph`` is on without a
                GPU or with several processes.
        """
        check_trainer_arguments(self.trainer)
        if self.cuda_graph:
            check_cuda_graph(self.trainer)
        return []

    def setup(self, stage: str) -> None:
        """Discard the state of an earlier run, and check that the data fits the model.

        Raises:
            UsageError: The data has a larger vocabulary or longer segments than the model, or does not fit ``acting``.
        """
        self.reset_run()
        if self.compile_blocks and stage == TrainerFn.FITTING:
            compile_regions(self.model)
        checkpoint_io.install(self.trainer.strategy)
        # Lightning converts only after it has loaded a checkpoint, whose weights would be rounded on the way
        self.trainer.precision_plugin.convert_module(self)
        data = getattr(self.trainer, "datamodule", None)
        if data is not None:
            check_data(data, self.model, acts=acts(self.acting))
        if self.acting is not None:
            if self.acting.epochs > 1 and (rollouts := self.accumulate_grad_batches) > 1:
                raise UsageError(f"acting.epochs above 1 needs accumulate_grad_batches=1, got {rollouts}")
            self._player = Player(self.acting, data, rank=self.global_rank, sum_over_ranks=sum_over_ranks)

    def on_fit_start(self) -> None:
        """Refuse the folder of another run; only now does Lightning know which checkpoint this run resumes from."""
        check_folder(self.trainer, resume_from=self.trainer.ckpt_path)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer and the learning-rate schedule.

        Raises:
            UsageError: All parameters are frozen, or the checkpoint to resume from has another optimizer or schedule,
                or a pattern of ``learning_rate_factors`` is wrong or differs from those of the checkpoint.
        """
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise UsageError("no parameter of the model requires a gradient: unfreeze some to train it")
        optimizer, scheduler = self.optimization.build(self, total_steps=self.trainer.max_steps)
        self.require_same_optimizer(optimizer, scheduler, self.optimization.learning_rate_factors)
        schedule: LRSchedulerConfigType = {"scheduler": scheduler, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def training_step(self, rollout: Rollout) -> Float[Tensor, ""]:
        """Compute the gradient of a rollout and, if it completes a step, take that step.

        Nothing here waits for the device, unless the rollout is played first.

        Returns:
            The mean loss of the rollout's targets in nats, over all processes.
        """
        rollout, returns = self._played(rollout, "train")
        rollout, state = self._enter(rollout.with_seeds(), self._states.get(("train", rollout.group)))
        masks = [mask for segment in rollout.segments for mask in (segment.target_mask, segment.token_mask)]
        targets, tokens = sum_over_ranks(torch.stack([mask.sum() for mask in masks]).view(-1, 2).sum(0)).unbind()
        loss_divisor = targets.clamp(min=1) * self.accumulate_grad_batches
        auxiliary_divisor = len(rollout.segments) * self.trainer.world_size * self.accumulate_grad_batches

        random = RandomState.capture((state, rollout.segments))
        with unsynchronized(self.trainer.strategy):
            if self.cuda_graph:
                self._captured = self._captured or CapturedGradient(self._add_gradient, self.model)
                segments = with_one_flag(rollout.segments)
                losses, next_state, lane_losses = self._captured(segments, state, loss_divisor, auxiliary_divisor)
            else:
                losses, next_state, lane_losses = self._add_gradient(
                    rollout.segments, state, loss_divisor, auxiliary_divisor
                )
        initial = self._initial_state(rollout)
        self._states["train", rollout.group], lanes_reset = reset_nonfinite(
            self.model, self.model.compact(next_state), initial, like=rollout.segments[0].document_start
        )
        minimized, loss, lanes_reset = sum_over_ranks(torch.stack((*losses, lanes_reset.to(losses)))).unbind()
        record = RolloutRecord(self._rollouts, rollout, state, random, minimized)
        loss = loss * self.accumulate_grad_batches
        figures = {} if returns is None else {"return": returns[0] / returns[1]}
        if self._player is not None and self._player.clipped is not None:
            figures["clipped"] = self._player.clipped
        lane_losses = None if lane_losses is None else concat_over_ranks(lane_losses)
        self.end_rollout(record, figures, lane_losses, loss=loss, tokens=tokens, lanes_reset=lanes_reset)
        return loss

    def _add_gradient(
        self, segments: Sequence[Segment], state: State, loss_divisor: Tensor, auxiliary_divisor: int
    ) -> tuple[Float[Tensor, "2"], State, Float64[Tensor, "T 2 B"] | None]:
        """The loss, and the part of it that is of tokens; the last state; and nats and targets of each segment and lane
        if the loader hears them."""
        lane_losses, auxiliary = [torch.empty(0)] * len(segments), [torch.empty(0)] * len(segments)

        def cost(output: SegmentOutput) -> Tensor:
            return output.token_losses.sum() / loss_divisor + output.auxiliary_loss / auxiliary_divisor

        def keep(t: int, token_losses: Tensor, auxiliary_loss: Tensor) -> None:
            auxiliary[t] = auxiliary_loss
            if self._hears:
                nats_B = token_losses.double().sum(1)
                lane_losses[t] = torch.stack((nats_B, segments[t].target_mask.sum(1).to(nats_B)))

        method, group = self.gradient, self.decoder_group
        loss, last = add_gradient(self.model, cost, segments, state, gradient=method, decoder_group=group, keep=keep)
        of_tokens = loss - (torch.stack(auxiliary).sum() / auxiliary_divisor).to(loss)
        return torch.stack((loss, of_tokens)), last, torch.stack(lane_losses) if self._hears else None

    def teardown(self, stage: str) -> None:
        """Give back the memory of a graph."""
        self._captured = None

    def validation_step(self, rollout: Rollout) -> None:
        """Evaluate a rollout of validation documents."""
        self._evaluate("validation", rollout)

    def test_step(self, rollout: Rollout) -> None:
        """Evaluate a rollout of test documents."""
        self._evaluate("test", rollout)

    def on_validation_epoch_start(self) -> None:
        """Start from the initial state, with empty sums."""
        self._start_evaluation("validation", check_loader(self.trainer, self.trainer.val_dataloaders))

    def on_test_epoch_start(self) -> None:
        """Start from the initial state, with empty sums."""
        self._start_evaluation("test", check_loader(self.trainer, self.trainer.test_dataloaders))

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the validation documents, and advance a schedule that depends on them.

        Raises:
            OptionError: The schedule monitors a metric that is not logged.
        """
        metrics = self._log_documents("validation", require_lane_loader(self.trainer.val_dataloaders))
        fitting = self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking
        scheduler = self.lr_schedulers() if fitting else None
        if isinstance(scheduler, ReduceLROnPlateau) and metrics:
            reduce_on_plateau(scheduler, {**self.trainer.callback_metrics, **metrics})

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the test documents."""
        self._log_documents("test", require_lane_loader(self.trainer.test_dataloaders))

    @torch.no_grad()
    def read_documents(
        self, rollouts: Iterable[Rollout], *, documents: int, reset_memory: bool = False
    ) -> DocumentLosses:
        """Compute the losses of every document with the current weights, in evaluation mode.

        Args:
            rollouts: The rollouts of one loader, in order.
            documents: Number of documents of the loader.
            reset_memory: Reset memory before every segment, to measure how much the model relies on it.
        """
        losses, state = DocumentLosses(documents).to(self.device), None
        with evaluation_mode(self):
            for rollout in rollouts:
                rollout, state = self._enter(rollout.to(self.device), state)
                state = self._read(rollout, state, losses, reset_memory=reset_memory)
        return losses

    def on_train_start(self) -> None:
        """Restore what the checkpoint holds beyond weights and optimizer, if this run resumes from one."""
        loader = check_loader(self.trainer, self.trainer.train_dataloader, shuffle=True)
        resumed = self.restore_run()
        self._hears = loader.revisits is not None
        overfit = self.trainer.overfit_batches > 0  # type: ignore[attr-defined]  # Lightning sets it elsewhere
        loader.limit(int(self.trainer.num_training_batches), repeat=overfit, anew=not resumed)
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        self.optimization.restore_options(optimizer.optimizer, self)
        self._figures = Figures(self.trainer, loader.documents, self.utilization())

    def totals(self, mode: Literal["validation", "test"]) -> Float64[Tensor, "3 documents"]:
        """Sum nats, tokens and correct predictions so far of every document, over all ranks.

        Call it only while an evaluation runs.
        """
        return self._losses[mode].compute().cpu()

    def _start_evaluation(self, mode: Split, loader: LaneLoader) -> None:
        self._returns = None
        self._states.pop((mode, 0), None)
        self._losses[mode] = DocumentLosses(len(loader.documents)).to(self.device)
        self._clock = None

    def _initial_state(self, rollout: Rollout) -> State:
        return detach(self.model.initial_state(len(rollout.segments[0].document_start)))

    def _enter(self, rollout: Rollout, state: State | None) -> tuple[Rollout, State]:
        """The state that enters a rollout, initial if there is none, as where a loader was read from before the run.

        Then the first segment does not continue anything.
        """
        if state is not None:
            return rollout, state
        first, *rest = rollout.segments
        anew = rollout._replace(segments=(first._replace(continues=False), *rest))
        return anew, self._initial_state(rollout)

    def _played(self, rollout: Rollout, split: Split) -> tuple[Rollout, Float64[Tensor, "2"] | None]:
        """The rollout, as the model plays it if it acts; the sum of its returns and their number, over all ranks."""
        if self._player is None:
            return rollout, None
        with evaluation_mode(self.model):
            number = self._rollouts if split == "train" else 0
            rollout, returns = self._player(self.model, rollout, split, number=number)
        if returns is None:
            return rollout, None
        return rollout, sum_over_ranks(torch.stack((returns.sum(), returns.new_tensor(len(returns)))).to(self.device))

    def _evaluate(self, mode: Split, rollout: Rollout) -> None:
        rollout, returns = self._played(rollout, mode)
        self._returns = returns if self._returns is None or returns is None else self._returns + returns
        rollout, state = self._enter(rollout, self._states.get((mode, rollout.group)))
        self._states[mode, rollout.group] = self._read(rollout, state, self._losses[mode])

    def _read(self, rollout: Rollout, state: State, losses: DocumentLosses, *, reset_memory: bool = False) -> State:
        with uncompiled(self.compile_blocks):
            for segment, documents in zip(rollout.segments, rollout.documents, strict=True):
                output, state = self.model(segment, self.model.reset_memory(state) if reset_memory else state)
                losses.update(output, segment, documents)
                state = self.model.compact(state)
        return state

    def _log_documents(self, mode: Split, loader: LaneLoader) -> dict[str, float]:
        totals, documents = self._losses.pop(mode).compute().cpu(), loader.documents
        # with limit_val_batches, some documents are read in part
        share_read = totals[1] / torch.from_numpy(documents.lengths.clip(1))
        sizes, words = (share_read * torch.from_numpy(each) for each in (documents.bytes, documents.words))
        computed = compute_metrics(totals, sizes, words, drawn=acts(self.acting))
        if self._returns is not None:
            computed["return"] = float(self._returns[0] / self._returns[1])
        if computed and documents.lost_share:
            computed["lost_bytes"] = documents.lost_share
        if not computed and not self.trainer.sanity_checking:
            limit = f"limit_{'val' if mode == 'validation' else mode}_batches"
            rank_zero_warn(f"the {mode} read no token that counts, so it has no metrics: raise trainer.{limit}")
        metrics = {f"{mode}/{name}": value for name, value in computed.items()}
        # all ranks compute the same from summed totals; sync_dist tells Lightning so
        self.log_dict(metrics, sync_dist=True)
        return metrics
