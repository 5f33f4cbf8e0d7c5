"""The share of rows that are looked up, against the picks themselves."""

from pathlib import Path

import pytest
from models import ULTRA, memformer, shown
from watched import data_of, validate

from memformer_pl.callbacks import RowsHit
from memformer_pl.models import Memformer

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")


def model_of(*layers: int) -> Memformer:
    sizes = {"keys": 20, "key_dim": 2, "picks": 2, "value_dim": 4}
    option = {**ULTRA, "init_args": sizes, "layers": list(layers)} if layers else None
    return memformer(vocab_size=256, segment_length=8, feed_forward=option).float()


def test_the_share_of_rows_that_a_validation_hits_is_that_of_its_picks(
    tmp_path: Path, texts: Path, pack_cache: Path
) -> None:
    model = model_of(1, 2)
    seen = {
        f"{name}.ffn": shown(part.ffn.picked)
        for name, part in (("encoder.1", model.encoder[1]), ("decoder.0", model.decoder[0]))
    }
    metrics = validate(tmp_path, model, data_of(texts, pack_cache), RowsHit()).callback_metrics
    shares = {name: float(metrics[f"rows_hit/{name}"]) for name in seen}
    for name, picks in seen.items():
        rows = {address % 400 for each in picks for address in each.flatten().tolist()}
        assert shares[name] == pytest.approx(len(rows) / 400)
        assert 0.05 < shares[name] < 1


def test_each_validation_counts_anew_and_leaves_no_hook_behind(tmp_path: Path, texts: Path, pack_cache: Path) -> None:
    model, callback, data = model_of(1), RowsHit(), data_of(texts, pack_cache)
    probe = model.encoder[1].ffn.picked
    first, again = (validate(tmp_path, model, data, callback).callback_metrics for _ in range(2))
    assert first["rows_hit/encoder.1.ffn"] == again["rows_hit/encoder.1.ffn"]
    assert not probe.watched


def test_for_a_model_without_a_table_nothing_is_logged(tmp_path: Path, texts: Path, pack_cache: Path) -> None:
    metrics = validate(tmp_path, model_of(), data_of(texts, pack_cache), RowsHit()).callback_metrics
    assert not [name for name in metrics if name.startswith("rows_hit")]
