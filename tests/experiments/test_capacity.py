"""The figure of accuracy against the bytes carried has the points that the results say."""

import json
import runpy
from pathlib import Path

import pytest
import yaml
from matplotlib import pyplot as plt

from memformer_pl.sweeps import rows, tables

SCRIPT = Path(__file__).parents[2] / "experiments" / "recall" / "capacity.py"


@pytest.fixture
def table(tmp_path: Path) -> rows.Table:
    """Two rows, one of which carries nothing and has one seed."""
    content = {
        "base": ["base.yaml"],
        "seeds": [0, 1],
        "metrics": {"distance/3": "near"},
        "rows": {"some": {"title": "some"}, "none": {"title": "none"}},
    }
    (tmp_path / "base.yaml").write_text("model: {learning_rate: 1.0e-3}\n")
    (tmp_path / "rows.yaml").write_text(yaml.safe_dump(content))
    read = rows.read(tmp_path / "rows.yaml")
    with read.ledger.open("w") as ledger:
        for name, seed, value, size in (("some", 0, 0.5, 2048), ("some", 1, 1.0, 2048), ("none", 0, 0.0, 0)):
            (row,) = [row for row in read.rows if row.name == name]
            line = {"row": name, "seed": seed, "fingerprint": row.fingerprint, "distance/3": value, "state_bytes": size}
            ledger.write(json.dumps({**line, "parameters": 1, "operations_per_token": 1}) + "\n")
    return read


def test_a_point_is_the_mean_of_the_seeds_at_the_bytes_carried(table: rows.Table) -> None:
    script = runpy.run_path(str(SCRIPT))
    figure, axes = plt.subplots()
    script["draw"](axes, tables.outcomes(table), "distance/3")
    drawn = {bars.get_label(): bars.lines[0].get_xydata().tolist() for bars in axes.containers}
    assert drawn == {"some (2)": [[2.0, 0.75]], "none (1)": [[script["NOTHING"], 0.0]]}
    plt.close(figure)


def test_the_picture_is_written(table: rows.Table, tmp_path: Path) -> None:
    script = runpy.run_path(str(SCRIPT))
    script["main"](str(table.ledger.with_name("rows.yaml")), tmp_path / "out.png", metrics=["distance/3"])
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
