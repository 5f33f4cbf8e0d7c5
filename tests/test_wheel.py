"""An installed wheel contains the shipped configurations, and works without a repository."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "experiments"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages with the content of the wheel."""
    folder = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as content:
        content.extractall(folder)
    return folder


def run(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python on the installed package, in a folder."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if "__pycache__" not in path.parts}


def test_the_wheel_has_every_configuration_unchanged_and_nothing_else_of_the_experiments(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as content:
        inside = {name: content.read(name) for name in content.namelist() if "/experiments/" in name}
    expected = {
        f"memformer_pl/experiments/{path.relative_to(EXPERIMENTS).as_posix()}": path.read_bytes()
        for path in EXPERIMENTS.rglob("*.yaml")
    }
    assert inside == expected
    assert len(inside) > 30


def test_names_are_found_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    done = run(installed, tmp_path, "-m", "memformer_pl", "fit", "--config", "quickstart", "--print_config")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["model"]["model"]["init_args"]["slots"] == 32
    code = "from memformer_pl.sweeps import shipped; print(shipped.config('quickstart'), shipped.checkout())"
    told = run(installed, tmp_path, "-c", code).stdout
    assert told == f"{installed / 'memformer_pl' / 'experiments' / 'quickstart.yaml'} None\n"


@pytest.mark.slow
def test_results_of_a_shipped_table_are_kept_out_of_the_package(installed: Path, tmp_path: Path) -> None:
    before = files(installed)
    small = ["model.model.init_args.dim=8", "data.corpus.examples=40", "data.corpus.questions=1"]
    short = ["trainer.max_steps=1", "trainer.val_check_interval=1", "data.batch_size=2", "data.evaluation_batch_size=8"]
    words = ["--only", "memformer", "--seeds", "0", "--options", *small, *short, f"data.cache={tmp_path / 'cache'}"]
    swept = run(installed, tmp_path, "-m", "memformer_pl", "sweep", "recall/copy/rows", "--runs", "mine", *words)
    assert swept.returncode == 0, swept.stdout + swept.stderr
    made = run(installed, tmp_path, "-m", "memformer_pl", "tables", "recall/copy/rows", "--runs", "mine")
    assert made.returncode == 0, made.stderr
    assert "| Memformer, 16 slots |" in (tmp_path / "mine" / "recall" / "copy" / "rows.md").read_text(encoding="utf-8")
    assert '"row": "memformer"' in (tmp_path / "mine" / "recall" / "copy" / "rows.jsonl").read_text(encoding="utf-8")
    assert files(installed) == before


def test_code_inside_another_repository_is_named_by_its_version(installed: Path, tmp_path: Path) -> None:
    git = ["git", "-c", "user.name=a", "-c", "user.email=a", "-C"]
    for around in (tmp_path, installed):
        subprocess.run([*git, str(around), "init", "-q"], check=True)
        subprocess.run([*git, str(around), "commit", "-q", "--allow-empty", "-m", "another's"], check=True)
    code = "from memformer_pl.sweeps.runner import commit; from importlib.metadata import version\n"
    told = run(installed, tmp_path, "-c", f"{code}print(commit() == version('memformer-pl'))")
    assert told.stdout == "True\n", told.stderr
