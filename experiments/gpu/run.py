"""Do the most valuable jobs that have no result yet, as many as fit the time on a GPU.

    python experiments/gpu/run.py --minutes 8 --out DIR         # the jobs of jobs.py without a file in results/gpu
    python experiments/gpu/run.py --minutes 0 --out DIR         # only say what is left
    python experiments/gpu/run.py --minutes 8 --out DIR --toy   # the same at toy size, on a CPU

A job runs in a process of its own, which may take all the time that is left. When it ends, ``DIR/NAME.json`` and
``NAME.md`` appear at once and whole, with the versions and the device in their settings; its output is in ``NAME.log``.
A job that fails leaves ``NAME.failed.json``, with the end of its log and the rows that it had written, and is tried
again next time. Killing the queue loses only the job under way; started again with the same folder, it goes on.

Needs nothing but Python, so it can report that a package is missing.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs import JOBS, Job

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results" / "gpu"
END_OF_LOG = 40
"""Lines of the log in the record of a failed job."""


def main() -> None:
    """Run the queue, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True, help="time for all jobs")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--toy", action="store_true", help="run every job at toy size, on a CPU")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("the queue was told to stop"))  # and takes its job along
    machine = machine_settings()
    if not options.toy and options.minutes and machine["torch"] and not machine["gpu"]:
        sys.exit("error: torch finds no GPU here. Try the queue at toy size with --toy")
    queue(JOBS, minutes=options.minutes, out=options.out, machine=machine, toy=options.toy)


def queue(jobs: Sequence[Job], *, minutes: float, out: Path, machine: Mapping[str, Any], toy: bool = False) -> None:
    """Do the jobs in turn that have no result yet and fit the time that is left; print a line for each."""
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    for job in jobs:
        left = end - time.monotonic()
        if any((folder / f"{job.name}.json").exists() for folder in (out, *([] if toy else [RESULTS]))):
            said = "has a result"
        elif job.seconds > left:
            said = f"is left: takes {job.seconds} s, and there are {max(left, 0):.0f}"
        else:
            said = do(job, out, seconds=left, machine=machine, toy=toy)
        print(f"{job.name}: {said}", flush=True)


def do(job: Job, out: Path, *, seconds: float, machine: Mapping[str, Any], toy: bool) -> str:
    """Do a job, and write its result or its failure; say which."""
    partial, table = out / f"{job.name}.partial.json", out / f"{job.name}.partial.md"
    failure, log = out / f"{job.name}.failed.json", out / f"{job.name}.log"
    for old in (partial, table):
        old.unlink(missing_ok=True)
    arguments = [*job.command, *(job.toy if toy else ()), "--out", str(partial.resolve())]
    start = time.monotonic()
    failed = run([sys.executable, *arguments], log, seconds=seconds)
    took = round(time.monotonic() - start, 1)
    try:
        record = json.loads(partial.read_text())
    except (OSError, ValueError):  # there is none, or half of one
        record, failed = {"settings": {}, "rows": []}, failed or "it wrote no result"
    record["settings"] |= {**machine, "command": " ".join(arguments[:-2]), "took": took, "toy": toy}
    text = table.read_text() if table.exists() else markdown(record["rows"])
    for old in (partial, table, failure):
        old.unlink(missing_ok=True)
    if failed:
        said = log.read_text(errors="replace").splitlines()[-END_OF_LOG:]
        write(failure, json.dumps({**record, "failed": failed, "log": said}, indent=1) + "\n")
        return "\n".join([f"failed after {took} s: {failed}", *said])
    text += "\n" + ", ".join(f"{name} {value or 'not known'}" for name, value in machine.items()) + ".\n"
    write(out / f"{job.name}.md", text)
    write(out / f"{job.name}.json", json.dumps(record, indent=1) + "\n")
    return f"done in {took} s\n\n{text}"


def run(command: Sequence[str], log: Path, *, seconds: float) -> str | None:
    """Run a command from the root of the repository; say why it failed, if it did. Its children end with it."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    with log.open("w") as file:
        file.write(f"{' '.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
        )
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            stop(process)
            return f"stopped after {seconds:.0f} s, when no time was left"
        except BaseException:
            stop(process)
            raise
    return f"status {status}" if status else None


def stop(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and its children."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    new = path.with_name(f"{path.name}.partial")
    new.write_text(text)
    new.replace(path)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of rows with the columns of the first."""
    columns = list(rows[0]) if rows else []
    cells = [columns, ["---"] * len(columns), *([str(row.get(name, "")) for name in columns] for row in rows)]
    return "".join(f"| {' | '.join(line).replace(chr(10), ' ')} |\n" for line in cells)


def machine_settings() -> dict[str, str | None]:
    """What every result says of the machine and the code; None where it is not known."""
    torch = json.loads(output(sys.executable, "-c", ASK_TORCH) or "{}")  # in a process that then frees the device
    driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    changed = " with changes" if output("git", "status", "--porcelain", "--untracked-files=no") else ""
    commit = output("git", "rev-parse", "HEAD")
    return {
        **{name: torch.get(name) for name in ("gpu", "torch", "cuda")},
        "driver": driver.splitlines()[0] if driver else None,
        "python": platform.python_version(),
        "commit": commit + changed if commit else None,
    }


ASK_TORCH = """
import json, torch
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
print(json.dumps({"gpu": gpu, "torch": torch.__version__, "cuda": torch.version.cuda}))
"""


def output(*command: str) -> str | None:
    """What a command prints; None if it fails or does not exist."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    main()
