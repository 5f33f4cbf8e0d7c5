"""What memory is worth, gradients through time, figures, and the report of a checkpoint."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from models import LENGTH, MODELS, VOCAB, compressive, full, lamemo, memformer, transformer_xl
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from watched import random_documents, record

from memformer_pl.analysis import Choice, Findings, compose, draw, figures, look
from memformer_pl.analysis.ablation import Costs, by_position, costs, read, ways_for
from memformer_pl.analysis.report import table
from memformer_pl.analysis.through_time import by_distance, gradient_norms, rollout_of, through_time
from memformer_pl.analysis.viewer import format_half_life, held, packed, top
from memformer_pl.callbacks.slot_retention import TENTHS
from memformer_pl.callbacks.traces import slots_of
from memformer_pl.contract import SegmentModel, as_state
from memformer_pl.data import Bytes, LaneLoader
from memformer_pl.data.packing.documents import PackedDocuments
from memformer_pl.training.task import SegmentTask


def loader(packed: PackedDocuments, lanes: int = 2) -> LaneLoader:
    return LaneLoader(packed, batch_size=lanes, segment_length=LENGTH, horizon=3, shuffle=False)


def cost(model: SegmentModel, packed: PackedDocuments, *ways: str, shown: tuple[int, ...] = ()) -> Costs:
    segments = -(-packed.lengths // LENGTH)
    return costs(model.eval(), {way: loader(packed) for way in ways}, segments=segments, shown=shown)


def test_memory_on_and_reset_cost_what_the_task_says() -> None:
    model, packed = memformer(), random_documents(23, 31, 7, 58)
    found = cost(model, packed, "on", "reset", shown=(1,))
    task = SegmentTask(model=model)
    for place, reset_memory in enumerate((False, True)):
        totals = task.read_documents(loader(packed), documents=4, reset_memory=reset_memory).compute()
        np.testing.assert_allclose(found.bits[place].sum(-1) * np.log(2), totals[0].numpy(), rtol=1e-9)
        np.testing.assert_allclose(found.shown[1][place].sum(), found.bits[place, 1].sum(), rtol=1e-6)
    np.testing.assert_array_equal(found.tokens.sum(-1), packed.lengths)


def test_frozen_memory_is_as_it_is_until_the_middle_and_no_longer_written_from_there() -> None:
    model, packed = memformer(), random_documents(10 * LENGTH)
    segments = np.array([10])
    on, frozen = (list(read(model, loader(packed, 1), way=way, segments=segments)) for way in ("on", "frozen"))
    same = [torch.equal(a.output.token_losses, b.output.token_losses) for a, b in zip(on, frozen, strict=False)]
    # the state that the sixth segment (number 5) leaves is the first that is kept
    assert same[:10] == [True] * 6 + [False] * 4
    state = model.initial_state(1)
    with torch.no_grad():
        for step in frozen[:10]:
            output, next_state = model(step.segment, state)
            torch.testing.assert_close(output.token_losses, step.output.token_losses)
            state = next_state._replace(memory=state.memory) if step.positions[0] >= 5 else next_state


def test_shuffled_memory_is_that_of_the_neighbouring_lane() -> None:
    model, packed = memformer(), random_documents(3 * LENGTH, 3 * LENGTH)
    steps = list(read(model, loader(packed), way="shuffled", segments=np.array([3, 3])))
    own = model.initial_state(2)
    with torch.no_grad():
        for step in steps[:3]:
            exchanged = own._replace(memory=own.memory[[1, 0]])
            torch.testing.assert_close(step.output.token_losses, model(step.segment, exchanged)[0].token_losses)
            own = model.advance(step.segment, own)
    assert not torch.equal(exchanged.memory[0], exchanged.memory[1])


@pytest.mark.parametrize("build", [transformer_xl, compressive, lamemo])
def test_what_says_how_full_a_cache_is_goes_with_the_cache(build: Callable[..., SegmentModel]) -> None:
    model, packed = build(memory_length=8 * LENGTH).eval(), random_documents(8 * LENGTH, 3 * LENGTH, 2 * LENGTH)
    segments = np.array([8, 3, 2])
    shuffled, frozen = (
        list(read(model, loader(packed), way=way, segments=segments))[:8] for way in ("shuffled", "frozen")
    )
    own = stopped = model.initial_state(2)
    with torch.no_grad():
        for step in shuffled:  # the lane beside begins another document at the fourth segment
            beside = as_state(own, (field[[1, 0]] for field in own))._replace(last=own.last)
            torch.testing.assert_close(step.output.token_losses, model(step.segment, beside)[0].token_losses)
            own = model.advance(step.segment, own)
        for step in frozen:
            output, next_state = model(step.segment, stopped)
            torch.testing.assert_close(step.output.token_losses[0], output.token_losses[0])
            stopped = next_state if step.positions[0] < 4 else stopped._replace(last=next_state.last)
    assert own.filled.tolist() == [8 * LENGTH, 2 * LENGTH]
    assert stopped.filled[0] == 4 * LENGTH


def test_a_model_without_memory_and_a_single_lane_leave_ways_out() -> None:
    assert ways_for(memformer(), lanes=2) == ["on", "reset", "frozen", "shuffled"]
    assert ways_for(memformer(), lanes=1) == ["on", "reset", "frozen"]
    assert ways_for(memformer(slots=0), lanes=2) == ["on"]


def test_costs_by_position_by_hand() -> None:
    bits, tokens = np.zeros((2, 2, TENTHS)), np.zeros((2, TENTHS), dtype=np.int64)
    bits[:, 0, 3], bits[:, 1, 3], tokens[:, 3] = [10, 20], [60, 90], [10, 30]
    bits[:, 0, 4], tokens[0, 4] = [5, 5], 5
    pooled, more, error = by_position(Costs(bits, tokens, {}))
    assert pooled[:, 3].tolist() == [70 / 40, 110 / 40]
    assert more[:, 3].tolist() == [0, 1]  # one and one bit more per token
    assert error[:, 3].tolist() == [0, 0]
    assert more[1, 4] == 0
    assert np.isnan(error[1, 4])  # one document has no error
    assert np.isnan([pooled[:, 5], more[:, 5], error[:, 5]]).all()


def test_gradients_through_time_are_those_of_a_loss_in_the_memory_that_far_back() -> None:
    model, segments = memformer(), full(4)
    segments[0].document_start[:] = False
    start = model.initial_state(2)
    norms = gradient_norms(model, segments, start)
    assert norms.shape == (2, 4, 4)
    assert np.isnan(norms[:, 1, 2:]).all()
    for t in range(4):
        for n in range(t + 1):
            state = start
            with torch.no_grad():
                for segment in segments[: t - n]:
                    state = model.advance(segment, state)
            memory = state.memory.detach().requires_grad_()
            state = state._replace(memory=memory)
            for segment in segments[t - n : t + 1]:
                output, state = model(segment, state)
            (grad,) = torch.autograd.grad(output.token_losses.mean(1).sum(), memory)
            np.testing.assert_allclose(norms[:, t, n], grad.flatten(1).norm(dim=1).numpy(), rtol=1e-5)


def test_a_state_that_is_cut_off_has_no_gradient_through_time() -> None:
    class Cut(SegmentModel):
        def __init__(self) -> None:
            super().__init__(vocab_size=VOCAB, segment_length=LENGTH)
            self.inner = memformer()

        def initial_state(self, lanes: int) -> object:
            return self.inner.initial_state(lanes)

        def step(self, segment: object, state: object) -> object:
            output, next_state = self.inner.step(segment, state)
            return output, as_state(next_state, (field.detach() for field in next_state))

    segments = full(3)
    norms = gradient_norms(Cut(), segments, Cut().initial_state(2))
    assert (norms[:, [1, 2, 2], [1, 1, 2]] == 0).all()
    assert (norms[:, 1, 0] > 0).all()


def test_the_rollout_of_the_gradient_is_as_long_as_documents_allow() -> None:
    segments, chosen = rollout_of(
        random_documents(8 * LENGTH, 3, 9 * LENGTH), segment_length=LENGTH, device=torch.device("cpu")
    )
    assert (len(segments), chosen.tolist()) == (8, [0, 2])
    assert [bool(segment.document_start.any()) for segment in segments] == [True] + [False] * 7
    assert by_distance(through_time(memformer(), random_documents(8 * LENGTH), segment_length=LENGTH)).shape == (3, 4)
    assert through_time(memformer(), random_documents(LENGTH), segment_length=LENGTH).size == 0
    assert through_time(memformer(slots=0), random_documents(8 * LENGTH), segment_length=LENGTH).size == 0


def test_what_a_slot_holds_by_hand() -> None:
    retention = np.array([0.5, 0.2, 0.9])[:, None, None]
    writing = np.array([[0.3, 0.2], [0.8, 0.0], [0.0, 0.1]])[:, None, None]
    expected = [[0.3 * 0.2 * 0.9, 0.2 * 0.2 * 0.9], [0.8 * 0.9, 0], [0, 0.1]]
    np.testing.assert_allclose(held(retention, writing)[:, 0], expected)


def test_what_a_slot_holds_and_what_is_left_of_its_beginning_sum_to_one() -> None:
    for trace in record(memformer(), random_documents(23, 31), {0: 5, 1: 7}, lanes=2).values():
        share = held(trace.retention, trace.writing).sum((0, 2))
        np.testing.assert_allclose(share + trace.retention.prod(0).mean(0), 1, atol=5e-3)


def test_a_row_of_each_kind_is_the_one_most_like_the_papers() -> None:
    retention = np.full((9, 2, 3), 0.8)
    retention[4, 0] = [0.95, 0.3, 0.5]
    retention[4, 1] = [0.91, 0.1, 0.0]
    retention[0] = 0.34  # not in the middle half
    assert figures.example_rows(retention) == (4, [(1, 0), (0, 1), (1, 1)])
    assert figures.example_rows(np.full((3, 1, 2), 0.7)) == (1, [(0, 0)])


def test_labels_show_what_cannot_be_seen_and_are_short() -> None:
    assert [figures.visible(token) for token in (" a", "\n\t", "        ", "$x$")] == ["␣a", "↵⇥", "␣8", r"\$x\$"]
    assert figures.visible("internationalisation") == "internati…"


def texts_in(figure: Figure) -> set[str]:
    return {text.get_text() for text in figure.findobj(lambda part: hasattr(part, "get_text"))}


def test_the_papers_figure_names_slots_and_tokens() -> None:
    retention, writing = np.array([[[0.9, 0.1]]]), np.zeros((1, 1, 2, 3))
    writing[0, 0, :, 1] = [0.1, 0.9]
    text = np.array([["if", " x", ""]])
    figure = figures.attention_rows(retention, writing, text, slots=np.array([7, 4]))
    assert {"slot 7", "slot 4", "if", "␣x", "slot 7, head 0\nretaining", "slot 4, head 0\nreading"} <= texts_in(figure)
    (image,) = figure.axes[0].images
    np.testing.assert_allclose(image.get_array(), [[0.9, 0, 0, 0.1], [0, 0.1, 0, 0.9]])


def test_the_retention_map_has_the_slot_that_keeps_most_at_the_top() -> None:
    retention = np.tile(np.array([0.2, 1.0, 0.6]), (4, 1, 1))
    (image,) = figures.retention_map(retention, name="document 1").axes[0].images
    np.testing.assert_allclose(image.get_array()[:, 0], [1.0, 0.6, 0.2])


def test_bytes_and_lists_of_the_viewer_by_hand() -> None:
    weights = np.array([[[0.0, 0.5], [0.2, 0.1]]])  # a write, two slots, two tokens
    assert packed(weights) == "AP//gA=="  # 0 255 255 128
    assert top(weights.swapaxes(1, 2), np.array([4, 9])) == [[[(9, 0.2)], [(4, 0.5), (9, 0.1)]]]
    lives = (np.inf, 12345.6, 1234.5, 3.14)
    assert [format_half_life(life) for life in lives] == ["infinite", "over 10,000", "1,234", "3.1"]


def test_a_table_shows_markup_as_text() -> None:
    assert "<td>&lt;b&gt;</td>" in table(("a",), [("<b>",)], caption="c")


@pytest.fixture
def trained(command: Callable[..., object], small: Path, tmp_path: Path) -> list[object]:
    """The options that name a configuration and a checkpoint of it."""
    assert command("fit", "--config", small, "--trainer.max_steps", "1").code == 0
    (path,) = tmp_path.rglob("*.ckpt")
    return ["--config", small, "--ckpt_path", path]


def test_one_command_makes_a_report_that_needs_nothing_beside_it(
    command: Callable[..., object], trained: list[object], tmp_path: Path
) -> None:
    saved = tmp_path / "run" / "version_0" / "config.yaml"  # as the run left it, with options of its own
    chosen = ["--documents", "[2]", "--slots", "[0,2]"]
    outcome = command("analyze", "--config", saved, *trained[2:], *chosen)
    assert (outcome.code, outcome.errors) == (0, [])
    for shown in ("reading, memory on", "reading, memory shuffled", "gradient through time", "Written: "):
        assert shown in outcome.output
    found = saved.parent / "analysis"
    page = (found / "report.html").read_text()
    assert not re.search(r"""(?:src|href)=["'](?!#|data:)""", page.replace("xlink:href", "href"))
    for said in ("What memory is worth", "memory reset", "Of the parts in the middle of documents", "the paper"):
        assert said in page
    (data,) = re.findall(r'<script id="documents" type="application/json">(.*?)</script>', page, flags=re.DOTALL)
    shown = json.loads(data)
    findings = Findings.load(found)
    assert sorted(map(int, shown)) == findings.maps["documents"].tolist()
    for document, view in shown.items():
        assert view["text"] == findings.maps[f"text_{document}"].tolist()
        assert view["slots"] == [0, 2]
        np.testing.assert_allclose(
            view["bits"], findings.ablation[f"bits_{document}"][0, : len(view["bits"])], atol=0.01
        )
    drawn = draw(findings)
    assert page.count("<figure>") == len(drawn)
    events = EventAccumulator(str(saved.parent)).Reload()
    assert sorted(events.Tags()["images"]) == sorted(f"analysis/{name}" for name in drawn)
    assert events.Images("analysis/loss by position")[0].step == 1


def test_a_model_without_memory_is_reported_on_too(command: Callable[..., object], small: Path, tmp_path: Path) -> None:
    without = ["--config", small, "--model.model.init_args.slots", "0"]
    assert command("fit", *without, "--trainer.max_steps", "1").code == 0
    (path,) = tmp_path.rglob("*.ckpt")
    outcome = command("analyze", *without, "--ckpt_path", path, "--layers", "[3]", "--out", tmp_path / "found")
    assert (outcome.code, outcome.errors) == (0, [])
    page = (tmp_path / "found" / "report.html").read_text()
    assert "The model has no probes of a writer" in page
    assert "reset at every segment" not in page


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_every_model_is_reported_on_by_what_it_has(build: Callable[..., SegmentModel]) -> None:
    model, choice = build().eval(), Choice(documents=[1], layers=None, slots=None, segments=4)
    findings = look(model, random_documents(23, 31, 38), Bytes(), segment_length=LENGTH, lanes=2, choice=choice)
    drawn = draw(findings)
    page = compose(findings, drawn, subject="")
    remembers, has_gradient = len(ways_for(model, lanes=2)) > 1, "gradient by distance" in drawn
    shown = {"reset at every segment": remembers, "There is no gradient": remembers and not has_gradient}
    shown |= {"What slots do": slots_of(model) > 0, "<h2>Document 1</h2>": slots_of(model) > 0}
    assert {words: words in page for words in shown} == shown
    assert page.count("<figure>") == len(drawn)
    next_state = model(full(1)[0], model.initial_state(2))[1]
    assert has_gradient == any(field.requires_grad and field.numel() for field in next_state)


def test_what_cannot_be_analyzed_is_refused_before_anything_is_read(
    command: Callable[..., object], trained: list[object], tmp_path: Path
) -> None:
    for given, code, expected in (
        (["--documents", "[0,99]"], 2, "documents: there is no number 99, they go from 0 to 3"),
        (["--layers", "[1]"], 2, "layers: there is no number 1, they go from 0 to 0"),
        (["--slots", "[4]"], 2, "slots: there is no number 4, they go from 0 to 3"),
        (["--segments", "1"], 2, "segments must be at least 2"),
        (["--trainer.devices", "2"], 2, "analyze runs on one device: set --trainer.devices 1"),
        (["--data.validation", "0"], 1, "cannot validate: the split is empty"),
        (["--ckpt_path", "none.ckpt"], 1, "there is no checkpoint 'none.ckpt'"),
        (["--model.model.init_args.slots", "5"], 1, "slots (was 4, is 5)"),
    ):
        outcome = command("analyze", *trained, *given)
        (line,) = outcome.errors
        assert expected in line
        assert outcome.code == code, line
        assert "reading, memory" not in outcome.output
        assert not list(tmp_path.rglob("report.html"))


def test_a_checkpoint_is_required(command: Callable[..., object], small: Path) -> None:
    outcome = command("analyze", "--config", small)
    assert outcome.code == 2
    assert "ckpt_path" in outcome.errors[0]


def test_without_matplotlib_the_message_says_how_to_install_it(
    command: Callable[..., object], trained: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("memformer_pl.analysis")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("memformer_pl.analysis", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    outcome = command("analyze", *trained)
    assert outcome.code == 2
    assert outcome.errors == ["error: analyze needs matplotlib: pip install 'memformer-pl[analysis]'"]
