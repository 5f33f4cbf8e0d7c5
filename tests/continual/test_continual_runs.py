"""Runs from the command line: every method, resumed runs, what is refused, and the shipped configurations."""

import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import yaml
from conftest import Outcome, write_small
from identical import assert_identical
from lightning import LightningModule, Trainer, seed_everything
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from memformer_pl.callbacks import LastCheckpoint
from memformer_pl.checkpoints.format import KEY
from memformer_pl.continual import command_line
from memformer_pl.continual.backbones import ConvNet
from memformer_pl.continual.exemplars import METHODS
from memformer_pl.continual.images import Digits
from memformer_pl.continual.sequence import TaskSequence
from memformer_pl.continual.task import ContinualTask
from memformer_pl.errors import UsageError
from memformer_pl.sweeps import rows, runner, tables
from memformer_pl.training.checkpoint_io import CheckpointFiles

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
ROWS = EXPERIMENTS / "continual" / "rows.yaml"
TOLD = [*(EXPERIMENTS / "continual").glob("*.*"), *(EXPERIMENTS.parent / "memformer_pl").rglob("*.md")]
pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual:UserWarning"),
    # frozen parts are in evaluation mode, also in a run that resumes
    pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode:UserWarning"),
]
BUDGET = 9_000


@pytest.fixture
def learn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> Callable[..., Outcome]:
    """Run the command line in this process."""
    monkeypatch.setattr("sys.argv", ["continual"])

    def run(*args: object) -> Outcome:
        code: int | str | None = 0
        try:
            command_line.main([str(arg) for arg in args])
        except SystemExit as stopped:
            code = stopped.code
        printed = "".join(capsys.readouterr()) + caplog.text
        return Outcome(code, [line for line in printed.splitlines() if line.startswith("error:")], printed)

    return run


def task(method: str = "memo", **options: Any) -> ContinualTask:
    keeps = METHODS[method].keeps == "exemplars"
    backbone = ConvNet(shallow=[4], deep=[6])
    return ContinualTask(backbone=backbone, method=method, budget=BUDGET if keeps else None, **options)


def digits(**options: Any) -> TaskSequence:
    given = {"tasks": [[0, 1], [2], [3, 4]], "per_class": 20, "tested_per_class": 5, "epochs": 2, "batch_size": 16}
    return TaskSequence(images=Digits(), **{**given, **options})


def fit(
    module: LightningModule,
    data: TaskSequence,
    folder: Path,
    *,
    plugins: Any = None,
    ckpt_path: Any = None,
    **options: Any,
) -> Trainer:
    seed_everything(0, verbose=False)
    trainer = Trainer(
        **{"max_epochs": 1, "callbacks": [LastCheckpoint(seconds=0.0)], "logger": False, **options},
        accelerator="cpu",
        plugins=plugins,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


class Copies(CheckpointFiles):
    """Keeps a copy of every file that is written, under its number of batches."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: object = None) -> None:
        super().save_checkpoint(checkpoint, path, storage_options)
        shutil.copy(path, Path(path).with_name(f"{checkpoint['global_step']}.copy"))


def final(folder: Path) -> dict[str, Any]:
    (path,) = folder.rglob("last.ckpt")
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_resumes_after_any_batch_ends_as_one_that_was_never_stopped(method: str, tmp_path: Path) -> None:
    whole = task(method)
    trainer = fit(whole, digits(), tmp_path / "whole", plugins=[Copies()])
    copies = sorted(tmp_path.rglob("*.copy"), key=lambda path: int(path.stem))
    steps = sum(trainer.datamodule.steps())  # type: ignore[attr-defined]
    assert [int(path.stem) for path in copies] == list(range(1, steps + 1))
    expected = final(tmp_path / "whole")
    assert len(expected[KEY]["continual"]["accuracies"]) == 3
    ends = trainer.datamodule.steps()  # type: ignore[attr-defined]
    # around the end of a task, the beginning of the next, and before the last batch
    for step in {ends[0] - 1, ends[0], ends[0] + 1, sum(ends[:2]), sum(ends[:2]) + 1, steps - 1}:
        folder, again = tmp_path / f"from_{step}", task(method)
        fit(again, digits(), folder, ckpt_path=tmp_path / "whole" / "checkpoints" / f"{step}.copy")
        assert again.accuracies == whole.accuracies
        found = final(folder)
        for part in ("state_dict", "optimizer_states", KEY, "TaskSequence"):
            assert_identical(found[part], expected[part], f"{step}/{part}")


@pytest.mark.parametrize("method", ["memo", "der"])
def test_a_run_leaves_frozen_parts_bit_for_bit_as_their_tasks_left_them(method: str, tmp_path: Path) -> None:
    data = digits()
    fit(task(method), data, tmp_path, plugins=[Copies()])
    copies = [
        torch.load(tmp_path / "checkpoints" / f"{step}.copy", weights_only=True) for step in np.cumsum(data.steps())
    ]
    first, second, last = (copy["state_dict"] for copy in copies)
    for number, then in ((0, first), (1, second)):
        names = [name for name in then if name.startswith(f"net.parts.{number}.")]
        assert any(name.endswith("running_var") for name in names)
        assert all(torch.equal(last[name], then[name]) for name in names)
    assert not any(torch.equal(last[name], second[name]) for name in second if name.startswith("net.head"))
    shared = [name for name in first if name.startswith("net.shallow.") and name.endswith("weight")]
    assert bool(shared) == (method == "memo")
    assert not any(torch.equal(last[name], first[name]) for name in shared)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_stored_fits_the_budget_and_each_class_has_as_many_exemplars(method: str, tmp_path: Path) -> None:
    module, data = task(method), digits(per_class=40)
    fit(module, data, tmp_path)
    counts = [len(kept) for kept in data.exemplars]
    facts = module.facts({})
    assert facts["exemplars"] == sum(counts)
    assert facts["stored_bytes"] == module.net.stored_bytes(3) + 64 * sum(counts)
    if METHODS[method].keeps == "exemplars":
        room = (BUDGET - module.net.stored_bytes(3)) // 64
        assert counts == [room // 5] * 5
        assert 0 < counts[0] < 40
        assert BUDGET - 64 * 5 < facts["stored_bytes"] <= BUDGET
    else:
        assert counts == [0 if method == "fine_tuning" else 40] * 5
    assert set(module.results()) == {"test/after/1", "test/after/2", "test/after/3", "test/last", "test/mean"}
    assert module.results()["test/mean"] == pytest.approx(np.mean(module.accuracies))


def test_alignment_may_be_left_out(tmp_path: Path) -> None:
    reached = []
    for align in (True, False):
        module = task(align=align)
        fit(module, digits(tasks=[[0, 1], [2]]), tmp_path / str(align))
        norms = module.net.head.weight.detach().norm(dim=1)
        reached.append((module.accuracies[0], float(norms[:2].mean() / norms[2:].mean())))
    (first, aligned), (other, plain) = reached
    assert first == other
    assert aligned == pytest.approx(1)
    assert plain != pytest.approx(1)


def test_old_digits_are_forgotten_without_exemplars_and_kept_with_all_images(tmp_path: Path) -> None:
    reached = {}
    for method in ("fine_tuning", "joint"):
        module = task(method)
        fit(module, digits(tasks=[[0, 1], [2, 3]], per_class=100, tested_per_class=30, epochs=6), tmp_path / method)
        reached[method] = module.accuracies
    assert min(reached["fine_tuning"][0], *reached["joint"]) > 0.9
    assert reached["fine_tuning"][1] < 0.6


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """Options of a run of a second."""
    return [
        *("--config=continual/digits", "--model.budget=9000", "--data.tasks=[[3,1],[4]]", "--data.per_class=20"),
        *("--data.epochs=2", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
        *("--model.backbone.shallow=[4]", "--model.backbone.deep=[6]", f"--trainer.logger.save_dir={tmp_path}"),
        "--trainer.log_every_n_steps=1",
    ]


def test_a_run_from_the_command_line_has_a_record_and_its_checkpoint_is_tested(
    learn: Callable[..., Outcome], small: list[str], tmp_path: Path
) -> None:
    outcome = learn("fit", *small, "--trainer.callbacks+=RunRecord")
    assert outcome.code == 0, outcome.output
    assert "memo: a model of 2,000 bytes, and room for 109 exemplars of 64 bytes" in outcome.output
    assert "Task 2 of 2: accuracy" in outcome.output
    (path,) = tmp_path.rglob("record.json")
    record = json.loads(path.read_text())
    assert (record["steps"], record["images"], record["exemplars"]) == (8, 2 * (40 + 20 + 40), 60)
    logged = EventAccumulator(str(path.parent)).Reload().Scalars("test/accuracy")
    assert [event.value for event in logged] == pytest.approx([record["test/after/1"], record["test/last"]])
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    tested = ["test", *small, f"--ckpt_path={checkpoint}", "--trainer.callbacks+=RunRecord"]
    other = learn(*tested, "--data.tasks=[[3,4],[1]]")
    assert other.code == 1
    assert "other data: tasks (was [[3, 1], [4]], is [[3, 4], [1]])" in other.errors[0]
    outcome = learn(*tested, "--data.epochs=3", "--data.per_class=3", "--model.budget=10000")
    assert outcome.code == 0, outcome.output
    plain = re.sub(r"\x1b\[[\d;]*m", "", outcome.output)  # in colours after a test with a terminal
    (shown,) = re.findall(r"test/accuracy\W+([\d.]+)", plain)
    assert float(shown) == pytest.approx(record["test/last"], abs=1e-6)


def test_a_run_that_resumes_from_the_command_line_goes_on(
    learn: Callable[..., Outcome], small: list[str], tmp_path: Path
) -> None:
    assert learn("fit", *small, "--trainer.limit_train_batches=7").code == 0
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    refused = learn("fit", *small)
    assert refused.code == 1
    assert "is the checkpoint of another run at step 7, which this run would replace" in refused.errors[0]
    checkpoint.rename(tmp_path / "begun.ckpt")
    other = learn("fit", *small, "--model.method=der", f"--ckpt_path={tmp_path / 'begun.ckpt'}")
    assert other.code == 1
    assert "another network, and cannot be loaded: method (was 'memo', is 'der')" in other.errors[0]
    wider = learn("fit", *small, "--model.backbone.deep=[7]", f"--ckpt_path={tmp_path / 'begun.ckpt'}")
    assert "deep (was [6], is [7])" in wider.errors[0]
    other = learn("fit", *small, "--data.seed=1", f"--ckpt_path={tmp_path / 'begun.ckpt'}")
    assert "the checkpoint was written with other data: seed (was 0, is 1)" in other.errors[0]


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--model.budget=1999"], 2, "memo stores a model of 2,000 bytes, more than the budget of 1,999: raise budget"),
        (["--model.method=der"], 0, ""),
        (["--model.method=der", "--model.budget=2100"], 2, "der stores a model of 2,176 bytes, more than the budget"),
        (["--model.method=replay", "--model.budget=null"], 2, "replay needs a budget: the bytes of its model, 1,088"),
        (["--model.method=joint"], 2, "joint keeps everything, whatever the budget: set budget to null, got 9,000"),
        (["--data.tasks=[[0,1],[1]]"], 2, "class 1 is in tasks 0 and 1: remove it from one"),
        (["--data.tasks=[[0],[]]"], 2, "task 1 has no classes: remove it"),
        (["--data.tasks=[[10]]"], 2, "task 0 has class 10, but classes are numbered from 0 to 9"),
        (
            ["--trainer.max_epochs=3"],
            2,
            "trainer.max_epochs must be 1, which is all tasks, got 3: data.epochs says how",
        ),
        (["--trainer.devices=2"], 2, "tasks are learned in one process, got 2: set trainer.devices to 1"),
        (["--trainer.accumulate_grad_batches=2"], 2, "trainer.accumulate_grad_batches is 2, which is not supported"),
        (["--model.learning_rate=-1"], 2, "learning_rate must be at least 0, got -1.0"),
        (["--model.method=memoo"], 2, "memoo"),
        (["--data.images=Digit"], 2, "there is no class 'Digit'. Did you mean Digits?"),
        (["--model.learning_rate=1e30"], 1, "training has diverged: the loss of task 1 is"),
    ],
)
def test_mistakes_are_reported_in_a_line(
    options: list[str], code: int, said: str, learn: Callable[..., Outcome], small: list[str], tmp_path: Path
) -> None:
    outcome = learn("fit", *small, *options, "--trainer.callbacks+=RunRecord")
    assert outcome.code == code, outcome.output
    if code:
        (line,) = outcome.errors
        assert said in line
    records = [json.loads(path.read_text()) for path in tmp_path.rglob("record.json")]
    assert [record.get("diverged", False) for record in records] == [bool(code)] * (code < 2)


def test_checkpoints_of_the_two_programs_are_not_mixed_up(
    learn: Callable[..., Outcome],
    command: Callable[..., Outcome],
    small: list[str],
    texts: Path,
    pack_cache: Path,
    tmp_path: Path,
) -> None:
    assert learn("fit", *small, "--trainer.limit_train_batches=1").code == 0
    (ours,) = tmp_path.rglob("last.ckpt")
    theirs = write_small(tmp_path, texts, pack_cache)
    words = [f"--config={theirs}", f"--trainer.logger.init_args.save_dir={tmp_path / 'other'}"]
    refused = command("fit", *words, f"--ckpt_path={ours}")
    assert (refused.code, len(refused.errors)) == (1, 1)
    assert "the checkpoint holds another model, and cannot be loaded: class (was 'memformer_pl.con" in refused.errors[0]
    assert command("fit", *words).code == 0
    (checkpoint,) = (tmp_path / "other").rglob("last.ckpt")
    refused = learn("test", *small, f"--ckpt_path={checkpoint}")
    assert (refused.code, len(refused.errors)) == (1, 1)
    assert "the checkpoint holds a sequence model, not a network of this command" in refused.errors[0]


def test_the_data_must_fit(tmp_path: Path) -> None:
    module = ContinualTask(backbone=ConvNet(channels=3), method="joint")
    with pytest.raises(UsageError, match="images have 1 channels, the backbone takes 3"):
        fit(module, digits(), tmp_path)
    small = ContinualTask(backbone=ConvNet(shallow=[8, 16], deep=[32, 32]), method="joint")
    told = r"images have \(8, 8\) pixels, and the backbone halves rows and columns 3 times, which needs 16"
    with pytest.raises(UsageError, match=told):
        fit(small, digits(), tmp_path)
    with pytest.raises(TypeError, match="ContinualTask needs a TaskSequence as datamodule, got NoneType"):
        fit(task(), None, tmp_path)


def test_a_checkpoint_is_loaded_without_its_run(tmp_path: Path) -> None:
    module = task()
    fit(module, digits(), tmp_path)
    (path,) = tmp_path.rglob("last.ckpt")
    loaded = ContinualTask.load_from_checkpoint(path, backbone=ConvNet(shallow=[4], deep=[6]), budget=BUDGET)
    assert loaded.net.sizes == [2, 1, 2]
    assert_identical(dict(loaded.state_dict()), dict(module.state_dict()))
    assert loaded.accuracies == module.accuracies


def cases() -> Iterator[Any]:
    """One row of each method; the others differ in their budgets."""
    seen = set()
    for row in rows.read(ROWS).rows:
        method = row.stacked["model"]["method"]
        yield pytest.param(row.name, marks=pytest.mark.slow if method in seen else ())
        seen.add(method)


@pytest.mark.parametrize("name", list(cases()))
def test_rows_take_a_step(name: str, learn: Callable[..., Outcome], tmp_path: Path) -> None:
    folder, random = tmp_path / "data", np.random.default_rng(0)
    folder.mkdir()
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    for split in ("train", "test"):
        images = [Image.fromarray(random.integers(0, 256, (28, 28), dtype=np.uint8)) for _ in range(20)]
        made = datasets.Dataset.from_dict({"image": images, "label": [*range(10)] * 2}, features=features)
        made.to_parquet(folder / f"{split}.parquet")
    (row,) = (row for row in rows.read(ROWS).rows if row.name == name)
    (tmp_path / "row.yaml").write_text(yaml.safe_dump(dict(row.override)))
    outcome = learn(
        "fit",
        *(f"--config={path}" for path in (*row.configs, tmp_path / "row.yaml")),
        *("--trainer.limit_train_batches=1", f"--data.images.path={folder}", "--trainer.log_every_n_steps=1"),
        *(f"--trainer.logger.save_dir={tmp_path / 'runs'}", "--trainer.callbacks+=RunRecord", "--data.seed=3"),
        *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
    )
    assert outcome.code == 0, outcome.output
    (record,) = tmp_path.rglob("record.json")
    assert json.loads(record.read_text())["steps"] == 1


def test_photographs_and_a_residual_network_take_steps(learn: Callable[..., Outcome], tmp_path: Path) -> None:
    folder, random = tmp_path / "data", np.random.default_rng(0)
    folder.mkdir()
    features = datasets.Features(img=datasets.Image(), fine_label=datasets.Value("int64"))
    for split in ("train", "test"):
        images = [Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(8)]
        made = datasets.Dataset.from_dict({"img": images, "fine_label": [7, 99] * 4}, features=features)
        made.to_parquet(folder / f"{split}.parquet")
    outcome = learn(
        *("fit", "--config=continual/mnist", "--data.images=CIFAR100", f"--data.images.path={folder}"),
        *("--model.backbone=ResNet", "--model.backbone.blocks=1", "--data.tasks=[[99],[7]]", "--model.budget=1000000"),
        *("--data.epochs=1", f"--trainer.logger.save_dir={tmp_path / 'runs'}", "--trainer.callbacks+=RunRecord"),
        *("--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false"),
    )
    assert outcome.code == 0, outcome.output
    (record,) = tmp_path.rglob("record.json")
    found = json.loads(record.read_text())
    assert (found["steps"], found["images"], found["exemplars"]) == (2, 12, 8)
    assert found["model"]["channels"] == 3


def told() -> list[str]:
    """Every command of this program on a page or in a configuration."""
    found = []
    for path in TOLD:
        text = path.read_text(encoding="utf-8")
        found += re.findall(r"python -m memformer_pl\.continual ([^`#&\n]*)", text)
    return sorted({command.strip() for command in found if "{" not in command and "|" not in command})


def test_commands_are_told() -> None:
    assert {"fit --config continual/digits", "fit --config continual/mnist"} <= set(told())


@pytest.mark.parametrize("words", told())
def test_every_command_of_a_page_is_one_that_the_parser_accepts(words: str, learn: Callable[..., Outcome]) -> None:
    outcome = learn(*shlex.split(words.rstrip(".,;:")), "--print_config")
    assert outcome.code == 0, outcome.errors


@pytest.mark.parametrize("path", sorted((EXPERIMENTS / "continual").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_configuration_begins_with_its_question_and_says_what_it_costs(path: Path) -> None:
    assert path.read_text().startswith("# Question:")
    assert "\n# Cost:" in path.read_text()


def test_a_sweep_trains_the_rows_of_this_program(tmp_path: Path) -> None:
    table = rows.read(ROWS)
    run = runner.Run(table, table.rows[0], 3, tmp_path)
    run.folder.mkdir(parents=True)
    assert run.command([])[1:4] == ["-m", "memformer_pl.continual", "fit"]
    assert run.command([])[0] == sys.executable


def test_the_page_of_the_table_has_its_columns_and_the_figure_its_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXPERIMENTS / "continual")
    sys.modules.pop("figure", None)
    from figure import curves, main

    table = rows.read(ROWS)._replace(ledger=tmp_path / "continual.jsonl")
    lines = []
    for row in table.rows:
        for seed in (0, 1):
            line = {"row": row.name, "seed": seed, "fingerprint": row.fingerprint, "parameters": 1000}
            stored = {"stored_bytes": 299_900, "exemplars": 120, "processor_seconds": 30.0}
            after = {f"test/after/{number}": 0.125 for number in (2, 3, 4)}
            lines.append({**line, **stored, **after, "test/last": 0.25 + seed / 2, "test/mean": 0.5})
    table.ledger.write_text("\n".join(map(json.dumps, lines)))
    text = tables.markdown(table)
    heads = ["after 5 tasks", "after 4", "after 3", "after 2", "mean over tasks", "difference", "seeds", "parameters"]
    assert text.splitlines()[0].split(" | ")[1:] == [*heads, "KB stored", "exemplars", "minutes |"]
    shown = (
        "| Fine-tuning | 0.500 ± 0.250 | 0.125 ± 0.000 | 0.125 ± 0.000 | 0.125 ± 0.000 | 0.500 ± 0.000 |  | 2 | 1,000 |"
    )
    assert f"{shown} 300 | 120 | 0.5 |" in text
    found = curves(tables.outcomes(table))
    budgets = [300_000, 500_000, 1_000_000, 2_000_000]
    titles = ["Fine-tuning", "Replay", "DER", "DER without alignment", "MEMO", "MEMO without alignment"]
    assert list(found) == [*titles, "Joint training"]
    assert [curve.budgets for curve in found.values()] == [[], *[budgets] * 5, []]
    assert [len(curve.reached) for curve in found.values()] == [1, *[4] * 5, 1]
    monkeypatch.setattr(rows, "read", lambda _: table)
    main("any", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    sys.modules.pop("figure", None)
