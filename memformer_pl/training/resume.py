"""State that a run carries from rollout to rollout: how a checkpoint stores it, and how a run resumes bit for bit."""

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lightning import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import memformer_pl.models  # noqa: F401 - registers the classes that a checkpoint may name
from memformer_pl.acting.playing import Played
from memformer_pl.acting.policy_gradient import Kept, Player
from memformer_pl.checkpoints import format as checkpoints
from memformer_pl.contract import SegmentModel, State, as_state, carries_gradient
from memformer_pl.contract.config import import_path
from memformer_pl.data.lanes import require_lane_loader
from memformer_pl.data.tokenizers.tokenizer import Tokenizer
from memformer_pl.errors import UsageError
from memformer_pl.gradients.rng import RandomState
from memformer_pl.training import checkpoint_io
from memformer_pl.training.distributed import gather, gather_lanes, lanes_of_rank
from memformer_pl.training.nonfinite import NonFiniteGuard

Task = TypeVar("Task", bound="Resumable")


class Resumable(LightningModule):
    """A module that trains a segment model, and whose checkpoints hold everything that the run depends on.

    A subclass calls :meth:`reset_run` before a run, and :meth:`restore_run` when training starts.
    """

    model: SegmentModel
    accumulate_grad_batches: int
    max_skipped: int

    def reset_run(self) -> None:
        """Discard the state of an earlier run."""
        # not buffers, since DDP would overwrite those of every rank with those of the first
        self._states: dict[tuple[str, int], State] = {}
        self._rollouts = 0
        self._guard = NonFiniteGuard(max_skipped=self.max_skipped)
        self._resumed: Mapping[str, Any] | None = None
        self._player: Player | None = None

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
        """Rebuild the task that wrote a checkpoint, with its weights, without running code from the file.

        A checkpoint does not store the ``optimizer`` and ``lr_scheduler`` of its run: pass them again to train on.

        Args:
            checkpoint_path: The file.
            map_location: Device of the tensors; by default the one that they were saved from.
            hparams_file: YAML file of options that replace those in the checkpoint.
            strict: Whether the file must hold exactly the weights of the model; by default it must.
            weights_only: Ignored: the file is always read with ``weights_only=True``.
            options: Arguments of the constructor that replace those in the checkpoint. A ``model`` must have the
                configuration in the checkpoint.

        Raises:
            TypeError: The constructor does not have such an argument.
            UsageError: The file does not exist, is damaged or foreign, or holds another model.
        """
        inspect.signature(cls).bind_partial(**options)  # Lightning would ignore an unknown option
        content = checkpoint_io.CheckpointFiles().load_checkpoint(checkpoint_path)
        if options.get("model") is None:
            options["model"] = SegmentModel.from_config(checkpoints.ours(content)["model"])
        task: Task = super().load_from_checkpoint(
            checkpoint_path, map_location, hparams_file, strict, weights_only=True, **options
        )
        return task

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning does not save: model, tokenizer, carried states, random streams, accumulated gradients."""
        revisits = getattr(self.trainer.train_dataloader, "revisits", None)
        kept = None if self._player is None else self._player.kept
        accumulating = self._rollouts % self.accumulate_grad_batches > 0
        gradients = [parameter.grad for parameter in self.parameters()] if accumulating else []
        checkpoint[checkpoints.KEY] = {
            "format": checkpoints.FORMAT,
            "model": self.model.config(),
            "tokenizer": self._serialized_tokenizer(),
            "states": {group: gather_lanes(state) for (mode, group), state in self._states.items() if mode == "train"},
            "random": gather(tuple(RandomState.capture(next(self.parameters())))),
            "precision": self.trainer.precision,
            "optimizer": [_class_of(part) for part in (self.optimizers(), self.lr_schedulers())],
            "rollouts": self._rollouts,
            "guard": self._guard.state_dict(),
            "gradients": gather([None if gradient is None else gradient.cpu() for gradient in gradients]),
            **({} if revisits is None else {"revisits": revisits.state_dict()}),
            **({} if kept is None else {"played": gather_lanes((*kept.played, kept.documents))}),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check the checkpoint, and keep what :meth:`restore_run` needs.

        Raises:
            UsageError: This package did not write the checkpoint, or it holds another model; says which value differs.
        """
        # Lightning restores the position of a loader only if the run stopped in the middle of an epoch
        loaders = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])
        checked = checkpoints.check(checkpoint, self.model)
        patterns = list(checkpoint["hyper_parameters"].get("learning_rate_factors", {}))
        self._resumed = {**checked, "loaders": loaders, "patterns": patterns}

    def require_same_optimizer(self, optimizer: Optimizer, scheduler: LRScheduler, patterns: Iterable[str]) -> None:
        """Refuse an optimizer or a schedule whose class differs from that of the checkpoint, if there is one, and other
        patterns of parameters with a learning rate of their own; their factors may differ.

        Raises:
            UsageError: Names both classes, or the patterns of both.
        """
        current = [_class_of(optimizer), _class_of(scheduler)]
        saved = current if self._resumed is None else self._resumed["optimizer"]
        for option, now, before in zip(("optimizer", "lr_scheduler"), current, saved, strict=True):
            if now != before:
                raise UsageError(
                    f"cannot resume: the checkpoint was trained with {option} {before}, this run has {now}; choose the "
                    "same class, or train again"
                )
        if self._resumed is not None and (before := self._resumed["patterns"]) != list(patterns):
            raise UsageError(
                f"cannot resume: the checkpoint has learning_rate_factors for {before or 'no parameters'}, this run "
                f"for {list(patterns) or 'none'}; choose the same patterns in the same order, or train again"
            )

    def restore_run(self) -> bool:
        """Restore position, states, gradients and random streams of the checkpoint; return False if there is none.

        Raises:
            UsageError: The data settings differ from those of the checkpoint; says which value.
        """
        resumed, self._resumed = self._resumed, None
        if resumed is None:
            return False
        loader = require_lane_loader(self.trainer.train_dataloader)
        for state in resumed["loaders"]:
            loader.load_state_dict(state)
        if loader.revisits is not None:
            loader.revisits.load_state_dict(resumed["revisits"])
        self._rollouts = resumed["rollouts"]
        if self._player is not None and "played" in resumed:
            *played, documents = lanes_of_rank(resumed["played"])
            self._player.kept = Kept(Played(*played), documents)
        self._guard.load_state_dict(resumed["guard"])
        precision = self.trainer.precision_plugin
        with precision.forward_context():  # as in a rollout, since the default dtype may depend on it
            initial = self.model.initial_state(1)
        same_precision = resumed["precision"] == precision.precision
        for group, lanes in resumed["states"].items():
            fields = [field.to(self.device) for field in lanes_of_rank(lanes)]
            state = as_state(initial, fields if same_precision else map(cast_like, fields, initial))
            self._states["train", group] = self.model.compact(state)
        for gradients in resumed["gradients"][self.global_rank :: self.trainer.world_size]:
            for parameter, gradient in zip(self.parameters(), gradients, strict=False):
                if gradient is not None:
                    moved = gradient.to(parameter)
                    parameter.grad = moved if parameter.grad is None else parameter.grad + moved
        if len(resumed["random"]) == self.trainer.world_size:
            # nothing draws between here and the first rollout; with another number of ranks, dropout differs
            RandomState(*resumed["random"][self.global_rank]).restore()
        return True

    def _serialized_tokenizer(self) -> str | None:
        tokenizer = getattr(getattr(self.trainer, "datamodule", None), "tokenizer", None)
        return tokenizer.serialize() if isinstance(tokenizer, Tokenizer) else None


def cast_like(field: Tensor, example: Tensor) -> Tensor:
    """Cast a field of a state to the dtype of ``example`` if that is floating-point or complex."""
    return field.to(example.dtype) if carries_gradient(example) else field


def _class_of(part: object) -> str:
    """The import path of the class of an optimizer, also inside Lightning's wrapper, or of a schedule."""
    return import_path(type(part.optimizer) if isinstance(part, LightningOptimizer) else type(part))
