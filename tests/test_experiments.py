"""Every configuration in ``experiments/`` takes a step, and the scripts there run."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import Outcome

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
OVERLAYS = {"no_memory.yaml": "quickstart.yaml", "watch.yaml": "quickstart.yaml"}
SMALL = [
    "--data.corpus=Pydoc",
    "--data.lanes=2",
    "--data.evaluation_lanes=8",
    "--model.model.init_args.dim=16",
    "--model.model.init_args.heads=2",
    "--trainer.max_steps=1",
    "--trainer.val_check_interval=1",
    "--trainer.limit_val_batches=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


@pytest.mark.parametrize("config", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_an_experiment_takes_a_step(
    config: Path, command: Callable[..., Outcome], tmp_path: Path, pack_cache: Path
) -> None:
    base = [f"--config={EXPERIMENTS / OVERLAYS[config.name]}"] if config.name in OVERLAYS else []
    where = [f"--data.cache={pack_cache}", f"--trainer.logger.init_args.save_dir={tmp_path}"]
    outcome = command("fit", *base, f"--config={config}", *SMALL, *where)
    assert outcome.code == 0
    assert [path.name for path in tmp_path.rglob("documents.csv")] == ["documents.csv"]


@pytest.mark.parametrize("config", sorted(EXPERIMENTS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_an_experiment_begins_with_its_question(config: Path) -> None:
    assert config.read_text().startswith("# Question:")
    assert yaml.safe_load(config.read_text())


def test_compare_says_how_much_a_run_saves(tmp_path: Path) -> None:
    for name, bits in (("a", (40, 60)), ("b", (60, 100))):
        (tmp_path / name).mkdir()
        rows = "\n".join(f"{place},10,{cost}" for place, cost in enumerate(bits))
        (tmp_path / name / "documents.csv").write_text(f"document,sizes,with_memory\n{rows}\n")
    compare = [sys.executable, EXPERIMENTS / "compare.py", tmp_path / "a", tmp_path / "b"]
    told = subprocess.run(compare, capture_output=True, text=True, check=True).stdout
    # (60 - 40) / 10 = 2 and (100 - 60) / 10 = 4: mean 3, standard deviation sqrt(2), error sqrt(2) / sqrt(2) = 1
    assert "A saves 3.0000 ± 1.0000 bits per byte, on 100% of 2 documents" in told


def test_replay_holds_one_segment_whatever_the_horizon() -> None:
    sys.path.insert(0, str(EXPERIMENTS / "benchmarks"))
    try:
        from replay_cost import peak_apart
    finally:
        sys.path.pop(0)
    few, many = (peak_apart("replay", horizon, 2, 4, 128) for horizon in (4, 64))
    assert many["peak"] <= 1.05 * few["peak"] + many["states"] - few["states"]
    assert peak_apart("bptt", 8, 2, 4, 128)["peak"] > 1.3 * few["peak"]
