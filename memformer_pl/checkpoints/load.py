"""A trained model and its tokenizer, from nothing but a checkpoint or a folder; Lightning is not needed.

python -c "from memformer_pl.checkpoints.load import load; load('last.ckpt').save_pretrained('folder')"
"""

from pathlib import Path
from typing import NamedTuple

import torch

import memformer_pl.models  # noqa: F401 - so that a configuration may name what is in it
from memformer_pl.checkpoints import format as checkpoints
from memformer_pl.data.tokenizers.subwords import from_written
from memformer_pl.data.tokenizers.tokenizer import Tokenizer
from memformer_pl.checkpoints.pretrained import HandOver, load_weights, open_folder
from memformer_pl.contract import SegmentModel


class Pretrained(NamedTuple):
    """What it takes to read on where training ended."""

    model: SegmentModel
    """In evaluation mode."""
    tokenizer: Tokenizer | None
    """None if the model was trained on numbers that were made elsewhere."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that :func:`load` and ``SegmentModel.from_pretrained`` read."""
        self.model.save_pretrained(folder, tokenizer=self.tokenizer.written() if self.tokenizer else None)


def load(path: str | Path, *, device: str | torch.device = "cpu", model_module: str | None = None) -> Pretrained:
    """The model and the tokenizer of a checkpoint, or of a folder that ``save_pretrained`` wrote.

    No code is run but that of ``model_module``: a class from outside this package is known once its module is imported.

    Args:
        path: A file or a folder.
        device: Where the model is to be.
        model_module: The module that has the class of the model, where it is not of this package; it is imported.

    Raises:
        UsageError: There is nothing there, it is damaged, foreign or older, or the class of the model is not known;
            says which.
    """
    folder = Path(path).is_dir()
    opened = open_folder(path, model_module=model_module) if folder else _from_checkpoint(path, model_module)
    model, written = opened.module, opened.tokenizer
    return Pretrained(model.to(device).eval(), None if written is None else from_written(written))


def _from_checkpoint(path: str | Path, model_module: str | None) -> HandOver:
    content = checkpoints.read(path)
    added = checkpoints.ours(content)
    checkpoints.require_intact(path)
    assert isinstance(content, dict)
    model: SegmentModel = SegmentModel.from_config(added["model"], model_module=model_module)
    prefix = "model."
    weights = {name.removeprefix(prefix): weight for name, weight in content["state_dict"].items()}
    load_weights(model, weights)
    return HandOver(model, tokenizer=added["tokenizer"])
