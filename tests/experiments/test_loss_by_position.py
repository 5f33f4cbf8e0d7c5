"""Savings by position in the document add up to what the documents cost."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Outcome

from memformer_pl.cli.compare import document_costs

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture
def runs(small: Path, command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A run with memory and one without, both with the closing report."""
    monkeypatch.syspath_prepend(EXPERIMENTS)
    folders = []
    for slots in (4, 0):
        options = [f"--model.model.init_args.slots={slots}", f"--trainer.logger.init_args.version={slots}_slots"]
        assert command("fit", f"--config={small}", *options, "--trainer.callbacks=[ClosingReport]").code == 0
        folders.append(small.parent / "run" / f"{slots}_slots")
    return folders


def test_savings_by_position_add_up_to_those_of_the_documents(runs: list[Path], tmp_path: Path) -> None:
    import loss_by_position

    _, data = loss_by_position.data_of(runs[0])
    costs = [loss_by_position.bits(run, data, of="document") for run in runs]
    for run, (bits, tokens) in zip(runs, costs, strict=True):
        np.testing.assert_allclose(bits.sum(1), document_costs(run)["with_memory"], rtol=1e-6)
        np.testing.assert_array_equal(tokens.sum(1), data.packed.validation.lengths)
        assert (tokens[:, 0] == np.minimum(data.packed.validation.lengths, 16)).all()
    loss_by_position.main(tmp_path / "savings.png", runs)
    result = json.loads((tmp_path / "savings.json").read_text())
    assert (result["against"], list(result["saves"])) == ("0 slots", ["4 slots"])
    (with_memory, tokens), (without, _) = costs
    gains = (without - with_memory)[:, 0] / tokens[:, 0]
    first = result["saves"]["4 slots"][0]
    assert (first["begins"], first["documents"]) == (0, len(gains))
    assert first["saves"] == pytest.approx(gains.mean())
    assert first["error"] == pytest.approx(gains.std(ddof=1) / len(gains) ** 0.5)
    assert result["bits_per_token"]["4 slots"][0] == pytest.approx(with_memory[:, 0].sum() / tokens[:, 0].sum())
    assert (tmp_path / "savings.png").stat().st_size > 5_000


def test_savings_by_position_in_the_segment_add_up_to_the_same(runs: list[Path], tmp_path: Path) -> None:
    import loss_by_position

    _, data = loss_by_position.data_of(runs[0])
    bits, tokens = loss_by_position.bits(runs[0], data, of="segment")
    np.testing.assert_allclose(bits.sum(1), document_costs(runs[0])["with_memory"], rtol=1e-6)
    lengths = data.packed.validation.lengths
    np.testing.assert_array_equal(tokens[:, 0], -(-lengths // 8))  # the first token of each segment
    np.testing.assert_array_equal(tokens[:, 3], lengths // 8 * 4 + (lengths % 8 - 4).clip(min=0))  # from the fifth on
    assert not tokens[:, 4:].any()
    loss_by_position.main(tmp_path / "savings.png", runs, of="segment")
    assert [point["begins"] for point in json.loads((tmp_path / "savings.json").read_text())["saves"]["4 slots"]] == [
        *(0, 1, 2, 4)
    ]


def test_runs_on_different_data_are_refused(runs: list[Path], tmp_path: Path) -> None:
    import loss_by_position

    config = runs[0] / "config.yaml"
    for changed, of in (("segment_length: 4", "segment"), ("validation: 0.4", "document")):
        name = changed.partition(":")[0]
        config.write_text(re.sub(rf"{name}: .*", changed, config.read_text()))
        with pytest.raises(ValueError, match=r"differ from .*0_slots in one of corpus.*: they cannot be compared"):
            loss_by_position.main(tmp_path / "savings.png", runs, of=of)
