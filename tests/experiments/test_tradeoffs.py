"""The figure of what is reached against what it costs has the points that the results say."""

import json
import runpy
from pathlib import Path

import pytest
import yaml
from matplotlib import pyplot as plt

from memformer_pl.sweeps import rows, tables

SCRIPT = Path(__file__).parents[2] / "experiments" / "tradeoffs.py"


@pytest.fixture
def table(tmp_path: Path) -> rows.Table:
    """A row with two seeds, of which a third diverged; one that carries nothing; one that carries more with every
    token; and one whose only run diverged."""
    content = {
        "base": ["base.yaml"],
        "seeds": [0, 1, 2],
        "metrics": {"distance/3": "near"},
        "rows": {name: {"title": name} for name in ("lost", "some", "none", "grows")},
    }
    (tmp_path / "base.yaml").write_text("model: {learning_rate: 1.0e-3}\n")
    (tmp_path / "rows.yaml").write_text(yaml.safe_dump(content))
    read = rows.read(tmp_path / "rows.yaml")
    with read.ledger.open("w") as ledger:
        for name, seed, value, size in (
            ("some", 2, None, None),  # diverged
            ("some", 0, 0.5, 2048),
            ("some", 1, 1.0, 2048),
            ("none", 0, 0.0, 0),
            ("grows", 0, 0.25, None),
            ("lost", 0, None, None),
        ):
            (row,) = [row for row in read.rows if row.name == name]
            line = {"row": name, "seed": seed, "fingerprint": row.fingerprint}
            costs = {"state_bytes": size, "parameters": 1, "operations_per_token": 3e6}
            reached = {"diverged": True} if value is None else {"distance/3": value}
            ledger.write(json.dumps(line | costs | reached) + "\n")
    return read


@pytest.mark.parametrize(
    ("cost", "at"), [("carried", {"some": 2.0}), ("operations", {"some": 3.0, "none": 3.0, "grows": 3.0})]
)
def test_a_point_is_the_mean_of_the_seeds_at_what_the_row_costs(
    table: rows.Table, cost: str, at: dict[str, float]
) -> None:
    script = runpy.run_path(str(SCRIPT))
    figure, axes = plt.subplots()
    script["draw"](axes, tables.outcomes(table).values(), "distance/3", script["COSTS"][cost])
    drawn = {bars.get_label(): bars.lines[0].get_xydata().tolist() for bars in axes.containers}
    reached = {"some": ("some (2)", 0.75), "none": ("none (1)", 0.0), "grows": ("grows (1)", 0.25)}
    places = {"none": 0.0, **at}
    assert drawn == {reached[name][0]: [[place, reached[name][1]]] for name, place in places.items()}
    plt.close(figure)


def test_the_picture_is_written(table: rows.Table, tmp_path: Path) -> None:
    script = runpy.run_path(str(SCRIPT))
    path = str(table.ledger.with_name("rows.yaml"))
    script["main"](path, tmp_path / "out.png", metrics=["distance/3"], costs=["carried", "operations", "parameters"])
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
