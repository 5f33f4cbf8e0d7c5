"""A user's own model works like ours; its code is run only if the user names its module."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from trained import write_folder

import memformer_pl
from memformer_pl import SegmentModel, SegmentTask
from memformer_pl.checkpoints.pretrained import load_pretrained, save_pretrained
from memformer_pl.contract.config import find_class, import_path
from memformer_pl.data import Bytes, Document, Files, GreyValues, pack
from memformer_pl.models import Transformer

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")

SIZES = {"vocab_size": 256, "segment_length": 8, "dim": 8, "heads": 2, "layers": 1}
CODE = """
from pathlib import Path
from memformer_pl.models import Transformer
Path("trace").touch()
class Rnn(Transformer):
    "A model of one's own."
class Outer:
    class Inner(Transformer):
        "One inside a class."
class NoModel:
    pass
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with the module ``my_model`` and the package ``mine``; what is imported is forgotten."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").touch()
    for name in ("my_model", "mine/rnn"):
        (tmp_path / f"{name}.py").write_text(CODE)
    (tmp_path / "broken.py").write_text("import no_such_module")
    (tmp_path / "wrong.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path not in ("", str(tmp_path))])
    monkeypatch.setattr("sys.modules", dict(sys.modules))
    return tmp_path


def folder_of(here: Path, path: str) -> Path:
    """An exported folder of a model with this import path, whose module was never imported in this process."""
    write_folder(here / "folder", Bytes())
    save_pretrained(Transformer(**SIZES), here / "folder", tokenizer="Bytes")
    config = json.loads((here / "folder" / "config.json").read_text())
    config["model"]["class"] = path
    (here / "folder" / "config.json").write_text(json.dumps(config))
    return here / "folder"


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("my_model.Rnn", "my_model"),
        ("my_model.Rnn", "my_model.Rnn"),
        ("my_model.Outer.Inner", "my_model"),
        ("my_model.Outer.Inner", "my_model.Outer"),
        ("mine.rnn.Rnn", "mine.rnn"),
        ("__main__.Rnn", "my_model"),
        ("__main__.Outer.Inner", "my_model"),
        ("an_earlier_name.Rnn", "my_model"),
        ("an_earlier_name.function.<locals>.Rnn", "my_model"),
    ],
)
def test_a_class_from_elsewhere_is_used_once_its_module_is_named(
    here: Path, command: Callable[..., Any], path: str, named: str
) -> None:
    folder = folder_of(here, path)
    words = ["--ckpt_path", folder, "--model_module", named]
    outcome = command("generate", *words, "--prompt", "some text", "--length", 3)
    assert outcome.code == 0
    assert (here / "trace").exists()
    assert command("predict", *words, "--documents", "my_model.py", "--out", "table.parquet").code == 0
    assert command("export", *words, "--out", "again").code == 0
    assert json.loads(Path("again/config.json").read_text())["model"]["class"].endswith(path.split(".")[-1])
    assert type(load_pretrained("again").model).__name__ == path.split(".")[-1]  # the module is imported by now


@pytest.mark.parametrize("name", ["generate", "predict", "export"])
def test_a_class_from_elsewhere_is_refused_unasked_and_its_code_is_not_run(
    here: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.syspath_prepend(here)
    folder = folder_of(here, "my_model.Rnn")
    options = {"generate": [], "predict": ["--documents", "my_model.py", "--out", "x"], "export": ["--out", "x"]}
    outcome = command(name, "--ckpt_path", folder, *options[name])
    assert outcome.code != 0
    assert "'my_model.Rnn', whose code is run only if you say so: add --model_module my_model, " in outcome.errors[0]
    with pytest.raises(ValueError, match="or in Python `import my_model` first"):
        load_pretrained(folder)
    assert not (here / "trace").exists()


@pytest.mark.parametrize(
    ("path", "named", "told"),
    [
        ("my_model.Gone", "my_model", "'my_model.Gone', but the module 'my_model' has no class 'Gone'"),
        ("my_model.NoModel", "my_model", "'my_model.NoModel' is not a model: a model is a subclass of SegmentModel"),
        ("my_model.Path.cwd", "my_model", "'my_model.Path.cwd' is not a model"),
        ("my_model.Rnn", "my_modle", "there is no module 'my_modle': give the name as in an import statement"),
        ("my_model.Rnn", "my_model.py", "there is no module 'my_model.py': give the name as in an import statement"),
        ("my_model.Rnn", "./my_model.py", "model_module must be a name as in an import statement, .* got './my_model"),
        ("my_model.Rnn", "", "model_module must be a name as in an import statement, .* got ''"),
        ("my_model.Rnn", "json", "but the module 'json' has no class 'Rnn': name the module that has it"),
        ("__main__.Rnn", None, "was defined in a script or a notebook. Define it here too, or put it into a module"),
        ("x.f.<locals>.Rnn", None, "which was defined inside a function: put it into a module, say my_model.py, and"),
        ("json.Rnn", None, "but the module 'json' has no class 'Rnn': add --model_module and the module that has it"),
        ("memformer_pl.models.Gone", "my_model", "which this version of memformer_pl does not have"),
    ],
)
def test_a_class_that_cannot_be_found_is_named_with_what_to_do(
    here: Path, command: Callable[..., Any], path: str, named: str | None, told: str
) -> None:
    options = [] if named is None else ["--model_module", named]
    outcome = command("export", "--ckpt_path", folder_of(here, path), "--out", "again", *options)
    assert (outcome.code, len(outcome.errors)) == (1, 1)
    assert re.search(told, outcome.errors[0])
    assert not Path("again").exists()


def test_what_a_module_raises_when_it_is_imported_keeps_its_traceback(here: Path) -> None:
    folder = folder_of(here, "broken.Rnn")
    for module, message in (("broken", "No module named 'no_such_module'"), ("wrong", "ZeroDivisionError")):
        words = [sys.executable, "-m", "memformer_pl", "export", "--ckpt_path", folder, "--out", "x"]
        done = subprocess.run([*words, "--model_module", module], capture_output=True, text=True)
        assert done.returncode == 1
        assert message in done.stderr
        assert f'{module}.py", line 1' in done.stderr


def test_a_checkpoint_of_a_model_of_ones_own_is_used_from_the_command_line(
    here: Path, command: Callable[..., Any], small: Path
) -> None:
    sizes = [f"--model.model.{name}={SIZES[name]}" for name in ("dim", "heads", "layers")]
    last = "run/version_0/checkpoints/last.ckpt"
    words = ["fit", "--config", small, "--trainer.max_steps=1", "--model.model=my_model.Rnn", *sizes]
    done = subprocess.run([sys.executable, "-m", "memformer_pl", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.load(last, weights_only=True)["memformer_pl"]["model"]["class"] == "my_model.Rnn"
    assert "--model_module my_model" in command("generate", "--ckpt_path", last, "--length", 3).errors[0]
    assert command("generate", "--ckpt_path", last, "--length", 3, "--model_module", "my_model").code == 0


SAME_NAME = """
import memformer_pl
from memformer_pl import SegmentModel
from memformer_pl.checkpoints.pretrained import load_pretrained, save_pretrained
class Memformer(memformer_pl.Memformer):
    pass
ours = memformer_pl.Memformer(vocab_size=5, segment_length=4, dim=8, heads=2)
own = Memformer(**{name: value for name, value in ours.config().items() if name != "class"})
for model, kind, path in ((ours, memformer_pl.Memformer, "memformer_pl.models"), (own, Memformer, "__main__")):
    assert model.config()["class"] == f"{path}.Memformer"
    save_pretrained(model, "folder")
    assert type(load_pretrained("folder").model) is type(SegmentModel.from_config(model.config())) is kind
assert own.differences(ours.config()) == ["class (was 'memformer_pl.models.Memformer', is '__main__.Memformer')"]
"""


def test_a_class_of_the_same_name_is_not_built_in_the_place_of_ours(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SAME_NAME], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_model_of_this_package_is_known_by_where_users_import_it_from() -> None:
    for name in memformer_pl.models.__all__:
        kind = getattr(memformer_pl.models, name)
        assert import_path(kind) == f"memformer_pl.models.{name}"
        # the module behind it will do, too
        assert find_class(import_path(kind)) is find_class(f"{kind.__module__}.{name}") is kind


def in_script(monkeypatch: pytest.MonkeyPatch, base: type[Transformer] = Transformer) -> type[Transformer]:
    """A class as a cell of a notebook defines it."""
    kind = type("Rnn", (base,), {"__module__": "__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "Rnn", kind, raising=False)
    return kind


def test_of_a_cell_that_was_run_twice_the_class_as_it_is_now_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = in_script(monkeypatch)
    model = first(**SIZES)
    save_pretrained(model, tmp_path)
    for base in (Transformer, first):
        now = in_script(monkeypatch, base)
        assert type(load_pretrained(tmp_path).model) is now
    monkeypatch.delattr(sys.modules["__main__"], "Rnn")
    with pytest.raises(ValueError, match="was defined in a script or a notebook"):
        load_pretrained(tmp_path)


def test_a_class_of_a_script_is_the_same_once_it_is_imported_but_never_one_of_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = in_script(monkeypatch)(**SIZES)
    config = model.config()
    assert model.differences({**config, "class": "my_model.Rnn"}) == []
    assert model.differences({**config, "class": "my_model.GreatRnn"}) != []
    assert model.differences({**config, "class": "memformer_pl.models.Rnn"}) != []
    monkeypatch.setattr(type(model), "__module__", "__mp_main__")
    assert model.config()["class"] == "__main__.Rnn"


class Plain(SegmentModel[Any]):
    """What a model of one's own needs at the least."""

    def initial_state(self, lanes: int) -> tuple[()]:
        return ()

    def step(self, segment: object, state: object) -> Any:
        raise NotImplementedError


class Sizes(Plain):
    def __init__(self, *, vocab_size: int = 5, segment_length: int = 4, sizes: Any = None) -> None:
        super().__init__(vocab_size=vocab_size, segment_length=segment_length)
        self.sizes = sizes


class Forgotten(Plain):
    def __init__(self, *, vocab_size: int = 5, segment_length: int = 4, width: int = 8) -> None:
        super().__init__(vocab_size=vocab_size, segment_length=segment_length)


class Replaced(Plain):
    def __init__(self, *, vocab_size: int = 5, segment_length: int = 4, dropout: float = 0.1) -> None:
        super().__init__(vocab_size=vocab_size, segment_length=segment_length)
        self.dropout = nn.Dropout(dropout)


class Open(Plain):
    def __init__(self, **options: Any) -> None:
        super().__init__(vocab_size=5, segment_length=4, **options)


class Positional(Plain):
    def __init__(self, vocab_size: int = 5, /, *sizes: int) -> None:
        super().__init__(vocab_size=vocab_size, segment_length=4)


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (Forgotten, r"Forgotten does not keep its argument 'width'.*: write `self\.width = width` in its constructor"),
        (Replaced, r"Replaced\.dropout holds a Dropout, but must hold the value of the argument 'dropout'"),
        (Open, r"the constructor of Open takes `\*\*options.*make each one a named argument"),
        (Positional, r"the constructor of Positional takes `vocab_size.*make each one a named argument"),
        (lambda: Sizes(sizes=Path("x")), r"Sizes\.sizes holds .*Path\('x'\), but must hold .* str or None, or a list"),
        (lambda: Sizes(sizes=torch.float64), r"Sizes\.sizes holds torch\.float64"),
        (lambda: Sizes(sizes=float("nan")), r"Sizes\.sizes holds nan"),
        (lambda: Sizes(sizes=[1, {2}]), r"Sizes\.sizes holds \{2\}"),
        (lambda: Sizes(sizes={1: 2}), r"Sizes\.sizes holds \{1: 2\}"),
    ],
)
def test_what_a_checkpoint_could_not_hold_is_refused_before_training(build: Callable[[], Any], told: str) -> None:
    model = build()
    with pytest.raises(ValueError, match=told):
        SegmentTask(model=model)


@pytest.mark.parametrize(
    "sizes", [3, -0.5, float("inf"), "text", True, None, [1, [2.5, "x"]], (1, 2), {"a": [1], "b": None}, np.int64(7)]
)
def test_values_of_a_configuration_survive_json_and_a_checkpoint(tmp_path: Path, sizes: object) -> None:
    model = Sizes(sizes=sizes)
    config = model.config()
    torch.save(config, tmp_path / "config")
    for again in (json.loads(json.dumps(config)), torch.load(tmp_path / "config", weights_only=True)):
        assert again == config
        assert model.differences(again) == []
        built = SegmentModel.from_config(again)
        assert type(built) is Sizes
        assert built.config() == config


def test_an_option_of_a_models_own_may_have_the_name_of_anything_in_the_folder(tmp_path: Path) -> None:
    model = Named(tokenizer=3, format=7)
    save_pretrained(model, tmp_path, tokenizer="Bytes")
    assert load_pretrained(tmp_path).model.config() == model.config()
    assert isinstance(load_pretrained(tmp_path).tokenizer, Bytes)


class Named(Plain):
    def __init__(self, *, tokenizer: int, format: int, vocab_size: int = 5, segment_length: int = 4) -> None:
        super().__init__(vocab_size=vocab_size, segment_length=segment_length)
        self.tokenizer, self.format = tokenizer, format
        self.weight = nn.Parameter(torch.zeros(1))


def test_a_bug_in_a_constructor_is_not_told_as_a_wrong_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Broken().config()
    monkeypatch.setattr(Broken, "broken", True)
    with pytest.raises(TypeError, match="unsupported operand"):
        SegmentModel.from_config(config)


class Broken(Plain):
    broken = False

    def __init__(self, *, vocab_size: int = 5, segment_length: int = 4) -> None:
        super().__init__(vocab_size=vocab_size, segment_length=segment_length)
        if self.broken:
            self.width = vocab_size + None  # type: ignore[operator]  # the bug


def test_a_model_without_sessions_is_told_before_it_reads_a_prompt(here: Path, command: Callable[..., Any]) -> None:
    folder = folder_of(here, "mute.Mute")
    (here / "mute.py").write_text(
        "from memformer_pl import SegmentModel\nfrom memformer_pl.models import Transformer\n"
        "class Mute(Transformer):\n    prefill, decode = SegmentModel.prefill, SegmentModel.decode\n"
    )
    words = ["--ckpt_path", folder, "--model_module", "mute"]
    outcome = command("generate", *words, "--prompt_file", "no_such_file")
    assert "Mute cannot generate: it does not implement prefill()" in outcome.errors[0]
    assert command("generate", *words, "--prompt", "text", "--length", 0, "--save_memory", "memory").code == 0
    assert command("predict", *words, "--documents", "mute.py", "--out", "table.parquet").code == 0


def test_a_corpus_of_the_same_name_is_packed_for_itself(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a text of some words")

    def packed(kind: type[Files]) -> str:
        cache = tmp_path / "cache"
        return pack(kind(paths=str(tmp_path / "*.txt")), Bytes(), validation=0.0, test=0.0, cache=cache).fingerprint

    class Capitals(Files):
        def documents(self) -> Iterator[Document]:
            yield from (each._replace(content=each.content.upper()) for each in super().documents())

    Capitals.__name__ = "Files"
    assert packed(Files) != packed(Capitals)
    assert packed(Files) == packed(Files)


def test_a_tokenizer_derived_from_bytes_is_not_kept_as_bytes() -> None:
    class Reversed(Bytes):
        def bytes_of(self, token: int) -> bytes:
            return bytes([255 - token])

    assert Bytes().serialize() == "Bytes"
    assert Reversed().serialize() is None
    assert type("Grey", (GreyValues,), {})(values=4).serialize() is None
