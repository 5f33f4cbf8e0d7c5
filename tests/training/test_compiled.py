"""A model whose blocks are compiled computes what it computes otherwise, and is compiled once."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning import Trainer
from models import MODELS

import memformer_pl
from memformer_pl import SegmentTask
from memformer_pl.errors import UsageError
from memformer_pl.models import LSTM, Transformer

PROGRAM = Path(__file__).parents[1] / "helpers" / "compiled.py"


def outcome(*arguments: object) -> Any:
    run = subprocess.run([sys.executable, PROGRAM, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize(
    "name",
    ["memformer", "memformer with ultra memory", "memformer decoder", "transformer xl", "stable hadamard memory"],
)
def test_compiled_replay_equals_a_plain_loop_in_double_precision(name: str, dropout: float) -> None:
    differences = outcome("in_double_precision", name, dropout)
    assert differences["losses"] < 1e-12
    assert differences["gradients"] < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, build in MODELS.items() if build().regions()])
def test_compiled_replay_of_every_model_equals_a_plain_loop(name: str) -> None:
    differences = outcome("of_contract", name)
    assert differences["losses"] < 1e-12
    assert differences["gradients"] < 1e-12


@pytest.mark.slow
def test_numbers_drawn_in_compiled_code_are_those_drawn_otherwise() -> None:
    """C++ leaves the overflow of integers undefined, and theirs overflow."""
    assert outcome("drawn_in_a_block")["product"] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_in_bfloat16_it_is_as_near_to_single_precision_as_the_plain_loop(dropout: float) -> None:
    distance = outcome("in_bfloat16", dropout)
    assert distance["compiled"] < 1.25 * distance["plain"]


@pytest.mark.slow
def test_nothing_is_compiled_again_over_fifty_rollouts_of_ragged_text() -> None:
    counted = outcome("compiled_again", 50)
    assert counted["continues"] == [False, True]
    assert counted["before"]["unique_graphs"] > 0
    assert counted["after"] == counted["before"]


@pytest.mark.slow
def test_a_run_with_compiled_blocks_trains_and_watches_its_validations(tmp_path: Path) -> None:
    """Hooks on parts of a block, which a compiled one could not have, see what they see otherwise."""
    sizes = ["--model.model.init_args.dim", "16", "--model.model.init_args.heads", "2"]
    batch = ["--data.batch_size", "2", "--data.evaluation_batch_size", "8"]
    steps = ["--trainer.max_steps", "3", "--trainer.val_check_interval", "3", "--data.cache", str(tmp_path / "cache")]
    code = str(Path(memformer_pl.__file__).parent / "layers")
    corpus = ["--data.corpus", "Files", "--data.corpus.paths", f"{code}/*.py"]
    maps = []
    for compiled in ("false", "true"):
        folder = tmp_path / compiled
        where = ["--trainer.logger.init_args.save_dir", str(folder), "--model.compile_blocks", compiled]
        command = [sys.executable, "-m", "memformer_pl", "fit", "--config", "quickstart", "--config", "watch"]
        subprocess.run([*command, *sizes, *batch, *steps, *corpus, *where], check=True, capture_output=True)
        (path,) = folder.rglob("attention_maps/*.npz")
        maps.append(np.load(path))
    plain, compiled_maps = maps
    assert plain.files
    assert plain.files == compiled_maps.files
    for name in plain.files:
        if plain[name].dtype.kind == "f":
            np.testing.assert_allclose(compiled_maps[name], plain[name], rtol=1e-3, atol=1e-4)


def test_a_model_without_regions_is_refused() -> None:
    with pytest.raises(UsageError, match="LSTM has no regions to compile: leave compile_blocks off"):
        SegmentTask(model=LSTM(vocab_size=5, dim=4), compile_blocks=True)


def test_graphs_are_refused_where_they_cannot_be_recorded() -> None:
    model = Transformer(vocab_size=5, dim=4, heads=1, layers=1)
    with pytest.raises(UsageError, match="cuda_graph cannot record gradient='checkpointed'"):
        SegmentTask(model=model, gradient="checkpointed", cuda_graph=True)
    model.growing = {"rows": 1}
    with pytest.raises(UsageError, match=r"cuda_graph needs a state of the same size .*Transformer grows: set"):
        SegmentTask(model=model, cuda_graph=True)
    del model.growing
    task = SegmentTask(model=model, cuda_graph=True)
    task.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(UsageError, match="cuda_graph needs a GPU and a single process, got cpu and 1"):
        task.configure_callbacks()
