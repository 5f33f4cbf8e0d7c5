"""Start a run from the weights of another one."""

from pathlib import Path

from lightning import Callback, LightningModule, Trainer

from memformer_pl.checkpoints.pretrained import load_pretrained
from memformer_pl.errors import UsageError
from memformer_pl.training.task import SegmentTask


class InitialWeights(Callback):
    """Begin training with the weights of another run: the next stage of a curriculum, or fine-tuning.

    Nothing else is taken: optimizer, schedule, memory and the position in the corpus begin anew. A run that resumes
    from its own checkpoint has the weights of that checkpoint. The model must have the same weights, in number and
    shape; what is not part of them, such as ``segment_length``, may differ.

    Args:
        path: What :func:`~memformer_pl.checkpoints.pretrained.load_pretrained` takes: a checkpoint, a folder that
            ``export`` has written, or ``hf://user/name``.
    """

    logs = ()
    """Prefixes of the metrics that a run can monitor: none."""

    def __init__(self, *, path: str | Path) -> None:
        self.path = path

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Copy the weights. Lightning restores those of a checkpoint to resume from after this.

        Raises:
            TypeError: The run does not train a ``SegmentTask``.
            UsageError: There is no such model, or its weights do not fit.
        """
        if not isinstance(pl_module, SegmentTask):
            raise TypeError(f"InitialWeights needs a SegmentTask, got {type(pl_module).__name__}")
        if stage != "fit":
            return
        model, given = pl_module.model, load_pretrained(self.path).model
        try:
            model.load_state_dict(given.state_dict())
        except RuntimeError as error:
            differing = ", ".join(model.differences(given.config()))
            raise UsageError(
                f"the weights of {str(self.path)!r} do not fit this run's model ({differing}): give both the same"
            ) from error
