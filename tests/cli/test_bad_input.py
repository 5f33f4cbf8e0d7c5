"""Mistakes of a user are reported in one line, before any training: exit code 2 for a configuration, 1 for data."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from refusals import refused

from memformer_pl.checkpoints.format import FORMAT
from memformer_pl.cli.user_errors import explain, nearest
from memformer_pl.data import Bytes, Files, LaneLoader, Rollout
from memformer_pl.data.datamodule import SegmentData
from memformer_pl.data.packing.documents import PackedDocuments
from memformer_pl.models import Memformer
from memformer_pl.training.task import SegmentTask
from memformer_pl.training.trainer_checks import check_trainer, check_trainer_arguments

# the configuration names the folder of logs, so that a resumed run writes where the first one did
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")

MODEL = "--model.model.init_args"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # a misspelt key, on the command line
        (["--model.learnin_rate", "1"], "no option 'model.learnin_rate'. Did you mean model.learning_rate?"),
        (["--data.segment_lenght", "8"], "no option 'data.segment_lenght'. Did you mean data.segment_length?"),
        (["--trainer.max_step", "8"], "no option 'trainer.max_step'. Did you mean trainer.max_steps?"),
        ([f"{MODEL}.slotz", "8"], "no option 'slotz'. Did you mean slots?"),
        (["--data.tokenizer", "BytePairs", "--data.tokenizer.vocabb", "300"], "'vocabb'. Did you mean vocab_size?"),
        # and in a file: at the top, in a group, in a class
        ("trainr: {max_steps: 3}", "no option 'trainr.max_steps'. Did you mean trainer.max_steps?"),
        ("data: {segment_lenght: 3}", "no option 'data.segment_lenght'. Did you mean data.segment_length?"),
        ("model: {model: {init_args: {dimm: 3}}}", "no option 'dimm'. Did you mean dim?"),
        ("data: {corpus: {class_path: Files, init_args: {path: x}}}", "no option 'path'. Did you mean paths?"),
        ("data: {tokenizer: {class_path: BytePairs, init_args: {vocab: 300}}}", "'vocab'. Did you mean vocab_size?"),
        (
            "trainer: {callbacks: [{class_path: ModelCheckpoint, init_args: {dir_path: x}}]}",
            "no option 'dir_path'. Did you mean dirpath?",
        ),
        # a class that does not exist
        (
            "model: {model: {class_path: Memfomer}}",
            "model.model: there is no class 'Memfomer'. Did you mean Memformer?",
        ),
        ("model: {model: {class_path: memformer_pl.models.Memfomer}}", "Did you mean Memformer?"),
        ("model: {model: {class_path: nowhere.Memformer2}}", "Did you mean Memformer?"),
        ("data: {corpus: File}", "data.corpus: there is no class 'File'. Did you mean Files?"),
        ("data: {tokenizer: BytePair}", "data.tokenizer: there is no class 'BytePair'. Did you mean BytePairs?"),
        ("trainer: {callbacks: [{class_path: ClosingReports}]}", "'ClosingReports'. Did you mean ClosingReport?"),
        ("data: {corpus: memformer_pl.data.Bytes}", "data.corpus: Import path memformer_pl.data.Bytes does not"),
        # impossible values
        ([f"{MODEL}.heads", "3"], "heads must divide dim, got heads=3 and dim=16"),
        ([f"{MODEL}.dim", "wide"], "dim: expected int, got wide"),
        (
            ["--model.gradient", "bpt"],
            "model.gradient: expected 'replay', 'sparse_replay', 'bptt', 'checkpointed', 'truncated', got bpt",
        ),
        (
            ["--model.learning_rate", "-1"],
            "learning_rate must be above 0 and weight_decay at least 0, got learning_rate=-1.0",
        ),
        (["--model.gradient_clip_val", "-1"], "gradient_clip_val must be above 0, got -1.0"),
        (["--model.accumulate_grad_batches", "0"], "accumulate_grad_batches must be at least 1, got 0"),
        (["--data.batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["--data.validation", "0.7", "--data.test", "0.7"], "got validation=0.7 and test=0.7"),
        (["--data.tokenizer", "TokenizerFile", "--data.tokenizer.path", "no.json"], "no tokenizer file 'no.json'"),
        (["--trainer.precision", "7"], "trainer.precision: expected 64, 32, 16 or"),
        ("trainer: 3", "trainer: expected options, got 3"),
        # a value of the model that contradicts the data
        ([f"{MODEL}.vocab_size", "100"], "init_args.vocab_size is 100, but the data has 256: leave it out"),
        ([f"{MODEL}.segment_length", "4"], "init_args.segment_length is 4, but the data has 8: leave it out"),
        # a trainer under which the numbers would be wrong
        (["--trainer.precision", "16-mixed"], "precision '16-mixed' is not supported: choose one of 32-true"),
        (["--trainer.precision", "16"], "precision '16-mixed' is not supported"),
        (["--trainer.strategy", "fsdp"], "strategy 'fsdp' is not supported: choose auto or ddp"),
        (["--trainer.strategy", "deepspeed_stage_2"], "strategy 'deepspeed_stage_2' is not supported"),
        ("trainer: {strategy: {class_path: lightning.pytorch.strategies.FSDPStrategy}}", "strategy 'FSDPStrategy' is"),
        ("trainer: {strategy: {class_path: DeepSpeedStrategy}}", "strategy 'DeepSpeedStrategy' is"),
        (
            ["--trainer.strategy", "ddp", "--trainer.devices", "3"],
            "data.batch_size is 4, not a multiple of the 3 processes",
        ),
        (["--trainer.devices", "many"], "should be an int > 0"),
        (["--trainer.accelerator", "abacus"], "accelerator='abacus'"),
        # a file that is not a configuration
        ("a: [1,\n b: }", "wrong.yaml: line 2: not valid YAML: while parsing a flow"),
        ("- 3", "wrong.yaml: expected options, such as 'trainer: {max_steps: 100}', got a list"),
        ("", "wrong.yaml: expected options, such as 'trainer: {max_steps: 100}', got nothing"),
        (
            "model: {accumulate_grad_batches: 1}\nmodel: {accumulate_grad_batches: 2}",
            "line 2: model is given twice, first in line 1",
        ),
        ("data: {corpus: {class_path: 3}}", "line 1: class_path: expected the name of a class, got 3"),
        ("model: {model: {init_args: }}", "line 1: init_args: expected options, got nothing"),
        # null is a value, where an option has another by default
        ("model: {gradient_clip_val: }", "model.gradient_clip_val: expected float, got None"),
        # not a number, or far too large
        (["--model.learning_rate", ".nan"], "above 0 and weight_decay at least 0, got learning_rate=nan"),
        (["--model.weight_decay", ".inf"], "weight_decay=inf"),
        ([f"{MODEL}.temperature", ".nan"], "temperature must be above 0 and finite, got nan"),
        ([f"{MODEL}.encoder_layers", "1000000000"], "encoder_layers must be at most 1,048,576, got 1000000000"),
        (["--data.batch_size", "2000000"], "batch_size * interleave must be at most 1,048,576, got 4000000"),
        (
            ["--data.batch_size", "4096", "--data.interleave", "4096"],
            "batch_size * interleave must be at most 1,048,576",
        ),
        (["--data.seed", "-1"], "seed must be at least 0, got -1"),
        (["--trainer.check_val_every_n_epoch", "0"], "trainer.check_val_every_n_epoch must be at least 1, got 0"),
        # values that only the constructor refuses
        ("data: {tokenizer: {class_path: BytePairs, init_args: {vocab_size: 3}}}", "vocab_size must be at least 256"),
        ("trainer: {callbacks: [{class_path: ModelCheckpoint, init_args: {save_top_k: 3}}]}", "save_top_k=3"),
        (
            "trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitor: val_loss}}]}",
            "no metric 'val_loss' is logged that could be monitored: choose one of validation/loss",
        ),
        (
            ["--config", "missing.yaml"],
            "config: there is no file 'missing.yaml', and no shipped configuration has this name",
        ),
    ],
)
def test_an_invalid_configuration_is_refused_in_a_line(
    command: Callable[..., object], small: Path, tmp_path: Path, given: str | Sequence[str], expected: str
) -> None:
    if isinstance(given, str):
        (tmp_path / "wrong.yaml").write_text(given)
        given = ["--config", str(tmp_path / "wrong.yaml")]
    assert expected in refused(command("fit", "--config", small, *given), code=2)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["fitt"], "there is no command 'fitt'. Did you mean fit?"),
        ([], "a command is missing: one of fit, validate, test, analyze, generate, predict, evaluate, export"),
        (["fit"], "required: fit.model.model, fit.data.corpus"),
    ],
)
def test_a_command_that_is_not_complete_is_refused(
    command: Callable[..., object], given: list[str], expected: str
) -> None:
    assert expected in refused(command(*given), code=2)


@pytest.mark.parametrize(
    ("files", "paths", "expected"),
    [
        ({}, "missing.txt", "there is no such file or directory"),
        ({}, "", "the directory has no file in it"),
        ({"a.md": b"text"}, "*.txt", "no file matches the pattern"),
        ({"empty.txt": b""}, "", "no"),
        ({"a.txt": b"good text", "b.txt": b"good \xff bad"}, "", "b.txt is not UTF-8: byte 0xff at offset 5"),
    ],
)
def test_data_that_cannot_be_read_is_refused_in_a_line(
    command: Callable[..., object],
    small: Path,
    tmp_path: Path,
    files: dict[str, bytes],
    paths: str,
    expected: str,
) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    options = ["--data.corpus.paths", folder / paths, "--data.tokenizer", "BytePairs", "--data.cache", tmp_path]
    splits = ["--data.validation", "0", "--data.test", "0"]
    assert expected in refused(command("fit", "--config", small, *options, *splits), code=1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "there is no checkpoint"),
        (b"not a checkpoint", "is damaged, or is not a checkpoint"),
        (b"", "is damaged, or is not a checkpoint"),
        ({"state_dict": {}}, "was not written by memformer_pl"),
        (torch.zeros(2), "was not written by memformer_pl"),
        ({"memformer_pl": [1]}, "was not written by memformer_pl"),
        ({"memformer_pl": {"format": 99}}, f"has format 99, this version reads format {FORMAT}"),
    ],
)
def test_a_file_that_is_not_a_checkpoint_of_the_package_is_refused_in_a_line(
    command: Callable[..., object], small: Path, tmp_path: Path, content: object, expected: str
) -> None:
    path = tmp_path / "some.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    assert expected in refused(command("fit", "--config", small, "--ckpt_path", path), code=1)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_geometry_or_corpus_is_refused_with_both_values(
    command: Callable[..., object], small: Path, tmp_path: Path, texts: Path
) -> None:
    assert command("fit", "--config", small, "--trainer.max_steps", "1").code == 0
    (path,) = tmp_path.rglob("*.ckpt")
    (tmp_path / "another.txt").write_text("another corpus " * 20)
    another = ["--data.corpus.paths", f"[{texts}, {tmp_path / 'another.txt'}]"]
    for options, expected in (
        (
            [f"{MODEL}.dim", "8", f"{MODEL}.slots", "2"],
            "dim (was 16, is 8), ffn_dim (was 64, is 32), slots (was 4, is 2)",
        ),
        (["--data.segment_length", "16"], "segment_length (was 8, is 16)"),
        (["--data.tokenizer", "BytePairs"], "vocab_size (was 256, is 2048)"),
        (["--data.batch_size", "2", "--data.horizon", "3"], "batch_size (was 4, is 2), horizon (was 2, is 3)"),
        (another, "corpus (was '"),
    ):
        resumed = command("fit", "--config", small, "--ckpt_path", path, "--trainer.max_steps", "2", *options)
        assert expected in refused(resumed, code=1)


def test_the_nearest_name_is_found_by_its_last_part_or_by_all_of_it() -> None:
    known = ["model.learning_rate", "slots", "Memformer"]
    assert nearest("model.learnin_rate", known) == "model.learning_rate"
    assert nearest("learning_rate", known) == "model.learning_rate"
    assert nearest("model.model.init_args.slotz", known) == "slots"
    assert nearest("some.package.Memfomer", known) == "Memformer"
    assert nearest("nothing_like_it", known) is None


def test_an_explanation_prefers_names_that_fit_in_that_place() -> None:
    message = "Option 'pathz' is not accepted"
    assert explain(message, here=["path"], elsewhere=["paths"]).endswith("Did you mean path?")
    assert explain(message, here=["dim"], elsewhere=["paths"]).endswith("Did you mean paths?")
    assert explain(message, here=[], elsewhere=[]) == "there is no option 'pathz'"
    assert (
        explain('Parser key "a.b":\n  Something else\n  is wrong', here=[], elsewhere=[])
        == "a.b: Something else is wrong"
    )


# The same from Python.


def model(vocab_size: int = 256, segment_length: int = 8) -> Memformer:
    return Memformer(
        vocab_size=vocab_size,
        dim=8,
        heads=2,
        slots=2,
        encoder_layers=1,
        decoder_layers=1,
        segment_length=segment_length,
    )


def quiet_trainer(**options: object) -> Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(accelerator="cpu", max_steps=1, **quiet, **options)


@pytest.mark.parametrize(
    ("built", "expected"),
    [
        (model(vocab_size=100), "the data has vocab_size=256, the model vocab_size=100: build it with 256"),
        (model(segment_length=4), "the data has segment_length=8, the model segment_length=4: build it with 8"),
    ],
)
def test_a_model_that_is_too_small_for_its_data_is_refused(
    texts: Path, pack_cache: Path, built: Memformer, expected: str
) -> None:
    data = SegmentData(
        corpus=Files(paths=str(texts)), tokenizer=Bytes(), segment_length=8, validation=0.3, test=0.1, cache=pack_cache
    )
    with pytest.raises(ValueError, match=expected):
        quiet_trainer().fit(SegmentTask(model=built), datamodule=data)


def documents() -> PackedDocuments:
    return PackedDocuments.from_arrays([torch.arange(20).numpy()])


class OwnStrategy(SingleDeviceStrategy):
    """A class derived from a supported strategy."""


def test_an_unsupported_trainer_is_refused_as_an_object_too() -> None:
    loader = LaneLoader(documents(), batch_size=1, segment_length=8, horizon=2)
    half = MixedPrecision("16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match="precision '16-mixed' is not supported"):
        quiet_trainer(plugins=[half]).fit(SegmentTask(model=model()), loader, loader)
    held_out = LaneLoader(documents(), batch_size=1, segment_length=8, horizon=2, shuffle=False)
    quiet_trainer(strategy=OwnStrategy("cpu")).validate(SegmentTask(model=model()), held_out, verbose=False)
    for sharded in (FSDPStrategy(), ModelParallelStrategy()):
        trainer = quiet_trainer()
        trainer._accelerator_connector.strategy = sharded  # as with the GPUs that it needs
        with pytest.raises(ValueError, match=f"strategy '{type(sharded).__name__}' is not supported"):
            check_trainer_arguments(trainer)


class OwnDDP(DDPStrategy):
    """Likewise."""


@pytest.mark.parametrize("strategy", ["auto", "ddp", "ddp_spawn", DDPStrategy, SingleDeviceStrategy, OwnDDP])
@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "bf16-true"])
def test_a_supported_trainer_is_accepted(strategy: str | type, precision: str) -> None:
    check_trainer(strategy=strategy, precision=precision)


def of_a_function(device: str) -> SingleDeviceStrategy:
    """A class_path may name a function."""
    return OwnStrategy(device)


@pytest.mark.parametrize("name", ["OwnStrategy", "of_a_function"])
def test_a_strategy_of_a_user_is_known_by_what_it_is_derived_from(
    command: Callable[..., object], small: Path, tmp_path: Path, name: str
) -> None:
    own = f"{{class_path: {__name__}.{name}, init_args: {{device: cpu}}}}"
    (tmp_path / "own.yaml").write_text(f"trainer: {{strategy: {own}}}")
    outcome = command("fit", "--config", small, "--config", tmp_path / "own.yaml")
    assert outcome.code == 0, outcome


class OtherLoader:
    """Rollouts from a loader that does not say which documents it reads."""

    def __iter__(self) -> Iterator[Rollout]:
        return iter(LaneLoader(documents(), batch_size=1, segment_length=8, horizon=2))


def test_rollouts_from_another_loader_are_refused() -> None:
    with pytest.raises(TypeError, match="expected a LaneLoader"):
        quiet_trainer().validate(SegmentTask(model=model()), OtherLoader(), verbose=False)


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"learning_rate": 0.0}, "got learning_rate=0.0"),
        ({"gradient_clip_val": -1.0}, "gradient_clip_val must be above 0, got -1.0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
    ],
)
def test_an_invalid_task_is_refused(wrong: dict[str, object], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        SegmentTask(model=model(), **wrong)
