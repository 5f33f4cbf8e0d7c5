"""A model as a folder that others can load without Lightning, or as a repository of the Hugging Face hub.

``config.json`` has the import path of the model's class, what its constructor was called with and which tokenizer the
model reads, ``model.safetensors`` the weights, ``tokenizer.json`` the tokenizer, if it has learned; ``README.md`` says
who wrote it. Nothing in it is code, and none is imported for it that the user has not named.
"""

import json
import shutil
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin, constants, hf_hub_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from memformer_pl.contract.config import import_path
from memformer_pl.errors import UsageError, usage_error
from memformer_pl.contract import SegmentModel

TOKENIZER = "tokenizer.json"
FILES = (constants.CONFIG_NAME, constants.SAFETENSORS_SINGLE_FILE, TOKENIZER, "README.md")
"""What is in a folder."""
FORMAT = 2
"""Of ``config.json``. The first had no number, and the values of the model beside all else."""
CARD = """---
{{ card_data }}
---

A model of [memformer_pl](https://arxiv.org/abs/2010.06891); `config.json` says which. To read on with it:

```python
from memformer_pl.checkpoints.load import load

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

    def save_pretrained(
        self, save_directory: str | Path, *, push_to_hub: bool = False, repo_id: str | None = None, **options: Any
    ) -> str | None:
        """Write a folder in the place of an earlier model, but not over a card; on a full disk that model stays.

        Raises:
            UsageError: The folder cannot be written; says why.
        """
        folder, repo_id = Path(save_directory), repo_id or Path(save_directory).name
        partial = folder / ".partial"
        with usage_error(OSError, SafetensorError, about=f"cannot write {str(folder)!r}"):
            try:
                shutil.rmtree(partial, ignore_errors=True)
                super().save_pretrained(partial, **options)
                for name in (constants.CONFIG_NAME, TOKENIZER):
                    (folder / name).unlink(missing_ok=True)
                # the configuration comes last: without it, nobody takes a half for a whole
                for file in sorted(partial.iterdir(), key=lambda file: file.name == constants.CONFIG_NAME):
                    if file.name != "README.md" or not (folder / file.name).exists():
                        file.replace(folder / file.name)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        return self.push_to_hub(repo_id=repo_id, **options) if push_to_hub else None

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write weights, tokenizer and configuration."""
        super()._save_pretrained(save_directory)
        named = self.tokenizer
        if named is not None and named.startswith("{"):
            (save_directory / TOKENIZER).write_text(named, encoding="utf-8")
            named = TOKENIZER
        config = {"format": FORMAT, "model": self.module.config(), "tokenizer": named}
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
        model_module: str | None = None,
        tokenizer: object = None,
        **hub: Any,
    ) -> "HandOver":
        """The model of a folder or repository, in evaluation mode on the CPU, with its tokenizer.

        Args:
            model_id: The folder or repository.
            config: What is in its ``config.json``.
            kind: What the model has to be.
            model_module: A module of the user's that has the class; it is imported, which runs its code.
            tokenizer: The name of its tokenizer, from the configuration.
            hub: How to download.

        Raises:
            UsageError: Something is missing, damaged, or of another kind.
        """
        if config is None:
            told = "give a folder that save_pretrained or the command export has written"
            raise UsageError(f"{model_id!r} has no {constants.CONFIG_NAME}: {told}")
        if config.get("format") != FORMAT:
            told = f"has format {config.get('format')}, this version reads format {FORMAT}"
            raise UsageError(f"{model_id!r} {told}: use the version that wrote it, or export the model again")
        if not (isinstance(config.get("model"), Mapping) and isinstance(tokenizer, str | None)):
            told = "must hold a model, and the name of its tokenizer or null: export the model again"
            raise UsageError(f"the {constants.CONFIG_NAME} of {model_id!r} {told}")
        model = kind.from_config(config["model"], model_module=model_module)
        weights = _file(model_id, constants.SAFETENSORS_SINGLE_FILE, hub)
        try:
            load_weights(model, load_file(weights))
        except SafetensorError as error:
            told = "is damaged, or holds no weights: export the model again"
            raise UsageError(f"{str(weights)!r} {told} ({error})") from error
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
        model.load_state_dict(_under_all_names(model, weights))
    except RuntimeError as error:
        told = " ".join(str(error).split())
        raise UsageError(
            f"the weights do not fit the {import_path(type(model))} of the configuration, whose class or values have "
            f"changed since they were written: {told}"
        ) from error


def _under_all_names(model: SegmentModel, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights, also under the other names of a tensor that a model has under several: a file has it once."""
    names: dict[int, list[str]] = {}
    tensors = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    for name, tensor in chain(*tensors):
        names.setdefault(id(tensor), []).append(name)
    there = {name: same for same in names.values() for name in same if name in weights}
    return {other: weights[name] for name, same in there.items() for other in same} | dict(weights)


def open_folder(
    where: str | Path, *, kind: type[SegmentModel] = SegmentModel, model_module: str | None = None
) -> HandOver:
    """What is in a folder, or in a repository of the Hugging Face hub.

    Args:
        where: The folder or repository.
        kind: What the model has to be.
        model_module: A module of the user's that has the class of the model; it is imported, which runs its code.

    Raises:
        UsageError: It is not there, or is not what it should be; says why.
    """
    written = Path(where) / constants.CONFIG_NAME
    if written.is_file():
        _require_options(written)
    try:
        return HandOver.from_pretrained(where, kind=kind, model_module=model_module)
    except (OSError, HFValidationError) as error:
        if Path(where).is_dir():
            raise
        raise UsageError(f"there is no folder {str(where)!r}, and on the Hugging Face hub: {error}") from error


def _require_options(path: Path) -> None:
    try:
        options = json.loads(path.read_bytes())
    except ValueError as error:
        raise UsageError(f"{str(path)!r} is not valid JSON: mend it, or export the model again ({error})") from error
    if not isinstance(options, dict):
        told = f"must hold a JSON object, but holds a {type(options).__name__}: export the model again"
        raise UsageError(f"{str(path)!r} {told}")


def _file(model_id: str, name: str, hub: Mapping[str, Any]) -> Path:
    folder = Path(model_id)
    path = folder / name if folder.is_dir() else Path(hf_hub_download(model_id, name, **hub))
    if not path.is_file():
        raise UsageError(f"{model_id!r} has no {name}, which its configuration needs: export the model again")
    return path
