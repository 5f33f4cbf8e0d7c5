"""The callbacks that watch memory, in a run from the command line: in validation alone, and on several processes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_ddp import in_two_processes

WATCH = Path(__file__).parents[1] / "experiments" / "watch.yaml"


def test_every_validation_leaves_an_event_and_the_check_before_training_none(
    command: Callable[..., object], small: Path, tmp_path: Path
) -> None:
    outcome = command("fit", "--config", small, "--config", WATCH, "--trainer.val_check_interval", "2")
    assert (outcome.code, outcome.errors) == (0, [])
    for name in ("slot_retention", "attention_maps"):
        events = sorted(path.name for path in (tmp_path / "run" / "version_0" / name).iterdir())
        assert events == ["step=2.npz", "step=4.npz"]


@pytest.mark.slow
def test_two_ranks_count_what_one_rank_counts(command: Callable[..., object], small: Path, tmp_path: Path) -> None:
    base = ["--config", small, "--config", WATCH, "--trainer.precision", "64-true"]
    named = "--trainer.logger.init_args.name"
    assert command("validate", *base, named, "one").code == 0
    in_two_processes(*base, named, "two", folder=tmp_path, subcommand="validate")
    for name in ("slot_retention", "attention_maps"):
        one, two = (np.load(tmp_path / run / "version_0" / name / "step=0.npz") for run in ("one", "two"))
        assert one.files == two.files
        for array in one.files:
            if one[array].dtype.kind == "U":
                assert one[array].tolist() == two[array].tolist()
            else:
                np.testing.assert_allclose(two[array], one[array], rtol=1e-6)
