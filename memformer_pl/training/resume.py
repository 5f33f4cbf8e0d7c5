"""What a run carries from rollout to rollout, how a checkpoint keeps it, and how a run goes on with it, bit for bit."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from lightning import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import memformer_pl.models  # noqa: F401 - so that a checkpoint may name what is in it
from memformer_pl.checkpoints import format as checkpoints
from memformer_pl.contract import SegmentModel, State, as_state
from memformer_pl.data.lanes import require_lane_loader
from memformer_pl.data.tokenizers.tokenizer import Tokenizer
from memformer_pl.errors import UsageError
from memformer_pl.gradients.rng import RandomState
from memformer_pl.training import checkpoint_io
from memformer_pl.training.distributed import gather, gather_lanes, lanes_of_rank
from memformer_pl.training.nonfinite import NonFiniteGuard

Task = TypeVar("Task", bound="Resumable")


class Resumable(LightningModule):
    """A module that trains a segment model, and whose checkpoints hold all that the run depends on.

    One that derives from it calls :meth:`start_afresh` before a run, and :meth:`go_on` when its training starts.
    """

    model: SegmentModel
    accumulate_grad_batches: int
    max_skipped: int

    def start_afresh(self) -> None:
        """Forget an earlier run."""
        # Carried states are no buffers: DDP would overwrite each rank's with those of the first.
        self._states: dict[tuple[str, int], State] = {}
        self._rollouts = 0
        self._guard = NonFiniteGuard(most=self.max_skipped)
        self._resumed: Mapping[str, Any] | None = None

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # Lightning's takes an open file, too
        cls: type[Task],
        checkpoint_path: str | Path,
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = True,
        **options: Any,
    ) -> Task:
        """The task that wrote a checkpoint, with the weights in it. No code in the file is run.

        Args:
            checkpoint_path: The file.
            map_location: Where its tensors are put; by default where they were.
            hparams_file: Options in YAML, in place of those in the checkpoint.
            strict: Whether the file must hold exactly the weights that the model has; by default it must.
            weights_only: Has no effect: the file is read as if it were True.
            options: Of the constructor, in place of those in the checkpoint; a ``model`` must have its sizes.

        Raises:
            TypeError: There is no such option.
            UsageError: There is no such file, it is damaged or foreign, or holds another model.
        """
        inspect.signature(cls).bind_partial(**options)  # Lightning would ignore one that does not exist
        content = checkpoint_io.CheckpointFiles().load_checkpoint(checkpoint_path)
        if options.get("model") is None:
            options["model"] = SegmentModel.from_config(checkpoints.ours(content)["model"])
        given = (checkpoint_path, map_location, hparams_file, strict)
        task: Task = super().load_from_checkpoint(*given, weights_only=True, **options)
        return task

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning does not save: model and tokenizer, carried memory, random streams, partial sums."""
        partial = (
            [parameter.grad for parameter in self.parameters()] if self._rollouts % self.accumulate_grad_batches else []
        )
        checkpoint[checkpoints.KEY] = {
            "format": checkpoints.FORMAT,
            "model": self.model.config(),
            "tokenizer": self._written_tokenizer(),
            "states": {group: gather_lanes(state) for (mode, group), state in self._states.items() if mode == "train"},
            "random": gather(tuple(RandomState.capture(next(self.parameters())))),
            "precision": self.trainer.precision,
            "optimizer": [_class_of(part) for part in (self.optimizers(), self.lr_schedulers())],
            "rollouts": self._rollouts,
            "guard": self._guard.state_dict(),
            "gradients": gather([None if gradient is None else gradient.cpu() for gradient in partial]),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it up again.

        Raises:
            UsageError: The checkpoint is not of this package, or of another model; says which value differs.
        """
        # Lightning puts the loader back in its place only where an epoch was left in the middle
        loaders = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])
        self._resumed = {**checkpoints.check(checkpoint, self.model), "loaders": loaders}

    def require_same_optimizer(self, optimizer: Optimizer, scheduler: LRScheduler) -> None:
        """Refuse to load the state of another optimizer or schedule.

        Raises:
            UsageError: Their classes differ from those of the checkpoint; says which.
        """
        own = [_class_of(optimizer), _class_of(scheduler)]
        saved = own if self._resumed is None else self._resumed["optimizer"]
        for option, kind, before in zip(("optimizer", "lr_scheduler"), own, saved, strict=True):
            if kind != before:
                raise UsageError(
                    f"cannot resume: the checkpoint was trained with {option} {before}, this run has {kind}"
                )

    def go_on(self) -> bool:
        """Take place, memory, partial sums and random streams from the checkpoint; False if the run begins.

        Raises:
            UsageError: The data is read in another way than by the run of the checkpoint; says which value differs.
        """
        resumed, self._resumed = self._resumed, None
        if resumed is None:
            return False
        for state in resumed["loaders"]:
            require_lane_loader(self.trainer.train_dataloader).load_state_dict(state)
        self._rollouts = resumed["rollouts"]
        self._guard.load_state_dict(resumed.get("guard", {}))
        precision = self.trainer.precision_plugin
        with precision.forward_context():  # as in a rollout: the default dtype may depend on it
            initial = self.model.initial_state(1)
        same = resumed.get("precision") == precision.precision
        for group, lanes in resumed["states"].items():
            fields = [field.to(self.device) for field in lanes_of_rank(lanes)]
            self._states["train", group] = as_state(initial, fields if same else map(in_dtype_of, fields, initial))
        for gradients in resumed["gradients"][self.global_rank :: self.trainer.world_size]:
            for parameter, gradient in zip(self.parameters(), gradients, strict=False):
                if gradient is not None:
                    moved = gradient.to(parameter)
                    parameter.grad = moved if parameter.grad is None else parameter.grad + moved
        if len(resumed["random"]) == self.trainer.world_size:
            # Nothing draws between here and the first rollout. On another number of ranks dropout falls otherwise.
            RandomState(*resumed["random"][self.global_rank]).restore()
        return True

    def _written_tokenizer(self) -> str | None:
        tokenizer = getattr(getattr(self.trainer, "datamodule", None), "tokenizer", None)
        return tokenizer.serialize() if isinstance(tokenizer, Tokenizer) else None


def in_dtype_of(field: Tensor, own: Tensor) -> Tensor:
    """A field of a carried state in the precision of this run, given the same field of its own; whole numbers as is."""
    return field.to(own.dtype) if own.is_floating_point() or own.is_complex() else field


def _class_of(part: object) -> str:
    """The import path of the class of an optimizer, also behind Lightning's wrapper, or of a schedule."""
    kind = type(part.optimizer) if isinstance(part, LightningOptimizer) else type(part)
    return f"{kind.__module__}.{kind.__qualname__}"
