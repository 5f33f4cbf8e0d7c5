"""The command ``evaluate``: tasks that load from disk, on a small model."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome
from trained import learned, write_folder

from memformer_pl.data import Bytes, GreyValues, LaneLoader, PackedDocuments
from memformer_pl.models import Memformer
from memformer_pl.training.task import SegmentTask

Command = Callable[..., Outcome]
TASKS = Path(__file__).parents[2] / "experiments" / "evaluate"
DOCUMENTS = ["for x in y:\n    pass\n" * 9, "Ein Satz mit ä und 🤷. " * 15, "short one"]
NAMES = [
    {"context": f"{document}\n", "choices": ["one", "two", "a third", "four"], "answer": place % 4}
    for place, document in enumerate(DOCUMENTS)
]
LINES = [{"context": document, "rest": "x"} for document in DOCUMENTS]


def write_data(folder: Path) -> None:
    folder.mkdir(parents=True)
    rows = {"documents": [{"text": text} for text in DOCUMENTS], "names": NAMES, "lines": LINES}
    for name, each in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in each), encoding="utf-8")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Memformer:
    """A model in the folder ``folder`` of the current one, beside the data of the tasks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_data(Path("runs/evaluate"))
    return write_folder(Path("folder"), learned())


def words_of(*tasks: str) -> list[object]:
    return ["--ckpt_path", "folder", "--include_path", TASKS, "--tasks", *tasks]


def results_of(command: Command, *options: object) -> dict[str, Any]:
    outcome = command("evaluate", *options, "--out", "results.json")
    assert outcome.code == 0, outcome.errors
    assert "Written: results.json" in outcome.output
    read: dict[str, Any] = json.loads(Path("results.json").read_text())
    return read


def test_without_lm_eval_it_says_what_to_install(
    command: Command, model: Memformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "memformer_pl.inference.harness", raising=False)
    outcome = command("evaluate", *words_of("stdlib_names"))
    assert outcome.code == 1
    assert "evaluate needs lm-eval: pip install 'memformer-pl[evaluate]'" in outcome.errors[0]


@pytest.mark.parametrize("batch_size", [1, 8])
def test_the_bits_per_byte_of_documents_are_those_of_the_evaluation(
    command: Command, model: Memformer, batch_size: int
) -> None:
    pytest.importorskip("lm_eval")
    results = results_of(command, *words_of("stdlib_documents"), "--batch_size", batch_size)
    encoded = [learned().encode(text) for text in DOCUMENTS]
    loader = LaneLoader(PackedDocuments.from_arrays(encoded), batch_size=2, segment_length=8, horizon=3, shuffle=False)
    losses = SegmentTask(model=model).read_documents(loader, documents=len(DOCUMENTS))
    nats, tokens, _ = losses.compute().sum(1).tolist()
    size = sum(len(text.encode()) for text in DOCUMENTS)
    found = results["results"]["stdlib_documents"]["bits_per_byte,none"]
    nats_per_byte = found * torch.log(torch.tensor(2.0, dtype=torch.float64)).item()
    assert nats_per_byte * size / tokens == pytest.approx(nats / tokens, abs=1e-6)
    assert results["config"]["model_class"] == "memformer_pl.models.Memformer"
    assert results["config"]["ckpt_path"] == "folder"


def test_the_tasks_of_the_experiments_run(command: Command, model: Memformer) -> None:
    pytest.importorskip("lm_eval")
    tasks = sorted(path.stem for path in TASKS.glob("*.yaml"))
    assert tasks == ["stdlib_documents", "stdlib_lines", "stdlib_names"]
    results = results_of(command, *words_of(*tasks), "--limit", 2, "--num_fewshot", 0)
    assert {task: results["n-samples"][task]["effective"] for task in tasks} == dict.fromkeys(tasks, 2)
    found = results["results"]
    assert found["stdlib_names"]["acc,none"] in (0.0, 0.5, 1.0)
    assert found["stdlib_lines"]["exact_match,none"] in (0.0, 0.5, 1.0)


@pytest.mark.parametrize("task", sorted(TASKS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_task_begins_with_its_question(task: Path) -> None:
    assert task.read_text().startswith("# Question:")


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (["--tasks", "stdlib_name", "--include_path", TASKS], 2, "no task 'stdlib_name'. Did you mean stdlib_names?"),
        (["--tasks", "stdlib_names", "--include_path", "nowhere"], 1, "include_path must be a folder with task files"),
        (["--tasks", "stdlib_names", "--batch_size", 0], 2, "batch_size must be at least 1, got 0"),
        (["--tasks", "stdlib_names", "--limit", 0], 2, "limit must be at least 1, got 0"),
        (["--tasks", "stdlib_names", "--num_fewshot", -1], 2, "num_fewshot must be at least 0, got -1"),
        (["--tasks", "stdlib_names", "--out", "folder"], 2, "out must be a file, but 'folder' is a folder"),
        (["--tasks", "stdlib_names", "--task", "x"], 2, "there is no option 'task'. Did you mean tasks?"),
    ],
)
def test_mistakes_are_told_in_one_line(
    command: Command, model: Memformer, options: list[object], code: int, told: str
) -> None:
    pytest.importorskip("lm_eval")
    outcome = command("evaluate", "--ckpt_path", "folder", *options)
    assert outcome.code == code
    assert len(outcome.errors) == 1
    assert told in outcome.errors[0]


def test_a_file_of_tasks_is_not_overwritten(command: Command, model: Memformer) -> None:
    pytest.importorskip("lm_eval")
    shutil.copytree(TASKS, "tasks")
    given = ["--ckpt_path", "folder", "--include_path", "tasks", "--tasks", "stdlib_names"]
    outcome = command("evaluate", *given, "--out", "tasks/stdlib_names.yaml")
    assert outcome.errors == ["error: out would overwrite 'tasks/stdlib_names.yaml', an input: choose another file"]


def test_a_model_of_numbers_is_refused(command: Command, model: Memformer) -> None:
    pytest.importorskip("lm_eval")
    write_folder(Path("grey"), GreyValues(values=9))
    outcome = command("evaluate", *words_of("stdlib_names"), "--ckpt_path", "grey")
    assert outcome.code == 1
    assert "the model has the tokenizer GreyValues, which is for numbers: evaluate a model that" in outcome.errors[0]


@pytest.mark.slow  # it reads all task files of the harness
def test_the_command_of_the_harness_runs_it_too(model: Memformer) -> None:
    pytest.importorskip("lm_eval")
    write_folder(Path("bytes"), Bytes())
    code = "import memformer_pl.inference.harness, lm_eval.__main__ as harness; harness.cli_evaluate()"
    words = ["--model", "memformer_pl", "--model_args", "ckpt_path=bytes", "--device", "cpu", "--batch_size", "4"]
    where = ["--include_path", str(TASKS), "--tasks", "stdlib_names", "--output_path", "out"]
    done = subprocess.run([sys.executable, "-c", code, *words, *where], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "|stdlib_names|" in done.stdout
    assert list(Path("out").rglob("results_*.json"))


def test_the_data_of_the_tasks_is_written_from_the_documents_that_the_quickstart_holds_out(tmp_path: Path) -> None:
    script = TASKS / "write_data.py"
    subprocess.run([sys.executable, script, "--out", tmp_path], check=True, capture_output=True)
    rows = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in tmp_path.glob("*")}
    assert set(rows) == {"documents", "names", "lines"}
    texts = [row["text"] for row in rows["documents"]]
    for row in rows["names"]:
        name = row["choices"][row["answer"]]
        assert len(set(row["choices"])) == 4
        assert all(choice in row["context"] for choice in row["choices"])
        assert any(text.startswith(row["context"] + name) for text in texts)
    for row in rows["lines"]:
        line = row["context"].rpartition("\n")[2] + row["rest"]
        assert row["context"].count(f"{line.strip()}\n") >= 1
        assert any(text.startswith(f"{row['context']}{row['rest']}\n") for text in texts)
