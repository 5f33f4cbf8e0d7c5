"""A user's table may be in any folder, mistakes in it are reported before training, and no run is lost."""

import json
import math
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Outcome, write_small

from memformer_pl.errors import UsageError
from memformer_pl.sweeps import rows, runner, shipped, tables

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture
def content() -> dict[str, Any]:
    """Of a file of rows."""
    return {
        "base": ["base.yaml"],
        "seeds": [0, 1],
        "metrics": {"validation/perplexity": "perplexity"},
        "rows": {"some": {"title": "some | more"}, "none": {"title": "none", "against": "some", "paper": 2}},
    }


@pytest.fixture
def write(tmp_path: Path, content: dict[str, Any]) -> Callable[..., Path]:
    """Writes the file with other values at the top; the base beside it has no logger, as that of a first try."""
    folder = tmp_path / "my table"
    folder.mkdir()
    (folder / "base.yaml").write_text("model: {learning_rate: 1e-3}\n")

    def written(**values: Any) -> Path:
        path = folder / "rows.yaml"
        path.write_text(yaml.safe_dump({**content, **values}, sort_keys=False))
        return path

    return written


def enter(table: rows.Table, **more: Any) -> None:
    """A result of every row and seed, by hand."""
    counted = {"parameters": 1000, "operations_per_token": 2e6, "state_bytes": 512, "validation/perplexity": 2.0}
    with table.ledger.open("a") as ledger:
        for row in table.rows:
            for seed in table.seeds:
                line = {"row": row.name, "seed": seed, "fingerprint": row.fingerprint, **counted, **more}
                ledger.write(json.dumps(line) + "\n")


def test_the_results_of_a_users_table_are_beside_it(
    write: Callable[..., Path], command: Callable[..., Outcome]
) -> None:
    path = write()
    enter(rows.read(path))
    assert command("tables", path).code == 0
    assert command("tables", path).code == 0  # and again, into the page that there is
    assert sorted(made.name for made in path.parent.iterdir()) == [
        *("base.yaml", "rows.jsonl", "rows.md", "rows.png", "rows.yaml")
    ]
    page = path.with_suffix(".md").read_text(encoding="utf-8")
    assert page.startswith("<!-- my table -->\n|  | paper | perplexity |")
    assert page.count(r"| some \| more |  | 2.0000 ±") == 1


def test_two_files_of_rows_in_a_folder_do_not_share_results(write: Callable[..., Path]) -> None:
    path = write()
    other = path.rename(path.with_name("more.yaml"))
    one, two = rows.read(write()), rows.read(other)
    assert (one.name, two.name) == ("my table", "my table/more")
    assert not {one.ledger, one.page, one.figure} & {two.ledger, two.page, two.figure}


def test_tables_of_the_repository_stay_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    table = rows.read("table1/digits/rows")
    assert table.name == "table1/digits"
    assert table.ledger == EXPERIMENTS / "results" / "table1_digits.jsonl"
    assert (table.page, table.figure) == (
        EXPERIMENTS / "table1" / "digits" / "README.md",
        table.ledger.with_suffix(".png"),
    )


def test_tables_of_an_installed_package_are_kept_below_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shipped, "PACKAGE", EXPERIMENTS.parent)  # with experiments/ inside it
    assert rows.read("recall/copy/rows").ledger == tmp_path / "runs" / "recall" / "copy" / "rows.jsonl"
    table = rows.read("table1/digits/rows", runs=tmp_path / "mine")
    assert table.ledger == tmp_path / "mine" / "table1" / "digits" / "rows.jsonl"
    assert {table.page.parent, table.figure.parent} == {table.ledger.parent}


def test_a_base_may_be_a_shipped_configuration(write: Callable[..., Path]) -> None:
    config = {"title": "a", "config": "models/lstm"}
    (row,) = rows.read(write(base=["quickstart", "base.yaml"], rows={"a": config})).rows
    assert row.configs[0] == EXPERIMENTS / "quickstart.yaml"
    assert row.stacked["model"]["model"]["class_path"] == "LSTM"
    assert row.stacked["model"]["learning_rate"] != yaml.safe_load(row.configs[0].read_text())["model"]["learning_rate"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"base": ["bse.yaml"]}, r"rows.yaml: there is no file '.*/bse.yaml', and no shipped"),
        ({"base": ["."]}, "rows.yaml: '.*' is a folder"),
        ({"base": "base.yaml"}, r"base must list configurations, such as \[base.yaml\], got 'base.yaml'"),
        ({"base": []}, r"base must list configurations"),
        ({"base": [3]}, r"base must list configurations"),
        ({"seeds": [0, "1"]}, "seeds must be whole numbers from 0 to 4294967295, got '1'"),
        ({"seeds": [1.0]}, "seeds must be whole numbers .* got 1.0"),
        ({"seeds": [True]}, "seeds must be whole numbers .* got True"),
        ({"seeds": [-1]}, "seeds must be whole numbers .* got -1"),
        ({"seeds": [2**32]}, "seeds must be whole numbers .* got 4294967296"),
        ({"seeds": [1, 0, 1]}, "seeds has 1 twice"),
        ({"seeds": 3}, "seeds must list at least one whole number, .* got 3"),
        ({"seeds": []}, "seeds must list at least one whole number"),
        ({"seeds": None}, "seeds must list at least one whole number"),
        (
            {"program": "os"},
            "program must be a package that `python -m` runs, such as memformer_pl.c",
        ),
        ({"program": "no.such"}, "program must be a package that"),
        ({"program": 1}, "program must be a package that"),
        ({"metrics": {}}, "metrics must name figures"),
        ({"metrics": ["validation/perplexity"]}, "metrics must name figures"),
        ({"metrics": None}, "metrics must name figures"),
        ({"rows": {}}, "rows must name at least one row"),
        ({"rows": None}, "rows must name at least one row"),
        ({"rows": [{"title": "a"}]}, "rows must name at least one row"),
        (
            {"model": {"gradient_clip_val": 1}},
            "rows.yaml has no option 'model': write the options of runs in a row, or in a file",
        ),
        ({"metric": {}}, "rows.yaml has no option 'metric': did you mean metrics?"),
        ({"rows": {"a": {}}}, "row 'a' must have a title, .*got None"),
        ({"rows": {"a": None}}, "row 'a' must have a title and what it overrides, got None"),
        ({"rows": {"a": {"title": 16}}}, "row 'a' must have a title, in quotes if it is a number, got 16"),
        ({"rows": {"a": {"titel": "a"}}}, "row 'a' has no option 'titel': did you mean title?"),
        ({"rows": {"a": {"title": "a", "learning_rate": 1}}}, "row 'a' has no option 'learning_rate': known are title"),
        ({"rows": {"a": {"title": "a", "seed_everything": 1}}}, "row 'a' has no option 'seed_everything'"),
        ({"rows": {"a": {"title": "a", "paper": "1,5"}}}, "row 'a': paper must be a number, got '1,5'"),
        ({"rows": {"a": {"title": "a", "against": "b"}}}, "row 'a': against must name a row, got 'b': choose one of a"),
        ({"rows": {"a": {"title": "a", "against": ["a"]}}}, r"row 'a': against must name a row, got \['a'\]"),
        ({"rows": {"a": {"title": "a", "config": "b.yaml"}}}, "there is no file '.*/b.yaml'"),
        ({"rows": {"a": {"title": "a", "config": ["base.yaml"]}}}, "row 'a': config must be the name of a config"),
        ({"rows": {"a": {"title": "a", "model": 3}}}, "row 'a': model must be options, got 3"),
        ({"rows": {16: {"title": "a"}}}, "row 16: name it with letters, digits"),
        ({"rows": {"../a": {"title": "a"}}}, "row '../a': name it with letters, digits"),
        ({"rows": {"a": {"title": "a", "trainer": {"logger": False}}}}, "row 'a': trainer.logger must be one logger"),
        ({"rows": {"a": {"title": "a", "trainer": {"logger": []}}}}, "row 'a': trainer.logger must be one logger"),
    ],
)
def test_a_mistake_in_a_table_is_reported_in_a_line(
    values: dict[str, Any], said: str, write: Callable[..., Path], command: Callable[..., Outcome]
) -> None:
    path = write(**values)
    with pytest.raises(UsageError, match=said):
        runner.remaining(rows.read(path), only=[], seeds=[], runs=path.parent)
    outcome = command("sweep", path, "--runs", path.parent / "runs")
    assert outcome.code
    assert len(outcome.errors) == 1
    assert not (path.parent / "runs").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "rows.yaml: expected options"),
        ("[1]", "rows.yaml: expected options"),
        ("base: [", "rows.yaml: line 1"),
        ("base: [a]\nbase: [b]\n", "rows.yaml: line 2: base is given twice, first in line 1"),
        ("\x00", "rows.yaml: "),
    ],
)
def test_a_file_that_is_not_one_of_rows_is_refused(text: str, said: str, write: Callable[..., Path]) -> None:
    path = write()
    path.write_text(text)
    with pytest.raises(UsageError, match=said):
        rows.read(path)


@pytest.mark.parametrize("text", ["", "[1]", "model: [", "3"])
def test_a_base_that_is_not_a_configuration_is_named(text: str, write: Callable[..., Path]) -> None:
    path = write()
    (path.parent / "base.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"rows.yaml: .*base.yaml: "):
        rows.read(path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--workers", "0"], "workers must be at least 1, got 0"),
        (["--threads", "-1"], "threads must be at least 1, got -1"),
        (["--seeds", "1", "1"], "--seeds has 1 twice"),
        (["--seeds", "-1"], "--seeds must be whole numbers"),
        (["--options", "model.gradient_clip_val"], "options must be written NAME=VALUE, got 'model.gradient_clip_val'"),
        (["--only", "many"], r"my table has no rows ['many']: choose from ['some', 'none']"),
        (["--runs", "/dev/null"], "cannot write the results: "),
    ],
)
def test_invalid_options_are_refused(
    words: list[str], said: str, write: Callable[..., Path], command: Callable[..., Outcome]
) -> None:
    outcome = command("sweep", write(), *words)
    assert outcome.code
    (line,) = outcome.errors
    assert said in line


@pytest.mark.parametrize("more", [{"validation/perplexity": None}, {"parameters": None}])
def test_a_metric_that_no_run_has_logged_is_named(
    more: dict[str, None], write: Callable[..., Path], command: Callable[..., Outcome]
) -> None:
    (name,) = more
    table = rows.read(write())
    enter(table, **{"validation/loss": 1.0})
    lines = [{key: value for key, value in line.items() if key != name} for line in rows.results(table)]
    table.ledger.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    outcome = command("tables", write())
    (line,) = outcome.errors
    assert f"rows.jsonl: some, seed 0, has no {name}: choose metrics that were logged (" in line
    assert "validation/loss" in line


def test_a_table_without_results_and_a_damaged_result_are_reported(
    write: Callable[..., Path], command: Callable[..., Outcome]
) -> None:
    path = write()
    assert f"has no results of these rows: python -m memformer_pl sweep {path}" in command("tables", path).errors[0]
    table = rows.read(path)
    enter(table)
    for damaged in ('{"row": "so', "[]", '{"row": "some"}', "3"):
        whole = table.ledger.read_text()
        table.ledger.write_text(f"{whole}{damaged}\n")
        with pytest.raises(UsageError, match=r"rows.jsonl, line 5 is not the result of a run"):
            tables.outcomes(table)
        table.ledger.write_text(whole)


def test_a_page_without_markers_stays_as_it_is(write: Callable[..., Path]) -> None:
    table = rows.read(write())
    enter(table)
    table.page.write_text("my notes\n")
    with pytest.raises(UsageError, match=r"rows.md has no markers for the table: add '<!-- my table -->"):
        tables.main([str(write())], runs=Path("runs"), figures=False)
    assert table.page.read_text() == "my notes\n"


def script(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let every run be a short program; the folder of the run and the stage are its arguments."""

    def command(run: runner.Run, options: list[str], *, stage: str) -> list[str]:
        return [sys.executable, "-c", f"import sys, time, signal, pathlib\n{code}", str(run.folder), stage]

    monkeypatch.setattr(runner.Run, "command", command)


@pytest.fixture
def sweep() -> runner.Sweep:
    return runner.Sweep(options=[], threads=1)


@pytest.fixture
def one(write: Callable[..., Path]) -> runner.Run:
    path = write(seeds=[0])
    return runner.remaining(rows.read(path), only=["some"], seeds=[], runs=path.parent / "runs")[0]


def test_a_run_that_begins_while_all_are_told_to_stop_is_stopped(
    one: runner.Run, sweep: runner.Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, "time.sleep(20); pathlib.Path(sys.argv[1], 'ended').touch()")
    begin = subprocess.Popen

    def stopped_at_once(*words: Any, **options: Any) -> Any:
        child = begin(*words, **options)
        sweep.stop()  # the signal comes before the child is known
        return child

    monkeypatch.setattr(runner.subprocess, "Popen", stopped_at_once)
    assert sweep.train(one) == "stopped"
    assert not (one.folder / "ended").exists()
    assert rows.results(one.table) == []
    assert sweep.train(one) == "not started"


def test_a_run_that_another_process_has_ended_since_it_was_taken_is_not_trained_again(
    one: runner.Run, sweep: runner.Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, RECORD)
    assert sweep.train(one) == runner.DONE
    script(monkeypatch, "pathlib.Path(sys.argv[1], 'trained').touch(); sys.exit(1)")
    assert sweep.train(one) == runner.DONE
    assert not (one.folder / "trained").exists()
    assert len(one.table.ledger.read_text().splitlines()) == 1


def test_a_result_has_the_commit_with_which_its_training_began(
    one: runner.Run, sweep: runner.Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = iter(("before", "after"))
    monkeypatch.setattr(runner, "commit", lambda: next(commits))
    script(monkeypatch, RECORD)
    assert sweep.train(one) == runner.DONE
    assert one.result() == {**rows.results(one.table)[0], "commit": "before"}


RECORD = "pathlib.Path(sys.argv[1], 'record.json').write_text('{\"validation/perplexity\": 2.0}')"


def test_a_run_that_ends_while_all_are_told_to_stop_is_entered(
    one: runner.Run, sweep: runner.Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = "pathlib.Path(sys.argv[1], 'ready').touch()"
    script(monkeypatch, f"signal.signal(15, lambda *_: [{RECORD}, sys.exit(0)]); {ready}; time.sleep(60)")
    outcomes: list[str] = []
    thread = threading.Thread(target=lambda: outcomes.append(sweep.train(one)))
    thread.start()
    while not (one.folder / "ready").exists():
        assert thread.is_alive()
    sweep.stop()
    thread.join()
    assert outcomes == [runner.DONE]
    (line,) = rows.results(one.table)
    assert (line["row"], line["seed"], line["validation/perplexity"]) == ("some", 0, 2.0)


def test_a_run_that_diverges_is_entered(one: runner.Run, sweep: runner.Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = '"parameters": 1000, "operations_per_token": 2e6, "state_bytes": 512'
    record = f"pathlib.Path(sys.argv[1], 'record.json').write_text('{{\"diverged\": true, {counted}}}')"
    script(monkeypatch, f"{record}; sys.exit(1)")
    assert sweep.train(one) == runner.DIVERGED
    assert runner.remaining(one.table, only=["some"], seeds=[0], runs=one.runs) == []
    (outcome,) = tables.outcomes(one.table).values()
    assert (list(outcome.lines), outcome.ended) == ([0], {})
    assert tables.cells(outcome.row, one.table, {"some": outcome})["perplexity"] == "diverged"
    script(monkeypatch, f"{record.replace('true', 'false')}; sys.exit(1)")
    assert sweep.train(one._replace(seed=1)).startswith("failed with exit code 1")


def test_a_run_is_tested_once_it_is_trained_if_the_table_shows_a_metric_of_tests(
    write: Callable[..., Path], sweep: runner.Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(metrics={"test/perplexity": "perplexity", "validation/perplexity": "on validation"})
    run = runner.remaining(rows.read(path), only=[], seeds=[], runs=path.parent)[0]
    stages = "pathlib.Path(sys.argv[1], 'stages').open('a').write(sys.argv[2] + ' ')"
    script(monkeypatch, f"{stages}; {RECORD}; sys.exit(3 if sys.argv[2] == 'test' else 0)")
    assert sweep.train(run) == f"failed with exit code 3: see {run.folder / 'log.txt'}"
    assert (run.folder / "stages").read_text() == "fit test "
    assert rows.results(run.table) == []
    script(monkeypatch, f"{stages}; {RECORD}; sys.exit(3 if sys.argv[2] == 'fit' else 0)")
    assert sweep.train(run).startswith("failed with exit code 3")
    assert (run.folder / "stages").read_text() == "fit test fit "
    monkeypatch.undo()
    assert run.command([], stage="test")[1:4] == ["-m", "memformer_pl", "test"]


def test_a_mean_is_over_the_seeds_that_did_not_diverge(write: Callable[..., Path]) -> None:
    table = rows.read(write(seeds=[0, 1, 2]))
    enter(table)
    lines = rows.results(table)
    del lines[1]["validation/perplexity"]
    lines[1]["diverged"] = True
    table.ledger.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    some, none = (tables.cells(row, table, tables.outcomes(table)) for row in table.rows)
    assert (some["perplexity"], some["seeds"], some["diverged"]) == ("2.0000 ± 0.0000", "3", "1")
    assert none["diverged"] == ""
    assert none["difference"] == "+0.0000 ± 0.0000"  # of the two seeds with which both ended


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_table_counts_runs_that_ended_with_a_loss_that_is_not_finite(write: Callable[..., Path], loss: float) -> None:
    table = rows.read(write(seeds=[0, 1, 2]))
    enter(table)
    lines = rows.results(table)
    for line in lines:
        line["validation/loss"], line["validation/word_perplexity"] = 0.5, math.inf  # the exponent of a finite loss
    lines[1]["validation/loss"] = loss
    table.ledger.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    some, none = (tables.cells(row, table, tables.outcomes(table)) for row in table.rows)
    assert (some["loss not finite"], none["loss not finite"]) == ("1", "")
    assert "| loss not finite |" in tables.markdown(table)


def test_a_row_begins_with_the_weights_of_the_row_before_it_once_that_one_has_ended(
    write: Callable[..., Path],
) -> None:
    longer = {"title": "longer", "after": "short", "trainer": {"max_steps": 9}}
    path = write(seeds=[0, 1], rows={"short": {"title": "short"}, "longer": longer})
    table = rows.read(path)
    given: dict[str, Any] = {"seeds": [], "runs": path.parent / "runs"}

    def left(*only: str) -> list[tuple[str, int]]:
        return [(run.row.name, run.seed) for run in runner.remaining(table, only=list(only), **given)]

    assert left() == [("short", 0), ("short", 1)]
    with pytest.raises(UsageError, match="longer begins with the weights of short, which has no result with seed 0"):
        left("longer")
    line = {"row": "short", "fingerprint": table.rows[0].fingerprint, "parameters": 1, "validation/perplexity": 2.0}
    table.ledger.write_text(
        "".join(json.dumps({**line, "seed": seed, "diverged": seed == 1}) + "\n" for seed in (0, 1))
    )
    assert left() == left("longer") == [("longer", 0)]  # what diverged has nothing to begin with
    first, run = table.rows[0], runner.remaining(table, only=[], **given)[0]
    run.folder.mkdir(parents=True)
    before = run._replace(row=first).folder / "checkpoints" / "last.ckpt"
    assert run.command([])[-2:] == ["--trainer.callbacks+=InitialWeights", f"--trainer.callbacks.path={before}"]
    assert rows.read(path).rows[1].fingerprint == table.rows[1].fingerprint
    changed = rows.read(write(rows={"short": {"title": "short", "model": {"warmup_steps": 7}}, "longer": longer}))
    assert changed.rows[1].stacked == table.rows[1].stacked
    assert changed.rows[1].fingerprint != table.rows[1].fingerprint


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"rows": {"a": {"title": "a", "after": "b"}, "b": {"title": "b"}}}, "row 'a': after must name a row above it"),
        ({"rows": {"a": {"title": "a", "after": "a"}}}, r"row 'a': after must name a row above it, got 'a': .*\[\]"),
        ({"learning_rates": [1e-3]}, "row 'b': after 'a' needs one learning rate"),
        ({"program": "memformer_pl.continual"}, "needs the program memformer_pl, got memformer_pl.continual"),
    ],
)
def test_a_row_that_cannot_begin_with_weights_of_another_is_refused(
    write: Callable[..., Path], more: dict[str, Any], message: str
) -> None:
    both = {"a": {"title": "a"}, "b": {"title": "b", "after": "a"}}
    with pytest.raises(UsageError, match=message):
        rows.read(write(**({"rows": both} | more)))


def test_a_run_without_a_record_is_not_done(
    one: runner.Run, sweep: runner.Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, "pass")
    assert sweep.train(one).startswith(f"wrote no {one.folder / 'record.json'}: see ")
    script(monkeypatch, "sys.exit(3)")
    assert sweep.train(one) == f"failed with exit code 3: see {one.folder / 'log.txt'}"


def test_a_metric_that_a_run_did_not_log_draws_a_warning_at_its_end(
    write: Callable[..., Path],
    sweep: runner.Sweep,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write(metrics={"validation/bits": "bits"})
    script(monkeypatch, RECORD)
    run = runner.remaining(rows.read(path), only=[], seeds=[], runs=path.parent)[0]
    assert sweep.train(run) == runner.DONE
    assert "some, seed 0, logged no validation/bits: correct the table's metrics" in capsys.readouterr().err


def test_a_system_without_fcntl_is_reported(
    write: Callable[..., Path], command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "memformer_pl.sweeps.runner")
    monkeypatch.setitem(sys.modules, "fcntl", None)
    (line,) = command("sweep", write()).errors
    assert line == "error: sweep locks its runs with fcntl, which this system lacks: use Linux, macOS or WSL"


@pytest.mark.skipif(not (EXPERIMENTS.parent / ".git").exists(), reason="a source archive has no commit")
def test_the_commit_is_that_of_this_repository_wherever_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git = ["git", "-C", str(EXPERIMENTS)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    assert runner.commit().rstrip("+") == head.strip()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert runner.commit() == runner.version("memformer-pl")


@pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty")
@pytest.mark.parametrize(
    "logger", [None, True, "CSVLogger", {"class_path": "CSVLogger", "init_args": {"save_dir": "elsewhere"}}]
)
def test_a_run_logs_to_its_own_folder_with_the_logger_of_its_configuration(
    logger: Any, write: Callable[..., Path], texts: Path, pack_cache: Path, command: Callable[..., Outcome]
) -> None:
    path = write(seeds=[0])
    base = write_small(path.parent, texts, pack_cache).rename(path.parent / "base.yaml")
    config = yaml.safe_load(base.read_text())
    del config["trainer"]["logger"]
    base.write_text(yaml.safe_dump(config))
    row = {"title": "a", **({} if logger is None else {"trainer": {"logger": logger}})}
    path = write(rows={"a": row})
    run = runner.remaining(rows.read(path), only=[], seeds=[0], runs=path.parent / "runs")[0]
    run.folder.mkdir(parents=True)
    words = run.command(["trainer.max_steps=1"])[3:]
    assert command(*words).code == 0
    assert (run.folder / "record.json").exists()
    assert (run.folder / "metrics.csv").exists() == ("CSVLogger" in str(logger))
    assert [made.name for made in (path.parent / "runs").iterdir()] == ["my table"]


RATES = {"learning_rates": [1e-3, 1e-2], "better": "higher"}


def enter_rates(table: rows.Table, reached: dict[str, float | None], *, seed: int = 0) -> None:
    """A result of these rows and a seed, by hand."""
    counted = {"parameters": 1000, "operations_per_token": 2e6, "state_bytes": 512}
    fingerprints = {row.name: row.fingerprint for row in table.rows}
    with table.ledger.open("a") as ledger:
        for name, value in reached.items():
            line = {"row": name, "seed": seed, "fingerprint": fingerprints[name], "validation/perplexity": value}
            ledger.write(json.dumps({**line, **counted}) + "\n")


def names(table: rows.Table, **given: Any) -> list[tuple[str, int]]:
    """The runs that are left to train."""
    left = runner.remaining(table, **{"only": [], "seeds": [], "runs": Path("runs"), **given})
    return [(run.row.name, run.seed) for run in left]


def test_other_seeds_are_trained_with_the_best_learning_rate(write: Callable[..., Path]) -> None:
    table = rows.read(write(**RATES))
    assert names(table) == [("some@0.001", 0), ("some@0.01", 0), ("none@0.001", 0), ("none@0.01", 0)]
    with pytest.raises(
        UsageError, match=r"the learning rate of \['none', 'some'\] is not chosen yet, which seed 0 does"
    ):
        names(table, seeds=[1])
    assert [row.stacked["model"]["learning_rate"] for row in table.rows] == [1e-3, 1e-2, 1e-3, 1e-2]
    enter_rates(table, {"some@0.001": 2.0, "some@0.01": 3.0, "none@0.001": float("nan")})
    assert names(table) == [("none@0.01", 0), ("some@0.01", 1)]
    assert names(table, only=["none"]) == [("none@0.01", 0)]
    assert names(table, only=["some"], seeds=[1]) == [("some@0.01", 1)]
    enter_rates(table, {"none@0.01": 0.0})
    assert names(table) == [("some@0.01", 1), ("none@0.01", 1)]  # what is not a number is worse than any other
    assert names(rows.read(write(**{**RATES, "better": "lower"}))) == [("some@0.001", 1), ("none@0.01", 1)]


def test_a_table_without_a_row_whose_rate_is_chosen_says_so(
    write: Callable[..., Path], command: Callable[..., Outcome]
) -> None:
    path = write(**RATES)
    enter_rates(rows.read(path), {"some@0.001": 2.0})
    told = f"has no row whose learning rates are all trained: python -m memformer_pl sweep {path}"
    assert told in command("tables", path).errors[0]
    outcome = command("sweep", path, "--seeds", "1", "--runs", path.parent / "runs")
    assert outcome.code == 2
    assert "is not chosen yet, which seed 0 does" in outcome.errors[0]


def test_a_learning_rate_that_diverges_is_worse_than_any_other(write: Callable[..., Path]) -> None:
    table = rows.read(write(**RATES, metrics={"validation/bits": "bits"}))
    enter(table, diverged=True)  # without the metric
    for row in table.rows[1::2]:
        line = {"row": row.name, "seed": 0, "fingerprint": row.fingerprint, "validation/bits": -1e9}
        with table.ledger.open("a") as ledger:
            ledger.write(json.dumps(line) + "\n")
    assert {name: row.learning_rate for name, row in rows.settled(table).items()} == {"some": 0.01, "none": 0.01}


def test_another_metric_than_the_first_may_choose_the_learning_rate(write: Callable[..., Path]) -> None:
    shown = {"test/perplexity": "perplexity", "validation/perplexity": "on validation"}
    for chosen_by, best in (({}, 1e-2), ({"chosen_by": "validation/perplexity"}, 1e-3)):
        table = rows.read(write(metrics=shown, learning_rates=[1e-3, 1e-2], **chosen_by))
        table.ledger.unlink(missing_ok=True)
        for row in table.rows:
            values = {"test/perplexity": 1 / row.learning_rate, "validation/perplexity": row.learning_rate}
            line = {"row": row.name, "seed": 0, "fingerprint": row.fingerprint, **values}
            with table.ledger.open("a") as ledger:
                ledger.write(json.dumps(line) + "\n")
        assert {name: row.learning_rate for name, row in rows.settled(table).items()} == {"some": best, "none": best}


def test_a_table_shows_the_best_learning_rate(write: Callable[..., Path]) -> None:
    table = rows.read(write(**RATES))
    enter_rates(table, {"some@0.001": 2.0, "some@0.01": 3.0, "none@0.001": 1.0})
    enter_rates(table, {"some@0.01": 4.0}, seed=1)
    heads, _, some, none, *_ = [
        [cell.strip() for cell in line.split(" | ")] for line in tables.markdown(table).splitlines()
    ]
    assert none[-1] == "|"
    assert dict(zip(heads, some, strict=True))["learning rate"] == "0.01"
    assert dict(zip(heads, some, strict=True))["perplexity"] == "3.5000 ± 0.5000"


def test_a_sweep_goes_on_with_the_rates_that_turned_out_best(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a run that failed leaves its row open, without keeping the others."""
    path = write(**RATES)
    trained = []

    def train(_: runner.Sweep, run: runner.Run) -> str:
        trained.append((run.row.name, run.seed))
        if run.row.name == "none@0.001":
            return "failed"
        enter_rates(run.table, {run.row.name: 1.0 / run.row.learning_rate}, seed=run.seed)
        return runner.DONE

    monkeypatch.setattr(runner.Sweep, "train", train)
    monkeypatch.setattr(runner.signal, "signal", lambda *_: None)
    options = {"only": [], "seeds": [], "workers": 1, "threads": 1, "runs": tmp_path / "runs", "options": []}
    assert not runner.main([str(path)], **options)
    assert trained == [("some@0.001", 0), ("some@0.01", 0), ("none@0.001", 0), ("none@0.01", 0), ("some@0.001", 1)]


def test_no_worker_waits_for_a_row_whose_best_rate_it_does_not_need(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(**RATES)
    seconds = threading.Event()

    def train(_: runner.Sweep, run: runner.Run) -> str:
        if run.row.name == "none@0.01":  # ends only after another row's second seed
            assert seconds.wait(60)
        enter_rates(run.table, {run.row.name: 1.0 / run.row.learning_rate}, seed=run.seed)
        if (run.row.name, run.seed) == ("some@0.001", 1):
            seconds.set()
        return runner.DONE

    monkeypatch.setattr(runner.Sweep, "train", train)
    monkeypatch.setattr(runner.signal, "signal", lambda *_: None)
    options = {"only": [], "seeds": [], "workers": 2, "threads": 1, "runs": tmp_path / "runs", "options": []}
    assert runner.main([str(path)], **options)
    assert ("none@0.001", 1) in {(line["row"], line["seed"]) for line in rows.results(rows.read(path))}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"learning_rates": []}, "must list at least one number"),
        ({"learning_rates": ["1e-3"]}, "with a point, such as 1.0e-3, got '1e-3'"),
        ({"learning_rates": [1e-3, 1e-3]}, "has 0.001 twice"),
        ({"learning_rates": [-1e-3]}, "above 0"),
        ({"learning_rates": [1e-3], "better": "more"}, "better must be lower or higher, .*got 'more'"),
        ({"better": "higher"}, "which of learning_rates is the best"),
        ({"learning_rates": [1e-3], "chosen_by": ["loss"]}, "chosen_by must be one of the metrics"),
        ({"chosen_by": "validation/perplexity"}, "chosen_by must be one of the metrics by which learning_rates"),
        ({"learning_rates": [1e-3], "chosen_by": "loss"}, "chosen_by must be .*validation/perplexity.*, got 'loss'"),
    ],
)
def test_wrong_learning_rates_are_refused(write: Callable[..., Path], value: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        rows.read(write(**value))
