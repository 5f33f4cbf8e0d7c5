"""A model is handed over as a folder, or as the checkpoint of a run, and nothing else is needed to use it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS, irregular, losses_of, memformer, transformer
from safetensors.torch import load_file, save_file
from torch import nn
from trained import learned, write_folder

from memformer_pl.checkpoints.format import FORMAT, KEY
from memformer_pl.checkpoints.pretrained import load_pretrained, save_pretrained
from memformer_pl.data import Bytes
from memformer_pl.data.tokenizers.subwords import SerializedTokenizer
from memformer_pl.errors import UsageError
from memformer_pl.models import Transformer

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")


@pytest.mark.parametrize("name", MODELS)
def test_every_model_comes_back_from_its_folder_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    save_pretrained(model, tmp_path)
    again = load_pretrained(tmp_path).model
    assert type(again) is type(model)
    assert again.config() == model.config()
    assert not again.training
    for a, b in zip(losses_of(model.eval(), irregular(3)), losses_of(again, irregular(3)), strict=True):
        assert torch.equal(a, b)


def test_a_folder_is_read_without_lightning_and_its_configuration_by_people(tmp_path: Path) -> None:
    write_folder(tmp_path, Bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    model = config["model"]
    assert (model["class"], model["slots"], config["tokenizer"]) == ("memformer_pl.models.Memformer", 3, "Bytes")
    load = f"from memformer_pl.checkpoints.pretrained import load_pretrained; load_pretrained({str(tmp_path)!r})"
    code = f"import sys; {load}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "memformer_pl.models.memformer" in done.stdout.split()
    assert not {"lightning", "pytorch_lightning"} & set(done.stdout.split())


def test_the_tokenizer_goes_along_and_an_earlier_one_goes(tmp_path: Path) -> None:
    tokenizer = learned()
    write_folder(tmp_path, tokenizer)
    again = load_pretrained(tmp_path).tokenizer
    assert isinstance(again, SerializedTokenizer)
    assert again.encode("from here, é").tolist() == tokenizer.encode("from here, é").tolist()
    save_pretrained(memformer(), tmp_path)
    assert load_pretrained(tmp_path).tokenizer is None
    assert not (tmp_path / "tokenizer.json").exists()


def test_weights_in_half_precision_are_used_in_single_precision(tmp_path: Path) -> None:
    for given, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        save_pretrained(memformer().to(given), tmp_path)
        assert {parameter.dtype for parameter in load_pretrained(tmp_path).model.parameters()} == {expected}


def without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def with_config(**changed: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))

    return change


def with_model(**changed: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        with_config(model={**config["model"], **changed})(folder)

    return change


def without_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({name: weight for name, weight in weights.items() if name != "start"}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (without("config.json"), r"has no config\.json: give a folder that save_pretrained"),
        (without("model.safetensors"), r"has no model\.safetensors, which .*: export the model again"),
        (without("tokenizer.json"), r"has no tokenizer\.json, which .*: export the model again"),
        (lambda folder: (folder / "config.json").write_text("{"), "is not valid JSON: repair it, or export"),
        (lambda folder: (folder / "config.json").write_text("[1]"), "must hold a JSON object, but holds a list"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff"), "is not valid JSON"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), r"is not a tokenizer\.json"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"PK\x03\x04"),
            "is damaged, or is not a file of weights: export",
        ),
        (without_a_weight, r"the weights do not fit the memformer_pl\.models\.Memformer of the configuration.*start"),
        (with_model(dim=16, ffn_dim=4), r"the weights do not fit the memformer_pl\.models\.Memformer"),
        (with_model(slotz=3), r"does not fit the constructor of memformer_pl\.models\.Memformer: .*slotz"),
        (with_model(heads=3), "heads must divide dim"),
        (with_model(**{"class": "Memformer"}), "must be an import path such as .*, got 'Memformer'"),
        (with_model(**{"class": ["Memformer"]}), "must be an import path such as"),
        (with_model(**{"class": "memformer_pl.models.Memfromer"}), "which this version of memformer_pl does not have"),
        (with_model(**{"class": "memformer_pl.contract.model.SegmentModel"}), "SegmentModel, which is abstract"),
        (with_model(**{"class": "os.system"}), r"'os\.system' is not a model: a model is a subclass of SegmentModel"),
        (with_model(**{"class": "os.path.join"}), r"'os\.path\.join' is not a model"),
        (with_model(**{"class": "torch.nn.Linear"}), r"'torch\.nn\.Linear' is not a model"),
        (with_config(model="Memformer"), "must hold a model, and the name of its tokenizer or null: export"),
        (with_config(format=3), "has format 3, this version reads format 4: use the version that wrote it, or export"),
        (with_config(format=None), "has format None, this version reads format 4"),
        (with_config(tokenizer="Byte"), r"is not a tokenizer\.json"),
        (with_config(tokenizer=["Bytes"]), "must hold a model, and the name of its tokenizer"),
    ],
)
@pytest.mark.filterwarnings("ignore:config.json not found")
def test_a_wrong_folder_is_told_from_a_right_one(tmp_path: Path, spoil: Callable[[Path], object], told: str) -> None:
    write_folder(tmp_path, learned())
    load_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=told):
        load_pretrained(tmp_path)


def test_what_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for missing in (str(tmp_path / "missing"), "some/where"):
        with pytest.raises(UsageError, match=r"there is no checkpoint '.*(missing|where)'"):
            load_pretrained(missing)
    for name in ("some/where", "no/such/name"):
        with pytest.raises(UsageError, match=f"cannot load '{name}' from the Hugging Face hub: "):
            load_pretrained(f"hf://{name}")


def test_a_repository_of_the_hub_is_read_like_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, asked = learned(), []
    model = write_folder(tmp_path, tokenizer)

    def download(repo_id: str, filename: str, **options: object) -> str:
        asked.append((repo_id, filename))
        return str(tmp_path / filename)

    for module in ("huggingface_hub.hub_mixin", "memformer_pl.checkpoints.pretrained"):
        monkeypatch.setattr(f"{module}.hf_hub_download", download)
    again = load_pretrained("hf://user/name")
    torch.testing.assert_close(again.model.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert again.tokenizer is not None
    assert again.tokenizer.serialize() == tokenizer.serialize()
    files = ("config.json", "model.safetensors", "tokenizer.json")
    assert asked == [("user/name", name) for name in files]


def test_a_loaded_model_is_saved_again_with_its_tokenizer(tmp_path: Path) -> None:
    write_folder(tmp_path / "first", learned())
    load_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md"):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()


def test_a_card_that_was_edited_is_not_replaced(tmp_path: Path) -> None:
    save_pretrained(memformer(), tmp_path)
    (tmp_path / "README.md").write_text("mine")
    save_pretrained(transformer(), tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert isinstance(load_pretrained(tmp_path).model, Transformer)


def test_a_checkpoint_alone_gives_the_model_and_the_tokenizer(
    command: Callable[..., Any], small: Path, tmp_path: Path
) -> None:
    options = ["--trainer.max_steps", "1", "--data.tokenizer", "BytePairs", "--data.tokenizer.vocab_size", "300"]
    corpus = ["--data.corpus", "Pydoc", "--data.validation", "0.1"]
    assert command("fit", "--config", small, *options, *corpus).code == 0
    path = tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    model, tokenizer = load_pretrained(path)
    assert model.config() == content[KEY]["model"]
    assert not model.training
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, content["state_dict"][f"model.{name}"])
    assert tokenizer is not None
    assert tokenizer.serialize() == content[KEY]["tokenizer"]
    assert tokenizer.decode(tokenizer.encode("for x in y")) == "for x in y"
    outcome = command("export", "--ckpt_path", path, "--out", tmp_path / "folder")
    assert (outcome.code, outcome.output) == (0, f"Written: {tmp_path / 'folder'}\n")
    exported = load_pretrained(tmp_path / "folder")
    assert exported.tokenizer is not None
    assert exported.tokenizer.encode("for x in y").tolist() == tokenizer.encode("for x in y").tolist()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), exported.model.parameters(), strict=True))
    torch.save({**content, KEY: {**content[KEY], "format": FORMAT - 1}}, path)
    with pytest.raises(
        ValueError, match=f"has format {FORMAT - 1}, this version reads format {FORMAT}, in which .*: use the"
    ):
        load_pretrained(path)


class Tied(Transformer):
    """A user's, in which one tensor has two names."""

    def __init__(self, *, vocab_size: int, dim: int, heads: int, segment_length: int = 8) -> None:
        super().__init__(vocab_size=vocab_size, dim=dim, heads=heads, layers=1, segment_length=segment_length)
        self.out = nn.Linear(dim, vocab_size, bias=False)
        self.out.weight = self.embedding.tokens.weight
        self.again = self.out


def test_a_tensor_with_several_names_is_loaded_under_all_of_them(tmp_path: Path) -> None:
    model = Tied(vocab_size=10, dim=8, heads=2)
    save_pretrained(model, tmp_path / "folder")
    loaded = load_pretrained(tmp_path / "folder").model
    assert loaded.out.weight is loaded.embedding.tokens.weight is loaded.again.weight
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_tensor_that_is_missing_is_not_taken_from_another_one(tmp_path: Path) -> None:
    model = Tied(vocab_size=10, dim=8, heads=2)
    model.out = nn.Linear(8, 10, bias=False)
    save_pretrained(model, tmp_path / "folder")
    weights = load_file(tmp_path / "folder" / "model.safetensors")
    save_file({name: weights[name] for name in weights if "norm" not in name}, tmp_path / "folder/model.safetensors")
    with pytest.raises(ValueError, match="the weights do not fit"):
        load_pretrained(tmp_path / "folder")
