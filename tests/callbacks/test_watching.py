"""The callbacks that watch memory, in a run from the command line: in validation alone, of every model, and on several
processes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from models import MODELS
from two_processes import in_two_processes
from watched import data_of, validate

from memformer_pl.callbacks import AttentionMaps, SlotRetention
from memformer_pl.callbacks.traces import slots_of
from memformer_pl.contract import Segment, SegmentModel, SegmentOutput, State
from memformer_pl.models import Memformer

WATCH = Path(__file__).parents[2] / "experiments" / "watch.yaml"


def test_every_validation_leaves_an_event_and_the_check_before_training_none(
    command: Callable[..., object], small: Path, tmp_path: Path
) -> None:
    outcome = command("fit", "--config", small, "--config", WATCH, "--trainer.val_check_interval", "2")
    assert (outcome.code, outcome.errors) == (0, [])
    for name in ("slot_retention", "attention_maps"):
        events = sorted(path.name for path in (tmp_path / "run" / "version_0" / name).iterdir())
        assert events == ["step=2.npz", "step=4.npz"]


def test_there_are_hooks_only_in_a_validation_that_is_to_be_watched(
    command: Callable[..., object], small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, bool]] = []
    step = Memformer.step

    def looked_at(model: Memformer, segment: Segment, state: State) -> tuple[SegmentOutput, State]:
        seen.append((model.training, any(module._forward_hooks for module in model.modules())))
        return step(model, segment, state)

    monkeypatch.setattr(Memformer, "step", looked_at)
    options = ["--config", small, "--trainer.val_check_interval", "2"]
    assert command("fit", *options).code == 0
    assert set(seen) == {(True, False), (False, False)}
    seen.clear()
    assert command("fit", *options, "--config", WATCH, "--trainer.logger.init_args.version", "watched").code == 0
    assert {hooked for training, hooked in seen if training} == {False}
    assert (False, True) in seen


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_every_model_can_be_watched_and_costs_what_it_costs_alone(
    build: Callable[..., SegmentModel], tmp_path: Path, texts: Path, pack_cache: Path
) -> None:
    model, corpus = build(vocab_size=256, segment_length=8), data_of(texts, pack_cache)
    alone = validate(tmp_path / "alone", model, corpus)
    watched = validate(tmp_path / "watched", model, corpus, SlotRetention(), AttentionMaps())
    costs = alone.callback_metrics
    assert {name: watched.callback_metrics[name] for name in costs} == costs
    files = {path.parent.name for path in tmp_path.rglob("*.npz")}
    assert files == ({"slot_retention", "attention_maps"} if slots_of(model) else set())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:validate has no --ckpt_path")
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
