"""A trained model and its tokenizer: from a checkpoint, from a folder, or from the Hugging Face hub; without Lightning.

A folder holds ``config.json`` (the import path of the model's class, the arguments of its constructor, and its
tokenizer), ``model.safetensors`` (the weights), ``tokenizer.json`` (the tokenizer, if it was learned) and a
``README.md``. It holds no code, and loading imports none that the user has not named.
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

import memformer_pl.models  # noqa: F401 - so that a configuration may name what is in it
from memformer_pl.checkpoints import format as checkpoint_format
from memformer_pl.contract import SegmentModel
from memformer_pl.contract.config import import_path
from memformer_pl.data.tokenizers.subwords import deserialize_tokenizer
from memformer_pl.data.tokenizers.tokenizer import Tokenizer
from memformer_pl.errors import UsageError, usage_error

TOKENIZER = "tokenizer.json"
FILES = (constants.CONFIG_NAME, constants.SAFETENSORS_SINGLE_FILE, TOKENIZER, "README.md")
"""What is in a folder."""
FORMAT = 3
"""Of ``config.json``; 3 has the names of version 0.2."""
HUB = "hf://"
"""How the name of a repository of the Hugging Face hub begins, which tells it from a path."""
CARD = """---
{{ card_data }}
---

A model of [memformer_pl](https://arxiv.org/abs/2010.06891); `config.json` says which. To read on with it:

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
    """None if the model was trained on numbers that were made elsewhere."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that :func:`load_pretrained` reads."""
        save_pretrained(self.model, folder, tokenizer=self.tokenizer.serialize() if self.tokenizer else None)


def load_pretrained(
    path: str | Path, *, device: str | torch.device = "cpu", model_module: str | None = None
) -> Pretrained:
    """The model, in evaluation mode, and the tokenizer of a checkpoint or of a folder.

    No code is run but that of ``model_module``: a class from outside this package is known once its module is imported.

    Args:
        path: A checkpoint, a folder that :func:`save_pretrained` wrote, or a repository of the Hugging Face hub, written
            ``hf://user/name``.
        device: Where the model is to be.
        model_module: The module that has the class of the model, where it is not of this package; it is imported.

    Raises:
        UsageError: There is nothing there, it is damaged, foreign or older, or the class of the model is not known;
            says which.
    """
    hub = str(path).startswith(HUB)
    if hub or Path(path).is_dir():
        opened = open_folder(str(path).removeprefix(HUB), hub=hub, model_module=model_module)
    else:
        opened = _from_checkpoint(path, model_module)
    model, written = opened.module, opened.tokenizer
    return Pretrained(model.to(device).eval(), None if written is None else deserialize_tokenizer(written))


def save_pretrained(model: SegmentModel, folder: str | Path, *, tokenizer: str | None = None) -> None:
    """Write weights and configuration of a model into a folder that :func:`load_pretrained` reads.

    Args:
        model: The model.
        folder: Is made.
        tokenizer: What ``Tokenizer.written`` returns for the tokenizer that the model was trained with.

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
    """A model and its tokenizer, with ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``.

    Args:
        module: The model.
        tokenizer: What ``Tokenizer.written`` returns; None if there is no tokenizer.
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
        model_module: str | None = None,
        tokenizer: object = None,
        **hub: Any,
    ) -> "PretrainedFolder":
        """The model of a folder or repository, in evaluation mode on the CPU, with its tokenizer.

        Args:
            model_id: The folder or repository.
            config: What is in its ``config.json``.
            model_module: A module of the user's that has the class; it is imported, which runs its code.
            tokenizer: The name of its tokenizer, from the configuration.
            hub: How to download.

        Raises:
            UsageError: Something is missing or damaged.
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
        model: SegmentModel = SegmentModel.from_config(config["model"], model_module=model_module)
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


def open_folder(where: str, *, hub: bool, model_module: str | None = None) -> PretrainedFolder:
    """What is in a folder, or in a repository of the Hugging Face hub.

    Args:
        where: The folder, or the repository's name.
        hub: Whether it is a repository.
        model_module: A module of the user's that has the class of the model; it is imported, which runs its code.

    Raises:
        UsageError: It is not there, or is not what it should be; says why.
    """
    if not hub:
        written = Path(where) / constants.CONFIG_NAME
        if written.is_file():
            _require_options(written)
        return PretrainedFolder.from_pretrained(where, model_module=model_module)
    with usage_error(OSError, HFValidationError, about=f"cannot load {where!r} from the Hugging Face hub"):
        return PretrainedFolder.from_pretrained(where, model_module=model_module)


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
