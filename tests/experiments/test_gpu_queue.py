"""The queue of jobs for a GPU: what it starts, what it leaves behind, and every job at toy size on a CPU."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from _pytest.mark import ParameterSet

ROOT = Path(__file__).parents[2]
GPU = ROOT / "experiments" / "gpu"
RESULTS = ROOT / "experiments" / "results" / "gpu"
sys.path.insert(0, str(GPU))
from jobs import JOBS, Job  # noqa: E402

MACHINE = {"gpu": "a card", "torch": "9.9", "cuda": None, "driver": None, "python": "3", "commit": None}
WRITE = 'import sys; open(sys.argv[-1], \'w\').write(\'{"settings": {"size": 3}, "rows": [{"what": 1, "is": 2}]}\')'


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let scripts import their neighbours."""
    for folder in (GPU, GPU.parent / "benchmarks"):
        monkeypatch.syspath_prepend(folder)


def stub(name: str, code: str = WRITE, *, seconds: int = 1) -> Job:
    return Job(name, seconds, ("-c", code))


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the queue into ``out``, with ``committed`` for the results of the repository; return what it prints."""
    import run

    monkeypatch.setattr(run, "RESULTS", tmp_path / "committed")

    def call(*jobs: Job, minutes: float = 1, **options: Any) -> str:
        run.queue(jobs, minutes=minutes, out=tmp_path / "out", machine=MACHINE, **options)
        return capsys.readouterr().out

    return call


def test_a_job_leaves_json_markdown_and_its_log(queue: Callable[..., str], tmp_path: Path) -> None:
    printed = queue(stub("a", "print('hello');" + WRITE))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.json", "a.log", "a.md"]
    result = read(tmp_path / "out" / "a.json")
    assert result["rows"] == [{"what": 1, "is": 2}]
    assert result["settings"] == {
        "size": 3,
        **MACHINE,
        "command": "-c print('hello');" + WRITE,
        "took": result["settings"]["took"],
        "toy": False,
    }
    assert "hello" in (tmp_path / "out" / "a.log").read_text()
    table = (tmp_path / "out" / "a.md").read_text()
    assert table.splitlines()[:3] == ["| what | is |", "| --- | --- |", "| 1 | 2 |"]
    assert "gpu a card, torch 9.9, cuda not known" in table
    assert table in printed


def test_jobs_with_a_result_are_passed_over(queue: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "committed").mkdir()
    (tmp_path / "committed" / "a.json").write_text("{}")
    assert "a: has a result\nb: done" in queue(stub("a"), stub("b"))
    assert queue(stub("a"), stub("b", "raise SystemExit(1)")) == "a: has a result\nb: has a result\n"
    assert "a: done" in queue(stub("a"), toy=True)  # a committed result says nothing of a toy


def test_only_jobs_that_fit_are_started(queue: Callable[..., str]) -> None:
    printed = queue(stub("long", seconds=61), stub("short", seconds=50))
    assert "long: is left: takes 61 s, and there are 60" in printed
    assert "short: done" in printed
    assert queue(stub("any"), minutes=0) == "any: is left: takes 1 s, and there are 0\n"


def test_a_job_that_outlasts_the_time_is_stopped_with_its_children(queue: Callable[..., str], tmp_path: Path) -> None:
    code = "import subprocess, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    printed = queue(stub("slow", code), minutes=1.5 / 60)
    assert "failed after 1." in printed
    failed = read(tmp_path / "out" / "slow.failed.json")
    assert "when no time was left" in failed["failed"]
    assert gone(int(failed["log"][-1]))


def test_a_failed_job_is_recorded_and_tried_again(queue: Callable[..., str], tmp_path: Path) -> None:
    code = WRITE + "; print(*range(100), sep='\\n', flush=True); raise ValueError('nothing came')"
    printed = queue(
        stub("a", code), stub("silent", "pass"), stub("half", "import sys; open(sys.argv[-1], 'w')"), stub("b")
    )
    assert "a: failed after" in printed
    assert "b: done" in printed
    out = tmp_path / "out"
    failed = read(out / "a.failed.json")
    assert (failed["failed"], failed["rows"]) == ("status 1", [{"what": 1, "is": 2}])
    assert failed["log"][-1] == "ValueError: nothing came"
    assert "99" in failed["log"]
    assert "0" not in failed["log"]
    assert failed["settings"]["gpu"] == "a card"
    assert (
        read(out / "silent.failed.json")["failed"] == read(out / "half.failed.json")["failed"] == "it wrote no result"
    )
    queue(stub("a"))
    assert {path.name for path in out.glob("a.*")} == {"a.json", "a.log", "a.md"}


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_queue_loses_only_the_job_under_way(how: signal.Signals, tmp_path: Path) -> None:
    script, out = tmp_path / "queue.py", tmp_path / "out"
    sleep = f"import os, sys, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    jobs = [stub("a"), stub("b", sleep + ";" + WRITE), stub("c")]
    script.write_text(
        f"import sys; sys.path.insert(0, {str(GPU)!r}); import run\n"
        f"run.JOBS = [run.Job(*job) for job in {[tuple(job) for job in jobs]!r}]\n"
        f"run.machine_settings = lambda: {MACHINE!r}\nrun.main()\n"
    )
    command = [sys.executable, str(script), "--minutes", "1", "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "pid").exists() or not (pid := (tmp_path / "pid").read_text()):
        time.sleep(0.05)
    process.send_signal(how)
    process.wait()
    if how == signal.SIGTERM:
        assert gone(int(pid))
    else:  # nobody is left to end the job
        os.kill(int(pid), signal.SIGKILL)
    assert {path.stem for path in out.glob("*.json")} == {"a"}
    script.write_text(script.read_text().replace("time.sleep(60)", "pass"))
    went_on = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "a: has a result" in went_on
    assert {path.stem for path in out.glob("*.json")} == {"a", "b", "c"}


def gone(pid: int) -> bool:
    """Whether a process ends within seconds; what nobody waits for may stay as a zombie."""
    status = Path(f"/proc/{pid}/stat")
    for _ in range(100):
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_without_a_gpu_only_toys_are_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import run

    monkeypatch.setattr(run, "machine_settings", lambda: {**MACHINE, "gpu": None})
    monkeypatch.setattr("sys.argv", ["run.py", "--minutes", "1", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="torch finds no GPU here"):
        run.main()


def test_a_result_says_what_it_was_measured_with() -> None:
    import run
    import torch

    machine = run.machine_settings()
    assert machine["torch"] == torch.__version__
    assert (machine["gpu"] is None) == (not torch.cuda.is_available())
    assert (machine["commit"] is None) == (not (ROOT / ".git").exists())


def toys() -> Iterator[ParameterSet]:
    """Every job; slow is one that trains other rows of a table than the one above it."""
    before: tuple[str, ...] = ()
    for job in JOBS:
        trains = "train_" in job.command[0] and job.command[:2] == before
        yield pytest.param(job, id=job.name, marks=pytest.mark.slow if trains else ())
        before = job.command[:2]


@pytest.mark.parametrize("job", list(toys()))
def test_every_job_runs_at_toy_size(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, *arguments = (*job.command, *job.toy, "--out", str(tmp_path / "result.json"))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", [script, *arguments])
    with pytest.raises(SystemExit) as ended:
        sys.exit(runpy.run_path(script, run_name="__main__") and None)
    assert not ended.value.code
    result = read(tmp_path / "result.json")
    assert result["rows"]
    assert not [row for row in result["rows"] if "failed" in row and job.name != "tests"]
    assert "cuda" not in str(result["settings"])
    if "train_" in script:  # with three learning rates, or through two stages
        assert [line["steps"] for line in result["rows"]] == [1] * (2 if "curriculum" in script else 3)


def test_jobs_have_names_of_their_own_and_fit_a_short_lease() -> None:
    assert len({job.name for job in JOBS}) == len(JOBS)
    assert all(0 < job.seconds <= 240 for job in JOBS)


def test_committed_results_are_of_jobs_on_a_gpu() -> None:
    for path in RESULTS.glob("*.json"):
        result = read(path)
        assert path.stem in {job.name for job in JOBS}
        assert result["settings"]["gpu"]
        assert not result["settings"]["toy"]
        assert "failed" not in result
        assert path.with_suffix(".md").exists()


def test_tests_are_counted_by_outcome(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('n', [1, 2, 3])\n"
        "def test_numbers(n): assert n < 3, 'too large'\n"
        "@pytest.mark.skip(reason='not here')\n"
        "def test_skipped(): pass\n"
        "@pytest.fixture\n"
        "def broken(): raise ValueError\n"
        "def test_error(broken): pass\n"
    )
    command = [sys.executable, GPU / "count_tests.py", tmp_path / "test_some.py", "--out", tmp_path / "counts.json"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 1
    result = read(tmp_path / "counts.json")
    assert result["settings"] == {"passed": 2, "failed": 2, "skipped": 1}
    rows = {row["test"]: row for row in result["rows"]}
    assert [rows[name]["failed"] for name in ("test_numbers", "test_skipped", "test_error")] == [1, 0, 1]
    assert "too large" in rows["test_numbers"]["why"]


def test_the_environment_names_what_is_missing_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    import environment

    monkeypatch.setattr(environment, "installed", {"torch": "2.11.0+cu130", "rich": "13.8.1"}.get)
    asked = ["torch>=2.6,<2.14", "torch>=2.6,<2.11", "torch>=2.12", "rich>=13.9", "jsonargparse[signatures]>=4.53,<5"]
    states = [environment.dependency(each)["state"] for each in asked]
    assert states == ["ok", "outside the bounds", "outside the bounds", "outside the bounds", "missing"]
    row = environment.importing("no_such_module")
    assert row["state"] == "fails"
    assert "ModuleNotFoundError" in row["traceback"]


def test_a_way_out_of_memory_has_a_row_and_another_fault_ends_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import rollout_speed
    import torch
    from replay_cost import Sizes

    def prepare(case: object, way: rollout_speed.Way) -> Callable[[], object]:
        if way.mode == "eager":
            return lambda: None
        raise torch.OutOfMemoryError if way.mode == "graph" else ValueError("of another kind")

    monkeypatch.setattr(rollout_speed, "prepare", prepare)
    monkeypatch.setattr(rollout_speed, "case_of", lambda sizes, mode: rollout_speed.Case(sizes))
    sizes = Sizes(dim=8, heads=2, encoder_layers=1, decoder_layers=1, slots=4, segment_length=4, lanes=2, vocab_size=16)
    out = tmp_path / "speed.json"
    with pytest.raises(SystemExit) as ended:
        rollout_speed.main(["Memformer/bptt/1"], ["graph", "eager"], sizes=sizes, out=out)
    assert not ended.value.code
    failed, timed = read(out)["rows"]
    assert (failed["failed"], "seconds" in failed) == ("out of memory", False)
    assert len(timed["seconds"]) == 3
    assert "| graph | out of memory |" in out.with_suffix(".md").read_text()
    with pytest.raises(SystemExit) as ended:
        rollout_speed.main(["Memformer/bptt/1"], ["compiled", "eager"], sizes=sizes, out=out)
    assert ended.value.code
    assert [row.get("failed") for row in read(out)["rows"]] == ["ValueError: of another kind", None]


def test_a_way_has_three_parts() -> None:
    from rollout_speed import ways_of

    with pytest.raises(ValueError, match=r"a way is model/gradient/group, .*got 'Memformer/bptt'"):
        ways_of(["Memformer/bptt"], ["eager"])


def test_a_profile_counts_kernels_launches_and_idle_time() -> None:
    from rollout_profile import rows_of
    from rollout_speed import Way

    def event(kind: str, name: str, start: float, took: float) -> dict[str, Any]:
        return {"cat": kind, "name": name, "ts": start, "dur": took}

    events = [
        {"name": "process_name", "ph": "M"},
        event("cuda_runtime", "cudaLaunchKernel", 0, 5),
        event("cuda_driver", "cuLaunchKernelEx", 5, 5),
        event("cuda_runtime", "cudaGraphLaunch", 10, 5),
        event("cuda_runtime", "cudaStreamSynchronize", 15, 500),
        event("kernel", "product", 10, 100),
        event("kernel", "product", 150, 50),  # 40 idle before it
        event("kernel", "copy", 180, 40),  # 20 of it beside the product
        event("gpu_memset", "memset", 300, 10),
    ]
    way = Way("Memformer", "replay", 1, "graph")
    together, *each = rows_of(way, events, seconds=400e-6, device="cuda", largest=2)
    assert (together["kernel"], together["calls"], together["launches"]) == ("all", 4, 3)
    assert together["seconds"] == pytest.approx(180e-6)
    assert together["idle"] == pytest.approx(0.55)
    assert [(row["kernel"], row["calls"]) for row in each] == [("product", 2), ("copy", 1)]
    assert each[0]["share"] == pytest.approx(150 / 400)
