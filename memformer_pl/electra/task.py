"""Train ELECTRA in Lightning, with or without a buffer between its generator and its discriminator."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics.classification import BinaryAUROC

from memformer_pl.checkpoints import format as checkpoints
from memformer_pl.electra.data import Examples
from memformer_pl.electra.model import Corrupted, Electra, bit_losses
from memformer_pl.electra.replay import Replay, ReplayBuffer, measure
from memformer_pl.errors import DivergedError, UsageError
from memformer_pl.training.lr_schedule import WarmupCosine
from memformer_pl.training.records import Recorded

BIT_WEIGHT = 50.0
"""Weight of the discriminator's loss beside the generator's."""
TRAINING, DRAWING, VALIDATION = range(1, 4)
"""Streams of random numbers: each batch has its own of each kind, so a resumed run draws what it would have."""
KEY = "electra"
"""Entry, in what this package adds to a checkpoint, that holds the buffer."""


class ElectraTask(Recorded):
    """Minimise nats of a masked token plus ``BIT_WEIGHT`` times nats of a bit, and report the area under the curve of
    replaced tokens (AUC).

    Each step the generator corrupts a batch once. The discriminator reads it, and with ``replay`` examples of earlier
    steps too. AdamW; the learning rate rises linearly, then falls along a cosine to a tenth at the trainer's
    ``max_steps``. Gradients of generator and discriminator are clipped apart, to a norm of 1. So the generators of all
    runs of a seed are the same, whatever is replayed. The host waits for every step.

    Source: as :class:`~memformer_pl.electra.model.Electra` and :class:`~memformer_pl.electra.replay.Replay`.

    Args:
        vocab_size: Size of the vocabulary; the command line takes it from the data.
        length: Tokens of an example; likewise.
        batch_size: Examples that the generator reads in a step; likewise.
        seed: Seed of what is masked, replaced and drawn; likewise.
        dim: Width of the discriminator; the generator has a quarter.
        heads: Attention heads of each.
        layers: Blocks of each.
        learning_rate: Highest learning rate.
        warmup_steps: Steps on which it rises.
        replay: Options of the buffer; by default there is none.

    Raises:
        UsageError: ``learning_rate`` is not above 0 and finite, or a size is out of range.
    """

    counted = "tokens"

    def __init__(
        self,
        *,
        vocab_size: int,
        length: int,
        batch_size: int,
        seed: int = 0,
        dim: int = 64,
        heads: int = 4,
        layers: int = 2,
        learning_rate: float = 1e-3,
        warmup_steps: int = 100,
        replay: Replay | None = None,
    ) -> None:
        super().__init__()
        if not 0 < learning_rate < math.inf:
            raise UsageError(f"learning_rate must be above 0 and finite, got {learning_rate}")
        self.automatic_optimization = False
        self.model = Electra(vocab_size=vocab_size, length=length, dim=dim, heads=heads, layers=layers)
        self.seed, self.learning_rate, self.warmup_steps = seed, learning_rate, warmup_steps
        self.drawn = 0 if replay is None else replay.drawn(batch_size)
        self.replay = replay if self.drawn else None
        self.buffer = None if self.replay is None else ReplayBuffer(self.replay, length=length)
        self._options = {"length": length, "batch_size": batch_size, "seed": seed, "replay": repr(self.replay)}
        self.auc = BinaryAUROC()
        self._saved: Mapping[str, Any] | None = None

    def setup(self, stage: str) -> None:
        """Refuse several processes.

        Raises:
            UsageError: There are several.
        """
        if self.trainer.world_size > 1:
            raise UsageError(f"electra trains in one process, got {self.trainer.world_size}: set trainer.devices to 1")
        # Lightning converts only after it has loaded a checkpoint, whose weights would be rounded on the way
        self.trainer.precision_plugin.convert_module(self)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build AdamW and its schedule."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate)
        schedule = WarmupCosine(optimizer, warmup_steps=self.warmup_steps, total_steps=self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Continue with the batch behind the last one that was trained on, and with the buffer of the checkpoint.

        Raises:
            UsageError: The checkpoint was written with other options of data or replay; says which.
        """
        saved, self._saved = self._saved, None
        if saved is not None:
            was = saved["options"]
            differing = [
                f"{name} (was {was[name]}, is {now})" for name, now in self._options.items() if was[name] != now
            ]
            if differing:
                raise UsageError(f"cannot resume: options differ from the checkpoint: {', '.join(differing)}")
            if self.buffer is not None:
                self.buffer.load_state_dict(saved["buffer"])
        loader = self.trainer.train_dataloader
        assert isinstance(loader, Examples)
        loader.next = self.global_step  # Lightning restores it only if the run stopped in the middle of a pass

    def training_step(self, tokens: Int[Tensor, "B L"]) -> Float[Tensor, ""]:
        """Take a step; returns the loss.

        Raises:
            DivergedError: The loss is not finite.
        """
        step = self.global_step
        masked_loss, fresh = self.model.corrupt(tokens, self._random(TRAINING, step))
        read, keys = fresh, np.empty(0, dtype=np.int64)
        if self.buffer:
            drawn = self.buffer.draw(self.drawn, np.random.default_rng((self.seed, DRAWING, step)), device=self.device)
            read, keys = Corrupted(*map(torch.cat, zip(fresh, drawn.examples, strict=True))), drawn.keys
        logits_BL = self.model.judge(read.tokens)
        bit_loss = bit_losses(logits_BL, read.bits).mean()
        loss = masked_loss + BIT_WEIGHT * bit_loss
        if not loss.isfinite():
            raise DivergedError("the discriminator's loss is not finite: train again with a lower learning rate")
        self._step(loss)
        if self.buffer is not None and self.replay is not None:
            values_B = measure(logits_BL.detach(), read.bits, priority=self.replay.priority)
            self.buffer.visit(keys, values_B[len(tokens) :])
            self.buffer.write(Corrupted(*(field.cpu() for field in fresh)), values_B[: len(tokens)])
        replaced = fresh.bits.float().mean()
        self.log_dict({"train/masked": masked_loss, "train/bit": bit_loss, "train/replaced": replaced})
        return loss.detach()

    def validation_step(self, tokens: Int[Tensor, "B L"], batch_idx: int) -> None:
        """Corrupt held-out examples, always at the same places, and judge them."""
        masked_loss, corrupted = self.model.corrupt(tokens, self._random(VALIDATION, batch_idx))
        logits_BL = self.model.judge(corrupted.tokens)
        self.auc.update(logits_BL.flatten(), corrupted.bits.flatten().long())
        bit_loss = bit_losses(logits_BL, corrupted.bits).mean()
        self.log_dict({"validation/masked": masked_loss, "validation/bit": bit_loss}, batch_size=len(tokens))

    def on_validation_epoch_end(self) -> None:
        """Log the AUC over all tokens of the held-out examples."""
        self.log("validation/auc", self.auc.compute())
        self.auc.reset()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning does not save: the buffer."""
        checkpoint[checkpoints.KEY] = {
            "format": checkpoints.FORMAT,
            "model": self.model.config(),
            KEY: {
                "options": self._options,
                "buffer": None if self.buffer is None else self.buffer.state_dict(),
            },
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the buffer until training starts: evaluation does not need it.

        Raises:
            UsageError: The checkpoint is not one of this task.
        """
        self._saved = self.check(checkpoint)

    def check(self, checkpoint: object) -> Mapping[str, Any]:
        """Return what a task like this one added to a checkpoint.

        Raises:
            UsageError: The file is foreign, or holds another model; says which value differs.
        """
        added = checkpoints.ours(checkpoint)
        if KEY not in added:
            raise UsageError("the checkpoint holds a sequence model, not a generator and a discriminator")
        if differing := self.model.differences(added["model"]):
            raise UsageError(f"the checkpoint holds another model, and cannot be loaded: {', '.join(differing)}")
        saved: Mapping[str, Any] = added[KEY]
        return saved

    def read_in(self, batch: Int[Tensor, "B L"]) -> Tensor:
        """Tokens of a batch, each read by the generator once."""
        return torch.tensor(batch.numel(), device=batch.device)

    def facts(self, counts: Mapping[str, int | float]) -> Mapping[str, Any]:
        """The model."""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return {"model": self.model.config(), "parameters": parameters}

    def _step(self, loss: Float[Tensor, ""]) -> None:
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        optimizer.zero_grad()  # type: ignore[union-attr]  # there is one
        self.manual_backward(loss)
        for part in ((self.model.generator, self.model.to_token), (self.model.discriminator, self.model.to_bit)):
            nn.utils.clip_grad_norm_([weight for module in part for weight in module.parameters()], 1.0)
        optimizer.step()  # type: ignore[union-attr]
        schedule.step()  # type: ignore[union-attr]

    def _random(self, stream: int, number: int) -> torch.Generator:
        """The random numbers of a batch: the same whenever it is read."""
        drawn = np.random.default_rng((self.seed, stream, number)).integers(2**62)
        return torch.Generator(self.device).manual_seed(int(drawn))
