"""The benchmark of long texts: every way has the gradient of one pass, and its table says what did not fit."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "experiments" / "benchmarks"
TOY = {"layers": 1, "dim": 16, "heads": 4, "kv_heads": 2, "hidden": 24, "vocab_size": 32}
WAYS = ["plain", "checkpointed", "replay/4", "whole/4"]

Rows = Callable[..., list[dict[str, Any]]]


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the script import its neighbours, and undo what it sets."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("TRANSFORMERS_SDPA_FORCE_GQA", "0")


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    """Run the benchmark at toy size and return the rows that it writes."""
    import long_context

    def run(**options: Any) -> list[dict[str, Any]]:
        out, sizes = tmp_path / "long.json", long_context.Sizes(**TOY)
        long_context.main(sizes=sizes, repeats=2, out=out, **{"memory": False, "ways": WAYS, **options})
        written: list[dict[str, Any]] = json.loads(out.read_text())["rows"]
        return written

    return run


def test_every_way_has_the_gradient_of_one_pass_and_takes_turns_with_it(rows: Rows, tmp_path: Path) -> None:
    written = rows(lengths=[9, 4])
    assert [(row["length"], row["way"]) for row in written] == [
        *[(4, "plain"), (4, "checkpointed")],  # no shorter segment
        *((9, way) for way in WAYS),
    ]
    assert all(row["error"] < 1e-12 and row["seconds"] > 0 and len(row["ratio"]) == 3 for row in written)
    assert "| 9 | replay in segments of 4, every cache whole |" in (tmp_path / "long.md").read_text()


def test_a_wrong_gradient_shows_in_the_table(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    import long_context

    def truncated(step: Any, segments: Any, state: Any, **options: Any) -> None:
        for segment in segments:
            loss, state = step(segment, state)
            loss.backward()
            for layer in state.layers:
                layer.keys, layer.values = layer.keys.detach(), layer.values.detach()

    monkeypatch.setattr(long_context, "replay_backward", truncated)
    errors = {row["way"]: row["error"] for row in rows(lengths=[9])}
    assert errors["checkpointed"] < 1e-12
    assert errors["replay/4"] > 1e-3


def test_a_way_that_needs_too_much_is_not_tried_with_a_longer_text(
    rows: Rows, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import long_context

    def once(module: str, function: str, *, sizes: dict[str, Any], way: str, threads: int) -> dict[str, Any]:
        kind, length = way.partition("/")[0], sizes["length"]
        if kind == "whole" and length > 9:
            return {"failed": "out of memory"}
        return {"peak": length * 2**20 if kind == "plain" else 2**20, "seconds": 3.0}

    monkeypatch.setattr(long_context, "in_new_process", once)
    written = rows(lengths=[8, 10, 12], memory=True, limit=9 / 1024)
    tried = {way: [row["length"] for row in written if row["way"] == way] for way in WAYS}
    assert tried == {"plain": [8, 10], "checkpointed": [8, 10, 12], "replay/4": [8, 10, 12], "whole/4": [8, 10]}
    assert all(row["seconds"] == 3.0 and "ratio" not in row for row in written if row["length"] == 12)
    table = (tmp_path / "long.md").read_text()
    assert re.search(r"\| 10 \| replay in segments of 4, every cache whole \| .* \| out of memory \|  \|  \|", table)


def test_running_out_of_a_devices_memory_is_a_result_and_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import long_context

    case = long_context.Case(long_context.Sizes(**TOY, length=8))

    def exhausted(self: Any, logits: Any, targets: Any) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(long_context.Case, "_loss", exhausted)
        assert long_context.measured(case, long_context.Way("checkpointed"), "cpu") == {"failed": "out of memory"}
    assert not case.model.is_activation_checkpointing
    assert long_context.measured(case, long_context.Way("replay", 4), "cpu")["seconds"] > 0


@pytest.mark.parametrize("written", ["replay", "replay/0", "plain/4", "bptt/4", "whole/x"])
def test_a_way_is_checked(written: str) -> None:
    from long_context import Way

    with pytest.raises(ValueError, match=rf"a way is plain, .* got '{written}'"):
        Way.parse(written)


def test_replay_takes_less_memory_than_one_pass_in_processes_of_their_own() -> None:
    import long_context

    sizes = asdict(long_context.Sizes(**{**TOY, "vocab_size": 512, "dim": 32}, length=4096))
    peaks = {
        way: long_context.in_new_process("long_context", "once", sizes=sizes, way=way, threads=1)["peak"]
        for way in ("plain", "replay/256")
    }
    assert 0 < peaks["replay/256"] < 0.5 * peaks["plain"]
