"""Tables show the results of sweeps, every row of every table takes a step, and a sweep can be killed."""

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from _pytest.mark.structures import ParameterSet
from conftest import Outcome, write_small
from mnist import write_mnist

from memformer_pl import models
from memformer_pl.errors import UsageError
from memformer_pl.sweeps import rows, runner, tables
from memformer_pl.sweeps.markdown import as_markdown

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
ROWS = sorted(EXPERIMENTS.rglob("rows.yaml"))
CORPORA = sorted((EXPERIMENTS / "corpora").glob("*.yaml"))
COPY = EXPERIMENTS / "recall" / "copy" / "rows.yaml"
PAPER_SIZE = [EXPERIMENTS / "table3" / "wikitext103.yaml"]
STEP = [
    "--data.batch_size=2",
    "--data.interleave=1",
    "--data.evaluation_batch_size=32",
    "--trainer.accelerator=cpu",
    "--trainer.precision=32-true",
    "--trainer.max_steps=1",
    "--trainer.val_check_interval=1",
    "--trainer.limit_val_batches=1",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


def cases() -> Iterator[ParameterSet]:
    """Every row of every table; slow is one that sets the same options as a row above it, to other values."""
    seen: set[object] = set()
    for path in ROWS:
        table = rows.read(path)
        for row in table.rows if table.program == "memformer_pl" else ():  # tests/continual/ has the other program's
            options = path, row.stacked["model"]["model"]["class_path"], *sorted(option_names(row.override))
            slow = options in seen
            seen.add(options)
            name = f"{path.parent.relative_to(EXPERIMENTS)}-{row.name}"
            yield pytest.param(path, row.name, id=name, marks=pytest.mark.slow if slow else ())


def option_names(config: Mapping[str, Any]) -> Iterator[str]:
    """The names of all options in a configuration, dotted."""
    for name, value in config.items():
        yield from (f"{name}.{inner}" for inner in option_names(value)) if isinstance(value, dict) else (name,)


def case_name(value: Path | str) -> str:
    return value if isinstance(value, str) else value.relative_to(EXPERIMENTS).with_suffix("").as_posix()


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Options that replace each corpus by a local one with the same columns, which needs no download."""
    from pyarrow import parquet, table

    folder, random = tmp_path_factory.mktemp("hub"), np.random.default_rng(0)
    images = list(random.integers(0, 256, (24, 28, 28), dtype=np.uint8))
    mnist = write_mnist(folder, {"train": images, "test": images[:4]})
    lines = [line for number in range(30) for line in ("", f" = Article {number} = \n", "", f" text {number} \n")]
    for name in ("wikitext", "pg19"):
        (folder / name).mkdir()
    for split in ("train", "validation", "test"):
        parquet.write_table(table({"text": lines}), folder / "wikitext" / f"{split}.parquet")
        books = {"short_book_title": ["a", "b"], "publication_date": [1900, 1901], "url": ["", ""], "text": lines[:2]}
        parquet.write_table(table({**books, "text": ["".join(lines)] * 2}), folder / "pg19" / f"{split}.parquet")
    pages = b"".join(b"  <page>\n    <title>%d</title>\n  </page>\n" % number for number in range(200))
    (folder / "enwik8").write_bytes(pages)
    (folder / "texts").mkdir()
    for number in range(40):
        (folder / "texts" / f"{number}.txt").write_text(f"text {number} " * number)
    for name in map("package{}".format, range(40)):
        info = folder / "packages" / f"{name}-1.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        (info / "RECORD").write_text(f"{name}.py,,\n")
        (folder / "packages" / f"{name}.py").write_text(f"the_name_of_this_package = {name}\n")
    wikitext = [f"--data.corpus.path={folder / 'wikitext'}", "--data.corpus.name=null", "--data.tokenizer=Bytes"]
    return {
        "MNIST": [f"--data.corpus.path={mnist}"],
        "WikiText": wikitext,
        "Hub": [f"--data.corpus.path={folder / 'pg19'}", "--data.tokenizer=Bytes"],
        "Enwik8": [f"--data.corpus.path={folder / 'enwik8'}"],
        "Stdlib": ["--data.corpus=Files", f"--data.corpus.paths={folder / 'texts'}", "--data.tokenizer=Bytes"],
        "InstalledPackages": [f"--data.corpus.paths=[{folder / 'packages'}]", "--data.tokenizer=Bytes"],
        "Digits": [],
        "AssociativeRecall": ["--data.corpus.examples=40", "--data.corpus.questions=1"],
        "Copy": ["--data.corpus.examples=40", "--data.corpus.questions=1"],
        "MQAR": ["--data.corpus.trained=[[32, 2, 40]]", "--data.corpus.tested=[[32, 2, 4]]"],
        "FactsInNoise": [
            "--data.corpus.examples=40",
            "--data.corpus.questions=1",
            "--data.corpus.init_args.tested=[256]",
        ],
        "Remember": ["--data.corpus.examples=40", "--data.corpus.questions=1"],
        "Episodes": ["--data.corpus.episodes=8", "--data.corpus.tested=4", "--model.acting.group=2"],
        "KeyedFacts": ["--data.corpus.facts=40"],
    }


def small(model: dict[str, Any]) -> list[str]:
    """Options that make a model narrow and shallow."""
    takes = inspect.signature(getattr(models, model["class_path"])).parameters
    least = {"dim": 16, "heads": 2, "encoder_layers": 1, "decoder_layers": 1, "layers": 1}
    sizes = {name: size for name, size in least.items() if name in takes}
    if model.get("init_args", {}).get("feed_forward"):
        del sizes["layers"]  # one of them has another feed-forward
    return [f"--model.model.init_args.{name}={size}" for name, size in sizes.items()]


def take_a_step(
    configs: list[Path],
    stacked: dict[str, Any],
    command: Callable[..., Outcome],
    stand_ins: dict[str, list[str]],
    folder: Path,
    cache: Path,
) -> None:
    corpus = stacked["data"]["corpus"]
    corpus = corpus if isinstance(corpus, str) else corpus["class_path"]
    where = [
        f"--data.cache={cache}",
        f"--trainer.logger.init_args.save_dir={folder}",
        "--trainer.callbacks=[RunRecord]",
    ]
    shorter = ["--data.horizon=2", "--data.evaluation_batch_size=4"] if corpus == "WikiText" else []
    lanes = ["--data.batch_size=4"] if stacked["data"].get("revisit") else []  # one of four revisits
    options = [
        *stand_ins[corpus],
        *small(stacked["model"]["model"]),
        *STEP,
        *shorter,
        *lanes,
        *where,
    ]
    outcome = command("fit", *(f"--config={path}" for path in configs), *options)
    assert outcome.code == 0, outcome.output
    (record,) = folder.rglob("record.json")
    assert json.loads(record.read_text())["steps"] == 1


@pytest.mark.parametrize(("path", "name"), list(cases()))
def test_every_row_of_every_table_takes_a_step(
    path: Path,
    name: str,
    command: Callable[..., Outcome],
    stand_ins: dict[str, list[str]],
    tmp_path: Path,
    pack_cache: Path,
) -> None:

    table = rows.read(path)
    row = next(row for row in table.rows if row.name == name)
    (tmp_path / "row.yaml").write_text(yaml.safe_dump(dict(row.override)))
    configs = [*row.configs, tmp_path / "row.yaml"]
    take_a_step(configs, row.stacked, command, stand_ins, tmp_path / "runs", pack_cache)


@pytest.mark.parametrize("path", [*CORPORA, *PAPER_SIZE], ids=case_name)
def test_every_other_configuration_takes_a_step(
    path: Path, command: Callable[..., Outcome], stand_ins: dict[str, list[str]], tmp_path: Path, pack_cache: Path
) -> None:

    base = [EXPERIMENTS / "stdlib.yaml"] if path in CORPORA else []
    stacked = rows.stack(*(yaml.safe_load(each.read_text()) for each in (*base, path)))
    options = [*base, path]
    take_a_step(options, stacked, command, stand_ins, tmp_path / "runs", pack_cache)


def test_every_configuration_of_the_experiments_is_in_some_test() -> None:
    bases = {path for rows in ROWS for path in [rows.parent / "base.yaml"] if path.exists()}
    tested = {*ROWS, *bases, *CORPORA, *PAPER_SIZE}
    elsewhere = {
        path
        for folder in (".", "acting", "continual", "electra", "models", "recall/copy", "recall/associative")
        for path in (EXPERIMENTS / folder).glob("*.yaml")
    }
    elsewhere |= set((EXPERIMENTS / "evaluate").glob("*.yaml"))  # tasks of the harness: tests/cli/test_evaluate.py
    assert {path.resolve() for path in EXPERIMENTS.rglob("*.yaml")} == {path.resolve() for path in tested | elsewhere}


@pytest.mark.parametrize(
    "path", sorted({*ROWS, *CORPORA, *PAPER_SIZE}), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_a_table_begins_with_its_question_and_says_what_it_costs(path: Path) -> None:
    head = path.read_text().split("\nbase:")[0]
    assert head.startswith("# Question:")
    assert "\n# Cost:" in head


def test_a_fingerprint_changes_with_what_a_result_depends_on_and_with_nothing_else(tmp_path: Path) -> None:
    def fingerprint(**trainer: object) -> str:
        path = tmp_path / "base.yaml"
        path.write_text(yaml.safe_dump({"trainer": {"max_steps": 3, **trainer}}))
        return rows.Row("row", "row", None, "row", None, None, (path,), {}).fingerprint

    plain = fingerprint()
    assert fingerprint(num_sanity_val_steps=0) == fingerprint(logger=False) == plain
    assert fingerprint(precision="64-true") != plain


@pytest.fixture
def table_file(tmp_path: Path, texts: Path, pack_cache: Path) -> Path:
    """A table of two rows and two seeds, whose runs take a second."""
    (tmp_path / "tiny").mkdir()
    write_small(tmp_path / "tiny", texts, pack_cache).rename(tmp_path / "tiny" / "base.yaml")
    none = {"title": "none", "paper": 1.7, "against": "some", "model": {"model": {"init_args": {"slots": 0}}}}
    content = {
        "base": ["base.yaml"],
        "seeds": [0, 1],
        "metrics": {"validation/perplexity": "perplexity"},
        "rows": {"some": {"title": "some", "paper": 1.5}, "none": none},
    }
    (tmp_path / "tiny" / "rows.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return tmp_path / "tiny" / "rows.yaml"


def enter(table: Any, **values: dict[int, float]) -> None:
    """Write a ledger by hand."""
    common = {"parameters": 1000, "operations_per_token": 2e6, "state_bytes": 512, "processor_seconds": 60}
    with table.ledger.open("a") as ledger:
        for row in table.rows:
            for seed, value in values.get(row.name, {}).items():
                line = {
                    "row": row.name,
                    "seed": seed,
                    "fingerprint": row.fingerprint,
                    "validation/perplexity": value,
                    **common,
                }
                ledger.write(json.dumps(line) + "\n")


def test_a_state_that_grows_has_no_size(table_file: Path) -> None:
    table = rows.read(table_file)
    enter(table, some={0: 2.0})
    line = table.ledger.read_text().replace('"state_bytes": 512', '"state_bytes": null')
    table.ledger.write_text(line)
    assert "| 2.00 | grows | 1.0 |" in tables.markdown(table)


def test_a_table_has_means_errors_and_differences_seed_by_seed(table_file: Path) -> None:

    table = rows.read(table_file)
    enter(table, some={0: 2.0, 1: 3.0}, none={0: 2.5, 1: 3.6})
    # means 2.5 and 3.05, errors (1 / sqrt 2) / sqrt 2 and 1.1 / 2; differences 0.5 and 0.6: 0.55 with an error of 0.05
    assert tables.markdown(table).splitlines()[2:4] == [
        "| some | 1.5 |  | 2.5000 ± 0.5000 |  |  | 2 | 1,000 | 2.00 | 0.5 | 1.0 |",
        "| none | 1.7 | +0.200 | 3.0500 ± 0.5500 | +0.5500 ± 0.0500 | as in the paper | 2 | 1,000 | 2.00 | 0.5 | 1.0 |",
    ]
    for old in ("", "old\n"):
        behind = "<!-- end -->\nbehind\n<!-- other -->\n<!-- end -->\n"
        new = tables.replaced(f"before\n<!-- tiny -->\n{old}{behind}", table)
        assert new == f"before\n<!-- tiny -->\n{tables.markdown(table)}\n{behind}"
        assert tables.replaced(new, table) == new
    with pytest.raises(ValueError, match="has no markers for the table"):
        tables.replaced("nothing", table)
    tables.draw(table, table.figure)
    assert table_file.with_suffix(".png").stat().st_size > 5_000


def test_a_bar_or_a_line_break_does_not_end_a_cell() -> None:
    assert as_markdown(["", "a"], [["x | y", "two\nlines"]]) == "|  | a |\n| --- | --- |\n| x \\| y | two lines |"


@pytest.mark.parametrize(
    ("gaps", "said"), [((0.5, 0.6), "as in the paper"), ((-0.5, -0.6), "the other way"), ((0.5, -0.4), "open")]
)
def test_a_sign_counts_from_two_standard_errors_on(gaps: tuple[float, float], said: str, table_file: Path) -> None:

    table = rows.read(table_file)
    enter(table, some={0: 2.0, 1: 3.0}, none={0: 2.0 + gaps[0], 1: 3.0 + gaps[1]})
    assert f"| {said} |" in tables.markdown(table)


def test_the_figure_of_recall_has_a_curve_for_each_trained_row_over_its_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.syspath_prepend(EXPERIMENTS / "recall")
    from figure import baselines, curves, main

    table = rows.read(COPY)._replace(ledger=tmp_path / "recall_copy.jsonl")
    rights = {"memformer": {0: 1.0, 1: 0.9}, "no_memory": {0: 0.1}}
    with table.ledger.open("w") as ledger:
        for row in table.rows:
            for seed, right in rights.get(row.name, {}).items():
                accuracies = {metric: right / int(head) for metric, head in table.metrics.items()}
                line = {"row": row.name, "seed": seed, "fingerprint": row.fingerprint, "state_bytes": 1024 * seed}
                counted = {"parameters": 1000, "operations_per_token": 2e6}
                ledger.write(json.dumps({**line, **counted, **accuracies}) + "\n")
    assert baselines(table) == {"chance": 1 / 16}
    both, none = curves(table)
    assert (both.label, none.label) == (
        "Memformer, 16 slots: no state, 2 seeds",
        "Memformer without memory: no state",
    )
    assert both.distances[:3] == [2, 4, 6]
    assert both.accuracies[:, :2].tolist() == [[0.5, 0.25], [0.45, 0.225]]
    monkeypatch.setattr(rows, "read", lambda _: table)
    main(COPY, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_results_of_another_configuration_do_not_count(table_file: Path, tmp_path: Path) -> None:

    table = rows.read(table_file)
    enter(table, some={0: 2.0})
    names = [(run.row.name, run.seed) for run in runner.remaining(table, only=[], seeds=[], runs=tmp_path)]
    assert names == [("none", 0), ("some", 1), ("none", 1)]
    base = table_file.parent / "base.yaml"
    base.write_text(base.read_text().replace("warmup_steps: 2", "warmup_steps: 3"))
    changed = rows.read(table_file)
    assert len(runner.remaining(changed, only=["some"], seeds=[0], runs=tmp_path)) == 1
    assert tables.outcomes(changed) == {}
    with pytest.raises(ValueError, match=r"tiny has no rows \['many'\]: choose from \['some', 'none'\]"):
        runner.remaining(table, only=["many"], seeds=[], runs=tmp_path)


def test_stacked_configurations_share_nothing_with_what_they_were_made_of() -> None:

    lower, upper = {"a": {"b": 1, "c": 2}}, {"a": {"b": {"d": 3}}, "e": {"f": 4}}
    stacked = rows.stack(lower, upper)
    assert stacked == {"a": {"b": {"d": 3}, "c": 2}, "e": {"f": 4}}
    stacked["a"]["b"].clear()
    stacked["e"].clear()
    assert (lower, upper) == ({"a": {"b": 1, "c": 2}}, {"a": {"b": {"d": 3}}, "e": {"f": 4}})


def test_a_file_that_is_not_a_table_is_refused(table_file: Path) -> None:

    content = yaml.safe_load(table_file.read_text())
    content["rows"]["none"]["against"] = "all"
    table_file.write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(UsageError, match=r"row 'none': against must name a row, got 'all': choose one of some, none"):
        rows.read(table_file)
    table_file.write_text("base: []")
    with pytest.raises(UsageError, match=r"is not a file of rows: it lacks \['metrics', 'rows', 'seeds'\]"):
        rows.read(table_file)


@pytest.mark.parametrize("path", ROWS, ids=case_name)
def test_every_page_has_the_table_that_its_results_make(path: Path) -> None:

    table = rows.read(path)
    if table.ledger.exists():
        assert table.page == path.with_name("README.md")
        assert tables.replaced(table.page.read_text(), table) == table.page.read_text()


SWEEP = [sys.executable, "-m", "memformer_pl", "sweep"]


@pytest.mark.slow
@pytest.mark.parametrize("blow", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_sweep_goes_on_and_does_nothing_twice(table_file: Path, tmp_path: Path, blow: signal.Signals) -> None:

    words = [*SWEEP, str(table_file), "--workers=2", f"--runs={tmp_path / 'runs'}"]
    table = rows.read(table_file)
    first = subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not rows.results(table) and first.poll() is None:
        time.sleep(0.2)
    first.send_signal(blow)
    first.wait()
    done = len(rows.results(table))
    assert 1 <= done < 4
    for _ in range(60):  # a run that outlived its sweep is left alone until it has ended
        if subprocess.run(words, check=False).returncode == 0:
            break
        time.sleep(1)
    lines = rows.results(table)
    assert sorted((line["row"], line["seed"]) for line in lines) == [("none", 0), ("none", 1), ("some", 0), ("some", 1)]
    assert all(line["steps"] == 4 and line["tokens"] > 0 and line["seconds"] > 0 for line in lines)
    assert subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout.startswith("0 runs to train")


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_the_others_are_trained(table_file: Path, tmp_path: Path) -> None:

    content = yaml.safe_load(table_file.read_text())
    content["rows"]["none"]["model"] = {"model": {"init_args": {"slots": -1}}}
    table_file.write_text(yaml.safe_dump(content, sort_keys=False))
    words = [*SWEEP, str(table_file), "--seeds", "0", "--workers=1", f"--runs={tmp_path / 'runs'}"]
    told = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    assert told.returncode == 1
    assert "tiny some, seed 0: done" in told.stdout
    assert "tiny none, seed 0: failed with exit code" in told.stdout
    assert [line["row"] for line in rows.results(rows.read(table_file))] == ["some"]
