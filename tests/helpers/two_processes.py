"""The command line on two ranks, however they are started."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

LAUNCH = Path(__file__).parents[2] / "experiments" / "launch"
SRUN = """#!/usr/bin/env bash
# What srun does on one node.
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NODEID=0 "$@" &
    processes+=($!)
done
for process in "${processes[@]}"; do wait "$process" || exit 1; done
"""
SLURM = {
    "SLURM_JOB_ID": "1",
    "SLURM_JOB_NAME": "memformer",
    "SLURM_NNODES": "1",
    "SLURM_NTASKS": "2",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_CPUS_PER_TASK": "1",
    "SLURM_NODELIST": "127.0.0.1",
}


def start(launcher: str, folder: Path, subcommand: str) -> tuple[list[str], dict[str, str]]:
    """How two processes of the command line are started, and what is in their environment."""
    if launcher == "torchrun":
        return ["bash", f"{LAUNCH}/torchrun.sh"], {"PROCESSES": "2"}
    if launcher == "slurm":
        (folder / "srun").write_text(SRUN)
        (folder / "srun").chmod(0o755)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = {"MASTER_PORT": str(free.getsockname()[1])}
        return ["bash", f"{LAUNCH}/slurm.sh"], {**SLURM, **port, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    on_two = ["--trainer.strategy", "ddp", "--trainer.devices", "2"]
    return [sys.executable, "-m", "memformer_pl", subcommand, *on_two], {}


def in_two_processes(
    *args: object, launcher: str = "lightning", folder: Path, subcommand: str = "fit", code: int = 0
) -> str:
    """Run on two ranks; whatever happens, no process is left behind. The launch scripts always train."""
    words, more = start(launcher, folder, subcommand)
    paths = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHON": sys.executable, **more}
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [*words, *map(str, args)]
    with subprocess.Popen(command, env=environment, start_new_session=True, **streams) as process:
        try:
            printed, _ = process.communicate(timeout=150)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == code, printed
    return str(printed)
