"""The benchmark of other libraries runs without them, and its table shows a gradient that is wrong."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

BENCHMARKS = Path(__file__).parents[2] / "experiments" / "benchmarks"
TOY = {"segments": 3, "lanes": 2, "segment_length": 8, "vocab_size": 16, "dim": 16, "heads": 2, "layers": 2, "slots": 4}

Rows = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Rows:
    """Run the benchmark where of all libraries only ``fake_peer`` is installed, and return the rows that it writes."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import peers

    (tmp_path / "fake_peer.py").write_text("")
    (tmp_path / "fake_peer-1.2.dist-info").mkdir()
    (tmp_path / "fake_peer-1.2.dist-info" / "METADATA").write_text("Name: fake-peer\nVersion: 1.2\n")
    monkeypatch.syspath_prepend(tmp_path)
    installed = ("memformer_pl", "fake_peer")
    monkeypatch.setattr(peers, "find_spec", lambda name: find_spec(name) if name in installed else None)

    def run(**options: Any) -> list[dict[str, Any]]:
        out = tmp_path / "peers.json"
        peers.main(sizes=peers.Sizes(**TOY), repeats=2, out=out, **{"memory": False, **options})
        written: list[dict[str, Any]] = json.loads(out.read_text())["rows"]
        return written

    return run


class Recurrent(nn.Module):
    """A recurrent network that stands for another library's model."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embedding, self.cell, self.drop = nn.Embedding(16, 8), nn.GRUCell(8, 8), nn.Dropout(dropout)

    def forward(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        for token in tokens.unbind(1):
            state = self.drop(self.cell(self.embedding(token), state))
        return (state @ self.embedding.weight.T).square().mean(), state


def loop(model: Recurrent, tokens: Tensor, sizes: Any) -> Tensor:
    total = state = tokens.new_zeros(len(tokens), 8, dtype=model.embedding.weight.dtype)
    for segment in tokens.split(sizes.segment_length, 1):
        loss, state = model(segment, state)
        total = total + loss
    return total.mean()


def replay(model: Recurrent, tokens: Tensor, sizes: Any) -> None:
    """Exact without dropout; with dropout the second pass draws other masks than the first."""
    segments = tokens.split(sizes.segment_length, 1)
    states = [tokens.new_zeros(len(tokens), 8, dtype=model.embedding.weight.dtype)]
    with torch.no_grad():
        for segment in segments:
            states.append(model(segment, states[-1])[1])
    gradient = torch.zeros_like(states[0])
    for segment, state in zip(reversed(segments), reversed(states[:-1]), strict=True):
        loss, following = model(segment, state.requires_grad_())
        torch.autograd.backward([loss, following], [None, gradient])
        assert state.grad is not None
        gradient = state.grad


def detached(model: Recurrent, tokens: Tensor, sizes: Any) -> None:
    state = tokens.new_zeros(len(tokens), 8, dtype=model.embedding.weight.dtype)
    for segment in tokens.split(sizes.segment_length, 1):
        loss, state = model(segment, state.detach())
        loss.backward()


def refusing(model: Recurrent, tokens: Tensor, sizes: Any) -> None:
    raise RuntimeError("needs another torch\nand more")


def test_the_benchmark_runs_with_no_other_library(rows: Rows, tmp_path: Path) -> None:
    written = rows()
    ours = [row for row in written if row["library"] == "this package"]
    others = [row for row in written if row["library"] != "this package"]
    assert len(ours) == 2 * 10
    assert all(row["error"] < 1e-12 and row["seconds"] > 0 and len(row["ratios"]) in (2, 3) for row in ours)
    assert {row["problem"] for row in others} == {"not installed"}
    assert len({row["library"] for row in others}) == 7
    assert "x-transformers: XLAutoregressiveWrapper" in (tmp_path / "peers.md").read_text()


def test_every_library_of_the_table_is_in_the_extra_and_none_is_imported_with_the_script(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import sys
    import tomllib

    monkeypatch.syspath_prepend(BENCHMARKS)
    from peer_libraries import LIBRARIES

    project = tomllib.loads((BENCHMARKS.parents[1] / "pyproject.toml").read_text())["project"]
    named = {requirement.split(">")[0] for requirement in project["optional-dependencies"]["peers"]}
    assert {way.library for way in LIBRARIES} == named
    assert not {way.module for way in LIBRARIES} & set(sys.modules)


def test_the_table_shows_which_gradient_of_a_library_is_wrong(
    rows: Rows, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import peers

    trains = {"exact": None, "replay": replay, "detached": detached, "refusing": refusing}
    fakes = [
        peers.Way(
            model="TransformerXL",
            library="fake-peer",
            module="fake_peer",
            called=called,
            build=lambda sizes, dropout: Recurrent(dropout),
            loss=loop,
            train=train,
        )
        for called, train in trains.items()
    ]
    monkeypatch.setattr(peers, "LIBRARIES", fakes)
    written = {
        (row["called"], row["dropout"]): row
        for row in rows(models=["TransformerXL"], dropouts=[0.0, 0.3])
        if row["library"] == "fake-peer"
    }
    assert {row["version"] for row in written.values()} == {"1.2"}
    assert written["exact", 0.3]["error"] is None
    assert written["replay", 0.0]["error"] < 1e-12
    assert written["replay", 0.3]["error"] > 0.01
    assert written["detached", 0.0]["error"] > 0.01
    assert written["refusing", 0.0]["problem"] == "RuntimeError: needs another torch\nand more"
    assert set(written["exact", 0.0]["ratios"]) == {"truncated", "truncated, all segments in one group", "bptt"}
    markdown = (tmp_path / "peers.md").read_text()
    assert "| RuntimeError: needs another torch |" in markdown


def test_weights_that_a_library_stops_training_are_counted(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    import peers

    def frozen_after_the_first(model: Recurrent, tokens: Tensor, sizes: Any) -> None:
        loop(model, tokens, sizes).backward()
        model.cell.weight_hh.requires_grad_(False)

    fake = peers.Way(
        model="TransformerXL",
        library="fake-peer",
        module="fake_peer",
        called="fit",
        build=lambda sizes, dropout: Recurrent(dropout),
        loss=loop,
        train=frozen_after_the_first,
        dropout=False,
    )
    monkeypatch.setattr(peers, "LIBRARIES", [fake])
    written = rows(models=["TransformerXL"])
    assert [row["untrained"] for row in written if row["called"] == "fit"] == [3 * 8 * 8]
    assert {row["untrained"] for row in written if row["library"] == "this package"} == {0}


@pytest.mark.usefixtures("rows")
def test_memory_is_measured_in_a_process_of_its_own() -> None:
    import peers

    peaks = {
        called: peers.in_new_process(
            "peers",
            "peak_of",
            called=called,
            library="this package",
            model="Memformer",
            sizes=TOY | {"segments": 32, "dim": 64, "segment_length": 32},
            dropout=0.1,
            threads=1,
        )
        for called in ("replay", "bptt")
    }
    assert 0 < peaks["replay"] < 0.5 * peaks["bptt"]
