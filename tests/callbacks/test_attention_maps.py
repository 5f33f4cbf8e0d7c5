"""Attention is kept weight by weight, of the documents, layers and slots that were asked for, and of nothing else."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from models import LENGTH, memformer
from planted import Planted
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from watched import ALL_MAPS, data_of, random_documents, record, validate

from memformer_pl.callbacks import AttentionMaps
from memformer_pl.callbacks.attention_maps import chosen_maps, text_of
from memformer_pl.callbacks.pictures import WIDEST, picture, tiles
from memformer_pl.callbacks.traces import Maps, Recorder, Trace, memory_probes
from memformer_pl.data import Bytes
from memformer_pl.errors import OptionError
from memformer_pl.models import Memformer

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")


def small(**sizes: int) -> Memformer:
    return Memformer(
        **{"vocab_size": 256, "dim": 8, "heads": 2, "encoder_layers": 2, "decoder_layers": 1, "slots": 3, **sizes},
        segment_length=8,
    )


def test_a_trace_does_not_depend_on_other_lanes() -> None:
    model, packed = memformer(), random_documents(23, 31, 7, 12)
    counts = {0: 5, 1: 7, 2: 2, 3: 3}
    alone, beside = (record(model, packed, counts, lanes=lanes) for lanes in (1, 3))
    assert alone.keys() == beside.keys() == counts.keys()
    for document in counts:
        for one, other in zip(alone[document], beside[document], strict=True):
            np.testing.assert_allclose(one, other, atol=1e-3)  # maps are kept in half precision


def test_a_trace_has_the_tokens_of_its_document_and_weights_that_sum_to_one() -> None:
    packed = random_documents(23, 31)
    for document, trace in record(memformer(), packed, {0: 5, 1: 7}, lanes=2).items():
        written = trace.tokens[trace.tokens >= 0]
        # the last segment is never written
        assert written.tolist() == packed.document(document)[: len(written)].tolist()
        assert len(trace.tokens) == -(-packed.lengths[document] // LENGTH) - 1
        np.testing.assert_allclose(trace.retention + trace.writing.astype(np.float32).sum(-1), 1, atol=2e-3)
        assert trace.reading.shape[1:] == (2, 2, LENGTH + 1, 3)
        np.testing.assert_allclose(trace.reading.astype(np.float32).sum(-1), 1, atol=2e-3)


def test_only_the_chosen_segments_layers_and_slots_are_recorded() -> None:
    model, packed = memformer(), random_documents(40, 31)
    whole = record(model, packed, {1: 7}, lanes=2)
    part = record(model, packed, {1: 4}, lanes=2, maps=Maps(layers=[1], slots=[2, 0]))
    assert part.keys() == {1}
    np.testing.assert_array_equal(part[1].reading[:, 0], whole[1].reading[:3, 1][..., [2, 0]])
    np.testing.assert_array_equal(part[1].writing, whole[1].writing[:3][:, :, [2, 0]])
    without = record(model, packed, {1: 7}, lanes=2, maps=None)
    assert without[1].writing.size == without[1].reading.size == 0
    np.testing.assert_array_equal(without[1].retention, whole[1].retention)


def test_a_document_of_one_segment_leaves_no_trace() -> None:
    assert record(memformer(), random_documents(4, 12), {0: 1, 1: 3}, lanes=1).keys() == {1}


def test_probes_are_watched_only_in_rollouts_with_a_document_that_is_followed() -> None:
    model = memformer()
    recorder = Recorder(model, segments={5: 2}, finish=dict[int, Trace]().__setitem__, maps=Maps([0], [0]))
    watched = {}
    for name, rows in {"without": [[0, 1]], "with": [[0, 5]]}.items():
        recorder.start(torch.tensor(rows))
        watched[name] = {probe for probe, module in memory_probes(model).items() if module.watched}
        recorder.stop()
    assert watched == {"without": set(), "with": {"retention", "writing", "reading 0"}}
    assert not any(probe.watched for probe in memory_probes(model).values())


def test_an_event_saves_what_is_documented_and_tensorboard_shows_it(
    tmp_path: Path, texts: Path, pack_cache: Path
) -> None:
    corpus, model = data_of(texts, pack_cache), small()
    validate(tmp_path, model, corpus, AttentionMaps(documents=[1, 2], layers=[1], slots=[0, 2], segments=5))
    arrays = np.load(tmp_path / "attention_maps" / "step=0.npz")
    assert arrays["documents"].tolist() == [1, 2]
    assert (arrays["layers"].tolist(), arrays["slots"].tolist()) == ([1], [0, 2])
    for document in (1, 2):
        text = Bytes().decode(corpus.packed.validation.document(document))
        writes = min(-(-len(text) // 8), 5) - 1
        assert "".join(arrays[f"text_{document}"].flat) == text[: writes * 8]
        assert arrays[f"retention_{document}"].shape == (writes, 2, 2)
        assert arrays[f"writing_{document}"].shape == (writes, 2, 2, 8)
        assert arrays[f"reading_{document}"].shape == (writes, 1, 2, 9, 2)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert sorted(events.Tags()["images"]) == [
        f"attention_maps/document {document}, {name}" for document in (1, 2) for name in ("reading", "writing")
    ]
    (image,) = events.Images("attention_maps/document 1, reading")
    # a tile for each of two heads, an empty line between them
    assert (image.height, image.width) == (9 * 8, (2 + 1 + 2) * 8)


def test_a_writer_without_a_reader_is_mapped_too(tmp_path: Path, texts: Path, pack_cache: Path) -> None:
    validate(
        tmp_path, Planted(vocab_size=256, segment_length=8), data_of(texts, pack_cache), AttentionMaps(documents=[1])
    )
    arrays = np.load(tmp_path / "attention_maps" / "step=0.npz")
    assert arrays["reading_1"].size == 0
    np.testing.assert_allclose(arrays["writing_1"][:, 0, :, 0], np.float16([[1, 0.6, 0.1, 0]] * len(arrays["text_1"])))


def test_a_model_without_probes_yields_no_plot_and_no_error(tmp_path: Path, texts: Path, pack_cache: Path) -> None:
    validate(tmp_path, small(slots=0), data_of(texts, pack_cache), AttentionMaps(documents=[0], layers=[7], slots=[7]))
    assert not (tmp_path / "attention_maps").exists()
    assert EventAccumulator(str(tmp_path)).Reload().Tags()["images"] == []


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"documents": [99]}, "documents: there is no number 99, they go from 0 to 3"),
        ({"layers": [0, 2]}, "layers: there is no number 2, they go from 0 to 0"),
        ({"slots": [-1]}, "slots: there is no number -1, they go from 0 to 3"),
        ({"segments": 1}, "segments must be at least 2, one to write and one to read, got 1"),
    ],
)
def test_what_does_not_exist_is_refused_before_anything_runs(
    command: Callable[..., object], small: Path, tmp_path: Path, asked: dict[str, object], expected: str
) -> None:
    (tmp_path / "watch.yaml").write_text(f"trainer: {{callbacks: [{{class_path: AttentionMaps, init_args: {asked}}}]}}")
    outcome = command("fit", "--config", small, "--config", tmp_path / "watch.yaml")
    (line,) = outcome.errors
    assert outcome.code == 2
    assert expected in line
    assert "Traceback" not in outcome.output
    assert not list(tmp_path.rglob("*.ckpt"))


def test_layers_and_slots_are_all_by_default_and_refused_by_number() -> None:
    assert chosen_maps(small(), layers=None, slots=None, segments=2) == ALL_MAPS
    with pytest.raises(OptionError, match="slots: there is no number 3, they go from 0 to 2"):
        chosen_maps(small(), layers=None, slots=[3], segments=2)
    assert chosen_maps(small(slots=0), layers=[5], slots=[5], segments=2) is None


def test_a_picture_is_white_for_nothing_and_black_for_the_most() -> None:
    shown = picture(np.array([[0.0, 0.25], [0.5, np.nan]]), most=0.5)
    assert shown.shape == (16, 16)
    assert shown[::8, ::8].tolist() == [[255, 127], [0, 255]]
    for columns, width in (
        (WIDEST, WIDEST),
        (WIDEST + 1, WIDEST // 2 + 1),
        (2 * WIDEST - 1, WIDEST),
        (3 * WIDEST, WIDEST),
    ):
        assert picture(np.ones((1, columns)), most=1.0).shape == (8, width)


def test_tiles_stand_beside_and_below_each_other_with_a_line_between() -> None:
    one = np.ones((2, 2))
    expected = [[1, 1, 0, 1, 1], [1, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 1, 0, 1, 1], [1, 1, 0, 1, 1]]
    assert tiles([[one, one], [one, one]]).tolist() == expected


def test_the_text_of_tokens_is_theirs_one_by_one() -> None:
    tokens = np.array([[104, 105, -1], [10, 255, 0]])  # numpy would drop a null at the end of a text
    assert text_of(tokens, Bytes()).tolist() == [["h", "i", ""], ["\n", "�", "␀"]]
