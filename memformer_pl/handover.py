"""A model as a folder that others can load without Lightning, or as a repository of the Hugging Face hub.

``config.json`` has what the constructor was called with and which tokenizer the model reads, ``model.safetensors`` the
weights, ``tokenizer.json`` the tokenizer, if it has learned; ``README.md`` says who wrote it. Nothing in it is code.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin, constants, hf_hub_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from memformer_pl.errors import UsageError
from memformer_pl.recurrence import SegmentModel

TOKENIZER = "tokenizer.json"
FILES = (constants.CONFIG_NAME, constants.SAFETENSORS_SINGLE_FILE, TOKENIZER, "README.md")
"""What is in a folder."""
CARD = """---
{{ card_data }}
---

A model of [memformer_pl](https://arxiv.org/abs/2010.06891); `config.json` says which. To read on with it:

```python
from memformer_pl.pretrained import load

model, tokenizer = load("this folder")
```
"""


class HandOver(
    PyTorchModelHubMixin,
    library_name="memformer_pl",
    model_card_template=CARD,
    paper_url="https://arxiv.org/abs/2010.06891",
    pipeline_tag="text-generation",
):
    """A model and its tokenizer, with ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``.

    Args:
        module: The model.
        tokenizer: A word, or the text of a ``tokenizer.json``, see ``Tokenizer.written``; None if there is none.
    """

    def __init__(self, module: SegmentModel, *, tokenizer: str | None = None) -> None:
        self.module = module
        self.tokenizer = tokenizer

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write weights, tokenizer and configuration; what an earlier model left there goes."""
        super()._save_pretrained(save_directory)
        (save_directory / TOKENIZER).unlink(missing_ok=True)
        named = self.tokenizer
        if named is not None and named.startswith("{"):
            (save_directory / TOKENIZER).write_text(named, encoding="utf-8")
            named = TOKENIZER
        config = {**self.module.config(), "tokenizer": named}
        written = save_directory / constants.CONFIG_NAME
        written.write_text(f"{json.dumps(config, indent=2)}\n", encoding="utf-8")
        # safetensors writes for the owner alone
        (save_directory / constants.SAFETENSORS_SINGLE_FILE).chmod(written.stat().st_mode)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        config: Mapping[str, Any] | None = None,
        kind: type[SegmentModel] = SegmentModel,
        tokenizer: str | None = None,
        **hub: Any,
    ) -> "HandOver":
        """The model of a folder or repository, in evaluation mode on the CPU, with its tokenizer.

        Args:
            model_id: The folder or repository.
            config: What is in its ``config.json``.
            kind: What the model has to be.
            tokenizer: The name of its tokenizer, from the configuration.
            hub: How to download.

        Raises:
            UsageError: Something is missing, damaged, or of another kind.
        """
        if config is None:
            raise UsageError(f"{model_id!r} has no {constants.CONFIG_NAME}: it was not written by save_pretrained")
        model = kind.from_config({name: value for name, value in config.items() if name != "tokenizer"})
        weights = _file(model_id, constants.SAFETENSORS_SINGLE_FILE, hub)
        try:
            load_weights(model, load_file(weights))
        except SafetensorError as error:
            raise UsageError(f"{str(weights)!r} is damaged, or holds no weights: {error}") from error
        if tokenizer == TOKENIZER:
            tokenizer = _file(model_id, TOKENIZER, hub).read_text(encoding="utf-8")
        return cls(model.eval(), tokenizer=tokenizer)


def load_weights(model: SegmentModel, weights: Mapping[str, torch.Tensor]) -> None:
    """Take weights as precise as they are, at least in 32 bits.

    Raises:
        UsageError: They are those of another model; says which.
    """
    first = next(weight.dtype for weight in (*weights.values(), torch.empty(0)) if weight.is_floating_point())
    model.to(torch.promote_types(first, torch.float32))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        told = " ".join(str(error).split())
        raise UsageError(f"the weights are not those of the {type(model).__name__} that is named: {told}") from error


def open_folder(where: str | Path, *, kind: type[SegmentModel] = SegmentModel) -> HandOver:
    """What is in a folder, or in a repository of the Hugging Face hub.

    Raises:
        UsageError: It cannot be had, or is not what it should be; says why.
    """
    written = Path(where) / constants.CONFIG_NAME
    if written.is_file():
        _require_options(written)
    try:
        return HandOver.from_pretrained(where, kind=kind)
    except (OSError, HFValidationError) as error:
        if Path(where).is_dir():
            raise
        raise UsageError(f"there is no folder {str(where)!r}, and on the Hugging Face hub: {error}") from error


def _require_options(path: Path) -> None:
    try:
        options = json.loads(path.read_bytes())
    except ValueError as error:
        raise UsageError(f"{str(path)!r} is no JSON: {error}") from error
    if not isinstance(options, dict):
        raise UsageError(f"{str(path)!r} holds no options, but a {type(options).__name__}")


def _file(model_id: str, name: str, hub: Mapping[str, Any]) -> Path:
    folder = Path(model_id)
    path = folder / name if folder.is_dir() else Path(hf_hub_download(model_id, name, **hub))
    if not path.is_file():
        raise UsageError(f"{model_id!r} has no {name}: it was not written whole")
    return path
