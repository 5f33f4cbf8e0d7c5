"""The stages of ARMT's curriculum follow each other, end when they are learnt, and are not trained twice."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from memformer_pl.sweeps import rows

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture
def curriculum(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(EXPERIMENTS / "remember")
    import curriculum

    return curriculum


def staged(curriculum: Any, task: str, **options: Any) -> list[Any]:
    row = next(row for row in rows.read(EXPERIMENTS / "remember" / "rows.yaml").rows if row.name == "armt")
    changed = row._replace(override=rows.stack(row.override, options))
    return list(curriculum.stage_rows(changed, task, curriculum.STAGES[task]))


@pytest.mark.parametrize("task", ["Remember", "Rewrite"])
def test_the_stages_are_those_of_the_paper_and_their_documents_can_be_made(curriculum: Any, task: str) -> None:
    from memformer_pl import data

    for row, (pairs, _) in zip(staged(curriculum, task), curriculum.STAGES[task], strict=True):
        given = row.stacked["data"]
        made = getattr(data, given["corpus"]["class_path"])(**given["corpus"]["init_args"])
        assert (type(made).__name__, made.pairs, made.tested[0]) == (task, pairs, pairs)
        assert made.segment_length == given["segment_length"]
    assert [pairs for pairs, _ in curriculum.STAGES[task]][:8] == [1, 2, 3, 5, 10, 20, 40, 50]


def test_a_stage_counts_as_another_one_if_a_stage_before_it_has_changed(curriculum: Any) -> None:
    first, second, *_ = staged(curriculum, "Remember")
    changed_first, changed_second, *_ = staged(curriculum, "Remember", trainer={"max_steps": 7})
    assert first.fingerprint != changed_first.fingerprint
    changed_second.override["trainer"]["max_steps"] = second.stacked["trainer"]["max_steps"]
    assert changed_second.stacked == second.stacked
    assert changed_second.fingerprint != second.fingerprint == staged(curriculum, "Remember")[1].fingerprint


@pytest.mark.slow
def test_stages_end_when_they_are_learnt_start_from_the_one_before_and_are_not_trained_twice(
    curriculum: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = yaml.safe_load((EXPERIMENTS / "remember" / "base.yaml").read_text())
    base["model"]["model"] = {"class_path": "LSTM", "init_args": {"dim": 8, "layers": 1}}
    base["data"] |= {"batch_size": 2, "evaluation_batch_size": 8, "cache": str(tmp_path / "cache")}
    base["data"]["corpus"]["init_args"] |= {"examples": 20, "questions": 4}
    base["trainer"] |= {"max_steps": 4, "val_check_interval": 2, "log_every_n_steps": 1}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    table = {"base": ["base.yaml"], "seeds": [0], "metrics": {"exact/1": "1"}, "rows": {"lstm": {"title": "LSTM"}}}
    (tmp_path / "rows.yaml").write_text(yaml.safe_dump(table))
    monkeypatch.setattr(curriculum.signal, "signal", lambda *_: None)
    given: dict[str, Any] = {"only": [], "seeds": [], "workers": 1, "runs": tmp_path / "runs", "options": []}
    given |= {"table": tmp_path / "rows.yaml", "stages": 2}
    assert curriculum.main("Rewrite", **given)
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(line["row"], line["steps"]) for line in lines] == [("lstm.rewrite.1", 4), ("lstm.rewrite.2", 4)]
    assert {"exact/1", "exact/2", "exact/4"} <= lines[0].keys() | lines[1].keys()
    (config,) = (tmp_path / "runs").rglob("lstm.rewrite.2-*/seed_0/config.yaml")
    (start,) = re.findall(r"path: (.*lstm.rewrite.1-.*last.ckpt)", config.read_text())
    assert Path(start).is_file()
    assert "| LSTM | " in capsys.readouterr().out
    assert curriculum.main("Rewrite", **given)
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 2
    monkeypatch.setattr(curriculum, "LEARNT", -1.0)  # any share is above it
    assert curriculum.main("Rewrite", **(given | {"stages": 1}))
    assert json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[-1])["steps"] == 2
