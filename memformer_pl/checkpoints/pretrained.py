"""Load a trained model and its tokenizer from a checkpoint, a folder or the Hugging Face hub, without Lightning.

A folder holds ``config.json`` (the import path of the model's class, the arguments of its constructor, and its
tokenizer), ``model.safetensors`` (the weights), ``tokenizer.json`` (the tokenizer, if it was learned) and a
``README.md``. It holds no code, and loading imports no module that the user has not named.
"""

import json
import shutil
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin, constants, hf_hub_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

import memformer_pl.models  # noqa: F401 - registers the classes that a configuration may name
from memformer_pl.checkpoints import format as checkpoint_format
from memformer_pl.contract import SegmentModel
from memformer_pl.contract.config import import_path
from memformer_pl.data.tokenizers.subwords import deserialize_tokenizer
from memformer_pl.data.tokenizers.tokenizer import Tokenizer
from memformer_pl.errors import OptionError, UsageError, usage_error

TOKENIZER = "tokenizer.json"
FILES = (constants.CONFIG_NAME, constants.SAFETENSORS_SINGLE_FILE, TOKENIZER, "README.md")
"""Files of a folder."""
FORMAT = 4
"""Format of ``config.json``; since 4, self-attention has one weight for queries, keys and values."""
HUB = "hf://"
"""Prefix of the name of a repository on the Hugging Face hub."""
CARD = """---
{{ card_data }}
---

A model of the package memformer-pl, a reproduction of [Memformer](https://arxiv.org/abs/2010.06891). `config.json` has
its class and sizes. To load it:

```python
from memformer_pl.checkpoints.pretrained import load_pretrained

model, tokenizer = load_pretrained("this folder")
```
"""


class Pretrained(NamedTuple):
    """A trained model and its tokenizer."""

    model: SegmentModel
    """In evaluation mode."""
    tokenizer: Tokenizer | None
    """None if the model was trained on arrays of token numbers."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that :func:`load_pretrained` reads."""
        save_pretrained(self.model, folder, tokenizer=self.tokenizer.serialize() if self.tokenizer else None)


def load_pretrained(
    path: str | Path, *, device: str | torch.device = "cpu", model_module: str | None = None
) -> Pretrained:
    """Load a model, in evaluation mode, and its tokenizer.

    Only the code of ``model_module`` is run. A class from outside this package is known once its module is imported.

    Args:
        path: A checkpoint, a folder that :func:`save_pretrained` wrote, or a repository on the Hugging Face hub, given
            as ``hf://user/name``.
        device: Device of the model.
        model_module: Module that defines the class of the model, if this package does not; it is imported.

    Raises:
        UsageError: The path does not exist, is damaged, foreign or has an older format, or the class of the model is
            unknown; says which.
    """
    hub = str(path).startswith(HUB)
    if hub or Path(path).is_dir():
        found = _from_folder(str(path).removeprefix(HUB), hub=hub, model_module=model_module)
    else:
        found = _from_checkpoint(path, model_module)
    tokenizer = None if found.tokenizer is None else deserialize_tokenizer(found.tokenizer)
    return Pretrained(found.module.to(device).eval(), tokenizer)


def available_device(name: str | None) -> torch.device:
    """The device of this name; by default a GPU if there is one.

    Raises:
        OptionError: It is not available.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        told = str(error).splitlines()[0]
        raise OptionError(f"device {name!r} is not available: {told}; give another one, such as cpu") from error


def save_pretrained(model: SegmentModel, folder: str | Path, *, tokenizer: str | None = None) -> None:
    """Write the weights and the configuration of a model into a folder that :func:`load_pretrained` reads.

    Args:
        model: The model.
        folder: The folder; it is created if needed.
        tokenizer: The serialized tokenizer of the model, from ``Tokenizer.serialize``.

    Raises:
        UsageError: The folder cannot be written; says why.
    """
    PretrainedFolder(model, tokenizer=tokenizer).save_pretrained(folder)


class PretrainedFolder(
    PyTorchModelHubMixin,
    library_name="memformer_pl",
    model_card_template=CARD,
    paper_url="https://arxiv.org/abs/2010.06891",
    pipeline_tag="text-generation",
):
    """A model and its tokenizer, with the methods of the Hugging Face hub, such as ``push_to_hub``.

    Args:
        module: The model.
        tokenizer: The serialized tokenizer, from ``Tokenizer.serialize``; None if there is no tokenizer.
    """

    def __init__(self, module: SegmentModel, *, tokenizer: str | None = None) -> None:
        self.module = module
        self.tokenizer = tokenizer

    def save_pretrained(
        self, save_directory: str | Path, *, push_to_hub: bool = False, repo_id: str | None = None, **options: Any
    ) -> str | None:
        """Write a folder, replacing an earlier model but not its card. If the disk is full, the earlier model stays.

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
                # config.json comes last: a folder without it is refused, so a partial one is never loaded
                for file in sorted(partial.iterdir(), key=lambda file: file.name == constants.CONFIG_NAME):
                    if file.name != "README.md" or not (folder / file.name).exists():
                        file.replace(folder / file.name)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        return self.push_to_hub(repo_id=repo_id, **options) if push_to_hub else None

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write weights, tokenizer and configuration."""
        super()._save_pretrained(save_directory)
        tokenizer = self.tokenizer
        if tokenizer is not None and tokenizer.startswith("{"):
            (save_directory / TOKENIZER).write_text(tokenizer, encoding="utf-8")
            tokenizer = TOKENIZER
        config = {"format": FORMAT, "model": self.module.config(), "tokenizer": tokenizer}
        config_file = save_directory / constants.CONFIG_NAME
        config_file.write_text(f"{json.dumps(config, indent=2)}\n", encoding="utf-8")
        # safetensors creates a file that only its owner can read
        (save_directory / constants.SAFETENSORS_SINGLE_FILE).chmod(config_file.stat().st_mode)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        config: Mapping[str, Any] | None = None,
        model_module: str | None = None,
        tokenizer: object = None,
        **hub: Any,
    ) -> "PretrainedFolder":
        """Load the model of a folder or repository, in evaluation mode on the CPU, with its tokenizer.

        Args:
            model_id: The folder or repository.
            config: Content of its ``config.json``.
            model_module: Module that defines the class of the model; it is imported, which runs its code.
            tokenizer: Name of its tokenizer, from the configuration.
            hub: Options of a download.

        Raises:
            UsageError: A file is missing or damaged.
        """
        if config is None:
            todo = "give a folder that save_pretrained or the command export has written"
            raise UsageError(f"{model_id!r} has no {constants.CONFIG_NAME}: {todo}")
        if config.get("format") != FORMAT:
            formats = f"has format {config.get('format')}, this version reads format {FORMAT}"
            raise UsageError(f"{model_id!r} {formats}: use the version that wrote it, or export the model again")
        if not (isinstance(config.get("model"), Mapping) and isinstance(tokenizer, str | None)):
            needed = "must hold a model, and the name of its tokenizer or null: export the model again"
            raise UsageError(f"the {constants.CONFIG_NAME} of {model_id!r} {needed}")
        model: SegmentModel = SegmentModel.from_config(config["model"], model_module=model_module)
        weights = _file(model_id, constants.SAFETENSORS_SINGLE_FILE, hub)
        try:
            load_weights(model, load_file(weights))
        except SafetensorError as error:
            raise UsageError(
                f"{str(weights)!r} is damaged, or is not a file of weights: export the model again ({error})"
            ) from error
        if tokenizer == TOKENIZER:
            tokenizer = _file(model_id, TOKENIZER, hub).read_text(encoding="utf-8")
        return cls(model.eval(), tokenizer=tokenizer)


def load_weights(model: SegmentModel, weights: Mapping[str, torch.Tensor]) -> None:
    """Load weights into a model, in their own precision or in float32 if that is higher.

    Raises:
        UsageError: The weights do not fit the model; says which.
    """
    first = next(weight.dtype for weight in (*weights.values(), torch.empty(0)) if weight.is_floating_point())
    model.to(torch.promote_types(first, torch.float32))
    try:
        model.load_state_dict(_under_all_names(model, weights))
    except RuntimeError as error:
        raise UsageError(
            f"the weights do not fit the {import_path(type(model))} of the configuration: its class or its arguments "
            f"have changed since the weights were saved: {' '.join(str(error).split())}"
        ) from error


def _under_all_names(model: SegmentModel, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Add the weights of shared tensors under all their names: a file has them under one name only."""
    names: dict[int, list[str]] = {}
    tensors = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    for name, tensor in chain(*tensors):
        names.setdefault(id(tensor), []).append(name)
    aliases = {name: same for same in names.values() for name in same if name in weights}
    return {alias: weights[name] for name, same in aliases.items() for alias in same} | dict(weights)


def _from_folder(where: str, *, hub: bool, model_module: str | None) -> PretrainedFolder:
    """Load a folder, or a repository of the Hugging Face hub."""
    if not hub:
        config_file = Path(where) / constants.CONFIG_NAME
        if config_file.is_file():
            _require_json_object(config_file)
        return PretrainedFolder.from_pretrained(where, model_module=model_module)
    with usage_error(OSError, HFValidationError, about=f"cannot load {where!r} from the Hugging Face hub"):
        return PretrainedFolder.from_pretrained(where, model_module=model_module)


def _require_json_object(path: Path) -> None:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise UsageError(f"{str(path)!r} is not valid JSON: repair it, or export the model again ({error})") from error
    if not isinstance(content, dict):
        raise UsageError(
            f"{str(path)!r} must hold a JSON object, but holds a {type(content).__name__}: export the model again"
        )


def _file(model_id: str, name: str, hub: Mapping[str, Any]) -> Path:
    folder = Path(model_id)
    path = folder / name if folder.is_dir() else Path(hf_hub_download(model_id, name, **hub))
    if not path.is_file():
        raise UsageError(f"{model_id!r} has no {name}, which its configuration needs: export the model again")
    return path


def _from_checkpoint(path: str | Path, model_module: str | None) -> PretrainedFolder:
    content = checkpoint_format.read(path)
    added = checkpoint_format.ours(content)
    checkpoint_format.require_intact(path)
    assert isinstance(content, dict)
    model: SegmentModel = SegmentModel.from_config(added["model"], model_module=model_module)
    prefix = "model."
    weights = {name.removeprefix(prefix): weight for name, weight in content["state_dict"].items()}
    load_weights(model, weights)
    return PretrainedFolder(model, tokenizer=added["tokenizer"])
