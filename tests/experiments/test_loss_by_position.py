"""What memory saves by place in the document adds up to what the documents cost."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Outcome

from memformer_pl.cli.compare import read

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


def test_savings_by_place_are_those_of_the_documents(runs: list[Path], tmp_path: Path) -> None:
    import places

    _, data = places.data_of(runs[0])
    costs = [places.bits(run, data) for run in runs]
    for run, (bits, tokens) in zip(runs, costs, strict=True):
        np.testing.assert_allclose(bits.sum(1), read(run)["with_memory"], rtol=1e-6)
        np.testing.assert_array_equal(tokens.sum(1), data.packed.validation.lengths)
        assert (tokens[:, 0] == np.minimum(data.packed.validation.lengths, 8)).all()
    places.main(tmp_path / "places.png", runs)
    told = json.loads((tmp_path / "places.json").read_text())
    assert (told["against"], list(told["saves"])) == ("0 slots", ["4 slots"])
    (with_memory, tokens), (without, _) = costs
    gains = (without - with_memory)[:, 0] / tokens[:, 0]
    first = told["saves"]["4 slots"][0]
    assert (first["begins"], first["documents"]) == (0, len(gains))
    assert first["saves"] == pytest.approx(gains.mean())
    assert first["error"] == pytest.approx(gains.std(ddof=1) / len(gains) ** 0.5)
    assert (tmp_path / "places.png").stat().st_size > 5_000


def test_runs_on_other_data_are_refused(runs: list[Path], tmp_path: Path) -> None:
    import places

    config = runs[0] / "config.yaml"
    config.write_text(config.read_text().replace("segment_length: 8", "segment_length: 4"))
    with pytest.raises(ValueError, match=r"were trained on other data than .*0_slots: they cannot be compared"):
        places.main(tmp_path / "places.png", runs)
