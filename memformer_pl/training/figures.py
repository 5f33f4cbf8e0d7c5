"""Figures of training: given to Lightning and its loggers when they have arrived on the host, usually a rollout late.

``self.log`` would copy every number to the device, wait there for each at a logging step, and log it under the step of
the call.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from lightning import Trainer

from memformer_pl.data.packing.documents import PackedDocuments
from memformer_pl.training.metrics import perplexity


class Moment(NamedTuple):
    """The place of a rollout in the logs."""

    step: int
    """Number of rollouts before it, by which Lightning counts in its logs."""
    epoch: int
    due: bool
    """Whether this rollout is logged (``log_every_n_steps``)."""

    @classmethod
    def now(cls, trainer: Trainer) -> "Moment":
        """The place of the rollout that is being computed."""
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning sets it elsewhere
        due = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # likewise
        return cls(step, trainer.current_epoch, due or (every > 0 and (step + 1) % every == 0))


class Utilization(NamedTuple):
    """What turns a speed into the share of the devices' peak that training uses (model FLOPs utilization, MFU)."""

    flops: float
    """FLOPs of a training token; see :func:`~memformer_pl.training.flops.training_flops`."""
    peak: float
    """FLOP/s of all devices together."""

    def of(self, tokens_per_second: float) -> float:
        """The share, from 0 to 1."""
        return self.flops * tokens_per_second / self.peak


class Figures:
    """The latest figures of training, under their names in the logs and in the progress bar.

    Args:
        trainer: The trainer.
        documents: The training documents.
        utilization: For MFU; None to leave it out.
    """

    def __init__(self, trainer: Trainer, documents: PackedDocuments, utilization: Utilization | None) -> None:
        self._trainer, self._documents, self._utilization = trainer, documents, utilization
        self.latest: dict[str, float] = {}

    def publish(
        self, moment: Moment, *, loss: float, tokens: float, seconds: float | None, further: Mapping[str, float]
    ) -> None:
        """Show the figures of a rollout, and log them if their time has come.

        Args:
            moment: The place of the rollout in the logs.
            loss: Nats per target.
            tokens: Tokens read, over all ranks.
            seconds: Time since the rollout before; None if it is not known.
            further: Figures of the optimizer step that the rollout completed, if it did; with ``return``, the loss is
                no likelihood of the documents.
        """
        found, shown = {"loss": loss, **further}, {}
        if "return" in further:
            shown["return"] = further["return"]
        else:
            found["perplexity"] = perplexity(loss)
            found["bits_per_byte"] = shown["bits/byte"] = loss / math.log(2) / self._documents.bytes_per_token
        if self._documents.lost_share:
            found["lost_bytes"] = self._documents.lost_share
        if seconds is not None:
            found["tokens_per_second"] = shown["tokens/s"] = tokens / seconds
            if self._utilization is not None:
                found["mfu"] = shown["MFU"] = self._utilization.of(tokens / seconds)
        self.latest |= {f"train/{name}": value for name, value in found.items()}
        # Lightning hands out the dictionaries that it keeps; its callbacks expect tensors
        logged = {name: torch.tensor(value, dtype=torch.float64) for name, value in {**self.latest, **shown}.items()}
        self._trainer.callback_metrics.update(logged)
        self._trainer.logged_metrics.update({name: logged[name] for name in self.latest})
        self._trainer.progress_bar_metrics.update(shown)
        if moment.due or self._trainer.should_stop:
            for logger in self._trainer.loggers:
                logger.log_metrics({**self.latest, "epoch": moment.epoch}, step=moment.step)
                logger.save()
