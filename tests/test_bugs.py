"""A bug keeps its traceback, in whoever's code it is; only an error raised for a user becomes one line."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Outcome
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException

from memformer_pl.data import Bytes, Corpus, Document, Files
from memformer_pl.errors import UsageError, usage_error
from memformer_pl.models import Memformer

BUGS = [
    ValueError("too many values to unpack (expected 2)"),
    TypeError("'NoneType' object is not iterable"),
    KeyError("memory"),
    IndexError("list index out of range"),
    AttributeError("'Encoded' object has no attribute 'y'"),
    ZeroDivisionError("division by zero"),
    FloatingPointError("overflow"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    MemoryError("no room"),
    FileNotFoundError(2, "No such file or directory", "weights.bin"),
    ModuleNotFoundError("No module named 'nowhere'"),
]
IN_A_RUN = MisconfigurationException("You can't `self.log()` here")
"""From a constructor this type reports wrong options; from a run, a bug."""
USERS = [MisconfigurationException("mode must be min or max"), ModuleNotFoundError("No module named 'wandb'")]
"""Exceptions whose type says that a user can correct the options or install a package, if a constructor raises them."""


class Planted:
    """Raises what a test has planted, from the place that it has planted it in."""

    bug: Exception | None = None
    place = ""


def come_to(place: str) -> None:
    if place == Planted.place:
        assert Planted.bug is not None
        raise Planted.bug


@pytest.fixture
def plant() -> Iterator[Callable[[Exception, str], None]]:
    """Plants an exception in a place."""

    def plant(bug: Exception, place: str) -> None:
        Planted.bug, Planted.place = bug, place

    yield plant
    Planted.bug, Planted.place = None, ""


class Model(Memformer):
    """A user's, with a bug."""

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        heads: int,
        segment_length: int = 8,
        slots: int = 4,
        encoder_layers: int = 1,
        decoder_layers: int = 1,
    ) -> None:
        sizes = {"slots": slots, "encoder_layers": encoder_layers, "decoder_layers": decoder_layers}
        super().__init__(vocab_size=vocab_size, dim=dim, heads=heads, segment_length=segment_length, **sizes)
        come_to("constructor of the model")

    def decoder_step(self, *args: object) -> object:
        come_to("model")
        return super().decoder_step(*args)  # type: ignore[arg-type]


class Watcher(Callback):
    """A user's, with a bug."""

    def __init__(self) -> None:
        come_to("constructor of a callback")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        come_to("callback")


class Texts(Corpus):
    """A user's, with a bug."""

    def documents(self) -> Iterator[Document]:
        come_to("corpus")
        for n in range(9):
            yield Document(f"document {n} ".encode() * 5, name=str(n))

    def identity(self) -> dict[str, object]:
        return {"place": Planted.place}


class Letters(Bytes):
    """A user's, with a bug."""

    def __init__(self) -> None:
        come_to("constructor of a tokenizer")


PLACES = [
    "constructor of the model",
    "constructor of a callback",
    "constructor of a tokenizer",
    "model",
    "callback",
    "corpus",
]


def fit(command: Callable[..., Outcome], small: Path, *more: str) -> Outcome:
    here = __name__
    return command(
        *("fit", f"--config={small}", f"--model.model={here}.Model", "--model.model.dim=16", "--model.model.heads=2"),
        *(f"--data.corpus={here}.Texts", f"--data.tokenizer={here}.Letters", f"--trainer.callbacks+={here}.Watcher"),
        *("--data.batch_size=2", "--data.interleave=1", *more),
    )


@pytest.mark.parametrize(
    ("bug", "place"),
    [
        *((bug, PLACES[n % len(PLACES)]) for n, bug in enumerate(BUGS)),
        *((BUGS[0], place) for place in PLACES[1:]),
        *((IN_A_RUN, place) for place in ("model", "callback", "corpus")),
    ],
    ids=lambda given: given if isinstance(given, str) else f"{type(given).__name__}: {given}"[:30],
)
def test_a_bug_keeps_its_traceback_wherever_it_is(
    command: Callable[..., Outcome], small: Path, plant: Callable[[Exception, str], None], bug: Exception, place: str
) -> None:
    plant(bug, place)
    with pytest.raises(type(bug)) as raised:
        fit(command, small)
    assert raised.value is bug
    assert raised.traceback[-1].name == "come_to"


@pytest.mark.parametrize("bug", USERS, ids=lambda bug: type(bug).__name__)
@pytest.mark.parametrize(("place", "name"), [("constructor of a callback", "Watcher"), (PLACES[2], "Letters")])
def test_a_constructor_reports_wrong_options_by_the_type_of_its_exception(
    command: Callable[..., Outcome],
    small: Path,
    plant: Callable[[Exception, str], None],
    bug: Exception,
    place: str,
    name: str,
) -> None:
    plant(bug, place)
    outcome = fit(command, small)
    assert (outcome.code, outcome.errors) == (2, [f"error: {name}: {bug}"])


@pytest.mark.parametrize("place", PLACES)
def test_what_users_code_raises_for_a_user_is_told_in_a_line(
    command: Callable[..., Outcome], small: Path, plant: Callable[[Exception, str], None], place: str
) -> None:
    plant(UsageError("the river is dry: dig a well"), place)
    outcome = fit(command, small)
    assert (outcome.code, outcome.errors) == (
        2 if "constructor" in place else 1,
        ["error: the river is dry: dig a well"],
    )
    assert "Traceback" not in outcome.output


def test_a_bug_in_the_packages_own_decoder_keeps_its_traceback(
    command: Callable[..., Outcome], small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(self: Memformer, segment: object, encoded: tuple[object, ...]) -> object:
        x, _present = encoded
        return x

    monkeypatch.setattr(Memformer, "decoder_step", decode)
    with pytest.raises(ValueError, match="too many values to unpack") as raised:
        command("fit", f"--config={small}")
    assert not isinstance(raised.value, UsageError)


@pytest.mark.parametrize("name", ["predict", "generate"])
def test_a_bug_keeps_its_traceback_when_a_model_is_used(
    command: Callable[..., Outcome], small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert command("fit", f"--config={small}").code == 0
    (path,) = tmp_path.rglob("last.ckpt")

    def broken(*_: object, **options: object) -> None:
        raise TypeError("'NoneType' object is not subscriptable")

    monkeypatch.setattr(Memformer, "_encode", broken)
    (tmp_path / "text.txt").write_text("a text")
    options = {
        "predict": [f"--documents={tmp_path / 'text.txt'}", f"--out={tmp_path / 'out.parquet'}"],
        "generate": ["--prompt=a text of more than a segment", "--length=2"],
    }
    with pytest.raises(TypeError, match="not subscriptable"):
        command(name, f"--ckpt_path={path}", *options[name])


def test_the_traceback_of_a_users_mistake_is_shown_where_it_is_asked_for(
    command: Callable[..., Outcome], small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for wrong, told in (
        (["--model.model.init_args.heads=3"], "heads must divide dim"),
        (["--ckpt_path=nowhere.ckpt"], "there is no checkpoint"),
    ):
        monkeypatch.setenv("MEMFORMER_DEBUG", "1")
        with pytest.raises(UsageError, match=told):
            command("fit", f"--config={small}", *wrong)
        monkeypatch.setenv("MEMFORMER_DEBUG", "0")
        (line,) = command("fit", f"--config={small}", *wrong).errors
        assert told in line


def test_an_exception_of_another_library_becomes_the_users_where_it_is_known_to_be() -> None:
    with (
        pytest.raises(UsageError, match="reading 'x': integer division") as raised,
        usage_error(ZeroDivisionError, about="reading 'x'"),
    ):
        _ = 1 // 0
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    with pytest.raises(KeyError), usage_error(ValueError, about="reading"):
        raise KeyError("x")
    with pytest.raises(UsageError, match=r"^mine$"), usage_error(ValueError, about="reading"):
        raise UsageError("mine")


class Wide(Memformer):
    """A user's, whose options are numbers of which the package knows nothing."""

    def __init__(self, *, vocab_size: int, dim: int, heads: int, rope_base: int = 10_000, pad_id: int = 0) -> None:
        super().__init__(vocab_size=vocab_size, dim=dim, heads=heads, slots=2, encoder_layers=1, decoder_layers=1)
        self.rope_base, self.pad_id = rope_base, pad_id


def test_numbers_of_users_models_are_theirs(command: Callable[..., Outcome], small: Path) -> None:
    model = [f"--model.model={__name__}.Wide", "--model.model.dim=16", "--model.model.heads=2"]
    options = ["--model.model.rope_base=10000000", "--model.model.pad_id=-100", "--data.seed=20240101"]
    outcome = command(
        "fit", f"--config={small}", *model, *options, "--trainer.max_steps=1", "--model.warmup_steps=2000000"
    )
    assert (outcome.code, outcome.errors) == (0, [])


def test_a_corpus_may_be_as_large_and_as_seeded_as_it_likes() -> None:
    from memformer_pl.data import Copy

    recall = Copy(segment_length=8, longest=4, examples=2_000_000, seed=20240101)
    assert next(iter(recall.documents())).content
    assert Files(paths=["x"] * 2_000_000).paths
