"""Which slots retain, aggregate and read, and for how long: by hand, on a planted model, and without slots."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from lightning import LightningModule, Trainer
from planted import RETENTION, Planted
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from watched import data_of, validate

from memformer_pl.callbacks import SlotRetention
from memformer_pl.callbacks.slot_retention import (
    GAPS,
    KINDS,
    SlotStatistics,
    by_kind,
    half_life,
    kind_of,
    mean_angle,
    middle_shares,
    prevailing,
    shares,
    slot_arrays,
    summary,
)
from memformer_pl.callbacks.traces import Trace, memory_probes
from memformer_pl.errors import OptionError
from memformer_pl.models import Memformer
from memformer_pl.training.task import SegmentTask

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")


def trace(retention: np.ndarray) -> Trace:
    """Of self-weights ``[T, H, M]``, with slots a tenth of a radian further from their start at each write."""
    writes, _, slots = retention.shape
    angle = np.broadcast_to(np.arange(writes)[:, None] / 10, (writes, slots))
    nothing = np.empty((writes, 0))
    return Trace(np.zeros((writes, 1), dtype=np.int64), retention.astype(np.float32), angle, nothing, nothing)


def constant(*weights: float, writes: int = 20) -> np.ndarray:
    """One head, a slot for each self-weight, which stays."""
    return np.broadcast_to(np.array(weights), (writes, 1, len(weights)))


def test_the_papers_three_examples_are_one_of_each_kind() -> None:
    assert [KINDS[kind] for kind in kind_of(np.array([0.92, 0.34, 0.07]))] == list(KINDS)
    # at the borders, and at the ends
    assert kind_of(np.array([1.0, 0.63, 0.6299, 0.205, 0.2049, 0.0])).tolist() == [0, 0, 1, 1, 2, 2]


def test_the_half_life_of_constant_retention_is_that_of_exponential_decay() -> None:
    weights = np.array([0.99, 0.9, 0.5, 0.25])
    statistics = SlotStatistics.of(trace(constant(*weights)))
    lives = half_life(statistics.survival, statistics.spans)[0]
    np.testing.assert_allclose(lives, np.log(0.5) / np.log(weights.astype(np.float32)), rtol=1e-6)


def test_what_never_changes_lives_for_ever_and_what_is_copied_anew_not_at_all() -> None:
    statistics = SlotStatistics.of(trace(constant(1.0, 0.0)))
    assert half_life(statistics.survival, statistics.spans)[0].tolist() == [np.inf, 0.0]


def test_the_half_life_of_a_slot_that_is_overwritten_once_by_hand() -> None:
    retention = np.array([1, 1, 1, 0, 1, 1, 1.0])[:, None, None]
    statistics = SlotStatistics.of(trace(retention))
    assert statistics.spans[:4].tolist() == [7, 6, 4, 0]
    assert statistics.survival[:4, 0, 0].tolist() == [6, 4, 0, 0]
    # 2 of 3 survive two writes, none survives four: half is lost as soon as two are over
    assert half_life(statistics.survival, statistics.spans).tolist() == [[2.0]]


def test_a_slot_lives_as_long_as_the_mean_of_its_parts() -> None:
    retention = np.stack((np.ones(20), np.zeros(20)), axis=1)[:, :, None]
    statistics = SlotStatistics.of(trace(retention))
    arrays = slot_arrays(statistics, {}, Planted(vocab_size=2, segment_length=1))
    assert arrays["part_half_life"].tolist() == [[np.inf], [0.0]]
    assert arrays["half_life"].tolist() == [1.0]  # half is gone after the first write, the other half stays
    assert middle_shares(arrays)["parts"] == {"retaining": 0.5, "aggregating": 0.0, "reading": 0.5}
    assert middle_shares(arrays)["slots"] == {"retaining": 0.0, "aggregating": 1.0, "reading": 0.0}


def test_kinds_are_counted_where_they_are_in_the_document() -> None:
    retention = np.concatenate((constant(0.1, 0.9, writes=5), constant(0.9, 0.9, writes=15)))
    statistics = SlotStatistics.of(trace(retention))
    by_tenth = shares(statistics.slots.sum(1))
    assert by_tenth[:4, 2].tolist() == [0.5, 0.5, 0.25, 0.0]
    assert shares(statistics.first[:, 0])[[0, 4, 5], 2].tolist() == [0.5, 0.5, 0.0]
    assert np.isnan(shares(statistics.first[:, 0])[20:]).all()
    assert prevailing(statistics.slots).tolist() == [0, 0]
    np.testing.assert_allclose(mean_angle(statistics._asdict()), np.degrees([0.95, 0.95]))


def test_the_statistics_of_documents_add_up() -> None:
    random = np.random.default_rng(0)
    one, other = (SlotStatistics.of(trace(random.random((writes, 2, 3)))) for writes in (7, 20))
    both = one.plus(other)
    assert both.spans.tolist() == [max(7 - gap + 1, 0) + max(20 - gap + 1, 0) for gap in GAPS.tolist()]
    assert both.slots.sum() == (7 + 20) * 3
    assert both.parts.sum() == (7 + 20) * 3 * 2
    np.testing.assert_array_equal(both.survival, one.survival + other.survival)


def test_the_mean_of_a_kind_without_slots_is_not_a_number() -> None:
    means = by_kind(np.array([1.0, 3.0, 7.0]), np.array([0, 0, 2]))
    assert means[[0, 2]].tolist() == [2.0, 7.0]
    assert np.isnan(means[1])
    assert np.isnan(by_kind(np.empty(0), np.array([0, 0, 2]))).all()


def test_a_planted_model_is_reported_as_it_was_planted(tmp_path: Path, texts: Path, pack_cache: Path) -> None:
    corpus = data_of(texts, pack_cache)
    trainer = validate(tmp_path, Planted(vocab_size=256, segment_length=8), corpus, SlotRetention(documents=[1]))
    arrays = np.load(tmp_path / "slot_retention" / "step=0.npz")
    assert [KINDS[kind] for kind in prevailing(arrays["slots"])] == ["reading", "aggregating", *["retaining"] * 2]
    assert arrays["half_life"][[0, 3]].tolist() == [0.0, np.inf]
    np.testing.assert_allclose(arrays["half_life"][1:3], np.log(0.5) / np.log([0.4, 0.9]), rtol=1e-5)
    assert mean_angle(arrays)[3] == 0
    assert mean_angle(arrays)[0] > 10
    assert arrays["norms"].size == 0
    segments = -(-corpus.packed.validation.lengths // 8)
    assert arrays["spans"][0] == segments.sum()
    np.testing.assert_allclose(arrays["retention_1"], np.broadcast_to(RETENTION, (segments[1], 1, 4)))
    assert trainer.callback_metrics["slots/reading"] == 0.25


def test_tensorboard_shows_shares_and_a_picture_of_retention(tmp_path: Path, texts: Path, pack_cache: Path) -> None:
    from PIL import Image

    corpus = data_of(texts, pack_cache)
    validate(tmp_path, Planted(vocab_size=256, segment_length=8), corpus, SlotRetention(documents=[2]))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Scalars("slots/retaining")[0].value == 0.5
    (image,) = events.Images("slot_retention/document 2")
    (tmp_path / "image.png").write_bytes(image.encoded_image_string)
    shown = np.asarray(Image.open(tmp_path / "image.png").convert("L"))
    writes = -(-corpus.packed.validation.lengths[2] // 8)
    assert shown.shape == (4 * 8, writes * 8)
    # white is what is kept: slot 0 is black, slot 3 white
    np.testing.assert_array_equal(shown[4::8, 4::8], np.array([[0], [102], [229], [255]]).repeat(writes, 1))


def test_a_memformer_writes_all_segments_but_the_last(tmp_path: Path, texts: Path, pack_cache: Path) -> None:
    corpus = data_of(texts, pack_cache)
    model = Memformer(
        vocab_size=256, dim=8, heads=2, encoder_layers=1, decoder_layers=1, slots=3, segment_length=8, dropout=0.0
    )
    validate(tmp_path, model, corpus, SlotRetention())
    arrays = np.load(tmp_path / "slot_retention" / "step=0.npz")
    segments = -(-corpus.packed.validation.lengths // 8)
    assert segments.argmax() == 3  # shown by default
    assert arrays["spans"][0] == (segments - 1).sum()
    assert arrays["retention_3"].shape == (segments[3] - 1, 2, 3)
    assert arrays["retention_3"].min() > 0
    # a share; in float32 that of a slot that sees nothing like itself may be all
    assert arrays["retention_3"].mean() < arrays["retention_3"].max() <= 1
    np.testing.assert_allclose(arrays["norms"], model.memory_norm.bias.detach().norm(dim=-1).numpy())
    assert not any(probe.watched for probe in memory_probes(model).values())
    assert not model._forward_hooks


def test_a_model_without_probes_yields_no_plot_and_no_error(tmp_path: Path, texts: Path, pack_cache: Path) -> None:
    model = Memformer(vocab_size=256, dim=8, heads=2, encoder_layers=1, decoder_layers=1, slots=0, segment_length=8)
    trainer = validate(tmp_path, model, data_of(texts, pack_cache), SlotRetention())
    assert not (tmp_path / "slot_retention").exists()
    assert "validation/loss" in trainer.callback_metrics
    assert "slots/retaining" not in trainer.callback_metrics
    assert EventAccumulator(str(tmp_path)).Reload().Tags()["images"] == []


def test_what_is_not_finite_is_not_logged() -> None:
    statistics = SlotStatistics.of(trace(constant(1.0)))
    assert "slots/half_life" not in summary(slot_arrays(statistics, {}, Planted(vocab_size=2, segment_length=1)))


def test_a_document_that_does_not_exist_is_refused_before_anything_runs(
    command: Callable[..., object], small: Path, tmp_path: Path, texts: Path, pack_cache: Path
) -> None:
    (tmp_path / "watch.yaml").write_text(
        "trainer: {callbacks: [{class_path: SlotRetention, init_args: {documents: [99]}}]}"
    )
    outcome = command("fit", "--config", small, "--config", tmp_path / "watch.yaml")
    (line,) = outcome.errors
    assert outcome.code == 2
    assert "documents: there is no number 99, they go from 0 to 3" in line
    with pytest.raises(OptionError, match="no number -1"):
        validate(
            tmp_path,
            Planted(vocab_size=256, segment_length=8),
            data_of(texts, pack_cache),
            SlotRetention(documents=[-1]),
        )


def test_a_run_that_cannot_be_watched_is_refused_at_the_start() -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    for module in (SegmentTask(model=Planted(vocab_size=2, segment_length=2)), LightningModule()):
        with pytest.raises(TypeError, match="SlotRetention needs a SegmentTask, and a SegmentData"):
            SlotRetention().setup(trainer, module, "fit")
