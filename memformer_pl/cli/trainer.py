"""Lightning's trainer with the command ``analyze``."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import lightning
from lightning.pytorch.loggers import TensorBoardLogger

from memformer_pl.atomic_write import atomic_write, writing
from memformer_pl.checkpoints import format as checkpoints
from memformer_pl.data import Images, PackedDocuments
from memformer_pl.data.datamodule import SegmentData
from memformer_pl.data.tokenizers.alignment import lost_bytes_note
from memformer_pl.errors import OptionError
from memformer_pl.training.task import SegmentTask

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Trainer(lightning.Trainer):
    """Lightning's trainer, with a method for the command ``analyze``."""

    def analyze(
        self,
        model: SegmentTask,
        datamodule: SegmentData,
        ckpt_path: str,
        documents: list[int] | None = None,
        layers: list[int] | None = None,
        slots: list[int] | None = None,
        segments: int = 128,
        out: str | None = None,
    ) -> None:
        """Report what the memory of a checkpoint does on held-out documents.

        Runs the validation documents with memory as it is, reset, frozen and shuffled, and traces what slots keep.
        Writes arrays (``.npz``) and ``report.html``, which opens in any browser, and adds the figures to TensorBoard.

        Args:
            model: The task.
            datamodule: The data with the documents.
            ckpt_path: The checkpoint.
            documents: Numbers of the documents to show token by token; by default three.
            layers: Layers whose attention to memory is shown, counted from 0; by default all.
            slots: Slots to show token by token; by default all.
            segments: Segments of a document to show token by token, from its beginning.
            out: Output folder; by default ``analysis`` beside the logs.

        Raises:
            OptionError: A document, layer or slot does not exist, or an option is not supported.
            UsageError: No documents are held out, the checkpoint is of another model, or ``out`` is in the corpus.
        """
        try:
            from memformer_pl import analysis
        except ModuleNotFoundError as missing:
            raise OptionError(str(missing)) from missing
        if self.num_devices * self.num_nodes > 1:
            raise OptionError("analyze runs on one device: set --trainer.devices 1")
        path = self._report(out, datamodule)
        images = datamodule.corpus if isinstance(datamodule.corpus, Images) else None
        held_out, step = self._held_out(datamodule), self._load(model, ckpt_path)
        with self.precision_plugin.forward_context():
            findings = analysis.look(
                model.model,
                held_out,
                datamodule.tokenizer,
                segment_length=datamodule.segment_length,
                lanes=datamodule.evaluation_batch_size,
                choice=analysis.Choice(documents, layers, slots, segments),
                images=images,
            )
        drawn = analysis.draw(findings)
        options = ", ".join(f"{name} {value}" for name, value in model.model.config().items())
        size, lost = int(held_out.bytes.sum()), int(held_out.lost.sum())
        read = f"{len(held_out)} documents, {size:,} bytes{lost_bytes_note(lost, size)}"
        subject = f"{ckpt_path}, step {step}: {options}. Read: {read}."
        with writing(path.parent):
            findings.save(path.parent)
        with atomic_write(path) as partial:
            partial.write_text(analysis.compose(findings, drawn, subject=subject), encoding="utf-8")
        self._show({name: one.figure for name, one in drawn.items()}, step)
        print(f"Written: {path}")

    def _report(self, out: str | None, data: SegmentData) -> Path:
        """The path of the report, outside the corpus."""
        path = Path(out or Path(self.log_dir or ".") / "analysis") / "report.html"
        if data.corpus.would_read(path):
            raise OptionError(f"out={str(path.parent)!r} is among the files of the corpus: choose another folder")
        return path

    def _show(self, figures: "Mapping[str, Figure]", step: int) -> None:
        """Add the figures to the run's TensorBoard, if it has one."""
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                for name, figure in figures.items():
                    logger.experiment.add_figure(f"analysis/{name}", figure, step)
                logger.experiment.flush()

    def _load(self, task: SegmentTask, path: str) -> int:
        """Load the weights of a checkpoint, on the device and in the precision of the run; returns its step."""
        checkpoint = checkpoints.read(path)
        checkpoints.check(checkpoint, task.model)
        checkpoints.require_intact(path)
        assert isinstance(checkpoint, Mapping)
        task.load_state_dict(checkpoint["state_dict"])
        self.precision_plugin.convert_module(task).to(self.strategy.root_device).eval()
        return int(checkpoint["global_step"])

    def _held_out(self, data: SegmentData) -> PackedDocuments:
        data.prepare_data()
        data.setup("validate")
        return data.packed.validation
